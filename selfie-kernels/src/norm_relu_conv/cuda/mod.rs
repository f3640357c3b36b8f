pub(crate) mod backward_filter;

pub(crate) use backward_filter::norm_relu_conv_backward_filter;

use super::{BackwardData, Forward, ProjectionBackwardData};
use crate::cuda::CudaElement;
use crate::{Cuda, Error, Result};

pub(crate) fn norm_relu_conv_forward<T: CudaElement>(_cuda: &Cuda, _args: Forward<'_, Cuda, T>) -> Result<()> {
    Err(Error::Launch { kernel: "norm_relu_conv_forward".into(), reason: "not written yet".into() })
}

pub(crate) fn norm_relu_conv_backward_data<T: CudaElement>(
    _cuda: &Cuda,
    _args: BackwardData<'_, Cuda, T>,
) -> Result<()> {
    Err(Error::Launch { kernel: "norm_relu_conv_backward_data".into(), reason: "not written yet".into() })
}

pub(crate) fn projection_backward_data<T: CudaElement>(
    _cuda: &Cuda,
    _args: ProjectionBackwardData<'_, Cuda, T>,
) -> Result<()> {
    Err(Error::Launch { kernel: "projection_backward_data".into(), reason: "not written yet".into() })
}

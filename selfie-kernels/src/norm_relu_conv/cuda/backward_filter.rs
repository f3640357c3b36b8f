use super::super::BackwardFilter;
use crate::cuda::CudaElement;
use crate::{Cuda, Error, Result};

pub(crate) fn norm_relu_conv_backward_filter<T: CudaElement>(
    _cuda: &Cuda,
    _args: BackwardFilter<'_, Cuda, T>,
) -> Result<()> {
    Err(Error::Launch { kernel: "norm_relu_conv_backward_filter".into(), reason: "not written yet".into() })
}

use super::{BackwardFilter, Forward};
use crate::cuda::CudaElement;
use crate::{Cuda, Error, Result};

pub(crate) fn stem_conv_forward<T: CudaElement>(_cuda: &Cuda, _args: Forward<'_, Cuda, T>) -> Result<()> {
    Err(Error::Launch { kernel: "stem_conv_forward".into(), reason: "not written yet".into() })
}

pub(crate) fn stem_conv_backward_filter<T: CudaElement>(
    _cuda: &Cuda,
    _args: BackwardFilter<'_, Cuda, T>,
) -> Result<()> {
    Err(Error::Launch { kernel: "stem_conv_backward_filter".into(), reason: "not written yet".into() })
}

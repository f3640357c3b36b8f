use super::{Backward, Forward, Inference};
use crate::cuda::CudaElement;
use crate::{Cuda, Error, Result};

pub(crate) fn bn_finalize_forward<T: CudaElement>(_cuda: &Cuda, _args: Forward<'_, Cuda, T>) -> Result<()> {
    Err(Error::Launch { kernel: "bn_finalize_forward".into(), reason: "not written yet".into() })
}

pub(crate) fn bn_finalize_inference<T: CudaElement>(_cuda: &Cuda, _args: Inference<'_, Cuda, T>) -> Result<()> {
    Err(Error::Launch { kernel: "bn_finalize_inference".into(), reason: "not written yet".into() })
}

pub(crate) fn bn_finalize_backward<T: CudaElement>(_cuda: &Cuda, _args: Backward<'_, Cuda, T>) -> Result<()> {
    Err(Error::Launch { kernel: "bn_finalize_backward".into(), reason: "not written yet".into() })
}

use super::{Accumulate, Norm, Update};
use crate::cuda::CudaElement;
use crate::{Cuda, Error, Result};

pub(crate) fn gradient_norm<T: CudaElement>(_cuda: &Cuda, _args: Norm<'_, Cuda, T>) -> Result<()> {
    Err(Error::Launch { kernel: "gradient_norm".into(), reason: "not written yet".into() })
}

pub(crate) fn gradient_accumulate<T: CudaElement>(_cuda: &Cuda, _args: Accumulate<'_, Cuda, T>) -> Result<()> {
    Err(Error::Launch { kernel: "gradient_accumulate".into(), reason: "not written yet".into() })
}

pub(crate) fn sgd_update<T: CudaElement>(_cuda: &Cuda, _args: Update<'_, Cuda, T>) -> Result<()> {
    Err(Error::Launch { kernel: "sgd_update".into(), reason: "not written yet".into() })
}

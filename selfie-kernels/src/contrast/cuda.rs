use super::Args;
use crate::cuda::CudaElement;
use crate::{Cuda, Error, Result};

pub(crate) fn contrast<T: CudaElement>(_cuda: &Cuda, _args: Args<'_, Cuda, T>) -> Result<()> {
    Err(Error::Launch { kernel: "contrast".into(), reason: "not written yet".into() })
}

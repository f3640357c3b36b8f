use super::Args;
use crate::cuda::CudaElement;
use crate::{Cuda, Error, Result};

pub(crate) fn augment<T: CudaElement>(_cuda: &Cuda, _args: Args<'_, Cuda, T>) -> Result<()> {
    Err(Error::Launch { kernel: "augment".into(), reason: "not written yet".into() })
}

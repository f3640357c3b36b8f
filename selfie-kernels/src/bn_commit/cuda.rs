use super::Commit;
use crate::cuda::CudaElement;
use crate::{Cuda, Error, Result};

pub(crate) fn bn_commit<T: CudaElement>(_cuda: &Cuda, _args: Commit<'_, Cuda, T>) -> Result<()> {
    Err(Error::Launch { kernel: "bn_commit".into(), reason: "not written yet".into() })
}

use super::Join;
use crate::cuda::CudaElement;
use crate::{Cuda, Error, Result};

pub(crate) fn grad_join<T: CudaElement>(_cuda: &Cuda, _args: Join<'_, Cuda, T>) -> Result<()> {
    Err(Error::Launch { kernel: "grad_join".into(), reason: "not written yet".into() })
}

use super::{BackwardData, BackwardWeight, Forward};
use crate::cuda::CudaElement;
use crate::{Cuda, Error, Result};

pub(crate) fn gemm_forward<T: CudaElement>(_cuda: &Cuda, _args: Forward<'_, Cuda, T>) -> Result<()> {
    Err(Error::Launch { kernel: "gemm_forward".into(), reason: "not written yet".into() })
}

pub(crate) fn gemm_backward_data<T: CudaElement>(_cuda: &Cuda, _args: BackwardData<'_, Cuda, T>) -> Result<()> {
    Err(Error::Launch { kernel: "gemm_backward_data".into(), reason: "not written yet".into() })
}

pub(crate) fn gemm_backward_weight<T: CudaElement>(_cuda: &Cuda, _args: BackwardWeight<'_, Cuda, T>) -> Result<()> {
    Err(Error::Launch { kernel: "gemm_backward_weight".into(), reason: "not written yet".into() })
}

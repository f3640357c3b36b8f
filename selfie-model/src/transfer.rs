//! Whole buffers between device and host.

use crate::error::Result;
use selfie_kernels::{Len, Memory, Scalar, View};

/// A buffer's elements.
pub(crate) fn download<M: Memory, S: Scalar>(device: &M, buffer: &M::Buffer<S>) -> Result<Vec<S>> {
    let mut host = vec![S::default(); M::len(buffer)];
    device.download(M::all(buffer), &mut host)?;
    Ok(host)
}

/// Overwrites a buffer; lengths must agree.
pub(crate) fn upload<M: Memory, S: Scalar>(device: &M, host: &[S], buffer: &mut M::Buffer<S>) -> Result<()> {
    Ok(device.upload(host, M::all_mut(buffer))?)
}

/// A view's elements.
pub(crate) fn download_view<M: Memory, S: Scalar>(device: &M, view: View<'_, M, S>) -> Result<Vec<S>> {
    let mut host = vec![S::default(); view.len()];
    device.download(view, &mut host)?;
    Ok(host)
}

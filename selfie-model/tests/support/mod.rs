//! What tests on several devices share.

use selfie_kernels::{Cuda, Memory, Scalar};

/// The GPU, or the emulator whose library is in `SELFIE_EMULATOR`.
pub(crate) fn cuda() -> Cuda {
    match std::env::var_os("SELFIE_EMULATOR") {
        Some(library) => Cuda::emulated(library.as_ref()).expect("the emulator loads"),
        None => Cuda::new(0).expect("a GPU, or the emulator's library in SELFIE_EMULATOR"),
    }
}

/// A buffer's elements.
pub(crate) fn download<M: Memory, S: Scalar>(device: &M, buffer: &M::Buffer<S>) -> Vec<S> {
    let mut host = vec![S::default(); M::len(buffer)];
    device.download(M::all(buffer), &mut host).expect("as many");
    host
}

//! A gradient as one tensor, for kernels that read it often.

use crate::cuda::{Address, CudaElement, GradArgs, Grid};
use crate::{ConvDims, Cuda, Result};

/// `FormGradientArgs` of `norm_relu_conv_backward_data.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct FormGradientArgs {
    dz: Address,
    x: Address,
    coef: Address,
    dy: Address,
    chunks: u64,
    k: i32,
    unused: i32,
}

/// A part of the workspace.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    address: Address,
    bytes: usize,
}

impl Room {
    /// All but the first so many bytes.
    pub(super) fn behind(cuda: &Cuda, bytes: usize) -> Self {
        let start = bytes.next_multiple_of(256).min(cuda.workspace_bytes());
        Self { address: cuda.workspace().offset(start), bytes: cuda.workspace_bytes() - start }
    }
}

/// Threads of a block of the kernel; each has one chunk of channels always.
const THREADS: usize = 256;

/// Calls `use_part` for some images after the other, with the first one, how many they are, and their gradient of `y`: all
/// images where it is one tensor already; else as many as leave what is formed of their gradient in the L2, or at
/// least in this room, in multiples of `whole` but for the last. [`None`] where not even that many have room.
pub(super) fn for_each_part<T: CudaElement>(
    cuda: &Cuda,
    d: &ConvDims,
    grad: GradArgs,
    whole: usize,
    room: Room,
    use_part: impl Fn(usize, ConvDims, Address) -> Result<()>,
) -> Option<Result<()>> {
    if grad.coef == Address::NONE {
        return Some(use_part(0, *d, grad.dy));
    }
    if !d.k.is_multiple_of(8) || !THREADS.is_multiple_of(d.k / 8) {
        return None;
    }
    let image = d.p() * d.q() * d.k * 2;
    let within = |bytes: usize| if d.n * image <= bytes { d.n } else { bytes / image / whole * whole };
    let rooms = [room.bytes.min(cuda.facts().l2_bytes / 2), room.bytes];
    let images = rooms.into_iter().map(within).find(|&images| images > 0)?;
    let mut parts = (0..d.n).step_by(images);
    Some(parts.try_for_each(|first| {
        let part = ConvDims { n: images.min(d.n - first), ..*d };
        let [dy, x] = [grad.dy, grad.x].map(|place| place.offset(first * image));
        form::<T>(cuda, GradArgs { dy, x, ..grad }, &part, room.address)?;
        use_part(first, part, room.address)
    }))
}

fn form<T: CudaElement>(cuda: &Cuda, grad: GradArgs, d: &ConvDims, dy: Address) -> Result<()> {
    const AT_ONCE: usize = 4;
    const RESIDENT: usize = 8;
    let chunks = d.len_out() / 8;
    let GradArgs { dy: dz, x, coef } = grad;
    let args = FormGradientArgs { dz, x, coef, dy, chunks: chunks as u64, k: d.k as i32, unused: 0 };
    let blocks = chunks.div_ceil(THREADS * AT_ONCE).min(RESIDENT * cuda.facts().multiprocessors);
    cuda.launch::<T>("norm_relu_conv_backward_data", "conv_form_gradient", Grid::line(blocks, THREADS), &args)
}

//! A gradient as one tensor, for kernels that read it often.

use super::{TILE_ROWS, has_places};
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

/// The fewest images whose gradient ends where a tile of rows does: a power of two.
pub(super) fn images_of_whole_tiles(d: &ConvDims) -> usize {
    const { assert!(TILE_ROWS.is_power_of_two()) };
    if has_places(d) {
        return TILE_ROWS;
    }
    TILE_ROWS >> (d.p() * d.q()).trailing_zeros().min(TILE_ROWS.ilog2())
}

/// Images of each of as few parts as have at most `most` of `n` images each, about as many in all of them: what a part lacks
/// to the next one is time that multiprocessors wait. A multiple of `whole`, as `most` is, or all.
fn images_of_a_part(n: usize, most: usize, whole: usize) -> usize {
    n.div_ceil(n.div_ceil(most)).next_multiple_of(whole).min(n)
}

/// Threads of a block of the kernel; each has one chunk of channels always.
const THREADS: usize = 256;

/// A gradient of `y`, some images after the other.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Parts {
    dims: ConvDims,
    grad: GradArgs,
    /// Of a part; the last one may have less.
    images: usize,
    /// Where what is formed of a part lies.
    formed: Address,
}

impl Parts {
    /// All images where the gradient is one tensor already; else as many as leave what is formed of it in the L2, or at
    /// least in this room, in multiples of `whole`. [`None`] where not even that many have room.
    pub(super) fn of(cuda: &Cuda, d: &ConvDims, grad: GradArgs, whole: usize, room: Room) -> Option<Self> {
        let parts = |images| Self { dims: *d, grad, images, formed: room.address };
        if grad.coef == Address::NONE {
            return Some(parts(d.n));
        }
        if !d.k.is_multiple_of(8) || !THREADS.is_multiple_of(d.k / 8) {
            return None;
        }
        let image = d.p() * d.q() * d.k * 2;
        let within = |bytes: usize| if d.n * image <= bytes { d.n } else { bytes / image / whole * whole };
        let rooms = [room.bytes.min(cuda.facts().l2_bytes / 2), room.bytes];
        let most = rooms.into_iter().map(within).find(|&images| images > 0)?;
        Some(parts(images_of_a_part(d.n, most, whole)))
    }

    /// Calls `use_part` for one after the other, with its first image, how many there are, and their gradient.
    pub(super) fn each<T: CudaElement>(
        &self,
        cuda: &Cuda,
        use_part: impl Fn(usize, ConvDims, Address) -> Result<()>,
    ) -> Result<()> {
        let Self { dims: d, grad, images, formed } = *self;
        if grad.coef == Address::NONE {
            return use_part(0, d, grad.dy);
        }
        (0..d.n).step_by(images).try_for_each(|first| {
            let part = ConvDims { n: images.min(d.n - first), ..d };
            let [dy, x] = [grad.dy, grad.x].map(|place| place.offset(first * d.p() * d.q() * d.k * 2));
            form::<T>(cuda, GradArgs { dy, x, ..grad }, &part, formed)?;
            use_part(first, part, formed)
        })
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Of 256 images what an L2 of 60 MB holds at 56, 28 and 14 pixels, and fewer images than a whole part.
    #[test]
    fn parts_are_about_as_large() {
        assert_eq!(images_of_a_part(256, 72, 8), 64);
        assert_eq!(images_of_a_part(256, 144, 16), 128);
        assert_eq!(images_of_a_part(256, 256, 64), 256);
        assert_eq!(images_of_a_part(19, 16, 8), 16);
        assert_eq!(images_of_a_part(19, 19, 8), 19);
        assert_eq!(images_of_a_part(100, 40, 8), 40);
    }
}

use super::Args;
use crate::cuda::{Address, CudaElement, Grid, blocks, narrow};
use crate::{Cuda, Len, Result};

const THREADS: usize = 256;
/// Blocks of a multiprocessor, which take turn after turn: every device has room for 1,536 threads.
const RESIDENT: usize = 6;

/// `AugmentArgs` of `augment.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct AugmentArgs {
    images: Address,
    draws: Address,
    x: Address,
    pixels: u64,
    extents: [u32; 4],
    table: [[f32; 3]; 256],
}

pub(crate) fn augment<T: CudaElement>(cuda: &Cuda, args: Args<'_, Cuda, T>) -> Result<()> {
    let Args { dims: d, images, draws, mean, std, x } = args;
    let pixels = x.len() / 3;
    let args = AugmentArgs {
        images: images.into(),
        draws: draws.into(),
        x: x.into(),
        pixels: pixels as u64,
        extents: [d.h, d.w, d.grid, d.patch].map(|x| x as u32),
        table: super::byte_table::<T>(mean, std).map(|pixel| pixel.map(T::widen)),
    };
    narrow(pixels)?;
    let resident = blocks(pixels, THREADS).min(RESIDENT * cuda.facts().multiprocessors);
    cuda.launch::<T>("augment", "augment", Grid::line(resident, THREADS), &args)
}

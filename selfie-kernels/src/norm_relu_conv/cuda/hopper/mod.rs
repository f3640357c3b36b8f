//! Products on GPUs of compute capability 9.0, whose kernels (`*_sm90.cu`) copy by TMA and multiply by wgmma. They take what
//! a ResNet is made of; the kernels of [`super::product`] take the rest.

mod backward;
mod backward_data;
mod backward_filter;
mod forward;
mod gradient;

pub(super) use backward::Backward;
pub(super) use backward_data::{BackwardData, Mask};
pub(super) use backward_filter::BackwardFilter;
pub(super) use forward::Forward;

use super::Named;
use crate::cuda::{Address, Boxes, CudaElement, TensorMap};
use crate::partials::SUM_ROWS;
use crate::{ConvDims, Cuda, Result};

/// `HopperArgs` of `conv_hopper.h`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Args {
    a: TensorMap,
    b: TensorMap,
    add: TensorMap,
    out: TensorMap,
    coef: Address,
    sums: Address,
    rows: i32,
    kc: i32,
    nc: i32,
    adds: i32,
    height: i32,
    width: i32,
    out_height: i32,
    out_width: i32,
    step: i32,
    pad: i32,
    halo_bytes: u32,
    class_tiles: i32,
    pixels: Address,
    round: i32,
    places: i32,
    unused: [i32; 12],
}

/// Channels of a step of the sum, and of a box.
const STEP: usize = 64;
/// Rows of a tile: two of the partial sums.
const TILE_ROWS: usize = 2 * SUM_ROWS;
/// The pattern of a swizzle repeats after so many bytes.
const ALIGNED: usize = 1024;
/// Extents that kernels count in 32 bits.
const MOST: usize = 1 << 30;

/// A kernel of `norm_relu_conv_forward_sm90.cu`, or one of those for 3x3 filters of `norm_relu_conv_backward_data_sm90.cu`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernel {
    way: Way,
    /// Of a tile.
    columns: usize,
    stages: usize,
}

/// How a kernel comes to the rows of the left operand.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// They are pixels: 1x1 filters.
    Pixel,
    /// Pixels of windows, tap by tap: one tap.
    Window,
    /// The same for nine taps, some of which may be padding.
    Padded,
    /// A tile is a place of the map in many images, and has the taps that are inside of the map there.
    Place,
    /// All nine taps from the pixels around a tile, of so many bytes.
    Halo { bytes: usize },
    /// Those of every other pixel of every other line, from the pixels below and to the right.
    Classes { bytes: usize },
}

impl Kernel {
    fn new(way: Way, columns: usize) -> Self {
        let stages = match (way, columns) {
            (Way::Halo { .. }, 64) => 6,
            (_, 64) => 4,
            _ => 3,
        };
        Self { way, columns, stages }
    }

    /// The one for a shape, the fastest of those measured on an H200; [`None`] where there is none.
    fn rule(d: &ConvDims, shared_bytes: usize) -> Option<Self> {
        let columns = if d.k > 64 { 128 } else { 64 };
        let ways = Self::ways(d).into_iter().map(|way| Self::new(way, columns));
        // Of 2x2 pixels each has four of nine taps at a place, of 4x4 six on average. On small maps a halo is mostly padding.
        ways.filter(|kernel| !matches!(kernel.way, Way::Halo { .. }) || d.h.min(d.w) > 4)
            .find(|kernel| kernel.shared_bytes() <= shared_bytes)
    }

    /// All for a shape.
    fn all(d: &ConvDims, shared_bytes: usize) -> Vec<Self> {
        let kernels = Self::ways(d).into_iter().flat_map(|way| [128, 64].map(|columns| Self::new(way, columns)));
        kernels.filter(|kernel| kernel.shared_bytes() <= shared_bytes).collect()
    }

    /// Those to the rows of a forward pass, the ones that are faster where they can be gone first.
    fn ways(d: &ConvDims) -> Vec<Way> {
        let halo = Way::Halo { bytes: halo_bytes(d, 1) };
        match (d.r, d.s, d.stride, d.pad) {
            (1, 1, 1, 0) => vec![Way::Pixel],
            (1, 1, 2..=8, 0) => vec![Way::Window],
            (3, 3, 1 | 2, 1) if has_places(d) && d.k.is_multiple_of(STEP) => match d.stride {
                1 => vec![Way::Place, halo, Way::Padded],
                _ => vec![Way::Place, Way::Padded],
            },
            (3, 3, 1, 1) => vec![halo, Way::Padded],
            (3, 3, 2..=8, 1) => vec![Way::Padded],
            _ => Vec::new(),
        }
    }

    fn threads(self) -> usize {
        match self.way {
            Way::Pixel | Way::Window | Way::Padded | Way::Place | Way::Classes { .. } => 384,
            Way::Halo { .. } => 512,
        }
    }

    /// The operands' ring with their coefficients, the consumers' results and the statistics of their threads, barriers; halos.
    fn shared_bytes(self) -> usize {
        const BARRIER: usize = size_of::<u64>();
        const COEF: usize = 2 * STEP * size_of::<f32>();
        const SHARES: usize = 4 * 2 * size_of::<f32>();
        let outlets = 2 * (SUM_ROWS * 2 * self.columns + SHARES * self.columns + 3 * BARRIER);
        let ring = |rows: usize, coef: usize| self.stages * (rows * 2 * STEP + coef + 2 * BARRIER);
        match self.way {
            Way::Pixel | Way::Window | Way::Padded | Way::Place => ring(TILE_ROWS + self.columns, COEF) + outlets,
            Way::Halo { bytes } | Way::Classes { bytes } => {
                (ring(self.columns, 0) + outlets + 6 * BARRIER).next_multiple_of(ALIGNED) + 2 * bytes
            }
        }
    }
}

impl Named for Kernel {
    fn name(&self) -> String {
        let way = match self.way {
            Way::Pixel => "pixel",
            Way::Window => "window",
            Way::Padded => "padded",
            Way::Place => "place",
            Way::Halo { .. } => "halo",
            Way::Classes { .. } => "classes",
        };
        format!("{way}_{}", if self.columns == 64 { "narrow" } else { "wide" })
    }
}

/// Whether [`Way::Place`] is for a 3x3 filter: many taps lie outside of the maps, and images come in whole tiles.
fn has_places(d: &ConvDims) -> bool {
    d.p().min(d.q()) <= 4 && d.h.max(d.w) <= 16 && d.n.is_multiple_of(TILE_ROWS)
}

/// The lines that a tile of pixels of one or more maps may have, and the one below and so many above, with the padding of each.
fn halo_bytes(d: &ConvDims, before: usize) -> usize {
    let rows = (TILE_ROWS - 1).div_ceil(d.w) + 1;
    let between_images = (rows - 1).div_ceil(d.h);
    ((rows + between_images + 1 + before) * (d.w + 1 + before) * 2 * STEP).next_multiple_of(ALIGNED)
}

/// Whether kernels for Hopper may be launched, and can count and copy these.
fn takes<T: CudaElement>(cuda: &Cuda, d: &ConvDims, places: &[Address]) -> bool {
    let aligned = places.iter().all(|place| place.is_aligned());
    let reached = [d.rows_in(), d.rows_out(), d.c, d.k].iter().all(|&extent| extent <= MOST);
    cuda.facts().hopper && size_of::<T>() == 2 && aligned && reached
}

/// Maps `[n, pixels, channels]` as a matrix with a row for each image, in boxes of some channels of a pixel of several images.
fn places(cuda: &Cuda, address: Address, [n, pixels, channels]: [usize; 3], images: usize) -> Result<TensorMap> {
    matrix(cuda, address, [n, pixels * channels], images)
}

/// `[rows, columns]`, in boxes of [`STEP`] columns.
fn matrix(cuda: &Cuda, address: Address, [rows, columns]: [usize; 2], side: usize) -> Result<TensorMap> {
    cuda.map_boxes(&Boxes { address, dims: &[columns, rows], strides: &[2 * columns], sides: &[STEP, side] })
}

/// Maps `[n, h, w, c]`, a line of one with the padding behind it, and so much before it, at a time.
fn lines(cuda: &Cuda, address: Address, d: &ConvDims, before: usize) -> Result<TensorMap> {
    let pixel = 2 * d.c;
    cuda.map_boxes(&Boxes {
        address,
        dims: &[d.c, d.w, d.h, d.n],
        strides: &[pixel, d.w * pixel, d.h * d.w * pixel],
        sides: &[STEP, d.w + 1 + before, 1, 1],
    })
}

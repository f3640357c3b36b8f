//! Products on GPUs of compute capability 9.0, whose kernels (`*_sm90.cu`) copy by TMA and multiply by wgmma. They take what
//! a ResNet is made of; the kernels of [`super::product`] take the rest.

use crate::cuda::{Address, Boxes, CudaElement, Grid, TensorMap, Windows};
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
    unused: i32,
}

/// Channels of a step of the sum, and of a box.
const STEP: usize = 64;
/// Rows of a tile: two of the partial sums.
const TILE_ROWS: usize = 2 * SUM_ROWS;
/// The pattern of a swizzle repeats after so many bytes.
const ALIGNED: usize = 1024;
/// Extents that kernels count in 32 bits.
const MOST: usize = 1 << 30;

/// A kernel of `norm_relu_conv_forward_sm90.cu`.
#[derive(Debug, Clone, Copy)]
struct Kernel {
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
    /// All nine taps from the pixels around a tile, of so many bytes.
    Halo { bytes: usize },
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
    fn of(d: &ConvDims, shared_bytes: usize) -> Option<Self> {
        let columns = if d.k > 64 { 128 } else { 64 };
        let halo = Self::new(Way::Halo { bytes: halo_bytes(d) }, columns);
        match (d.r, d.s, d.stride, d.pad) {
            (1, 1, 1, 0) => Some(Self::new(Way::Pixel, columns)),
            (1, 1, 2..=8, 0) => Some(Self::new(Way::Window, columns)),
            // On smaller maps a halo is mostly padding.
            (3, 3, 1, 1) if d.h.min(d.w) > 4 && halo.shared_bytes() <= shared_bytes => Some(halo),
            (3, 3, 1..=8, 1) => Some(Self::new(Way::Padded, columns)),
            _ => None,
        }
    }

    fn name(self) -> String {
        let way = match self.way {
            Way::Pixel => "pixel",
            Way::Window => "window",
            Way::Padded => "padded",
            Way::Halo { .. } => "halo",
        };
        format!("conv_forward_hopper_{way}_{}", if self.columns == 64 { "narrow" } else { "wide" })
    }

    fn threads(self) -> usize {
        match self.way {
            Way::Pixel | Way::Window | Way::Padded => 384,
            Way::Halo { .. } => 512,
        }
    }

    /// The operands' ring with their coefficients, the consumers' results and the statistics of their threads, barriers; halos.
    fn shared_bytes(self) -> usize {
        const BARRIER: usize = size_of::<u64>();
        const COEF: usize = 2 * STEP * size_of::<f32>();
        let outlets = 2 * (SUM_ROWS * 2 * self.columns + 128 * size_of::<[f32; 4]>() + 3 * BARRIER);
        let ring = |rows: usize, coef: usize| self.stages * (rows * 2 * STEP + coef + 2 * BARRIER);
        match self.way {
            Way::Pixel | Way::Window | Way::Padded => ring(TILE_ROWS + self.columns, COEF) + outlets,
            Way::Halo { bytes } => {
                (ring(self.columns, 0) + outlets + 6 * BARRIER).next_multiple_of(ALIGNED) + 2 * bytes
            }
        }
    }

    /// The left operand, and the bytes of a halo.
    fn left(self, cuda: &Cuda, x: Address, d: &ConvDims) -> Result<(TensorMap, usize)> {
        Ok(match self.way {
            Way::Pixel => (matrix(cuda, x, [d.rows_in(), d.c], TILE_ROWS)?, 0),
            Way::Window | Way::Padded => (cuda.map_windows(&Windows { address: x, dims: *d, count: TILE_ROWS })?, 0),
            Way::Halo { bytes } => (lines(cuda, x, d)?, bytes),
        })
    }
}

/// The lines that a tile of pixels of one or more maps may have, and those above and below, with the padding of each.
fn halo_bytes(d: &ConvDims) -> usize {
    let rows = (TILE_ROWS - 1).div_ceil(d.w) + 1;
    let between_images = (rows - 1).div_ceil(d.h);
    ((rows + between_images + 2) * (d.w + 2) * 2 * STEP).next_multiple_of(ALIGNED)
}

/// The forward pass's operands; see [`crate::norm_relu_conv::Forward`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Forward {
    pub(super) dims: ConvDims,
    pub(super) x: Address,
    /// Scale and shift, `[2, c]`.
    pub(super) coef: Address,
    pub(super) w: Address,
    pub(super) residual: Address,
    pub(super) y: Address,
    pub(super) stats: Address,
}

impl Forward {
    /// Queues the best kernel for this shape at these addresses; [`None`] where none takes it.
    pub(super) fn launch<T: CudaElement>(&self, cuda: &Cuda) -> Option<Result<()>> {
        let Self { dims: d, x, coef, w, residual, y, .. } = *self;
        let aligned = [x, coef, w, residual, y].iter().all(|place| place.is_aligned());
        let steps = d.c.is_multiple_of(STEP) && d.k.is_multiple_of(8);
        let reached = [d.rows_in(), d.rows_out(), d.c, d.k].iter().all(|&extent| extent <= MOST);
        let facts = cuda.facts();
        if !facts.hopper || size_of::<T>() != 2 || !aligned || !steps || !reached {
            return None;
        }
        Kernel::of(&d, facts.shared_bytes).map(|kernel| self.launch_kernel::<T>(cuda, kernel))
    }

    fn launch_kernel<T: CudaElement>(&self, cuda: &Cuda, kernel: Kernel) -> Result<()> {
        let Self { dims: d, x, coef, w, residual, y, stats } = *self;
        let (rows, taps) = (d.rows_out(), d.r * d.s);
        let result = |address| matrix(cuda, address, [rows, d.k], SUM_ROWS);
        let (a, halo_bytes) = kernel.left(cuda, x, &d)?;
        let out = result(y)?;
        let args = Args {
            a,
            b: matrix(cuda, w, [d.k, taps * d.c], kernel.columns)?,
            add: if residual == Address::NONE { out } else { result(residual)? },
            out,
            coef,
            sums: stats,
            rows: rows as i32,
            kc: d.c as i32,
            nc: d.k as i32,
            adds: i32::from(residual != Address::NONE),
            height: d.h as i32,
            width: d.w as i32,
            out_height: d.p() as i32,
            out_width: d.q() as i32,
            step: d.stride as i32,
            pad: d.pad as i32,
            halo_bytes: halo_bytes as u32,
            unused: 0,
        };
        let tiles = rows.div_ceil(TILE_ROWS) * d.k.div_ceil(kernel.columns);
        let blocks = tiles.min(cuda.facts().multiprocessors);
        let grid = Grid { blocks: [blocks, 1, 1], threads: kernel.threads(), shared_bytes: kernel.shared_bytes() };
        cuda.launch::<T>("norm_relu_conv_forward_sm90", &kernel.name(), grid, &args)
    }
}

/// `[rows, columns]`, in boxes of [`STEP`] columns.
fn matrix(cuda: &Cuda, address: Address, [rows, columns]: [usize; 2], side: usize) -> Result<TensorMap> {
    cuda.map_boxes(&Boxes { address, dims: &[columns, rows], strides: &[2 * columns], sides: &[STEP, side] })
}

/// Maps `[n, h, w, c]`, a line of one with its padding at a time.
fn lines(cuda: &Cuda, address: Address, d: &ConvDims) -> Result<TensorMap> {
    let pixel = 2 * d.c;
    cuda.map_boxes(&Boxes {
        address,
        dims: &[d.c, d.w, d.h, d.n],
        strides: &[pixel, d.w * pixel, d.h * d.w * pixel],
        sides: &[STEP, d.w + 2, 1, 1],
    })
}

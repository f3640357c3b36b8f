//! Products on GPUs of compute capability 9.0, whose kernels (`*_sm90.cu`) copy by TMA and multiply by wgmma. They take what
//! a ResNet is made of; the kernels of [`super::product`] take the rest.

use super::backward_filter::Splits;
use crate::cuda::{Address, Boxes, CudaElement, GradArgs, Grid, TensorMap, Windows};
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

/// A kernel of `norm_relu_conv_forward_sm90.cu`, or one of those for 3x3 filters of `norm_relu_conv_backward_data_sm90.cu`.
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

    fn name(self, pass: &str) -> String {
        let way = match self.way {
            Way::Pixel => "pixel",
            Way::Window => "window",
            Way::Padded => "padded",
            Way::Halo { .. } => "halo",
        };
        format!("conv_{pass}_hopper_{way}_{}", if self.columns == 64 { "narrow" } else { "wide" })
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
        const SHARES: usize = 4 * 2 * size_of::<f32>();
        let outlets = 2 * (SUM_ROWS * 2 * self.columns + SHARES * self.columns + 3 * BARRIER);
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
        let steps = d.c.is_multiple_of(STEP) && d.k.is_multiple_of(8);
        if !steps || !takes::<T>(cuda, &d, &[x, coef, w, residual, y]) {
            return None;
        }
        Kernel::of(&d, cuda.facts().shared_bytes).map(|kernel| self.launch_kernel::<T>(cuda, kernel))
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
        cuda.launch::<T>("norm_relu_conv_forward_sm90", &kernel.name("forward"), grid, &args)
    }
}

/// The gradient of the input of 1x1 filters with stride 1; see [`crate::norm_relu_conv::BackwardData`].
#[derive(Debug, Clone, Copy)]
pub(super) struct BackwardData {
    pub(super) dims: ConvDims,
    pub(super) dy: GradArgs,
    pub(super) w: Address,
    /// What masks it; [`None`]: a projection's gradient, which nothing does.
    pub(super) mask: Option<Mask>,
    pub(super) out: Address,
}

/// What happens behind the product.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mask {
    pub(super) x: Address,
    pub(super) norm: Address,
    pub(super) add: Address,
    /// Of the pixels that have an addend.
    pub(super) add_step: usize,
    pub(super) sums: Address,
}

/// `BackwardDataArgs` of `norm_relu_conv_backward_data_sm90.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct BackwardDataArgs {
    dy: TensorMap,
    grad_x: TensorMap,
    w: TensorMap,
    x: TensorMap,
    out: TensorMap,
    coef: Address,
    norm: Address,
    add: Address,
    sums: Address,
    rows: i32,
    kc: i32,
    nc: i32,
    share: i32,
    shares: i32,
    height: i32,
    width: i32,
    add_step: i32,
}

/// A kernel of `norm_relu_conv_backward_data_sm90.cu`.
#[derive(Debug, Clone, Copy)]
struct TransposedKernel {
    name: &'static str,
    /// Of a tile.
    channels: usize,
    pixels: usize,
    /// Lengths of the rings: of the gradient, the filters, the tensor that the gradient is formed with, the results.
    slots: usize,
    filters: usize,
    inputs: usize,
    outlets: usize,
}

impl TransposedKernel {
    const fn wide(name: &'static str, [slots, filters, inputs, outlets]: [usize; 4]) -> Self {
        Self { name, channels: 128, pixels: 128, slots, filters, inputs, outlets }
    }

    const fn narrow(name: &'static str, [slots, filters, inputs, outlets]: [usize; 4]) -> Self {
        Self { name, channels: 64, pixels: 256, slots, filters, inputs, outlets }
    }

    /// The one for a shape, the fastest of those measured on an H200; [`None`] where there is none.
    fn of(d: &ConvDims, dy: GradArgs, mask: Option<Mask>) -> Option<Self> {
        let affine = dy.coef != Address::NONE;
        let deep = d.c > 128 && (5 * STEP..=8 * STEP).contains(&d.k);
        Some(match (mask, affine, d.c) {
            (Some(_), true, 64) => Self::narrow("conv_backward_data_affine_hopper_narrow", [2, 4, 2, 2]),
            (Some(_), true, _) if deep => Self::wide("conv_backward_data_affine_hopper_deep", [8, 3, 1, 1]),
            (Some(_), true, _) => Self::wide("conv_backward_data_affine_hopper_wide", [4, 3, 3, 2]),
            (Some(_), false, 64) => Self::narrow("conv_backward_data_hopper_narrow", [3, 4, 0, 2]),
            (Some(_), false, _) => Self::wide("conv_backward_data_hopper_wide", [6, 4, 0, 2]),
            (None, false, 64) => Self::narrow("conv_projection_hopper_narrow", [3, 4, 0, 2]),
            (None, false, _) => Self::wide("conv_projection_hopper_wide", [6, 4, 0, 2]),
            (None, true, _) => return None,
        })
    }

    fn shared_bytes(self) -> usize {
        let Self { channels, pixels, slots, filters, inputs, outlets, .. } = self;
        let rows = (slots + inputs) * pixels + filters * channels + 2 * outlets * SUM_ROWS;
        let coef = inputs * 3 * STEP * size_of::<f32>();
        rows * 2 * STEP + coef + (2 * (slots + inputs + filters) + 4 * outlets) * size_of::<u64>()
    }

    /// How many tiles of channels a block makes of a tile of pixels whose gradient it keeps: as many as make the longest block
    /// shortest.
    fn share(self, d: &ConvDims, multiprocessors: usize) -> usize {
        // Cycles, about: of a step's products, of forming its gradient, of the rest of a tile.
        const PRODUCTS: usize = 512;
        const FORMING: usize = 700;
        const REST: usize = 2000;
        let (steps, tiles) = (d.k / STEP, d.c.div_ceil(self.channels));
        let most = if steps <= self.slots { tiles } else { 1 };
        let forming = if self.inputs > 0 { steps * FORMING } else { 0 };
        let cycles = |share: usize| {
            let units = d.rows_in().div_ceil(self.pixels) * tiles.div_ceil(share);
            units.div_ceil(multiprocessors) * (share * (steps * PRODUCTS + REST) + forming)
        };
        (1..=most).min_by_key(|&share| cycles(share)).unwrap_or(1)
    }
}

impl BackwardData {
    /// As [`Forward::launch`].
    pub(super) fn launch<T: CudaElement>(&self, cuda: &Cuda) -> Option<Result<()>> {
        let Self { dims: d, dy, w, mask, out } = *self;
        let steps = d.c.is_multiple_of(STEP) && d.k.is_multiple_of(STEP);
        let places = [dy.dy, dy.x, dy.coef, w, out];
        let masked = mask.is_none_or(|mask| mask.x.is_aligned() && mask.norm.is_aligned() && mask.add_step <= 2);
        if !steps || !masked || !takes::<T>(cuda, &d, &places) {
            return None;
        }
        match (d.r, d.s, d.stride, d.pad) {
            (1, 1, 1, 0) => TransposedKernel::of(&d, dy, mask).map(|kernel| self.launch_kernel::<T>(cuda, kernel)),
            (3, 3, 1, 1) => self.launch_halo::<T>(cuda, mask.filter(|mask| mask.add == Address::NONE)?),
            _ => None,
        }
    }

    /// 3x3 filters. The gradient is formed first, as nine taps read it: of so many images at once that it stays
    /// in the L2, or at least in the workspace.
    fn launch_halo<T: CudaElement>(&self, cuda: &Cuda, mask: Mask) -> Option<Result<()>> {
        let Self { dims: d, dy, .. } = *self;
        let columns = if d.c > 64 { 128 } else { 64 };
        let kernel = Kernel {
            stages: if columns == 64 { 4 } else { 3 },
            ..Kernel::new(Way::Halo { bytes: halo_bytes(&d) }, columns)
        };
        if kernel.shared_bytes() > cuda.facts().shared_bytes {
            return None;
        }
        if dy.coef == Address::NONE {
            return Some(self.launch_halo_part::<T>(cuda, kernel, mask));
        }
        // Tiles of pixels end where a part ends.
        let [image, gradient] = [d.c, d.k].map(|channels| d.h * d.w * channels * 2);
        let whole = TILE_ROWS / greatest_common_divisor(TILE_ROWS, d.h * d.w);
        let within = |bytes: usize| if d.n * gradient <= bytes { d.n } else { bytes / gradient / whole * whole };
        let workspace = cuda.workspace_bytes();
        let room = [workspace.min(cuda.facts().l2_bytes / 2), workspace];
        let images = room.into_iter().map(within).find(|&images| images > 0)?;
        if !THREADS_FORMING.is_multiple_of(d.k / 8) {
            return None;
        }
        let parts = (0..d.n).step_by(images).map(|first| {
            let dims = ConvDims { n: images.min(d.n - first), ..d };
            let [dz, grad_x] = [dy.dy, dy.x].map(|place| place.offset(first * gradient));
            form_gradient::<T>(cuda, GradArgs { dy: dz, x: grad_x, ..dy }, &dims)?;
            let sums = mask.sums.offset(first * d.h * d.w / SUM_ROWS * 2 * d.c * size_of::<f32>());
            let mask = Mask { x: mask.x.offset(first * image), sums, ..mask };
            let dy = GradArgs { dy: cuda.workspace(), x: Address::NONE, coef: Address::NONE };
            let part = Self { dims, dy, out: self.out.offset(first * image), ..*self };
            part.launch_halo_part::<T>(cuda, kernel, mask)
        });
        Some(parts.collect())
    }

    fn launch_halo_part<T: CudaElement>(&self, cuda: &Cuda, kernel: Kernel, mask: Mask) -> Result<()> {
        let Self { dims: d, dy, w, out, .. } = *self;
        let rows = d.rows_in();
        let args = Args {
            a: lines(cuda, dy.dy, &ConvDims { c: d.k, ..d })?,
            b: matrix(cuda, w, [d.k, 9 * d.c], STEP)?,
            add: matrix(cuda, mask.x, [rows, d.c], SUM_ROWS)?,
            out: matrix(cuda, out, [rows, d.c], SUM_ROWS)?,
            coef: mask.norm,
            sums: mask.sums,
            rows: rows as i32,
            kc: d.k as i32,
            nc: d.c as i32,
            adds: 1,
            height: d.h as i32,
            width: d.w as i32,
            out_height: d.h as i32,
            out_width: d.w as i32,
            step: 1,
            pad: 1,
            halo_bytes: halo_bytes(&d) as u32,
            unused: 0,
        };
        let tiles = rows.div_ceil(TILE_ROWS) * d.c.div_ceil(kernel.columns);
        let blocks = [tiles.min(cuda.facts().multiprocessors), 1, 1];
        let grid = Grid { blocks, threads: 384, shared_bytes: kernel.shared_bytes() };
        cuda.launch::<T>("norm_relu_conv_backward_data_sm90", &kernel.name("backward_data"), grid, &args)
    }

    fn launch_kernel<T: CudaElement>(&self, cuda: &Cuda, kernel: TransposedKernel) -> Result<()> {
        let Self { dims: d, dy: grad, w, mask, out } = *self;
        let rows = d.rows_in();
        let dy = matrix(cuda, grad.dy, [rows, d.k], kernel.pixels)?;
        let out = matrix(cuda, out, [rows, d.c], SUM_ROWS)?;
        let multiprocessors = cuda.facts().multiprocessors;
        let share = kernel.share(&d, multiprocessors);
        let shares = d.c.div_ceil(kernel.channels).div_ceil(share);
        let none = Mask { x: Address::NONE, norm: Address::NONE, add: Address::NONE, add_step: 1, sums: Address::NONE };
        let Mask { x, norm, add, add_step, sums } = mask.unwrap_or(none);
        let args = BackwardDataArgs {
            dy,
            grad_x: if grad.x == Address::NONE { dy } else { matrix(cuda, grad.x, [rows, d.k], kernel.pixels)? },
            w: matrix(cuda, w, [d.k, d.c], STEP)?,
            x: if x == Address::NONE { out } else { matrix(cuda, x, [rows, d.c], SUM_ROWS)? },
            out,
            coef: grad.coef,
            norm,
            add,
            sums,
            rows: rows as i32,
            kc: d.k as i32,
            nc: d.c as i32,
            share: share as i32,
            shares: shares as i32,
            height: d.h as i32,
            width: d.w as i32,
            add_step: add_step as i32,
        };
        let units = rows.div_ceil(kernel.pixels) * shares;
        let blocks = [units.min(multiprocessors), 1, 1];
        let grid = Grid { blocks, threads: 512, shared_bytes: kernel.shared_bytes() };
        cuda.launch::<T>("norm_relu_conv_backward_data_sm90", kernel.name, grid, &args)
    }
}

/// The gradient of 1x1 filters with stride 1; see [`crate::norm_relu_conv::BackwardFilter`].
#[derive(Debug, Clone, Copy)]
pub(super) struct BackwardFilter {
    pub(super) dims: ConvDims,
    pub(super) x: Address,
    /// Scale and shift, `[2, c]`.
    pub(super) coef: Address,
    pub(super) dy: GradArgs,
    pub(super) dw: Address,
}

/// `FilterArgs` of `backward_filter_sm90.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct FilterArgs {
    x: TensorMap,
    dy: TensorMap,
    grad_x: TensorMap,
    norm: Address,
    coef: Address,
    out: Address,
    rows: i32,
    c: i32,
    k: i32,
    splits: i32,
    unused: [i32; 6],
}

/// A kernel of `backward_filter_sm90.cu`.
#[derive(Debug, Clone, Copy)]
struct FilterKernel {
    name: &'static str,
    /// Of a tile.
    channels: usize,
    filters: usize,
    /// Lengths of the rings: of both operands, of the tensor that the gradient is formed with.
    stages: usize,
    inputs: usize,
}

impl FilterKernel {
    /// The one for a shape; [`None`] where there is none.
    fn of(d: &ConvDims, affine: bool) -> Option<Self> {
        let (name, channels, filters, [stages, inputs], plain_stages) = match (d.c, d.k) {
            (64, 64) => return None,
            (64, _) => ("shallow", 64, 256, [4, 1], 5),
            (_, 64) => ("narrow", 128, 64, [6, 4], 8),
            (_, 128) => ("square", 128, 128, [5, 3], 6),
            _ => ("wide", 128, 256, [3, 2], 4),
        };
        let [stages, inputs] = if affine { [stages, inputs] } else { [plain_stages, 0] };
        Some(Self { name, channels, filters, stages, inputs })
    }

    fn shared_bytes(self) -> usize {
        let Self { channels, filters, stages, inputs, .. } = self;
        let barriers = (3 * stages + 2 * inputs) * size_of::<u64>();
        (stages * (channels + filters) + inputs * filters) * 2 * STEP + barriers
    }
}

impl BackwardFilter {
    /// As [`Forward::launch`].
    pub(super) fn launch<T: CudaElement>(&self, cuda: &Cuda) -> Option<Result<()>> {
        let Self { dims: d, x, coef, dy, dw } = *self;
        let pointwise = (d.r, d.s, d.stride, d.pad) == (1, 1, 1, 0);
        let steps = d.c.is_multiple_of(STEP) && d.k.is_multiple_of(STEP);
        if !pointwise || !steps || !takes::<T>(cuda, &d, &[x, coef, dy.dy, dy.x, dy.coef, dw]) {
            return None;
        }
        let affine = dy.coef != Address::NONE;
        FilterKernel::of(&d, affine).map(|kernel| self.launch_kernel::<T>(cuda, kernel))
    }

    fn launch_kernel<T: CudaElement>(&self, cuda: &Cuda, kernel: FilterKernel) -> Result<()> {
        let Self { dims: d, x, coef, dy: grad, dw } = *self;
        let rows = d.rows_in();
        let parts = d.c.div_ceil(kernel.channels) * d.k.div_ceil(kernel.filters);
        let splits = Splits::new(cuda, dw, d.len_filter(), rows.div_ceil(STEP), parts, cuda.facts().multiprocessors);
        let dy = matrix(cuda, grad.dy, [rows, d.k], STEP)?;
        let args = FilterArgs {
            x: matrix(cuda, x, [rows, d.c], STEP)?,
            dy,
            grad_x: if grad.x == Address::NONE { dy } else { matrix(cuda, grad.x, [rows, d.k], STEP)? },
            norm: coef,
            coef: grad.coef,
            out: splits.out,
            rows: rows as i32,
            c: d.c as i32,
            k: d.k as i32,
            splits: splits.count as i32,
            unused: [0; 6],
        };
        let kind = if grad.coef == Address::NONE { "plain" } else { "affine" };
        let name = format!("norm_relu_conv_backward_filter_hopper_{}_{kind}", kernel.name);
        let grid = Grid { blocks: [parts * splits.count, 1, 1], threads: 512, shared_bytes: kernel.shared_bytes() };
        cuda.launch::<T>("backward_filter_sm90", &name, grid, &args)?;
        splits.add(cuda)
    }
}

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

/// Threads of a block of the kernel below; each has one chunk of channels always.
const THREADS_FORMING: usize = 256;

/// The gradient of `y` from its two tensors, in the workspace.
fn form_gradient<T: CudaElement>(cuda: &Cuda, grad: GradArgs, d: &ConvDims) -> Result<()> {
    const AT_ONCE: usize = 4;
    const RESIDENT: usize = 8;
    let chunks = d.len_out() / 8;
    let GradArgs { dy: dz, x, coef } = grad;
    let args = FormGradientArgs { dz, x, coef, dy: cuda.workspace(), chunks: chunks as u64, k: d.k as i32, unused: 0 };
    let blocks = chunks.div_ceil(THREADS_FORMING * AT_ONCE).min(RESIDENT * cuda.facts().multiprocessors);
    cuda.launch::<T>("norm_relu_conv_backward_data", "conv_form_gradient", Grid::line(blocks, THREADS_FORMING), &args)
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

/// Whether kernels for Hopper may be launched, and can count and copy these.
fn takes<T: CudaElement>(cuda: &Cuda, d: &ConvDims, places: &[Address]) -> bool {
    let aligned = places.iter().all(|place| place.is_aligned());
    let reached = [d.rows_in(), d.rows_out(), d.c, d.k].iter().all(|&extent| extent <= MOST);
    cuda.facts().hopper && size_of::<T>() == 2 && aligned && reached
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

use super::gradient::{Parts, Room, images_of_whole_tiles};
use super::{Args, Kernel, STEP, TILE_ROWS, Way, halo_bytes, has_places, lines, matrix, places, takes};
use crate::cuda::{Address, CudaElement, GradArgs, Grid, TensorMap, Windows};
use crate::partials::SUM_ROWS;
use crate::{ConvDims, Cuda, Result};

/// The gradient of the input; see [`crate::norm_relu_conv::BackwardData`].
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct BackwardData {
    pub(in super::super) dims: ConvDims,
    pub(in super::super) dy: GradArgs,
    pub(in super::super) w: Address,
    /// What masks it; [`None`]: a projection's gradient, which nothing does.
    pub(in super::super) mask: Option<Mask>,
    pub(in super::super) out: Address,
}

/// What happens behind the product.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Mask {
    pub(in super::super) x: Address,
    pub(in super::super) norm: Address,
    pub(in super::super) add: Address,
    /// Of the pixels that have an addend.
    pub(in super::super) add_step: usize,
    pub(in super::super) sums: Address,
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

/// How 3x3 filters are done.
#[derive(Debug, Clone, Copy)]
pub(super) struct ThreeByThree {
    kernel: Kernel,
    mask: Mask,
}

impl BackwardData {
    /// As [`Forward::launch`].
    pub(in super::super) fn launch<T: CudaElement>(&self, cuda: &Cuda) -> Option<Result<()>> {
        let Self { dims: d, dy, mask, .. } = *self;
        if (d.r, d.s, d.stride, d.pad) == (1, 1, 1, 0) {
            let kernel = TransposedKernel::of(&d, dy, mask).filter(|_| self.is_taken::<T>(cuda))?;
            return Some(self.launch_kernel::<T>(cuda, kernel));
        }
        let way = self.three_by_three::<T>(cuda)?;
        // The gradient is formed first, as nine taps read it.
        let parts = Parts::of(cuda, &d, dy, images_of_whole_tiles(&d), Room::behind(cuda, 0))?;
        Some(parts.each::<T>(cuda, |first, part, dy| self.launch_part::<T>(cuda, &way, (first, part), dy)))
    }

    fn is_taken<T: CudaElement>(&self, cuda: &Cuda) -> bool {
        let Self { dims: d, dy, w, mask, out } = *self;
        let steps = d.c.is_multiple_of(STEP) && d.k.is_multiple_of(STEP);
        let masked = mask.is_none_or(|mask| mask.x.is_aligned() && mask.norm.is_aligned() && mask.add_step <= 2);
        steps && masked && takes::<T>(cuda, &d, &[dy.dy, dy.x, dy.coef, w, out])
    }

    /// [`None`] where it is no such filter, or no kernel takes it.
    pub(super) fn three_by_three<T: CudaElement>(&self, cuda: &Cuda) -> Option<ThreeByThree> {
        let d = self.dims;
        let mask = self.mask.filter(|mask| mask.add == Address::NONE && self.is_taken::<T>(cuda))?;
        if (d.r, d.s, d.pad) != (3, 3, 1) || !matches!(d.stride, 1 | 2) {
            return None;
        }
        let (columns, stages) = if d.c > 64 { (128, 3) } else { (64, 4) };
        let (of_dy, before) = (ConvDims { h: d.p(), w: d.q(), ..d }, lines_before(&d));
        let bytes = halo_bytes(&of_dy, before);
        let way = match d.stride {
            _ if has_places(&d) => Way::Place,
            1 => Way::Halo { bytes },
            _ if d.h.is_multiple_of(2) && d.w.is_multiple_of(2) => Way::Classes { bytes },
            _ => return None,
        };
        let kernel = Kernel { way, columns, stages };
        (kernel.shared_bytes() <= cuda.facts().shared_bytes).then_some(ThreeByThree { kernel, mask })
    }

    /// 3x3 filters, of some images: as many as end where a tile of rows does, or the last ones.
    pub(super) fn launch_part<T: CudaElement>(
        &self,
        cuda: &Cuda,
        &ThreeByThree { kernel, mask }: &ThreeByThree,
        (first, d): (usize, ConvDims),
        dy: Address,
    ) -> Result<()> {
        let Self { dims: all, w, out, .. } = *self;
        let (pixels, before) = (d.h * d.w, lines_before(&d));
        let [x, out] = [mask.x, out].map(|place| place.offset(first * pixels * d.c * 2));
        let of_dy = ConvDims { h: d.p(), w: d.q(), c: d.k, ..d };
        let is_place = matches!(kernel.way, Way::Place);
        let classes = if is_place { 1 } else { d.stride * d.stride };
        let (rows, row_pixels) = (d.rows_in() / classes, if is_place { pixels } else { 1 });
        let (x, to) = if classes == 1 {
            let result = |address| places(cuda, address, [rows / row_pixels, row_pixels, d.c], SUM_ROWS);
            (result(x)?, result(out)?)
        } else {
            let every_other = ConvDims { r: 1, s: 1, pad: 0, ..d };
            let x = cuda.map_windows(&Windows { address: x, dims: every_other, count: SUM_ROWS })?;
            (x, x)
        };
        let column_tiles = d.c.div_ceil(kernel.columns);
        let multiprocessors = cuda.facts().multiprocessors;
        let args = Args {
            a: if is_place {
                places(cuda, dy, [d.n, d.p() * d.q(), d.k], TILE_ROWS)?
            } else {
                lines(cuda, dy, &of_dy, before)?
            },
            b: matrix(cuda, w, [d.k, 9 * d.c], STEP)?,
            add: x,
            out: to,
            coef: mask.norm,
            sums: mask.sums.offset(first * (pixels / classes) / SUM_ROWS * 2 * d.c * size_of::<f32>()),
            rows: rows as i32,
            kc: d.k as i32,
            nc: d.c as i32,
            adds: 1,
            height: d.p() as i32,
            width: d.q() as i32,
            out_height: d.h as i32,
            out_width: d.w as i32,
            step: d.stride as i32,
            pad: 1,
            halo_bytes: halo_bytes(&of_dy, before) as u32,
            class_tiles: all.rows_out().div_ceil(SUM_ROWS) as i32,
            pixels: out,
            // As many as the device makes at once: what they read stays in the L2 for the next class.
            round: (multiprocessors / column_tiles).max(1) as i32,
            places: row_pixels as i32,
            unused: [0; 12],
        };
        let tiles = rows.div_ceil(TILE_ROWS) * column_tiles * classes;
        let blocks = [tiles.min(multiprocessors), 1, 1];
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

/// Lines, and columns, that taps read above and to the left of a pixel.
fn lines_before(d: &ConvDims) -> usize {
    if d.stride == 1 { 1 } else { 0 }
}

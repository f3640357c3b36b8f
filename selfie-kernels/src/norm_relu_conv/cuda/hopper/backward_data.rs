use super::super::Named;
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

/// A kernel of `norm_relu_conv_backward_data_sm90.cu`, for 1x1 filters.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct TransposedKernel {
    /// The pass, and the kind of gradient.
    pass: &'static str,
    name: &'static str,
    /// Of a tile.
    channels: usize,
    pixels: usize,
    /// Lengths of the rings: of the gradient, the filters, the tensor that the gradient is formed with, the results.
    slots: usize,
    filters: usize,
    inputs: usize,
    outlets: usize,
    /// How many tiles of channels a block makes of a tile of pixels whose gradient it keeps.
    share: usize,
}

impl TransposedKernel {
    const AFFINE_NARROW: Self = Self::narrow("conv_backward_data_affine", "narrow", [2, 4, 2, 2]);
    const AFFINE_DEEP: Self = Self::wide("conv_backward_data_affine", "deep", [8, 3, 1, 1]);
    const AFFINE_LONG: Self = Self::wide("conv_backward_data_affine", "long", [6, 3, 3, 1]);
    const AFFINE_WIDE: Self = Self::wide("conv_backward_data_affine", "wide", [4, 3, 3, 2]);
    const NARROW: Self = Self::narrow("conv_backward_data", "narrow", [3, 4, 0, 2]);
    const WIDE: Self = Self::wide("conv_backward_data", "wide", [6, 4, 0, 2]);
    const PROJECTION_NARROW: Self = Self::narrow("conv_projection", "narrow", [3, 4, 0, 2]);
    const PROJECTION_WIDE: Self = Self::wide("conv_projection", "wide", [6, 4, 0, 2]);
    const PROJECTION_WIDER: Self = Self { channels: 256, ..Self::wide("conv_projection", "wider", [4, 3, 0, 1]) };

    const fn wide(pass: &'static str, name: &'static str, [slots, filters, inputs, outlets]: [usize; 4]) -> Self {
        Self { pass, name, channels: 128, pixels: 128, slots, filters, inputs, outlets, share: 1 }
    }

    const fn narrow(pass: &'static str, name: &'static str, [slots, filters, inputs, outlets]: [usize; 4]) -> Self {
        Self { pass, name, channels: 64, pixels: 256, slots, filters, inputs, outlets, share: 1 }
    }

    /// The one for a shape, the fastest of those measured on an H200; [`None`] where there is none.
    fn rule(d: &ConvDims, dy: GradArgs, mask: Option<Mask>, multiprocessors: usize) -> Option<Self> {
        let is_affine = dy.coef != Address::NONE;
        let is_deep = d.c > 128 && (5 * STEP..=8 * STEP).contains(&d.k);
        let is_long = d.c > 128 && (9 * STEP..=16 * STEP).contains(&d.k);
        let kernel = match (mask, is_affine, d.c) {
            (Some(_), true, 64) => Self::AFFINE_NARROW,
            (Some(_), true, _) if is_deep => Self::AFFINE_DEEP,
            (Some(_), true, _) if is_long => Self::AFFINE_LONG,
            (Some(_), true, _) => Self::AFFINE_WIDE,
            (Some(_), false, 64) => Self::NARROW,
            (Some(_), false, _) => Self::WIDE,
            (None, false, 64) => Self::PROJECTION_NARROW,
            (None, false, c) if c.is_multiple_of(256) => Self::PROJECTION_WIDER,
            (None, false, _) => Self::PROJECTION_WIDE,
            (None, true, _) => return None,
        };
        Some(Self { share: kernel.best_share(d, multiprocessors), ..kernel })
    }

    /// All for it, with the shares that are powers of two.
    fn all(d: &ConvDims, dy: GradArgs, mask: Option<Mask>) -> Vec<Self> {
        let kernels: &[Self] = match (mask, dy.coef != Address::NONE) {
            (Some(_), true) => &[Self::AFFINE_WIDE, Self::AFFINE_LONG, Self::AFFINE_DEEP, Self::AFFINE_NARROW],
            (Some(_), false) => &[Self::WIDE, Self::NARROW],
            (None, false) => &[Self::PROJECTION_WIDER, Self::PROJECTION_WIDE, Self::PROJECTION_NARROW],
            (None, true) => &[],
        };
        let shares = |kernel: &Self| (0..=kernel.most_share(d).ilog2()).map(|power| 1 << power).collect::<Vec<_>>();
        // A tile of 256 channels that is half empty is never the faster one.
        let is_filled = |kernel: &&Self| kernel.channels <= 128 || d.c.is_multiple_of(kernel.channels);
        kernels
            .iter()
            .filter(is_filled)
            .flat_map(|&kernel| shares(&kernel).into_iter().map(move |share| Self { share, ..kernel }))
            .collect()
    }

    fn shared_bytes(self) -> usize {
        let Self { channels, pixels, slots, filters, inputs, outlets, .. } = self;
        let rows = (slots + inputs) * pixels + filters * channels + outlets * channels / STEP * pixels;
        let coef = inputs * 3 * STEP * size_of::<f32>();
        rows * 2 * STEP + coef + (2 * (slots + inputs + filters) + 4 * outlets) * size_of::<u64>()
    }

    /// As large a share as keeps what is shared: all tiles of channels, or one.
    fn most_share(self, d: &ConvDims) -> usize {
        if d.k / STEP <= self.slots { d.c.div_ceil(self.channels) } else { 1 }
    }

    /// The share that makes the longest block shortest.
    fn best_share(self, d: &ConvDims, multiprocessors: usize) -> usize {
        // Cycles, about, of 128 channels of 128 pixels: of a step's products, of forming its gradient, of the rest of a tile.
        const PRODUCTS: usize = 512;
        const FORMING: usize = 700;
        const REST: usize = 2000;
        let (steps, tiles) = (d.k / STEP, d.c.div_ceil(self.channels));
        let size = self.channels * self.pixels / (128 * 128);
        let forming = if self.inputs > 0 { steps * FORMING } else { 0 };
        let cycles = |share: usize| {
            let units = d.rows_in().div_ceil(self.pixels) * tiles.div_ceil(share);
            units.div_ceil(multiprocessors) * (share * size * (steps * PRODUCTS + REST) + forming)
        };
        (1..=self.most_share(d)).min_by_key(|&share| cycles(share)).unwrap_or(1)
    }
}

/// A kernel for the pass.
#[derive(Debug, Clone, Copy)]
pub(in super::super) enum DataKernel {
    /// 1x1 filters.
    Transposed(TransposedKernel),
    /// 3x3 filters, from a gradient that is formed before, as nine taps read it.
    ThreeByThree(ThreeByThree, Parts),
}

impl Named for DataKernel {
    fn name(&self) -> String {
        match self {
            Self::Transposed(TransposedKernel { name, share: 1, .. }) => (*name).into(),
            Self::Transposed(TransposedKernel { name, share, .. }) => format!("{name}, {share} tiles a block"),
            Self::ThreeByThree(way, _) => way.name(),
        }
    }
}

/// How 3x3 filters are done.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct ThreeByThree {
    kernel: Kernel,
    mask: Mask,
}

impl Named for ThreeByThree {
    fn name(&self) -> String {
        self.kernel.name()
    }
}

impl BackwardData {
    /// The kernel for this shape at these addresses; [`None`] where none takes it.
    pub(in super::super) fn rule<T: CudaElement>(&self, cuda: &Cuda) -> Option<DataKernel> {
        let Self { dims: d, dy, mask, .. } = *self;
        if self.is_pointwise() {
            let kernel = TransposedKernel::rule(&d, dy, mask, cuda.facts().multiprocessors);
            return kernel.filter(|_| self.is_taken::<T>(cuda)).map(DataKernel::Transposed);
        }
        self.in_parts(cuda, self.three_by_three::<T>(cuda).into_iter().take(1)).pop()
    }

    /// All that take it.
    pub(in super::super) fn kernels<T: CudaElement>(&self, cuda: &Cuda) -> Vec<DataKernel> {
        let Self { dims: d, dy, mask, .. } = *self;
        if !self.is_pointwise() {
            return self.in_parts(cuda, self.three_by_three::<T>(cuda));
        }
        let kernels = if self.is_taken::<T>(cuda) { TransposedKernel::all(&d, dy, mask) } else { Vec::new() };
        kernels.into_iter().map(DataKernel::Transposed).collect()
    }

    fn in_parts(&self, cuda: &Cuda, ways: impl IntoIterator<Item = ThreeByThree>) -> Vec<DataKernel> {
        let Self { dims: d, dy, .. } = self;
        let parts = Parts::of(cuda, d, *dy, images_of_whole_tiles(d), Room::behind(cuda, 0));
        ways.into_iter().filter_map(|way| Some(DataKernel::ThreeByThree(way, parts?))).collect()
    }

    /// Queues a kernel.
    pub(in super::super) fn launch<T: CudaElement>(&self, cuda: &Cuda, kernel: DataKernel) -> Result<()> {
        match kernel {
            DataKernel::Transposed(kernel) => self.launch_transposed::<T>(cuda, kernel),
            DataKernel::ThreeByThree(way, parts) => {
                parts.each::<T>(cuda, |first, part, dy| self.launch_part::<T>(cuda, &way, (first, part), dy))
            }
        }
    }

    fn is_pointwise(&self) -> bool {
        let d = self.dims;
        (d.r, d.s, d.stride, d.pad) == (1, 1, 1, 0)
    }

    fn is_taken<T: CudaElement>(&self, cuda: &Cuda) -> bool {
        let Self { dims: d, dy, w, mask, out } = *self;
        let steps = d.c.is_multiple_of(STEP) && d.k.is_multiple_of(STEP);
        let masked = mask.is_none_or(|mask| mask.x.is_aligned() && mask.norm.is_aligned() && mask.add_step <= 2);
        steps && masked && takes::<T>(cuda, &d, &[dy.dy, dy.x, dy.coef, w, out])
    }

    /// The ways to do it, the rule's first; none where it is no such filter, or no kernel takes it.
    pub(super) fn three_by_three<T: CudaElement>(&self, cuda: &Cuda) -> Vec<ThreeByThree> {
        let d = self.dims;
        let mask = self.mask.filter(|mask| mask.add == Address::NONE && self.is_taken::<T>(cuda));
        let (Some(mask), (3, 3, 1)) = (mask, (d.r, d.s, d.pad)) else { return Vec::new() };
        let of_dy = ConvDims { h: d.p(), w: d.q(), ..d };
        let bytes = halo_bytes(&of_dy, lines_before(&d));
        let around = match d.stride {
            1 => Some(Way::Halo { bytes }),
            2 if d.h.is_multiple_of(2) && d.w.is_multiple_of(2) => Some(Way::Classes { bytes }),
            _ => None,
        };
        let place = (matches!(d.stride, 1 | 2) && has_places(&d)).then_some(Way::Place);
        let [wide, narrow] = [(128, 3), (64, 4)];
        let sizes = if d.c > 64 { [wide, narrow] } else { [narrow, wide] };
        let kernel = |way| sizes.map(|(columns, stages)| Kernel { way, columns, stages });
        let kernels = place.into_iter().chain(around).flat_map(kernel);
        let fits = |kernel: &Kernel| kernel.shared_bytes() <= cuda.facts().shared_bytes;
        kernels.take_while(fits).map(|kernel| ThreeByThree { kernel, mask }).collect()
    }

    /// Blocks that 3x3 filters take for some images: a multiprocessor each.
    pub(super) fn blocks(&self, cuda: &Cuda, &ThreeByThree { kernel, .. }: &ThreeByThree, images: usize) -> usize {
        let rows = ConvDims { n: images, ..self.dims }.rows_in();
        let classes = if matches!(kernel.way, Way::Place) { 1 } else { self.dims.stride * self.dims.stride };
        let tiles = (rows / classes).div_ceil(TILE_ROWS) * self.dims.c.div_ceil(kernel.columns) * classes;
        tiles.min(cuda.facts().multiprocessors)
    }

    /// 3x3 filters, of some images: as many as end where a tile of rows does, or the last ones.
    pub(super) fn launch_part<T: CudaElement>(
        &self,
        cuda: &Cuda,
        way: &ThreeByThree,
        (first, d): (usize, ConvDims),
        dy: Address,
    ) -> Result<()> {
        let Self { dims: all, w, out, .. } = *self;
        let ThreeByThree { kernel, mask } = *way;
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
        let blocks = [self.blocks(cuda, way, d.n), 1, 1];
        let grid = Grid { blocks, threads: 384, shared_bytes: kernel.shared_bytes() };
        let name = format!("conv_backward_data_hopper_{}", kernel.name());
        cuda.launch::<T>("norm_relu_conv_backward_data_sm90", &name, grid, &args)
    }

    fn launch_transposed<T: CudaElement>(&self, cuda: &Cuda, kernel: TransposedKernel) -> Result<()> {
        let Self { dims: d, dy: grad, w, mask, out } = *self;
        let rows = d.rows_in();
        let dy = matrix(cuda, grad.dy, [rows, d.k], kernel.pixels)?;
        let out = matrix(cuda, out, [rows, d.c], SUM_ROWS)?;
        let multiprocessors = cuda.facts().multiprocessors;
        let shares = d.c.div_ceil(kernel.channels).div_ceil(kernel.share);
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
            share: kernel.share as i32,
            shares: shares as i32,
            height: d.h as i32,
            width: d.w as i32,
            add_step: add_step as i32,
        };
        let units = rows.div_ceil(kernel.pixels) * shares;
        let blocks = [units.min(multiprocessors), 1, 1];
        let grid = Grid { blocks, threads: 512, shared_bytes: kernel.shared_bytes() };
        let name = format!("{}_hopper_{}", kernel.pass, kernel.name);
        cuda.launch::<T>("norm_relu_conv_backward_data_sm90", &name, grid, &args)
    }
}

/// Lines, and columns, that taps read above and to the left of a pixel.
fn lines_before(d: &ConvDims) -> usize {
    if d.stride == 1 { 1 } else { 0 }
}

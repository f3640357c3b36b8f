use super::super::Named;
use super::super::backward_filter::{Shares, Splits};
use super::gradient::{Parts, Room, images_of_whole_tiles};
use super::{STEP, matrix, takes};
use crate::cuda::{Address, Boxes, CudaElement, GradArgs, Grid, TensorMap, Windows};
use crate::{ConvDims, Cuda, Result};
use std::cmp::Reverse;

/// The filter's gradient; see [`crate::norm_relu_conv::BackwardFilter`].
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct BackwardFilter {
    pub(in super::super) dims: ConvDims,
    pub(in super::super) x: Address,
    /// Scale and shift, `[2, c]`.
    pub(in super::super) coef: Address,
    pub(in super::super) dy: GradArgs,
    pub(in super::super) dw: Address,
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
    stride: i32,
    height: i32,
    width: i32,
    unused: [i32; 3],
}

/// A kernel of `backward_filter_sm90.cu` for 1x1 filters.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct FilterKernel {
    name: &'static str,
    /// Of a tile.
    channels: usize,
    filters: usize,
    /// Lengths of the rings: of both operands, of the tensor that the gradient is formed with.
    stages: usize,
    inputs: usize,
}

impl FilterKernel {
    fn shallow(is_affine: bool) -> Self {
        Self::new("shallow", [64, 256], if is_affine { [4, 1] } else { [5, 0] })
    }

    fn narrow(is_affine: bool) -> Self {
        Self::new("narrow", [128, 64], if is_affine { [6, 4] } else { [8, 0] })
    }

    fn square(is_affine: bool) -> Self {
        Self::new("square", [128, 128], if is_affine { [5, 3] } else { [6, 0] })
    }

    fn wide(is_affine: bool) -> Self {
        Self::new("wide", [128, 256], if is_affine { [3, 2] } else { [4, 0] })
    }

    fn new(name: &'static str, [channels, filters]: [usize; 2], [stages, inputs]: [usize; 2]) -> Self {
        Self { name, channels, filters, stages, inputs }
    }

    fn rule(d: &ConvDims, is_affine: bool) -> Self {
        match (d.c, d.k) {
            (64, 65..) => Self::shallow(is_affine),
            (_, 64) => Self::narrow(is_affine),
            (_, 128) => Self::square(is_affine),
            _ => Self::wide(is_affine),
        }
    }

    fn all(is_affine: bool) -> [Self; 4] {
        [Self::wide, Self::square, Self::narrow, Self::shallow].map(|kernel| kernel(is_affine))
    }

    fn shared_bytes(self) -> usize {
        let Self { channels, filters, stages, inputs, .. } = self;
        let barriers = (3 * stages + 2 * inputs) * size_of::<u64>();
        (stages * (channels + filters) + inputs * filters) * 2 * STEP + barriers
    }
}

/// `StripArgs` of `conv_hopper_strips.h`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct StripArgs {
    x: TensorMap,
    x_odd: TensorMap,
    dy: TensorMap,
    norm: Address,
    out: Address,
    c: i32,
    k: i32,
    splits: [i32; 3],
    height: i32,
    strips: i32,
    strips_across: i32,
    width: i32,
    images: i32,
    edge: i32,
    stages: i32,
    adds: i32,
    rounds: i32,
    unused: [i32; 14],
}

/// A kernel of `backward_filter_sm90.cu` for 3x3 filters: what a block makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StripKernel {
    /// Nine taps of 64 channels and filters.
    NineTaps,
    /// A line of taps of 128 channels and filters.
    ThreeTaps,
}

impl StripKernel {
    /// Those that take a shape, and how they cut the sum; the faster one first.
    fn all(d: &ConvDims, multiprocessors: usize, shared_bytes: usize) -> Vec<(Self, Strip)> {
        let kernels = [Self::NineTaps, Self::ThreeTaps].into_iter();
        let strips = kernels.filter_map(|kernel| Some((kernel, Strip::of(kernel, d, shared_bytes)?)));
        let mut strips: Vec<_> = strips.collect();
        strips.sort_by_key(|(kernel, strip)| kernel.time(*strip, d, multiprocessors));
        strips
    }

    /// Of the longest block, times how many a multiprocessor has: products of 64 channels by 64 filters, an eighth of their
    /// time each. Three taps do an eighth more in the same time.
    fn time(self, strip: Strip, d: &ConvDims, multiprocessors: usize) -> usize {
        let splits = self.splits(strip, d, multiprocessors);
        let lines = lines_of_taps(d).map(|lines| lines * strip.count(d));
        let busiest = match self {
            Self::NineTaps => 8 * lines.iter().sum::<usize>().div_ceil(splits[0]),
            Self::ThreeTaps => 7 * 4 * lines.iter().zip(splits).fold(0, |most, (l, s)| most.max(l.div_ceil(s))),
        };
        self.blocks(d, splits).div_ceil(multiprocessors) * busiest * strip.products(d)
    }

    /// How many blocks share the sum over a strip's lines, of each line of taps: so many that all end at about the same time,
    /// for of small maps the outer taps have less to do.
    fn splits(self, strip: Strip, d: &ConvDims, multiprocessors: usize) -> [usize; 3] {
        let (blocks, strips) = (multiprocessors / self.squares(d), strip.count(d));
        if self == Self::NineTaps {
            return [blocks.min(strips * d.p()).max(1); 3];
        }
        let steps = lines_of_taps(d).map(|lines| lines * strips);
        let mut splits = [1; 3];
        for _ in 3..blocks {
            let may_be_cut = (0..3).filter(|&line| splits[line] < steps[line]);
            if let Some(busiest) = may_be_cut.max_by_key(|&line| steps[line].div_ceil(splits[line])) {
                splits[busiest] += 1;
            }
        }
        splits
    }

    fn blocks(self, d: &ConvDims, splits: [usize; 3]) -> usize {
        self.squares(d) * if self == Self::NineTaps { splits[0] } else { splits.iter().sum() }
    }

    fn name(self) -> &'static str {
        if self == Self::NineTaps { "nine_taps" } else { "three_taps" }
    }

    /// Channels and filters of a block.
    fn side(self) -> usize {
        if self == Self::NineTaps { 64 } else { 128 }
    }

    /// Parts of the filter's gradient, of all its taps.
    fn squares(self, d: &ConvDims) -> usize {
        d.c.div_ceil(self.side()) * d.k.div_ceil(self.side())
    }

    fn threads(self) -> usize {
        if self == Self::NineTaps { 512 } else { 384 }
    }

    /// Stages without which a block would wait for itself, or for memory too often.
    fn least_stages(self, stride: usize) -> usize {
        if self == Self::ThreeTaps && stride == 2 { 2 } else { 3 }
    }
}

/// How the sum over pixels is cut; see `conv_hopper_strips.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Strip {
    /// Columns of the gradient.
    width: usize,
    images: usize,
    stages: usize,
}

/// Of how many of the gradient's lines each line of taps has one of x.
fn lines_of_taps(d: &ConvDims) -> [usize; 3] {
    let last = if d.stride == 1 { 1 } else { 0 };
    [d.p() - 1, d.p(), d.p() - last]
}

/// Pixels of a product.
const PRODUCT: usize = 16;

impl Strip {
    /// With the fewest products; then, as there are columns beside all but whole lines, as wide as shared memory allows.
    fn of(kernel: StripKernel, d: &ConvDims, shared_bytes: usize) -> Option<Self> {
        const MOST_STAGES: usize = 8;
        const BARRIERS: usize = 2 * size_of::<u64>();
        // Of whole lines, that are no worse for being of fewer images.
        const ENOUGH_STAGES: usize = 3;
        let widths = (1..=d.q()).filter(|width| d.q().is_multiple_of(*width));
        let strips = widths.flat_map(|width| [8, 16, 32, 64].map(|images| Self { width, images, stages: 0 }));
        strips
            .filter(|strip| (strip.width * strip.images).is_multiple_of(PRODUCT))
            .map(|strip| Self {
                stages: (shared_bytes / (strip.stage_bytes(kernel, d) + BARRIERS)).min(MOST_STAGES),
                ..strip
            })
            .filter(|strip| strip.stages >= kernel.least_stages(d.stride))
            .min_by_key(|strip| {
                let waits = strip.edge(d) > 0 && strip.stages < ENOUGH_STAGES;
                (strip.count(d) * strip.products(d), waits, Reverse((strip.width, strip.images)))
            })
    }

    /// Of the batch.
    fn count(self, d: &ConvDims) -> usize {
        d.n.div_ceil(self.images) * (d.q() / self.width)
    }

    /// Products of a line's outer columns, which leave out the taps that lie outside of the map; none where a strip is no whole
    /// line, or products are of several columns.
    fn edge(self, d: &ConvDims) -> usize {
        if self.width == d.q() && self.images.is_multiple_of(PRODUCT) { self.images / PRODUCT } else { 0 }
    }

    /// Columns of the gradient beside the strip.
    fn columns_beside(self, d: &ConvDims) -> usize {
        match d.stride {
            _ if self.edge(d) > 0 => 0,
            1 => 2,
            _ => 1,
        }
    }

    /// Pairs of a pixel of a line and a tap of a line of taps.
    fn products(self, d: &ConvDims) -> usize {
        let outside = if d.stride == 1 { 2 } else { 1 };
        self.images * (3 * self.width - if self.edge(d) > 0 { outside } else { 0 })
    }

    fn stage_bytes(self, kernel: StripKernel, d: &ConvDims) -> usize {
        let lines = if kernel == StripKernel::NineTaps { d.stride } else { 1 };
        let parts = kernel.side() / 64;
        let columns = parts * (lines * d.stride * self.width + self.width + self.columns_beside(d));
        columns * self.images * 2 * STEP
    }

    fn shared_bytes(self, kernel: StripKernel, d: &ConvDims) -> usize {
        self.stages * (self.stage_bytes(kernel, d) + 2 * size_of::<u64>())
    }

    /// Columns, each so many bytes from the next, of the maps `[n, h, w, c]` at an address, images innermost.
    fn map(&self, cuda: &Cuda, address: Address, d: &ConvDims, columns: usize, step: usize) -> Result<TensorMap> {
        let line = d.w * d.c * 2;
        cuda.map_boxes(&Boxes {
            address,
            dims: &[d.c, d.n, d.w / step, d.h],
            strides: &[d.h * line, step * d.c * 2, line],
            sides: &[STEP, self.images, columns, 1],
        })
    }
}

/// How 3x3 filters are done.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Strips {
    kernel: StripKernel,
    strip: Strip,
    splits: Splits,
    whole_images: usize,
}

impl Named for Strips {
    fn name(&self) -> String {
        self.kernel.name().into()
    }
}

impl Strips {
    /// Bytes of the workspace that the sums take.
    pub(super) fn workspace_bytes(&self) -> usize {
        self.splits.workspace_bytes()
    }

    /// Images are done in multiples of so many, where strips end and the input's gradient's tiles, too: so the sums are cut
    /// alike whether that gradient is made beside them or not.
    pub(super) fn whole_images(&self) -> usize {
        self.whole_images
    }

    /// Queues the sum of what the blocks wrote.
    pub(super) fn add(&self, cuda: &Cuda) -> Result<()> {
        self.splits.add(cuda)
    }
}

/// A kernel for the pass, and how the sum over pixels is cut.
#[derive(Debug, Clone, Copy)]
pub(in super::super) enum FilterVariant {
    /// 1x1 filters.
    Pixels(FilterKernel, Shares),
    /// 3x3 filters, from a gradient that is formed before.
    Strips(Strips, Parts),
}

impl Named for FilterVariant {
    fn name(&self) -> String {
        match self {
            Self::Pixels(kernel, shares) => format!("{}{}", kernel.name, shares.name()),
            Self::Strips(strips, _) => strips.name(),
        }
    }
}

impl BackwardFilter {
    /// The variants for this shape at these addresses, the rule's first; none where no kernel takes it.
    pub(in super::super) fn variants<T: CudaElement>(&self, cuda: &Cuda) -> Vec<FilterVariant> {
        let Self { dims: d, dy, .. } = *self;
        if matches!((d.r, d.s, d.stride, d.pad), (1, 1, 1..=8, 0)) {
            if !self.is_taken::<T>(cuda) {
                return Vec::new();
            }
            let is_affine = dy.coef != Address::NONE;
            let variants = Shares::with_each(FilterKernel::rule(&d, is_affine), FilterKernel::all(is_affine));
            return variants.map(|(kernel, shares)| FilterVariant::Pixels(kernel, shares)).collect();
        }
        let in_parts = |strips: Strips| {
            let room = Room::behind(cuda, strips.workspace_bytes());
            Some(FilterVariant::Strips(strips, Parts::of(cuda, &d, dy, strips.whole_images, room)?))
        };
        self.strips::<T>(cuda).into_iter().map_while(in_parts).collect()
    }

    /// Queues a variant.
    pub(in super::super) fn launch<T: CudaElement>(&self, cuda: &Cuda, variant: FilterVariant) -> Result<()> {
        match variant {
            FilterVariant::Pixels(kernel, shares) => self.launch_pixels::<T>(cuda, kernel, shares),
            FilterVariant::Strips(strips, parts) => {
                let part = |first, part, dy| self.launch_strips_of::<T>(cuda, &strips, (first, part), dy);
                parts.each::<T>(cuda, part)?;
                strips.add(cuda)
            }
        }
    }

    fn is_taken<T: CudaElement>(&self, cuda: &Cuda) -> bool {
        let Self { dims: d, x, coef, dy, dw } = *self;
        let steps = d.c.is_multiple_of(STEP) && d.k.is_multiple_of(STEP);
        steps && takes::<T>(cuda, &d, &[x, coef, dy.dy, dy.x, dy.coef, dw])
    }

    /// 1x1 filters.
    fn launch_pixels<T: CudaElement>(&self, cuda: &Cuda, kernel: FilterKernel, shares: Shares) -> Result<()> {
        let Self { dims: d, x, coef, dy: grad, dw } = *self;
        let rows = d.rows_out();
        let parts = d.c.div_ceil(kernel.channels) * d.k.div_ceil(kernel.filters);
        let resident = shares.of(cuda.facts().multiprocessors);
        let splits = Splits::new(cuda, dw, d.len_filter(), rows.div_ceil(STEP), parts, resident);
        let dy = matrix(cuda, grad.dy, [rows, d.k], STEP)?;
        let x = match d.stride {
            1 => matrix(cuda, x, [rows, d.c], STEP)?,
            _ => cuda.map_windows(&Windows { address: x, dims: d, count: STEP })?,
        };
        let args = FilterArgs {
            x,
            dy,
            grad_x: if grad.x == Address::NONE { dy } else { matrix(cuda, grad.x, [rows, d.k], STEP)? },
            norm: coef,
            coef: grad.coef,
            out: splits.out,
            rows: rows as i32,
            c: d.c as i32,
            k: d.k as i32,
            splits: splits.count as i32,
            stride: d.stride as i32,
            height: d.p() as i32,
            width: d.q() as i32,
            unused: [0; 3],
        };
        let grid = Grid { blocks: [parts * splits.count, 1, 1], threads: 512, shared_bytes: kernel.shared_bytes() };
        let name = format!("norm_relu_conv_backward_filter_hopper_{}_{}", kernel.name, grad.kind());
        cuda.launch::<T>("backward_filter_sm90", &name, grid, &args)?;
        splits.add(cuda)
    }

    /// The ways to do it, the rule's first; none where it is no 3x3 filter, or no kernel takes it.
    pub(super) fn strips<T: CudaElement>(&self, cuda: &Cuda) -> Vec<Strips> {
        self.strips_on::<T>(cuda, cuda.facts().multiprocessors)
    }

    /// The same for a part of the device.
    pub(super) fn strips_on<T: CudaElement>(&self, cuda: &Cuda, multiprocessors: usize) -> Vec<Strips> {
        let Self { dims: d, dw, .. } = *self;
        let sides = d.h.is_multiple_of(d.stride) && d.w.is_multiple_of(d.stride);
        if (d.r, d.s, d.pad) != (3, 3, 1) || !matches!(d.stride, 1 | 2) || !sides || !self.is_taken::<T>(cuda) {
            return Vec::new();
        }
        let strips = |(kernel, strip): (StripKernel, Strip)| {
            let splits = kernel.splits(strip, &d, multiprocessors);
            let splits = Splits::of_lines(cuda, dw, [d.len_filter(), 3 * d.c], splits);
            // Both are powers of two.
            let whole_images = strip.images.max(images_of_whole_tiles(&d));
            Strips { kernel, strip, splits, whole_images }
        };
        StripKernel::all(&d, multiprocessors, cuda.facts().shared_bytes).into_iter().map(strips).collect()
    }

    /// 3x3 filters, of some images; what they are multiplied to comes to what those before them were.
    pub(super) fn launch_strips_of<T: CudaElement>(
        &self,
        cuda: &Cuda,
        &Strips { kernel, strip, splits, .. }: &Strips,
        (first, d): (usize, ConvDims),
        dy: Address,
    ) -> Result<()> {
        let x = self.x.offset(first * d.h * d.w * d.c * 2);
        let map_x = |x| strip.map(cuda, x, &d, strip.width, d.stride);
        let of_dy = ConvDims { c: d.k, h: d.p(), w: d.q(), ..d };
        let args = StripArgs {
            x: map_x(x)?,
            x_odd: map_x(if d.stride == 1 { x } else { x.offset(d.c * 2) })?,
            dy: strip.map(cuda, dy, &of_dy, strip.width + strip.columns_beside(&d), 1)?,
            norm: self.coef,
            out: splits.out,
            c: d.c as i32,
            k: d.k as i32,
            splits: splits.of_lines.map(|count| count as i32),
            height: d.p() as i32,
            strips: strip.count(&d) as i32,
            strips_across: (d.q() / strip.width) as i32,
            width: strip.width as i32,
            images: strip.images as i32,
            edge: strip.edge(&d) as i32,
            stages: strip.stages as i32,
            adds: i32::from(first > 0),
            rounds: 1,
            unused: [0; 14],
        };
        let blocks = [kernel.blocks(&d, splits.of_lines), 1, 1];
        let shared_bytes = strip.shared_bytes(kernel, &d);
        let grid = Grid { blocks, threads: kernel.threads(), shared_bytes };
        let strided = if d.stride == 1 { "" } else { "_strided" };
        let name = format!("norm_relu_conv_backward_filter_hopper_{}{strided}", kernel.name());
        cuda.launch::<T>("backward_filter_sm90", &name, grid, &args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: (usize, usize) = (132, 227 << 10);

    /// Kernel, columns and images of a strip, and splits of each line of taps.
    fn plan(n: usize, side: usize, [c, k]: [usize; 2], stride: usize) -> (StripKernel, [usize; 2], [usize; 3]) {
        let (multiprocessors, shared_bytes) = H200;
        let d = ConvDims { n, h: side, w: side, c, k, r: 3, s: 3, stride, pad: 1 };
        let (kernel, strip) = StripKernel::all(&d, multiprocessors, shared_bytes)[0];
        assert!(strip.shared_bytes(kernel, &d) <= shared_bytes);
        let splits = kernel.splits(strip, &d, multiprocessors);
        assert!(kernel.blocks(&d, splits) <= multiprocessors, "one wave");
        (kernel, [strip.width, strip.images], splits)
    }

    /// What was fastest of what was measured for a ResNet-50 on an H200, or lies beside it.
    #[test]
    fn strips_of_a_resnet() {
        use StripKernel::{NineTaps, ThreeTaps};
        assert_eq!(plan(256, 56, [64, 64], 1), (NineTaps, [28, 8], [132; 3]));
        assert_eq!(plan(256, 28, [128, 128], 1), (ThreeTaps, [14, 8], [43, 45, 44]));
        assert_eq!(plan(256, 14, [256, 256], 1), (ThreeTaps, [14, 8], [11, 11, 11]));
        assert_eq!(plan(256, 7, [512, 512], 1), (NineTaps, [7, 32], [2; 3]));
        assert_eq!(plan(256, 56, [128, 128], 2), (ThreeTaps, [14, 8], [43, 44, 45]));
        assert_eq!(plan(256, 28, [256, 256], 2), (ThreeTaps, [14, 8], [11, 11, 11]));
        assert_eq!(plan(256, 14, [512, 512], 2), (NineTaps, [7, 16], [2; 3]));
    }

    /// Of a ResNet-50 on 16 patches of each of 512 images: each line of taps has blocks as it has lines.
    #[test]
    fn strips_of_patches() {
        use StripKernel::{NineTaps, ThreeTaps};
        assert_eq!(plan(8192, 8, [64, 64], 1), (NineTaps, [8, 32], [132; 3]));
        assert_eq!(plan(8192, 8, [128, 128], 2), (ThreeTaps, [4, 16], [36, 48, 48]));
        assert_eq!(plan(8192, 4, [128, 128], 1), (ThreeTaps, [4, 32], [39, 52, 41]));
        assert_eq!(plan(8192, 4, [256, 256], 2), (ThreeTaps, [2, 32], [7, 13, 13]));
        assert_eq!(plan(8192, 2, [256, 256], 1), (ThreeTaps, [2, 64], [8, 16, 9]));
    }

    /// Those of the cases that the operation's tests run, on the emulated device's multiprocessors.
    #[test]
    fn every_kernel_has_a_case() {
        let kernel = |[c, k]: [usize; 2]| {
            let d = ConvDims { n: 3, h: 6, w: 7, c, k, r: 3, s: 3, stride: 1, pad: 1 };
            StripKernel::all(&d, 3, H200.1)[0].0
        };
        assert_eq!([[64, 64], [64, 128], [128, 64]].map(kernel), [StripKernel::NineTaps; 3]);
        assert_eq!([[128, 128], [320, 128], [128, 320]].map(kernel), [StripKernel::ThreeTaps; 3]);
    }

    /// The same for those that are run on a larger device: there the middle line of taps has more splits than the others.
    #[test]
    fn lines_of_taps_are_cut_differently() {
        let d = ConvDims { n: 70, h: 2, w: 2, c: 128, k: 128, r: 3, s: 3, stride: 1, pad: 1 };
        let (kernel, strip) = StripKernel::all(&d, 7, H200.1)[0];
        assert_eq!((kernel, kernel.splits(strip, &d, 7)), (StripKernel::ThreeTaps, [2, 3, 2]));
    }
}

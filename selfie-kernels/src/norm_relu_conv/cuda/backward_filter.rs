//! The filter's gradient, cut over the pixels: each split writes partial sums of the whole filter into the workspace, and a
//! second kernel adds them in a fixed order.

use super::{Named, Variant, hopper, shape_with_grad};
use crate::cuda::{Address, CudaElement, GpuFacts, Grid, blocks, narrow};
use crate::norm_relu_conv::BackwardFilter;
use crate::{ConvDims, Cuda, Grad, Result};

const MODULE: &str = "backward_filter";

/// `Conv` of `filter_gradient.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::NoUninit)]
pub(crate) struct Conv {
    n: i32,
    h: i32,
    w: i32,
    c: i32,
    k: i32,
    r: i32,
    s: i32,
    stride: i32,
    pad: i32,
    p: i32,
    q: i32,
}

impl Conv {
    /// Kernels number pixels and columns by 32 bits; elements by 64.
    pub(crate) fn new(d: &ConvDims) -> Result<Self> {
        narrow(d.rows_in().max(d.rows_out()))?;
        narrow(d.r * d.s * d.c)?;
        let [n, h, w, c, k] = [d.n, d.h, d.w, d.c, d.k].map(narrow);
        let [r, s, stride, pad, p, q] = [d.r, d.s, d.stride, d.pad, d.p(), d.q()].map(narrow);
        Ok(Self { n: n?, h: h?, w: w?, c: c?, k: k?, r: r?, s: s?, stride: stride?, pad: pad?, p: p?, q: q? })
    }
}

/// A [`Grad`] as the kernels take it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gradient {
    /// The gradient itself, or that of the normalised value.
    pub(crate) dz: Address,
    /// Of an affine gradient.
    pub(crate) x: Address,
    /// `[3, k]` of an affine gradient.
    pub(crate) coef: Address,
}

impl Gradient {
    pub(crate) fn new<T: CudaElement>(dy: Grad<'_, Cuda, T>) -> Self {
        match dy {
            Grad::Plain(dy) => Self { dz: dy.into(), x: Address::NONE, coef: Address::NONE },
            Grad::Affine(affine) => Self { dz: affine.dz.into(), x: affine.x.into(), coef: affine.coef.into() },
        }
    }

    /// How kernels of the tensor cores are called that are compiled for each kind.
    pub(crate) fn kind(&self) -> &'static str {
        if self.coef == Address::NONE { "plain" } else { "affine" }
    }

    /// Whether both tensors may be read in chunks.
    pub(crate) fn is_aligned(&self) -> bool {
        self.dz.is_aligned() && self.x.is_aligned()
    }
}

/// Where the splits of a filter's gradient go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Splits {
    /// How many there are; of lines of taps that are cut each for itself, the most.
    pub(crate) count: usize,
    /// How many there are of each line of taps.
    pub(crate) of_lines: [usize; 3],
    /// `[count, len]`: the gradient itself if there is one split.
    pub(crate) out: Address,
    dw: Address,
    len: usize,
    /// Elements of one line of a filter's taps; all, where lines are cut alike.
    line: usize,
}

impl Splits {
    /// `tiles` of pixels, shared out so that `resident` blocks, each of which has one of `parts` of the filter, keep the
    /// whole device busy; as many as the workspace holds.
    pub(crate) fn new(cuda: &Cuda, dw: Address, len: usize, tiles: usize, parts: usize, resident: usize) -> Self {
        Self::of_lines(cuda, dw, [len; 2], [(resident / parts).min(tiles); 3])
    }

    /// So many of each line of taps of 3x3 filters, or as many as the workspace holds, at least one; of a gradient of `len`
    /// elements, of which a line of one filter has `line`.
    pub(crate) fn of_lines(cuda: &Cuda, dw: Address, [len, line]: [usize; 2], counts: [usize; 3]) -> Self {
        let room = cuda.workspace_bytes() / (len * size_of::<f32>());
        let of_lines = counts.map(|count| count.min(room).max(1));
        let count = of_lines.into_iter().fold(1, usize::max);
        Self { count, of_lines, out: if count == 1 { dw } else { cuda.workspace() }, dw, len, line }
    }

    /// Bytes of the workspace that they take.
    pub(crate) fn workspace_bytes(&self) -> usize {
        if self.count == 1 { 0 } else { self.count * self.len * size_of::<f32>() }
    }

    /// Queues the sum of what the splits wrote.
    pub(crate) fn add(&self, cuda: &Cuda) -> Result<()> {
        if self.count == 1 {
            return Ok(());
        }
        // Long sums of few elements need more threads than there are elements: 1, 2, 4 or 8 for each, as a block is divided.
        let lanes = 1 << (self.count / 2).clamp(1, 8).ilog2();
        let [first, second, third] = self.of_lines.map(narrow);
        let (parts, sum, len, line) = (self.out, self.dw, self.len as u64, self.line as u64);
        let splits = [first?, second?, third?];
        let grid = Grid::line(blocks(self.len, FILTER_THREADS / lanes), FILTER_THREADS);
        let args = SumArgs { parts, sum, len, line, splits, lanes: narrow(lanes)? };
        cuda.launch_plain(MODULE, "filter_gradient_add_splits", grid, &args)
    }
}

/// How many blocks share the pixels, beside as many as keep the device busy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shares {
    /// So many.
    AsResident,
    /// Half of them: half as many partial sums.
    Half,
    /// Twice as many: what a block is late by is less.
    Twice,
}

impl Shares {
    /// Of the blocks that keep the device busy.
    pub(super) fn of(self, resident: usize) -> usize {
        match self {
            Self::AsResident => resident,
            Self::Half => resident / 2,
            Self::Twice => 2 * resident,
        }
    }

    /// Behind a kernel's name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::AsResident => "",
            Self::Half => ", half the splits",
            Self::Twice => ", twice the splits",
        }
    }

    /// Kernels with the shares to try: the rule's with each, and first as it is; the others as they are.
    pub(super) fn with_each<K: Copy>(rule: K, all: impl IntoIterator<Item = K>) -> impl Iterator<Item = (K, Self)> {
        let of_rule = [Self::AsResident, Self::Half, Self::Twice].map(|shares| (rule, shares));
        of_rule.into_iter().chain(all.into_iter().map(|kernel| (kernel, Self::AsResident)))
    }
}

/// Threads of the plain kernel, and of the sum.
const FILTER_THREADS: usize = 256;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct SumArgs {
    parts: Address,
    sum: Address,
    len: u64,
    line: u64,
    splits: [i32; 3],
    lanes: i32,
}

/// `FilterGradientArgs` of `filter_gradient.h`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct PlainArgs {
    x: Address,
    norm: Address,
    dz: Address,
    grad_x: Address,
    coef: Address,
    out: Address,
    conv: Conv,
    splits: i32,
}

/// Any filter's gradient: of `relu(scale * x + shift)`, or of `x` itself where `norm` is none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FilterGradient {
    pub(crate) dims: ConvDims,
    pub(crate) x: Address,
    pub(crate) norm: Address,
    pub(crate) dy: Gradient,
    pub(crate) dw: Address,
}

impl FilterGradient {
    /// By the plain kernel, which takes every shape; `kernel` of `module` is the operation's own copy.
    pub(crate) fn plain<T: CudaElement>(&self, cuda: &Cuda, module: &'static str, kernel: &str) -> Result<()> {
        const TILE: usize = 64;
        // Pixels that are worth a split of their own: enough steps of 16 to hide the first loads.
        const LEAST_PIXELS: usize = 128;
        let Self { dims: d, x, norm, dy, dw } = *self;
        let parts = d.k.div_ceil(TILE) * (d.r * d.s * d.c).div_ceil(TILE);
        let resident = 2 * cuda.facts().multiprocessors;
        let splits = Splits::new(cuda, dw, d.len_filter(), d.rows_out().div_ceil(LEAST_PIXELS), parts, resident);
        let args = PlainArgs {
            x,
            norm,
            dz: dy.dz,
            grad_x: dy.x,
            coef: dy.coef,
            out: splits.out,
            conv: Conv::new(&d)?,
            splits: narrow(splits.count)?,
        };
        cuda.launch::<T>(module, kernel, Grid::line(parts * splits.count, FILTER_THREADS), &args)?;
        splits.add(cuda)
    }

    /// The variants on the tensor cores, the rule's first; none where no kernel takes the shape.
    pub(super) fn variants<T: CudaElement>(&self, facts: &GpuFacts) -> Vec<TensorVariant> {
        let dims = flat(self.dims);
        let aligned = [self.x, self.norm, self.dw].iter().all(|place| place.is_aligned()) && self.dy.is_aligned();
        let chunks = dims.c.is_multiple_of(8) && dims.k.is_multiple_of(8);
        // The tensor cores round operands, which f32 does not want.
        if T::OPERAND_EPSILON == 0.0 || !aligned || !chunks {
            return Vec::new();
        }
        let shared_bytes = facts.shared_bytes;
        let Some(rule) = Kernel::rule(shared_bytes, &dims, self.dy) else { return Vec::new() };
        let variant = |(kernel, shares): (Kernel, Shares)| {
            let tile = kernel.tile(shared_bytes, &dims, self.dy)?;
            Some(TensorVariant { kernel, tile, shares })
        };
        Shares::with_each(rule, Kernel::all(&dims)).filter_map(variant).collect()
    }

    fn launch<T: CudaElement>(&self, cuda: &Cuda, TensorVariant { kernel, tile, shares }: TensorVariant) -> Result<()> {
        let Self { dims, x, norm, dy, dw } = *self;
        let d = &flat(dims);
        let parts = d.k.div_ceil(kernel.filters) * d.c.div_ceil(kernel.channels);
        let resident = shares.of(kernel.resident * cuda.facts().multiprocessors);
        let splits = Splits::new(cuda, dw, d.len_filter(), tile.count, parts, resident);
        let args = TensorArgs {
            x,
            norm,
            dz: dy.dz,
            grad_x: dy.x,
            coef: dy.coef,
            out: splits.out,
            conv: Conv::new(d)?,
            images: narrow(tile.images)?,
            rows: narrow(tile.rows)?,
            tiles: narrow(tile.count)?,
            splits: narrow(splits.count)?,
            inputs: narrow(tile.inputs)?,
            pixels: narrow(tile.pixels)?,
            unused: 0,
        };
        let grid = Grid {
            blocks: [parts * splits.count, 1, 1],
            threads: kernel.threads,
            shared_bytes: kernel.shared_bytes(&tile, dy),
        };
        let name = format!("norm_relu_conv_backward_filter_{}_{}", kernel.name, dy.kind());
        cuda.launch::<T>(MODULE, &name, grid, &args)?;
        splits.add(cuda)
    }
}

pub(crate) fn norm_relu_conv_backward_filter<T: CudaElement>(
    cuda: &Cuda,
    args: BackwardFilter<'_, Cuda, T>,
) -> Result<()> {
    let for_hopper = for_hopper(&args);
    let BackwardFilter { dims, x, norm, dy, dw } = args;
    let gradient = FilterGradient { dims, x: x.into(), norm: norm.into(), dy: Gradient::new(dy), dw: dw.into() };
    let variants = for_hopper.variants::<T>(cuda).into_iter().map(Variant::Hopper);
    let mut all = variants.chain(gradient.variants::<T>(cuda.facts()).into_iter().map(Variant::Older));
    let Some(rule) = all.next() else {
        return gradient.plain::<T>(cuda, MODULE, "norm_relu_conv_backward_filter");
    };
    let shape = || shape_with_grad::<T>(&dims, gradient.dy.kind());
    match cuda.choose("norm_relu_conv_backward_filter", shape, rule, all, Named::name) {
        Variant::Hopper(variant) => for_hopper.launch::<T>(cuda, variant),
        Variant::Older(variant) => gradient.launch::<T>(cuda, variant),
    }
}

/// The pass as Hopper's kernels take it.
pub(super) fn for_hopper<T: CudaElement>(args: &BackwardFilter<'_, Cuda, T>) -> hopper::BackwardFilter {
    let BackwardFilter { dims, x, norm, dy, dw } = args;
    let coef = norm.address().offset(2 * dims.c * size_of::<f32>());
    hopper::BackwardFilter { dims: *dims, x: x.address(), coef, dy: (*dy).into(), dw: dw.address() }
}

/// A 1x1 filter with stride 1 sees pixels and no images: one pixel an image leaves most freedom to cut them.
fn flat(d: ConvDims) -> ConvDims {
    if (d.r, d.s, d.stride) == (1, 1, 1) { ConvDims { n: d.rows_in(), h: 1, w: 1, ..d } } else { d }
}

/// `Args` of `backward_filter.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct TensorArgs {
    x: Address,
    norm: Address,
    dz: Address,
    grad_x: Address,
    coef: Address,
    out: Address,
    conv: Conv,
    images: i32,
    rows: i32,
    tiles: i32,
    splits: i32,
    inputs: i32,
    pixels: i32,
    unused: i32,
}

/// A kernel of the tensor cores, and how the sum over pixels is cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct TensorVariant {
    kernel: Kernel,
    tile: Tile,
    shares: Shares,
}

impl Named for TensorVariant {
    fn name(&self) -> String {
        format!("{}{}", self.kernel.name, self.shares.name())
    }
}

/// A kernel of the tensor cores.
#[derive(Debug, Clone, Copy)]
struct Kernel {
    name: &'static str,
    taps: usize,
    /// Of a block.
    filters: usize,
    channels: usize,
    threads: usize,
    /// Blocks that a multiprocessor's registers hold.
    resident: usize,
    order: Order,
}

/// How the pixels of a tile lie in shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// As they do in memory, the inputs with their padding.
    Images,
    /// Of whole images first all those at the first place of the map, then those at the next, without padding: a step of 16
    /// pixels is one place, or a few, and leaves out the taps that are outside of the map there.
    Places,
}

impl Kernel {
    const fn pointwise(name: &'static str, [filters, channels]: [usize; 2], threads: usize, resident: usize) -> Self {
        Self { name, taps: 1, filters, channels, threads, resident, order: Order::Images }
    }

    const NINE_TAPS: Self =
        Self { name: "9x64x64", taps: 9, filters: 64, channels: 64, threads: 256, resident: 1, order: Order::Images };
    /// For lines so wide that 99 KiB of shared memory hold none of them 64 channels deep.
    const NINE_TAPS_NARROW: Self = Self { name: "9x64x32", channels: 32, threads: 128, ..Self::NINE_TAPS };
    const NINE_TAPS_OF_PLACES: Self = Self { name: "9x64x64_places", order: Order::Places, ..Self::NINE_TAPS };
    const POINTWISE: [Self; 6] = [
        Self::pointwise("64x64", [64, 64], 256, 2),
        Self::pointwise("256x64", [256, 64], 128, 2),
        Self::pointwise("64x256", [64, 256], 128, 2),
        Self::pointwise("128x128", [128, 128], 128, 2),
        Self::pointwise("256x128", [256, 128], 256, 1),
        Self::pointwise("128x256", [128, 256], 256, 1),
    ];

    /// The one for a shape; where not even its least tile fits into shared memory, it gives way to the first that does.
    fn rule(shared_bytes: usize, d: &ConvDims, dy: Gradient) -> Option<Self> {
        let best = Self::best(shared_bytes, d, dy)?;
        std::iter::once(best).chain(Self::all(d)).find(|kernel| kernel.tile(shared_bytes, d, dy).is_some())
    }

    /// As few reads of either operand as registers allow.
    fn best(shared_bytes: usize, d: &ConvDims, dy: Gradient) -> Option<Self> {
        let [small, tall, broad, square, taller, broader] = Self::POINTWISE;
        match (d.r, d.s, d.stride) {
            (3, 3, 1 | 2) => {
                let cost = |kernel: Self| {
                    kernel.tile(shared_bytes, d, dy).map_or(usize::MAX, |tile| kernel.cost(d, &tile, dy))
                };
                // On larger maps a tile has so few images that a step is several places.
                let small = d.p().min(d.q()) <= 4;
                let places = small && cost(Self::NINE_TAPS_OF_PLACES) < cost(Self::NINE_TAPS);
                return Some(if places { Self::NINE_TAPS_OF_PLACES } else { Self::NINE_TAPS });
            }
            (1, 1, _) => {}
            _ => return None,
        }
        Some(match (d.k, d.c) {
            (..=64, ..=64) => small,
            (_, ..=64) => tall,
            (..=64, _) => broad,
            (..=128, ..=128) => square,
            (_, ..=128) => taller,
            _ => broader,
        })
    }

    /// All for a shape that has one.
    fn all(d: &ConvDims) -> Vec<Self> {
        let nine_taps = [Self::NINE_TAPS, Self::NINE_TAPS_NARROW, Self::NINE_TAPS_OF_PLACES];
        if d.r == 1 { Self::POINTWISE.to_vec() } else { nine_taps.to_vec() }
    }

    /// Of a tile of some images and rows; [`None`] where a thread could not remember which of its chunks exist, or places
    /// would not be those of whole images.
    fn sized(&self, d: &ConvDims, images: usize, rows: usize) -> Option<Tile> {
        if self.order == Order::Places && rows < d.p() {
            return None;
        }
        let pixels = (images * rows * d.q()).next_multiple_of(STEP);
        let halo = ((rows - 1) * d.stride + 3) * ((d.q() - 1) * d.stride + 3);
        let inputs = match self.order {
            Order::Places => images * d.h * d.w,
            Order::Images if self.taps == 1 => pixels,
            Order::Images => images * halo,
        };
        let count = if rows == d.p() { d.n.div_ceil(images) } else { d.n * d.p().div_ceil(rows) };
        let chunks = |rows: usize, width: usize| rows.div_ceil(self.threads / (width / 8));
        let remembered = chunks(inputs, self.channels) <= 32 && chunks(pixels, self.filters) <= 32;
        remembered.then_some(Tile { images, rows, pixels, inputs, count })
    }

    fn shared_bytes(&self, tile: &Tile, dy: Gradient) -> usize {
        const BUFFERS: usize = 3;
        let row = |width: usize| 2 * width + 16;
        let grads = if dy.coef == Address::NONE { 1 } else { 2 };
        let buffer = tile.inputs * row(self.channels) + tile.pixels * row(self.filters) * grads;
        let tables = match self.order {
            Order::Images => 8 * tile.inputs + 4 * tile.pixels,
            Order::Places => row(self.channels) + 8 * tile.inputs + 8 * tile.pixels + 4 * tile.pixels / STEP,
        };
        BUFFERS * buffer + tables.next_multiple_of(16)
    }

    /// The tile that costs least of those that fit into shared memory.
    fn tile(&self, shared_bytes: usize, d: &ConvDims, dy: Gradient) -> Option<Tile> {
        // Each block takes some shared memory of its own beside what it asks for.
        const RESERVED: usize = 1024;
        const MOST_PIXELS: usize = 256;
        const MOST_IMAGES: usize = 64;
        let limit = (shared_bytes + RESERVED) / self.resident - RESERVED;
        let images = |rows: usize| if rows == d.p() { MOST_IMAGES.min(d.n) } else { 1 };
        let tiles = (1..=d.p()).flat_map(|rows| (1..=images(rows)).map(move |images| (images, rows)));
        tiles
            .filter(|&(images, rows)| (images, rows) == (1, 1) || images * rows * d.q() <= MOST_PIXELS)
            .filter_map(|(images, rows)| self.sized(d, images, rows))
            .filter(|tile| self.shared_bytes(tile, dy) <= limit)
            .min_by_key(|tile| self.cost(d, tile, dy))
    }

    /// Cycles of a multiprocessor for the whole batch, about: of the products or of the loads, whichever take longer, and of
    /// what each tile costs in any case. From what was measured on an H200.
    fn cost(&self, d: &ConvDims, tile: &Tile, dy: Gradient) -> usize {
        const TILE_CYCLES: usize = 300;
        const LOADED_BYTES_PER_CYCLE: usize = 24;
        let tap_cycles = if self.taps == 1 {
            (self.filters * self.channels / 81).max(64)
        } else {
            self.filters * self.channels / 78
        };
        let taps = match self.order {
            Order::Images => tile.steps(d) * self.taps,
            Order::Places => tile.count * taps_of_places(d, tile),
        };
        let grads = if dy.coef == Address::NONE { 1 } else { 2 };
        let bytes = 2 * (tile.inputs * self.channels + tile.pixels * self.filters * grads);
        let products = taps * tap_cycles * self.resident;
        let loads = tile.count * bytes * self.resident / LOADED_BYTES_PER_CYCLE;
        products.max(loads) + tile.count * TILE_CYCLES
    }
}

/// Pixels whose products are one instruction deep.
const STEP: usize = 16;

/// A tile of output pixels: rows of one image, or whole images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tile {
    images: usize,
    rows: usize,
    /// Rows of shared memory for gradients and inputs.
    pixels: usize,
    inputs: usize,
    /// How many such tiles there are.
    count: usize,
}

impl Tile {
    /// Steps over the whole batch; an image's last tile, or the batch's, may be shorter.
    fn steps(&self, d: &ConvDims) -> usize {
        let steps = |images: usize, rows: usize| (images * rows * d.q()).div_ceil(STEP);
        if self.rows == d.p() {
            d.n / self.images * steps(self.images, self.rows) + steps(d.n % self.images, self.rows)
        } else {
            d.n * (d.p() / self.rows * steps(1, self.rows) + steps(1, d.p() % self.rows))
        }
    }
}

/// Taps of the steps of a tile of [`Order::Places`], in all: each has those that are inside of the map at one of its places.
fn taps_of_places(d: &ConvDims, tile: &Tile) -> usize {
    let side =
        |at: usize, extent: usize| (0..3).map(move |tap| (d.pad..d.pad + extent).contains(&(at * d.stride + tap)));
    let taps = |place: usize| {
        let columns = move || side(place % d.q(), d.w);
        let inside = side(place / d.q(), d.h).flat_map(|row| columns().map(move |column| row && column));
        inside.enumerate().fold(0u32, |taps, (tap, inside)| taps | u32::from(inside) << tap)
    };
    let last = d.p() * d.q() - 1;
    let places = |step: usize| step * STEP / tile.images..=((step * STEP + STEP - 1) / tile.images).min(last);
    let of_step = |step| places(step).fold(0, |all, place| all | taps(place)).count_ones() as usize;
    (0..tile.pixels / STEP).map(of_step).sum()
}

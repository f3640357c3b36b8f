//! What `conv.h` calls a product: its arguments, which pixels it reads and writes, and the kernel that does it best.

use super::Named;
use crate::cuda::{Address, CudaElement, GpuFacts, Grid};
use crate::partials::{Cut, SUM_ROWS};
use crate::{ConvDims, Cuda, Error, Grad, Result};

/// `Class` of `conv.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Class {
    rows: i32,
    height: i32,
    width: i32,
    taps_r: i32,
    taps_s: i32,
    source_r: i32,
    source_dr: i32,
    source_s: i32,
    source_ds: i32,
    filter_r: i32,
    filter_dr: i32,
    filter_s: i32,
    filter_ds: i32,
    out_r: i32,
    out_s: i32,
    tile: i32,
}

/// `ConvArgs` of `conv.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, bytemuck::NoUninit)]
pub(super) struct Args {
    pub(super) a: Address,
    pub(super) a2: Address,
    pub(super) coef: Address,
    pub(super) b: Address,
    pub(super) add: Address,
    pub(super) x: Address,
    pub(super) norm: Address,
    pub(super) out: Address,
    pub(super) sums: Address,
    b_n: u64,
    b_tap: u64,
    b_channel: u64,
    kc: i32,
    nc: i32,
    source_height: i32,
    source_width: i32,
    step: i32,
    divide: i32,
    out_height: i32,
    out_width: i32,
    out_step: i32,
    pub(super) add_step: i32,
    filter_width: i32,
    images: i32,
    classes: [Class; 4],
}

/// Which product; decides the epilogue, and with the gradient's kind the kernels' names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    Forward,
    BackwardData,
    Projection,
}

/// How the left operand is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Load {
    NormRelu,
    Plain,
    Affine,
}

/// A kernel's way to the rows of the left operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Tensor cores, tap by tap.
    Gather,
    /// The same, with the rows in another order: a tile is one place of the map in 128 images, and leaves out the taps that
    /// are outside of the map there.
    Places,
    /// Tensor cores, all taps of a 3x3 filter from one run of pixels.
    Halo,
    /// Any shape and type.
    Plain,
}

/// A kernel, by its way and the columns of its tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kernel {
    way: Way,
    columns: usize,
}

impl Kernel {
    /// The one that takes every shape.
    pub(super) const PLAIN: Self = Self { way: Way::Plain, columns: 64 };

    /// Whether it takes any type, and everything as it lies in memory.
    pub(super) fn is_plain(self) -> bool {
        self == Self::PLAIN
    }
}

impl Named for Kernel {
    fn name(&self) -> String {
        let width = if self.columns == WIDE { "wide" } else { "narrow" };
        match self.way {
            Way::Plain => "plain".into(),
            Way::Gather => format!("gather_{width}"),
            Way::Places => format!("places_{width}"),
            Way::Halo => format!("halo_{width}"),
        }
    }
}

/// Threads of the plain kernels.
const PLAIN_THREADS: usize = 256;
/// Columns of the others' tiles.
const NARROW: usize = 64;
const WIDE: usize = 128;
/// What the kernels keep of each row in shared memory beside what the launch asks for: `Rows` of `conv_tensor.h`.
const ROWS_BYTES: usize = SUM_ROWS * 16;
/// What kernels count by 31 bits, in padded taps too: rows, elements of the filters, chunks of eight elements of the maps.
const MOST: usize = 1 << 30;

/// A block's share in a tensor-core kernel, as the `.cu` files have it; 128 rows always.
#[derive(Debug, Clone, Copy)]
struct Tile {
    columns: usize,
    channels: usize,
    stages: usize,
    threads: usize,
}

impl Tile {
    fn new(Kernel { way, columns }: Kernel, load: Load) -> Self {
        let (channels, stages, threads) = match (way, load, columns) {
            (Way::Halo, Load::Affine, _) => (64, 2, 128),
            (Way::Halo, ..) => (64, 2, 2 * columns),
            (_, Load::Affine, NARROW) => (32, 3, 2 * columns),
            (_, Load::Affine, _) => (32, 4, 2 * columns),
            _ => (64, 3, 2 * columns),
        };
        Self { columns, channels, stages, threads }
    }

    /// `GatherPlan::SHARED_BYTES`.
    fn gather_bytes(self, load: Load) -> usize {
        let left = if load == Load::Affine { 2 * SUM_ROWS } else { SUM_ROWS };
        self.stages * (left + self.columns) * self.channels * 2
    }

    /// A row of zeros, the filters' ring, and a run or, with more channels than one step takes, two; or what the epilogue
    /// needs then: one tile or two of the result's size, and the warps' sums.
    fn halo_bytes(self, pass: Pass, width: usize, channels: usize) -> usize {
        let row = self.channels * 2;
        let runs = if channels > self.channels { 2 } else { 1 };
        let ring = row * (1 + self.stages * self.columns + runs * run_rows(width));
        let tiles = if pass == Pass::Forward { 1 } else { 2 };
        let sums = 2 * (self.threads / 32) + 1;
        ring.max(self.columns * (tiles * SUM_ROWS * 2 + sums * 4))
    }
}

/// Pixels that 128 consecutive ones and their neighbours lie in.
fn run_rows(width: usize) -> usize {
    SUM_ROWS + 2 * width + 2
}

/// One product, ready but for its addresses.
#[derive(Debug)]
pub(super) struct Product {
    pass: Pass,
    pub(super) load: Load,
    dims: ConvDims,
    classes: usize,
    pub(super) args: Args,
}

impl Product {
    /// `y` from `x`.
    pub(super) fn forward(dims: ConvDims) -> Result<Self> {
        let ConvDims { h, w, c, k, r, s, stride, pad, .. } = dims;
        let pad = int(pad);
        let class = Class {
            rows: int(dims.rows_out()),
            height: int(dims.p()),
            width: int(dims.q()),
            taps_r: int(r),
            taps_s: int(s),
            source_r: -pad,
            source_dr: 1,
            source_s: -pad,
            source_ds: 1,
            filter_dr: 1,
            filter_ds: 1,
            ..Class::default()
        };
        let args = Args {
            b_n: (r * s * c) as u64,
            b_tap: c as u64,
            b_channel: 1,
            kc: int(c),
            nc: int(k),
            source_height: int(h),
            source_width: int(w),
            step: int(stride),
            divide: 1,
            out_height: int(dims.p()),
            out_width: int(dims.q()),
            out_step: 1,
            add_step: 1,
            filter_width: int(s),
            classes: [class, Class::default(), Class::default(), Class::default()],
            ..Args::default()
        };
        Self { pass: Pass::Forward, load: Load::NormRelu, dims, classes: 1, args }.checked()
    }

    /// The gradient of `x` from that of `y`, of the forward pass's dims.
    pub(super) fn backward_data(dims: ConvDims) -> Result<Self> {
        let ConvDims { h, w, c, k, r, s, stride, .. } = dims;
        let (classes, out_step, divide) = match stride {
            1 | 2 => (parity_classes(&dims, stride), stride, 1),
            _ => (vec![transposed_class(&dims, 1, [0, 0])], 1, stride),
        };
        let mut args = Args {
            b_n: 1,
            b_tap: c as u64,
            b_channel: (r * s * c) as u64,
            kc: int(k),
            nc: int(c),
            source_height: int(dims.p()),
            source_width: int(dims.q()),
            step: 1,
            divide: int(divide),
            out_height: int(h),
            out_width: int(w),
            out_step: int(out_step),
            add_step: 1,
            filter_width: int(s),
            ..Args::default()
        };
        args.classes[..classes.len()].copy_from_slice(&classes);
        Self { pass: Pass::BackwardData, load: Load::Plain, dims, classes: classes.len(), args }.checked()
    }

    /// The gradient of the pixels that a 1x1 projection reads, of dims without its stride.
    pub(super) fn projection(dims: ConvDims) -> Result<Self> {
        Ok(Self { pass: Pass::Projection, ..Self::backward_data(dims)? })
    }

    /// Rows and extents are of 31 bits in the kernels.
    fn checked(self) -> Result<Self> {
        let ConvDims { h, w, c, k, r, s, stride, pad, .. } = self.dims;
        let sizes = [self.dims.rows_in(), self.dims.rows_out(), h, w, c, k, r, s, stride, pad];
        match sizes.into_iter().find(|&size| size > MOST) {
            Some(size) => Err(Error::Launch { kernel: self.name().into(), reason: format!("an extent of {size}") }),
            None => Ok(self),
        }
    }

    /// The left operand is this gradient.
    pub(super) fn load_grad<T: CudaElement>(&mut self, grad: Grad<'_, Cuda, T>) {
        match grad {
            Grad::Plain(dy) => self.args.a = dy.into(),
            Grad::Affine(affine) => {
                self.load = Load::Affine;
                self.args.a = affine.dz.into();
                self.args.a2 = affine.x.into();
                self.args.coef = affine.coef.into();
            }
        }
    }

    /// How the result's rows are cut for partial sums: a run for each class.
    pub(super) fn cut(&self) -> Cut {
        Cut { runs: self.args.classes.map(|class| class.rows as usize), tile: SUM_ROWS }
    }

    /// The kernel for this shape at these addresses.
    pub(super) fn rule<T: CudaElement>(&self, facts: &GpuFacts) -> Kernel {
        let columns = if self.args.nc as usize > NARROW { WIDE } else { NARROW };
        let kernel = |way| Kernel { way, columns };
        let (places, all) = (self.products_of_places(), self.products());
        // Fifths of a halo's time for as many products. On an H200 it was 1.1 times that forward and 1.5 of a gradient that is
        // formed, and more in narrow tiles. So 4x4 (69% of the products) gains by places forward, 2x2 (44%) always, 8x8 (84%)
        // never.
        let fifths = if self.load == Load::Affine { 8 } else { 6 };
        if !self.has_tensor_cores::<T>() {
            Kernel::PLAIN
        } else if self.fits_halo(facts, kernel(Way::Halo)) {
            kernel(if places * fifths < all * 5 { Way::Places } else { Way::Halo })
        } else {
            // The pixels of a tile of places lie far apart: less than an eighth is not worth it.
            kernel(if places < all - all / 8 { Way::Places } else { Way::Gather })
        }
    }

    /// Pairs of a pixel and a tap that are multiplied where all are.
    fn products(&self) -> usize {
        self.args.classes.iter().map(|class| class.rows as usize * (class.taps_r * class.taps_s) as usize).sum()
    }

    /// Of [`Way::Places`]; of images that are no whole tiles, all count.
    fn products_of_places(&self) -> usize {
        let ConvDims { n, c, k, .. } = self.dims;
        let left_over = n % SUM_ROWS;
        self.dims.pairs() / (n * c * k) * (n - left_over) + self.products() / n * left_over
    }

    /// All that are fast there.
    pub(super) fn kernels<T: CudaElement>(&self, facts: &GpuFacts) -> Vec<Kernel> {
        let kernel = |way| [WIDE, NARROW].map(|columns| Kernel { way, columns });
        let all = [Way::Halo, Way::Places, Way::Gather].into_iter().flat_map(kernel);
        let takes = |kernel: Kernel| match kernel.way {
            Way::Halo => self.fits_halo(facts, kernel),
            Way::Places => self.products_of_places() < self.products(),
            Way::Gather => true,
            Way::Plain => false,
        };
        all.filter(|&kernel| self.has_tensor_cores::<T>() && takes(kernel)).collect()
    }

    /// Whether other kernels than the plain one take it.
    fn has_tensor_cores<T: CudaElement>(&self) -> bool {
        let Args { a, a2, coef, b, add, x, norm, out, .. } = self.args;
        let aligned = [a, a2, coef, b, add, x, norm, out].iter().all(|place| place.is_aligned());
        let d = &self.dims;
        let chunks = d.c.is_multiple_of(8) && d.k.is_multiple_of(8);
        let reached = d.len_filter() <= MOST && d.len_in().max(d.len_out()) / 8 <= MOST;
        let taps = d.r * d.s <= 32 && self.args.divide == 1;
        size_of::<T>() == 2 && aligned && chunks && reached && taps
    }

    /// What a launch asks for.
    pub(super) fn shared_bytes(&self, kernel: Kernel) -> usize {
        let tile = Tile::new(kernel, self.load);
        match kernel.way {
            Way::Plain => 0,
            Way::Gather | Way::Places => tile.gather_bytes(self.load),
            Way::Halo => tile.halo_bytes(self.pass, self.dims.w, self.args.kc as usize),
        }
    }

    fn fits_halo(&self, facts: &GpuFacts, kernel: Kernel) -> bool {
        let d = &self.dims;
        // The pieces of the next run that a kernel's threads fetch during eight taps reach so far.
        let reach = 256;
        (d.r, d.s, d.stride, d.pad) == (3, 3, 1, 1)
            && self.load != Load::Plain
            && run_rows(d.w) <= reach
            && self.shared_bytes(kernel) + ROWS_BYTES <= facts.shared_bytes
    }

    /// Takes the filters as `[c][r][s][k]`, which the tensor-core kernels of the gradient want, from a copy.
    pub(super) fn take_transposed(&mut self, copy: Address) {
        let ConvDims { k, r, s, .. } = self.dims;
        self.args.b = copy;
        self.args.b_n = (r * s * k) as u64;
        self.args.b_tap = k as u64;
        self.args.b_channel = 1;
    }

    fn name(&self) -> &'static str {
        match (self.pass, self.load) {
            (Pass::Forward, _) => "conv_forward",
            (Pass::BackwardData, Load::Affine) => "conv_backward_data_affine",
            (Pass::BackwardData, _) => "conv_backward_data",
            (Pass::Projection, Load::Affine) => "conv_projection_affine",
            (Pass::Projection, _) => "conv_projection",
        }
    }

    /// Queues it; all addresses are set.
    pub(super) fn launch<T: CudaElement>(&self, cuda: &Cuda, kernel: Kernel) -> Result<()> {
        let threads = if kernel.is_plain() { PLAIN_THREADS } else { Tile::new(kernel, self.load).threads };
        let shared_bytes = self.shared_bytes(kernel);
        let module = if self.pass == Pass::Forward { "norm_relu_conv_forward" } else { "norm_relu_conv_backward_data" };
        let rows = self.args.classes.iter().map(|class| class.rows as usize).max().unwrap_or(0);
        let blocks = rows.div_ceil(SUM_ROWS) * (self.args.nc as usize).div_ceil(kernel.columns);
        let grid = Grid { blocks: [blocks, 1, self.classes], threads, shared_bytes };
        // Places are an order of rows, for the same code.
        let (code, images) = match kernel.way {
            Way::Places => (Kernel { way: Way::Gather, ..kernel }, int(self.dims.n)),
            _ => (kernel, 0),
        };
        let args = Args { images, ..self.args };
        cuda.launch::<T>(module, &format!("{}_{}", self.name(), code.name()), grid, &args)
    }
}

/// Sizes that [`Product::checked`] has seen, or will.
fn int(size: usize) -> i32 {
    i32::try_from(size).unwrap_or(i32::MAX)
}

/// The pixels of the input, by the taps that reach them: where the stride is 2 those of a row's and a column's parity, odd
/// ones first, as a 3x3 filter reaches those by most taps.
fn parity_classes(dims: &ConvDims, stride: usize) -> Vec<Class> {
    let mut tile = 0;
    let parities = (0..stride).rev().flat_map(|y| (0..stride).rev().map(move |x| [y, x]));
    parities
        .map(|parity| {
            let class = Class { tile, ..transposed_class(dims, stride, parity) };
            tile += int((class.rows as usize).div_ceil(SUM_ROWS));
            class
        })
        .collect()
}

/// Pixel `stride * i + parity` along a side is reached by tap r from output pixel (stride * i + parity + pad - r) / stride
/// where that is whole: by every `stride`-th tap.
fn transposed_class(dims: &ConvDims, stride: usize, parity: [usize; 2]) -> Class {
    let ConvDims { n, h, w, r, s, pad, .. } = *dims;
    let side = |len: usize, parity: usize| (len + stride - 1 - parity) / stride;
    let first = |parity: usize| (parity + pad) % stride;
    let taps = |filter: usize, parity: usize| (filter + stride - 1 - first(parity)) / stride;
    let source = |parity: usize| (parity + pad - first(parity)) / stride;
    let [y, x] = parity;
    let (height, width) = (side(h, y), side(w, x));
    Class {
        rows: int(n * height * width),
        height: int(height),
        width: int(width),
        taps_r: int(taps(r, y)),
        taps_s: int(taps(s, x)),
        source_r: int(source(y)),
        source_dr: -1,
        source_s: int(source(x)),
        source_ds: -1,
        filter_r: int(first(y)),
        filter_dr: int(stride),
        filter_s: int(first(x)),
        filter_ds: int(stride),
        out_r: int(y),
        out_s: int(x),
        tile: 0,
    }
}

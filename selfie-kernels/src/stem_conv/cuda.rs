use super::{BackwardFilter, Forward};
use crate::cuda::{Address, CudaElement, Grid, blocks, narrow};
use crate::norm_relu_conv::cuda::backward_filter::{Conv, FilterGradient, Gradient, Splits};
use crate::partials::{Cut, SUM_ROWS};
use crate::{ConvDims, Cuda, Result};

const MODULE: &str = "stem_conv";
/// Pixels of a tile, which the statistics share, and filters of one.
const TILE_ROWS: usize = SUM_ROWS;
const TILE_FILTERS: usize = 64;

pub(crate) fn stem_conv_forward<T: CudaElement>(cuda: &Cuda, args: Forward<'_, Cuda, T>) -> Result<()> {
    let Forward { dims, x, w, y, stats } = args;
    let stats = stats.map(|stats| stats.make(Cut::plain(dims.rows_out()), dims.k)).into();
    Convolution { dims, x: x.into(), w: w.into(), y: y.into(), stats }.launch::<T>(cuda)
}

pub(crate) fn stem_conv_backward_filter<T: CudaElement>(cuda: &Cuda, args: BackwardFilter<'_, Cuda, T>) -> Result<()> {
    let BackwardFilter { dims, x, dy, dw } = args;
    launch_filter::<T>(cuda, dims, x.into(), Gradient::new(dy), dw.into())
}

/// The forward pass's arguments; `stats` may be none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Convolution {
    pub(crate) dims: ConvDims,
    pub(crate) x: Address,
    pub(crate) w: Address,
    pub(crate) y: Address,
    pub(crate) stats: Address,
}

/// The filter's gradient `dw`.
pub(crate) fn launch_filter<T: CudaElement>(
    cuda: &Cuda,
    dims: ConvDims,
    x: Address,
    dy: Gradient,
    dw: Address,
) -> Result<()> {
    let gradient = FilterGradient { dims, x, norm: Address::NONE, dy, dw };
    match TensorShape::of::<T>(&dims).filter(|shape| shape.takes_filter(cuda, &dims, dy)) {
        Some(shape) => tensor_filter::<T>(cuda, &gradient, shape),
        None => gradient.plain::<T>(cuda, MODULE, "stem_conv_backward_filter"),
    }
}

/// `ForwardArgs` of `stem_conv.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct ForwardArgs {
    x: Address,
    w: Address,
    y: Address,
    stats: Address,
    conv: Conv,
    rows: i32,
}

/// `TensorForwardArgs` of `stem_conv.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct TensorForwardArgs {
    forward: ForwardArgs,
    tiles: i32,
    pitch: i32,
}

/// `StatsArgs` of `stem_conv.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct StatsArgs {
    y: Address,
    stats: Address,
    rows: i32,
    k: i32,
}

impl Convolution {
    pub(crate) fn launch<T: CudaElement>(&self, cuda: &Cuda) -> Result<()> {
        match TensorShape::of::<T>(&self.dims).filter(|shape| shape.takes_forward(cuda, &self.dims, self.y)) {
            Some(shape) => self.tensor::<T>(cuda, shape),
            None => self.plain::<T>(cuda),
        }
    }

    fn args(&self) -> Result<ForwardArgs> {
        let Self { dims, x, w, y, stats } = *self;
        Ok(ForwardArgs { x, w, y, stats, conv: Conv::new(&dims)?, rows: narrow(dims.rows_out())? })
    }

    /// Any shape; statistics by a kernel of their own.
    fn plain<T: CudaElement>(&self, cuda: &Cuda) -> Result<()> {
        const THREADS: usize = 256;
        const TILE: usize = 64;
        let (rows, k) = (self.dims.rows_out(), self.dims.k);
        let grid = |tile: usize| Grid {
            blocks: [blocks(rows, tile), blocks(k, TILE_FILTERS), 1],
            threads: THREADS,
            shared_bytes: 0,
        };
        cuda.launch::<T>(MODULE, "stem_conv_forward", grid(TILE), &self.args()?)?;
        if self.stats == Address::NONE {
            return Ok(());
        }
        let args = StatsArgs { y: self.y, stats: self.stats, rows: narrow(rows)?, k: narrow(k)? };
        cuda.launch::<T>(MODULE, "stem_conv_stats", grid(TILE_ROWS), &args)
    }

    fn tensor<T: CudaElement>(&self, cuda: &Cuda, shape: TensorShape) -> Result<()> {
        let d = &self.dims;
        let (tiles, parts) = (blocks(d.rows_out(), TILE_ROWS), blocks(d.k, TILE_FILTERS));
        let pitch = narrow(shape.pitch(d))?;
        let args = TensorForwardArgs { forward: self.args()?, tiles: narrow(tiles)?, pitch };
        let grid = Grid {
            // Each loads the filters once, for all of its tiles.
            blocks: [tiles.min(shape.forward_blocks * cuda.facts().multiprocessors), parts, 1],
            threads: 128,
            shared_bytes: shape.forward_bytes(d),
        };
        cuda.launch::<T>(MODULE, &format!("stem_conv_forward_{}", shape.name), grid, &args)
    }
}

/// `TensorFilterArgs` of `stem_conv.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct TensorFilterArgs {
    x: Address,
    dz: Address,
    grad_x: Address,
    coef: Address,
    out: Address,
    conv: Conv,
    rows: i32,
    tiles: i32,
    splits: i32,
    pitch: i32,
    unused: i32,
}

fn tensor_filter<T: CudaElement>(cuda: &Cuda, gradient: &FilterGradient, shape: TensorShape) -> Result<()> {
    let FilterGradient { dims: d, x, dy, dw, .. } = *gradient;
    let (tiles, parts) = (blocks(d.rows_out(), TILE_ROWS), blocks(d.k, TILE_FILTERS));
    let resident = shape.filter_blocks * cuda.facts().multiprocessors;
    let splits = Splits::new(cuda, dw, d.len_filter(), tiles, parts, resident);
    let args = TensorFilterArgs {
        x,
        dz: dy.dz,
        grad_x: dy.x,
        coef: dy.coef,
        out: splits.out,
        conv: Conv::new(&d)?,
        rows: narrow(d.rows_out())?,
        tiles: narrow(tiles)?,
        splits: narrow(splits.count)?,
        pitch: narrow(shape.pitch(&d))?,
        unused: 0,
    };
    let grid = Grid { blocks: [splits.count, parts, 1], threads: 256, shared_bytes: shape.filter_bytes(&d) };
    cuda.launch::<T>(MODULE, &format!("stem_conv_backward_filter_{}_{}", shape.name, dy.kind()), grid, &args)?;
    splits.add(cuda)
}

/// A filter that the tensor cores' kernels are compiled for.
#[derive(Debug, Clone, Copy)]
struct TensorShape {
    name: &'static str,
    side: usize,
    stride: usize,
    /// Copies of a patch for the filter's gradient: two where windows begin at odd pixels.
    copies: usize,
    /// Blocks that a multiprocessor holds, of either pass.
    forward_blocks: usize,
    filter_blocks: usize,
}

impl TensorShape {
    const ALL: [Self; 2] = [
        Self { name: "3x3", side: 3, stride: 1, copies: 2, forward_blocks: 3, filter_blocks: 2 },
        Self { name: "7x7", side: 7, stride: 2, copies: 1, forward_blocks: 2, filter_blocks: 1 },
    ];

    fn of<T: CudaElement>(d: &ConvDims) -> Option<Self> {
        // The tensor cores round operands, which f32 does not want.
        let chunks = T::OPERAND_EPSILON > 0.0 && d.c == 3 && d.k.is_multiple_of(8);
        Self::ALL.into_iter().find(|shape| chunks && [d.r, d.s, d.stride] == [shape.side, shape.side, shape.stride])
    }

    /// Bytes of a patch's strip: the pixels of a tile's windows, each segment's rounded up to an even number, and two more, as
    /// the second copy is shifted and the last unit may end behind the last pixel.
    fn pitch(&self, d: &ConvDims) -> usize {
        let rows = TILE_ROWS.min(d.rows_out());
        let segments = 1 + (rows - 1).div_ceil(d.q());
        let pixels = rows * self.stride + segments * (self.side - self.stride + 1);
        ((pixels + 2) * 8).next_multiple_of(16)
    }

    fn forward_bytes(&self, d: &ConvDims) -> usize {
        let steps = (self.side * self.side).div_ceil(4);
        let (weights, stage) = (TILE_FILTERS * (32 * steps + 16), TILE_ROWS * (2 * TILE_FILTERS + 16));
        weights + stage + self.side * self.pitch(d)
    }

    /// Of tiles; their place is the sums' when all tiles are done.
    fn filter_bytes(&self, d: &ConvDims) -> usize {
        let tile = TILE_ROWS * (2 * TILE_FILTERS + 16) + self.copies * self.side * self.pitch(d);
        let columns = self.side * self.side.div_ceil(2) * 8;
        tile.max(TILE_FILTERS * columns * size_of::<f32>())
    }

    fn takes_forward(&self, cuda: &Cuda, d: &ConvDims, y: Address) -> bool {
        // Beside what the kernel's own arrays take: sums of the statistics.
        const SUMS: usize = 1024;
        y.is_aligned() && self.forward_bytes(d) + SUMS <= cuda.facts().shared_bytes
    }

    fn takes_filter(&self, cuda: &Cuda, d: &ConvDims, dy: Gradient) -> bool {
        // The places of the windows.
        const WINDOWS: usize = 4 * TILE_ROWS;
        dy.is_aligned() && self.filter_bytes(d) + WINDOWS <= cuda.facts().shared_bytes
    }
}

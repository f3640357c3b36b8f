mod hopper;

use super::{BackwardFilter, Forward, PoolDims};
use crate::cuda::{Address, CudaElement, GradArgs, Grid, TILE_CHANNELS, blocks, narrow};
use crate::norm_relu_conv::cuda::backward_filter::{Gradient, Splits};
use crate::partials::{Cut, SUM_ROWS};
use crate::stem_conv::cuda::{Convolution, launch_filter};
use crate::{ConvDims, Cuda, Result};

const MODULE: &str = "stem_pool";
const THREADS: usize = 256;

pub(crate) fn stem_pool_forward<T: CudaElement>(cuda: &Cuda, args: Forward<'_, Cuda, T>) -> Result<()> {
    let Forward { dims, x, w, map, y, argmax, stats } = args;
    let pool = PoolDims::behind(&dims);
    let (x, w, y, argmax) = (x.into(), w.into(), y.into(), argmax.into());
    if let Some(mut stream) = hopper::Stream::of::<T>(cuda, &dims, x, &[y, argmax])? {
        let cut = stream.cut(cuda);
        let own = cut.is_some();
        let stats = stats.map(|stats| stats.make(cut.unwrap_or(Cut::plain(pool.rows_out())), pool.c)).into();
        stream.pool::<T>(cuda, w, [y, argmax], if own { stats } else { Address::NONE })?;
        return if own { Ok(()) } else { pooled_stats::<T>(cuda, &pool, y, stats) };
    }
    let stats = stats.map(|stats| stats.make(Cut::plain(pool.rows_out()), pool.c)).into();
    match Stream::forward::<T>(cuda, &dims, x, [y, argmax])? {
        Some(stream) => {
            stream.pool::<T>(cuda, ForwardArgs { stream, w, y, argmax })?;
            pooled_stats::<T>(cuda, &pool, y, stats)
        }
        None => {
            let map = map.into();
            Convolution { dims, x, w, y: map, stats: Address::NONE }.launch::<T>(cuda)?;
            let extents = extents(&pool);
            let args = PoolArgs { x: map, y, argmax, stats, rows: pool.rows_out() as u64, extents, unused: 0 };
            cuda.launch::<T>(MODULE, "stem_pool_pool", tiles(&pool), &args)
        }
    }
}

pub(crate) fn stem_pool_backward_filter<T: CudaElement>(cuda: &Cuda, args: BackwardFilter<'_, Cuda, T>) -> Result<()> {
    let BackwardFilter { dims, x, dy, argmax, map, dw } = args;
    let (x, argmax, dw, grad) = (x.into(), argmax.into(), dw.into(), Gradient::new(dy));
    if let Some(stream) = hopper::Stream::of::<T>(cuda, &dims, x, &[grad.dz, grad.x, argmax])? {
        return stream.filter_gradient::<T>(cuda, &dims, grad, argmax, dw);
    }
    if let Some(stream) = Stream::backward::<T>(cuda, &dims, x, [grad.dz, grad.x, argmax])? {
        return stream.filter_gradient::<T>(cuda, &dims, grad, argmax, dw);
    }
    let (pool, map) = (PoolDims::behind(&dims), map.into());
    let len = dims.len_out();
    let args = UnpoolArgs { dy: dy.into(), argmax, dx: map, len: len as u64, extents: extents(&pool), unused: 0 };
    cuda.launch::<T>(MODULE, "stem_pool_unpool", Grid::line(blocks(len, THREADS), THREADS), &args)?;
    let dm = Gradient { dz: map, x: Address::NONE, coef: Address::NONE };
    launch_filter::<T>(cuda, dims, x, dm, dw)
}

/// `PoolArgs` of `stem_pool.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct PoolArgs {
    x: Address,
    y: Address,
    argmax: Address,
    stats: Address,
    rows: u64,
    extents: [u32; 5],
    unused: u32,
}

/// `UnpoolArgs` of `stem_pool.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct UnpoolArgs {
    dy: GradArgs,
    argmax: Address,
    dx: Address,
    len: u64,
    extents: [u32; 5],
    unused: u32,
}

/// `StatsArgs` of `stem_pool.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct StatsArgs {
    y: Address,
    stats: Address,
    rows: u64,
    c: u32,
    unused: u32,
}

fn extents(pool: &PoolDims) -> [u32; 5] {
    [pool.h, pool.w, pool.c, pool.p(), pool.q()].map(|x| x as u32)
}

/// Blocks of the kernels that have a tile of the pooled map each.
fn tiles(pool: &PoolDims) -> Grid {
    let blocks = [blocks(pool.rows_out(), SUM_ROWS), blocks(pool.c, TILE_CHANNELS), 1];
    Grid { blocks, threads: THREADS, shared_bytes: 0 }
}

fn pooled_stats<T: CudaElement>(cuda: &Cuda, pool: &PoolDims, y: Address, stats: Address) -> Result<()> {
    if stats == Address::NONE {
        return Ok(());
    }
    let args = StatsArgs { y, stats, rows: pool.rows_out() as u64, c: pool.c as u32, unused: 0 };
    cuda.launch::<T>(MODULE, "stem_pool_stats", tiles(pool), &args)
}

/// Whether there are fused kernels for it, as far as they agree: `bf16`, 7x7 with stride 2, and all of it aligned.
fn is_fused<T: CudaElement>(d: &ConvDims, x: Address, others: &[Address]) -> bool {
    T::OPERAND_EPSILON != 0.0
        && [d.c, d.r, d.s, d.stride, d.pad] == [3, 7, 7, 2, 3]
        && x.is_aligned()
        && others.iter().all(|place| place.is_aligned())
}

/// Filters of a block of the fused kernels, columns of their tiles, and how many tiles there are.
const FILTERS: usize = 64;
const TILE: usize = 16;
const TILES: usize = 8;

/// `Stream` of `stem_pool.cu`: how the fused kernels cut images.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::NoUninit)]
struct Stream {
    x: Address,
    n: i32,
    h: i32,
    w: i32,
    k: i32,
    p: i32,
    q: i32,
    rows: i32,
    columns: i32,
    slots: i32,
    segments: i32,
    step: i32,
    width: i32,
    pairs: i32,
    tiles: i32,
}

/// `ForwardArgs` of `stem_pool.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct ForwardArgs {
    stream: Stream,
    w: Address,
    y: Address,
    argmax: Address,
}

/// `FilterArgs` of `stem_pool.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct FilterArgs {
    stream: Stream,
    dz: Address,
    grad_x: Address,
    coef: Address,
    argmax: Address,
    out: Address,
}

/// How a row of the convolution's map is cut: its tiles, or those of a segment where there are more than a block has; from one
/// segment to the next, and columns that one has.
struct Columns {
    tiles: usize,
    segments: usize,
    step: usize,
    width: usize,
}

impl Stream {
    /// Bytes of the forward kernel beside the ring: the warps' stages.
    const STAGES: usize = 8 * TILE * (FILTERS / 2 * 4 + 32);
    /// Bytes of the filter's kernel beside it: two rows of the convolution's gradient, and two of the pooled one.
    const WORK: usize = 2 * 128 * FILTERS * 2 + 2 * 64 * FILTERS * 3;
    /// Bytes of its sums, whose place is that of all else in the end.
    const SUMS: usize = FILTERS * 7 * TILE * 2 * size_of::<f32>();
    /// Its coefficients.
    const COEFFICIENTS: usize = 3 * FILTERS * size_of::<f32>();

    /// Tiles of 7 pooled columns, a row's first of 8.
    fn forward<T: CudaElement>(cuda: &Cuda, d: &ConvDims, x: Address, others: [Address; 2]) -> Result<Option<Self>> {
        let tiles = 1 + PoolDims::behind(d).q().saturating_sub(8).div_ceil(7);
        let columns = if tiles <= TILES {
            Columns { tiles, segments: 1, step: 0, width: d.q() }
        } else {
            Columns { tiles: TILES, segments: tiles.div_ceil(TILES), step: 14 * TILES, width: 14 * TILES + 3 }
        };
        Self::new::<T>(cuda, d, x, &others, columns, Self::STAGES)
    }

    /// Tiles of 16 columns. A segment reads the next one's first pooled column, too, whose windows reach into it.
    fn backward<T: CudaElement>(cuda: &Cuda, d: &ConvDims, x: Address, others: [Address; 3]) -> Result<Option<Self>> {
        const OWN: usize = TILES * TILE - 2;
        let columns = if d.q() <= TILES * TILE {
            Columns { tiles: d.q().div_ceil(TILE), segments: 1, step: 0, width: d.q() }
        } else {
            Columns { tiles: TILES, segments: d.q().div_ceil(OWN), step: OWN, width: OWN }
        };
        Self::new::<T>(cuda, d, x, &others, columns, Self::WORK + Self::COEFFICIENTS)
    }

    /// None where the kernels do not take it: beside [`is_fused`], they are for pairs of pixels.
    fn new<T: CudaElement>(
        cuda: &Cuda,
        d: &ConvDims,
        x: Address,
        others: &[Address],
        columns: Columns,
        work: usize,
    ) -> Result<Option<Self>> {
        if !is_fused::<T>(d, x, others) || !d.w.is_multiple_of(2) || !d.k.is_multiple_of(8) {
            return Ok(None);
        }
        let Columns { tiles, segments, step, width } = columns;
        let (pool, pairs) = (PoolDims::behind(d), width + 3);
        let room = cuda.facts().shared_bytes.saturating_sub(work) / Self::ring_bytes(pairs);
        let slots = (TILES / tiles).min(d.n).min(room);
        if slots == 0 {
            return Ok(None);
        }
        let stream = Self {
            x,
            n: narrow(d.n)?,
            h: narrow(d.h)?,
            w: narrow(d.w)?,
            k: narrow(d.k)?,
            p: narrow(d.p())?,
            q: narrow(d.q())?,
            rows: narrow(pool.p())?,
            columns: narrow(pool.q())?,
            slots: narrow(slots)?,
            segments: narrow(segments)?,
            step: narrow(step)?,
            width: narrow(width)?,
            pairs: narrow(pairs)?,
            tiles: narrow(tiles)?,
        };
        narrow(stream.all_rows())?;
        Ok(Some(stream))
    }

    /// Of 20 rows of so many pairs of pixels.
    fn ring_bytes(pairs: usize) -> usize {
        20 * pairs * 16
    }

    fn ring(&self) -> usize {
        Self::ring_bytes((self.slots * self.pairs) as usize)
    }

    /// Pooled rows of all images and segments, those side by side counted once.
    fn all_rows(&self) -> usize {
        (self.n as usize).div_ceil(self.slots as usize) * self.segments as usize * self.rows as usize
    }

    fn pool<T: CudaElement>(&self, cuda: &Cuda, args: ForwardArgs) -> Result<()> {
        let ranges = self.all_rows().min(cuda.facts().multiprocessors);
        let grid = Grid {
            blocks: [ranges, blocks(self.k as usize, FILTERS), 1],
            threads: THREADS,
            shared_bytes: Self::STAGES + self.ring(),
        };
        cuda.launch::<T>(MODULE, "stem_pool_forward", grid, &args)
    }

    fn filter_gradient<T: CudaElement>(
        &self,
        cuda: &Cuda,
        d: &ConvDims,
        dy: Gradient,
        argmax: Address,
        dw: Address,
    ) -> Result<()> {
        let (rows, parts) = (self.all_rows(), blocks(d.k, FILTERS));
        let splits = Splits::new(cuda, dw, d.len_filter(), rows, parts, cuda.facts().multiprocessors);
        let grid = Grid {
            blocks: [splits.count, parts, 1],
            threads: THREADS,
            shared_bytes: (Self::WORK + self.ring()).max(Self::SUMS),
        };
        let args = FilterArgs { stream: *self, dz: dy.dz, grad_x: dy.x, coef: dy.coef, argmax, out: splits.out };
        cuda.launch::<T>(MODULE, &format!("stem_pool_backward_filter_{}", dy.kind()), grid, &args)?;
        splits.add(cuda)
    }
}

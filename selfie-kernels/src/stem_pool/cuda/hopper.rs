//! The stem on GPUs of compute capability 9.0, by `stem_pool_sm90.cu`.

use super::super::PoolDims;
use super::is_fused;
use crate::cuda::{Address, CudaElement, Grid, blocks, narrow};
use crate::norm_relu_conv::cuda::backward_filter::{Gradient, Splits};
use crate::partials::{Cut, SUM_ROWS};
use crate::{ConvDims, Cuda, Result};

const MODULE: &str = "stem_pool_sm90";
const THREADS: usize = 512;
/// Of a block, each with pooled rows of its own.
const CONSUMERS: usize = 2;
/// Filters of a block, columns of a product and of a run of them.
const FILTERS: usize = 64;
const COLUMNS: usize = 112;
const RUN: usize = 8;

/// `Stream` of `stem_pool_sm90.cu`: how the kernels cut images.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::NoUninit)]
pub(super) struct Stream {
    x: Address,
    n: i32,
    h: i32,
    w: i32,
    k: i32,
    p: i32,
    rows: i32,
    columns: i32,
    slots: i32,
    all_rows: i32,
    share: i32,
    consumers: i32,
    rounds: i32,
}

/// `ForwardArgs` of `stem_pool_sm90.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct ForwardArgs {
    stream: Stream,
    w: Address,
    y: Address,
    argmax: Address,
    stats: Address,
}

/// `FilterArgs` of `stem_pool_sm90.cu`.
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

impl Stream {
    /// None where the kernels do not take it: beside [`is_fused`], they are for rows that runs fill.
    pub(super) fn of<T: CudaElement>(
        cuda: &Cuda,
        d: &ConvDims,
        x: Address,
        others: &[Address],
    ) -> Result<Option<Self>> {
        let whole = d.w.is_multiple_of(2 * RUN) && d.k.is_multiple_of(16);
        if !cuda.facts().hopper || !is_fused::<T>(d, x, others) || d.q() > COLUMNS || !whole {
            return Ok(None);
        }
        let (pool, slots) = (PoolDims::behind(d), (COLUMNS / d.q()).min(d.n));
        // Kernels count bytes and elements of a map by 32 bits.
        narrow(slots * 2 * d.h * d.w * d.c)?;
        narrow(slots * pool.p() * pool.q() * d.k)?;
        Ok(Some(Self {
            x,
            n: narrow(d.n)?,
            h: narrow(d.h)?,
            w: narrow(d.w)?,
            k: narrow(d.k)?,
            p: narrow(d.p())?,
            rows: narrow(pool.p())?,
            columns: narrow(pool.q())?,
            slots: narrow(slots)?,
            all_rows: narrow(d.n.div_ceil(slots) * pool.p())?,
            share: 1,
            consumers: 0,
            rounds: 1,
        }))
    }

    /// Of the statistics that the forward pass makes itself: whole pooled rows, where images are not side by side. As many of
    /// them as leave the consumer that has most the least to do.
    pub(super) fn cut(&mut self, cuda: &Cuda) -> Option<Cut> {
        if self.slots > 1 {
            return None;
        }
        let (rows, columns) = (self.all_rows as usize, self.columns as usize);
        let least = SUM_ROWS.div_ceil(columns);
        let consumers = CONSUMERS * cuda.facts().multiprocessors;
        let longest = |share: usize| rows.div_ceil(share).div_ceil(consumers) * share;
        let share = (least..=4 * least).min_by_key(|&share| longest(share))?;
        self.share = share as i32;
        Some(Cut { runs: [rows * columns, 0, 0, 0], tile: share * columns })
    }

    /// The pooled rows, shared out among the consumers of so many blocks.
    fn shared_by(&self, blocks: usize) -> Result<Self> {
        Ok(Self { consumers: narrow(CONSUMERS * blocks)?, ..*self })
    }

    fn tiles_of_filters(&self) -> usize {
        blocks(self.k as usize, FILTERS)
    }

    /// `stats` is none, or has room for those of [`Stream::cut`].
    pub(super) fn pool<T: CudaElement>(
        &self,
        cuda: &Cuda,
        w: Address,
        [y, argmax]: [Address; 2],
        stats: Address,
    ) -> Result<()> {
        const BYTES_OF_A_RUN: usize = 16 * (RUN + RUN + 3);
        let shares = (self.all_rows as usize).div_ceil(self.share as usize);
        let places = shares.div_ceil(CONSUMERS).min(cuda.facts().multiprocessors);
        let weights = 7 * 8 * 4 * 2 * FILTERS;
        let grid = Grid {
            blocks: [places, self.tiles_of_filters(), 1],
            threads: THREADS,
            shared_bytes: weights + CONSUMERS * ring_bytes(BYTES_OF_A_RUN),
        };
        let name = format!("stem_pool_forward_hopper_{}", if self.slots == 1 { "one" } else { "several" });
        cuda.launch::<T>(MODULE, &name, grid, &ForwardArgs { stream: self.shared_by(places)?, w, y, argmax, stats })
    }

    pub(super) fn filter_gradient<T: CudaElement>(
        &self,
        cuda: &Cuda,
        d: &ConvDims,
        dy: Gradient,
        argmax: Address,
        dw: Address,
    ) -> Result<()> {
        const BYTES_OF_A_RUN: usize = 16 * (RUN + 3);
        /// Two rows of the pooled gradient, twice, and of the taps, with their barriers.
        const GRADS: usize = 2 * ((COLUMNS / 2) * FILTERS * 5 + BARRIERS);
        const COEFFICIENTS: usize = 3 * FILTERS * size_of::<f32>();
        let parts = self.tiles_of_filters();
        let pairs = (self.all_rows as usize).div_ceil(CONSUMERS);
        let splits = Splits::new(cuda, dw, d.len_filter(), pairs, parts, cuda.facts().multiprocessors);
        let rings = GRADS.next_multiple_of(128) + ring_bytes(BYTES_OF_A_RUN).next_multiple_of(128);
        let grid =
            Grid { blocks: [splits.count, parts, 1], threads: THREADS, shared_bytes: CONSUMERS * rings + COEFFICIENTS };
        let stream = self.shared_by(splits.count)?;
        let args = FilterArgs { stream, dz: dy.dz, grad_x: dy.x, coef: dy.coef, argmax, out: splits.out };
        cuda.launch::<T>(MODULE, &format!("stem_pool_backward_filter_hopper_{}", dy.kind()), grid, &args)?;
        splits.add(cuda)
    }
}

/// Of each place of a ring: it is full, it is empty.
const BARRIERS: usize = 2 * size_of::<u64>();

/// A ring of four times four rows, and five of them once more.
const fn ring_bytes(bytes_of_a_run: usize) -> usize {
    21 * COLUMNS / RUN * bytes_of_a_run + 4 * BARRIERS
}

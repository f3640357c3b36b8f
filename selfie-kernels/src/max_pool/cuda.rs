use super::{Backward, Forward};
use crate::cuda::{Address, CudaElement, GradArgs, Grid, TILE_CHANNELS, blocks};
use crate::partials::{Cut, SUM_ROWS};
use crate::{Cuda, Len, Result};

const THREADS: usize = 256;

/// `ForwardArgs` of `max_pool.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct ForwardArgs {
    x: Address,
    y: Address,
    argmax: Address,
    stats: Address,
    rows: u64,
    extents: [u32; 5],
    unused: u32,
}

/// `BackwardArgs` of `max_pool.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct BackwardArgs {
    dy: GradArgs,
    argmax: Address,
    dx: Address,
    len: u64,
    extents: [u32; 5],
    unused: u32,
}

pub(crate) fn max_pool_forward<T: CudaElement>(cuda: &Cuda, args: Forward<'_, Cuda, T>) -> Result<()> {
    let Forward { dims: d, x, y, argmax, stats } = args;
    let cut = Cut::plain(d.rows_out());
    let args = ForwardArgs {
        x: x.into(),
        y: y.into(),
        argmax: argmax.into(),
        stats: stats.make(cut, d.c).into(),
        rows: d.rows_out() as u64,
        extents: [d.h, d.w, d.c, d.p(), d.q()].map(|x| x as u32),
        unused: 0,
    };
    let tiles = [blocks(d.rows_out(), SUM_ROWS), blocks(d.c, TILE_CHANNELS), 1];
    cuda.launch::<T>("max_pool", "max_pool_forward", Grid { blocks: tiles, threads: THREADS, shared_bytes: 0 }, &args)
}

pub(crate) fn max_pool_backward<T: CudaElement>(cuda: &Cuda, args: Backward<'_, Cuda, T>) -> Result<()> {
    let Backward { dims: d, dy, argmax, dx } = args;
    let len = dx.len();
    let args = BackwardArgs {
        dy: dy.into(),
        argmax: argmax.into(),
        dx: dx.into(),
        len: len as u64,
        extents: [d.h, d.w, d.c, d.p(), d.q()].map(|x| x as u32),
        unused: 0,
    };
    cuda.launch::<T>("max_pool", "max_pool_backward", Grid::line(blocks(len, THREADS), THREADS), &args)
}

use super::{Backward, Forward};
use crate::cuda::{Access, Address, CudaElement, Grid, TILE_CHANNELS, blocks, narrow};
use crate::partials::{Cut, SUM_ROWS};
use crate::{Cuda, Len, Result};

const THREADS: usize = 256;

/// `ForwardArgs` of `norm_relu_pool.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct ForwardArgs {
    x: Address,
    norm: Address,
    y: Address,
    len: u64,
    extents: [u32; 4],
}

/// `BackwardArgs` of `norm_relu_pool.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct BackwardArgs {
    dy: Address,
    x: Address,
    norm: Address,
    dz: Address,
    sums: Address,
    rows: u64,
    extents: [u32; 4],
}

pub(crate) fn norm_relu_pool_forward<T: CudaElement>(cuda: &Cuda, args: Forward<'_, Cuda, T>) -> Result<()> {
    let Forward { dims: d, x, norm, y } = args;
    narrow(d.rows_in())?;
    let len = y.len();
    let extents = [d.w, d.c, d.window_h, d.window_w].map(|x| x as u32);
    let args = ForwardArgs { x: x.into(), norm: norm.into(), y: y.into(), len: len as u64, extents };
    let (kernel, chunk) = match Access::of([d.c], [args.x, args.norm, args.y]) {
        Access::Chunks => ("norm_relu_pool_forward", 16 / size_of::<T>()),
        Access::Elements => ("norm_relu_pool_forward_elements", 1),
    };
    cuda.launch::<T>("norm_relu_pool", kernel, Grid::line(blocks(len / chunk, THREADS), THREADS), &args)
}

pub(crate) fn norm_relu_pool_backward<T: CudaElement>(cuda: &Cuda, args: Backward<'_, Cuda, T>) -> Result<()> {
    let Backward { dims: d, dy, x, norm, dz, sums } = args;
    narrow(d.rows_in())?;
    let args = BackwardArgs {
        dy: dy.into(),
        x: x.into(),
        norm: norm.into(),
        dz: dz.into(),
        sums: sums.make(Cut::plain(d.rows_in()), d.c).into(),
        rows: d.rows_in() as u64,
        extents: [d.w, d.c, d.window_h, d.window_w].map(|x| x as u32),
    };
    let tiles = [blocks(d.rows_in(), SUM_ROWS), blocks(d.c, TILE_CHANNELS), 1];
    let grid = Grid { blocks: tiles, threads: THREADS, shared_bytes: 0 };
    cuda.launch::<T>("norm_relu_pool", "norm_relu_pool_backward", grid, &args)
}

use super::{Backward, Forward, Inference};
use crate::cuda::{Address, CudaElement, Grid, blocks};
use crate::{Cuda, Result};

/// Channels of a block.
const CHANNELS: usize = 32;
const THREADS: usize = 512;
const INFERENCE_THREADS: usize = 128;

/// `ForwardArgs` of `bn_finalize.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct ForwardArgs {
    stats: Address,
    affine: Address,
    norm: Address,
    batch: Address,
    runs: [u64; 4],
    tile: u64,
    eps: f64,
    rows: u64,
    c: u32,
    unused: u32,
}

/// `InferenceArgs` of `bn_finalize.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct InferenceArgs {
    running: Address,
    affine: Address,
    norm: Address,
    eps: f64,
    c: u32,
    unused: u32,
}

/// `BackwardArgs` of `bn_finalize.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct BackwardArgs {
    sums: Address,
    affine: Address,
    norm: Address,
    daffine: Address,
    coef: Address,
    tiles: u64,
    rows: u64,
    c: u32,
    unused: u32,
}

pub(crate) fn bn_finalize_forward<T: CudaElement>(cuda: &Cuda, args: Forward<'_, Cuda, T>) -> Result<()> {
    let Forward { rows, c, eps, stats, affine, norm, batch } = args;
    let (cut, stats) = stats.made();
    let args = ForwardArgs {
        stats: stats.into(),
        affine: affine.into(),
        norm: norm.into(),
        batch: batch.into(),
        runs: cut.runs.map(|rows| rows as u64),
        tile: cut.tile as u64,
        eps,
        rows: rows as u64,
        c: c as u32,
        unused: 0,
    };
    cuda.launch_plain("bn_finalize", "bn_finalize_forward", Grid::line(blocks(c, CHANNELS), THREADS), &args)
}

pub(crate) fn bn_finalize_inference<T: CudaElement>(cuda: &Cuda, args: Inference<'_, Cuda, T>) -> Result<()> {
    let Inference { c, eps, running, affine, norm } = args;
    let args = InferenceArgs {
        running: running.into(),
        affine: affine.into(),
        norm: norm.into(),
        eps,
        c: c as u32,
        unused: 0,
    };
    let grid = Grid::line(blocks(c, INFERENCE_THREADS), INFERENCE_THREADS);
    cuda.launch_plain("bn_finalize", "bn_finalize_inference", grid, &args)
}

pub(crate) fn bn_finalize_backward<T: CudaElement>(cuda: &Cuda, args: Backward<'_, Cuda, T>) -> Result<()> {
    let Backward { rows, c, sums, affine, norm, daffine, coef } = args;
    let (cut, sums) = sums.made();
    let args = BackwardArgs {
        sums: sums.into(),
        affine: affine.into(),
        norm: norm.into(),
        daffine: daffine.into(),
        coef: coef.into(),
        tiles: cut.tiles() as u64,
        rows: rows as u64,
        c: c as u32,
        unused: 0,
    };
    cuda.launch_plain("bn_finalize", "bn_finalize_backward", Grid::line(blocks(c, CHANNELS), THREADS), &args)
}

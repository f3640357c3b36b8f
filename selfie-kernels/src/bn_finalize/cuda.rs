use super::{Backward, Forward, Inference};
use crate::cuda::{Address, CudaElement, Grid, blocks, narrow};
use crate::partials::Cut;
use crate::{Cuda, Result};

/// Channels of a block.
const CHANNELS: usize = 8;
const THREADS: usize = 512;
const INFERENCE_THREADS: usize = 128;

/// `Tiles` of `bn_finalize.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Tiles {
    rows: f64,
    missing: [f64; 4],
    last: [i32; 4],
}

impl Tiles {
    fn new(cut: Cut) -> Result<Self> {
        let mut tiles = Self { rows: cut.tile as f64, missing: [0.0; 4], last: [0; 4] };
        let mut end = 0;
        for (run, rows) in cut.runs.into_iter().enumerate().filter(|run| run.1 > 0) {
            end += rows.div_ceil(cut.tile);
            tiles.last[run] = narrow(end - 1)?;
            tiles.missing[run] = (rows.next_multiple_of(cut.tile) - rows) as f64;
        }
        Ok(tiles)
    }
}

/// `ForwardArgs` of `bn_finalize.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct ForwardArgs {
    stats: Address,
    affine: Address,
    norm: Address,
    batch: Address,
    cut: Tiles,
    eps: f64,
    count: f64,
    tiles: i32,
    c: u32,
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
    count: f64,
    tiles: i32,
    c: u32,
}

pub(crate) fn bn_finalize_forward<T: CudaElement>(cuda: &Cuda, args: Forward<'_, Cuda, T>) -> Result<()> {
    let Forward { rows, c, eps, stats, affine, norm, batch } = args;
    let (cut, stats) = stats.made();
    let args = ForwardArgs {
        stats: stats.into(),
        affine: affine.into(),
        norm: norm.into(),
        batch: batch.into(),
        cut: Tiles::new(cut)?,
        eps,
        count: rows as f64,
        tiles: narrow(cut.tiles())?,
        c: c as u32,
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
        count: rows as f64,
        tiles: narrow(cut.tiles())?,
        c: c as u32,
    };
    cuda.launch_plain("bn_finalize", "bn_finalize_backward", Grid::line(blocks(c, CHANNELS), THREADS), &args)
}

use super::{Backward, Forward};
use crate::cuda::{Access, Address, ColumnSums, CudaElement, DropoutArgs, Grid, blocks};
use crate::{Cuda, Result};

const MODULE: &str = "residual_norm";
/// Rows of a block, each a warp's.
const ROWS: usize = 4;
const THREADS: usize = 32 * ROWS;
/// Features of a row that a warp's registers hold.
const MAX_FEATURES: usize = 1024;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct ForwardArgs {
    x: Address,
    branch: Address,
    affine: Address,
    sum: Address,
    y: Address,
    stats: Address,
    dropout: DropoutArgs,
    x_stride: u64,
    rows: u32,
    t: u32,
    d: u32,
    eps: f32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct BackwardArgs {
    dy: Address,
    sum: Address,
    stats: Address,
    affine: Address,
    dx: Address,
    dbranch: Address,
    dropout: DropoutArgs,
    rows: u32,
    t: u32,
    d: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct AffineArgs {
    dy: Address,
    sum: Address,
    stats: Address,
    parts: Address,
    daffine: Address,
    tickets: Address,
    rows: u32,
    d: u32,
    part_rows: u32,
    unused: u32,
}

/// How a pass goes over rows of `d` features.
fn access(d: usize, stride: usize, places: impl IntoIterator<Item = Address>) -> Access {
    if d <= MAX_FEATURES { Access::of([d, stride], places) } else { Access::Elements }
}

fn launch<T: CudaElement>(
    cuda: &Cuda,
    pass: &str,
    access: Access,
    rows: usize,
    args: &impl bytemuck::NoUninit,
) -> Result<()> {
    let suffix = match access {
        Access::Chunks => "",
        Access::Elements => "_elements",
    };
    cuda.launch::<T>(MODULE, &format!("{pass}{suffix}"), Grid::line(blocks(rows, ROWS), THREADS), args)
}

pub(crate) fn residual_norm_forward<T: CudaElement>(cuda: &Cuda, args: Forward<'_, Cuda, T>) -> Result<()> {
    let Forward { dims, eps, x, branch, dropout, affine, sum, stats, y } = args;
    let args = ForwardArgs {
        x: x.into(),
        branch: branch.into(),
        affine: affine.into(),
        sum: sum.into(),
        y: y.into(),
        stats: stats.into(),
        dropout: dropout.into(),
        x_stride: dims.x_stride as u64,
        rows: dims.rows() as u32,
        t: dims.t as u32,
        d: dims.d as u32,
        eps: eps as f32,
    };
    let access = access(dims.d, dims.x_stride, [args.x, args.branch, args.affine, args.sum, args.y]);
    launch::<T>(cuda, "residual_norm_forward", access, dims.rows(), &args)
}

pub(crate) fn residual_norm_backward<T: CudaElement>(cuda: &Cuda, args: Backward<'_, Cuda, T>) -> Result<()> {
    let Backward { dims, dy, sum, stats, dropout, affine, dx, dbranch, daffine } = args;
    let args = BackwardArgs {
        dy: dy.into(),
        sum: sum.into(),
        stats: stats.into(),
        affine: affine.into(),
        dx: dx.into(),
        dbranch: dbranch.into(),
        dropout: dropout.into(),
        rows: dims.rows() as u32,
        t: dims.t as u32,
        d: dims.d as u32,
        unused: 0,
    };
    let access = access(dims.d, dims.d, [args.dy, args.sum, args.affine, args.dx, args.dbranch]);
    launch::<T>(cuda, "residual_norm_backward", access, dims.rows(), &args)?;

    let BackwardArgs { dy, sum, stats, rows, d, .. } = args;
    let daffine = daffine.into();
    let sums = ColumnSums::plan(cuda, [dims.rows(), dims.d], 2, daffine);
    let args = AffineArgs {
        dy,
        sum,
        stats,
        parts: sums.parts,
        daffine,
        tickets: cuda.tickets(),
        rows,
        d,
        part_rows: sums.rows as u32,
        unused: 0,
    };
    cuda.launch::<T>(MODULE, "residual_norm_affine", sums.grid, &args)
}

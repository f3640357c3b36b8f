use super::{Backward, Forward, PatchDims, PositionKind, QueryKind};
use crate::cuda::{Access, Address, CudaElement, Grid, blocks};
use crate::{Cuda, Result};

const MODULE: &str = "tokens";
const THREADS: usize = 256;

/// `Patches` of `patches.h`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
pub(crate) struct Patches {
    order: Address,
    b: u32,
    grid: u32,
    hidden: u32,
    d: u32,
    positions: u32,
    queries: u32,
}

impl Patches {
    pub(crate) fn new(dims: PatchDims, order: Address) -> Self {
        let PatchDims { b, grid, hidden, d, positions, queries } = dims;
        Self {
            order,
            b: b as u32,
            grid: grid as u32,
            hidden: hidden as u32,
            d: d as u32,
            positions: match positions {
                PositionKind::Table => 0,
                PositionKind::RowCol => 1,
            },
            queries: match queries {
                QueryKind::Summary => 0,
                QueryKind::Places => 1,
            },
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct ForwardArgs {
    patches: Patches,
    h: Address,
    u0: Address,
    positions: Address,
    x: Address,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct BackwardArgs {
    patches: Patches,
    dx: Address,
    dh: Address,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct SumArgs {
    patches: Patches,
    dx: Address,
    du0: Address,
    dpositions: Address,
    first_row: u32,
    unused: u32,
}

/// One thread for each chunk, or element, of `rows` rows.
fn launch<T: CudaElement>(
    cuda: &Cuda,
    pass: &str,
    [rows, d]: [usize; 2],
    places: impl IntoIterator<Item = Address>,
    args: &impl bytemuck::NoUninit,
) -> Result<()> {
    match Access::of([d], places) {
        Access::Chunks => {
            let threads = rows * d / (16 / size_of::<T>());
            cuda.launch::<T>(MODULE, pass, Grid::line(blocks(threads, THREADS), THREADS), args)
        }
        Access::Elements => {
            let grid = Grid::line(blocks(rows * d, THREADS), THREADS);
            cuda.launch::<T>(MODULE, &format!("{pass}_elements"), grid, args)
        }
    }
}

pub(crate) fn tokens_forward<T: CudaElement>(cuda: &Cuda, args: Forward<'_, Cuda, T>) -> Result<()> {
    let Forward { dims, h, order, u0, positions, x } = args;
    let (h, u0, positions, x) = (h.into(), u0.into(), positions.into(), x.into());
    let args = ForwardArgs { patches: Patches::new(dims, order.into()), h, u0, positions, x };
    launch::<T>(cuda, "tokens_forward", [dims.b * dims.t(), dims.d], [h, u0, positions, x], &args)
}

pub(crate) fn tokens_backward<T: CudaElement>(cuda: &Cuda, args: Backward<'_, Cuda, T>) -> Result<()> {
    let Backward { dims, order, dx, dh, du0, dpositions_acc } = args;
    let (patches, dx, dh) = (Patches::new(dims, order.into()), dx.into(), dh.into());
    let args = BackwardArgs { patches, dx, dh };
    launch::<T>(cuda, "tokens_backward", [dims.b * dims.t(), dims.d], [dx, dh], &args)?;

    // Behind the rows of the positions comes u0, which is all where there are none.
    let rows = dims.len_positions() / dims.d;
    let first_row = if dpositions_acc.is_some() { 0 } else { rows };
    let args = SumArgs {
        patches,
        dx,
        du0: du0.into(),
        dpositions: dpositions_acc.into(),
        first_row: first_row as u32,
        unused: 0,
    };
    let grid = Grid::line((rows + 1 - first_row) * dims.d.div_ceil(32), 256);
    cuda.launch::<T>(MODULE, "tokens_sums", grid, &args)
}

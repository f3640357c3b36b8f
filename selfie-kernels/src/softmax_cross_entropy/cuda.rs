use super::Args;
use crate::cuda::{Address, CudaElement, Grid, blocks};
use crate::{Cuda, Result};

/// Rows of a block, a warp each.
const ROWS: usize = 8;

/// `RowArgs` of `softmax_cross_entropy.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct RowArgs {
    logits: Address,
    labels: Address,
    losses: Address,
    right: Address,
    dlogits: Address,
    rows: u64,
    classes: u32,
    rivals: u32,
    share: f32,
    unused: u32,
}

/// `MeanArgs` of `softmax_cross_entropy.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct MeanArgs {
    losses: Address,
    right: Address,
    loss: Address,
    rows: u64,
}

pub(crate) fn softmax_cross_entropy<T: CudaElement>(cuda: &Cuda, args: Args<'_, Cuda, T>) -> Result<()> {
    let Args { n, valid, classes, rivals, logits, labels, loss, dlogits } = args;
    let [losses, right] =
        cuda.workspace_parts("softmax_cross_entropy", [valid * size_of::<f64>(), valid * size_of::<u32>()])?;
    let rows = RowArgs {
        logits: logits.into(),
        labels: labels.into(),
        losses,
        right,
        dlogits: dlogits.into(),
        rows: valid as u64,
        classes: classes as u32,
        rivals: rivals as u32,
        share: (1.0 / n as f64) as f32,
        unused: 0,
    };
    let grid = Grid::line(blocks(valid, ROWS), ROWS * 32);
    cuda.launch::<T>("softmax_cross_entropy", "softmax_cross_entropy", grid, &rows)?;
    let mean = MeanArgs { losses, right, loss: loss.into(), rows: valid as u64 };
    cuda.launch_plain("softmax_cross_entropy", "softmax_cross_entropy_mean", Grid::line(1, 256), &mean)
}

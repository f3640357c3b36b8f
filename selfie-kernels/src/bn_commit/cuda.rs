use super::Commit;
use crate::cuda::{Address, CudaElement, Grid, blocks};
use crate::{Cuda, Len, Result};

const THREADS: usize = 256;

/// `CommitArgs` of `bn_commit.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct CommitArgs {
    finite: Address,
    batch: Address,
    running: Address,
    len: u64,
    momentum: f32,
    unused: u32,
}

pub(crate) fn bn_commit<T: CudaElement>(cuda: &Cuda, args: Commit<'_, Cuda, T>) -> Result<()> {
    let Commit { momentum, finite, batch, running } = args;
    let len = running.len();
    let args = CommitArgs {
        finite: finite.into(),
        batch: batch.into(),
        running: running.into(),
        len: len as u64,
        momentum: momentum as f32,
        unused: 0,
    };
    cuda.launch_plain("bn_commit", "bn_commit", Grid::line(blocks(len, THREADS), THREADS), &args)
}

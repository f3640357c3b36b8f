use super::Join;
use crate::cuda::{Address, CudaElement, Grid, blocks};
use crate::{Cuda, Len, Result};

const THREADS: usize = 256;
/// Blocks of a multiprocessor, which take turn after turn.
const RESIDENT: usize = 3;

/// `Args` of `grad_join.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Args {
    dz: Address,
    x: Address,
    coef: Address,
    skip: Address,
    dx: Address,
    len: u64,
    c: u32,
    unused: u32,
}

pub(crate) fn grad_join<T: CudaElement>(cuda: &Cuda, args: Join<'_, Cuda, T>) -> Result<()> {
    let Join { c, affine, skip, dx, .. } = args;
    let len = dx.len();
    let args = Args {
        dz: affine.dz.into(),
        x: affine.x.into(),
        coef: affine.coef.into(),
        skip: skip.into(),
        dx: dx.into(),
        len: len as u64,
        c: c as u32,
        unused: 0,
    };
    // A gradient that starts in the middle of a chunk, or has rows that do, is read by elements.
    let chunk = 16 / size_of::<T>();
    if c % chunk == 0 && [args.dz, args.x, args.coef, args.skip, args.dx].iter().all(|place| place.is_aligned()) {
        // All threads are a multiple of a row's chunks: as many blocks as that is without the twos that a block has.
        let row = c / chunk;
        let whole = row >> row.trailing_zeros().min(THREADS.ilog2());
        let resident = blocks(len / chunk, THREADS).min(RESIDENT * cuda.facts().multiprocessors);
        let grid = Grid::line(resident.next_multiple_of(whole), THREADS);
        cuda.launch::<T>("grad_join", "grad_join", grid, &args)
    } else {
        cuda.launch::<T>("grad_join", "grad_join_elements", Grid::line(blocks(len, THREADS), THREADS), &args)
    }
}

use super::{Accumulate, Norm, SUM_ELEMENTS, Update};
use crate::cuda::{Address, CudaElement, Grid, blocks};
use crate::error::require;
use crate::{Cuda, Len, Result};

const THREADS: usize = 256;
/// Parameters of a thread.
const CHUNK: usize = 4;

/// `SquaresArgs` of `sgd.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct SquaresArgs {
    gradient: Address,
    partial: Address,
    len: u64,
}

/// `NormArgs` of `sgd.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct NormArgs {
    partial: Address,
    metrics: Address,
    finite: Address,
    partials: u64,
}

/// `AccumulateArgs` of `sgd.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct AccumulateArgs {
    gradient: Address,
    total: Address,
    len: u64,
    scale: f32,
    unused: u32,
}

/// `UpdateArgs` of `sgd.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct UpdateArgs {
    rate: Address,
    finite: Address,
    gradient: Address,
    velocity: Address,
    master: Address,
    copy: Address,
    len: u64,
    momentum: f32,
    weight_decay: f32,
}

pub(crate) fn gradient_norm<T: CudaElement>(cuda: &Cuda, args: Norm<'_, Cuda, T>) -> Result<()> {
    let Norm { gradient, metrics, finite } = args;
    let len = gradient.len();
    let partials = blocks(len, SUM_ELEMENTS);
    let [partial] = cuda.workspace_parts("gradient_norm", [partials * size_of::<f64>()])?;
    let squares = SquaresArgs { gradient: gradient.into(), partial, len: len as u64 };
    cuda.launch_plain("sgd", "sgd_squares", Grid::line(partials, THREADS), &squares)?;
    let norm = NormArgs { partial, metrics: metrics.into(), finite: finite.into(), partials: partials as u64 };
    cuda.launch_plain("sgd", "sgd_norm", Grid::line(1, THREADS), &norm)
}

pub(crate) fn gradient_accumulate<T: CudaElement>(cuda: &Cuda, args: Accumulate<'_, Cuda, T>) -> Result<()> {
    let Accumulate { scale, gradient, total } = args;
    let len = total.len();
    let args = AccumulateArgs {
        gradient: gradient.into(),
        total: total.into(),
        len: len as u64,
        scale: scale as f32,
        unused: 0,
    };
    cuda.launch_plain("sgd", "sgd_accumulate", Grid::line(blocks(len, THREADS), THREADS), &args)
}

pub(crate) fn sgd_update<T: CudaElement>(cuda: &Cuda, args: Update<'_, Cuda, T>) -> Result<()> {
    let Update { rate, momentum, weight_decay, finite, gradient, velocity, master, copy } = args;
    let len = gradient.len();
    let args = UpdateArgs {
        rate: rate.into(),
        finite: finite.into(),
        gradient: gradient.into(),
        velocity: velocity.into(),
        master: master.into(),
        copy: copy.into(),
        len: len as u64,
        momentum: momentum as f32,
        weight_decay: weight_decay as f32,
    };
    // The flat buffers are whole allocations.
    let whole = [args.gradient, args.velocity, args.master, args.copy].iter().all(|place| place.is_aligned());
    require("sgd_update", whole, || "the flat buffers must start at multiples of 16 bytes".into())?;
    cuda.launch::<T>("sgd", "sgd_update", Grid::line(blocks(len, THREADS * CHUNK), THREADS), &args)
}

//! What this device can do at most, measured by the program's own means: the roofline that passes are held against.

use std::time::Instant;

use selfie_kernels::gemm::{Activation, Forward, GemmDims};
use selfie_kernels::sgd::Accumulate;
use selfie_kernels::{Backend, Cost, Element, Memory, Philox, Result, Wide};

/// Bytes of each of the two buffers that are moved: more than a cache holds.
const MOVED: usize = 128 << 20;
/// Sides of the matrices that are multiplied, until a product takes `LONG` seconds.
const SIDES: [usize; 5] = [512, 1024, 2048, 4096, 8192];
const LONG: f64 = 0.02;
/// Of each, the fastest counts.
const TIMES: usize = 4;

/// The ceilings.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// Bytes read and written, a second.
    pub bytes: f64,
    /// Floating-point operations of products, a second.
    pub flops: f64,
    /// Side of the matrices whose product came to it.
    pub side: usize,
}

impl Ceilings {
    /// Measures them: a copy, and a sum in place, of large buffers; products of matrices in the type of the activations.
    ///
    /// # Errors
    /// Those of the device.
    pub fn measure<B: Backend<T>, T: Element>(device: &B) -> Result<Self> {
        let bytes = bytes_per_second::<B, T>(device)?;
        let (mut flops, mut best) = (0.0, 0);
        for side in SIDES {
            let seconds = product::<B, T>(device, side)?;
            let rate = 2.0 * (side as f64).powi(3) / seconds;
            if rate > flops {
                (flops, best) = (rate, side);
            }
            if seconds > LONG {
                break;
            }
        }
        Ok(Self { bytes, flops, side: best })
    }

    /// The least time, in seconds, that work of this cost takes.
    pub fn least(&self, cost: &Cost) -> f64 {
        self.of_flops(cost).max(self.of_bytes(cost))
    }

    /// What of that its products take.
    pub fn of_flops(&self, cost: &Cost) -> f64 {
        cost.flops as f64 / self.flops
    }

    /// What of that its operands and results take.
    pub fn of_bytes(&self, cost: &Cost) -> f64 {
        cost.bytes as f64 / self.bytes
    }
}

fn bytes_per_second<B: Backend<T>, T: Element>(device: &B) -> Result<f64> {
    let len = MOVED / size_of::<T::Wide>();
    let from = device.alloc::<T::Wide>(len)?;
    let mut to = device.alloc::<T::Wide>(len)?;
    let copy = fastest(device, || device.copy(B::all(&from), B::all_mut(&mut to)))?;
    // On a CPU a copy has one thread, and this has all.
    let sum = fastest(device, || {
        device.gradient_accumulate(Accumulate { scale: 1.0, gradient: B::all(&from), total: B::all_mut(&mut to) })
    })?;
    Ok((2.0 * MOVED as f64 / copy).max(3.0 * MOVED as f64 / sum))
}

/// Seconds of a product of square matrices.
fn product<B: Backend<T>, T: Element>(device: &B, side: usize) -> Result<f64> {
    let random = random::<T>(side * side);
    let mut buffers = [(); 3].map(|()| device.alloc::<T>(side * side));
    for buffer in &mut buffers {
        let buffer = buffer.as_mut().map_err(|error| error.clone())?;
        device.upload(&random, B::all_mut(buffer))?;
    }
    let [x, w, y] = buffers;
    let (x, w, mut y) = (x?, w?, y?);
    let bias = device.alloc::<T::Wide>(side)?;
    let dims = GemmDims { m: side, n: side, k: side, x_stride: side };
    fastest(device, || {
        device.gemm_forward(Forward {
            dims,
            x: B::all(&x),
            w: B::all(&w),
            bias: B::all(&bias),
            activation: Activation::Identity,
            y: B::all_mut(&mut y),
        })
    })
}

/// Numbers in (-1, 1), a few over and over: a GPU is faster on zeros.
fn random<T: Element>(len: usize) -> Vec<T> {
    let philox = Philox { seed: 2 };
    let word = |i: u64| T::narrow(T::Wide::from_f64(f64::from(2.0 * Philox::unit(philox.words(0, i, 0)[0]) - 1.0)));
    (0..4093).map(word).collect::<Vec<T>>().into_iter().cycle().take(len).collect()
}

/// Seconds of the fastest of some calls; the first one, which may load kernels, does not count.
fn fastest(device: &impl Memory, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    call()?;
    device.sync()?;
    let mut fastest = f64::INFINITY;
    for _ in 0..TIMES {
        let began = Instant::now();
        call()?;
        device.sync()?;
        fastest = fastest.min(began.elapsed().as_secs_f64());
    }
    Ok(fastest)
}

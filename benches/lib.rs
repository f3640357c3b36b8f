//! What the benchmarks share.

use selfie_kernels::{Cpu, Element, Philox, Wide};

/// Random numbers in (-1, 1): kernels are never timed on zeros.
pub fn random<T: Element>(seed: u64, len: usize) -> Vec<T> {
    let philox = Philox { seed };
    (0..len as u64)
        .map(|i| T::narrow(T::Wide::from_f64(f64::from(2.0 * Philox::unit(philox.words(0, i, 0)[0]) - 1.0))))
        .collect()
}

/// The CPU with as many threads as `SELFIE_THREADS` says, or one per core.
pub fn cpu() -> Cpu {
    let threads = std::env::var("SELFIE_THREADS").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    Cpu::new(threads).expect("threads can be started")
}

//! When to kill a run.

use std::time::{SystemTime, UNIX_EPOCH};

/// Numbers from the environment, as the test is run by hand.
pub(crate) fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

/// Moments between 0 and 1: splitmix64.
pub(crate) struct Moments(u64);

impl Moments {
    /// From `SELFIE_KILL_SEED`, or the clock: the seed is printed, so that a failure can be repeated.
    pub(crate) fn new() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
        let seed = number("SELFIE_KILL_SEED").unwrap_or(now.subsec_nanos().into());
        eprintln!("SELFIE_KILL_SEED={seed}");
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

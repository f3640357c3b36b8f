//! Random zeroing of values in training, the same on every device.

use crate::error::{Result, expect_len, require};
use crate::{Len, Memory, Purpose, View};

/// Random zeroing of values in training. Each is multiplied by 0 or by `1 / (1 - rate)`, the quotient taken in `f64`
/// and rounded to `T::Wide`.
///
/// The decision for element e of sample b is word `e % 4` of Philox (purpose `Dropout + site`, sample
/// `rng[1] + b`, block `e / 4`): kept if `Philox::unit(word) >= rate`.
#[derive(Debug)]
pub struct Dropout<'a, M: Memory> {
    /// Probability of a zero, in [0, 1).
    pub rate: f32,
    /// Which dropout of the network this is.
    pub site: u32,
    /// `[2]`: seed of the run; global number of the batch's first sample.
    pub rng: View<'a, M, u64>,
}

impl<M: Memory> Clone for Dropout<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<M: Memory> Copy for Dropout<'_, M> {}

impl<M: Memory> Dropout<'_, M> {
    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        require(op, (0.0..1.0).contains(&self.rate), || format!("dropout rate {} is not in [0, 1)", self.rate))?;
        expect_len(op, "rng", self.rng.len(), 2)
    }
    /// What kept values are multiplied by.
    pub(crate) fn factor(&self) -> f64 {
        1.0 / (1.0 - f64::from(self.rate))
    }
    /// Number of the draws' purpose.
    pub(crate) fn purpose(&self) -> u32 {
        (Purpose::Dropout as u32).wrapping_add(self.site)
    }
}

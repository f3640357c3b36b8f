//! `running += momentum * (batch - running)`, at the end of a step and only if the step was finite.
//!
//! One call over the flat statistics of all layers. [`crate::bn_finalize`] leaves the running statistics alone, so a bad
//! step writes nothing and there is nothing to roll back.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

use crate::error::{Result, expect_len};
use crate::{Cost, Element, Len, Memory, View, ViewMut};

/// Arguments of [`BnCommit::bn_commit`].
#[derive(Debug)]
pub struct Commit<'a, M: Memory, T: Element> {
    /// Weight of the batch, 0.1 as PyTorch's default.
    pub momentum: f64,
    /// `[1]`: 1 where loss and gradient were finite, else 0.
    pub finite: View<'a, M, u32>,
    /// Statistics of the batch.
    pub batch: View<'a, M, T::Wide>,
    /// Same layout.
    pub running: ViewMut<'a, M, T::Wide>,
}

/// The operation; see the module.
pub trait BnCommit<T: Element>: Memory {
    /// `running = (1 - momentum) * running + momentum * batch` where `finite`.
    ///
    /// # Errors
    /// Lengths that do not fit.
    fn bn_commit(&self, args: Commit<'_, Self, T>) -> Result<()>;
}

impl<M: Memory, T: Element> Commit<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        expect_len("bn_commit", "finite", self.finite.len(), 1)?;
        expect_len("bn_commit", "batch", self.batch.len(), self.running.len())
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        Cost::of(self.batch.len()).moves::<T::Wide>(self.batch.len() + 2 * self.running.len())
    }
}

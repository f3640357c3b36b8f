//! Stochastic gradient descent with Nesterov momentum over the flat parameters, and the gate that guards it.
//!
//! As PyTorch defines it: `g = gradient + weight_decay * p`, `v = momentum * v + g`, `p -= rate * (g + momentum * v)`.
//! `gradient_norm` decides `finite` from loss and gradient; an update that is not finite writes nothing.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

use crate::error::{Result, expect_len};
use crate::{Cost, Element, Len, Memory, View, ViewMut};

/// Elements that share one partial sum of the squared norm.
pub const SUM_ELEMENTS: usize = 4096;

/// Arguments of [`Sgd::gradient_norm`].
#[derive(Debug)]
pub struct Norm<'a, M: Memory, T: Element> {
    /// Flat gradient.
    pub gradient: View<'a, M, T::Wide>,
    /// `[4]`, what a step says of itself in one block: loss and accuracy, which are there already; the Euclidean norm of the
    /// gradient and `finite` as a number, which are written.
    pub metrics: ViewMut<'a, M, T::Wide>,
    /// `[1]`: 1 where loss and norm are finite, else 0.
    pub finite: ViewMut<'a, M, u32>,
}

/// Arguments of [`Sgd::gradient_accumulate`].
#[derive(Debug)]
pub struct Accumulate<'a, M: Memory, T: Element> {
    /// Weight of this micro-batch.
    pub scale: f64,
    /// Gradient of a micro-batch, or its loss and accuracy.
    pub gradient: View<'a, M, T::Wide>,
    /// Added to.
    pub total: ViewMut<'a, M, T::Wide>,
}

/// Arguments of [`Sgd::sgd_update`].
#[derive(Debug)]
pub struct Update<'a, M: Memory, T: Element> {
    /// `[1]`: learning rate of this step, the bits of an `f64`: it shares a block with whole numbers.
    pub rate: View<'a, M, u64>,
    /// Nesterov momentum.
    pub momentum: f64,
    /// L2 penalty's factor, on every parameter.
    pub weight_decay: f64,
    /// `[1]`: 0 leaves everything as it is.
    pub finite: View<'a, M, u32>,
    /// Flat gradient.
    pub gradient: View<'a, M, T::Wide>,
    /// Flat momenta.
    pub velocity: ViewMut<'a, M, T::Wide>,
    /// Flat parameters.
    pub master: ViewMut<'a, M, T::Wide>,
    /// The same, rounded to `T`.
    pub copy: ViewMut<'a, M, T>,
}

/// The operation; see the module.
pub trait Sgd<T: Element>: Memory {
    /// Norm of the gradient (partial sums over [`SUM_ELEMENTS`], combined in f64 in order) and the finite flag.
    ///
    /// # Errors
    /// Lengths that do not fit.
    fn gradient_norm(&self, args: Norm<'_, Self, T>) -> Result<()>;
    /// `total += scale * gradient`.
    ///
    /// # Errors
    /// Lengths that do not fit.
    fn gradient_accumulate(&self, args: Accumulate<'_, Self, T>) -> Result<()>;
    /// One step where `finite`.
    ///
    /// # Errors
    /// Lengths that do not fit.
    fn sgd_update(&self, args: Update<'_, Self, T>) -> Result<()>;
}

impl<M: Memory, T: Element> Norm<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "gradient_norm";
        expect_len(OP, "metrics", self.metrics.len(), 4)?;
        expect_len(OP, "finite", self.finite.len(), 1)
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        Cost::of(self.gradient.len()).moves::<T::Wide>(self.gradient.len() + self.metrics.len())
    }
}

impl<M: Memory, T: Element> Accumulate<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        expect_len("gradient_accumulate", "total", self.total.len(), self.gradient.len())
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        Cost::of(self.total.len()).moves::<T::Wide>(self.gradient.len() + 2 * self.total.len())
    }
}

impl<M: Memory, T: Element> Update<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "sgd_update";
        let len = self.gradient.len();
        expect_len(OP, "rate", self.rate.len(), 1)?;
        expect_len(OP, "finite", self.finite.len(), 1)?;
        expect_len(OP, "velocity", self.velocity.len(), len)?;
        expect_len(OP, "master", self.master.len(), len)?;
        expect_len(OP, "copy", self.copy.len(), len)
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        let changed = self.velocity.len() + self.master.len();
        Cost::of(self.master.len()).moves::<T::Wide>(self.gradient.len() + 2 * changed).moves::<T>(self.copy.len())
    }
}

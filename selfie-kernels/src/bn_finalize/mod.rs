//! Batch normalisation between its two sides: partial sums in, per-channel coefficients out.
//!
//! Forward: tiles of (mean, sum of squared deviations) become mean, `rstd = 1 / sqrt(var + eps)`,
//! `scale = gamma * rstd`, `shift = beta - mean * scale`. Tiles are merged in f64 in a fixed order of the
//! device's (Chan, Golub, LeVeque 1983), which is exact where one f32 accumulator of squares is useless (|mean| > 30 std).
//! One row has no variance and is refused, as in PyTorch.
//! Backward: sums of `dz` and `dz * xhat` become `dbeta`, `dgamma`, and (a, b, c) of `dx = a * dz + b * x + c`:
//! `a = gamma * rstd`, `b = -a * rstd * dgamma / rows`, `c = -a * dbeta / rows - b * mean`.
//! `shift` and `c` are formed with `scale` and `b` as stored (rounded), so that `scale * x + shift` and `b * x + c` lose
//! nothing to a large mean.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

use crate::error::{Result, expect_len, require};
use crate::{Cost, Element, Len, Memory, Partials, View, ViewMut};

/// Arguments of [`BnFinalize::bn_finalize_forward`].
#[derive(Debug)]
pub struct Forward<'a, M: Memory, T: Element> {
    /// Pixels that were normalised together, `n * h * w`; at least 2.
    pub rows: usize,
    /// Channels.
    pub c: usize,
    /// Added to the variance.
    pub eps: f64,
    /// Mean and sum of squared deviations of each tile, as this device's operations leave them.
    pub stats: &'a Partials<M, T::Wide>,
    /// `[2, c]`: gamma, beta.
    pub affine: View<'a, M, T::Wide>,
    /// `[4, c]`: mean, rstd, scale, shift. The variance is the biased one.
    pub norm: ViewMut<'a, M, T::Wide>,
    /// `[2, c]`: mean and *unbiased* variance (`rows / (rows - 1)`, as PyTorch), for [`crate::bn_commit`].
    pub batch: ViewMut<'a, M, T::Wide>,
}

/// Arguments of [`BnFinalize::bn_finalize_inference`].
#[derive(Debug)]
pub struct Inference<'a, M: Memory, T: Element> {
    /// Channels.
    pub c: usize,
    /// Added to the variance.
    pub eps: f64,
    /// `[2, c]`: running mean, running variance.
    pub running: View<'a, M, T::Wide>,
    /// `[2, c]`: gamma, beta.
    pub affine: View<'a, M, T::Wide>,
    /// `[4, c]`: mean, rstd, scale, shift.
    pub norm: ViewMut<'a, M, T::Wide>,
}

/// Arguments of [`BnFinalize::bn_finalize_backward`].
#[derive(Debug)]
pub struct Backward<'a, M: Memory, T: Element> {
    /// Pixels that were normalised together.
    pub rows: usize,
    /// Channels.
    pub c: usize,
    /// Sums of `dz` and of `dz * xhat` of each tile, as this device's operations leave them.
    pub sums: &'a Partials<M, T::Wide>,
    /// `[2, c]`: gamma, beta.
    pub affine: View<'a, M, T::Wide>,
    /// `[4, c]`, the forward pass's.
    pub norm: View<'a, M, T::Wide>,
    /// `[2, c]`: gradients of gamma and of beta.
    pub daffine: ViewMut<'a, M, T::Wide>,
    /// `[3, c]`: a, b, c of `dx = a * dz + b * x + c`.
    pub coef: ViewMut<'a, M, T::Wide>,
}

/// The operation; see the module.
pub trait BnFinalize<T: Element>: Memory {
    /// Statistics of the batch to coefficients.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn bn_finalize_forward(&self, args: Forward<'_, Self, T>) -> Result<()>;
    /// Running statistics to coefficients.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn bn_finalize_inference(&self, args: Inference<'_, Self, T>) -> Result<()>;
    /// Sums of the gradient to `dgamma`, `dbeta` and the affine map of `dx`.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn bn_finalize_backward(&self, args: Backward<'_, Self, T>) -> Result<()>;
}

impl<M: Memory, T: Element> Forward<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "bn_finalize_forward";
        let c = self.c;
        require(OP, self.rows > 1 && c > 0, || {
            format!("rows = {}, c = {c}: a variance takes two rows and a channel", self.rows)
        })?;
        self.stats.check_made(OP, self.rows, c)?;
        expect_len(OP, "affine", self.affine.len(), 2 * c)?;
        expect_len(OP, "norm", self.norm.len(), 4 * c)?;
        expect_len(OP, "batch", self.batch.len(), 2 * c)
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        let moved = 2 * self.c + self.affine.len() + self.norm.len() + self.batch.len();
        Cost::of(format!("{}x{}", self.rows, self.c)).moves::<T::Wide>(moved)
    }
}

impl<M: Memory, T: Element> Inference<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "bn_finalize_inference";
        expect_len(OP, "running", self.running.len(), 2 * self.c)?;
        expect_len(OP, "affine", self.affine.len(), 2 * self.c)?;
        expect_len(OP, "norm", self.norm.len(), 4 * self.c)
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        Cost::of(self.c).moves::<T::Wide>(self.running.len() + self.affine.len() + self.norm.len())
    }
}

impl<M: Memory, T: Element> Backward<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "bn_finalize_backward";
        let c = self.c;
        require(OP, self.rows > 0 && c > 0, || format!("rows = {}, c = {c}", self.rows))?;
        self.sums.check_made(OP, self.rows, c)?;
        expect_len(OP, "affine", self.affine.len(), 2 * c)?;
        expect_len(OP, "norm", self.norm.len(), 4 * c)?;
        expect_len(OP, "daffine", self.daffine.len(), 2 * c)?;
        expect_len(OP, "coef", self.coef.len(), 3 * c)
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        let written = self.daffine.len() + self.coef.len();
        Cost::of(format!("{}x{}", self.rows, self.c))
            .moves::<T::Wide>(2 * self.c + self.affine.len() + self.norm.len() + written)
    }
}

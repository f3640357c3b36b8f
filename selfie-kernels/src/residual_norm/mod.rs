//! `y = layer_norm(x + dropout(branch))`: the end of either half of a post-norm transformer block.
//!
//! The sum is kept as stored in `T`; mean and rstd of each row are taken from the stored sum and kept in `T::Wide`.
//! Source: Ba et al. 2016 (arXiv 1607.06450), biased variance, as PyTorch.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

use crate::error::{Result, expect_len, require};
use crate::{Cost, Dropout, Element, Len, Memory, View, ViewMut};
use std::fmt;

/// Rows of the backward pass that share one partial sum of the parameters' gradients.
pub const SUM_ROWS: usize = 128;

/// Sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NormDims {
    /// Images.
    pub b: usize,
    /// Rows (tokens) of an image.
    pub t: usize,
    /// Features of a row.
    pub d: usize,
    /// Elements from one row of `x` to the next, at least `d`.
    pub x_stride: usize,
}

impl NormDims {
    /// Rows in all.
    pub const fn rows(&self) -> usize {
        self.b * self.t
    }
    /// Elements of a dense operand.
    pub const fn len(&self) -> usize {
        self.rows() * self.d
    }
    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Elements that `x` must at least have.
    pub const fn len_x(&self) -> usize {
        self.rows().saturating_sub(1) * self.x_stride + self.d
    }
    fn check(&self, op: &'static str) -> Result<()> {
        require(op, !self.is_empty(), || format!("an extent is zero in {self:?}"))?;
        require(op, self.x_stride >= self.d, || format!("rows of x overlap in {self:?}"))
    }
}

/// As `6656x1024`.
impl fmt::Display for NormDims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.rows(), self.d)
    }
}

/// Arguments of [`ResidualNorm::residual_norm_forward`].
#[derive(Debug)]
pub struct Forward<'a, M: Memory, T: Element> {
    /// Sizes.
    pub dims: NormDims,
    /// Added to the variance.
    pub eps: f64,
    /// `[b * t, d]` with stride: the residual.
    pub x: View<'a, M, T>,
    /// `[b * t, d]`.
    pub branch: View<'a, M, T>,
    /// On the branch; element `token * d + feature`.
    pub dropout: Option<Dropout<'a, M>>,
    /// `[2, d]`: gamma, beta.
    pub affine: View<'a, M, T::Wide>,
    /// `[b * t, d]`: `x + dropout(branch)`.
    pub sum: ViewMut<'a, M, T>,
    /// `[b * t, 2]`: mean, rstd.
    pub stats: ViewMut<'a, M, T::Wide>,
    /// `[b * t, d]`.
    pub y: ViewMut<'a, M, T>,
}

/// Arguments of [`ResidualNorm::residual_norm_backward`].
#[derive(Debug)]
pub struct Backward<'a, M: Memory, T: Element> {
    /// Sizes.
    pub dims: NormDims,
    /// Gradient of `y`, `[b * t, d]`.
    pub dy: View<'a, M, T>,
    /// The forward pass's.
    pub sum: View<'a, M, T>,
    /// The forward pass's.
    pub stats: View<'a, M, T::Wide>,
    /// The forward pass's.
    pub dropout: Option<Dropout<'a, M>>,
    /// `[2, d]`: gamma, beta.
    pub affine: View<'a, M, T::Wide>,
    /// `[b * t, d]`, dense: gradient of the residual.
    pub dx: ViewMut<'a, M, T>,
    /// `[b * t, d]`: gradient of the branch.
    pub dbranch: ViewMut<'a, M, T>,
    /// `[2, d]`: gradients of gamma and beta.
    pub daffine: ViewMut<'a, M, T::Wide>,
}

/// The operation; see the module.
pub trait ResidualNorm<T: Element>: Memory {
    /// `y = layer_norm(x + dropout(branch))`.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn residual_norm_forward(&self, args: Forward<'_, Self, T>) -> Result<()>;
    /// Gradients of residual, branch, gamma and beta.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn residual_norm_backward(&self, args: Backward<'_, Self, T>) -> Result<()>;
}

impl<M: Memory, T: Element> Forward<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "residual_norm_forward";
        let d = &self.dims;
        d.check(OP)?;
        require(OP, self.x.len() >= d.len_x(), || format!("x has {} elements, too few for {d:?}", self.x.len()))?;
        expect_len(OP, "branch", self.branch.len(), d.len())?;
        self.dropout.as_ref().map_or(Ok(()), |dropout| dropout.check(OP))?;
        expect_len(OP, "affine", self.affine.len(), 2 * d.d)?;
        expect_len(OP, "sum", self.sum.len(), d.len())?;
        expect_len(OP, "stats", self.stats.len(), 2 * d.rows())?;
        expect_len(OP, "y", self.y.len(), d.len())
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        Cost::of(self.dims)
            .moves::<T>(self.dims.len() + self.branch.len() + self.sum.len() + self.y.len())
            .moves::<T::Wide>(self.affine.len() + self.stats.len())
    }
}

impl<M: Memory, T: Element> Backward<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "residual_norm_backward";
        let d = &self.dims;
        d.check(OP)?;
        expect_len(OP, "dy", self.dy.len(), d.len())?;
        expect_len(OP, "sum", self.sum.len(), d.len())?;
        expect_len(OP, "stats", self.stats.len(), 2 * d.rows())?;
        self.dropout.as_ref().map_or(Ok(()), |dropout| dropout.check(OP))?;
        expect_len(OP, "affine", self.affine.len(), 2 * d.d)?;
        expect_len(OP, "dx", self.dx.len(), d.len())?;
        expect_len(OP, "dbranch", self.dbranch.len(), d.len())?;
        expect_len(OP, "daffine", self.daffine.len(), 2 * d.d)
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        Cost::of(self.dims)
            .moves::<T>(self.dy.len() + self.sum.len() + self.dx.len() + self.dbranch.len())
            .moves::<T::Wide>(self.stats.len() + self.affine.len() + self.daffine.len())
    }
}

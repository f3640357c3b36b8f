//! Linear layers: `y = x w^T + bias`, optionally through the exact GELU, and their gradients.
//!
//! The GELU is `z * (1 + erf(z / sqrt(2))) / 2` (Hendrycks and Gimpel 2016); its input `z` is kept for the backward pass.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

use crate::error::{Result, expect_len, require};
use crate::{Cost, Element, Len, Memory, View, ViewMut};
use std::fmt;

/// Sizes: `[m, k]` by `[n, k]` (a weight as PyTorch stores it, `[out, in]`) to `[m, n]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GemmDims {
    /// Rows.
    pub m: usize,
    /// Outputs of the layer.
    pub n: usize,
    /// Inputs of the layer.
    pub k: usize,
    /// Elements from one row of `x` (and of `dx`) to the next, at least `k`: more than `k` reads every few rows, as the
    /// first token of each image.
    pub x_stride: usize,
}

impl GemmDims {
    /// Floating-point operations of one pass.
    pub const fn flops(&self) -> usize {
        2 * self.m * self.n * self.k
    }
    /// Elements that `x` and `dx` must at least have.
    pub const fn len_x(&self) -> usize {
        self.m.saturating_sub(1) * self.x_stride + self.k
    }
    fn check(&self, op: &'static str) -> Result<()> {
        require(op, self.m > 0 && self.n > 0 && self.k > 0, || format!("an extent is zero in {self:?}"))?;
        require(op, self.x_stride >= self.k, || format!("rows of x overlap in {self:?}"))
    }
}

/// As `6656 x 1024->640`.
impl fmt::Display for GemmDims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x {}->{}", self.m, self.k, self.n)
    }
}

/// What happens to the sum before it is stored.
#[derive(Debug)]
pub enum Activation<'a, M: Memory, T: Element> {
    /// Nothing.
    Identity,
    /// `y = gelu(z)`; `z` is stored here, `[m, n]`, and `y` computed from it as stored.
    Gelu {
        /// Sum with bias, before the GELU.
        z: ViewMut<'a, M, T>,
    },
}

/// Arguments of [`Gemm::gemm_forward`].
#[derive(Debug)]
pub struct Forward<'a, M: Memory, T: Element> {
    /// Sizes.
    pub dims: GemmDims,
    /// `[m, k]` with stride, at least [`GemmDims::len_x`].
    pub x: View<'a, M, T>,
    /// `[n, k]`.
    pub w: View<'a, M, T>,
    /// `[n]`.
    pub bias: View<'a, M, T::Wide>,
    /// What follows.
    pub activation: Activation<'a, M, T>,
    /// `[m, n]`.
    pub y: ViewMut<'a, M, T>,
}

/// Whether a result replaces or adds to what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// Replaces.
    Overwrite,
    /// Adds.
    Accumulate,
}

/// Arguments of [`Gemm::gemm_backward_data`].
#[derive(Debug)]
pub struct BackwardData<'a, M: Memory, T: Element> {
    /// Sizes of the forward pass.
    pub dims: GemmDims,
    /// Gradient of `y`, `[m, n]` (of `z`, where a GELU followed: see `gelu` of the layer above).
    pub dy: View<'a, M, T>,
    /// `[n, k]`.
    pub w: View<'a, M, T>,
    /// `[m, k]`, dense: where `x = gelu(z)`, that `z`; the result is then the gradient of `z`.
    pub gelu: Option<View<'a, M, T>>,
    /// `[m, k]`, dense: another gradient of `x`, added.
    pub addend: Option<View<'a, M, T>>,
    /// Whether `dx` is replaced.
    pub write: Write,
    /// `[m, k]` with stride.
    pub dx: ViewMut<'a, M, T>,
}

/// Arguments of [`Gemm::gemm_backward_weight`].
#[derive(Debug)]
pub struct BackwardWeight<'a, M: Memory, T: Element> {
    /// Sizes of the forward pass.
    pub dims: GemmDims,
    /// `[m, k]` with stride.
    pub x: View<'a, M, T>,
    /// `[m, n]`.
    pub dy: View<'a, M, T>,
    /// `[n, k]`.
    pub dw: ViewMut<'a, M, T::Wide>,
    /// `[n]`.
    pub dbias: ViewMut<'a, M, T::Wide>,
}

/// The operation; see the module.
pub trait Gemm<T: Element>: Memory {
    /// `y = activation(x w^T + bias)`.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn gemm_forward(&self, args: Forward<'_, Self, T>) -> Result<()>;
    /// `dx = (dy w) * gelu'(z) + addend`, replacing or added to `dx`.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn gemm_backward_data(&self, args: BackwardData<'_, Self, T>) -> Result<()>;
    /// `dw = dy^T x`, `dbias = sum of the rows of dy`.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn gemm_backward_weight(&self, args: BackwardWeight<'_, Self, T>) -> Result<()>;
}

fn expect_strided(op: &'static str, argument: &'static str, got: usize, dims: &GemmDims) -> Result<()> {
    require(op, got >= dims.len_x(), || format!("{argument} has {got} elements, too few for {dims:?}"))
}

impl<M: Memory, T: Element> Forward<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "gemm_forward";
        let d = &self.dims;
        d.check(OP)?;
        expect_strided(OP, "x", self.x.len(), d)?;
        expect_len(OP, "w", self.w.len(), d.n * d.k)?;
        expect_len(OP, "bias", self.bias.len(), d.n)?;
        expect_len(OP, "y", self.y.len(), d.m * d.n)?;
        match &self.activation {
            Activation::Identity => Ok(()),
            Activation::Gelu { z } => expect_len(OP, "z", z.len(), d.m * d.n),
        }
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        let GemmDims { m, n, k, .. } = self.dims;
        let z = match &self.activation {
            Activation::Identity => 0,
            Activation::Gelu { z } => z.len(),
        };
        Cost::of(self.dims).products(m * n * k).moves::<T>(m * k + n * k + z + m * n).moves::<T::Wide>(self.bias.len())
    }
}

impl<M: Memory, T: Element> BackwardData<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "gemm_backward_data";
        let d = &self.dims;
        d.check(OP)?;
        expect_len(OP, "dy", self.dy.len(), d.m * d.n)?;
        expect_len(OP, "w", self.w.len(), d.n * d.k)?;
        for (name, view) in [("gelu", &self.gelu), ("addend", &self.addend)] {
            if let Some(view) = view {
                expect_len(OP, name, view.len(), d.m * d.k)?;
            }
        }
        expect_strided(OP, "dx", self.dx.len(), d)
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        let GemmDims { m, n, k, .. } = self.dims;
        let beside = [&self.gelu, &self.addend].into_iter().flatten().map(Len::len).sum::<usize>();
        let times = match self.write {
            Write::Overwrite => 1,
            Write::Accumulate => 2,
        };
        Cost::of(self.dims).products(m * n * k).moves::<T>(m * n + n * k + beside + times * m * k)
    }
}

impl<M: Memory, T: Element> BackwardWeight<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "gemm_backward_weight";
        let d = &self.dims;
        d.check(OP)?;
        expect_strided(OP, "x", self.x.len(), d)?;
        expect_len(OP, "dy", self.dy.len(), d.m * d.n)?;
        expect_len(OP, "dw", self.dw.len(), d.n * d.k)?;
        expect_len(OP, "dbias", self.dbias.len(), d.n)
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        let GemmDims { m, n, k, .. } = self.dims;
        Cost::of(self.dims)
            .products(m * n * k)
            .moves::<T>(m * k + m * n)
            .moves::<T::Wide>(self.dw.len() + self.dbias.len())
    }
}

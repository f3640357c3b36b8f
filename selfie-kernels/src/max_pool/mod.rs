//! 3x3 max pooling with stride 2 and padding 1 (of minus infinity), and the partial statistics of what it keeps.
//!
//! Of equal values the first in row-major order wins (ties are common in bf16), and a NaN wins over everything, as in
//! PyTorch. The winner's tap `0..9` is kept for the backward pass.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

use crate::error::{Result, expect_len, require};
use crate::{Cost, Element, Grad, Len, Memory, Partials, View, ViewMut};
use std::fmt;

/// Sizes: `[n, h, w, c]` to `[n, p, q, c]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PoolDims {
    /// Images.
    pub n: usize,
    /// Input height.
    pub h: usize,
    /// Input width.
    pub w: usize,
    /// Channels.
    pub c: usize,
}

impl PoolDims {
    /// Output height, `ceil(h / 2)`.
    pub const fn p(&self) -> usize {
        self.h.div_ceil(2)
    }
    /// Output width, `ceil(w / 2)`.
    pub const fn q(&self) -> usize {
        self.w.div_ceil(2)
    }
    /// Elements of the input.
    pub const fn len_in(&self) -> usize {
        self.n * self.h * self.w * self.c
    }
    /// Pixels of the output.
    pub const fn rows_out(&self) -> usize {
        self.n * self.p() * self.q()
    }
    /// Bytes that one forward pass must move at least.
    pub const fn bytes<T>(&self) -> usize {
        self.len_in() * size_of::<T>() + self.rows_out() * self.c * (size_of::<T>() + 1)
    }
}

/// Channels and input, as `64 at 112x112`.
impl fmt::Display for PoolDims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}x{}", self.c, self.h, self.w)
    }
}

/// Arguments of [`MaxPool::max_pool_forward`].
#[derive(Debug)]
pub struct Forward<'a, M: Memory, T: Element> {
    /// Sizes.
    pub dims: PoolDims,
    /// `[n, h, w, c]`.
    pub x: View<'a, M, T>,
    /// `[n, p, q, c]`.
    pub y: ViewMut<'a, M, T>,
    /// `[n, p, q, c]`: tap `3 * row + column` of the winner.
    pub argmax: ViewMut<'a, M, u8>,
    /// As [`crate::norm_relu_conv::Forward::stats`]; room for `n * p * q` rows.
    pub stats: &'a mut Partials<M, T::Wide>,
}

/// Arguments of [`MaxPool::max_pool_backward`].
#[derive(Debug)]
pub struct Backward<'a, M: Memory, T: Element> {
    /// Sizes.
    pub dims: PoolDims,
    /// Gradient of `y`.
    pub dy: Grad<'a, M, T>,
    /// The forward pass's.
    pub argmax: View<'a, M, u8>,
    /// `[n, h, w, c]`.
    pub dx: ViewMut<'a, M, T>,
}

/// The operation; see the module.
pub trait MaxPool<T: Element>: Memory {
    /// Maximum, its tap, and the partial statistics of the pooled map.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn max_pool_forward(&self, args: Forward<'_, Self, T>) -> Result<()>;
    /// Each input pixel gathers from the (at most four) windows that it won.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn max_pool_backward(&self, args: Backward<'_, Self, T>) -> Result<()>;
}

impl<M: Memory, T: Element> Forward<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "max_pool_forward";
        let d = &self.dims;
        require(OP, d.len_in() > 0, || format!("an extent is zero in {d:?}"))?;
        expect_len(OP, "x", self.x.len(), d.len_in())?;
        expect_len(OP, "y", self.y.len(), d.rows_out() * d.c)?;
        expect_len(OP, "argmax", self.argmax.len(), d.rows_out() * d.c)?;
        self.stats.check(OP, d.rows_out(), d.c)
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        let read = self.x.len() + self.y.len();
        Cost::of(self.dims).moves::<T>(read).moves::<u8>(self.argmax.len()).moves::<T::Wide>(2 * self.dims.c)
    }
}

impl<M: Memory, T: Element> Backward<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "max_pool_backward";
        let d = &self.dims;
        require(OP, d.len_in() > 0, || format!("an extent is zero in {d:?}"))?;
        self.dy.check(OP, d.rows_out(), d.c)?;
        expect_len(OP, "argmax", self.argmax.len(), d.rows_out() * d.c)?;
        expect_len(OP, "dx", self.dx.len(), d.len_in())
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        self.dy.read(Cost::of(self.dims)).moves::<u8>(self.argmax.len()).moves::<T>(self.dx.len())
    }
}

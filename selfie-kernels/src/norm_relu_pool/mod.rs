//! `y = mean over k x k windows of relu(scale * x + shift)`: the network's end (whole map) or, with 2x2 windows, the
//! cells that an attention head reads. Windows do not overlap and cover the map.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

use crate::error::{Result, expect_len, require};
use crate::{Cost, Element, Len, Memory, Partials, View, ViewMut};
use std::fmt;

/// Sizes: `[n, h, w, c]` to `[n, h / window, w / window, c]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AvgDims {
    /// Images.
    pub n: usize,
    /// Input height, a multiple of the window.
    pub h: usize,
    /// Input width, a multiple of the window.
    pub w: usize,
    /// Channels.
    pub c: usize,
    /// Height of a window.
    pub window_h: usize,
    /// Width of a window.
    pub window_w: usize,
}

impl AvgDims {
    /// Pixels of the input.
    pub const fn rows_in(&self) -> usize {
        self.n * self.h * self.w
    }
    /// Elements of the output.
    pub const fn len_out(&self) -> usize {
        self.n * (self.h / self.window_h) * (self.w / self.window_w) * self.c
    }
    fn check(&self, op: &'static str) -> Result<()> {
        let Self { n, h, w, c, window_h, window_w } = *self;
        require(op, [n, h, w, c, window_h, window_w].iter().all(|&x| x > 0), || {
            format!("an extent is zero in {self:?}")
        })?;
        require(op, h % window_h == 0 && w % window_w == 0, || format!("windows do not cover the map in {self:?}"))
    }
}

/// Window, channels and input, as `2x2 1024 at 2x2`.
impl fmt::Display for AvgDims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { h, w, c, window_h, window_w, .. } = self;
        write!(f, "{window_h}x{window_w} {c} at {h}x{w}")
    }
}

/// Arguments of [`NormReluPool::norm_relu_pool_forward`].
#[derive(Debug)]
pub struct Forward<'a, M: Memory, T: Element> {
    /// Sizes.
    pub dims: AvgDims,
    /// `[n, h, w, c]`, raw.
    pub x: View<'a, M, T>,
    /// `[4, c]`: mean, rstd, scale, shift.
    pub norm: View<'a, M, T::Wide>,
    /// `[n, h / window_h, w / window_w, c]`.
    pub y: ViewMut<'a, M, T>,
}

/// Arguments of [`NormReluPool::norm_relu_pool_backward`].
#[derive(Debug)]
pub struct Backward<'a, M: Memory, T: Element> {
    /// Sizes.
    pub dims: AvgDims,
    /// Gradient of `y`.
    pub dy: View<'a, M, T>,
    /// `[n, h, w, c]`, raw.
    pub x: View<'a, M, T>,
    /// `[4, c]`, the forward pass's.
    pub norm: View<'a, M, T::Wide>,
    /// `[n, h, w, c]`: gradient of `scale * x + shift`, zero where that is not above zero (a NaN lets it pass, as in
    /// PyTorch).
    pub dz: ViewMut<'a, M, T>,
    /// Sums of `dz` and of `dz * xhat`, `dz` as stored; room for `n * h * w` rows.
    pub sums: &'a mut Partials<M, T::Wide>,
}

/// The operation; see the module.
pub trait NormReluPool<T: Element>: Memory {
    /// Normalise, ReLU, average.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn norm_relu_pool_forward(&self, args: Forward<'_, Self, T>) -> Result<()>;
    /// `dz = dy / (window_h * window_w)` behind the mask, and its partial sums.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn norm_relu_pool_backward(&self, args: Backward<'_, Self, T>) -> Result<()>;
}

impl<M: Memory, T: Element> Forward<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "norm_relu_pool_forward";
        let d = &self.dims;
        d.check(OP)?;
        expect_len(OP, "x", self.x.len(), d.rows_in() * d.c)?;
        expect_len(OP, "norm", self.norm.len(), 4 * d.c)?;
        expect_len(OP, "y", self.y.len(), d.len_out())
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        Cost::of(self.dims).moves::<T>(self.x.len() + self.y.len()).moves::<T::Wide>(self.norm.len())
    }
}

impl<M: Memory, T: Element> Backward<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "norm_relu_pool_backward";
        let d = &self.dims;
        d.check(OP)?;
        expect_len(OP, "dy", self.dy.len(), d.len_out())?;
        expect_len(OP, "x", self.x.len(), d.rows_in() * d.c)?;
        expect_len(OP, "norm", self.norm.len(), 4 * d.c)?;
        expect_len(OP, "dz", self.dz.len(), d.rows_in() * d.c)?;
        self.sums.check(OP, d.rows_in(), d.c)
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        Cost::of(self.dims)
            .moves::<T>(self.dy.len() + self.x.len() + self.dz.len())
            .moves::<T::Wide>(self.norm.len() + 2 * self.dims.c)
    }
}

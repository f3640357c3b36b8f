//! The large stem: the first convolution, as [`crate::stem_conv`] has it, and behind it 3x3 max pooling with stride 2 and
//! padding 1 (of minus infinity), with the partial statistics of what that keeps.
//!
//! Between the two lies a map four times as large as the pooled one. It is rounded to `T`, wherever it is: a device that pools
//! while it has the map at hand leaves the argument `map` as it is, another one keeps the map, or its gradient, there.
//!
//! Of equal values the first in row-major order wins (ties are common in bf16), and a NaN wins over everything, as in
//! PyTorch; which of several NaN is the device's choice. The winner's tap `0..9` is kept for the backward pass.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

use crate::error::{Result, expect_len};
use crate::{ConvDims, Cost, Element, Grad, Len, Memory, Partials, View, ViewMut};

/// Sizes of the pooling: `[n, h, w, c]` to `[n, p, q, c]`.
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
    /// Of what a convolution writes.
    pub const fn behind(d: &ConvDims) -> Self {
        Self { n: d.n, h: d.p(), w: d.q(), c: d.k }
    }
    /// Output height, `ceil(h / 2)`.
    pub const fn p(&self) -> usize {
        self.h.div_ceil(2)
    }
    /// Output width, `ceil(w / 2)`.
    pub const fn q(&self) -> usize {
        self.w.div_ceil(2)
    }
    /// Pixels of the output.
    pub const fn rows_out(&self) -> usize {
        self.n * self.p() * self.q()
    }
    /// Elements of the output.
    pub const fn len_out(&self) -> usize {
        self.rows_out() * self.c
    }
}

/// Arguments of [`StemPool::stem_pool_forward`].
#[derive(Debug)]
pub struct Forward<'a, M: Memory, T: Element> {
    /// Sizes of the convolution; the pooling's are [`PoolDims::behind`] it.
    pub dims: ConvDims,
    /// `[n, h, w, c]`.
    pub x: View<'a, M, T>,
    /// `[k, r, s, c]`.
    pub w: View<'a, M, T>,
    /// Scratch, `[n, p, q, k]`.
    pub map: ViewMut<'a, M, T>,
    /// The pooled map, `[n, ceil(p / 2), ceil(q / 2), k]`.
    pub y: ViewMut<'a, M, T>,
    /// As `y`: tap `3 * row + column` of the winner.
    pub argmax: ViewMut<'a, M, u8>,
    /// As [`crate::norm_relu_conv::Forward::stats`], of the pooled map.
    pub stats: Option<&'a mut Partials<M, T::Wide>>,
}

/// Arguments of [`StemPool::stem_pool_backward_filter`].
#[derive(Debug)]
pub struct BackwardFilter<'a, M: Memory, T: Element> {
    /// Sizes of the forward pass's convolution.
    pub dims: ConvDims,
    /// `[n, h, w, c]`.
    pub x: View<'a, M, T>,
    /// Gradient of the pooled map.
    pub dy: Grad<'a, M, T>,
    /// The forward pass's.
    pub argmax: View<'a, M, u8>,
    /// Scratch, `[n, p, q, k]`.
    pub map: ViewMut<'a, M, T>,
    /// `[k, r, s, c]`.
    pub dw: ViewMut<'a, M, T::Wide>,
}

/// The operation; see the module.
pub trait StemPool<T: Element>: Memory {
    /// `y = max_pool(conv(x, w))`, the maximum's tap, and the partial statistics of `y`.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn stem_pool_forward(&self, args: Forward<'_, Self, T>) -> Result<()>;
    /// `dw[k, r, s, c] = sum over pixels of dm * x`, where a pixel's `dm` is the sum of `dy` of the (at most four) windows that
    /// it won, rounded to `T`; a [`Grad::Affine`] may be rounded to `T` before, too.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn stem_pool_backward_filter(&self, args: BackwardFilter<'_, Self, T>) -> Result<()>;
}

impl<M: Memory, T: Element> Forward<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "stem_pool_forward";
        let d = &self.dims;
        d.check(OP)?;
        let pool = PoolDims::behind(d);
        expect_len(OP, "x", self.x.len(), d.len_in())?;
        expect_len(OP, "w", self.w.len(), d.len_filter())?;
        expect_len(OP, "map", self.map.len(), d.len_out())?;
        expect_len(OP, "y", self.y.len(), pool.len_out())?;
        expect_len(OP, "argmax", self.argmax.len(), pool.len_out())?;
        match &self.stats {
            Some(stats) => stats.check(OP, pool.rows_out(), pool.c),
            None => Ok(()),
        }
    }

    /// The least that the call must do: the map need not be moved.
    pub(crate) fn cost(&self) -> Cost {
        let d = &self.dims;
        Cost::of(format_args!("{d}, pooled"))
            .products(d.pairs())
            .moves::<T>(self.x.len() + self.w.len() + self.y.len())
            .moves::<u8>(self.argmax.len())
            .moves::<T::Wide>(if self.stats.is_some() { 2 * d.k } else { 0 })
    }
}

impl<M: Memory, T: Element> BackwardFilter<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "stem_pool_backward_filter";
        let d = &self.dims;
        d.check(OP)?;
        let pool = PoolDims::behind(d);
        expect_len(OP, "x", self.x.len(), d.len_in())?;
        self.dy.check(OP, pool.rows_out(), pool.c)?;
        expect_len(OP, "argmax", self.argmax.len(), pool.len_out())?;
        expect_len(OP, "map", self.map.len(), d.len_out())?;
        expect_len(OP, "dw", self.dw.len(), d.len_filter())
    }

    /// The least that the call must do, with the products of a convolution: how many pixels win nothing is the data's.
    pub(crate) fn cost(&self) -> Cost {
        let d = &self.dims;
        let cost = Cost::of(format_args!("{d}, pooled")).products(d.pairs());
        self.dy.read(cost).moves::<u8>(self.argmax.len()).moves::<T>(self.x.len()).moves::<T::Wide>(self.dw.len())
    }
}

//! The first convolution: normalised pixels `[n, h, w, 3]` in, raw feature map out; no norm, no ReLU, no data gradient.
//!
//! A [`Grad::Affine`] may be rounded to `T` as it is formed. Products with padding's zeros may be added, by which a value of
//! `w` or `dy` that is not finite reaches every output, or every tap, of its filter.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

use crate::error::{Result, expect_len};
use crate::{ConvDims, Cost, Element, Grad, Len, Memory, Partials, View, ViewMut};

/// Arguments of [`StemConv::stem_conv_forward`].
#[derive(Debug)]
pub struct Forward<'a, M: Memory, T: Element> {
    /// Sizes.
    pub dims: ConvDims,
    /// `[n, h, w, c]`.
    pub x: View<'a, M, T>,
    /// `[k, r, s, c]`.
    pub w: View<'a, M, T>,
    /// `[n, p, q, k]`.
    pub y: ViewMut<'a, M, T>,
    /// As [`crate::norm_relu_conv::Forward::stats`].
    pub stats: Option<&'a mut Partials<M, T::Wide>>,
}

/// Arguments of [`StemConv::stem_conv_backward_filter`].
#[derive(Debug)]
pub struct BackwardFilter<'a, M: Memory, T: Element> {
    /// Sizes of the forward pass.
    pub dims: ConvDims,
    /// `[n, h, w, c]`.
    pub x: View<'a, M, T>,
    /// Gradient of `y`, `[n, p, q, k]`.
    pub dy: Grad<'a, M, T>,
    /// `[k, r, s, c]`.
    pub dw: ViewMut<'a, M, T::Wide>,
}

/// The operation; see the module.
pub trait StemConv<T: Element>: Memory {
    /// `y = conv(x, w)`, and the partial statistics of `y`.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn stem_conv_forward(&self, args: Forward<'_, Self, T>) -> Result<()>;
    /// `dw[k, r, s, c] = sum over pixels of dy * x`.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn stem_conv_backward_filter(&self, args: BackwardFilter<'_, Self, T>) -> Result<()>;
}

impl<M: Memory, T: Element> Forward<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "stem_conv_forward";
        let d = &self.dims;
        d.check(OP)?;
        expect_len(OP, "x", self.x.len(), d.len_in())?;
        expect_len(OP, "w", self.w.len(), d.len_filter())?;
        expect_len(OP, "y", self.y.len(), d.len_out())?;
        match &self.stats {
            Some(stats) => stats.check(OP, d.rows_out(), d.k),
            None => Ok(()),
        }
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        let d = &self.dims;
        Cost::of(d)
            .products(d.pairs())
            .moves::<T>(self.x.len() + self.w.len() + self.y.len())
            .moves::<T::Wide>(if self.stats.is_some() { 2 * d.k } else { 0 })
    }
}

impl<M: Memory, T: Element> BackwardFilter<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "stem_conv_backward_filter";
        let d = &self.dims;
        d.check(OP)?;
        expect_len(OP, "x", self.x.len(), d.len_in())?;
        self.dy.check(OP, d.rows_out(), d.k)?;
        expect_len(OP, "dw", self.dw.len(), d.len_filter())
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        let cost = Cost::of(self.dims).products(self.dims.pairs());
        self.dy.read(cost).moves::<T>(self.x.len()).moves::<T::Wide>(self.dw.len())
    }
}

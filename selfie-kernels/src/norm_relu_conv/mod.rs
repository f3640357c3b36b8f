//! `y = conv(relu(scale * x + shift), w) (+ residual)`: the unit of work of a pre-activation network.
//!
//! Batch normalisation and ReLU of the input ride along while it is loaded, so the normalised tensor is never stored;
//! the statistics of `y` for the next normalisation are a by-product. Padding is applied *after* the transform: a
//! padded tap contributes 0, not `relu(shift)`. The gradient of the normalisation is affine per channel and is applied
//! by whoever loads the gradient next ([`Grad::Affine`]).
//!
//! Operands of the products (the transformed input, a [`Grad::Affine`] as it is formed) may be rounded to `T` first:
//! matrix units take them so. How the products are summed is the device's: the CPU does large 3x3 convolutions by minimal
//! filtering, where a value that is not finite spreads to at most one pixel more than it must. A filter's gradient may add
//! the products with padding's zeros, by which such a value of `dy` reaches every tap of its filter.
//!
//! Source: pre-activation order of He et al. 2016 (arXiv 1603.05027); batch normalisation of Ioffe and Szegedy 2015.

pub(crate) mod cpu;
pub(crate) mod cuda;
pub(crate) use cpu::{LoadGrad, store_with_stats};
#[cfg(test)]
mod tests;

use crate::error::{Result, expect_len, require};
use crate::{ConvDims, Cost, Element, Grad, Len, Memory, Partials, View, ViewMut};

/// Arguments of [`NormReluConv::norm_relu_conv_forward`].
#[derive(Debug)]
pub struct Forward<'a, M: Memory, T: Element> {
    /// Sizes.
    pub dims: ConvDims,
    /// `[n, h, w, c]`, raw.
    pub x: View<'a, M, T>,
    /// `[4, c]`: mean, rstd, scale, shift of [`crate::bn_finalize`].
    pub norm: View<'a, M, T::Wide>,
    /// `[k, r, s, c]`.
    pub w: View<'a, M, T>,
    /// `[n, p, q, k]`, added to the convolution's sum before it is rounded.
    pub residual: Option<View<'a, M, T>>,
    /// `[n, p, q, k]`.
    pub y: ViewMut<'a, M, T>,
    /// Mean, and sum of squared deviations from that mean, of `y` *as stored*; room for `n * p * q` rows.
    pub stats: Option<&'a mut Partials<M, T::Wide>>,
}

/// Arguments of [`NormReluConv::norm_relu_conv_backward_data`].
#[derive(Debug)]
pub struct BackwardData<'a, M: Memory, T: Element> {
    /// Sizes of the forward pass.
    pub dims: ConvDims,
    /// Gradient of `y`, `[n, p, q, k]`.
    pub dy: Grad<'a, M, T>,
    /// `[k, r, s, c]`.
    pub w: View<'a, M, T>,
    /// The forward pass's input, raw: decides the ReLU's mask and gives `xhat`.
    pub x: View<'a, M, T>,
    /// `[4, c]`, the forward pass's own.
    pub norm: View<'a, M, T::Wide>,
    /// What another consumer of `relu(scale * x + shift)` sends back, added before the mask.
    pub addend: Option<Addend<'a, M, T>>,
    /// `[n, h, w, c]`: gradient of `scale * x + shift`, zero where that is not positive (a NaN lets the
    /// gradient pass, as in PyTorch).
    pub dz: ViewMut<'a, M, T>,
    /// Sum of `dz` and of `dz * xhat`, `xhat = (x - mean) * rstd`, `dz` as stored; room for `n * h * w` rows.
    pub sums: &'a mut Partials<M, T::Wide>,
}

/// A gradient on every `stride`-th pixel of every `stride`-th row, zero elsewhere: what a 1x1 projection sends back.
#[derive(Debug)]
pub struct Addend<'a, M: Memory, T: Element> {
    /// `[n, ceil(h / stride), ceil(w / stride), c]`.
    pub values: View<'a, M, T>,
    /// Distance of the pixels that have one.
    pub stride: usize,
}

impl<M: Memory, T: Element> Clone for Addend<'_, M, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<M: Memory, T: Element> Copy for Addend<'_, M, T> {}

/// Arguments of [`NormReluConv::projection_backward_data`].
#[derive(Debug)]
pub struct ProjectionBackwardData<'a, M: Memory, T: Element> {
    /// Sizes of the forward pass: a 1x1 filter without padding.
    pub dims: ConvDims,
    /// Gradient of `y`, `[n, p, q, k]`.
    pub dy: Grad<'a, M, T>,
    /// `[k, 1, 1, c]`.
    pub w: View<'a, M, T>,
    /// `[n, p, q, c]`, the [`Addend`] of whoever shares the input.
    pub dx: ViewMut<'a, M, T>,
}

/// Arguments of [`NormReluConv::norm_relu_conv_backward_filter`].
#[derive(Debug)]
pub struct BackwardFilter<'a, M: Memory, T: Element> {
    /// Sizes of the forward pass.
    pub dims: ConvDims,
    /// The forward pass's input, raw.
    pub x: View<'a, M, T>,
    /// `[4, c]`, the forward pass's own.
    pub norm: View<'a, M, T::Wide>,
    /// Gradient of `y`, `[n, p, q, k]`.
    pub dy: Grad<'a, M, T>,
    /// `[k, r, s, c]`.
    pub dw: ViewMut<'a, M, T::Wide>,
}

/// Arguments of [`NormReluConv::norm_relu_conv_backward`].
#[derive(Debug)]
pub struct Backward<'a, M: Memory, T: Element> {
    /// The gradient of the input; its operands are the filter's, too.
    pub data: BackwardData<'a, M, T>,
    /// `[k, r, s, c]`: gradient of the filter.
    pub dw: ViewMut<'a, M, T::Wide>,
}

/// The operation; see the module.
pub trait NormReluConv<T: Element>: Memory {
    /// `y = conv(relu(fma(scale, x, shift)), w) (+ residual)`, and the partial statistics of `y`.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn norm_relu_conv_forward(&self, args: Forward<'_, Self, T>) -> Result<()>;
    /// `dz = conv^T(dy, w) + addend` where `fma(scale, x, shift)` is positive or NaN, else 0, and its partial sums.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn norm_relu_conv_backward_data(&self, args: BackwardData<'_, Self, T>) -> Result<()>;
    /// `dx = dy * w` at the pixels that a 1x1 projection reads.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn projection_backward_data(&self, args: ProjectionBackwardData<'_, Self, T>) -> Result<()>;
    /// `dw[k, r, s, c] = sum over pixels of dy * relu(fma(scale, x, shift))`.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn norm_relu_conv_backward_filter(&self, args: BackwardFilter<'_, Self, T>) -> Result<()>;
    /// Both gradients, with the bits of [`NormReluConv::norm_relu_conv_backward_filter`] and
    /// [`NormReluConv::norm_relu_conv_backward_data`] where no table of choices decides otherwise, and a device does not cut
    /// the filter's sums to make both at a time: it does here once what both would do, such as to form a [`Grad::Affine`].
    ///
    /// # Errors
    /// Lengths or dims that do not fit; nothing is written then.
    fn norm_relu_conv_backward(&self, args: Backward<'_, Self, T>) -> Result<()> {
        args.check()?;
        let (filter, data) = args.passes();
        self.norm_relu_conv_backward_filter(filter)?;
        self.norm_relu_conv_backward_data(data)
    }
}

impl<M: Memory, T: Element> Forward<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "norm_relu_conv_forward";
        let d = &self.dims;
        d.check(OP)?;
        expect_len(OP, "x", self.x.len(), d.len_in())?;
        expect_len(OP, "norm", self.norm.len(), 4 * d.c)?;
        expect_len(OP, "w", self.w.len(), d.len_filter())?;
        expect_len(OP, "y", self.y.len(), d.len_out())?;
        if let Some(residual) = &self.residual {
            expect_len(OP, "residual", residual.len(), d.len_out())?;
        }
        if let Some(stats) = &self.stats {
            stats.check(OP, d.rows_out(), d.k)?;
        }
        Ok(())
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        let d = &self.dims;
        let residual = self.residual.as_ref().map_or(0, Len::len);
        Cost::of(d)
            .products(d.pairs())
            .moves::<T>(self.x.len() + self.w.len() + residual + self.y.len())
            .moves::<T::Wide>(self.norm.len() + if self.stats.is_some() { 2 * d.k } else { 0 })
    }
}

impl<M: Memory, T: Element> BackwardData<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "norm_relu_conv_backward_data";
        let d = &self.dims;
        d.check(OP)?;
        self.dy.check(OP, d.rows_out(), d.k)?;
        expect_len(OP, "w", self.w.len(), d.len_filter())?;
        expect_len(OP, "x", self.x.len(), d.len_in())?;
        expect_len(OP, "norm", self.norm.len(), 4 * d.c)?;
        expect_len(OP, "dz", self.dz.len(), d.len_in())?;
        self.sums.check(OP, d.rows_in(), d.c)?;
        if let Some(addend) = &self.addend {
            require(OP, addend.stride > 0, || "the addend's stride is zero".into())?;
            let pixels = d.n * d.h.div_ceil(addend.stride) * d.w.div_ceil(addend.stride);
            expect_len(OP, "addend", addend.values.len(), pixels * d.c)?;
        }
        Ok(())
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        let d = &self.dims;
        let addend = self.addend.as_ref().map_or(0, |addend| addend.values.len());
        self.dy
            .read(Cost::of(d).products(d.pairs()))
            .moves::<T>(self.w.len() + self.x.len() + addend + self.dz.len())
            .moves::<T::Wide>(self.norm.len() + 2 * d.c)
    }
}

impl<M: Memory, T: Element> ProjectionBackwardData<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "projection_backward_data";
        let d = &self.dims;
        d.check(OP)?;
        require(OP, d.r == 1 && d.s == 1 && d.pad == 0, || format!("not a 1x1 projection: {d:?}"))?;
        self.dy.check(OP, d.rows_out(), d.k)?;
        expect_len(OP, "w", self.w.len(), d.len_filter())?;
        expect_len(OP, "dx", self.dx.len(), d.rows_out() * d.c)
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        let cost = Cost::of(self.dims).products(self.dims.pairs());
        self.dy.read(cost).moves::<T>(self.w.len() + self.dx.len())
    }
}

impl<M: Memory, T: Element> BackwardFilter<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "norm_relu_conv_backward_filter";
        let d = &self.dims;
        d.check(OP)?;
        expect_len(OP, "x", self.x.len(), d.len_in())?;
        expect_len(OP, "norm", self.norm.len(), 4 * d.c)?;
        self.dy.check(OP, d.rows_out(), d.k)?;
        expect_len(OP, "dw", self.dw.len(), d.len_filter())
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        let cost = Cost::of(self.dims).products(self.dims.pairs());
        self.dy.read(cost).moves::<T>(self.x.len()).moves::<T::Wide>(self.norm.len() + self.dw.len())
    }
}

impl<'a, M: Memory, T: Element> Backward<'a, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        self.data.check()?;
        expect_len("norm_relu_conv_backward", "dw", self.dw.len(), self.data.dims.len_filter())
    }

    /// The least that the call must do: both products, of operands that are read once.
    pub(crate) fn cost(&self) -> Cost {
        self.data.cost().products(self.data.dims.pairs()).moves::<T::Wide>(self.dw.len())
    }

    /// As two calls.
    pub(crate) fn passes(self) -> (BackwardFilter<'a, M, T>, BackwardData<'a, M, T>) {
        let Self { data, dw } = self;
        (BackwardFilter { dims: data.dims, x: data.x, norm: data.norm, dy: data.dy, dw }, data)
    }
}

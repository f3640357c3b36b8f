//! `y = conv(relu(scale * x + shift), w) (+ residual)`: the unit of work of a pre-activation network.
//!
//! Batch normalisation and ReLU of the input ride along while it is loaded, so the normalised tensor is never stored;
//! the statistics of `y` for the next normalisation are a by-product. Padding is applied *after* the transform: a
//! padded tap contributes 0, not `relu(shift)`. The gradient of the normalisation is affine per channel and is applied
//! by whoever loads the gradient next ([`Grad::Affine`]).
//!
//! How the products are summed is the device's: the CPU does large 3x3 convolutions by minimal filtering, where a value that
//! is not finite spreads to at most one pixel more than it must.
//!
//! Source: pre-activation order of He et al. 2016 (arXiv 1603.05027); batch normalisation of Ioffe and Szegedy 2015.

pub(crate) mod cpu;
pub(crate) use cpu::{LoadGrad, store_with_stats};
#[cfg(test)]
mod tests;

use crate::error::{Result, expect_len, require};
use crate::{Element, Len, Memory, View, ViewMut};

/// Rows of the output matrix `[n * p * q, k]` that share one partial sum. Part of the contract: the partition depends
/// on the shape alone, so sums are the same for any number of threads.
pub const SUM_ROWS: usize = 128;

/// Partial sums of a map of `rows` pixels.
pub const fn sum_tiles(rows: usize) -> usize {
    rows.div_ceil(SUM_ROWS)
}

/// Sizes of a convolution: `[n, h, w, c]` by `[k, r, s, c]` to `[n, p, q, k]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ConvDims {
    /// Images.
    pub n: usize,
    /// Input height.
    pub h: usize,
    /// Input width.
    pub w: usize,
    /// Input channels.
    pub c: usize,
    /// Output channels.
    pub k: usize,
    /// Filter height.
    pub r: usize,
    /// Filter width.
    pub s: usize,
    /// Step between output pixels, in input pixels.
    pub stride: usize,
    /// Zeros around the (transformed) input on each side.
    pub pad: usize,
}

impl ConvDims {
    /// Output height.
    pub const fn p(&self) -> usize {
        (self.h + 2 * self.pad - self.r) / self.stride + 1
    }
    /// Output width.
    pub const fn q(&self) -> usize {
        (self.w + 2 * self.pad - self.s) / self.stride + 1
    }
    /// Pixels of the input, `n * h * w`.
    pub const fn rows_in(&self) -> usize {
        self.n * self.h * self.w
    }
    /// Pixels of the output, `n * p * q`.
    pub const fn rows_out(&self) -> usize {
        self.n * self.p() * self.q()
    }
    /// Elements of the input.
    pub const fn len_in(&self) -> usize {
        self.rows_in() * self.c
    }
    /// Elements of the output.
    pub const fn len_out(&self) -> usize {
        self.rows_out() * self.k
    }
    /// Elements of the filter.
    pub const fn len_filter(&self) -> usize {
        self.k * self.r * self.s * self.c
    }
    /// Floating-point operations of one pass (forward, backward data or backward filter), padded taps included.
    pub const fn flops(&self) -> usize {
        2 * self.rows_out() * self.k * self.r * self.s * self.c
    }
    /// Bytes that one forward pass must move at least: input, filter and output once.
    pub const fn bytes<T>(&self) -> usize {
        (self.len_in() + self.len_filter() + self.len_out()) * size_of::<T>()
    }

    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        let Self { n, h, w, c, k, r, s, stride, pad } = *self;
        require(op, [n, h, w, c, k, r, s, stride].iter().all(|&x| x > 0), || format!("an extent is zero in {self:?}"))?;
        require(op, pad < r && pad < s, || format!("padding must be smaller than the filter in {self:?}"))?;
        require(op, h + 2 * pad >= r && w + 2 * pad >= s, || format!("the filter exceeds the padded input in {self:?}"))
    }
}

/// The gradient of an operation's output, as its consumer loads it.
#[derive(Debug)]
pub enum Grad<'a, M: Memory, T: Element> {
    /// The gradient itself.
    Plain(View<'a, M, T>),
    /// `a * dz + b * x + c` per channel: the backward pass of the batch normalisation that followed, still to be applied.
    Affine(Affine<'a, M, T>),
}

/// The operand of [`Grad::Affine`].
#[derive(Debug)]
pub struct Affine<'a, M: Memory, T: Element> {
    /// Gradient behind the ReLU's mask, of the normalised value.
    pub dz: View<'a, M, T>,
    /// The raw value that was normalised.
    pub x: View<'a, M, T>,
    /// `[3, c]`: a, b, c of [`crate::bn_finalize`].
    pub coef: View<'a, M, T::Wide>,
}

impl<M: Memory, T: Element> Clone for Addend<'_, M, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<M: Memory, T: Element> Copy for Addend<'_, M, T> {}
impl<M: Memory, T: Element> Clone for Affine<'_, M, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<M: Memory, T: Element> Copy for Affine<'_, M, T> {}
impl<M: Memory, T: Element> Clone for Grad<'_, M, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<M: Memory, T: Element> Copy for Grad<'_, M, T> {}

impl<M: Memory, T: Element> Grad<'_, M, T> {
    pub(crate) fn check(&self, op: &'static str, rows: usize, channels: usize) -> Result<()> {
        match self {
            Grad::Plain(dy) => expect_len(op, "dy", dy.len(), rows * channels),
            Grad::Affine(affine) => affine.check(op, rows, channels),
        }
    }
}

impl<M: Memory, T: Element> Affine<'_, M, T> {
    pub(crate) fn check(&self, op: &'static str, rows: usize, channels: usize) -> Result<()> {
        expect_len(op, "dz", self.dz.len(), rows * channels)?;
        expect_len(op, "x (of the affine gradient)", self.x.len(), rows * channels)?;
        expect_len(op, "coef", self.coef.len(), 3 * channels)
    }
}

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
    /// `[sum_tiles(n * p * q), 2, k]`: mean, and sum of squared deviations from that mean, of `y` *as stored*, over each
    /// tile of [`SUM_ROWS`] rows.
    pub stats: Option<ViewMut<'a, M, T::Wide>>,
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
    /// `[sum_tiles(n * h * w), 2, c]`: sum of `dz` and of `dz * xhat`, `xhat = (x - mean) * rstd`, `dz` as stored.
    pub sums: ViewMut<'a, M, T::Wide>,
}

/// A gradient on every `stride`-th pixel of every `stride`-th row, zero elsewhere: what a 1x1 projection sends back.
#[derive(Debug)]
pub struct Addend<'a, M: Memory, T: Element> {
    /// `[n, ceil(h / stride), ceil(w / stride), c]`.
    pub values: View<'a, M, T>,
    /// Distance of the pixels that have one.
    pub stride: usize,
}

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
            expect_len(OP, "stats", stats.len(), sum_tiles(d.rows_out()) * 2 * d.k)?;
        }
        Ok(())
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
        expect_len(OP, "sums", self.sums.len(), sum_tiles(d.rows_in()) * 2 * d.c)?;
        if let Some(addend) = &self.addend {
            require(OP, addend.stride > 0, || "the addend's stride is zero".into())?;
            let pixels = d.n * d.h.div_ceil(addend.stride) * d.w.div_ceil(addend.stride);
            expect_len(OP, "addend", addend.values.len(), pixels * d.c)?;
        }
        Ok(())
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
}

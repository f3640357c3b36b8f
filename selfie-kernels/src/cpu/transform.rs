//! The per-channel maps that ride along with loads, each written once, so that forward pass, mask and filter gradient
//! see the same bits.

use super::lanes::{Block, Place, map};
use crate::{Affine, Cpu, Element, Wide};

/// `scale * x + shift`, rounded once: batch normalisation with its statistics folded in.
#[inline(always)]
pub(crate) fn normalize<W: Wide>(x: W, scale: W, shift: W) -> W {
    scale.mul_add(x, shift)
}

/// The gradient of ReLU at `z`: a NaN lets it pass, as in PyTorch.
#[inline(always)]
pub(crate) fn relu_grad<W: Wide>(z: W, gradient: W) -> W {
    if z <= W::zero() { W::zero() } else { gradient }
}

/// `a * dz + b * x + c`: the gradient of batch normalisation, (a, b, c) of [`crate::bn_finalize`].
#[inline(always)]
pub(crate) fn affine_grad<W: Wide>(dz: W, x: W, a: W, b: W, c: W) -> W {
    a.mul_add(dz, b.mul_add(x, c))
}

/// A gradient `[pixels, c]` that is formed while it is loaded: one implementation for each case of
/// [`crate::Grad`], so that the choice is made once, outside the loops.
pub(crate) trait GradRows<T: Element>: Copy + Sync {
    /// A block of channels of a pixel's gradient; beyond the last one the values have no meaning.
    fn block(&self, pixel: usize, at: impl Place) -> Block<T::Wide>;
}

/// [`crate::Grad::Plain`].
#[derive(Clone, Copy)]
pub(crate) struct PlainRows<'a, T> {
    /// `[pixels, c]`.
    pub(crate) dy: &'a [T],
    /// Channels.
    pub(crate) c: usize,
}

impl<T: Element> GradRows<T> for PlainRows<'_, T> {
    #[inline(always)]
    fn block(&self, pixel: usize, at: impl Place) -> Block<T::Wide> {
        at.load(&self.dy[pixel * self.c..][..self.c])
    }
}

/// [`crate::Grad::Affine`].
#[derive(Clone, Copy)]
pub(crate) struct AffineRows<'a, T: Element> {
    affine: Affine<'a, Cpu, T>,
    c: usize,
}

impl<'a, T: Element> AffineRows<'a, T> {
    /// Lengths as [`Affine::check`] wants them.
    pub(crate) fn new(affine: Affine<'a, Cpu, T>, c: usize) -> Self {
        Self { affine, c }
    }
}

impl<T: Element> GradRows<T> for AffineRows<'_, T> {
    #[inline(always)]
    fn block(&self, pixel: usize, at: impl Place) -> Block<T::Wide> {
        let Self { affine: Affine { dz, x, coef }, c: n } = *self;
        let (dz, x) = (at.load(&dz[pixel * n..][..n]), at.load(&x[pixel * n..][..n]));
        let (a, b, c) = (at.load(&coef[..n]), at.load(&coef[n..2 * n]), at.load(&coef[2 * n..]));
        map!(|j| affine_grad(dz[j], x[j], a[j], b[j], c[j]))
    }
}

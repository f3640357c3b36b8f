//! A gradient as its consumer loads it: as it is, or behind a normalisation that is still to be applied.

use crate::error::{Result, expect_len};
use crate::{Cost, Element, Len, Memory, View};

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

    /// `cost` with what is read of it.
    pub(crate) fn read(&self, cost: Cost) -> Cost {
        match self {
            Grad::Plain(dy) => cost.moves::<T>(dy.len()),
            Grad::Affine(affine) => affine.read(cost),
        }
    }
}

impl<M: Memory, T: Element> Affine<'_, M, T> {
    pub(crate) fn check(&self, op: &'static str, rows: usize, channels: usize) -> Result<()> {
        expect_len(op, "dz", self.dz.len(), rows * channels)?;
        expect_len(op, "x (of the affine gradient)", self.x.len(), rows * channels)?;
        expect_len(op, "coef", self.coef.len(), 3 * channels)
    }

    /// `cost` with what is read of it.
    pub(crate) fn read(&self, cost: Cost) -> Cost {
        cost.moves::<T>(self.dz.len() + self.x.len()).moves::<T::Wide>(self.coef.len())
    }
}

//! The gradient at a block's input, written once per block: `dx = a * dz + b * x + c (+ skip)`.
//!
//! `skip` is the gradient that came round the block over its identity shortcut; a projection block has none (its
//! projection's part is in `dz` already), nor has the final norm.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

use crate::error::{Result, expect_len};
use crate::{Affine, Cost, Element, Len, Memory, View, ViewMut};

/// Arguments of [`GradJoin::grad_join`].
#[derive(Debug)]
pub struct Join<'a, M: Memory, T: Element> {
    /// Pixels.
    pub rows: usize,
    /// Channels.
    pub c: usize,
    /// Gradient of the block's first normalisation, still to be applied.
    pub affine: Affine<'a, M, T>,
    /// `[rows, c]`.
    pub skip: Option<View<'a, M, T>>,
    /// `[rows, c]`.
    pub dx: ViewMut<'a, M, T>,
}

/// The operation; see the module.
pub trait GradJoin<T: Element>: Memory {
    /// `dx = a * dz + b * x + c (+ skip)`.
    ///
    /// # Errors
    /// Lengths that do not fit.
    fn grad_join(&self, args: Join<'_, Self, T>) -> Result<()>;
}

impl<M: Memory, T: Element> Join<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "grad_join";
        self.affine.check(OP, self.rows, self.c)?;
        if let Some(skip) = &self.skip {
            expect_len(OP, "skip", skip.len(), self.rows * self.c)?;
        }
        expect_len(OP, "dx", self.dx.len(), self.rows * self.c)
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        let skip = self.skip.as_ref().map_or(0, Len::len);
        self.affine.read(Cost::of(format!("{}x{}", self.rows, self.c))).moves::<T>(skip + self.dx.len())
    }
}

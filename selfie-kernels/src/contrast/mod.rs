//! The Selfie objective: which hidden patch belongs at which hidden place, and all its gradients in one pass.
//!
//! For the hidden places l of an image: `v_l = u + e(l)`, `logits[l][j] = logit_scale * v_l . h_j` over the hidden
//! patches j of the same image, cross-entropy with the diagonal as target, mean over all rows and images. With
//! [`crate::tokens::QueryKind::Places`] every place has a vector of its own, u_l, instead of u.
//! Computed in `T::Wide` throughout. Source: Trinh, Luong, Le 2019 (arXiv 1906.02940).

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

use crate::error::{Result, expect_len, require};
use crate::tokens::PatchDims;
use crate::{Cost, Element, Len, Memory, View, ViewMut};

/// Arguments of [`Contrast::contrast`].
#[derive(Debug)]
pub struct Args<'a, M: Memory, T: Element> {
    /// Sizes.
    pub dims: PatchDims,
    /// Images that count towards loss and accuracy, the first ones; fewer than `b` only in evaluation.
    pub valid: usize,
    /// Factor of the logits.
    pub logit_scale: f64,
    /// First element of image i's u is at `i * u_stride`.
    pub u_stride: usize,
    /// `[b, q, d]` with stride: what the pooling made of the tokens that ask.
    pub u: View<'a, M, T>,
    /// `[b, n, d]`: features of all patches.
    pub h: View<'a, M, T>,
    /// `[b, n]`: the first `hidden` are the hidden patches.
    pub order: View<'a, M, u32>,
    /// As [`PatchDims::positions`] says.
    pub positions: View<'a, M, T::Wide>,
    /// `[2]`: mean loss, accuracy (the first of equal maxima counts).
    pub loss: ViewMut<'a, M, T::Wide>,
    /// What training asks for.
    pub gradients: Option<Gradients<'a, M, T>>,
}

/// Gradients of the mean loss.
#[derive(Debug)]
pub struct Gradients<'a, M: Memory, T: Element> {
    /// `[b, u_stride]`: the gradient of u where u lies, zero elsewhere.
    pub du: ViewMut<'a, M, T>,
    /// `[b, n, d]`: the rows of hidden patches are written, the others left alone.
    pub dh: ViewMut<'a, M, T>,
    /// Overwritten.
    pub dpositions: ViewMut<'a, M, T::Wide>,
}

/// The operation; see the module.
pub trait Contrast<T: Element>: Memory {
    /// Loss, accuracy, and the gradients when asked for.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn contrast(&self, args: Args<'_, Self, T>) -> Result<()>;
}

impl<M: Memory, T: Element> Args<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "contrast";
        let d = &self.dims;
        d.check(OP)?;
        require(OP, d.hidden > 0, || "no patch is hidden".into())?;
        require(OP, (1..=d.b).contains(&self.valid), || format!("{} of {} images valid", self.valid, d.b))?;
        require(OP, self.gradients.is_none() || self.valid == d.b, || "gradients of a padded batch".into())?;
        let width = d.q() * d.d;
        require(OP, self.u_stride >= width && self.u.len() >= (d.b - 1) * self.u_stride + width, || {
            format!("u has {} elements with stride {}, too few for {d:?}", self.u.len(), self.u_stride)
        })?;
        expect_len(OP, "h", self.h.len(), d.len_h())?;
        expect_len(OP, "order", self.order.len(), d.b * d.n())?;
        expect_len(OP, "positions", self.positions.len(), d.len_positions())?;
        expect_len(OP, "loss", self.loss.len(), 2)?;
        if let Some(gradients) = &self.gradients {
            expect_len(OP, "du", gradients.du.len(), d.b * self.u_stride)?;
            expect_len(OP, "dh", gradients.dh.len(), d.len_h())?;
            expect_len(OP, "dpositions", gradients.dpositions.len(), d.len_positions())?;
        }
        Ok(())
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        let d = &self.dims;
        let (asked, keys) = (d.b * d.q() * d.d, d.b * d.hidden * d.d);
        // Logits; in training the gradients of queries and of keys.
        let cost = Cost::of(d).moves::<u32>(d.b * d.hidden).moves::<T::Wide>(self.positions.len() + self.loss.len());
        match &self.gradients {
            None => cost.products(keys * d.hidden).moves::<T>(asked + keys),
            Some(gradients) => cost
                .products(3 * keys * d.hidden)
                .moves::<T>(asked + keys + gradients.du.len() + keys)
                .moves::<T::Wide>(gradients.dpositions.len()),
        }
    }
}

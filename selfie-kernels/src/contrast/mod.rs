//! The Selfie objective: which hidden patch belongs at which hidden place, and all its gradients in one pass.
//!
//! For the hidden places l of an image: `v_l = u + e(l)`, `logits[l][j] = logit_scale * v_l . h_j` over the hidden
//! patches j of the same image, cross-entropy with the diagonal as target, mean over all rows and images. With
//! [`crate::tokens::QueryKind::Places`] every place has a vector of its own, u_l, instead of u.
//! Computed in `T::Wide` throughout. Source: Trinh, Luong, Le 2019 (arXiv 1906.02940).
//!
//! With negatives from the other images of the batch ([`Contrast::contrast_units`]): `logits[l][j] = v_l . h_j / (|v_l| |h_j| t)`
//! over the hidden patches j of all images, at a temperature t. The products are those of [`crate::gemm`], the cross-entropy is
//! [`crate::softmax_cross_entropy`]; here are the unit vectors before them and the gradients behind. Source: Chen et al. 2020
//! (SimCLR, arXiv 2002.05709).

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

/// Arguments of [`Contrast::contrast_units`]. Rows are the hidden places of all images, in their order.
#[derive(Debug)]
pub struct Units<'a, M: Memory, T: Element> {
    /// Sizes.
    pub dims: PatchDims,
    /// Divides the logits.
    pub temperature: f64,
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
    /// `[b * hidden, d]`: `v / (|v| t)`.
    pub queries: ViewMut<'a, M, T>,
    /// `[b * hidden, d]`: `h / |h|`.
    pub keys: ViewMut<'a, M, T>,
    /// `[b * hidden, 2]`: `1 / |v|`, `1 / |h|`.
    pub norms: ViewMut<'a, M, T::Wide>,
}

/// Arguments of [`Contrast::contrast_units_backward`].
#[derive(Debug)]
pub struct UnitsBackward<'a, M: Memory, T: Element> {
    /// Sizes.
    pub dims: PatchDims,
    /// The forward pass's, as the next five.
    pub temperature: f64,
    /// From one image's u to the next, in `du`.
    pub u_stride: usize,
    /// `[b, n]`.
    pub order: View<'a, M, u32>,
    /// `[b * hidden, d]`.
    pub queries: View<'a, M, T>,
    /// `[b * hidden, d]`.
    pub keys: View<'a, M, T>,
    /// `[b * hidden, 2]`.
    pub norms: View<'a, M, T::Wide>,
    /// `[b * hidden, d]`: gradient of `queries`.
    pub dqueries: View<'a, M, T>,
    /// `[b * hidden, d]`: gradient of `keys`.
    pub dkeys: View<'a, M, T::Wide>,
    /// `[b * hidden]`: scratch.
    pub along: ViewMut<'a, M, T::Wide>,
    /// What is made of these, as [`Gradients`] says.
    pub gradients: Gradients<'a, M, T>,
}

/// The operation; see the module.
pub trait Contrast<T: Element>: Memory {
    /// Loss, accuracy, and the gradients when asked for.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn contrast(&self, args: Args<'_, Self, T>) -> Result<()>;
    /// Unit vectors of what asks and of what is asked for. A vector of zeros has no direction: it stays one, its reciprocal
    /// norm is 0, and it gets no gradient.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn contrast_units(&self, args: Units<'_, Self, T>) -> Result<()>;
    /// `dv = (dq - t^2 (dq . q) q) / (|v| t)` for the query q, `dh = (dk - (dk . k) k) / |h|` for the key k, and the sums of the
    /// former for u and the positions.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn contrast_units_backward(&self, args: UnitsBackward<'_, Self, T>) -> Result<()>;
}

/// Elements that u must at least have.
fn len_u(d: &PatchDims, u_stride: usize) -> usize {
    (d.b - 1) * u_stride + d.q() * d.d
}

impl<M: Memory, T: Element> Gradients<'_, M, T> {
    fn check(&self, op: &'static str, d: &PatchDims, u_stride: usize) -> Result<()> {
        expect_len(op, "du", self.du.len(), d.b * u_stride)?;
        expect_len(op, "dh", self.dh.len(), d.len_h())?;
        expect_len(op, "dpositions", self.dpositions.len(), d.len_positions())
    }
}

impl<M: Memory, T: Element> Units<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "contrast_units";
        let d = &self.dims;
        check_sizes(OP, d, self.temperature, self.u_stride)?;
        require(OP, self.u.len() >= len_u(d, self.u_stride), || {
            format!("u has {} elements with stride {}, too few for {d:?}", self.u.len(), self.u_stride)
        })?;
        let rows = d.b * d.hidden;
        expect_len(OP, "h", self.h.len(), d.len_h())?;
        expect_len(OP, "order", self.order.len(), d.b * d.n())?;
        expect_len(OP, "positions", self.positions.len(), d.len_positions())?;
        expect_len(OP, "queries", self.queries.len(), rows * d.d)?;
        expect_len(OP, "keys", self.keys.len(), rows * d.d)?;
        expect_len(OP, "norms", self.norms.len(), 2 * rows)
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        let d = &self.dims;
        Cost::of(d)
            .moves::<T>(d.b * d.q() * d.d + 2 * self.keys.len() + self.queries.len())
            .moves::<u32>(d.b * d.hidden)
            .moves::<T::Wide>(self.positions.len() + self.norms.len())
    }
}

impl<M: Memory, T: Element> UnitsBackward<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "contrast_units_backward";
        let d = &self.dims;
        check_sizes(OP, d, self.temperature, self.u_stride)?;
        let rows = d.b * d.hidden;
        expect_len(OP, "order", self.order.len(), d.b * d.n())?;
        expect_len(OP, "queries", self.queries.len(), rows * d.d)?;
        expect_len(OP, "keys", self.keys.len(), rows * d.d)?;
        expect_len(OP, "norms", self.norms.len(), 2 * rows)?;
        expect_len(OP, "dqueries", self.dqueries.len(), rows * d.d)?;
        expect_len(OP, "dkeys", self.dkeys.len(), rows * d.d)?;
        expect_len(OP, "along", self.along.len(), rows)?;
        self.gradients.check(OP, d, self.u_stride)
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        let d = &self.dims;
        let gradients = &self.gradients;
        Cost::of(d)
            .moves::<T>(3 * self.queries.len() + gradients.du.len() + self.keys.len())
            .moves::<u32>(d.b * d.hidden)
            .moves::<T::Wide>(self.dkeys.len() + self.norms.len() + gradients.dpositions.len())
    }
}

fn check_sizes(op: &'static str, d: &PatchDims, temperature: f64, u_stride: usize) -> Result<()> {
    d.check(op)?;
    require(op, d.hidden > 0, || "no patch is hidden".into())?;
    require(op, temperature > 0.0 && temperature.is_finite(), || format!("a temperature of {temperature}"))?;
    require(op, u_stride >= d.q() * d.d, || format!("rows of u overlap with stride {u_stride} in {d:?}"))
}

impl<M: Memory, T: Element> Args<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "contrast";
        let d = &self.dims;
        d.check(OP)?;
        require(OP, d.hidden > 0, || "no patch is hidden".into())?;
        require(OP, (1..=d.b).contains(&self.valid), || format!("{} of {} images valid", self.valid, d.b))?;
        require(OP, self.gradients.is_none() || self.valid == d.b, || "gradients of a padded batch".into())?;
        require(OP, self.u_stride >= d.q() * d.d && self.u.len() >= len_u(d, self.u_stride), || {
            format!("u has {} elements with stride {}, too few for {d:?}", self.u.len(), self.u_stride)
        })?;
        expect_len(OP, "h", self.h.len(), d.len_h())?;
        expect_len(OP, "order", self.order.len(), d.b * d.n())?;
        expect_len(OP, "positions", self.positions.len(), d.len_positions())?;
        expect_len(OP, "loss", self.loss.len(), 2)?;
        match &self.gradients {
            Some(gradients) => gradients.check(OP, d, self.u_stride),
            None => Ok(()),
        }
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

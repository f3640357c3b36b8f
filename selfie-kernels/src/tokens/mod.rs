//! What the attention pooling reads: `(u0, h_1 + e_1, .., h_v + e_v)` of an image's visible patches, or the same with
//! `u0 + e(l)` for each hidden place l instead of u0. With nothing hidden, u0 sums up all patches.
//!
//! `order` holds a permutation of the patch indices of each image, the first `hidden` of which are hidden, so the
//! visible ones are `order[hidden..]`, in that order. It is drawn by the program and trusted to be a permutation: an
//! index beyond the patches is a bug of the caller (the CPU panics).

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

use crate::error::{Result, expect_len, require};
use crate::{Cost, Element, Len, Memory, View, ViewMut};
use std::fmt;

/// How the position embedding of a patch is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PositionKind {
    /// One vector for each place, `[n, d]`.
    Table,
    /// The sum of a row's and a column's vector, `[2, grid, d]` (rows, then columns), patches in row-major order.
    RowCol,
}

/// Which tokens ask for the hidden patches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QueryKind {
    /// One, u0: its output is the summary u that all hidden places share.
    Summary,
    /// One for each hidden place l, `u0 + e(l)`: its output u_l is the place's own.
    Places,
}

/// Sizes shared by [`crate::tokens`] and [`crate::contrast`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PatchDims {
    /// Images.
    pub b: usize,
    /// Patches along a side; an image has `grid * grid`.
    pub grid: usize,
    /// Hidden patches of an image, fewer than all. None only with [`QueryKind::Summary`], and not for [`crate::contrast`].
    pub hidden: usize,
    /// Features of a patch.
    pub d: usize,
    /// How positions are made.
    pub positions: PositionKind,
    /// Which tokens come first.
    pub queries: QueryKind,
}

impl PatchDims {
    /// Patches of an image.
    pub const fn n(&self) -> usize {
        self.grid * self.grid
    }
    /// Tokens of an image that ask, the first ones.
    pub const fn q(&self) -> usize {
        match self.queries {
            QueryKind::Summary => 1,
            QueryKind::Places => self.hidden,
        }
    }
    /// Tokens of an image: those that ask and the visible patches.
    pub const fn t(&self) -> usize {
        self.q() + self.n() - self.hidden
    }
    /// Elements of all patch features.
    pub const fn len_h(&self) -> usize {
        self.b * self.n() * self.d
    }
    /// Elements of the position parameters.
    pub const fn len_positions(&self) -> usize {
        match self.positions {
            PositionKind::Table => self.n() * self.d,
            PositionKind::RowCol => 2 * self.grid * self.d,
        }
    }
    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        require(op, self.b > 0 && self.grid > 0 && self.d > 0, || format!("an extent is zero in {self:?}"))?;
        require(op, self.hidden < self.n(), || {
            format!("{} of {} patches hidden: at least one must be visible", self.hidden, self.n())
        })?;
        require(op, self.q() > 0, || "queries of places, of which none is hidden".into())
    }
    fn check_positions(&self, op: &'static str, given: bool) -> Result<()> {
        require(op, given || self.queries == QueryKind::Summary, || "queries of places need positions".into())
    }
}

/// Hidden patches, all, and their features, as `4 of 16, 1024`.
impl fmt::Display for PatchDims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}, {}", self.hidden, self.n(), self.d)
    }
}

/// Arguments of [`Tokens::tokens_forward`].
#[derive(Debug)]
pub struct Forward<'a, M: Memory, T: Element> {
    /// Sizes.
    pub dims: PatchDims,
    /// `[b, n, d]`: features of all patches.
    pub h: View<'a, M, T>,
    /// `[b, n]`.
    pub order: View<'a, M, u32>,
    /// `[d]`: the learned token that asks.
    pub u0: View<'a, M, T::Wide>,
    /// Added to visible patches and to queries of places, as [`PatchDims::positions`] says; none (not with
    /// [`QueryKind::Places`]): not added.
    pub positions: Option<View<'a, M, T::Wide>>,
    /// `[b, t, d]`.
    pub x: ViewMut<'a, M, T>,
}

/// Arguments of [`Tokens::tokens_backward`].
#[derive(Debug)]
pub struct Backward<'a, M: Memory, T: Element> {
    /// Sizes.
    pub dims: PatchDims,
    /// `[b, n]`.
    pub order: View<'a, M, u32>,
    /// Gradient of `x`.
    pub dx: View<'a, M, T>,
    /// `[b, n, d]`: the rows of visible patches are written, the others left alone.
    pub dh: ViewMut<'a, M, T>,
    /// `[d]`: overwritten.
    pub du0: ViewMut<'a, M, T::Wide>,
    /// Gradient of the positions: *added to* what [`crate::contrast`] wrote; none where they were not added.
    pub dpositions_acc: Option<ViewMut<'a, M, T::Wide>>,
}

/// The operation; see the module.
pub trait Tokens<T: Element>: Memory {
    /// Gathers, adds positions, prepends the queries.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn tokens_forward(&self, args: Forward<'_, Self, T>) -> Result<()>;
    /// Scatters to visible patches, sums over the batch (images in order) for u0 and positions.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn tokens_backward(&self, args: Backward<'_, Self, T>) -> Result<()>;
}

impl<M: Memory, T: Element> Forward<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "tokens_forward";
        let d = &self.dims;
        d.check(OP)?;
        expect_len(OP, "h", self.h.len(), d.len_h())?;
        expect_len(OP, "order", self.order.len(), d.b * d.n())?;
        expect_len(OP, "u0", self.u0.len(), d.d)?;
        d.check_positions(OP, self.positions.is_some())?;
        if let Some(positions) = &self.positions {
            expect_len(OP, "positions", positions.len(), d.len_positions())?;
        }
        expect_len(OP, "x", self.x.len(), d.b * d.t() * d.d)
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        let d = &self.dims;
        let visible = d.b * (d.n() - d.hidden) * d.d;
        Cost::of(d)
            .moves::<T>(visible + self.x.len())
            .moves::<u32>(self.order.len())
            .moves::<T::Wide>(self.u0.len() + self.positions.as_ref().map_or(0, Len::len))
    }
}

impl<M: Memory, T: Element> Backward<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "tokens_backward";
        let d = &self.dims;
        d.check(OP)?;
        expect_len(OP, "order", self.order.len(), d.b * d.n())?;
        expect_len(OP, "dx", self.dx.len(), d.b * d.t() * d.d)?;
        expect_len(OP, "dh", self.dh.len(), d.len_h())?;
        expect_len(OP, "du0", self.du0.len(), d.d)?;
        d.check_positions(OP, self.dpositions_acc.is_some())?;
        match &self.dpositions_acc {
            Some(positions) => expect_len(OP, "dpositions_acc", positions.len(), d.len_positions()),
            None => Ok(()),
        }
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        let d = &self.dims;
        let visible = d.b * (d.n() - d.hidden) * d.d;
        Cost::of(d)
            .moves::<T>(self.dx.len() + visible)
            .moves::<u32>(self.order.len())
            .moves::<T::Wide>(self.du0.len() + 2 * self.dpositions_acc.as_ref().map_or(0, Len::len))
    }
}

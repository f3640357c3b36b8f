//! Multi-head scaled dot-product attention over short sequences, with dropout on the weights.
//!
//! `out = dropout(softmax(q k^T / sqrt(d))) v` per image and head (Vaswani et al. 2017). The weights are recomputed in
//! the backward pass, so nothing but q, k, v is kept.
//!
//! A device may round the weights, behind the dropout, and the gradients of the scores to `T` where they are operands of
//! products; the softmax and its gradient are taken in `T::Wide`.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

use crate::error::{Result, expect_len, require};
use crate::{Cost, Dropout, Element, Len, Memory, View, ViewMut};
use std::fmt;

/// Sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AttentionDims {
    /// Images.
    pub b: usize,
    /// Query tokens of an image: all, or 1 where only the first token's output is read. At most [`MAX_TOKENS`].
    pub t_query: usize,
    /// Key and value tokens of an image, at most [`MAX_TOKENS`].
    pub t: usize,
    /// Heads.
    pub heads: usize,
    /// Size of a head.
    pub d: usize,
}

/// The longest sequence that is supported: whole weight rows are held on chip.
pub const MAX_TOKENS: usize = 1024;

impl AttentionDims {
    /// Elements of q, of the output and of their gradients: `[b, t_query, heads, d]`.
    pub const fn len_query(&self) -> usize {
        self.b * self.t_query * self.heads * self.d
    }
    /// Elements of keys and values: `[b, t, 2, heads, d]`.
    pub const fn len_kv(&self) -> usize {
        self.b * self.t * 2 * self.heads * self.d
    }
    /// Floating-point operations of the forward pass's two products.
    pub const fn flops(&self) -> usize {
        4 * self.b * self.heads * self.t_query * self.t * self.d
    }
    fn check(&self, op: &'static str) -> Result<()> {
        let Self { b, t_query, t, heads, d } = *self;
        require(op, [b, t_query, t, heads, d].iter().all(|&x| x > 0), || format!("an extent is zero in {self:?}"))?;
        let most = t.max(t_query);
        require(op, most <= MAX_TOKENS, || format!("{most} tokens, at most {MAX_TOKENS}"))
    }
}

/// Heads, their size, queries and keys, as `32 of 64, 1x13`.
impl fmt::Display for AttentionDims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { t_query, t, heads, d, .. } = self;
        write!(f, "{heads} of {d}, {t_query}x{t}")
    }
}

/// Arguments of [`Attention::attention_forward`].
#[derive(Debug)]
pub struct Forward<'a, M: Memory, T: Element> {
    /// Sizes.
    pub dims: AttentionDims,
    /// `[b, t_query, heads, d]`.
    pub q: View<'a, M, T>,
    /// `[b, t, 2, heads, d]`: keys, values.
    pub kv: View<'a, M, T>,
    /// On the weights; element `(head * t_query + query) * t + key`.
    pub dropout: Option<Dropout<'a, M>>,
    /// `[b, t_query, heads, d]`.
    pub out: ViewMut<'a, M, T>,
}

/// Arguments of [`Attention::attention_backward`].
#[derive(Debug)]
pub struct Backward<'a, M: Memory, T: Element> {
    /// Sizes.
    pub dims: AttentionDims,
    /// The forward pass's.
    pub q: View<'a, M, T>,
    /// The forward pass's.
    pub kv: View<'a, M, T>,
    /// The forward pass's.
    pub dropout: Option<Dropout<'a, M>>,
    /// Gradient of the output.
    pub dout: View<'a, M, T>,
    /// As q.
    pub dq: ViewMut<'a, M, T>,
    /// As kv.
    pub dkv: ViewMut<'a, M, T>,
}

/// The operation; see the module.
pub trait Attention<T: Element>: Memory {
    /// `out = dropout(softmax(q k^T / sqrt(d))) v`.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn attention_forward(&self, args: Forward<'_, Self, T>) -> Result<()>;
    /// Gradients of q, k and v.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn attention_backward(&self, args: Backward<'_, Self, T>) -> Result<()>;
}

impl<M: Memory, T: Element> Forward<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "attention_forward";
        let d = &self.dims;
        d.check(OP)?;
        expect_len(OP, "q", self.q.len(), d.len_query())?;
        expect_len(OP, "kv", self.kv.len(), d.len_kv())?;
        self.dropout.as_ref().map_or(Ok(()), |dropout| dropout.check(OP))?;
        expect_len(OP, "out", self.out.len(), d.len_query())
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        let moved = self.q.len() + self.kv.len() + self.out.len();
        Cost::of(self.dims).products(self.dims.flops() / 2).moves::<T>(moved)
    }
}

impl<M: Memory, T: Element> Backward<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "attention_backward";
        let d = &self.dims;
        d.check(OP)?;
        expect_len(OP, "q", self.q.len(), d.len_query())?;
        expect_len(OP, "kv", self.kv.len(), d.len_kv())?;
        self.dropout.as_ref().map_or(Ok(()), |dropout| dropout.check(OP))?;
        expect_len(OP, "dout", self.dout.len(), d.len_query())?;
        expect_len(OP, "dq", self.dq.len(), d.len_query())?;
        expect_len(OP, "dkv", self.dkv.len(), d.len_kv())
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        // The weights, which are not kept, and the gradients of weights, values, queries and keys: a product each.
        let read = self.q.len() + self.kv.len() + self.dout.len();
        Cost::of(self.dims).products(5 * self.dims.flops() / 4).moves::<T>(read + self.dq.len() + self.dkv.len())
    }
}

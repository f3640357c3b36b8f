//! Sizes that every convolution shares.

use crate::error::{Result, require};
use std::fmt;

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
    /// Multiplications, each with an addition, of one pass, without taps into the padding.
    pub(crate) fn pairs(&self) -> usize {
        let taps = |extent: usize, filter: usize, outputs: usize| -> usize {
            let inside = |at: usize| filter.min(extent + self.pad - at).saturating_sub(self.pad.saturating_sub(at));
            (0..outputs).map(|output| inside(output * self.stride)).sum()
        };
        self.n * taps(self.h, self.r, self.p()) * taps(self.w, self.s, self.q()) * self.k * self.c
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

/// Filter, channels and output, as `3x3/2 64->128 at 14x14` with stride 2.
impl fmt::Display for ConvDims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { c, k, r, s, stride, .. } = self;
        let step = if *stride > 1 { format!("/{stride}") } else { String::new() };
        write!(f, "{r}x{s}{step} {c}->{k} at {}x{}", self.p(), self.q())
    }
}

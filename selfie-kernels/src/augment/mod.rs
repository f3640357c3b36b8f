//! Bytes to numbers: crop, flip, `(x / 255 - mean) / std`, and the cut into patches, in one pass.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

use crate::error::{Result, expect_len, require};
use crate::{Cost, Element, Len, Memory, View, ViewMut, Wide};
use std::fmt;

/// Sizes: bytes `[n, h, w, 3]` to numbers `[n * grid * grid, patch, patch, 3]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AugmentDims {
    /// Images.
    pub n: usize,
    /// Height of an image as loaded.
    pub h: usize,
    /// Width of an image as loaded.
    pub w: usize,
    /// Patches along a side; 1 for the whole image. Patches are in row-major order.
    pub grid: usize,
    /// Side of a patch in pixels; the crop is `grid * patch` square.
    pub patch: usize,
}

impl AugmentDims {
    /// Elements of the result.
    pub const fn len_out(&self) -> usize {
        self.n * self.grid * self.grid * self.patch * self.patch * 3
    }
}

/// Patches, as `16 of 8x8`; whole images, as `32x32`.
impl fmt::Display for AugmentDims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.grid {
            1 => write!(f, "{0}x{0}", self.patch),
            grid => write!(f, "{} of {1}x{1}", grid * grid, self.patch),
        }
    }
}

/// Arguments of [`Augment::augment`].
#[derive(Debug)]
pub struct Args<'a, M: Memory, T: Element> {
    /// Sizes.
    pub dims: AugmentDims,
    /// `[n, h, w, 3]`, RGB.
    pub images: View<'a, M, u8>,
    /// `[n, 3]`: row and column of the crop's upper left corner in the image (negative or beyond: black, byte 0), and
    /// whether the crop is mirrored (0 or 1).
    pub draws: View<'a, M, i32>,
    /// Of each channel, after division by 255.
    pub mean: [f64; 3],
    /// Of each channel, after division by 255.
    pub std: [f64; 3],
    /// `[n * grid * grid, patch, patch, 3]`.
    pub x: ViewMut<'a, M, T>,
}

/// A byte has 256 values: each normalised, exactly rounded, for each channel. What every device looks up.
pub(crate) fn byte_table<T: Element>(mean: [f64; 3], std: [f64; 3]) -> [[T; 3]; 256] {
    std::array::from_fn(|byte| {
        std::array::from_fn(|k| T::narrow(T::Wide::from_f64((byte as f64 / 255.0 - mean[k]) / std[k])))
    })
}

/// The operation; see the module.
pub trait Augment<T: Element>: Memory {
    /// Crop, flip, normalise, cut.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn augment(&self, args: Args<'_, Self, T>) -> Result<()>;
}

impl<M: Memory, T: Element> Args<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "augment";
        let d = &self.dims;
        require(OP, d.len_out() > 0 && d.h > 0 && d.w > 0, || format!("an extent is zero in {d:?}"))?;
        require(OP, self.std.iter().all(|&s| s > 0.0), || format!("std must be positive, got {:?}", self.std))?;
        expect_len(OP, "images", self.images.len(), d.n * d.h * d.w * 3)?;
        expect_len(OP, "draws", self.draws.len(), d.n * 3)?;
        expect_len(OP, "x", self.x.len(), d.len_out())
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        let d = &self.dims;
        Cost::of(d).moves::<u8>(d.len_out()).moves::<i32>(self.draws.len()).moves::<T>(d.len_out())
    }
}

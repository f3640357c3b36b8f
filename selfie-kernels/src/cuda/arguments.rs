//! Pieces that the kernels' structures have in common.

use super::driver::Address;
use super::{Cuda, Grid, TICKETS};
use crate::{Dropout, Error, Result};

/// `Dropout` of `device.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::NoUninit)]
pub(crate) struct DropoutArgs {
    rng: Address,
    purpose: u32,
    rate: f32,
    factor: f32,
    unused: u32,
}

impl From<Option<Dropout<'_, Cuda>>> for DropoutArgs {
    fn from(dropout: Option<Dropout<'_, Cuda>>) -> Self {
        let none = Self { rng: Address::NONE, purpose: 0, rate: 0.0, factor: 1.0, unused: 0 };
        // A rate of zero draws in vain.
        dropout.filter(|dropout| dropout.rate > 0.0).map_or(none, |dropout| Self {
            purpose: dropout.purpose(),
            rate: dropout.rate,
            factor: dropout.factor() as f32,
            rng: dropout.rng.into(),
            unused: 0,
        })
    }
}

/// As kernels' 32-bit numbers.
///
/// # Errors
/// [`Error::Launch`] for what they cannot count to.
pub(crate) fn narrow(value: usize) -> Result<i32> {
    let most = i32::MAX;
    let reason = || format!("{value} is more than the {most} that kernels count to; a smaller batch has less");
    i32::try_from(value).map_err(|_| Error::Launch { kernel: "arguments".into(), reason: reason() })
}

/// `Access` of `chunks.h`: how a kernel may access rows.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::NoUninit)]
pub(crate) enum Access {
    /// Element by element.
    Elements = 0,
    /// In chunks of eight, each aligned to 16 bytes.
    Chunks = 1,
}

impl Access {
    /// To rows of these lengths and distances, at these places (missing ones do not matter).
    pub(crate) fn of(lens: impl IntoIterator<Item = usize>, places: impl IntoIterator<Item = Address>) -> Self {
        let whole = lens.into_iter().all(|len| len.is_multiple_of(8));
        if whole && places.into_iter().all(Address::is_aligned) { Self::Chunks } else { Self::Elements }
    }
}

/// How sums over rows, one for each column, are cut: blocks of 256 threads take [`ColumnSums::COLUMNS`] columns of a part of
/// the rows, columns fastest; whichever block is the last of its columns adds up the parts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ColumnSums {
    /// Rows of a part.
    pub(crate) rows: usize,
    /// The blocks.
    pub(crate) grid: Grid,
    /// Where the parts' sums lie.
    pub(crate) parts: Address,
}

impl ColumnSums {
    const COLUMNS: usize = 32;

    /// For `rows` by `columns`, `sums` of each column, which end up at `totals`.
    pub(crate) fn plan(cuda: &Cuda, [rows, columns]: [usize; 2], sums: usize, totals: Address) -> Self {
        // Less would cost more in partial sums than it brings.
        const ROWS: usize = 64;
        let blocks = columns.div_ceil(Self::COLUMNS);
        let room = cuda.workspace_bytes() / (columns * sums * size_of::<f32>());
        let wanted = (4 * cuda.facts().multiprocessors).div_ceil(blocks).min(rows.div_ceil(ROWS)).min(room).max(1);
        let wanted = if blocks > TICKETS { 1 } else { wanted };
        let part = rows.div_ceil(wanted);
        let parts = rows.div_ceil(part);
        Self {
            rows: part,
            grid: Grid::line(blocks * parts, 256),
            parts: if parts == 1 { totals } else { cuda.workspace() },
        }
    }
}

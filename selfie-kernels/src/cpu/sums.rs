//! Per-channel sums over one tile of [`crate::partials::SUM_ROWS`] rows, in the order of the rows: what
//! [`crate::bn_finalize`] merges. To be called inside [`super::vectorize`].

use super::lanes::{Block, LANES, Place, blocks, map};
use crate::{Element, Wide};
use num_traits::{Float, Zero};

/// Mean, and sum of squared deviations from that mean, of a tile `[rows, c]`; `stats` is `[2, c]`.
///
/// Two passes, the first over deviations from the first row: no digits are lost where |mean| is far above the spread.
/// Those sums grow with the first row's own deviation, so the second pass corrects the mean by what is left (without it a
/// small mean of the stem's output was 20 times further from f64 than PyTorch's).
#[inline(always)]
pub(crate) fn tile_stats<T: Element>(tile: &[T], c: usize, stats: &mut [T::Wide]) {
    let rows = T::Wide::from_f64((tile.len() / c) as f64);
    let (means, squares) = stats.split_at_mut(c);
    blocks!(c, |at| {
        let first = at.load(&tile[..c]);
        let mut sum = [T::Wide::zero(); LANES];
        for row in tile.chunks_exact(c).skip(1) {
            let row = at.load(row);
            sum = map!(|j| sum[j] + (row[j] - first[j]));
        }
        let mean = map!(|j| first[j] + sum[j] / rows);
        let (mut rest, mut square) = ([T::Wide::zero(); LANES], [T::Wide::zero(); LANES]);
        for row in tile.chunks_exact(c) {
            let row = at.load(row);
            rest = map!(|j| rest[j] + (row[j] - mean[j]));
            square = map!(|j| (row[j] - mean[j]).mul_add(row[j] - mean[j], square[j]));
        }
        let corrected = at.store(means, &map!(|j| mean[j] + rest[j] / rows));
        // Deviations from the mean as it is stored: sum (x - m - d)^2 = sum (x - m)^2 + d (rows d - 2 sum (x - m)).
        let moved = map!(|j| corrected[j] - mean[j]);
        let change = map!(|j| moved[j] * rows.mul_add(moved[j], -(rest[j] + rest[j])));
        at.store(squares, &map!(|j| (square[j] + change[j]).relu()));
    });
}

/// Adds a block of one row to sums of `dz` and of `dz * xhat`, `xhat = (x - mean) * rstd`.
#[inline(always)]
pub(crate) fn add_grad<W: Wide>(
    [sum, product]: &mut [Block<W>; 2],
    dz: &Block<W>,
    x: &Block<W>,
    mean: &Block<W>,
    rstd: &Block<W>,
) {
    *sum = map!(|j| sum[j] + dz[j]);
    *product = map!(|j| dz[j].mul_add((x[j] - mean[j]) * rstd[j], product[j]));
}

//! Features without the correlations that they have over the training images.

use super::on_threads;
use crate::error::{Error, Result};
use ndarray::linalg::general_mat_mul;
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis};
use rayon::prelude::*;

/// Rows that are widened to `f64` at a time, and columns of the covariance that are one piece of work.
const ROWS: usize = 2048;
const COLUMNS: usize = 64;

/// The least weight of the identity in the covariance, where many images leave next to none: features may be constant.
const LEAST_SHRINKAGE: f64 = 1e-6;

/// A linear map after which features have mean 0, variance 1 and no correlations, by the covariance `C` of the vectors that
/// it was fitted to: inner products become those of `C^-1`. Few directions make up most of what a network's features vary
/// by, and cosines as they are see little else. `C` is shrunk towards a multiple of the identity, the more the fewer
/// images there are to know it by, so that what is left to chance is not blown up.
///
/// Source: Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices".
#[derive(Debug, Clone)]
pub(super) struct Whitening {
    mean: Array1<f64>,
    /// `[width, width]`: the inverse of the Cholesky factor, a lower triangle.
    map: Vec<f64>,
}

impl Whitening {
    /// From `rows`, `[n, width]`, on so many threads, which do not matter to the result.
    ///
    /// # Errors
    /// Usage: lengths that do not fit, numbers that are not finite.
    pub(super) fn fit(rows: &[f32], width: usize, threads: usize) -> Result<Self> {
        let rows = matrix(rows, width)?;
        on_threads(threads, || Self::of(rows))
    }

    /// `rows`, `[m, width]`, behind the map.
    ///
    /// # Errors
    /// As [`Whitening::fit`].
    pub(super) fn apply(&self, rows: &[f32], threads: usize) -> Result<Vec<f32>> {
        let width = self.mean.len();
        let rows = matrix(rows, width)?;
        on_threads(threads, || {
            let blocks: Vec<_> = rows.axis_chunks_iter(Axis(0), ROWS).collect();
            let blocks = blocks.into_par_iter();
            let map = ArrayView2::from_shape((width, width), &self.map).expect("a square");
            let whitened = blocks.map(|rows| centred(rows, &self.mean).dot(&map.t()).mapv(|value| value as f32));
            whitened.flat_map_iter(|block| block.into_iter()).collect()
        })
    }

    fn of(rows: ArrayView2<'_, f32>) -> Self {
        let (n, width) = rows.dim();
        let mean = rows.axis_iter(Axis(0)).fold(Array1::zeros(width), |mut sum: Array1<f64>, row| {
            sum.zip_mut_with(&row, |sum, &value| *sum += f64::from(value));
            sum
        }) / n as f64;
        let mut covariance = Array2::zeros((width, width));
        let mut fourth = 0.0;
        for block in rows.axis_chunks_iter(Axis(0), ROWS) {
            let block = centred(block, &mean);
            fourth += block.rows().into_iter().map(|row| row.dot(&row).powi(2)).sum::<f64>();
            // A piece is some columns of the covariance, over all rows in their order.
            let sums = covariance.axis_chunks_iter_mut(Axis(1), COLUMNS);
            let pieces: Vec<_> = sums.zip(block.axis_chunks_iter(Axis(1), COLUMNS)).collect();
            pieces.into_par_iter().for_each(|(mut sums, columns)| {
                general_mat_mul(1.0 / n as f64, &block.t(), &columns, 1.0, &mut sums);
            });
        }
        let scale = covariance.diag().sum() / width as f64;
        if scale <= 0.0 {
            // All vectors are the same: there is nothing to whiten by.
            return Self { mean, map: Array2::eye(width).into_raw_vec_and_offset().0 };
        }
        let squares = covariance.iter().map(|value| value * value).sum::<f64>();
        // The covariance's squared distance to the multiple of the identity, and the part of it that is chance.
        let distance = squares - width as f64 * scale * scale;
        let chance = fourth / (n * n) as f64 - squares / n as f64;
        let shrinkage = if distance > 0.0 { (chance / distance).clamp(LEAST_SHRINKAGE, 1.0) } else { 1.0 };
        covariance *= 1.0 - shrinkage;
        covariance.diag_mut().map_inplace(|value| *value += shrinkage * scale);
        let factor = cholesky(covariance.into_raw_vec_and_offset().0, width);
        Self { mean, map: inverse(&factor, width) }
    }
}

fn matrix(rows: &[f32], width: usize) -> Result<ArrayView2<'_, f32>> {
    let wrong =
        || Error::usage("features", rows.len(), format!("finite numbers, {width} for each of 1 or more images"));
    if width == 0 || rows.is_empty() || !rows.len().is_multiple_of(width) || rows.iter().any(|value| !value.is_finite())
    {
        return Err(wrong());
    }
    ArrayView2::from_shape((rows.len() / width, width), rows).map_err(|_| wrong())
}

fn centred(rows: ArrayView2<'_, f32>, mean: &Array1<f64>) -> Array2<f64> {
    rows.mapv(f64::from) - mean
}

/// The lower triangle L of a positive definite matrix `L L^T`, row by row.
fn cholesky(mut matrix: Vec<f64>, width: usize) -> Vec<f64> {
    for i in 0..width {
        let (above, row) = matrix.split_at_mut(i * width);
        for (j, other) in above.chunks_exact(width).enumerate() {
            row[j] = (row[j] - dot(&row[..j], &other[..j])) / other[j];
        }
        row[i] = (row[i] - dot(&row[..i], &row[..i])).sqrt();
        row[i + 1..width].fill(0.0);
    }
    matrix
}

/// Of a lower triangle, row by row.
fn inverse(triangle: &[f64], width: usize) -> Vec<f64> {
    let mut found = vec![0.0; width * width];
    for (i, own) in triangle.chunks_exact(width).enumerate() {
        let (above, row) = found.split_at_mut(i * width);
        row[i] = 1.0;
        for (j, other) in above.chunks_exact(width).enumerate() {
            row[..=j].iter_mut().zip(other).for_each(|(value, other)| *value -= own[j] * other);
        }
        row[..=i].iter_mut().for_each(|value| *value /= own[i]);
    }
    found
}

fn dot(one: &[f64], other: &[f64]) -> f64 {
    ArrayView1::from(one).dot(&ArrayView1::from(other))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Vectors whose numbers are sums of others, of different sizes, far from 0; one number is the same in all.
    fn correlated(n: usize, width: usize) -> Vec<f32> {
        let mut state = 0x9e37_79b9u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let mut rows = Vec::with_capacity(n * width);
        for _ in 0..n {
            let own: Vec<f32> = (0..width).map(|_| next()).collect();
            rows.extend(
                (0..width).map(|j| if j == 3 { 7.0 } else { 5.0 + (1 + j % 3) as f32 * (own[j] + 0.5 * own[0]) }),
            );
        }
        rows
    }

    #[test]
    fn what_is_whitened_has_no_covariance() {
        let (n, width) = (5_000, 70);
        let rows = correlated(n, width);
        let whitening = Whitening::fit(&rows, width, 2).expect("sound");
        let white = whitening.apply(&rows, 1).expect("sound");
        let white = Array2::from_shape_vec((n, width), white).expect("as many").mapv(f64::from);
        assert!(white.mean_axis(Axis(0)).expect("rows").iter().all(|mean| mean.abs() < 1e-5));
        let covariance = white.t().dot(&white) / n as f64;
        for ((i, j), &value) in covariance.indexed_iter() {
            // The constant number stays one; the others keep what the shrinkage leaves of them.
            let expected = if i == j && i != 3 { 1.0 } else { 0.0 };
            assert!((value - expected).abs() < 0.05, "{i} {j}: {value}");
        }
    }

    #[test]
    fn shrinkage_is_the_formulas() {
        // Two numbers of four images with mean 0: (2, 0), (-2, 0), (0, 1), (0, -1): C = diag(2, 1/2), of mean 5/4.
        let rows = [2.0, 0.0, -2.0, 0.0, 0.0, 1.0, 0.0, -1.0];
        let whitening = Whitening::fit(&rows, 2, 1).expect("sound");
        // |C - 5/4|^2 = 2 (3/4)^2 = 9/8; the mean of |x x^T - C|^2 over n: (34/4 - 17/4) / 4 = 17/16: 17/18 of it.
        let shrunk = [2.0f64, 0.5].map(|own| own / 18.0 + 1.25 * 17.0 / 18.0);
        let white = whitening.apply(&[3.0, 3.0], 1).expect("sound");
        for (white, shrunk) in white.iter().zip(shrunk) {
            assert!((f64::from(*white) - 3.0 / shrunk.sqrt()).abs() < 1e-6);
        }
    }

    #[test]
    fn threads_do_not_matter_and_what_is_all_the_same_stays() {
        let rows = correlated(3_000, 130);
        let of =
            |threads| Whitening::fit(&rows, 130, threads).expect("sound").apply(&rows[..1300], threads).expect("sound");
        assert_eq!(of(1), of(3));
        let same = Whitening::fit(&[1.0, 2.0, 1.0, 2.0], 2, 1).expect("sound");
        assert_eq!(same.apply(&[1.0, 4.0], 1).expect("sound"), [0.0, 2.0]);
        let one = Whitening::fit(&[1.0, 2.0], 2, 1).expect("a single image");
        assert_eq!(one.apply(&[1.0, 2.0], 1).expect("sound"), [0.0, 0.0]);
    }

    #[test]
    fn a_triangle_and_its_inverse() {
        let triangle = ndarray::arr2(&[[2.0, 0.0, 0.0], [1.0, 3.0, 0.0], [-1.0, 0.5, 4.0]]);
        let found = cholesky(triangle.dot(&triangle.t()).into_raw_vec_and_offset().0, 3);
        assert!(found.iter().zip(&triangle).all(|(found, wanted)| (found - wanted).abs() < 1e-14), "{found:?}");
        let one = Array2::from_shape_vec((3, 3), inverse(&found, 3)).expect("nine").dot(&triangle);
        assert!(one.iter().zip(&Array2::<f64>::eye(3)).all(|(found, wanted)| (found - wanted).abs() < 1e-14), "{one}");
    }

    #[test]
    fn what_cannot_be_whitened_is_refused() {
        for (rows, width) in [(&[][..], 1), (&[1.0][..], 0), (&[1.0, 2.0, 3.0][..], 2), (&[f32::NAN][..], 1)] {
            assert!(Whitening::fit(rows, width, 1).is_err(), "{rows:?} {width}");
        }
        assert!(Whitening::fit(&[1.0, 2.0], 2, 1).expect("sound").apply(&[1.0], 1).is_err());
    }
}

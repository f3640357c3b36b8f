//! Principal components by subspace iteration with a final Rayleigh-Ritz step (Halko et al. 2011, arXiv 0909.4061).

use super::on_threads;
use crate::error::{Error, Result};
use rayon::prelude::*;
use selfie_kernels::{Philox, Purpose};

/// Directions that are followed beside those that are wanted: the more, the faster it converges.
const SPARE: usize = 6;
/// Rounds at most; where two components are all but equal, any two directions in their plane are as good.
const ROUNDS: usize = 200;
/// Largest change of a component's variance in a round at which it has converged, relative to the first's.
const CONVERGED: f64 = 1e-9;
/// Rows whose sums are one piece of work, so that threads do not matter.
const ROWS: usize = 128;

/// Coordinates of vectors along the directions of their largest variance.
#[derive(Debug, Clone, PartialEq)]
pub struct Components {
    /// `[n, count]`, each with mean 0. The sign of a direction is that of its largest number.
    pub coordinates: Vec<f64>,
    /// `[count]`: share of the whole variance, from the largest on.
    pub explained: Vec<f64>,
}

/// The first `count` principal components of `rows`, `[n, width]`, on so many threads, which do not matter to the result.
/// Components that are not there, in fewer rows or numbers than that, are 0.
///
/// # Errors
/// Usage: lengths that do not fit, numbers that are not finite.
pub fn principal_components(rows: &[f32], width: usize, count: usize, threads: usize) -> Result<Components> {
    if width == 0 || !rows.len().is_multiple_of(width) || rows.iter().any(|value| !value.is_finite()) {
        return Err(Error::usage("features", rows.len(), format!("finite numbers, {width} for each image")));
    }
    on_threads(threads, || {
        let n = rows.len() / width;
        let sums = in_pieces(rows, width, width, |row, sums| {
            sums.iter_mut().zip(row).for_each(|(sum, &value)| *sum += f64::from(value));
        });
        let mean: Vec<f64> = sums.iter().map(|sum| sum / n.max(1) as f64).collect();
        let centred: Vec<f64> =
            rows.par_chunks(width).flat_map_iter(|row| row.iter().zip(&mean).map(|(&x, m)| f64::from(x) - m)).collect();
        let whole: f64 = in_pieces(&centred, width, 1, |row, sum| sum[0] += row.iter().map(|x| x * x).sum::<f64>())[0];
        let (directions, variances) = directions(&centred, width, count);
        let along = |row: &[f64]| directions.iter().map(|direction| dot(row, direction)).collect::<Vec<_>>();
        let coordinates = centred.par_chunks(width).flat_map_iter(|row| {
            let mut all = along(row);
            all.resize(count, 0.0);
            all
        });
        let coordinates = coordinates.collect();
        let mut explained: Vec<f64> =
            variances.iter().map(|variance| if whole > 0.0 { variance / whole } else { 0.0 }).collect();
        explained.resize(count, 0.0);
        Components { coordinates, explained }
    })
}

/// Sums over rows, those of each piece by one thread, and the pieces in their order.
fn in_pieces<S: Sync>(rows: &[S], width: usize, len: usize, add: impl Fn(&[S], &mut [f64]) + Sync) -> Vec<f64> {
    let pieces: Vec<Vec<f64>> = rows
        .par_chunks(ROWS * width)
        .map(|piece| {
            let mut sums = vec![0.0; len];
            piece.chunks(width).for_each(|row| add(row, &mut sums));
            sums
        })
        .collect();
    let mut whole = vec![0.0; len];
    pieces.iter().for_each(|piece| whole.iter_mut().zip(piece).for_each(|(whole, part)| *whole += part));
    whole
}

/// Directions of the largest sums of squares, and these sums, from the largest on.
fn directions(rows: &[f64], width: usize, count: usize) -> (Vec<Vec<f64>>, Vec<f64>) {
    let followed = (count + SPARE).min(width).min(rows.len() / width);
    let random = |i: usize, j: usize| {
        let word = Philox { seed: 0 }.words(Purpose::Synthetic as u32, i as u64, j as u32)[0];
        f64::from(Philox::unit(word)) - 0.5
    };
    let mut basis: Vec<Vec<f64>> = (0..followed).map(|i| (0..width).map(|j| random(i, j)).collect()).collect();
    orthonormalise(&mut basis);
    let mut before = Vec::new();
    for _ in 0..ROUNDS {
        let b = basis.len();
        // The rows' inner products with the basis, summed up: the covariance's product with the basis, and its part in it.
        let sums = in_pieces(rows, width, b * width + b * b, |row, sums| {
            let along: Vec<f64> = basis.iter().map(|direction| dot(row, direction)).collect();
            let (images, inner) = sums.split_at_mut(b * width);
            for (i, &x) in along.iter().enumerate() {
                images[i * width..][..width].iter_mut().zip(row).for_each(|(sum, value)| *sum += x * value);
                inner[i * b..][..b].iter_mut().zip(&along).for_each(|(sum, y)| *sum += x * y);
            }
        });
        let (images, inner) = sums.split_at(b * width);
        let (variances, turns) = eigen(inner, b);
        // The basis turned onto the components, and its image under the covariance.
        let turned = |vectors: &dyn Fn(usize) -> Vec<f64>| -> Vec<Vec<f64>> {
            let turn = |turn: &Vec<f64>| {
                let mut sum = vec![0.0; width];
                for (i, &part) in turn.iter().enumerate() {
                    sum.iter_mut().zip(vectors(i)).for_each(|(sum, value)| *sum += part * value);
                }
                sum
            };
            turns.iter().map(turn).collect()
        };
        let close = |(now, before): (&f64, &f64)| (now - before).abs() <= CONVERGED * variances[0];
        let wanted = count.min(b);
        let has_converged = before.len() == b && variances.iter().zip(&before).take(wanted).all(close);
        if has_converged || b == width {
            basis = turned(&|i| basis[i].clone());
            before = variances;
            break;
        }
        basis = turned(&|i| images[i * width..][..width].to_vec());
        orthonormalise(&mut basis);
        before = variances;
    }
    basis.truncate(count);
    before.truncate(basis.len());
    for direction in &mut basis {
        let largest = direction.iter().fold(0.0, |most: f64, &x| if x.abs() > most.abs() { x } else { most });
        direction.iter_mut().for_each(|x| *x *= if largest < 0.0 { -1.0 } else { 1.0 });
    }
    (basis, before)
}

/// Makes vectors orthogonal and of length 1 (Gram and Schmidt, twice); those that depend on others are left out.
fn orthonormalise(vectors: &mut Vec<Vec<f64>>) {
    let mut done: Vec<Vec<f64>> = Vec::new();
    for mut vector in vectors.drain(..) {
        let before = dot(&vector, &vector).sqrt();
        for _ in 0..2 {
            for other in &done {
                let along = dot(&vector, other);
                vector.iter_mut().zip(other).for_each(|(x, y)| *x -= along * y);
            }
        }
        let length = dot(&vector, &vector).sqrt();
        if length > 1e-12 * before && length > 0.0 {
            vector.iter_mut().for_each(|x| *x /= length);
            done.push(vector);
        }
    }
    *vectors = done;
}

/// Eigenvalues of a symmetric matrix, from the largest on, with their vectors: Jacobi's rotations.
fn eigen(matrix: &[f64], n: usize) -> (Vec<f64>, Vec<Vec<f64>>) {
    let mut a: Vec<Vec<f64>> = matrix.chunks(n.max(1)).map(<[f64]>::to_vec).collect();
    let mut vectors: Vec<Vec<f64>> = (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    for _ in 0..60 {
        let off: f64 = (0..n).flat_map(|i| (0..i).map(move |j| (i, j))).map(|(i, j)| a[i][j] * a[i][j]).sum();
        let whole: f64 = a.iter().flatten().map(|x| x * x).sum();
        if off <= 1e-30 * whole {
            break;
        }
        for (p, q) in (0..n).flat_map(|q| (0..q).map(move |p| (p, q))) {
            if a[p][q] == 0.0 {
                continue;
            }
            let theta = (a[q][q] - a[p][p]) / (2.0 * a[p][q]);
            let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
            let c = 1.0 / (t * t + 1.0).sqrt();
            let s = t * c;
            for row in &mut a {
                (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
            }
            for k in 0..n {
                (a[p][k], a[q][k]) = (c * a[p][k] - s * a[q][k], s * a[p][k] + c * a[q][k]);
                (vectors[p][k], vectors[q][k]) =
                    (c * vectors[p][k] - s * vectors[q][k], s * vectors[p][k] + c * vectors[q][k]);
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| a[j][j].total_cmp(&a[i][i]));
    (order.iter().map(|&i| a[i][i].max(0.0)).collect(), order.iter().map(|&i| vectors[i].clone()).collect())
}

fn dot(one: &[f64], other: &[f64]) -> f64 {
    one.iter().zip(other).map(|(x, y)| x * y).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows that spread by `spread` along orthogonal directions, which are those of a discrete cosine transform.
    fn rows(n: usize, spread: &[f64], width: usize) -> Vec<f32> {
        let direction = |k: usize, j: usize| {
            (std::f64::consts::PI / width as f64 * (j as f64 + 0.5) * k as f64).cos() * (2.0 / width as f64).sqrt()
        };
        // Harmonics over whole turns have no mean, no product with one another, and equal squares.
        let along = |i: usize, k: usize| (std::f64::consts::TAU * i as f64 * (k + 1) as f64 / n as f64).sin();
        let value = |i: usize, j: usize| {
            let sum: f64 =
                spread.iter().enumerate().map(|(k, spread)| spread * along(i, k) * direction(k + 1, j)).sum();
            (7.0 + sum) as f32
        };
        (0..n * width).map(|at| value(at / width, at % width)).collect()
    }

    #[test]
    fn known_components_are_found() {
        let (n, width, spread) = (60, 20, [3.0, 2.0, 1.0, 0.5]);
        let rows = rows(n, &spread, width);
        let found = principal_components(&rows, width, 2, 1).expect("sound");
        let whole: f64 = spread.iter().map(|spread| spread * spread).sum();
        for (k, spread) in spread[..2].iter().enumerate() {
            // The rows are f32 about 7: known to 2.4e-7 of what is 0.5 to 3.
            assert!((found.explained[k] - spread * spread / whole).abs() < 1e-6, "{:?}", found.explained);
            let signs: Vec<f64> = (0..n)
                .map(|i| {
                    let expected = spread * (std::f64::consts::TAU * i as f64 * (k + 1) as f64 / n as f64).sin();
                    let got = found.coordinates[2 * i + k];
                    assert!((got.abs() - expected.abs()).abs() < 1e-5, "{got} {expected}");
                    if expected.abs() > 0.1 { (got * expected).signum() } else { 0.0 }
                })
                .collect();
            // One sign for all of a component.
            assert!(!(signs.contains(&1.0) && signs.contains(&-1.0)));
        }
        assert_eq!(principal_components(&rows, width, 2, 3).expect("sound"), found);
    }

    #[test]
    fn fewer_components_than_asked_are_zeros() {
        // Two points are a line; equal points are nowhere.
        let line = principal_components(&[0.0, 0.0, 3.0, 4.0], 2, 2, 1).expect("sound");
        assert_eq!(line.coordinates.len(), 4);
        assert!((line.coordinates[0] + 2.5).abs() < 1e-12 && (line.coordinates[2] - 2.5).abs() < 1e-12, "{line:?}");
        assert!(line.coordinates[1].abs() < 1e-12 && (line.explained[0] - 1.0).abs() < 1e-12);
        let point = principal_components(&[1.0; 9], 3, 2, 1).expect("sound");
        assert_eq!((point.coordinates, point.explained), (vec![0.0; 6], vec![0.0; 2]));
        let one = principal_components(&[1.0, 2.0], 1, 2, 1).expect("sound");
        assert_eq!((one.coordinates, one.explained), (vec![-0.5, 0.0, 0.5, 0.0], vec![1.0, 0.0]));
        assert!(principal_components(&[1.0, f32::NAN], 1, 2, 1).is_err());
        assert!(principal_components(&[1.0; 3], 2, 2, 1).is_err());
    }
}

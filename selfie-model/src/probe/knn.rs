//! Weighted nearest neighbours by cosine similarity, exact.

use super::whitening::Whitening;
use super::{Labelled, on_threads};
use crate::error::{Error, Result};
use rayon::prelude::*;

/// Neighbours unless asked otherwise: best of those that Caron et al. 2021 (arXiv 2104.14294) tried.
pub const DEFAULT_NEIGHBOURS: usize = 20;

/// Temperature of the votes unless asked otherwise: that of Wu et al. 2018.
pub const DEFAULT_TEMPERATURE: f64 = 0.07;

/// Images that are compared at a time with each training image, which then stays in cache.
const QUERIES: usize = 16;

/// Sums that a product is cut into, so that they fill vector registers; a fixed order whatever the machine.
const LANES: usize = 16;

/// What cosines are taken of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Similarity {
    /// Features without the mean and the correlations that they have over the training images, whose covariance is
    /// estimated as Ledoit and Wolf 2004 do.
    Whitened,
    /// Features as they are.
    Cosine,
}

/// A classifier by the nearest of the training images: each of the k nearest votes for its class with the weight
/// `exp(cosine / temperature)`. Of equally near ones the first are taken, of equal votes the first class.
///
/// Source: Wu et al. 2018 (arXiv 1805.01978), section 3.4.
#[derive(Debug, Clone, Copy)]
pub struct Knn {
    /// Neighbours: 1 to the number of training images.
    pub k: usize,
    /// Above 0.
    pub temperature: f64,
    /// Number of classes.
    pub classes: usize,
    /// What is near.
    pub similarity: Similarity,
}

impl Knn {
    /// Classes of the vectors `queries`, `[n, width]`, by their neighbours in `train`; on so many threads, which do not
    /// matter to the result.
    ///
    /// # Errors
    /// More neighbours than images, and the like.
    pub fn predict(&self, train: Labelled<'_>, queries: &[f32], threads: usize) -> Result<Vec<u32>> {
        let train = train.checked(self.classes)?;
        if !(1..=train.len()).contains(&self.k) {
            return Err(Error::usage("k", self.k, format!("1 to {}, the training images there are", train.len())));
        }
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return Err(Error::usage("temperature", self.temperature, "a number above 0"));
        }
        let nearest = match self.similarity {
            Similarity::Cosine => nearest(train.features, queries, train.width, self.k, threads)?,
            Similarity::Whitened => {
                let whitening = Whitening::fit(train.features, train.width, threads)?;
                let [rows, queries] = [train.features, queries].map(|rows| whitening.apply(rows, threads));
                nearest(&rows?, &queries?, train.width, self.k, threads)?
            }
        };
        Ok(nearest.iter().map(|found| self.vote(found, train.labels)).collect())
    }

    fn vote(&self, nearest: &[Neighbour], labels: &[u32]) -> u32 {
        let mut votes = vec![0.0; self.classes];
        // A factor of all weights does not matter, and this one keeps them from overflowing.
        let most = nearest.first().map_or(0.0, |nearest| f64::from(nearest.similarity));
        for &Neighbour { similarity, index } in nearest {
            votes[labels[index] as usize] += libm::exp((f64::from(similarity) - most) / self.temperature);
        }
        let best = (1..self.classes).fold(0, |best, class| if votes[class] > votes[best] { class } else { best });
        best as u32
    }
}

/// A vector near another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Neighbour {
    /// The cosine of the angle between the two.
    pub similarity: f32,
    /// Its place.
    pub index: usize,
}

/// For each of `queries`, `[m, width]`, the `k` nearest of `rows`, `[n, width]`, from the nearest on; all of them where there
/// are fewer, and of equally near ones the first. On so many threads, which do not matter to the result.
///
/// # Errors
/// Usage: lengths that are no multiples of the width, numbers that are not finite.
pub fn nearest(rows: &[f32], queries: &[f32], width: usize, k: usize, threads: usize) -> Result<Vec<Vec<Neighbour>>> {
    for numbers in [rows, queries] {
        if width == 0 || !numbers.len().is_multiple_of(width) || numbers.iter().any(|value| !value.is_finite()) {
            let expected = format!("finite numbers, {width} for each image");
            return Err(Error::usage("features", numbers.len(), expected));
        }
    }
    on_threads(threads, || {
        let (rows, queries) = (normalised(rows, width), normalised(queries, width));
        let blocks = queries.par_chunks(QUERIES * width);
        let blocks = blocks.map(|block| {
            let mut nearest: Vec<Nearest> = block.chunks_exact(width).map(|_| Nearest::new(k)).collect();
            for (index, row) in rows.chunks_exact(width).enumerate() {
                for (query, nearest) in block.chunks_exact(width).zip(&mut nearest) {
                    nearest.offer(dot(query, row), index);
                }
            }
            nearest.into_iter().map(|nearest| nearest.found).collect::<Vec<_>>()
        });
        blocks.flatten_iter().collect()
    })
}

/// The nearest so far, from the nearest on.
struct Nearest {
    k: usize,
    found: Vec<Neighbour>,
}

impl Nearest {
    fn new(k: usize) -> Self {
        Self { k, found: Vec::with_capacity(k + 1) }
    }

    /// Indices come in ascending order: one that is as near as another stands behind it.
    fn offer(&mut self, similarity: f32, index: usize) {
        if self.found.len() == self.k && self.found.last().is_none_or(|least| similarity <= least.similarity) {
            return;
        }
        let place = self.found.partition_point(|other| other.similarity >= similarity);
        self.found.insert(place, Neighbour { similarity, index });
        self.found.truncate(self.k);
    }
}

/// Every row divided by its length; a row of zeros stays one, and is like no other.
fn normalised(rows: &[f32], width: usize) -> Vec<f32> {
    let mut rows = rows.to_vec();
    rows.par_chunks_exact_mut(width).for_each(normalise);
    rows
}

/// Divides a vector by its Euclidean length, if that is not 0.
pub fn normalise(row: &mut [f32]) {
    let length = row.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>().sqrt();
    if length > 0.0 {
        row.iter_mut().for_each(|value| *value = (f64::from(*value) / length) as f32);
    }
}

fn dot(one: &[f32], other: &[f32]) -> f32 {
    let (one, one_rest) = one.as_chunks::<LANES>();
    let (other, other_rest) = other.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for (one, other) in one.iter().zip(other) {
        for lane in 0..LANES {
            sums[lane] += one[lane] * other[lane];
        }
    }
    let rest: f32 = one_rest.iter().zip(other_rest).map(|(one, other)| one * other).sum();
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers between -1 and 1 without a pattern.
    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// The same from the formula, in f64, by sorting all of them.
    fn oracle(knn: &Knn, train: Labelled<'_>, query: &[f32]) -> u32 {
        let product =
            |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum() };
        let cosine = |row: &[f32]| product(row, query) / (product(row, row) * product(query, query)).sqrt();
        let mut all: Vec<(f64, u32)> = train.rows().map(cosine).zip(train.labels.iter().copied()).collect();
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut votes = vec![0.0; knn.classes];
        all[..knn.k]
            .iter()
            .for_each(|&(similarity, label)| votes[label as usize] += (similarity / knn.temperature).exp());
        (0..knn.classes).max_by(|&a, &b| votes[a].total_cmp(&votes[b])).expect("classes") as u32
    }

    #[test]
    fn it_is_the_formula_on_any_number_of_threads() {
        for (width, k, temperature) in [(3, 1, 0.07), (16, 5, 0.07), (37, 20, 1.0)] {
            let (features, queries) = (numbers(80 * width, 1), numbers(41 * width, 2));
            let labels: Vec<u32> = (0..80).map(|i| i * 7 % 5).collect();
            let train = Labelled { features: &features, width, labels: &labels };
            let knn = Knn { k, temperature, classes: 5, similarity: Similarity::Cosine };
            let expected: Vec<u32> = queries.chunks(width).map(|query| oracle(&knn, train, query)).collect();
            for threads in [1, 3] {
                assert_eq!(knn.predict(train, &queries, threads).expect("sound"), expected, "{width} {k} {threads}");
            }
        }
    }

    #[test]
    fn whitened_neighbours_are_near_in_what_varies_little() {
        // The class is the sign of the second number; the first is a hundred times as large, and says nothing. Both are far
        // from 0.
        let all = numbers(2 * 400, 3);
        let features: Vec<f32> = all.chunks(2).flat_map(|two| [50.0 + 100.0 * two[0], 30.0 + two[1]]).collect();
        let labels: Vec<u32> = all.chunks(2).map(|two| u32::from(two[1] > 0.0)).collect();
        let (train, test) =
            (Labelled { features: &features[..600], width: 2, labels: &labels[..300] }, &features[600..]);
        let right = |similarity| {
            let knn = Knn { k: 5, temperature: 0.07, classes: 2, similarity };
            super::super::accuracy(&knn.predict(train, test, 2).expect("sound"), &labels[300..]).0
        };
        let (whitened, cosine) = (right(Similarity::Whitened), right(Similarity::Cosine));
        assert!(whitened >= 0.9 && cosine < 0.8, "{whitened} {cosine}");
    }

    #[test]
    fn of_equals_the_first_is_taken() {
        let train = Labelled { features: &[1.0, 0.0, 2.0, 0.0, 0.0, 1.0], width: 2, labels: &[2, 1, 0] };
        let knn = |k| Knn { k, temperature: 0.07, classes: 3, similarity: Similarity::Cosine };
        let predicted = |k| knn(k).predict(train, &[3.0, 0.0], 1).expect("sound");
        // Both have cosine 1; with two of them the votes are equal.
        assert_eq!((predicted(1), predicted(2)), (vec![2], vec![1]));
        // A vector of zeros is as far from all: the first ones vote.
        let zero = knn(1).predict(train, &[0.0, 0.0], 1).expect("sound");
        assert_eq!(zero, [2]);
    }

    #[test]
    fn more_neighbours_than_images_are_refused() {
        let train = Labelled { features: &[1.0, 0.0], width: 1, labels: &[0, 0] };
        for (k, temperature) in [(0, 1.0), (3, 1.0), (1, 0.0), (1, f64::NAN)] {
            let knn = Knn { k, temperature, classes: 1, similarity: Similarity::Cosine };
            assert!(knn.predict(train, &[1.0], 1).is_err(), "{k} {temperature}");
        }
    }
}

//! Multinomial logistic regression on standardised features, solved to its optimum.

use super::lbfgs::minimise;
use super::{Labelled, on_threads};
use crate::error::{Error, Result};
use rayon::prelude::*;

/// Penalties to choose from, the greatest first.
pub const PENALTIES: [f64; 6] = [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5];

/// A fit is at its optimum when no element of the gradient is above this. The loss is a mean of numbers about 1.
pub const TOLERANCE: f64 = 1e-6;

/// A fit that is not at its optimum by then says so.
const MOST_ITERATIONS: usize = 2000;

/// Parts that the images are cut into, whose sums are added in order: so threads don't matter.
const PARTS: usize = 16;

const LANES: usize = 8;

/// A linear classifier on features.
#[derive(Debug, Clone)]
pub struct Linear {
    classes: usize,
    mean: Vec<f64>,
    /// One over the standard deviation; 1 where that is 0.
    scale: Vec<f64>,
    /// `[classes, width + 1]`: of the standardised features, and the intercept.
    weights: Vec<f64>,
}

/// A classifier, and how it was found.
#[derive(Debug, Clone)]
pub struct Fit {
    /// The classifier.
    pub classifier: Linear,
    /// Factor of the penalty.
    pub penalty: f64,
    /// Mean cross-entropy over the images it was fitted to, in nats, and the penalty.
    pub objective: f64,
    /// Greatest element of the objective's gradient, without sign.
    pub gradient: f64,
    /// Of the search.
    pub iterations: usize,
}

impl Fit {
    /// Whether it is at its optimum.
    pub fn has_converged(&self) -> bool {
        self.gradient <= TOLERANCE
    }
}

impl Linear {
    /// The minima of `mean cross-entropy + penalty / 2 * |weights|^2`, of which the intercepts are no part, for each of
    /// `penalties`; from one, the next begins. Features are standardised by `train`'s own means and standard deviations.
    ///
    /// # Errors
    /// Features that are none, labels that are no classes.
    pub fn fit(train: Labelled<'_>, classes: usize, penalties: &[f64], threads: usize) -> Result<Vec<Fit>> {
        let train = train.checked(classes)?;
        if let Some(penalty) = penalties.iter().find(|&&penalty| !(penalty > 0.0 && penalty.is_finite())) {
            return Err(Error::usage("penalty", penalty, "a number above 0"));
        }
        on_threads(threads, || {
            let (mean, scale) = standard(train);
            let objective = Objective { rows: standardised(train.features, &mean, &scale), train, classes };
            let mut weights = vec![0.0; classes * (train.width + 1)];
            let each = penalties.iter().map(|&penalty| {
                let found = minimise(weights.clone(), TOLERANCE, MOST_ITERATIONS, |weights, gradient| {
                    objective.evaluate(weights, penalty, gradient)
                });
                weights.clone_from(&found.at);
                Fit {
                    classifier: Linear { classes, mean: mean.clone(), scale: scale.clone(), weights: found.at },
                    penalty,
                    objective: found.value,
                    gradient: found.gradient,
                    iterations: found.iterations,
                }
            });
            each.collect()
        })
    }

    /// The class of the highest score for each of `features`, `[n, width]`; the first of equals.
    pub fn predict(&self, features: &[f32]) -> Vec<u32> {
        let width = self.mean.len();
        let rows = standardised(features, &self.mean, &self.scale);
        let of_row = |row: &[f64]| {
            let scores: Vec<f64> = self.weights.chunks_exact(width + 1).map(|weights| score(weights, row)).collect();
            (1..self.classes).fold(0, |best, class| if scores[class] > scores[best] { class } else { best }) as u32
        };
        rows.chunks_exact(width).map(of_row).collect()
    }
}

/// Mean, and one over the standard deviation, of every feature.
fn standard(train: Labelled<'_>) -> (Vec<f64>, Vec<f64>) {
    let n = train.len() as f64;
    let (mut mean, mut squares) = (vec![0.0; train.width], vec![0.0; train.width]);
    for row in train.rows() {
        mean.iter_mut().zip(row).for_each(|(mean, &value)| *mean += f64::from(value) / n);
    }
    for row in train.rows() {
        for ((squares, &value), mean) in squares.iter_mut().zip(row).zip(&mean) {
            *squares += (f64::from(value) - mean) * (f64::from(value) - mean) / n;
        }
    }
    let scale = squares.iter().map(|&variance| if variance > 0.0 { 1.0 / variance.sqrt() } else { 1.0 });
    (mean, scale.collect())
}

fn standardised(features: &[f32], mean: &[f64], scale: &[f64]) -> Vec<f64> {
    let rows = features.chunks_exact(mean.len());
    let standardise = |((&value, mean), scale): ((&f32, &f64), &f64)| (f64::from(value) - mean) * scale;
    rows.flat_map(|row| row.iter().zip(mean).zip(scale).map(standardise)).collect()
}

/// What is minimised.
struct Objective<'a> {
    /// Standardised.
    rows: Vec<f64>,
    train: Labelled<'a>,
    classes: usize,
}

impl Objective<'_> {
    /// Its value, and its gradient by the weights.
    fn evaluate(&self, weights: &[f64], penalty: f64, gradient: &mut [f64]) -> f64 {
        let (n, width) = (self.train.len(), self.train.width);
        let images = n.div_ceil(PARTS);
        let parts = self.rows.par_chunks(images * width).zip(self.train.labels.par_chunks(images));
        let parts: Vec<(f64, Vec<f64>)> = parts.map(|(rows, labels)| self.part(rows, labels, weights)).collect();
        let mut value = 0.0;
        gradient.fill(0.0);
        for (loss, part) in &parts {
            value += loss / n as f64;
            gradient.iter_mut().zip(part).for_each(|(sum, part)| *sum += part / n as f64);
        }
        for (weights, gradient) in weights.chunks_exact(width + 1).zip(gradient.chunks_exact_mut(width + 1)) {
            for (weight, gradient) in weights[..width].iter().zip(gradient) {
                value += penalty / 2.0 * weight * weight;
                *gradient += penalty * weight;
            }
        }
        value
    }

    /// Sums of cross-entropy and gradient over some images.
    fn part(&self, rows: &[f64], labels: &[u32], weights: &[f64]) -> (f64, Vec<f64>) {
        let width = self.train.width;
        let (mut loss, mut gradient) = (0.0, vec![0.0; weights.len()]);
        let mut scores = vec![0.0; self.classes];
        for (row, &label) in rows.chunks_exact(width).zip(labels) {
            for (to, weights) in scores.iter_mut().zip(weights.chunks_exact(width + 1)) {
                *to = score(weights, row);
            }
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let right = scores[label as usize];
            scores.iter_mut().for_each(|score| *score = libm::exp(*score - most));
            let sum: f64 = scores.iter().sum();
            loss += sum.ln() + most - right;
            for (class, gradient) in gradient.chunks_exact_mut(width + 1).enumerate() {
                let error = scores[class] / sum - f64::from(u8::from(class == label as usize));
                let (slopes, intercept) = gradient.split_at_mut(width);
                slopes.iter_mut().zip(row).for_each(|(slope, value)| *slope += error * value);
                intercept[0] += error;
            }
        }
        (loss, gradient)
    }
}

/// Weights of the features times these, and the intercept behind them.
fn score(weights: &[f64], row: &[f64]) -> f64 {
    let (weights, intercept) = weights.split_at(row.len());
    let (one, one_rest) = weights.as_chunks::<LANES>();
    let (other, other_rest) = row.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for (one, other) in one.iter().zip(other) {
        for lane in 0..LANES {
            sums[lane] += one[lane] * other[lane];
        }
    }
    let rest: f64 = one_rest.iter().zip(other_rest).map(|(one, other)| one * other).sum();
    sums.iter().sum::<f64>() + rest + intercept[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three overlapping clouds in the plane, and a feature that never changes.
    fn clouds() -> (Vec<f32>, Vec<u32>) {
        let (mut features, mut labels) = (Vec::new(), Vec::new());
        for i in 0..90u32 {
            let class = i % 3;
            let (x, y) = (f64::from(i * 37 % 100) / 50.0 - 1.0, f64::from(i * 61 % 100) / 50.0 - 1.0);
            features.extend([(x + 0.9 * f64::from(class)) as f32, (100.0 * y) as f32 + 30.0 * (class / 2) as f32, 7.0]);
            labels.push(class);
        }
        (features, labels)
    }

    /// The objective from its formula, for weights of the standardised features.
    fn objective(fit: &Fit, features: &[f32], labels: &[u32], weights: &[f64]) -> f64 {
        let Linear { mean, scale, .. } = &fit.classifier;
        let (width, n) = (mean.len(), labels.len() as f64);
        let mut value = 0.0;
        for (row, &label) in features.chunks(width).zip(labels) {
            let scores: Vec<f64> = weights
                .chunks(width + 1)
                .map(|w| (0..width).map(|i| w[i] * (f64::from(row[i]) - mean[i]) * scale[i]).sum::<f64>() + w[width])
                .collect();
            value += (scores.iter().map(|s| s.exp()).sum::<f64>().ln() - scores[label as usize]) / n;
        }
        let squares = weights.chunks(width + 1).flat_map(|w| &w[..width]).map(|w| w * w).sum::<f64>();
        value + fit.penalty / 2.0 * squares
    }

    #[test]
    fn it_is_at_the_optimum_of_the_formula() {
        let (features, labels) = clouds();
        let train = Labelled { features: &features, width: 3, labels: &labels };
        for fit in Linear::fit(train, 3, &PENALTIES, 2).expect("sound") {
            assert!(fit.has_converged(), "{}: {} after {}", fit.penalty, fit.gradient, fit.iterations);
            let weights = &fit.classifier.weights;
            let value = objective(&fit, &features, &labels, weights);
            // 90 terms of about 1, each exact to a few roundings.
            assert!((value - fit.objective).abs() < 1e-12, "{value} {}", fit.objective);
            // Every slope, by central differences: rounding 1e-16 / 1e-5, and 1e-10 of the third derivative.
            for i in 0..weights.len() {
                let at = |by: f64| {
                    let mut moved = weights.clone();
                    moved[i] += by;
                    objective(&fit, &features, &labels, &moved)
                };
                let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!(slope.abs() < TOLERANCE + 1e-9, "{} of {}: {slope}", i, fit.penalty);
            }
        }
    }

    #[test]
    fn threads_do_not_matter_and_starts_hardly() {
        let (features, labels) = clouds();
        let train = Labelled { features: &features, width: 3, labels: &labels };
        let fit = |penalties: &[f64], threads| Linear::fit(train, 3, penalties, threads).expect("sound").pop();
        let (one, three) = (fit(&PENALTIES, 1).expect("fits"), fit(&PENALTIES, 3).expect("fits"));
        assert_eq!(one.classifier.weights, three.classifier.weights);
        let alone = fit(&PENALTIES[5..], 1).expect("a fit");
        assert_ne!(one.iterations, alone.iterations);
        assert!((one.objective - alone.objective).abs() < 1e-8, "{} {}", one.objective, alone.objective);
        let right = one.classifier.predict(&features).iter().zip(&labels).filter(|(a, b)| a == b).count();
        assert!(right > 45, "{right} of 90, where guessing gets 30");
    }

    #[test]
    fn a_separable_set_is_separated() {
        let features = [-1.0, -2.0, -3.0, 1.0, 2.0, 3.0];
        let train = Labelled { features: &features, width: 1, labels: &[1, 1, 1, 0, 0, 0] };
        let fit = Linear::fit(train, 2, &[1e-3], 1).expect("sound").pop().expect("one");
        assert!(fit.has_converged());
        assert_eq!(fit.classifier.predict(&features), [1, 1, 1, 0, 0, 0]);
        assert!(Linear::fit(train, 2, &[0.0], 1).is_err());
    }
}

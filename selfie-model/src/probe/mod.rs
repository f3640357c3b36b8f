//! What features are worth without training the network any further: neighbours and a linear classifier on them.

mod knn;
mod lbfgs;
mod linear;
mod pca;
mod whitening;

pub use knn::{DEFAULT_NEIGHBOURS, DEFAULT_TEMPERATURE, Knn, Neighbour, Similarity, nearest, normalise};
pub use linear::{Fit, Linear, PENALTIES, TOLERANCE};
pub use pca::{Components, principal_components};

use crate::error::{Error, Result};

/// Vectors of images, with their classes.
#[derive(Debug, Clone, Copy)]
pub struct Labelled<'a> {
    /// `[n, width]`
    pub features: &'a [f32],
    /// Numbers of a vector.
    pub width: usize,
    /// `[n]`, each below the number of classes.
    pub labels: &'a [u32],
}

impl Labelled<'_> {
    /// Number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// The vectors one by one.
    fn rows(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.features.chunks_exact(self.width)
    }

    /// Itself, if lengths and labels agree and every number is finite.
    fn checked(&self, classes: usize) -> Result<Self> {
        if self.is_empty() || self.width == 0 || self.features.len() != self.len() * self.width {
            let given = format!("{} numbers for {} images", self.features.len(), self.len());
            return Err(Error::usage("features", given, format!("{} for each of 1 or more images", self.width)));
        }
        if let Some(label) = self.labels.iter().find(|&&label| label as usize >= classes) {
            return Err(Error::usage("labels", label, format!("a class below {classes}")));
        }
        let bad = self.features.iter().filter(|value| !value.is_finite()).count();
        if bad > 0 {
            let expected = "finite numbers; the network's overflow: try --precision f32";
            return Err(Error::usage("features", format!("{bad} that are not finite"), expected));
        }
        Ok(*self)
    }
}

/// Runs `work` on so many threads; 0 takes one per core.
///
/// # Errors
/// Threads that the system refuses.
fn on_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> Result<R> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|error| Error::usage("run.threads", threads, format!("threads that start: {error}")))?;
    Ok(pool.install(work))
}

/// Share of `n` predictions that are right, and its standard error `sqrt(p (1 - p) / n)`.
pub fn accuracy(predicted: &[u32], labels: &[u32]) -> (f64, f64) {
    let right = predicted.iter().zip(labels).filter(|(predicted, label)| predicted == label).count();
    let n = labels.len() as f64;
    let share = right as f64 / n;
    (share, (share * (1.0 - share) / n).sqrt())
}

/// Accuracy of `one` over that of `other` on the same images, and the standard error of the difference: of the mean over
/// images of what one gets right (1) less what the other does.
pub fn gain(one: &[u32], other: &[u32], labels: &[u32]) -> (f64, f64) {
    let n = labels.len() as f64;
    let (mut sum, mut squares) = (0.0, 0.0);
    for ((one, other), label) in one.iter().zip(other).zip(labels) {
        let difference = f64::from(u8::from(one == label)) - f64::from(u8::from(other == label));
        sum += difference;
        squares += difference * difference;
    }
    let mean = sum / n;
    (mean, ((squares / n - mean * mean).max(0.0) / n).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accuracy_and_gain_of_known_predictions() {
        let labels = [0, 0, 1, 1];
        assert_eq!(accuracy(&[0, 1, 1, 1], &labels), (0.75, (0.75f64 * 0.25 / 4.0).sqrt()));
        // Differences 0, -1, 1, 1: mean 1/4, mean square 3/4.
        let (mean, error) = gain(&[0, 1, 1, 1], &[0, 0, 0, 0], &labels);
        assert_eq!((mean, error), (0.25, ((0.75f64 - 0.0625) / 4.0).sqrt()));
        assert_eq!(gain(&labels, &labels, &labels), (0.0, 0.0));
    }

    #[test]
    fn what_no_probe_can_use_is_refused() {
        let check = |features: &[f32], labels: &[u32]| {
            Labelled { features, width: 2, labels }.checked(2).map(drop).map_err(|error| error.to_string())
        };
        assert_eq!(check(&[0.0; 4], &[0, 1]), Ok(()));
        assert!(check(&[0.0; 3], &[0, 1]).is_err());
        assert!(check(&[], &[]).is_err());
        assert!(check(&[0.0; 4], &[0, 2]).expect_err("a third class").contains("below 2"));
        assert!(check(&[0.0, f32::NAN, 0.0, 0.0], &[0, 1]).expect_err("NaN").contains("1 that are not finite"));
    }
}

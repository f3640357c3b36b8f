//! Loss and accuracy over held-out images: running statistics, no dropout, no augmentation, fixed masks.

use crate::draws::EvaluationDraws;
use crate::error::{Error, Result};
use crate::features::mean_vector;
use crate::network::{Begin, Inputs, Mode, Network, Sizes};
use crate::transfer::download_view;
use selfie_data::{BadFile, Batch, Dataset, Draw, EvalLoader, LoaderConfig};
use selfie_kernels::{Backend, Element, View, Wide};
use std::sync::Arc;

/// Images to train on or to evaluate: some of a data set.
#[derive(Clone)]
pub struct Images {
    /// Where they are.
    pub dataset: Arc<dyn Dataset>,
    /// Which of them.
    pub items: Vec<usize>,
    /// Threads that load; 0 loads between the steps.
    pub workers: usize,
    /// Fraction of the data set that may be bad; see [`selfie_data::DEFAULT_MAX_BAD`].
    pub max_bad: f64,
}

/// Mean loss and accuracy over some images.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// Images that counted.
    pub n: usize,
    /// Mean over images (and hidden places).
    pub loss: f64,
    /// Pretraining: share of the hidden places whose patch was found. Classification: top-1. Between 0 and 1.
    pub accuracy: f64,
    /// Standard deviation over the images of each number of their features, mean over these numbers; the features of an image
    /// are the mean of its vectors ([`Network::features`]). 0 where all images look the same to the network: it collapsed.
    pub feature_std: f64,
    /// Images that could not be read.
    pub skipped: Vec<BadFile>,
}

/// How well images were classified.
#[derive(Debug, Clone, PartialEq)]
pub struct Classification {
    /// Images that counted.
    pub n: usize,
    /// Mean cross-entropy, in nats.
    pub loss: f64,
    /// Share of images whose class had the highest score (the first of equals).
    pub top1: f64,
    /// Share of images whose class was among the five highest scores; 1 for up to five classes.
    pub top5: f64,
    /// `[class][predicted]`: images.
    pub confusion: Vec<Vec<u64>>,
    /// Expected calibration error: by how much the highest probability differs from the share that is right, on average over
    /// images, in [`CALIBRATION_BINS`] bins of equal width of that probability (Guo et al. 2017, arXiv 1706.04599, eq. 3).
    pub calibration_error: f64,
    /// Images that could not be read.
    pub skipped: Vec<BadFile>,
}

/// Bins of the calibration error.
pub const CALIBRATION_BINS: usize = 15;

/// A network whose output is a score for each class.
pub trait Classify<B: Backend<T>, T: Element>: Network<B, T> {
    /// Number of classes.
    fn classes(&self) -> usize;
    /// `[batch, classes]`: logits of the last forward.
    fn logits(&self) -> View<'_, B, T>;
}

/// The network's own loss and accuracy over `images`. Every image has the same mask in every evaluation.
///
/// # Errors
/// Too many bad images; an image without a label, in classification; those of the device.
pub fn evaluate<B, T, N>(network: &mut N, images: &Images) -> Result<Evaluation>
where
    B: Backend<T>,
    T: Element,
    N: Network<B, T>,
{
    let (mut n, mut loss, mut accuracy) = (0, 0.0, 0.0);
    let mut spread = Spread::new(network.feature_width());
    let skipped = for_each_batch(network, images, |network, batch, _| {
        let mean = network.loss()?;
        let features = download_view(&**network.device(), network.features())?;
        let of_image = features.len() / network.sizes().batch;
        features.chunks_exact(of_image).take(batch.valid).for_each(|image| spread.add(image));
        n += batch.valid;
        loss += mean.loss * batch.valid as f64;
        accuracy += mean.accuracy * batch.valid as f64;
        Ok(())
    })?;
    let [loss, accuracy] = [loss, accuracy].map(|sum| sum / n as f64);
    Ok(Evaluation { n, loss, accuracy, feature_std: spread.std(), skipped })
}

/// How far vectors are apart, each number by itself (Welford 1962), in `f64`.
#[derive(Debug)]
struct Spread {
    n: f64,
    mean: Vec<f64>,
    /// Sums of squared distances to the mean.
    squares: Vec<f64>,
}

impl Spread {
    fn new(width: usize) -> Self {
        Self { n: 0.0, mean: vec![0.0; width], squares: vec![0.0; width] }
    }

    /// Adds the mean of the vectors `[m, width]` of an image.
    fn add<T: Element>(&mut self, vectors: &[T]) {
        let width = self.mean.len();
        self.n += 1.0;
        let numbers = self.mean.iter_mut().zip(&mut self.squares);
        for ((mean, squares), value) in numbers.zip(mean_vector(vectors, width)) {
            let before = value - *mean;
            *mean += before / self.n;
            *squares += before * (value - *mean);
        }
    }

    /// The standard deviation of the images that were added, mean over the numbers.
    fn std(&self) -> f64 {
        self.squares.iter().map(|squares| (squares / self.n).sqrt()).sum::<f64>() / self.squares.len() as f64
    }
}

/// Classifies `images`; `each` sees every image's index in its data set and its scores.
///
/// # Errors
/// Too many bad images; an image without a label; those of the device.
pub fn classify<B, T, N>(
    network: &mut N,
    images: &Images,
    mut each: impl FnMut(usize, &[f64]),
) -> Result<Classification>
where
    B: Backend<T>,
    T: Element,
    N: Classify<B, T>,
{
    let (device, classes) = (network.device().clone(), network.classes());
    let mut confusion = vec![vec![0; classes]; classes];
    let (mut n, mut loss, mut in_top5) = (0, 0.0, 0);
    let mut scores = vec![0.0; classes];
    let mut calibration = Calibration::default();
    let skipped = for_each_batch(network, images, |network, batch, labels| {
        let logits = download_view(&*device, network.logits())?;
        for slot in 0..batch.valid {
            for (score, &logit) in scores.iter_mut().zip(&logits[slot * classes..][..classes]) {
                *score = logit.widen().to_f64();
            }
            let label = labels[slot] as usize;
            if label >= classes {
                return Err(Error::usage("labels", label, format!("a class below {classes}, as the network has")));
            }
            n += 1;
            loss += cross_entropy(&scores, label);
            let rank = rank(&scores, label);
            in_top5 += usize::from(rank < 5);
            let predicted = highest(&scores);
            confusion[label][predicted] += 1;
            calibration.add(libm::exp(-cross_entropy(&scores, predicted)), predicted == label);
            each(batch.indices[slot] as usize, &scores);
        }
        Ok(())
    })?;
    let found: u64 = (0..classes).map(|class| confusion[class][class]).sum();
    let share = |count: f64| count / n as f64;
    Ok(Classification {
        n,
        loss: share(loss),
        top1: share(found as f64),
        top5: share(in_top5 as f64),
        confusion,
        calibration_error: calibration.error(),
        skipped,
    })
}

/// For each bin of confidence: images, the sum of their confidences, and how many of them are right.
#[derive(Debug, Default)]
struct Calibration([(f64, f64, f64); CALIBRATION_BINS]);

impl Calibration {
    fn add(&mut self, confidence: f64, is_right: bool) {
        // 1 belongs to the last bin; a confidence that is no number to the first, and the error is none either.
        let bin = ((confidence * CALIBRATION_BINS as f64).ceil() as usize).clamp(1, CALIBRATION_BINS) - 1;
        let (images, confidences, right) = &mut self.0[bin];
        *images += 1.0;
        *confidences += confidence;
        *right += f64::from(u8::from(is_right));
    }

    fn error(&self) -> f64 {
        let images: f64 = self.0.iter().map(|(images, ..)| images).sum();
        self.0.iter().map(|(_, confidences, right)| (confidences - right).abs()).sum::<f64>() / images
    }
}

/// Runs the network forward over `images`, batch by batch; `visit` gets the batch and its targets. Returns the images
/// that could not be read.
pub(crate) fn for_each_batch<B, T, N>(
    network: &mut N,
    images: &Images,
    mut visit: impl FnMut(&mut N, &Batch, &[u32]) -> Result<()>,
) -> Result<Vec<BadFile>>
where
    B: Backend<T>,
    T: Element,
    N: Network<B, T>,
{
    if images.items.is_empty() {
        return Err(Error::usage("images to evaluate", 0, "1 or more"));
    }
    let mut loader = evaluation_loader(images, &network.sizes())?;
    let mut next = stage_next(network, &mut loader, &*images.dataset)?;
    while let Some((batch, targets)) = next {
        network.begin(Begin::Evaluation)?;
        network.forward(Mode::Evaluate)?;
        // While the device works. What is wrong with the next batch does not take this one away.
        let after = stage_next(network, &mut loader, &*images.dataset);
        visit(network, &batch, &targets)?;
        loader.recycle(batch);
        next = after?;
    }
    Ok(loader.bad_files().to_vec())
}

/// Fetches and stages the next batch that has an image; gives it with its targets.
fn stage_next<B, T, N>(
    network: &mut N,
    loader: &mut EvalLoader,
    dataset: &dyn Dataset,
) -> Result<Option<(Batch, Vec<u32>)>>
where
    B: Backend<T>,
    T: Element,
    N: Network<B, T>,
{
    let sizes = network.sizes();
    while let Some(batch) = loader.next_batch()? {
        if batch.valid == 0 {
            loader.recycle(batch);
            continue;
        }
        let (mut targets, mut draws) = (Vec::new(), Vec::new());
        targets_of(&sizes, dataset, &batch, &mut targets)?;
        crops(&batch.draws, &mut draws);
        network.stage(&Inputs {
            images: &batch.images,
            draws: &draws,
            targets: &targets,
            first_sample: batch.step * sizes.batch as u64,
            valid: batch.valid,
        })?;
        return Ok(Some((batch, targets)));
    }
    Ok(None)
}

/// The loader of an evaluation of `images` by a network of these sizes.
///
/// # Errors
/// Those of the loader.
pub fn evaluation_loader(images: &Images, sizes: &Sizes) -> Result<EvalLoader> {
    let config = LoaderConfig { workers: images.workers, max_bad: images.max_bad, ..loader_config(sizes) };
    let draws = EvaluationDraws { patches: sizes.ordered_patches() };
    Ok(EvalLoader::new(images.dataset.clone(), images.items.clone(), Arc::new(draws), config)?)
}

/// The loader of a network's batches.
pub(crate) fn loader_config(sizes: &Sizes) -> LoaderConfig {
    LoaderConfig::new(sizes.batch, sizes.image[0])
}

/// Overwrites `draws` with rows, columns and flips as the kernels take them.
pub(crate) fn crops(batch: &[Draw], draws: &mut Vec<i32>) {
    draws.clear();
    draws.extend(batch.iter().flat_map(|draw| [i32::from(draw.dy), i32::from(draw.dx), i32::from(draw.flip)]));
}

/// Overwrites `targets` with what a network learns of a batch: nothing, labels, or orders of the patches.
///
/// # Errors
/// [`Error::Malformed`] for an image without a label, where labels are learned.
pub(crate) fn targets_of(sizes: &Sizes, dataset: &dyn Dataset, batch: &Batch, targets: &mut Vec<u32>) -> Result<()> {
    targets.clear();
    match sizes.targets {
        0 => {}
        1 => labels(dataset, batch, targets)?,
        _ => targets.extend(&batch.orders),
    }
    Ok(())
}

/// Appends the labels of a batch; padding gets class 0.
///
/// # Errors
/// [`Error::Malformed`] for an image without a label.
fn labels(dataset: &dyn Dataset, batch: &Batch, labels: &mut Vec<u32>) -> Result<()> {
    let valid = &batch.labels[..batch.valid];
    if let Some(slot) = valid.iter().position(|&label| label == selfie_data::UNLABELLED) {
        return Err(Error::malformed(
            std::path::Path::new(&dataset.key(batch.indices[slot] as usize)),
            "a label",
            "none",
            "put the images into one folder per class",
        ));
    }
    labels.extend(valid);
    labels.resize(labels.len() + batch.labels.len() - batch.valid, 0);
    Ok(())
}

/// `-log softmax(scores)[label]`.
fn cross_entropy(scores: &[f64], label: usize) -> f64 {
    let max = scores[highest(scores)];
    max - scores[label] + scores.iter().map(|score| libm::exp(score - max)).sum::<f64>().ln()
}

/// The place of the highest score, the first of equals. NaN counts as higher than any number, so that it shows.
fn highest(scores: &[f64]) -> usize {
    let better = |a: f64, b: f64| a > b || a.is_nan() && !b.is_nan();
    (1..scores.len()).fold(0, |best, place| if better(scores[place], scores[best]) { place } else { best })
}

/// How many classes come before `label` when scores are sorted downwards, equals by class.
fn rank(scores: &[f64], label: usize) -> usize {
    let before = |(class, &score): (usize, &f64)| !(score < scores[label] || score == scores[label] && class >= label);
    // A score that is NaN is before every label, itself included: it is never right.
    scores.iter().enumerate().filter(|&entry| before(entry)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_count_what_comes_before() {
        let scores = [1.0, 3.0, 3.0, 2.0];
        assert_eq!([0, 1, 2, 3].map(|label| rank(&scores, label)), [3, 0, 1, 2]);
        assert_eq!(highest(&scores), 1);
    }

    #[test]
    fn nan_is_never_right() {
        let scores = [1.0, f64::NAN, 0.5];
        assert_eq!(highest(&scores), 1);
        assert_eq!([rank(&scores, 0), rank(&scores, 1)], [1, 3]);
        assert!(cross_entropy(&scores, 0).is_nan());
    }

    #[test]
    fn cross_entropy_of_known_scores() {
        // Two equal scores: ln 2. Shifted by 1000 it must not overflow. 4 eps of numbers about 1.
        for shift in [0.0, 1000.0] {
            let loss = cross_entropy(&[shift, shift], 1);
            assert!((loss - std::f64::consts::LN_2).abs() <= 4.0 * f64::EPSILON, "{loss}");
        }
        let loss = cross_entropy(&[0.0, 3f64.ln()], 0);
        assert!((loss - 4f64.ln()).abs() <= 8.0 * f64::EPSILON, "{loss}");
    }

    #[test]
    fn spread_is_the_standard_deviation() {
        // Images of two vectors of two numbers, with the means (1, 5), (3, 5) and (8, 5).
        let mut spread = Spread::new(2);
        for image in [[0.0, 4.0, 2.0, 6.0], [3.0, 5.0, 3.0, 5.0], [16.0, 5.0, 0.0, 5.0]] {
            spread.add::<f64>(&image);
        }
        // Mean 4, squares 9 + 1 + 16.
        assert!((spread.std() - (26.0f64 / 3.0).sqrt() / 2.0).abs() < 1e-14, "{}", spread.std());
        let mut same = Spread::new(3);
        (0..5).for_each(|_| same.add::<f32>(&[0.1, 0.2, 0.3]));
        assert_eq!(same.std(), 0.0, "collapsed");
        same.add(&[f32::NAN, 0.2, 0.3]);
        assert!(same.std().is_nan());
    }

    #[test]
    fn calibration_of_known_confidences() {
        let mut calibration = Calibration::default();
        // One bin, (0.8, 0.8667]: 0.84 and 0.86, one right: |1.7 - 1|. Another: 0.2, right: 0.8. Certain and right: nothing.
        for (confidence, is_right) in [(0.84, true), (0.86, false), (0.2, true), (1.0, true)] {
            calibration.add(confidence, is_right);
        }
        assert!((calibration.error() - (0.7 + 0.8) / 4.0).abs() < 1e-15, "{}", calibration.error());
        // An edge belongs to the bin below it: apart these two would be 0.4 and 0.601 off, together 0.201.
        let mut edge = Calibration::default();
        edge.add(0.6, false);
        edge.add(0.6 + 1e-3, true);
        assert!((edge.error() - (0.6 + 0.399) / 2.0).abs() < 1e-12, "{}", edge.error());
        let mut unknown = Calibration::default();
        unknown.add(f64::NAN, true);
        assert!(unknown.error().is_nan());
    }

    #[test]
    fn draws_are_row_column_flip() {
        let mut draws = vec![9];
        crops(&[Draw { dy: -4, dx: 3, flip: true }, Draw::default()], &mut draws);
        assert_eq!(draws, [-4, 3, 1, 0, 0, 0]);
    }
}

//! How fast runs will be, measured before the first: from it follow the steps that fit into `--minutes`.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use selfie_kernels::{Backend, Element};
use selfie_model::{
    Build, Classifier, Images, ModelConfig, PatchNorm, Purpose, TrainConfig, Trainer, classify, initialize,
};

use super::plan::Plan;
use crate::data::Parts;
use crate::device::Work;
use crate::exit::Problem;

/// Steps whose time does not count: caches fill, a GPU records its step.
const WARM_UP: u64 = 2;

/// Steps that are measured at least, and test batches.
const STEPS: usize = 3;

/// Of the time asked for, so much is measured, within these bounds.
const SHARE: f64 = 0.01;
const SPAN: (f64, f64) = (0.2, 20.0);

/// Something is left for starting runs, saving them, and a machine that is busy now and then.
const SAFETY: f64 = 0.9;

/// A run of fewer steps than this learns nothing.
const FEWEST_STEPS: u64 = 10;

/// Seconds that images take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Of one in training.
    pub training: f64,
    /// Of one in a test.
    pub test: f64,
}

/// What measures it: a training that is thrown away.
pub struct Measurement<'a> {
    /// The network.
    pub model: &'a ModelConfig,
    /// How runs train.
    pub training: &'a TrainConfig,
    /// What they train on, and are tested on.
    pub parts: &'a Parts,
    /// Time for all of it.
    pub minutes: f64,
}

impl Work for Measurement<'_> {
    type Output = Pace;
    fn run<B: Backend<T>, T: Element>(self, device: B) -> anyhow::Result<Pace> {
        let Self { model, training, parts, minutes } = self;
        let span = Duration::from_secs_f64((60.0 * minutes * SHARE).clamp(SPAN.0, SPAN.1));
        let purpose = if training.accumulate > 1 { Purpose::Accumulate } else { Purpose::Train };
        let build = Build { config: model, batch: training.micro_batch(), purpose, seed: training.seed };
        let network = Classifier::<B, T>::new(device, build, parts.train.dataset.classes().len())?;
        let mut trainer = Trainer::new(network, parts.train.clone(), training, None)?;
        for _ in 0..WARM_UP {
            trainer.step()?;
        }
        let (began, mut steps) = (Instant::now(), 0);
        while steps < STEPS || began.elapsed() < span {
            trainer.step()?;
            steps += 1;
        }
        let training_seconds = began.elapsed().as_secs_f64() / (steps * training.batch) as f64;
        let test = parts.test.as_ref().context("a table needs a test part")?;
        let items: Vec<usize> = test.items.iter().copied().take(STEPS * training.micro_batch()).collect();
        let (began, tested) = (Instant::now(), items.len());
        classify(&mut trainer.into_network(), &Images { items, ..test.clone() }, |_, _| ())?;
        Ok(Pace { training: training_seconds, test: began.elapsed().as_secs_f64() / tested as f64 })
    }
}

/// Images of a run's step: no more than it has.
pub fn batch(training: &TrainConfig, images: usize) -> usize {
    training.batch.min(images.max(1))
}

/// How many steps of each run fit into the plan's time, of which `spent` seconds are over.
///
/// # Errors
/// Usage: too few.
pub fn steps(plan: &Plan, pace: Pace, training: &TrainConfig, minutes: f64, spent: f64) -> anyhow::Result<u64> {
    let test_images = plan.data.pointer("/test/used").and_then(serde_json::Value::as_u64).unwrap_or(0) as f64;
    let searched = plan.searched().len() as f64;
    let (mut step, mut tests) = (0.0, 0.0);
    for budget in &plan.budgets {
        let arms = plan.arms.len() as f64;
        step += arms * (plan.seeds as f64 + searched) * batch(training, budget.images) as f64 * pace.training;
        tests += arms * plan.seeds as f64 * test_images * pace.test;
        tests += arms * searched * plan.validation * budget.images as f64 * pace.test;
    }
    let left = SAFETY * 60.0 * minutes - spent - tests;
    let steps = (left / step).max(0.0) as u64;
    if steps < FEWEST_STEPS {
        let least = (FEWEST_STEPS as f64 * step + tests + spent) / SAFETY;
        return Err(Problem::usage(format!(
            "--minutes {minutes} is too short: on this machine {:.2} are the least, for runs of {FEWEST_STEPS} steps; give \
             more, or fewer --labels, --seeds or --lr",
            least / 60.0
        )));
    }
    Ok(steps)
}

/// Whether an arm's weights fit the network: seen before the first step, not hours later.
pub struct Fitting<'a> {
    /// The network.
    pub model: &'a ModelConfig,
    /// Its classes.
    pub classes: usize,
    /// The weights.
    pub init: &'a Path,
    /// What becomes of the last norm of the patch network.
    pub patch_norm: PatchNorm,
}

impl Work for Fitting<'_> {
    type Output = String;
    fn run<B: Backend<T>, T: Element>(self, device: B) -> anyhow::Result<String> {
        let build = Build { config: self.model, batch: 1, purpose: Purpose::Evaluate, seed: 0 };
        let mut network = Classifier::<B, T>::new(device, build, self.classes)?;
        let done = initialize(&mut network, self.init, self.patch_norm);
        Ok(done.with_context(|| format!("cannot start from {}", self.init.display()))?.to_string())
    }
}

//! The measurements.

use std::sync::Arc;
use std::time::{Duration, Instant};

use selfie_kernels::{Backend, Call, Element};
use selfie_model::{
    Build, Classifier, Feed, Images, MemoryPlan, ModelConfig, Network, Purpose, Selfie, Sizes, Steps, TrainConfig,
    Trainer, evaluate, evaluation_loader, training_loader,
};

use super::ceilings::Ceilings;
use super::yardstick::{Compared, Yardstick};
use crate::args::Timed;
use crate::device::Work;
use crate::memory::{self, Beside, Need};
use crate::progress::Reporter;
use crate::system::peak_bytes;

/// Steps that don't count, first: a GPU loads its kernels in one, and records the second.
pub const WARM_UP: usize = 2;
/// Batches that may be made before anyone asks for them.
const AHEAD: usize = 3;
/// Parts of the time for the step, the whole run, the loader, and the step's passes; the rest is for building networks and
/// for ceilings.
const PARTS: [f64; 4] = [0.25, 0.25, 0.1, 0.25];

/// What is measured.
pub struct Subject<'a> {
    /// What a step is.
    pub task: Timed,
    /// The network.
    pub model: &'a ModelConfig,
    /// Images of a step.
    pub batch: usize,
    /// Classes of a classifier.
    pub classes: usize,
    /// What is loaded.
    pub images: &'a Images,
    /// How it is trained.
    pub training: TrainConfig,
    /// Time for all of it.
    pub seconds: Duration,
}

/// What was found.
pub struct Found {
    /// The device in words.
    pub device: String,
    /// Images a second of the loader alone.
    pub loader: f64,
    /// Of the step alone, as it is trained.
    pub step: f64,
    /// Of both together.
    pub run: f64,
    /// The part of the whole run that waited for the loader; none where that is not known.
    pub waited: Option<f64>,
    /// Seconds of a step, the median.
    pub step_seconds: f64,
    /// The most memory that training took, in bytes, where it is known.
    pub peak: Option<u64>,
    /// The roofline.
    pub ceilings: Ceilings,
    /// Where a step's time goes.
    pub passes: Passes,
    /// Ours beside PyTorch's.
    pub compared: Option<Compared>,
}

/// The passes of a step. On a GPU they are timed by events, which wait for whole kernels: nothing of a pass is beside the one
/// before it, as it may be in a step that is not timed.
pub struct Passes {
    /// Steps that were timed.
    pub steps: usize,
    /// Seconds of such a step, the mean.
    pub seconds: f64,
    /// Each pass of a step, in order, and how many seconds it took, the mean.
    pub calls: Vec<(Call, f64)>,
}

/// The measurements, on whatever device was chosen.
pub struct Measurement<'a> {
    /// Of what.
    pub subject: &'a Subject<'a>,
    /// What to compare with.
    pub yardstick: Option<&'a mut Yardstick>,
    /// Speaks to the person.
    pub reporter: &'a Reporter,
}

impl Subject<'_> {
    /// Why the network is built.
    pub fn purpose(&self) -> Purpose {
        match self.task {
            Timed::Pretrain | Timed::Finetune => Purpose::Train,
            Timed::Infer => Purpose::Evaluate,
        }
    }

    /// What is built.
    pub fn build(&self) -> Build<'_> {
        Build { config: self.model, batch: self.batch, purpose: self.purpose(), seed: self.training.seed }
    }

    /// What a batch of the network looks like.
    fn sizes(&self) -> Sizes {
        let targets = if self.task == Timed::Pretrain { self.model.patches() } else { 1 };
        Sizes { batch: self.batch, image: [self.model.image_size; 2], targets }
    }

    fn part(&self, part: usize) -> Duration {
        self.seconds.mul_f64(PARTS[part])
    }

    /// Images a second of the loader with nothing beside it.
    fn loader(&self) -> anyhow::Result<f64> {
        let (images, sizes) = (self.images.clone(), self.sizes());
        // The batches that are there before the first is asked for say nothing.
        let ahead = AHEAD * images.workers.max(1);
        let each = match self.purpose() {
            Purpose::Evaluate => {
                let images = self.cycled(images.items.len().div_ceil(self.batch));
                let mut loader = evaluation_loader(&images, &sizes)?;
                seconds(self.part(2), ahead, || {
                    loop {
                        match loader.next_batch()? {
                            Some(batch) => {
                                loader.recycle(batch);
                                return Ok(());
                            }
                            None => loader = evaluation_loader(&images, &sizes)?,
                        }
                    }
                })
            }
            Purpose::Train | Purpose::Accumulate => {
                let mut loader = training_loader(images, &sizes, &self.training, 0)?;
                seconds(self.part(2), ahead, || {
                    let batch = loader.next_batch()?;
                    loader.recycle(batch);
                    Ok(())
                })
            }
        }?;
        Ok(self.rate(each.iter().sum::<f64>() / each.len() as f64))
    }

    /// So many whole batches of the images, over and over.
    fn cycled(&self, batches: usize) -> Images {
        let items = self.images.items.iter().copied().cycle().take(batches * self.batch).collect();
        Images { items, ..self.images.clone() }
    }

    /// Images a second where a batch takes so many seconds.
    pub fn rate(&self, seconds: f64) -> f64 {
        self.batch as f64 / seconds
    }
}

impl Work for Measurement<'_> {
    type Output = Found;
    fn run<B: Backend<T>, T: Element>(self, device: B) -> anyhow::Result<Found> {
        let (subject, build) = (self.subject, self.subject.build());
        match subject.task {
            Timed::Pretrain => {
                let plan = Selfie::<B, T>::memory_plan(build)?;
                self.measure(device, plan, |device| Selfie::<B, T>::new(device, build))
            }
            Timed::Finetune | Timed::Infer => {
                let plan = Classifier::<B, T>::memory_plan(build, subject.classes)?;
                self.measure(device, plan, |device| Classifier::<B, T>::new(device, build, subject.classes))
            }
        }
    }
}

impl Measurement<'_> {
    fn measure<B: Backend<T>, T: Element, N: Network<B, T>>(
        self,
        device: B,
        plan: MemoryPlan,
        build: impl Fn(Arc<B>) -> selfie_model::Result<N>,
    ) -> anyhow::Result<Found> {
        let Self { subject, yardstick, reporter } = self;
        let workers = subject.images.workers;
        let beside = match subject.purpose() {
            Purpose::Evaluate => Beside::Evaluation { workers },
            Purpose::Train | Purpose::Accumulate => Beside::Training { workers, accumulate: 1 },
        };
        let (batch, image_size) = (subject.batch, subject.model.image_size);
        let plan = plan.with_workspace(&device);
        memory::check(&Need { plan: &plan, batch, image_size, beside }, &device, reporter)?;
        let free = device.capacity();
        let device = Arc::new(device);

        reporter.say("measuring the step as it is trained");
        let mut steps = Steps::new(build(device.clone())?, subject.purpose(), Feed::Staged, subject.classes)?;
        let each = seconds(subject.part(0), WARM_UP, || {
            steps.step()?;
            Ok(steps.finish().map(|_| ())?)
        })?;
        let step_seconds = median(&each);

        reporter.say("measuring the whole run, loader and step");
        let (run, waited) = whole_run(subject, steps.into_network(), step_seconds)?;
        // Here it has done all that training does. A device gives nothing back in between.
        let peak = match (free, device.capacity()) {
            (Some(free), Some(left)) => Some((free.saturating_sub(left) + device.workspace_bytes(0)) as u64),
            _ => peak_bytes(),
        };

        reporter.say("measuring the loader alone");
        let loader = subject.loader()?;

        reporter.say("measuring what the device can do at most");
        let ceilings = Ceilings::measure::<B, T>(&device)?;

        reporter.say("timing each pass of the step");
        let passes = passes(subject, build(Arc::new(device.profiled()))?)?;

        let compared = match yardstick {
            None => None,
            Some(yardstick) => {
                reporter.say("taking turns with PyTorch");
                let network = build(device.clone())?;
                let steps = Steps::new(network, subject.purpose(), Feed::Resident, subject.classes)?;
                Some(yardstick.compare(subject, steps, step_seconds)?)
            }
        };
        let (step, device) = (subject.rate(step_seconds), device.describe());
        Ok(Found { device, loader, step, run, waited, step_seconds, peak, ceilings, passes, compared })
    }
}

/// Images a second of loader and step together, and the part of the time that the loader was waited for.
fn whole_run<B: Backend<T>, T: Element, N: Network<B, T>>(
    subject: &Subject<'_>,
    mut network: N,
    step_seconds: f64,
) -> anyhow::Result<(f64, Option<f64>)> {
    if subject.purpose() == Purpose::Evaluate {
        let batches = (subject.part(1).as_secs_f64() / step_seconds).clamp(1.0, 1e5) as usize;
        let images = subject.cycled(batches);
        let began = Instant::now();
        evaluate(&mut network, &images)?;
        return Ok((images.items.len() as f64 / began.elapsed().as_secs_f64(), None));
    }
    let mut trainer = Trainer::new(network, subject.images.clone(), &subject.training, None)?;
    let mut waited = Vec::new();
    let each = seconds(subject.part(1), WARM_UP, || {
        waited.push(trainer.step()?.data_wait_seconds);
        Ok(())
    })?;
    let taken: f64 = each.iter().sum();
    let waited: f64 = waited.iter().skip(WARM_UP).sum();
    Ok((subject.rate(taken / each.len() as f64), Some(waited / taken)))
}

/// Where a step's time goes: of a network on a device that notes it.
fn passes<B: Backend<T>, T: Element, N: Network<B, T>>(subject: &Subject<'_>, network: N) -> anyhow::Result<Passes> {
    let device = network.device().clone();
    let mut steps = Steps::new(network, subject.purpose(), Feed::Staged, subject.classes)?;
    let mut all: Vec<Vec<Call>> = Vec::new();
    let mut whole = Vec::new();
    seconds(subject.part(3), WARM_UP, || {
        let began = Instant::now();
        steps.step()?;
        steps.finish()?;
        whole.push(began.elapsed().as_secs_f64());
        all.push(device.calls()?);
        Ok(())
    })?;
    let (all, whole) = (&all[WARM_UP..], &whole[WARM_UP..]);
    let mean = |sum: f64| sum / whole.len() as f64;
    // A step makes the same calls every time; the fastest one is the one to look at.
    let fastest = (0..whole.len()).min_by(|&a, &b| whole[a].total_cmp(&whole[b])).unwrap_or(0);
    let calls = all[fastest].iter().enumerate();
    let calls = calls.map(|(place, call)| (call.clone(), mean(all.iter().map(|step| step[place].seconds()).sum())));
    Ok(Passes { steps: whole.len(), seconds: mean(whole.iter().sum()), calls: calls.collect() })
}

/// Seconds of each `step` for as long as `time`, at least one; `warm_up` of them come first, and don't count.
fn seconds(time: Duration, warm_up: usize, mut step: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<Vec<f64>> {
    let begun = Instant::now();
    (0..warm_up).try_for_each(|_| step())?;
    let mut all = Vec::new();
    while all.is_empty() || begun.elapsed() < time {
        let began = Instant::now();
        step()?;
        all.push(began.elapsed().as_secs_f64());
    }
    Ok(all)
}

/// The value in the middle, of an even number the upper one; there must be one.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

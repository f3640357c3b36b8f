//! The training step, and what surrounds it.

use crate::ModelConfig;
use crate::checkpoint::{Checkpoint, CheckpointStore, Progress};
use crate::draws::PhiloxDraws;
use crate::error::{Error, Result};
use crate::evaluation::{Evaluation, Images, crops, evaluate, loader_config, targets_of};
use crate::network::{Begin, Inputs, Metrics, Network, Sizes, Update};
use crate::replay::{self, About, StepBatch};
use crate::schedule::Schedule;
use crate::train_config::TrainConfig;
use selfie_data::{Augment, BadFile, Batch, Dataset, EpochStream, LoaderConfig, TrainLoader};
use selfie_kernels::{Backend, Element};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Steps in a row whose update was not finite, and training stops.
pub const MAX_SKIPPED_IN_A_ROW: u32 = 3;

/// The loader of a training on `images` of a network of these sizes, from batch number `first` on.
///
/// # Errors
/// Those of the loader.
pub fn training_loader(images: Images, sizes: &Sizes, config: &TrainConfig, first: u64) -> Result<TrainLoader> {
    let draws = Arc::new(PhiloxDraws { seed: config.seed, patches: sizes.ordered_patches() });
    let stream = Arc::new(EpochStream::new(images.items, draws.clone())?);
    let augment = match (config.augment, sizes.targets) {
        (false, _) => Augment::Eval,
        (true, 1) => Augment::Train,
        // Pretraining: a target for each patch.
        (true, _) => Augment::Unpadded,
    };
    // Two batches ahead for each worker.
    let depth = 2 * images.workers.max(1);
    let loading = LoaderConfig { workers: images.workers, depth, max_bad: images.max_bad, ..loader_config(sizes) };
    Ok(TrainLoader::new(images.dataset, stream, draws, augment, loading, first)?)
}

/// Trains a network, step by step, on images in a seeded order.
///
/// What a step does is a function of the configuration, the data and the step's number, so a run that was stopped and
/// resumed is the run that was not, bit for bit. The exception is a length in minutes: there the learning rate
/// follows the clock.
pub struct Trainer<B: Backend<T>, T: Element, N: Network<B, T>> {
    network: N,
    dataset: Arc<dyn Dataset>,
    loader: TrainLoader,
    epoch_len: usize,
    schedule: Schedule,
    config: TrainConfig,
    progress: Progress,
    started: Instant,
    /// Of the last step, one for each micro-batch: kept for [`Trainer::write_step`] until the next.
    batches: Vec<Batch>,
    next: Next,
    /// Bad images met up to the batches of the last step.
    bad_files: usize,
    /// Time that the present step waited for the loader.
    data_wait: Duration,
    targets: Vec<u32>,
    draws: Vec<i32>,
    kind: PhantomData<(B, T)>,
}

/// The batch that comes after those of the present step.
#[derive(Default)]
enum Next {
    #[default]
    InTheLoader,
    /// In the host's memory; or why there is none.
    Fetched(Result<Batch>),
    /// And on the device.
    Staged(Batch),
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepMetrics {
    /// The step, counted from 1: as many are done.
    pub step: u64,
    /// Images seen, over images there are.
    pub epoch: f64,
    /// Mean over the batch, before the update.
    pub loss: f64,
    /// Between 0 and 1.
    pub accuracy: f64,
    /// Of this step.
    pub learning_rate: f64,
    /// Euclidean norm of the gradient, without weight decay.
    pub gradient_norm: f64,
    /// Whether loss and gradient were finite. Otherwise nothing was changed and the batch is skipped;
    /// [`Trainer::write_step`] has it.
    pub finite: bool,
    /// Images of the step.
    pub images: usize,
    /// Duration of the step.
    pub seconds: f64,
    /// The part of it that was spent waiting for the loader, whether or not the device had work meanwhile.
    pub data_wait_seconds: f64,
}

impl StepMetrics {
    /// Throughput of the step.
    pub fn images_per_second(&self) -> f64 {
        self.images as f64 / self.seconds
    }
}

impl<B: Backend<T>, T: Element, N: Network<B, T>> Trainer<B, T, N> {
    /// Training of `network`, built for [`TrainConfig::micro_batch`] images, on `images`; from its present parameters,
    /// or from where `resume` was saved.
    ///
    /// # Errors
    /// [`Error::Usage`] for a wrong configuration; [`Error::OtherNetwork`] for a checkpoint that does not fit.
    pub fn new(
        mut network: N,
        images: Images,
        config: &TrainConfig,
        resume: Option<&Checkpoint<T::Wide>>,
    ) -> Result<Self> {
        config.check()?;
        let sizes = network.sizes();
        if sizes.batch != config.micro_batch() {
            let expected = format!("{} images, the batch of the network", sizes.batch);
            return Err(Error::usage("train.batch / train.accumulate", config.micro_batch(), expected));
        }
        let fresh = Progress { step: 0, seconds: 0.0, skipped: 0, skipped_in_a_row: 0, seed: config.seed };
        let progress = resume.map_or(fresh, |checkpoint| checkpoint.progress);
        if progress.seed != config.seed {
            return Err(Error::usage("train.seed", config.seed, format!("{}, as in the checkpoint", progress.seed)));
        }
        if let Some(checkpoint) = resume {
            checkpoint.restore(&mut network)?;
        }

        let epoch_len = images.items.len();
        let dataset = images.dataset.clone();
        Ok(Self {
            loader: training_loader(images, &sizes, config, progress.step * config.accumulate as u64)?,
            network,
            dataset,
            epoch_len,
            schedule: config.schedule(epoch_len),
            config: config.clone(),
            progress,
            started: Instant::now(),
            batches: Vec::new(),
            next: Next::InTheLoader,
            bad_files: 0,
            data_wait: Duration::ZERO,
            targets: Vec::new(),
            draws: Vec::new(),
            kind: PhantomData,
        })
    }

    /// Takes one step, and waits for it: the metrics are its own. While the device works, the batch that follows is fetched,
    /// checked and staged; what is wrong with that is said by the step that needs it.
    ///
    /// # Errors
    /// [`Error::Diverged`] after [`MAX_SKIPPED_IN_A_ROW`] steps that were not finite; too many bad images; those of the
    /// device.
    pub fn step(&mut self) -> Result<StepMetrics> {
        let begun = Instant::now();
        let learning_rate = self.schedule.rate(self.progress.step, self.elapsed());
        self.data_wait = Duration::ZERO;
        self.batches.drain(..).for_each(|batch| self.loader.recycle(batch));

        match self.config.accumulate {
            1 => self.launch(learning_rate)?,
            parts => self.launch_parts(learning_rate, parts)?,
        }
        let Metrics { loss, accuracy, gradient_norm, finite } = self.network.metrics()?;

        self.count(finite);
        if self.progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW {
            let Progress { step, skipped_in_a_row, .. } = self.progress;
            return Err(Error::Diverged { step, loss, gradient_norm, in_a_row: skipped_in_a_row });
        }
        Ok(StepMetrics {
            step: self.progress.step,
            epoch: self.progress.step as f64 * self.config.batch as f64 / self.epoch_len as f64,
            loss,
            accuracy,
            learning_rate,
            gradient_norm,
            finite,
            images: self.config.batch,
            seconds: begun.elapsed().as_secs_f64(),
            data_wait_seconds: self.data_wait.as_secs_f64(),
        })
    }

    /// Gives the device a step of one batch, and prepares the next.
    fn launch(&mut self, rate: f64) -> Result<()> {
        self.take_batch()?;
        self.network.begin(Begin::Step { rate })?;
        self.network.train_step(self.update())?;
        self.look_ahead();
        Ok(())
    }

    /// The same for a step of several micro-batches.
    fn launch_parts(&mut self, rate: f64, parts: usize) -> Result<()> {
        for part in 0..parts {
            self.take_batch()?;
            self.network.begin(if part == 0 { Begin::Step { rate } } else { Begin::Part })?;
            self.network.train_part(1.0 / parts as f64)?;
            if part + 1 == parts {
                self.network.update(self.update())?;
            }
            self.look_ahead();
        }
        Ok(())
    }

    fn update(&self) -> Update {
        let TrainConfig { momentum, weight_decay, .. } = self.config;
        Update { momentum, weight_decay }
    }

    /// The batch whose turn it is, staged, and kept until the next step.
    fn take_batch(&mut self) -> Result<()> {
        let next = match std::mem::take(&mut self.next) {
            Next::Staged(batch) => Ok(batch),
            Next::Fetched(batch) => batch.and_then(|batch| self.stage(batch)),
            Next::InTheLoader => self.fetch().and_then(|batch| self.stage(batch)),
        };
        self.bad_files = self.loader.bad_files().len();
        self.batches.push(next?);
        Ok(())
    }

    /// Fetches and stages the batch after those that were taken, unless training ends with this step.
    fn look_ahead(&mut self) {
        let more_of_the_step = self.batches.len() < self.config.accumulate;
        if more_of_the_step || !self.schedule.is_over(self.progress.step + 1, self.elapsed()) {
            self.next = match self.fetch().and_then(|batch| self.stage(batch)) {
                Ok(batch) => Next::Staged(batch),
                Err(error) => Next::Fetched(Err(error)),
            };
        }
    }

    fn fetch(&mut self) -> Result<Batch> {
        let waiting = Instant::now();
        let batch = self.loader.next_batch()?;
        self.data_wait += waiting.elapsed();
        Ok(batch)
    }

    /// Brings a batch to the network, with its targets.
    fn stage(&mut self, batch: Batch) -> Result<Batch> {
        let mut targets = std::mem::take(&mut self.targets);
        targets_of(&self.network.sizes(), &*self.dataset, &batch, &mut targets)?;
        self.targets = targets;
        crops(&batch.draws, &mut self.draws);
        self.network.stage(&Inputs {
            images: &batch.images,
            draws: &self.draws,
            targets: &self.targets,
            first_sample: batch.step * self.network.sizes().batch as u64,
            valid: batch.valid,
        })?;
        Ok(batch)
    }

    /// Someone else is about to stage batches of their own.
    fn lend_staging(&mut self) {
        if let Next::Staged(batch) = std::mem::take(&mut self.next) {
            self.next = Next::Fetched(Ok(batch));
        }
    }

    fn count(&mut self, finite: bool) {
        self.progress.step += 1;
        if finite {
            self.progress.skipped_in_a_row = 0;
        } else {
            self.progress.skipped += 1;
            self.progress.skipped_in_a_row += 1;
        }
    }

    /// Whether the schedule is at its end.
    pub fn is_over(&self) -> bool {
        self.schedule.is_over(self.progress.step, self.elapsed())
    }

    /// The part of training that is done, between 0 and 1.
    pub fn fraction(&self) -> f64 {
        self.schedule.fraction(self.progress.step, self.elapsed())
    }

    /// Loss and accuracy on held-out images, see [`evaluate`]. Changes nothing that training depends on.
    ///
    /// # Errors
    /// As [`evaluate`].
    pub fn evaluate(&mut self, images: &Images) -> Result<Evaluation> {
        self.lend_staging();
        evaluate(&mut self.network, images)
    }

    /// Saves a checkpoint, with the run's configuration.
    ///
    /// # Errors
    /// As [`CheckpointStore::save`].
    pub fn save(&self, store: &CheckpointStore, config: &serde_json::Value) -> Result<PathBuf> {
        store.save(&self.network, self.progress(), config)
    }

    /// Where training stands.
    pub fn progress(&self) -> Progress {
        Progress { seconds: self.elapsed().as_secs_f64(), ..self.progress }
    }

    /// The learning rate over time.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// The network.
    pub fn network(&self) -> &N {
        &self.network
    }

    /// The same, writable: for evaluations of its own kind. Its parameters, momenta and statistics are training's.
    pub fn network_mut(&mut self) -> &mut N {
        self.lend_staging();
        &mut self.network
    }

    /// The network, trained so far.
    pub fn into_network(self) -> N {
        self.network
    }

    /// The bad images met so far, each once.
    pub fn bad_files(&self) -> &[BadFile] {
        &self.loader.bad_files()[..self.bad_files]
    }

    /// Counts bad images that an earlier process of the run met.
    pub fn recall_bad(&mut self, bad: impl IntoIterator<Item = BadFile>) {
        self.loader.recall_bad(bad);
        self.bad_files = self.loader.bad_files().len();
    }

    /// Writes the last step, with the parameters that it met if it was not finite, to a file that [`crate::Replay`]
    /// reads. `model` is the network's configuration, `classes` a classifier's.
    ///
    /// # Errors
    /// [`Error::Write`]; those of the device.
    pub fn write_step(&self, path: &Path, model: &ModelConfig, classes: Option<usize>) -> Result<()> {
        let mut step = StepBatch::default();
        let mut part = (Vec::new(), Vec::new());
        for batch in &self.batches {
            step.images.extend_from_slice(&batch.images);
            crops(&batch.draws, &mut part.0);
            step.draws.append(&mut part.0);
            targets_of(&self.network.sizes(), &*self.dataset, batch, &mut part.1)?;
            step.targets.append(&mut part.1);
            step.indices.extend_from_slice(&batch.indices);
        }
        let samples = self.network.sizes().batch as u64;
        let about = About {
            step: self.progress.step,
            seed: self.config.seed,
            loss: self.network.loss()?.loss.to_string(),
            first_samples: self.batches.iter().map(|batch| batch.step * samples).collect(),
            keys: step.indices.iter().map(|&index| self.dataset.key(index as usize)).collect(),
            model: model.clone(),
            classes,
        };
        replay::write(&self.network, &about, &step, path)
    }

    fn elapsed(&self) -> Duration {
        Duration::from_secs_f64(self.progress.seconds) + self.started.elapsed()
    }
}

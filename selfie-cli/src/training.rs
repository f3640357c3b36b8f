//! The training loop of every command: steps, metrics, evaluations, checkpoints, signals.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use selfie_data::BadFile;
use selfie_kernels::{Backend, Element};
use selfie_model::{
    About, CheckpointStore, Evaluation, Images, Length, ModelConfig, Network, StepMetrics, Trainer, write_weights,
};

use crate::config::{Resolved, Train};
use crate::data::limited;
use crate::progress::Reporter;
use crate::run_folder::{Line, Metrics, NOT_FINITE, RunFolder, SKIPPED, State, Status, step_files};
use crate::screen;
use crate::shell;
use crate::signals::{AtOnce, Signals};
use crate::system::peak_bytes;

/// `status.json` is rewritten at least this often.
const STATUS_EVERY: Duration = Duration::from_secs(10);

/// Files of steps that were not finite that a run keeps.
const MAX_STEP_FILES: usize = 5;

/// What the loop needs beside the trainer.
pub struct Job<'a> {
    /// The configuration.
    pub resolved: &'a Resolved,
    /// Where everything is written.
    pub folder: &'a RunFolder,
    /// The network, for the weights' `config.json`.
    pub model: &'a ModelConfig,
    /// Names of the classes; none in pretraining.
    pub classes: &'a [String],
    /// Images to measure by.
    pub held_out: Option<Images>,
    /// Accuracy of guessing.
    pub chance: f64,
    /// Images of a step over images there are.
    pub epochs_per_step: f64,
    /// Asks for a stop.
    pub signals: &'a Signals,
    /// What is printed at the end.
    pub answer: Answer,
}

/// What a command of training prints at its end, beside what it says on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Nothing.
    Words,
    /// The run's status as JSON.
    Json,
}

impl Job<'_> {
    /// As long as the result lives, a signal ends the process on the spot: everything is saved, as `status` will say.
    pub fn leave_at_once(&self, mut status: Status) -> AtOnce {
        let (root, answer) = (self.folder.root().to_path_buf(), self.answer);
        status.state = State::Stopped;
        self.signals.at_once(move || {
            screen::end_bar();
            if let Err(error) = status.write(&root) {
                screen::line(format!("note: {error:#}"));
            }
            let said = stopped_at(status.step);
            tracing::info!("{said}");
            screen::line(said);
            if answer == Answer::Json
                && let Err(error) = status.print()
            {
                screen::line(format!("note: {error:#}"));
            }
        })
    }

    /// Writes that an error ended the run at `step`.
    pub fn record_failure(&self, error: &anyhow::Error, step: u64) {
        let state = match error.downcast_ref() {
            Some(selfie_model::Error::Diverged { .. }) => State::Diverged,
            _ => State::Failed,
        };
        // The error itself is what counts.
        let _ = Status::new(self.resolved.task.name(), state, step, None).write(self.folder.root());
    }
}

fn stopped_at(step: u64) -> String {
    format!("saved at step {step}, as asked: the same command goes on from there")
}

/// How the loop ended.
#[derive(Debug)]
pub enum Ended {
    /// All steps are done; with the last measurement on held-out images.
    Finished(Option<Evaluation>),
    /// Saved and stopped on a signal.
    Stopped,
}

/// Called after every step: the demonstration looks at the network in between.
pub type Observer<'a, B, T, N> =
    &'a mut dyn FnMut(&mut Trainer<B, T, N>, &StepMetrics, &Reporter) -> anyhow::Result<()>;

/// Gives the accuracy of a probe of the network's features, which must not change the network; none where they are not finite.
pub type Probe<'a, N> = Box<dyn FnMut(&N, &Reporter) -> anyhow::Result<Option<f64>> + 'a>;

/// Trains to the end, or until a signal. The reporter's line of training is begun and ended here.
///
/// # Errors
/// Those of trainer, data and disk; the run's status says so then.
pub fn train<B, T, N>(
    trainer: &mut Trainer<B, T, N>,
    job: &Job<'_>,
    reporter: &mut Reporter,
    probe: Option<Probe<'_, N>>,
    observe: Observer<'_, B, T, N>,
) -> anyhow::Result<Ended>
where
    B: Backend<T>,
    T: Element,
    N: Network<B, T>,
{
    job.signals.after_step();
    reporter.begin(job.resolved.task.name(), trainer.fraction(), job.chance);
    let result = Loop::new(trainer, job, reporter, probe).and_then(|mut state| state.run(observe));
    reporter.end();
    result.inspect_err(|error| job.record_failure(error, trainer.progress().step))
}

/// A training while it runs.
struct Loop<'a, B: Backend<T>, T: Element, N: Network<B, T>> {
    trainer: &'a mut Trainer<B, T, N>,
    job: &'a Job<'a>,
    reporter: &'a mut Reporter,
    probe: Option<Probe<'a, N>>,
    settings: Train,
    metrics: Metrics,
    store: CheckpointStore,
    config: serde_json::Value,
    /// Lines of `skipped.txt`.
    skipped: BTreeSet<String>,
    /// Bad images that the trainer has met and that are among them.
    bad_files: usize,
    since_line: SinceLine,
    /// The step of the last save of this process.
    saved_at: Option<u64>,
    status_written: Instant,
}

/// Sums since the last line of metrics.
#[derive(Default)]
struct SinceLine {
    images: f64,
    seconds: f64,
    waited: f64,
}

impl<'a, B: Backend<T>, T: Element, N: Network<B, T>> Loop<'a, B, T, N> {
    fn new(
        trainer: &'a mut Trainer<B, T, N>,
        job: &'a Job<'a>,
        reporter: &'a mut Reporter,
        probe: Option<Probe<'a, N>>,
    ) -> anyhow::Result<Self> {
        let settings = job.resolved.settings().train;
        Ok(Self {
            metrics: Metrics::open(job.folder.root(), trainer.progress().step)?,
            store: CheckpointStore::new(job.folder.state(), settings.keep),
            config: job.resolved.as_json(),
            skipped: job.folder.skipped(),
            bad_files: 0,
            since_line: SinceLine::default(),
            saved_at: None,
            status_written: Instant::now(),
            trainer,
            job,
            reporter,
            probe,
            settings,
        })
    }

    fn run(&mut self, observe: Observer<'_, B, T, N>) -> anyhow::Result<Ended> {
        self.write_status(State::Running)?;
        loop {
            if self.job.signals.stop_asked() {
                self.save()?;
                self.write_status(State::Stopped)?;
                let step = self.trainer.progress().step;
                self.reporter.say(stopped_at(step));
                return Ok(Ended::Stopped);
            }
            if self.trainer.is_over() {
                break;
            }
            // Before the step and not after: a run that was stopped or killed in between catches up.
            if self.evaluation_is_due() {
                self.save_before_measuring()?;
                self.evaluate(self.settings.eval_images)?;
            }
            if self.probe_is_due() {
                self.save_before_measuring()?;
                self.probe()?;
            }
            self.keep_best()?;
            let metrics = self.step()?;
            self.reporter.step(&metrics, self.trainer.fraction());
            observe(self.trainer, &metrics, self.reporter)?;
            if self.settings.save_every > 0 && metrics.step.is_multiple_of(self.settings.save_every) {
                self.save()?;
            }
        }
        self.save()?;
        let evaluation = self.evaluate(usize::MAX)?;
        self.keep_best()?;
        self.probe()?;
        Ok(Ended::Finished(evaluation))
    }

    /// Saves and marks the checkpoint of this step if it is the best so far. Which one that is follows from the metrics,
    /// so a run that is killed in between knows it as well.
    fn keep_best(&self) -> anyhow::Result<()> {
        let step = self.trainer.progress().step;
        if self.metrics.best().is_some_and(|(best, _)| best == step) && self.store.best() != Some(step) {
            self.metrics.flush()?;
            self.trainer.save(&self.store, &self.config)?;
            self.store.mark_best(step)?;
        }
        Ok(())
    }

    fn evaluation_is_due(&self) -> bool {
        let (step, every) = (self.trainer.progress().step, self.settings.eval_every);
        step > 0 && every > 0 && step.is_multiple_of(every) && !self.metrics.has_evaluation(step)
    }

    fn probe_is_due(&self) -> bool {
        let (step, every) = (self.trainer.progress().step, self.settings.probe_every);
        self.probe.is_some() && step > 0 && every > 0 && step.is_multiple_of(every) && !self.metrics.has_probe(step)
    }

    /// A signal need not wait for what is measured, and a kill then costs no step.
    fn save_before_measuring(&mut self) -> anyhow::Result<()> {
        if self.saved_at == Some(self.trainer.progress().step) { Ok(()) } else { self.save() }
    }

    fn step(&mut self) -> anyhow::Result<StepMetrics> {
        let result = self.trainer.step();
        if let Ok(StepMetrics { finite: false, .. }) | Err(selfie_model::Error::Diverged { .. }) = &result {
            self.record_not_finite()?;
        }
        let metrics = result?;
        self.since_line.images += metrics.images as f64;
        self.since_line.seconds += metrics.seconds;
        self.since_line.waited += metrics.data_wait_seconds;
        if self.trainer.bad_files().len() > self.bad_files {
            let bad = self.trainer.bad_files().to_vec();
            self.bad_files = bad.len();
            self.record_skipped(&bad)?;
        }
        if metrics.step.is_multiple_of(self.settings.log_every) || metrics.step == 1 || self.trainer.is_over() {
            self.write_line(&metrics)?;
        }
        if self.status_written.elapsed() > STATUS_EVERY {
            self.write_status(State::Running)?;
        }
        Ok(metrics)
    }

    /// Keeps a step that was not finite, unless there are enough of them: each holds all parameters.
    fn record_not_finite(&self) -> anyhow::Result<()> {
        let (folder, step) = (self.job.folder, self.trainer.progress().step);
        let name = format!("{NOT_FINITE}{step:08}.safetensors");
        let kept = if folder.file(&name).exists() || step_files(folder.root())?.len() < MAX_STEP_FILES {
            let classes = (!self.job.classes.is_empty()).then_some(self.job.classes.len());
            self.trainer.write_step(&folder.file(&name), self.job.model, classes)?;
            format!("its images and parameters are in {name} (selfie replay {})", shell::path(folder.root()))
        } else {
            format!("it is not kept, as there are {MAX_STEP_FILES} such files already")
        };
        self.reporter
            .warn(format!("step {step}: loss or gradient is not finite; its update was not applied, and {kept}"));
        Ok(())
    }

    fn write_line(&mut self, metrics: &StepMetrics) -> anyhow::Result<()> {
        let SinceLine { images, seconds, waited } = std::mem::take(&mut self.since_line);
        let line = Line {
            step: metrics.step,
            epoch: metrics.epoch,
            loss: Some(metrics.loss),
            accuracy: Some(metrics.accuracy),
            x_chance: Some(metrics.accuracy / self.job.chance),
            learning_rate: Some(metrics.learning_rate),
            grad_norm: Some(metrics.gradient_norm),
            images_per_second: Some(images / seconds),
            data_wait: Some(waited / seconds),
            memory_bytes: peak_bytes(),
            seconds: self.trainer.progress().seconds,
            ..Line::default()
        };
        tracing::info!("{}", serde_json::to_string(&line)?);
        self.metrics.push(line)
    }

    /// Measures on at most `most` held-out images; none where there are none. What was done so far must be saved.
    fn evaluate(&mut self, most: usize) -> anyhow::Result<Option<Evaluation>> {
        let Some(held_out) = &self.job.held_out else { return Ok(None) };
        let items = limited(held_out.items.clone(), most);
        let interruptible = self.job.leave_at_once(self.status(State::Stopped));
        let evaluation = self.trainer.evaluate(&Images { items, ..held_out.clone() })?;
        drop(interruptible);
        self.record_skipped(&evaluation.skipped)?;
        let (progress, chance) = (self.trainer.progress(), self.job.chance);
        self.reporter.say(format!(
            "step {}: held-out accuracy {:.1}% ({:.1} x chance, which is {:.1}%), loss {:.3}, feature std {:.3}, n = {}",
            progress.step,
            100.0 * evaluation.accuracy,
            evaluation.accuracy / chance,
            100.0 * chance,
            evaluation.loss,
            evaluation.feature_std,
            evaluation.n
        ));
        // The last evaluation of a run that was killed right after it is there already.
        if !self.metrics.has_evaluation(progress.step) {
            self.metrics.push(Line {
                step: progress.step,
                epoch: progress.step as f64 * self.job.epochs_per_step,
                seconds: progress.seconds,
                x_chance: Some(evaluation.accuracy / chance),
                eval_loss: Some(evaluation.loss),
                eval_accuracy: Some(evaluation.accuracy),
                feature_std: Some(evaluation.feature_std),
                ..Line::default()
            })?;
        }
        Ok(Some(evaluation))
    }

    /// Probes the features, if that is asked for and was not done at this step: the last probe of a run that was killed right
    /// after it is there already. What was done so far must be saved.
    fn probe(&mut self) -> anyhow::Result<()> {
        let (progress, stopped) = (self.trainer.progress(), self.status(State::Stopped));
        let Some(probe) = self.probe.as_mut().filter(|_| !self.metrics.has_probe(progress.step)) else { return Ok(()) };
        let interruptible = self.job.leave_at_once(stopped);
        let accuracy = probe(self.trainer.network(), self.reporter)?;
        drop(interruptible);
        let Some(accuracy) = accuracy else {
            self.reporter
                .warn(format!("step {}: the features are not finite, so there is no k-NN accuracy", progress.step));
            return Ok(());
        };
        self.reporter.say(format!("step {}: k-NN accuracy {:.1}%", progress.step, 100.0 * accuracy));
        self.metrics.push(Line {
            step: progress.step,
            epoch: progress.step as f64 * self.job.epochs_per_step,
            seconds: self.trainer.progress().seconds,
            knn_accuracy: Some(accuracy),
            ..Line::default()
        })
    }

    /// Checkpoint and weights.
    fn save(&mut self) -> anyhow::Result<()> {
        self.metrics.flush()?;
        self.trainer.save(&self.store, &self.config)?;
        let about = About { model: self.job.model, classes: self.job.classes };
        write_weights(self.trainer.network(), about, &self.job.folder.weights())?;
        self.saved_at = Some(self.trainer.progress().step);
        self.write_status(State::Running)
    }

    fn write_status(&mut self, state: State) -> anyhow::Result<()> {
        self.status_written = Instant::now();
        self.status(state).write(self.job.folder.root())
    }

    fn status(&self, state: State) -> Status {
        let steps = match self.trainer.schedule().length {
            Length::Steps(steps) => Some(steps),
            Length::Time(_) => None,
        };
        let step = self.trainer.progress().step;
        Status::new(self.job.resolved.task.name(), state, step, steps)
    }

    /// Keeps `skipped.txt`.
    fn record_skipped(&mut self, bad: &[BadFile]) -> anyhow::Result<()> {
        let before = self.skipped.len();
        for file in bad {
            if self.skipped.insert(file.to_string()) {
                self.reporter.warn(format!("skipped {}: {} (see skipped.txt)", file.key, file.reason));
            }
        }
        if self.skipped.len() > before {
            let lines: String = self.skipped.iter().map(|line| line.clone() + "\n").collect();
            self.job.folder.write(SKIPPED, lines.as_bytes())?;
        }
        Ok(())
    }
}

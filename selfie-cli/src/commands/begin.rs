//! What `pretrain` and `finetune` do before the first step: configuration, data, device, run folder, checkpoint.

use std::collections::HashMap;
use std::io::Write;
use std::time::Duration;

use selfie_data::BadFile;
use selfie_kernels::Wide;
use selfie_model::{Checkpoint, CheckpointStore, ModelConfig, TrainConfig};

use crate::config::{Request, Resolved, Settings, Task};
use crate::data::{self, Parts};
use crate::device::{self, Chosen};
use crate::exit::{Exit, Problem};
use crate::log;
use crate::progress::{Reporter, Voice, duration};
use crate::run_folder::{RunFolder, State, Status};
use crate::signals::Signals;

/// How a command of training ended.
#[derive(Debug)]
pub enum Outcome<R> {
    /// All steps are done, with this result.
    Done(R),
    /// They were done before.
    AlreadyFinished,
    /// Saved and stopped on a signal.
    Stopped,
}

impl<R> Outcome<R> {
    /// The exit code.
    pub fn exit(&self) -> Exit {
        match self {
            Outcome::Done(_) | Outcome::AlreadyFinished => Exit::Done,
            Outcome::Stopped => Exit::Stopped,
        }
    }
}

/// A run before its network is built.
pub struct Beginning {
    /// The configuration.
    pub resolved: Resolved,
    /// The same as a struct.
    pub settings: Settings,
    /// How to train, with the batch that is really used.
    pub training: TrainConfig,
    /// The network.
    pub model: ModelConfig,
    /// The images.
    pub parts: Parts,
    /// Device and precision.
    pub chosen: Chosen,
    /// The run folder, locked.
    pub folder: RunFolder,
    /// Asks for a stop.
    pub signals: Signals,
    /// Speaks to the person.
    pub reporter: Reporter,
}

impl Beginning {
    /// Reads the configuration, opens the data and takes the run folder. Nothing is written into it yet.
    ///
    /// # Errors
    /// Usage, input, and what the system refuses.
    pub fn new(task: Task, request: &Request, signals: Signals, voice: Voice) -> anyhow::Result<Self> {
        let resolved = Resolved::new(task, request)?;
        let settings = resolved.settings();
        if settings.run.out.as_os_str().is_empty() {
            return Err(Problem::usage("--out is missing: give the folder where the run is to be written"));
        }
        if task == Task::Finetune && settings.train.init.is_empty() {
            return Err(Problem::usage(
                "--init is missing: give the folder of a pretraining run, a .safetensors file, or `scratch`",
            ));
        }
        RunFolder::check(&settings.run.out, &settings.data.path, task)?;
        let chosen = device::choose(&settings.run)?;
        let parts = match task {
            Task::Pretrain => data::for_pretraining(&settings.data)?,
            Task::Finetune | Task::Evaluate => data::for_finetuning(&settings.data)?,
        };
        let model = settings.network(parts.image_size)?;
        let training = settings.training();
        training.check()?;
        if task == Task::Pretrain {
            model.check_pretext()?;
            let images = parts.train.items.len();
            if training.batch > images {
                return Err(Problem::usage(format!(
                    "train.batch = {}: there are only {images} images to train on; lower --batch",
                    training.batch
                )));
            }
        }
        let folder = RunFolder::open(&settings.run.out, &settings.data.path, task)?;
        log::to(&folder.file("log.txt"))?;
        let reporter = Reporter::new(voice);
        Ok(Self { resolved, settings, training, model, parts, chosen, folder, signals, reporter })
    }

    /// Says what will be done.
    pub fn introduce(&self) {
        for note in self.chosen.notes.iter().chain(&self.parts.notes) {
            self.reporter.say(note);
        }
        let model = &self.model;
        self.reporter.say(format!(
            "network   {}: stem {}, depths {:?}, images of {} pixels",
            self.settings.model.preset, model.stem_width, model.depths, model.image_size
        ));
    }

    /// The newest checkpoint of the run folder, if there is one, compared with the configuration and the data.
    ///
    /// # Errors
    /// Usage: a value that may not change did. Input: damaged checkpoints, changed data.
    pub fn checkpoint<W: Wide>(&self) -> anyhow::Result<Option<Checkpoint<W>>> {
        let store = CheckpointStore::new(self.folder.state(), self.settings.train.keep);
        let Some(newest) = store.newest::<W>()? else {
            if self.folder.is_begun() {
                self.reporter.say("the run folder holds no checkpoint yet: starting from the beginning");
            }
            return Ok(None);
        };
        for error in newest.damaged {
            self.reporter.warn(format!("a newer checkpoint is passed over: {error}"));
        }
        for change in self.resolved.check_continues(&newest.checkpoint.config)? {
            self.reporter.warn(change);
        }
        if let Some(before) = data::read_json(&self.folder.file("data.json"))? {
            data::check_unchanged(&before, &self.parts.as_json())?;
        }
        Ok(Some(newest.checkpoint))
    }

    /// The training images that an earlier process of this run found bad, from `skipped.txt`.
    pub fn known_bad(&self) -> Vec<BadFile> {
        let lines = self.folder.skipped();
        let known: HashMap<&str, &str> = lines.iter().filter_map(|line| line.split_once('\t')).collect();
        if known.is_empty() {
            return Vec::new();
        }
        let train = &self.parts.train;
        let found = train.items.iter().map(|&index| (index, train.dataset.key(index)));
        found
            .filter_map(|(index, key)| {
                let reason = known.get(key.as_str())?.to_string();
                Some(BadFile { index, key, reason })
            })
            .collect()
    }

    /// Prints `status.json`, for scripts.
    ///
    /// # Errors
    /// A status that cannot be read, standard output that cannot be written.
    pub fn print_status(&self) -> anyhow::Result<()> {
        let status = serde_json::to_value(Status::read(self.folder.root())?)?;
        Ok(writeln!(std::io::stdout().lock(), "{status:#}")?)
    }

    /// If the run is finished, says so, and how to extend it.
    ///
    /// # Errors
    /// A status that cannot be read.
    pub fn is_finished<W>(&self, checkpoint: &Checkpoint<W>) -> anyhow::Result<bool> {
        let progress = checkpoint.progress;
        let schedule = self.training.schedule(self.parts.train.items.len());
        let over = schedule.is_over(progress.step, Duration::from_secs_f64(progress.seconds));
        let finished = Status::read(self.folder.root())?.is_some_and(|status| status.state == State::Finished);
        if over && finished {
            self.reporter.say(format!(
                "{} is finished: {} steps in {}; to go on with it, give more: --steps {} (the learning rate then follows \
                 the longer course)",
                self.folder.root().display(),
                progress.step,
                duration(progress.seconds),
                2 * progress.step
            ));
        } else {
            self.reporter.say(format!("continuing {} at step {}", self.folder.root().display(), progress.step));
        }
        Ok(over && finished)
    }
}

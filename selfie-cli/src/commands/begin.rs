//! What `pretrain` and `finetune` do before the first step: configuration, data, device, run folder, checkpoint.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use selfie_data::{BadFile, LabelBudget, write_labels};
use selfie_kernels::{Memory, Wide};
use selfie_model::{Checkpoint, CheckpointStore, Fingerprint, MemoryPlan, ModelConfig, TrainConfig, fingerprint};
use serde_json::Value;

use super::next::Labelled;
use crate::config::{Change, Entry, Origin, Request, Resolved, Settings, Task};
use crate::data::{self, Parts};
use crate::device::{self, Chosen};
use crate::exit::{Exit, Problem};
use crate::log;
use crate::memory::{self, Beside, Need};
use crate::progress::{Reporter, Voice, duration};
use crate::run_folder::{RunFolder, State, Status};
use crate::screen;
use crate::shell;
use crate::signals::Signals;
use crate::training::Answer;

/// `--init` that starts from random weights.
pub const SCRATCH: &str = "scratch";

/// The images with labels that were trained on.
pub const LABELS: &str = "labels.txt";

/// Of `data.json`: the fingerprint of the first weights.
const INIT: &str = "init";

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

/// Says of data that cannot be opened that their place is a run's, and how to name another.
pub fn where_they_were(error: anyhow::Error, resolved: &Resolved) -> anyhow::Error {
    let (data, labels) = (resolved.entry("data.path"), resolved.entry("data.labels"));
    let ours = |entry: &Entry| matches!(entry.origin, Origin::Run(_));
    let list = matches!(labels.value.plain().parse(), Ok(LabelBudget::Named(_))) && ours(labels);
    let named = [(data, ours(data), "--data"), (labels, list, "--labels")];
    let named = named.iter().filter(|(_, ours, _)| *ours);
    let places: Vec<_> =
        named.map(|(entry, _, flag)| format!("{} (by {}; {flag})", entry.value, entry.origin)).collect();
    if Exit::of(&error) != Exit::Input || places.is_empty() {
        return error;
    }
    let places = places.join(" and ");
    error.context(format!("cannot use {places}; what is in another place now can be given by its flag"))
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
    /// What is printed at the end.
    pub answer: Answer,
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
        RunFolder::check(&settings.run.out, &settings.data.path, task.name())?;
        let chosen = device::choose(&settings.run)?;
        let parts = match task {
            Task::Pretrain => data::for_pretraining(&settings.data),
            Task::Finetune | Task::Evaluate => data::for_finetuning(&settings.data),
        };
        let parts = parts.map_err(|error| where_they_were(error, &resolved))?;
        Self::with(resolved, chosen, parts, signals, voice)
    }

    /// Takes the run folder, for images and a device that are open already. Nothing is written into it yet.
    ///
    /// # Errors
    /// Usage, and what the system refuses.
    pub fn with(
        resolved: Resolved,
        chosen: Chosen,
        parts: Parts,
        signals: Signals,
        voice: Voice,
    ) -> anyhow::Result<Self> {
        let (task, settings) = (resolved.task, resolved.settings());
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
        let folder = RunFolder::open(&settings.run.out, &settings.data.path, task.name())?;
        log::to(&folder.file("log.txt"))?;
        let chosen = chosen.for_run(folder.root());
        let reporter = Reporter::new(voice);
        let answer = Answer::Words;
        Ok(Self { resolved, settings, training, model, parts, chosen, folder, signals, reporter, answer })
    }

    /// Says what will be done.
    pub fn introduce(&self) {
        for note in self.chosen.notes().chain(&self.parts.notes) {
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
        let changes = self.resolved.check_continues(&newest.checkpoint.config)?;
        changes.allowed.iter().for_each(|change| self.reporter.warn(change));
        let before = data::read_json(&self.folder.file("data.json"))?;
        for change in &changes.moved {
            self.check_moved(change, before.as_ref())?;
            self.reporter.warn(format!("{}: the same, in another place", change.text));
        }
        if let Some(before) = before {
            data::check_unchanged(&before, &self.parts.as_json())?;
        }
        Ok(Some(newest.checkpoint))
    }

    /// Whether what the run was given is what lies in another place now. `before` is the run's `data.json`.
    fn check_moved(&self, change: &Change, before: Option<&Value>) -> anyhow::Result<()> {
        let differs = match change.key {
            "train.init" => {
                // The checkpoint has all weights: the first ones are not needed any more.
                let begun = before.and_then(|before| serde_json::from_value(before[INIT].clone()).ok());
                let now = fingerprint(Path::new(&self.settings.train.init))?;
                let advice = "leave this one out: the run has its weights already";
                match begun {
                    None => Some(format!("the run does not know the weights it began with; {advice}")),
                    Some(begun) if begun == now => None,
                    Some(Fingerprint { bytes, crc32 }) => Some(format!(
                        "other weights than the run began with ({bytes} bytes of CRC-32 {crc32:08x}, now {} of {:08x}); {advice}",
                        now.bytes, now.crc32
                    )),
                }
            }
            "data.labels" => {
                let begun = std::fs::read(self.folder.file(LABELS)).unwrap_or_default();
                (self.labels()? != begun).then(|| {
                    format!("other images than the run began with, which are in {LABELS} of its folder: give that list")
                })
            }
            _ => match before {
                None => Some("the run's data.json is missing, so that the data cannot be compared; restore it".into()),
                Some(before) => data::change(before, &self.parts.as_json()).map(|change| {
                    format!("other data than the run began with: {change}; give the place where its data are now")
                }),
            },
        };
        match differs {
            None => Ok(()),
            Some(why) => Err(change.refused(&why)),
        }
    }

    /// The images that are trained on, as `labels.txt` has them.
    ///
    /// # Errors
    /// An image without a label.
    pub fn labels(&self) -> anyhow::Result<Vec<u8>> {
        let mut labels = Vec::new();
        write_labels(&*self.parts.train.dataset, &self.parts.train.items, &mut labels)?;
        Ok(labels)
    }

    /// Writes into the run folder what is known before the first step.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn describe<W>(&self, resumed: Option<&Checkpoint<W>>) -> anyhow::Result<()> {
        let mut data = self.parts.as_json();
        let init = self.settings.train.init.as_str();
        if resumed.is_some() {
            // What the run began with, wherever it is now.
            let before = data::read_json(&self.folder.file("data.json"))?;
            data[INIT] = before.map_or(Value::Null, |before| before[INIT].clone());
        } else if self.resolved.task == Task::Finetune && init != SCRATCH {
            data[INIT] = serde_json::to_value(fingerprint(Path::new(init))?)?;
        }
        self.folder.describe(&self.resolved, &data, self.chosen.table.as_ref())
    }

    /// What the next command may be trained on.
    pub fn labelled_data(&self) -> Labelled {
        Labelled::among(&self.settings.data.path, self.parts.train.dataset.classes().len())
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

    /// Refuses a network of this plan where there is not the memory for it, with all that is beside it.
    ///
    /// # Errors
    /// Out of memory.
    pub fn check_memory(&self, plan: MemoryPlan, device: &impl Memory) -> anyhow::Result<()> {
        let TrainConfig { accumulate, .. } = self.training;
        let need = Need {
            plan: &plan.with_workspace(device),
            batch: self.training.micro_batch(),
            image_size: self.model.image_size,
            beside: Beside::Training { workers: self.settings.data.workers, accumulate },
        };
        memory::check(&need, device, &self.reporter)
    }

    /// Prints what was asked for: nothing, or `status.json`. Gives the exit code.
    ///
    /// # Errors
    /// A status that cannot be read, standard output that cannot be written.
    pub fn answer<R>(&self, outcome: &Outcome<R>) -> anyhow::Result<Exit> {
        let print = || match Status::read(self.folder.root())? {
            Some(status) => status.print(),
            None => screen::print("null\n"),
        };
        match (self.answer, outcome) {
            (Answer::Words, _) => {}
            // That it stopped matters more than that it could not say so.
            (Answer::Json, Outcome::Stopped) => {
                drop(print().inspect_err(|error| self.reporter.warn(format!("{error:#}"))))
            }
            (Answer::Json, _) => print()?,
        }
        Ok(outcome.exit())
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
                "{} is finished: {} steps in {}; to go on with it (the learning rate then follows the longer course): \
                 selfie {} --out {} --steps {}",
                self.folder.root().display(),
                progress.step,
                duration(progress.seconds),
                self.resolved.task.name(),
                shell::path(self.folder.root()),
                2 * progress.step
            ));
        } else {
            self.reporter.say(format!("continuing {} at step {}", self.folder.root().display(), progress.step));
        }
        Ok(over && finished)
    }
}

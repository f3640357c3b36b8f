//! `fewlabel`: did pretraining help, and by how much? Arms x label budgets x seeds, each a run of `finetune` in a folder of
//! its own.
//!
//! What is known is what the runs' folders hold: a run is done when its `status.json` says so, which is written last. So the
//! table is made from the folders alone, and is the same however often the command was stopped or killed.

mod pace;
mod plan;
mod plot;
mod table;

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use selfie_model::{Head, ModelConfig, PatchNorm, TrainConfig};
use serde_json::json;

use self::pace::{Fitting, Measurement};
use self::plan::{Asked, Plan};
use self::table::{Cell, Score, Table, Trial, Validation};
use super::begin::{Beginning, Outcome, SCRATCH, where_they_were};
use super::finetune;
use crate::args::Fewlabel;
use crate::config::{Key, Origin, Request, Resolved, Settings, Task};
use crate::data::{Labelled, Test};
use crate::device::{self, Chosen};
use crate::exit::{Exit, Problem};
use crate::log;
use crate::progress::{Reporter, Voice, duration};
use crate::run_folder::{RunFolder, State, Status};
use crate::screen;
use crate::shell;
use crate::signals::Signals;
use crate::training::Answer;

/// The command's name.
const NAME: &str = "fewlabel";

/// Keys that the table decides for each of its runs.
pub const OF_A_RUN: &[&str] = &[
    "data.labels",
    "data.limit",
    "data.validation",
    "train.init",
    "train.steps",
    "train.epochs",
    "train.minutes",
    "train.lr",
    "train.seed",
    "train.eval_every",
    "train.eval_images",
    "train.keep",
];

/// Runs the command.
///
/// # Errors
/// Usage, input, divergence, and what the system refuses.
pub fn run(arguments: &Fewlabel) -> anyhow::Result<Exit> {
    let signals = Signals::install()?;
    let making = Making::begin(arguments, signals)?;
    let exit = making.all().and_then(|ended| match ended {
        Ended::Stopped => making.stop(),
        Ended::Finished => making.finish(),
    });
    screen::board(String::new());
    let exit = exit.inspect_err(|error| making.record_failure(error))?;
    let printed = screen::print(&making.answer()?);
    match exit {
        // That it stopped matters more than that it could not say so.
        Exit::Stopped => drop(printed.inspect_err(|error| making.reporter.warn(format!("{error:#}")))),
        _ => printed?,
    }
    Ok(exit)
}

/// How it ended.
enum Ended {
    Finished,
    Stopped,
}

/// A run of the table: an arm with a budget, as places in the plan, and what it is for.
#[derive(Clone, Copy, Debug)]
struct Run {
    budget: usize,
    arm: usize,
    aim: Aim,
}

/// What a run is for.
#[derive(Clone, Copy, Debug)]
enum Aim {
    /// To try this learning rate.
    Search(f64),
    /// For the table, with this seed and the rate that was chosen.
    Cell(u64),
}

/// The table while it is made.
struct Making {
    plan: Plan,
    /// What all runs share.
    settings: Settings,
    labelled: Labelled,
    chosen: Chosen,
    folder: RunFolder,
    /// Where the arms' weights lie.
    inits: Vec<String>,
    signals: Signals,
    reporter: Reporter,
    answer: Answer,
    began: Instant,
}

impl Making {
    /// Settles the plan, or takes up the one that was begun.
    fn begin(arguments: &Fewlabel, signals: Signals) -> anyhow::Result<Self> {
        let began = Instant::now();
        let resolved = resolve(arguments)?;
        let settings = resolved.settings();
        let out = settings.run.out.clone();
        RunFolder::check(&out, &settings.data.path, NAME)?;
        if arguments.init.is_empty() && !out.join(plan::FILE).is_file() {
            return Err(Problem::usage(
                "--init is missing: give the folder of a pretraining run, or a .safetensors file",
            ));
        }
        let chosen = device::choose(&settings.run)?;
        let labelled = Labelled::open(&settings.data).map_err(|error| where_they_were(error, &resolved))?;
        if labelled.test.is_none() {
            return Err(Problem::input(format!(
                "{}: expected a test part beside the training images (val/ or test/), found none: there is nothing to \
                 measure the runs by",
                labelled.train.describe()
            )));
        }
        let parts = labelled.parts(&settings.data, Test::Once)?;
        let model = settings.network(parts.image_size)?;
        settings.training().check()?;
        let asked = Asked::new(arguments, &labelled)?;
        let reporter = Reporter::new(Voice::Full);
        let data = parts.as_json();

        // What is wrong with a new table is said before anything is written.
        let new = if out.join(plan::FILE).is_file() {
            None
        } else {
            let mut plan = asked.plan(&resolved, &labelled, data.clone())?;
            check_networks(arguments, &resolved)?;
            check_validation(&plan, &settings, &labelled)?;
            check_weights(&plan, &settings, &model, &chosen)?;
            if let Some(minutes) = plan.minutes {
                let training = settings.training();
                let batch = pace::batch(&training, parts.train.items.len()) / training.accumulate * training.accumulate;
                let training = TrainConfig { batch: batch.max(training.accumulate), ..training };
                let pace = chosen.run(Measurement { model: &model, training: &training, parts: &parts, minutes })?;
                plan.steps = pace::steps(&plan, pace, &training, minutes, began.elapsed().as_secs_f64())?;
            }
            Some(plan)
        };
        let folder = RunFolder::open(&out, &settings.data.path, NAME)?;
        log::to(&folder.file("log.txt"))?;
        let chosen = chosen.for_run(folder.root());
        for note in chosen.notes().chain(parts.notes.first()) {
            reporter.say(note);
        }
        // Another process may have begun it meanwhile.
        let (plan, inits) = match Plan::read(&out)? {
            Some(plan) => {
                let inits = asked.inits(&plan);
                asked.check_continues(&plan, &out)?;
                plan.check_weights(&inits, &out)?;
                let notes = plan.check_unchanged(&resolved, &data)?;
                notes.iter().for_each(|note| reporter.warn(note));
                folder.describe(&resolved, &data, chosen.table.as_ref())?;
                reporter.say(format!("continuing {}", out.display()));
                (plan, inits)
            }
            None => {
                let plan = new.context("the plan was taken away meanwhile")?;
                folder.describe(&resolved, &data, chosen.table.as_ref())?;
                plan.write(&out)?;
                let inits = plan.arms.iter().map(|arm| arm.init.clone()).collect();
                (plan, inits)
            }
        };
        let answer = if arguments.json { Answer::Json } else { Answer::Words };
        let making = Self { plan, settings, labelled, chosen, folder, inits, signals, reporter, answer, began };
        making.introduce();
        Ok(making)
    }

    fn introduce(&self) {
        let plan = &self.plan;
        let list = |items: Vec<String>| items.join(", ");
        let arms = plan.arms.iter().zip(&self.inits);
        let arms =
            arms.map(|(arm, init)| if arm.name == *init { init.clone() } else { format!("{} = {init}", arm.name) });
        self.reporter.say(format!("arms      {}; gains are over {}", list(arms.collect()), plan.arms[0].name));
        let budgets = plan.budgets.iter().map(|budget| format!("{} ({} images)", budget.labels, budget.images));
        self.reporter.say(format!("labels    {}", list(budgets.collect())));
        let rates = list(plan.rates.iter().map(f64::to_string).collect());
        let rates = if plan.searched().is_empty() { rates } else { format!("chosen for each row from {rates}") };
        let runs = self.runs().len();
        let minutes = plan.minutes.map(|minutes| format!(" (by --minutes {minutes})")).unwrap_or_default();
        self.reporter.say(format!(
            "runs      {runs} of {} steps{minutes}, seeds 0 to {}, learning rate {rates}",
            plan.steps,
            plan.seeds - 1
        ));
    }

    /// All runs, in their order. A row's search comes first; all arms of a budget come before the next budget.
    fn runs(&self) -> Vec<Run> {
        let mut runs = Vec::new();
        for budget in 0..self.plan.budgets.len() {
            for arm in 0..self.plan.arms.len() {
                let searches = self.plan.searched().iter().map(|&rate| Aim::Search(rate));
                let aims = searches.chain((0..self.plan.seeds).map(Aim::Cell));
                runs.extend(aims.map(|aim| Run { budget, arm, aim }));
            }
        }
        runs
    }

    /// Does what is not done yet.
    fn all(&self) -> anyhow::Result<Ended> {
        let mut clock =
            Clock::new(self.runs().into_iter().map(|run| self.cost_left(run)).sum::<anyhow::Result<f64>>()?);
        self.write(&self.table()?)?;
        for run in self.runs() {
            if !self.one(run, &mut clock)? {
                return Ok(Ended::Stopped);
            }
        }
        Ok(Ended::Finished)
    }

    /// Does a run, unless it is done; false when a signal stopped it.
    fn one(&self, run: Run, clock: &mut Clock) -> anyhow::Result<bool> {
        if self.status_of(run)?.is_some() {
            return Ok(true);
        }
        let status = self.status(State::Running)?;
        status.write(self.folder.root())?;
        let mut stopped = status;
        stopped.state = State::Stopped;
        let root = self.folder.root().to_path_buf();
        let answer = self.answer()?;
        // The run's own goodbye knows nothing of the table.
        self.signals.at_last(move || {
            if let Err(error) = stopped.write(&root).and_then(|()| screen::print(&answer)) {
                screen::line(format!("note: {error:#}"));
            }
        });
        if self.signals.stop_asked() {
            return Ok(false);
        }
        let name = self.name(run);
        self.reporter
            .say(format!("run       {name}{}", clock.left().map(|left| format!(", {left} left")).unwrap_or_default()));
        if self.reporter.is_terminal() {
            let left = clock.left().map(|left| format!("{left} left in all, ")).unwrap_or_default();
            screen::board(format!("{left}now {name}\n{}", self.table()?.board()));
        }

        let resolved = self.resolve(run)?;
        let settings = resolved.settings();
        let test = match run.aim {
            Aim::Search(_) => Test::Never,
            Aim::Cell(_) => Test::Once,
        };
        let parts = self.labelled.parts(&settings.data, test)?;
        let began = Beginning::with(resolved, self.chosen.clone(), parts, self.signals.clone(), Voice::Log);
        let outcome = began.and_then(|mut begin| finetune::on_chosen(&mut begin));
        log::to(&self.folder.file("log.txt"))?;
        match outcome {
            Ok(Outcome::Stopped) => return Ok(false),
            Ok(Outcome::Done(_) | Outcome::AlreadyFinished) => {}
            // A result, too; the run's status says so.
            Err(error) if Exit::of(&error) == Exit::Diverged => self.reporter.warn(format!("{name}: {error:#}")),
            Err(error) => return Err(error.context(format!("the run {name} of the table failed"))),
        }
        let status = self.status_of(run)?;
        let status = status.with_context(|| format!("the run {name} ended without a result"))?;
        if let Aim::Search(_) = run.aim {
            // Its weights serve nothing any more. What cannot be removed only takes space.
            let _ = fs::remove_dir_all(self.folder.file(&self.place(run)).join("state"));
        }
        clock.done(self.cost(run));
        let table = self.table()?;
        self.say_result(run, &name, &status, &table);
        self.write(&table)?;
        Ok(true)
    }

    fn say_result(&self, run: Run, name: &str, status: &Status, table: &Table<'_>) {
        let percent = |key: &str| status.result[key].as_f64().map(|share| format!("{:.2}%", 100.0 * share));
        match run.aim {
            Aim::Search(_) => {
                if let Some(accuracy) = percent("validation_accuracy") {
                    self.reporter.say(format!("          {name}: validation accuracy {accuracy}"));
                }
            }
            Aim::Cell(_) => {
                let row = &table.rows[run.budget * self.plan.arms.len() + run.arm];
                let so_far = row.sample.map(|sample| match sample.std {
                    Some(std) => format!("; mean {:.2} ± {:.2}, n = {}", 100.0 * sample.mean, 100.0 * std, sample.n),
                    None => String::new(),
                });
                if let Some(accuracy) = percent("top1") {
                    let so_far = so_far.unwrap_or_default();
                    self.reporter.say(format!("          {name}: test accuracy {accuracy}{so_far}"));
                }
            }
        }
    }

    /// What its folder is called, in the table's.
    fn place(&self, run: Run) -> String {
        let (arm, budget) = (&self.plan.arms[run.arm].name, &self.plan.budgets[run.budget].folder);
        match run.aim {
            Aim::Search(rate) => format!("search/{arm}/{budget}/lr-{rate}"),
            Aim::Cell(seed) => format!("cells/{arm}/{budget}/seed-{seed}"),
        }
    }

    /// For people.
    fn name(&self, run: Run) -> String {
        let (arm, labels) = (&self.plan.arms[run.arm].name, &self.plan.budgets[run.budget].labels);
        match run.aim {
            Aim::Search(rate) => format!("{labels} {arm}, learning rate {rate}"),
            Aim::Cell(seed) => format!("{labels} {arm}, seed {seed}"),
        }
    }

    /// The configuration of a run: that of `selfie finetune -c OUT/config.toml` with these flags.
    fn resolve(&self, run: Run) -> anyhow::Result<Resolved> {
        let out = self.folder.file(&self.place(run));
        let (seed, validation, rate) = match run.aim {
            Aim::Search(rate) => (0, self.plan.validation, rate),
            Aim::Cell(seed) => (seed, 0.0, self.chosen_rate(run)?),
        };
        let flags = [
            ("train.init", self.inits[run.arm].clone()),
            ("data.labels", self.plan.budgets[run.budget].of_seed(seed)),
            ("data.validation", validation.to_string()),
            ("train.seed", seed.to_string()),
            ("train.lr", rate.to_string()),
            ("train.steps", self.plan.steps.to_string()),
            // Neither would be used: it is measured at the end, and only the end counts.
            ("train.eval_every", "0".into()),
            ("train.keep", "1".into()),
            ("run.out", utf8(&out)?),
        ];
        let flags = flags.into_iter().map(|(name, value)| {
            let key = Key::find(name).with_context(|| format!("{name} is no key"))?;
            Ok((key, value))
        });
        let request = Request {
            files: vec![self.folder.file("config.toml")],
            flags: flags.collect::<anyhow::Result<_>>()?,
            ..Request::default()
        };
        Resolved::new(Task::Finetune, &request)
    }

    /// The status of a run that has its result; none of one that is still to be done.
    fn status_of(&self, run: Run) -> anyhow::Result<Option<Status>> {
        let root = self.folder.file(&self.place(run));
        let Some(status) = Status::read(&root)? else { return Ok(None) };
        match status.state {
            State::Diverged => Ok(Some(status)),
            State::Finished if status.step == self.plan.steps => Ok(Some(status)),
            State::Finished => Err(Problem::input(format!(
                "{}: expected a run of {} steps, found {}: it was gone on with by another command; remove the folder, and the \
                 run is done anew",
                root.display(),
                self.plan.steps,
                status.step
            ))),
            State::Running | State::Stopped | State::Failed => Ok(None),
        }
    }

    /// A number of a run's result.
    fn number(&self, run: Run, status: &Status, key: &str) -> anyhow::Result<f64> {
        status.result[key].as_f64().ok_or_else(|| {
            let path = self.folder.file(&self.place(run)).join("status.json");
            Problem::input(format!(
                "{}: expected the number `{key}` in the result of a run; remove its folder, and the run is done anew",
                path.display()
            ))
        })
    }

    /// The learning rate of a cell, once its row's search is done.
    fn chosen_rate(&self, run: Run) -> anyhow::Result<f64> {
        let table = self.table()?;
        let row = &table.rows[run.budget * self.plan.arms.len() + run.arm];
        row.rate.ok_or_else(|| {
            let (labels, arm) = (&self.plan.budgets[run.budget].labels, &self.plan.arms[run.arm].name);
            let text =
                format!("{labels} {arm}: every learning rate diverged; give lower ones by --lr, and another --out");
            Problem::Diverged(text).into()
        })
    }

    /// What is known so far.
    fn table(&self) -> anyhow::Result<Table<'_>> {
        let (mut cells, mut trials) = (Vec::new(), Vec::new());
        for run in self.runs() {
            let Some(status) = self.status_of(run)? else { continue };
            let (Run { budget, arm, aim }, folder) = (run, self.place(run));
            let diverged = status.state == State::Diverged;
            let number = |key: &str| self.number(run, &status, key);
            match aim {
                Aim::Search(rate) => {
                    let measured = || {
                        let n = number("validation_n")? as u64;
                        let (accuracy, loss) = (number("validation_accuracy")?, number("validation_loss")?);
                        anyhow::Ok(Validation { accuracy, loss, n })
                    };
                    let validation = if diverged { None } else { Some(measured()?) };
                    trials.push(Trial { budget, arm, rate, folder, validation });
                }
                Aim::Cell(seed) => {
                    let measured =
                        || anyhow::Ok(Score { top1: number("top1")?, top5: number("top5")?, loss: number("loss")? });
                    let score = if diverged { None } else { Some(measured()?) };
                    cells.push(Cell { budget, arm, seed, folder, score });
                }
            }
        }
        Ok(Table::new(&self.plan, cells, trials))
    }

    /// Keeps the table's files.
    fn write(&self, table: &Table<'_>) -> anyhow::Result<()> {
        self.folder.write("table.md", table.markdown().as_bytes())?;
        self.folder.write("table.csv", table.csv().as_bytes())?;
        self.folder.write("cells.csv", table.cells_csv().as_bytes())?;
        self.folder.write("plot.svg", plot::svg(table).as_bytes())?;
        self.folder.write("table.json", format!("{:#}\n", table.json()).as_bytes())
    }

    /// What is printed at the end: the table.
    fn answer(&self) -> anyhow::Result<String> {
        let table = self.table()?;
        Ok(match self.answer {
            Answer::Json => format!("{:#}\n", table.json()),
            Answer::Words => format!("\n{}", table.text()),
        })
    }

    /// A signal asked for it.
    fn stop(&self) -> anyhow::Result<Exit> {
        self.status(State::Stopped)?.write(self.folder.root())?;
        self.reporter.say("stopped, as asked: the same command goes on from there");
        Ok(Exit::Stopped)
    }

    /// The table is whole.
    fn finish(&self) -> anyhow::Result<Exit> {
        let table = self.table()?;
        self.write(&table)?;
        let mut status = self.status(State::Finished)?;
        let json = table.json();
        status.result = json!({ "baseline": json["baseline"], "rows": json["rows"] });
        status.write(self.folder.root())?;
        table.notes().iter().for_each(|note| self.reporter.say(format!("note      {note}")));
        let file = |name: &str| shell::path(self.folder.file(name));
        self.reporter.say(format!(
            "table     {}, .csv, .json; {}; {}",
            file("table.md"),
            file("cells.csv"),
            file("plot.svg")
        ));
        self.reporter.say(format!("took      {}", duration(self.began.elapsed().as_secs_f64())));
        if table.diverged() > 0 {
            self.reporter.warn("runs diverged: try lower rates by --lr, into another --out");
            return Ok(Exit::Diverged);
        }
        Ok(Exit::Done)
    }

    fn status(&self, state: State) -> anyhow::Result<Status> {
        let (mut done, runs) = (0, self.runs());
        for &run in &runs {
            done += u64::from(self.status_of(run)?.is_some());
        }
        Ok(Status::new(NAME, state, done, Some(runs.len() as u64)))
    }

    /// Writes that an error ended it.
    fn record_failure(&self, error: &anyhow::Error) {
        let state = if Exit::of(error) == Exit::Diverged { State::Diverged } else { State::Failed };
        // The error itself is what counts.
        let _ = self.status(state).and_then(|status| status.write(self.folder.root()));
    }

    /// What a run takes, in training images; one that is only looked at takes a third.
    fn cost(&self, run: Run) -> f64 {
        let images = self.plan.budgets[run.budget].images;
        let training = (self.plan.steps as usize).saturating_mul(pace::batch(&self.settings.training(), images)) as f64;
        let measured = match run.aim {
            Aim::Search(_) => self.plan.validation * images as f64,
            Aim::Cell(_) => self.plan.data.pointer("/test/used").and_then(serde_json::Value::as_f64).unwrap_or(0.0),
        };
        training + measured / 3.0
    }

    /// The same, if it is still to be done.
    fn cost_left(&self, run: Run) -> anyhow::Result<f64> {
        Ok(if self.status_of(run)?.is_some() { 0.0 } else { self.cost(run) })
    }
}

/// Reckons the time that is left.
struct Clock {
    began: Instant,
    done: f64,
    left: f64,
}

impl Clock {
    fn new(left: f64) -> Self {
        Self { began: Instant::now(), done: 0.0, left }
    }

    fn done(&mut self, cost: f64) {
        self.done += cost;
        self.left -= cost;
    }

    /// None before anything was done.
    fn left(&self) -> Option<String> {
        (self.done > 0.0).then(|| duration(self.began.elapsed().as_secs_f64() * self.left.max(0.0) / self.done))
    }
}

/// The configuration that all runs share: for `finetune`, from the first arm's network.
fn resolve(arguments: &Fewlabel) -> anyhow::Result<Resolved> {
    let first = arguments.init.iter().find(|init| says_its_network(init)).or(arguments.init.first());
    let typed = with_init(arguments, first)?;
    let resolved = Resolved::new(Task::Finetune, &typed)?;
    if resolved.settings().run.out.as_os_str().is_empty() {
        return Err(Problem::usage("--out is missing: give the folder where the table is to be written"));
    }
    for &name in OF_A_RUN {
        let entry = resolved.entry(name);
        let typed = matches!(entry.origin, Origin::Set(_) | Origin::Environment(_));
        if typed || name == "data.limit" && resolved.settings().data.limit > 0 {
            return Err(Problem::usage(format!(
                "{name} = {} ({}): a table settles this for each of its runs; what it takes is in `selfie fewlabel --help`",
                entry.value, entry.origin
            )));
        }
    }
    // The rest of them is as it would be without a file of values for one run.
    let mut request = typed;
    for (name, value) in [("data.labels", "all"), ("data.validation", "0"), ("train.seed", "0")] {
        request.flags.push((Key::find(name).with_context(|| format!("{name} is no key"))?, value.into()));
    }
    Resolved::new(Task::Finetune, &request)
}

/// Whether these are the weights of a run: a file alone says nothing of the network that it fits.
fn says_its_network(init: &str) -> bool {
    Path::new(init).join("config.toml").is_file()
}

/// What was typed, with these first weights.
fn with_init(arguments: &Fewlabel, init: Option<&String>) -> anyhow::Result<Request> {
    let typed = &arguments.flags.request;
    let key = Key::find("train.init").context("train.init is no key")?;
    let init = init.map(|init| (key, init.clone()));
    Ok(Request {
        files: typed.files.clone(),
        set: typed.set.clone(),
        flags: typed.flags.iter().cloned().chain(init).collect(),
        environment: typed.environment.clone(),
        run: None,
    })
}

/// All arms train the same network, or the table would compare networks.
fn check_networks(arguments: &Fewlabel, shared: &Resolved) -> anyhow::Result<()> {
    let is_trained = |key: &Key| match shared.settings().model.head {
        Head::Conv => !key.describes_pooling(),
        Head::Attention => true,
    };
    for init in arguments.init.iter().filter(|init| says_its_network(init)) {
        let own = Resolved::new(Task::Finetune, &with_init(arguments, Some(init))?)?;
        for entry in own.entries().filter(|entry| entry.key.describes_network() && is_trained(entry.key)) {
            let first = shared.entry(entry.key.name);
            if entry.value != first.value {
                return Err(Problem::usage(format!(
                    "--init {init} has {} = {}, and {} has {}: the arms of a table train the same network; give weights of \
                     one network",
                    entry.key.name,
                    entry.value,
                    shared.entry("train.init").value.plain(),
                    first.value
                )));
            }
        }
    }
    Ok(())
}

/// Rates are chosen by some images of each budget.
fn check_validation(plan: &Plan, settings: &Settings, labelled: &Labelled) -> anyhow::Result<()> {
    for budget in plan.budgets.iter().filter(|_| !plan.searched().is_empty()) {
        let mut data = settings.data.clone();
        (data.labels, data.validation) = (budget.of_seed(0), plan.validation);
        if labelled.parts(&data, Test::Never)?.held_out.is_none() {
            return Err(Problem::usage(format!(
                "--labels {}: of its {} images none is left to choose the learning rate by (--validation {}); give more \
                 labels, a larger part, or one rate by --lr",
                budget.labels, budget.images, plan.validation
            )));
        }
    }
    Ok(())
}

/// Weights that do not fit are seen before the first step, not hours later.
fn check_weights(plan: &Plan, settings: &Settings, model: &ModelConfig, chosen: &Chosen) -> anyhow::Result<()> {
    let patch_norm = if settings.model.reuse_patch_norm { PatchNorm::Reuse } else { PatchNorm::Fresh };
    let classes = plan.data["classes"].as_array().map_or(0, Vec::len);
    for arm in plan.arms.iter().filter(|arm| arm.init != SCRATCH) {
        chosen.run(Fitting { model, classes, init: Path::new(&arm.init), patch_norm })?;
    }
    Ok(())
}

/// A path as a value of the configuration.
fn utf8(path: &Path) -> anyhow::Result<String> {
    let text = path.to_str().map(String::from);
    text.ok_or_else(|| Problem::usage(format!("--out {}: expected a name in UTF-8", path.display())))
}

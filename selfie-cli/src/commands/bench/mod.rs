//! `bench`: images a second of loader, step and whole run, and where a step's time goes.

mod ceilings;
mod measure;
mod report;
mod roofline;
mod trace;
mod tune;
mod yardstick;

use std::path::Path;
use std::time::Duration;

use selfie_model::durable::write_file;

use crate::args::{Bench, Timed};
use crate::config::{Request, Resolved, Settings, Task};
use crate::data;
use crate::device;
use crate::exit::{Exit, Problem};
use crate::progress::{Reporter, Voice};
use crate::screen;
use measure::{Measurement, Subject};
use report::Report;
use tune::Tuning;
use yardstick::Yardstick;

/// What is loaded unless something is given: no data are needed to see how fast a machine is.
const DATA: &str = "synthetic:";

/// Runs the command.
///
/// # Errors
/// Usage, input, out of memory, a Python without PyTorch.
pub fn run(arguments: &Bench) -> anyhow::Result<Exit> {
    let settings = settings(arguments.task, &arguments.flags.request)?;
    for (flag, path) in [("--trace", &arguments.trace), ("--roofline", &arguments.roofline)] {
        path.as_deref().map_or(Ok(()), |path| check_folder(flag, path))?;
    }
    let parts = match arguments.task {
        Timed::Pretrain => data::for_pretraining(&settings.data),
        Timed::Finetune | Timed::Infer => data::for_finetuning(&settings.data),
    }?;
    let model = settings.network(parts.image_size)?;
    if arguments.task == Timed::Pretrain {
        model.check_pretext()?;
    }
    let chosen = device::choose(&settings.run)?;
    let subject = Subject {
        task: arguments.task,
        model: &model,
        batch: settings.train.batch,
        classes: parts.train.dataset.classes().len().max(1),
        images: &parts.train,
        training: settings.training(),
        seconds: Duration::from_secs(arguments.seconds),
    };
    let reporter = Reporter::new(Voice::Full);
    if arguments.tune {
        let tuned = Tuning::new(&subject, &chosen, &reporter)?.run()?;
        screen::print(&if arguments.json { format!("{:#}\n", tuned.as_json()) } else { tuned.as_text() })?;
        return Ok(Exit::Done);
    }
    let mut yardstick = match &arguments.compare {
        None => None,
        // Before minutes are spent on what it is to be compared with.
        Some(python) => Some(Yardstick::start(python, &subject, &chosen, &settings.run)?),
    };
    chosen.notes().skip(1).for_each(|note| reporter.say(note));
    let found = chosen.run(Measurement { subject: &subject, yardstick: yardstick.as_mut(), reporter: &reporter })?;
    if let Some(path) = &arguments.trace {
        write_file(path, trace::of(&found).to_string().as_bytes())?;
    }
    let [device, precision] = chosen.names();
    if let Some(path) = &arguments.roofline {
        write_file(path, roofline::svg(&found).as_bytes())?;
    }
    let report = Report { subject: &subject, preset: &settings.model.preset, device, precision, found: &found };
    screen::print(&if arguments.json { format!("{:#}\n", report.as_json()) } else { report.as_text() })?;
    Ok(Exit::Done)
}

/// The configuration, as the command that is timed would have it.
fn settings(task: Timed, request: &Request) -> anyhow::Result<Settings> {
    let task = match task {
        Timed::Pretrain => Task::Pretrain,
        Timed::Finetune | Timed::Infer => Task::Finetune,
    };
    let mut settings = Resolved::new(task, request)?.settings();
    if settings.data.path.as_os_str().is_empty() {
        settings.data.path = DATA.into();
    }
    // What is timed is a step of one batch, for as long as the clock says.
    settings.train.accumulate = 1;
    (settings.train.steps, settings.train.epochs, settings.train.minutes) = (0, 0.0, 0.0);
    settings.training().check()?;
    Ok(settings)
}

/// Refuses a place where no file can be written, before anything is measured.
fn check_folder(flag: &str, file: &Path) -> anyhow::Result<()> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if folder.is_dir() && !file.is_dir() {
        return Ok(());
    }
    Err(Problem::usage(format!("{flag} {}: expected the name of a file in a folder that there is", file.display())))
}

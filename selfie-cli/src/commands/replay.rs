//! `replay`: takes a step again whose loss or gradient was not finite.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use selfie_kernels::{Backend, Element};
use selfie_model::{Classifier, Replay, Replayed, Selfie, TensorReport};
use serde_json::json;

use crate::args;
use crate::config::Run;
use crate::device::{self, Work};
use crate::exit::{Exit, Problem, printable};
use crate::memory::{self, Beside, Need};
use crate::progress::{Reporter, Voice};
use crate::run_folder::step_files;
use crate::screen;

/// Lines of each list.
const SHOWN: usize = 8;

/// What every writer to a `String` is.
const INFALLIBLE: &str = "writing to a string cannot fail";

/// Runs the command.
///
/// # Errors
/// Usage, input, and what the system refuses.
pub fn run(arguments: &args::Replay) -> anyhow::Result<Exit> {
    let path = file(&arguments.path)?;
    let args::Replay { device, precision, threads, .. } = arguments.clone();
    let chosen = device::choose(&Run { out: PathBuf::new(), device, precision, threads })?;
    // By the kernels that the run's steps are taken by.
    let chosen = chosen.for_run(path.parent().unwrap_or(Path::new("")));
    let text = chosen.run(Again { path: &path, as_json: arguments.json })?;
    screen::print(&text)?;
    Ok(Exit::Done)
}

/// The file that is meant: itself, or the last one of a run.
fn file(path: &Path) -> anyhow::Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_path_buf());
    }
    step_files(path)?.pop().ok_or_else(|| {
        Problem::input(format!(
            "{}: expected a not-finite-*.safetensors file, found none; a run writes one for a step whose loss or \
             gradient is not finite, so this one had no such step",
            path.display()
        ))
    })
}

/// The step, on whatever device was chosen.
struct Again<'a> {
    path: &'a Path,
    as_json: bool,
}

impl Work for Again<'_> {
    type Output = String;
    fn run<B: Backend<T>, T: Element>(self, device: B) -> anyhow::Result<String> {
        replay(device, self.path, self.as_json)
    }
}

fn replay<B: Backend<T>, T: Element>(device: B, path: &Path, as_json: bool) -> anyhow::Result<String> {
    let step = Replay::<T::Wide>::read(path)?;
    let build = step.build();
    let plan = match step.about.classes {
        None => Selfie::<B, T>::memory_plan(build)?,
        Some(classes) => Classifier::<B, T>::memory_plan(build, classes)?,
    };
    let (batch, image_size, beside) = (build.batch, build.config.image_size, Beside::Nothing);
    let plan = plan.with_workspace(&device);
    memory::check(&Need { plan: &plan, batch, image_size, beside }, &device, &Reporter::new(Voice::Full))?;
    let found = match step.about.classes {
        None => step.run(&mut Selfie::<B, T>::new(device, build)?)?,
        Some(classes) => step.run(&mut Classifier::<B, T>::new(device, build, classes)?)?,
    };
    if as_json {
        let value = json!({
            "file": path,
            "step": step.about.step,
            "precision": T::NAME,
            "loss_then": step.about.loss,
            "loss": found.loss.loss.to_string(),
            "gradient_norm": found.gradient_norm.to_string(),
            "finite": found.finite,
            "images": step.about.keys,
            "tensors": found.tensors,
        });
        return Ok(format!("{value:#}\n"));
    }
    Ok(printable(&in_words(path, &step, &found, T::NAME)).into_owned())
}

fn in_words<W: selfie_kernels::Wide>(path: &Path, step: &Replay<W>, found: &Replayed, precision: &str) -> String {
    let mut text = String::new();
    let mut say = |line: std::fmt::Arguments<'_>| writeln!(text, "{line}").expect(INFALLIBLE);
    let about = &step.about;
    say(format_args!("{}: step {}, {} images", path.display(), about.step, about.keys.len()));
    say(format_args!("then      loss {}", about.loss));
    let verdict = if found.finite { "finite" } else { "not finite, as it was" };
    say(format_args!(
        "now       loss {}, gradient norm {}: {verdict} ({precision})",
        found.loss.loss, found.gradient_norm
    ));
    list(&mut say, "parameters that are not finite", bad(found, |tensor| tensor.not_finite));
    list(&mut say, "gradients that are not finite, from the input on", bad(found, |tensor| tensor.gradient_not_finite));
    list(&mut say, "greatest parameters", greatest(found, |tensor| tensor.largest));
    if found.finite {
        list(&mut say, "greatest norms of gradients", greatest(found, |tensor| tensor.gradient_norm));
    }
    list(&mut say, "images", about.keys.clone());
    say(format_args!(
        "{}",
        match (found.finite, found.tensors.iter().any(|tensor| tensor.not_finite > 0)) {
            (_, true) => "The parameters were not finite before this step: they came so from --init.",
            (true, false) => "In this precision the step is sound: go on in it, or with a lower train.lr.",
            (false, false) =>
                "Parameters and images are sound, so numbers overflowed on the way: lower train.lr, or \
                               lengthen train.warmup; greatest parameters far above 10 say that it was too high for long.",
        }
    ));
    text
}

/// The tensors of which `count` elements are not finite, in the network's order.
fn bad(found: &Replayed, count: impl Fn(&TensorReport) -> usize) -> Vec<String> {
    let bad = found.tensors.iter().filter(|tensor| count(tensor) > 0);
    bad.map(|tensor| format!("{}: {} of {} elements", tensor.name, count(tensor), tensor.elements)).collect()
}

/// The tensors with the greatest `size`.
fn greatest(found: &Replayed, size: impl Fn(&TensorReport) -> f64) -> Vec<String> {
    let mut tensors: Vec<_> = found.tensors.iter().collect();
    tensors.sort_by(|a, b| size(b).total_cmp(&size(a)));
    tensors.iter().take(SHOWN).map(|tensor| format!("{}: {:.3e}", tensor.name, size(tensor))).collect()
}

fn list(say: &mut impl FnMut(std::fmt::Arguments<'_>), title: &str, lines: Vec<String>) {
    if lines.is_empty() {
        return;
    }
    say(format_args!("{title}"));
    lines.iter().take(SHOWN).for_each(|line| say(format_args!("  {line}")));
    if lines.len() > SHOWN {
        say(format_args!("  and {} more (--json has them all)", lines.len() - SHOWN));
    }
}

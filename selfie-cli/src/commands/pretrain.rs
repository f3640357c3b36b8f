//! `pretrain`: the puzzle, on images without labels.

use selfie_kernels::{Backend, Element};
use selfie_model::{Build, Evaluation, MODEL_FILE, Negatives, Purpose, Selfie, Trainer};
use serde_json::json;

use super::begin::{Beginning, Outcome};
use super::next;
use super::probing::Probing;
use crate::args::{ForPretrain, Training};
use crate::config::Task;
use crate::device::Work;
use crate::exit::Exit;
use crate::progress::Voice;
use crate::run_folder::{State, Status};
use crate::shell;
use crate::signals::Signals;
use crate::training::{Ended, Job, Observer, Probe, train};

/// Runs the command.
///
/// # Errors
/// Usage, input, divergence, and what the system refuses.
pub fn run(arguments: &Training<ForPretrain>) -> anyhow::Result<Exit> {
    let mut begin = Beginning::new(Task::Pretrain, &arguments.flags.request, Signals::install()?, Voice::Full)?;
    begin.answer = arguments.answer();
    let outcome = begin.chosen.clone().run(Pretraining(&mut begin))?;
    if let Outcome::Done(_) = outcome {
        let root = shell::path(begin.folder.root());
        let file = begin.folder.weights().join(MODEL_FILE);
        begin.reporter.say(format!("weights   {} (selfie inspect {root})", shell::path(file)));
        begin.reporter.say(format!("next      {}", next::finetune(begin.folder.root(), &begin.labelled_data())));
    }
    begin.answer(&outcome)
}

/// On whatever device was chosen.
struct Pretraining<'a>(&'a mut Beginning);

impl Work for Pretraining<'_> {
    type Output = Outcome<Option<Evaluation>>;
    fn run<B: Backend<T>, T: Element>(self, device: B) -> anyhow::Result<Self::Output> {
        pretrain(device, self.0, &mut |_, _, _| Ok(()))
    }
}

/// Pretrains; `observe` is called after every step. Gives the last measurement on held-out images, if there are any.
///
/// # Errors
/// As [`run`].
pub fn pretrain<B: Backend<T>, T: Element>(
    device: B,
    begin: &mut Beginning,
    observe: Observer<'_, B, T, Selfie<B, T>>,
) -> anyhow::Result<Outcome<Option<Evaluation>>> {
    let purpose = if begin.training.accumulate > 1 { Purpose::Accumulate } else { Purpose::Train };
    let build = Build { config: &begin.model, batch: begin.training.micro_batch(), purpose, seed: begin.training.seed };
    let probing = Probing::open(begin)?;
    let plan = Selfie::<B, T>::memory_plan(build)?;
    let plan = match &probing {
        Some(probing) => plan.beside("probe", &probing.memory_plan::<B, T>(build)?),
        None => plan,
    };
    let checkpoint = begin.checkpoint::<T::Wide>()?;
    if let Some(checkpoint) = &checkpoint
        && begin.is_finished(checkpoint)?
    {
        return Ok(Outcome::AlreadyFinished);
    }
    begin.introduce();
    begin.check_memory(plan, &device)?;
    begin.describe(checkpoint.as_ref())?;
    let chance = 1.0 / begin.model.hidden_patches() as f64;
    let negatives = match begin.model.negatives {
        Negatives::Image => String::new(),
        Negatives::Batch => format!(
            "; told apart from those of {} images at once, at the temperature {}",
            build.batch, begin.model.temperature
        ),
    };
    begin.reporter.say(format!(
        "puzzle    {} of {} patches hidden; guessing finds {:.1}%{negatives}",
        begin.model.hidden_patches(),
        begin.model.patches(),
        100.0 * chance
    ));
    let network = Selfie::new(device, build)?;
    if let Some(probing) = &probing {
        begin.reporter.say(probing.describe());
    }
    let encoder = probing.as_ref().map(|probing| probing.encoder(&network, build)).transpose()?;
    let probe = probing.as_ref().zip(encoder).map(|(probing, mut encoder)| -> Probe<'_, Selfie<B, T>> {
        Box::new(move |network, reporter| probing.accuracy(&mut encoder, network, reporter))
    });
    let mut trainer = Trainer::new(network, begin.parts.train.clone(), &begin.training, checkpoint.as_ref())?;
    trainer.recall_bad(begin.known_bad());
    drop(checkpoint);
    let job = Job {
        resolved: &begin.resolved,
        folder: &begin.folder,
        model: &begin.model,
        classes: &[],
        held_out: begin.parts.held_out.clone(),
        chance,
        epochs_per_step: begin.training.batch as f64 / begin.parts.train.items.len() as f64,
        signals: &begin.signals,
        answer: begin.answer,
    };
    let evaluation = match train(&mut trainer, &job, &mut begin.reporter, probe, observe)? {
        Ended::Stopped => return Ok(Outcome::Stopped),
        Ended::Finished(evaluation) => evaluation,
    };
    let step = trainer.progress().step;
    let mut status = Status::new(Task::Pretrain.name(), State::Finished, step, Some(step));
    status.result = json!({
        "eval_accuracy": evaluation.as_ref().map(|evaluation| evaluation.accuracy),
        "eval_loss": evaluation.as_ref().map(|evaluation| evaluation.loss),
        "eval_images": evaluation.as_ref().map(|evaluation| evaluation.n),
        "chance": chance,
    });
    status.write(begin.folder.root())?;
    Ok(Outcome::Done(evaluation))
}

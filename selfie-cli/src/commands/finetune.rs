//! `finetune`: a classifier on all or few labels, from pretrained weights or from scratch.

use std::path::Path;

use anyhow::Context;
use selfie_kernels::{Backend, Element};
use selfie_model::{Build, Classification, Classifier, PatchNorm, Purpose, Trainer, classify, initialize};
use serde_json::{Value, json};

use super::begin::{Beginning, LABELS, Outcome, SCRATCH};
use crate::args::{ForFinetune, Training};
use crate::config::Task;
use crate::device::Work;
use crate::exit::{Exit, Problem};
use crate::progress::Voice;
use crate::run_folder::{State, Status};
use crate::shell;
use crate::signals::Signals;
use crate::training::{Ended, Job, train};

/// Runs the command.
///
/// # Errors
/// Usage, input, divergence, and what the system refuses.
pub fn run(arguments: &Training<ForFinetune>) -> anyhow::Result<Exit> {
    let mut begin = Beginning::new(Task::Finetune, &arguments.flags.request, Signals::install()?, Voice::Full)?;
    begin.answer = arguments.answer();
    let outcome = on_chosen(&mut begin)?;
    if let Outcome::Done(_) = outcome {
        begin.reporter.say(format!("next      selfie evaluate {}", shell::path(begin.folder.root())));
    }
    begin.answer(&outcome)
}

/// Finetunes on the device and in the precision that were chosen.
///
/// # Errors
/// As [`run`].
pub fn on_chosen(begin: &mut Beginning) -> anyhow::Result<Outcome<Option<Classification>>> {
    begin.chosen.clone().run(Finetuning(begin))
}

/// A batch holds at most the labelled images there are.
fn clamp_batch(begin: &mut Beginning) -> anyhow::Result<()> {
    let (images, training) = (begin.parts.train.items.len(), &mut begin.training);
    if training.batch > images {
        let clamped = images / training.accumulate * training.accumulate;
        if clamped == 0 {
            return Err(Problem::usage(format!(
                "train.accumulate = {}: there are only {images} labelled images; lower --accumulate",
                training.accumulate
            )));
        }
        begin.parts.notes.push(format!(
            "batch     {clamped} instead of {}, as there are {images} labelled images to train on",
            training.batch
        ));
        training.batch = clamped;
    }
    Ok(())
}

/// On whatever device was chosen.
struct Finetuning<'a>(&'a mut Beginning);

impl Work for Finetuning<'_> {
    type Output = Outcome<Option<Classification>>;
    fn run<B: Backend<T>, T: Element>(self, device: B) -> anyhow::Result<Self::Output> {
        finetune(device, self.0)
    }
}

/// Finetunes. Gives the result on the test part, if there is one.
///
/// # Errors
/// As [`run`].
pub fn finetune<B: Backend<T>, T: Element>(
    device: B,
    begin: &mut Beginning,
) -> anyhow::Result<Outcome<Option<Classification>>> {
    clamp_batch(begin)?;
    let purpose = if begin.training.accumulate > 1 { Purpose::Accumulate } else { Purpose::Train };
    let build = Build { config: &begin.model, batch: begin.training.micro_batch(), purpose, seed: begin.training.seed };
    let classes = begin.parts.train.dataset.classes().to_vec();
    let plan = Classifier::<B, T>::memory_plan(build, classes.len())?;
    let checkpoint = begin.checkpoint::<T::Wide>()?;
    if let Some(checkpoint) = &checkpoint
        && begin.is_finished(checkpoint)?
    {
        return Ok(Outcome::AlreadyFinished);
    }
    begin.introduce();
    begin.check_memory(plan, &device)?;
    let mut network = Classifier::new(device, build, classes.len())?;
    let init = begin.settings.train.init.as_str();
    // A checkpoint has all weights already.
    if checkpoint.is_none() {
        if init == SCRATCH {
            begin.reporter.say("weights   random (scratch)");
        } else {
            let patch_norm = if begin.settings.model.reuse_patch_norm { PatchNorm::Reuse } else { PatchNorm::Fresh };
            let done = initialize(&mut network, Path::new(init), patch_norm);
            let done = done.with_context(|| {
                format!("cannot start from {init}; if these weights are in another place now, give it by --init")
            })?;
            begin.reporter.say(format!("weights   {done}"));
        }
    }
    begin.describe(checkpoint.as_ref())?;
    begin.folder.write(LABELS, &begin.labels()?)?;
    let mut trainer = Trainer::new(network, begin.parts.train.clone(), &begin.training, checkpoint.as_ref())?;
    trainer.recall_bad(begin.known_bad());
    drop(checkpoint);
    let job = Job {
        resolved: &begin.resolved,
        folder: &begin.folder,
        model: &begin.model,
        classes: &classes,
        held_out: begin.parts.held_out.clone(),
        chance: 1.0 / classes.len() as f64,
        epochs_per_step: begin.training.batch as f64 / begin.parts.train.items.len() as f64,
        signals: &begin.signals,
        answer: begin.answer,
    };
    let validation = match train(&mut trainer, &job, &mut begin.reporter, None, &mut |_, _, _| Ok(()))? {
        Ended::Stopped => return Ok(Outcome::Stopped),
        Ended::Finished(validation) => validation,
    };
    let step = trainer.progress().step;
    let mut network = trainer.into_network();
    let mut result = json!({
        "validation_accuracy": validation.as_ref().map(|validation| validation.accuracy),
        "validation_loss": validation.as_ref().map(|validation| validation.loss),
        "validation_n": validation.as_ref().map(|validation| validation.n),
    });
    let mut tested = None;
    if let Some(test) = &begin.parts.test {
        let interruptible = job.leave_at_once(Status::new(Task::Finetune.name(), State::Stopped, step, Some(step)));
        let found = classify(&mut network, test, |_, _| ()).map_err(anyhow::Error::from);
        let found = found.inspect_err(|error| job.record_failure(error, step))?;
        drop(interruptible);
        begin.reporter.say(format!(
            "test      top-1 {:.2}%, top-5 {:.2}%, loss {:.3}, n = {} (guessing: {:.1}%)",
            100.0 * found.top1,
            100.0 * found.top5,
            found.loss,
            found.n,
            100.0 * job.chance
        ));
        result["top1"] = found.top1.into();
        result["top5"] = found.top5.into();
        result["n"] = found.n.into();
        result["loss"] = found.loss.into();
        tested = Some(found);
    } else {
        result["top1"] = Value::Null;
        begin.reporter.say("test      not measured, as said above");
    }
    let mut status = Status::new(Task::Finetune.name(), State::Finished, step, Some(step));
    status.result = result;
    status.write(begin.folder.root())?;
    Ok(Outcome::Done(tested))
}

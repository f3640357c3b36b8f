//! `export`: the weights of a run for other programs.

use selfie_model::{Export, Format};
use serde_json::json;

use crate::args::{self, To};
use crate::destination::{self, Existing};
use crate::exit::Exit;
use crate::progress::{Reporter, Voice, grouped};
use crate::screen;

/// Runs the command.
///
/// # Errors
/// Usage, input, and what the system refuses.
pub fn run(arguments: &args::Export) -> anyhow::Result<Exit> {
    let args::Export { source, to, out, check, overwrite, json, threads } = arguments;
    let format = match to {
        // Whoever names such a file for timm wants it alone: the tensors have timm's names in either.
        To::Timm if out.extension().is_some_and(|end| end == "safetensors") => Format::Safetensors,
        _ => Format::from(*to),
    };
    let existing = Existing::new(*overwrite);
    match format {
        Format::Timm => destination::check_folder(out, existing)?,
        Format::Onnx | Format::Safetensors => destination::check("--out", out, std::slice::from_ref(out), existing)?,
    }
    let weights = Export::read(source)?;
    let reporter = Reporter::new(Voice::Full);
    let description = weights.description();
    if description.told_by.is_none() {
        reporter.warn(format!(
            "{}: no config.json beside it says which images it takes: {} is assumed",
            source.display(),
            description.input()
        ));
    }
    if description.pooled_classes > 0 {
        reporter.warn(
            "the attention pooling and the classifier behind it have no place there: what is written makes features",
        );
    }
    weights.write(format, out)?;
    let (parameters, classes) = (weights.parameters(), description.layers.classes);
    let what = if classes > 0 { format!("{classes} classes") } else { "features only".into() };
    reporter.say(format!("wrote     {}: {} parameters, {what}", out.display(), grouped(parameters)));
    let agreement = check.then(|| weights.check(format, out, *threads)).transpose()?;
    if let Some(found) = &agreement {
        reporter.say(format!(
            "checked   read again: {} tensors the same bit for bit; outputs for {} random images at a relative distance of \
             {:.1e}, in f64",
            found.tensors, found.images, found.distance
        ));
    }
    let loading = weights.loading(format, out);
    if *json {
        let agreement = agreement
            .map(|found| json!({ "tensors": found.tensors, "images": found.images, "distance": found.distance }));
        let answer = json!({
            "path": out,
            "format": format.name(),
            "classes": description.classes,
            "input": description.input(),
            "loading": loading,
            "check": agreement,
        });
        screen::print(&format!("{answer:#}\n"))?;
    } else {
        screen::print(&format!("{loading}\n"))?;
    }
    Ok(Exit::Done)
}

//! `embed`: the features of images, as a file.

use selfie_model::probe::normalise;
use serde_json::json;

use super::begin::where_they_were;
use super::encoding::{Parameters, Trained};
use super::evaluate::Weights;
use crate::args::Embed;
use crate::data;
use crate::exit::{Exit, Problem};
use crate::run_folder::refuse_inside;
use crate::screen;
use crate::vectors::{Destination, Existing, Vectors};

/// Runs the command.
///
/// # Errors
/// Usage, input, and what the system refuses.
pub fn run(arguments: &Embed) -> anyhow::Result<Exit> {
    let Embed { run, out, part, l2, overwrite, json, flags } = arguments;
    let destination = Destination::new(out, if *overwrite { Existing::Replace } else { Existing::Keep })?;
    let trained = Trained::open(run, Weights::of_any_run(run)?, &flags.request)?;
    let reporter = &trained.reporter;
    refuse_inside(out, &trained.settings.data.path)?;
    let found = data::for_embedding(&trained.settings.data, (*part).into());
    let data::Collected { parts, classes, notes } = found.map_err(|error| where_they_were(error, &trained.resolved))?;
    notes.iter().for_each(|note| reporter.say(note));
    trained.introduce();

    let mut vectors = Vectors { classes, ..Vectors::default() };
    let images: Vec<_> = parts.iter().map(|part| &part.images).collect();
    let skipped = trained.encode(Parameters::Trained, &images, &mut |part, image| {
        let part = &parts[part];
        vectors.width = image.features.len();
        vectors.names.push(part.images.dataset.key(image.index));
        vectors.labels.push(part.images.dataset.label(image.index).map(|label| part.labels[label as usize]));
        vectors.values.extend(image.features);
    })?;
    let skipped: Vec<_> = skipped.into_iter().flatten().collect();
    skipped.iter().for_each(|file| reporter.warn(format!("skipped {}: {}", file.key, file.reason)));
    if vectors.names.is_empty() {
        return Err(Problem::input(format!(
            "{}: expected images, found none that can be read",
            trained.settings.data.path.display()
        )));
    }
    if *l2 {
        vectors.values.chunks_exact_mut(vectors.width).for_each(normalise);
    }
    let (n, width, layer) = (vectors.names.len(), vectors.width, trained.layers.to_string());
    let about = json!({ "run": run, "layer": layer, "l2": l2 });
    destination.write(&vectors, &about)?;
    let files: Vec<_> = destination.files().iter().rev().map(|file| file.display().to_string()).collect();
    reporter.say(format!("wrote     {n} vectors of {width} numbers ({layer}): {}", files.join(", ")));
    if *json {
        let skipped: Vec<_> = skipped.iter().map(|file| json!({ "name": file.key, "reason": file.reason })).collect();
        let answer = json!({
            "files": files,
            "n": n,
            "width": width,
            "layer": layer,
            "l2": l2,
            "labelled": vectors.labels.iter().flatten().count(),
            "classes": vectors.classes,
            "skipped": skipped,
        });
        screen::print(&format!("{answer:#}\n"))?;
    }
    Ok(Exit::Done)
}

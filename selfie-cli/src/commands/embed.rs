//! `embed`: the features of images, as a file.

use selfie_model::probe::normalise;
use serde_json::json;

use super::encoding::Trained;
use super::evaluate::Weights;
use super::gallery::Gallery;
use crate::args::Embed;
use crate::destination::Existing;
use crate::exit::Exit;
use crate::run_folder::refuse_inside;
use crate::screen;
use crate::vectors::Destination;

/// Runs the command.
///
/// # Errors
/// Usage, input, and what the system refuses.
pub fn run(arguments: &Embed) -> anyhow::Result<Exit> {
    let Embed { run, out, l2, features } = arguments;
    let destination = Destination::new(out, Existing::new(features.overwrite))?;
    let trained = Trained::open(run, Weights::of_any_run(run)?, &features.flags.request)?.at(&features.layer)?;
    let reporter = &trained.reporter;
    refuse_inside(out, &trained.settings.data.path)?;
    let mut gallery = Gallery::of(&trained, features.part.into())?;
    let vectors = &mut gallery.vectors;
    if *l2 {
        vectors.values.chunks_exact_mut(vectors.width).for_each(normalise);
    }
    let (n, width, layer) = (vectors.names.len(), vectors.width, trained.layer.to_string());
    let about = json!({ "run": run, "layer": layer, "l2": l2 });
    destination.write(vectors, &about)?;
    let files: Vec<_> = destination.files().iter().rev().map(|file| file.display().to_string()).collect();
    reporter.say(format!("wrote     {n} vectors of {width} numbers ({layer}): {}", files.join(", ")));
    if features.json {
        let skipped = gallery.skipped_as_json();
        let vectors = &gallery.vectors;
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

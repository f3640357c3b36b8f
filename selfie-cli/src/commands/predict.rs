//! `predict`: the classes that a finetuned run gives to image files.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::Read;
use std::path::{Path, PathBuf};

use selfie_model::Images;
use serde_json::json;

use super::encoding::{Parameters, Trained};
use super::evaluate::Weights;
use crate::args::Predict;
use crate::config::{Data, Key, Request};
use crate::data::{self, Which};
use crate::exit::{Exit, Problem, printable};
use crate::screen;
use crate::vectors::field;

/// What every writer to a `String` is.
const INFALLIBLE: &str = "writing to a string cannot fail";

/// Images, and what their names begin with.
struct Part {
    images: Images,
    folder: String,
}

/// What was found of an image.
type Answer = Result<Vec<(u32, f64)>, String>;

/// Runs the command.
///
/// # Errors
/// Usage, input, and what the system refuses.
pub fn run(arguments: &Predict) -> anyhow::Result<Exit> {
    let Predict { run, inputs, top, csv, json, batch, device, precision, threads, workers } = arguments;
    let flags = [
        ("train.batch", batch),
        ("run.device", device),
        ("run.precision", precision),
        ("run.threads", threads),
        ("data.workers", workers),
    ];
    let flags = flags.into_iter().filter_map(|(name, value)| Some((Key::find(name)?, value.clone()))).collect();
    let environment = Request::process_environment();
    let trained = Trained::open(run, Weights::of_run(run)?, &Request { flags, environment, ..Request::default() })?;
    let parts = parts(inputs, &trained.settings.data)?;
    if !(*csv || *json) {
        trained.introduce();
    }
    let images: Vec<_> = parts.iter().map(|part| &part.images).collect();
    let mut found: Vec<HashMap<usize, Answer>> = parts.iter().map(|_| HashMap::new()).collect();
    let skipped = trained.encode(Parameters::Trained, &images, &mut |part, image| {
        found[part].insert(image.index, Ok(likeliest(image.scores, *top as usize)));
    })?;
    for (found, skipped) in found.iter_mut().zip(skipped) {
        found.extend(skipped.into_iter().map(|file| (file.index, Err(file.reason))));
    }
    let mut text = if *csv { "name,rank,class,probability\n".to_string() } else { String::new() };
    let mut failed = 0;
    for (part, found) in parts.iter().zip(&mut found) {
        for &index in &part.images.items {
            let Some(answer) = found.remove(&index) else { continue };
            let name = format!("{}{}", part.folder, part.images.dataset.key(index));
            if let Err(reason) = &answer {
                failed += 1;
                trained.reporter.warn(format!("{name}: {reason}"));
            }
            let classes = &trained.classes;
            match (answer, *json, *csv) {
                (answer, true, _) => writeln!(text, "{}", as_json(&name, answer, classes)).expect(INFALLIBLE),
                (Ok(classified), false, true) => {
                    for (rank, (class, probability)) in (1..).zip(classified) {
                        let (name, class) = (field(&name), field(&classes[class as usize]));
                        writeln!(text, "{name},{rank},{class},{probability}").expect(INFALLIBLE);
                    }
                }
                (Ok(classified), false, false) => {
                    let of = |&(class, probability): &(u32, f64)| {
                        format!("{} {:.1}%", classes[class as usize], 100.0 * probability)
                    };
                    let classified: Vec<_> = classified.iter().map(of).collect();
                    let line = format!("{name}: {}", classified.join(", "));
                    writeln!(text, "{}", printable(&line)).expect(INFALLIBLE);
                }
                (Err(_), false, _) => {}
            }
        }
    }
    screen::print(&text)?;
    if failed > 0 {
        trained.reporter.warn(format!("{failed} of the images could not be read: exit code 3"));
        return Ok(Exit::Input);
    }
    Ok(Exit::Done)
}

/// The images that are meant, in their order.
fn parts(inputs: &[PathBuf], data: &Data) -> anyhow::Result<Vec<Part>> {
    let mut parts = Vec::new();
    let mut files = Vec::new();
    let end_files = |files: &mut Vec<PathBuf>, parts: &mut Vec<Part>| {
        if !files.is_empty() {
            let images = data::of_files(std::mem::take(files), data.workers);
            parts.push(Part { images, folder: String::new() });
        }
    };
    for input in inputs {
        if input == Path::new("-") {
            files.extend(named_on_standard_input()?);
        } else if input.is_dir() {
            end_files(&mut files, &mut parts);
            let data = Data { path: input.clone(), limit: 0, max_bad: 1.0, ..data.clone() };
            let folder = format!("{}/", input.display().to_string().trim_end_matches('/'));
            let images = data::for_embedding(&data, Which::All)?.parts;
            parts.extend(images.into_iter().map(|part| Part { images: part.images, folder: folder.clone() }));
        } else {
            files.push(input.clone());
        }
    }
    end_files(&mut files, &mut parts);
    if parts.is_empty() {
        return Err(Problem::input("expected names of image files on standard input, one a line, found none"));
    }
    Ok(parts)
}

fn named_on_standard_input() -> anyhow::Result<Vec<PathBuf>> {
    let mut bytes = Vec::new();
    let read = std::io::stdin().read_to_end(&mut bytes);
    read.map_err(|error| Problem::input(format!("cannot read names from standard input: {error}")))?;
    let lines = bytes.split(|&byte| byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    Ok(lines.filter(|line| !line.is_empty()).map(|line| path(line).into()).collect())
}

/// A name as the system spells it.
#[cfg(unix)]
fn path(bytes: &[u8]) -> OsString {
    use std::os::unix::ffi::OsStrExt;
    std::ffi::OsStr::from_bytes(bytes).into()
}

/// A name as the system spells it.
#[cfg(not(unix))]
fn path(bytes: &[u8]) -> OsString {
    String::from_utf8_lossy(bytes).into_owned().into()
}

/// The `most` classes of the highest scores, with their probabilities; of equals the first.
fn likeliest(scores: &[f32], most: usize) -> Vec<(u32, f64)> {
    let highest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = scores.iter().map(|&score| f64::from(score - highest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut classes: Vec<(u32, f64)> = (0..).zip(weights).map(|(class, weight)| (class, weight / sum)).collect();
    classes.sort_by(|(a, one), (b, other)| other.total_cmp(one).then(a.cmp(b)));
    classes.truncate(most);
    classes
}

fn as_json(name: &str, answer: Answer, classes: &[String]) -> serde_json::Value {
    match answer {
        Ok(classified) => {
            let of = |(class, probability): (u32, f64)| json!({ "class": classes[class as usize], "probability": probability });
            json!({ "name": name, "predictions": classified.into_iter().map(of).collect::<Vec<_>>() })
        }
        Err(reason) => json!({ "name": name, "error": reason }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_of_known_scores() {
        // exp of 0, ln 2, ln 2: 1/5, 2/5, 2/5; scores that would overflow alone.
        let scores = [200.0, 200.0 + 2f32.ln(), 200.0 + 2f32.ln()];
        let found = likeliest(&scores, 2);
        assert_eq!(found.iter().map(|&(class, _)| class).collect::<Vec<_>>(), [1, 2]);
        // An f32 of 200 is known to 2^-17.
        assert!(found.iter().all(|&(_, probability)| (probability - 0.4).abs() < 1e-5), "{found:?}");
        assert_eq!(likeliest(&scores, 9).len(), 3);
    }
}

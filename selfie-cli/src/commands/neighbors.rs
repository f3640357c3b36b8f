//! `neighbors`: the nearest images of some, to look at what a network takes for alike.

use std::fmt::Write as _;
use std::io::IsTerminal as _;

use selfie_data::Image;
use selfie_model::probe::{Neighbour, nearest};
use selfie_model::{Images, durable};
use serde_json::{Value, json};

use super::encoding::{Parameters, Trained};
use super::evaluate::Weights;
use super::gallery::{Gallery, Sheet, thumbnail};
use crate::args::Neighbors;
use crate::data::{self, limited};
use crate::destination::{self, Existing};
use crate::exit::{Exit, Problem, printable};
use crate::halfblocks::{Canvas, Colours};
use crate::run_folder::refuse_inside;
use crate::screen;

/// What every writer to a `String` is.
const INFALLIBLE: &str = "writing to a string cannot fail";

/// Neighbours unless asked otherwise.
const DEFAULT_NEIGHBOURS: usize = 8;

/// Side of a picture on the sheet, its frame, and what lies between two, in pixels.
const TILE: usize = 96;
const FRAME: usize = 3;
const GAP: usize = 6;
/// Between a query and its neighbours.
const WIDE_GAP: usize = 18;

/// Side of a picture in the terminal, and columns between two.
const SMALL: usize = 16;
const SMALL_GAP: usize = 2;

const SAME: [u8; 3] = [60, 180, 80];
const OTHER: [u8; 3] = [220, 60, 50];
const UNKNOWN: [u8; 3] = [150, 150, 150];

/// An image and the nearest to it.
struct Found {
    name: String,
    class: Option<String>,
    /// `[TILE, TILE, 3]`
    picture: Vec<u8>,
    neighbours: Vec<Neighbour>,
}

/// Runs the command.
///
/// # Errors
/// Usage, input, and what the system refuses.
pub fn run(arguments: &Neighbors) -> anyhow::Result<Exit> {
    let Neighbors { run, image, k, queries, out, features } = arguments;
    if let Some(out) = out {
        if !out.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("png")) {
            return Err(Problem::usage(format!("--out {}: expected a file name that ends with .png", out.display())));
        }
        destination::check("--out", out, std::slice::from_ref(out), Existing::new(features.overwrite))?;
    }
    let trained = Trained::open(run, Weights::of_any_run(run)?, &features.flags.request)?.at(&features.layer)?;
    if let Some(out) = out {
        refuse_inside(out, &trained.settings.data.path)?;
    }
    let gallery = Gallery::of(&trained, features.part.into())?;
    let threads = trained.settings.run.threads;
    let width = gallery.vectors.width;
    // An image of the data is its own nearest one, and is left out.
    let most = gallery.len() - usize::from(image.is_none());
    if most == 0 {
        return Err(Problem::input(format!(
            "{}: expected 2 or more images, found 1: it has no neighbours",
            trained.settings.data.path.display()
        )));
    }
    let k = k.map_or(DEFAULT_NEIGHBOURS.min(most), |k| k as usize);
    if k > most {
        return Err(Problem::usage(format!("--k {k}: expected at most {most}, as there are {} images", gallery.len())));
    }
    let found = match image {
        Some(path) => {
            let (features, picture) = encode_one(&trained, &data::of_files(vec![path.clone()], 0))?;
            let neighbours = nearest(&gallery.vectors.values, &features, width, k, threads)?;
            let name = path.display().to_string();
            let one = |neighbours| Found { name: name.clone(), class: None, picture: picture.clone(), neighbours };
            neighbours.into_iter().map(one).collect()
        }
        None => of_gallery(&gallery, *queries as usize, k, threads)?,
    };
    let layer = trained.layer.to_string();
    if let Some(out) = out {
        durable::write_file(out, &sheet(&gallery, &found)?.png()?)?;
        trained.reporter.say(format!("wrote     {}", out.display()));
    }
    let text = if features.json {
        let answer = json!({
            "run": run,
            "layer": layer,
            "k": k,
            "n": gallery.len(),
            "sheet": out,
            "queries": found.iter().map(|one| as_json(&gallery, one)).collect::<Vec<_>>(),
            "skipped": gallery.skipped_as_json(),
        });
        format!("{answer:#}\n")
    } else {
        let colours = if std::io::stdout().is_terminal() { Colours::of_terminal() } else { Colours::None };
        let mut text = format!("the nearest of {} images by cosine similarity ({layer})\n", gallery.len());
        for one in &found {
            text.push('\n');
            text += &in_words(&gallery, one);
            if colours != Colours::None {
                text += &in_colours(&gallery, one, colours)?;
            }
        }
        text
    };
    screen::print(&text)?;
    Ok(Exit::Done)
}

/// Features and picture of an image that is no part of the data.
fn encode_one(trained: &Trained, images: &Images) -> anyhow::Result<(Vec<f32>, Vec<u8>)> {
    let mut features = Vec::new();
    let skipped =
        trained.encode(Parameters::Trained, &[images], &mut |_, image| features.extend_from_slice(image.features))?;
    if let Some(file) = skipped.into_iter().flatten().next() {
        return Err(Problem::input(format!("{}: {}", file.key, file.reason)));
    }
    let image: Image = images.dataset.read(0)?;
    Ok((features, thumbnail(&image, TILE)))
}

/// Some images of the gallery, each with its nearest others.
fn of_gallery(gallery: &Gallery, queries: usize, k: usize, threads: usize) -> anyhow::Result<Vec<Found>> {
    let chosen = limited((0..gallery.len()).collect(), queries);
    let features: Vec<f32> = chosen.iter().flat_map(|&i| gallery.features(i)).copied().collect();
    let all = nearest(&gallery.vectors.values, &features, gallery.vectors.width, k + 1, threads)?;
    let pairs = chosen.into_iter().zip(all);
    let of = |(i, mut neighbours): (usize, Vec<Neighbour>)| {
        // Where others are as near as itself it need not be the first, nor among them.
        let own = neighbours.iter().position(|neighbour| neighbour.index == i).unwrap_or(k);
        neighbours.remove(own);
        let (name, class) = (gallery.vectors.names[i].clone(), gallery.class(i).map(String::from));
        Ok(Found { name, class, picture: gallery.thumbnail(i, TILE)?, neighbours })
    };
    pairs.map(of).collect()
}

fn as_json(gallery: &Gallery, Found { name, class, neighbours, .. }: &Found) -> Value {
    let of = |&Neighbour { similarity, index }: &Neighbour| {
        let name = &gallery.vectors.names[index];
        json!({ "name": name, "class": gallery.class(index), "similarity": similarity })
    };
    json!({ "name": name, "class": class, "neighbours": neighbours.iter().map(of).collect::<Vec<_>>() })
}

/// A name, with the class where it is known.
fn named(name: &str, class: Option<&str>) -> String {
    let class = class.map(|class| format!(" ({class})")).unwrap_or_default();
    printable(&format!("{name}{class}")).replace('\n', " ")
}

fn in_words(gallery: &Gallery, found: &Found) -> String {
    let mut text = named(&found.name, found.class.as_deref()) + "\n";
    for &Neighbour { similarity, index } in &found.neighbours {
        let name = named(&gallery.vectors.names[index], gallery.class(index));
        writeln!(text, "  {similarity:.3}  {name}").expect(INFALLIBLE);
    }
    text
}

/// The query and its neighbours beside one another, as many as fit into a line of 80 columns.
fn in_colours(gallery: &Gallery, found: &Found, colours: Colours) -> anyhow::Result<String> {
    let pitch = SMALL + SMALL_GAP;
    let fit = found.neighbours.len().min(80 / pitch);
    let mut canvas = Canvas::new((fit + 1) * pitch - SMALL_GAP, SMALL);
    let query = Image { height: TILE, width: TILE, pixels: found.picture.clone() };
    let mut pictures = vec![thumbnail(&query, SMALL)];
    for neighbour in &found.neighbours[..fit] {
        pictures.push(gallery.thumbnail(neighbour.index, SMALL)?);
    }
    for (place, picture) in pictures.iter().enumerate() {
        for (i, pixel) in picture.as_chunks::<3>().0.iter().enumerate() {
            canvas.set(i / SMALL, place * pitch + i % SMALL, *pixel);
        }
    }
    Ok((0..SMALL / 2).map(|line| canvas.line(line, colours) + "\n").collect())
}

/// A row for each query: it, then its neighbours from the nearest on, framed green where their class is the same and red
/// where it is another.
fn sheet(gallery: &Gallery, found: &[Found]) -> anyhow::Result<Sheet> {
    let k = found.iter().map(|one| one.neighbours.len()).max().unwrap_or(0);
    let pitch = TILE + 2 * FRAME + GAP;
    let mut sheet = Sheet::new(pitch * (k + 1) + WIDE_GAP + GAP, pitch * found.len() + GAP, 250);
    for (row, one) in found.iter().enumerate() {
        let top = GAP + row * pitch;
        let mut put = |left: usize, frame: [u8; 3], picture: &[u8]| {
            sheet.fill(left, top, TILE + 2 * FRAME, frame);
            sheet.put(left + FRAME, top + FRAME, TILE, picture);
        };
        put(GAP, UNKNOWN, &one.picture);
        for (place, neighbour) in one.neighbours.iter().enumerate() {
            let frame = match (&one.class, gallery.class(neighbour.index)) {
                (Some(class), Some(other)) if class == other => SAME,
                (Some(_), Some(_)) => OTHER,
                _ => UNKNOWN,
            };
            put(GAP + WIDE_GAP + (place + 1) * pitch, frame, &gallery.thumbnail(neighbour.index, TILE)?);
        }
    }
    Ok(sheet)
}

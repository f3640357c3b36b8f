//! `map`: the images of some data in the plane, those that the network takes for alike beside one another, as one HTML file.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bhtsne::tSNE;
use selfie_model::durable;
use selfie_model::probe::{nearest, principal_components};
use serde_json::json;

use super::encoding::Trained;
use super::evaluate::Weights;
use super::gallery::{Gallery, Sheet};
use crate::args::Map;
use crate::config::Origin;
use crate::destination::{self, Existing};
use crate::exit::{Exit, Problem};
use crate::run_folder::refuse_inside;
use crate::screen;

/// The page, with a place for the data.
const PAGE: &str = include_str!("page.html");
const DATA: &str = "/*DATA*/";

/// Images of a part unless `--limit` says otherwise: so many are still seen one by one, and take some seconds.
const DEFAULT_LIMIT: usize = 2000;

/// Rounds of t-SNE, and how coarse it takes what is far away (0 is exact): van der Maaten 2014's.
const ROUNDS: usize = 1000;
const COARSENESS: f32 = 0.5;

/// Largest spread of where t-SNE begins: small, so that it may still take any shape.
const BEGINNING: f64 = 1e-4;

/// Runs the command.
///
/// # Errors
/// Usage, input, and what the system refuses.
pub fn run(arguments: &Map) -> anyhow::Result<Exit> {
    let Map { run, out, perplexity, side, features } = arguments;
    if !out.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("html")) {
        return Err(Problem::usage(format!("--out {}: expected a file name that ends with .html", out.display())));
    }
    destination::check("--out", out, std::slice::from_ref(out), Existing::new(features.overwrite))?;
    let mut trained = Trained::open(run, Weights::of_any_run(run)?, &features.flags.request)?.at(&features.layer)?;
    // The run's own limit was for its training.
    let limit = &trained.resolved.entry("data.limit").origin;
    if matches!(limit, Origin::BuiltIn | Origin::Preset(_) | Origin::Init(_) | Origin::Run(_)) {
        trained.settings.data.limit = DEFAULT_LIMIT;
    }
    refuse_inside(out, &trained.settings.data.path)?;
    let gallery = Gallery::of(&trained, features.part.into())?;
    let (n, width, threads) = (gallery.len(), gallery.vectors.width, trained.settings.run.threads);
    if n < 2 {
        return Err(Problem::input(format!(
            "{}: expected 2 or more images, found {n}: one is no map",
            trained.settings.data.path.display()
        )));
    }
    let components = principal_components(&gallery.vectors.values, width, 2, threads)?;
    let explained: Vec<f64> = components.explained.iter().map(|share| 100.0 * share).collect();
    let about = format!("two principal components, {:.0}% and {:.0}% of the variance", explained[0], explained[1]);
    let mut layouts = vec![json!({ "name": "PCA", "about": about, "points": rounded(&components.coordinates) })];
    // Each image has three times as many neighbours as the perplexity.
    let perplexity = perplexity.min((n - 1) as f32 / 3.0);
    if perplexity >= 1.0 {
        trained.reporter.say(format!("t-SNE     of {n} images, perplexity {perplexity}"));
        let points = t_sne(&gallery, &components.coordinates, perplexity, threads)?;
        let about = format!("t-SNE of cosine distances, perplexity {perplexity}, from the principal components on");
        layouts.insert(0, json!({ "name": "t-SNE", "about": about, "points": rounded(&points) }));
    } else {
        trained
            .reporter
            .warn(format!("{n} images are too few for t-SNE: the map has their principal components alone"));
    }
    let page = page(&gallery, *side as usize, &trained.layer.to_string(), &layouts)?;
    durable::write_file(out, page.as_bytes())?;
    let names: Vec<_> = layouts.iter().map(|layout| layout["name"].clone()).collect();
    trained.reporter.say(format!("wrote     {}: {n} images", out.display()));
    if features.json {
        let answer = json!({
            "file": out,
            "n": n,
            "layer": trained.layer.to_string(),
            "layouts": names,
            "perplexity": (perplexity >= 1.0).then_some(perplexity),
            "explained": components.explained,
            "skipped": gallery.skipped_as_json(),
        });
        screen::print(&format!("{answer:#}\n"))?;
    }
    Ok(Exit::Done)
}

/// Places in the plane, `[n, 2]`: t-SNE (van der Maaten and Hinton 2008) of the distances on the unit sphere.
fn t_sne(gallery: &Gallery, begin: &[f64], perplexity: f32, threads: usize) -> anyhow::Result<Vec<f64>> {
    let (n, values) = (gallery.len(), &gallery.vectors.values);
    let k = (3.0 * perplexity) as usize;
    let near = nearest(values, values, gallery.vectors.width, k + 1, threads)?;
    let neighbours = near.into_iter().enumerate().map(|(i, mut near)| {
        // Where others are as near as itself it need not be the first, nor among them.
        let own = near.iter().position(|neighbour| neighbour.index == i).unwrap_or(k);
        near.remove(own);
        let distance = |similarity: f32| (2.0 - 2.0 * similarity).max(0.0).sqrt();
        near.iter().map(|x| bhtsne::Neighbor { index: x.index, distance: distance(x.similarity) }).collect()
    });
    let neighbours: Vec<Vec<_>> = neighbours.collect();
    let largest = begin.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    let scale = if largest > 0.0 { BEGINNING / largest } else { 0.0 };
    // Where all features are the same, something must tell the images apart.
    let begin = begin.iter().zip(0..).map(|(x, i)| (x * scale + 1e-9 * f64::from(i % 97)) as f32);
    let begin: Vec<f32> = begin.collect();
    // The crate adds in an order that depends on how threads share the work; of one thread it is always the same.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
    let points = pool.install(|| {
        let data: Vec<usize> = (0..n).collect();
        let mut map = tSNE::<f32, usize, 2>::new(&data);
        map.perplexity(perplexity).epochs(ROUNDS).initial_embedding(begin);
        map.barnes_hut_with_neighbors(COARSENESS, &neighbours).embedding()
    });
    Ok(points.into_iter().map(f64::from).collect())
}

/// Coordinates with as many digits as a screen shows.
fn rounded(points: &[f64]) -> Vec<f64> {
    let largest = points.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    let digits = (4 - largest.max(1e-300).log10().floor() as i32).clamp(-300, 300);
    let scale = 10f64.powi(digits);
    points.iter().map(|x| (x * scale).round() / scale).collect()
}

/// The page with everything in it: places, names, classes, and the pictures as one.
fn page(gallery: &Gallery, side: usize, layer: &str, layouts: &[serde_json::Value]) -> anyhow::Result<String> {
    let n = gallery.len();
    let columns = (n as f64).sqrt().ceil() as usize;
    let mut sprites = Sheet::new(columns * side, n.div_ceil(columns) * side, 255);
    for i in 0..n {
        sprites.put(i % columns * side, i / columns * side, side, &gallery.thumbnail(i, side)?);
    }
    let data = json!({
        "about": format!("features: {layer}"),
        "layouts": layouts,
        "names": gallery.vectors.names,
        "labels": gallery.vectors.labels,
        "classes": gallery.vectors.classes,
        "side": side,
        "columns": columns,
        "sprites": format!("data:image/png;base64,{}", STANDARD.encode(sprites.png()?)),
    });
    // A name must not end the script.
    Ok(PAGE.replacen(DATA, &data.to_string().replace('<', "\\u003c"), 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coordinates_keep_what_a_screen_shows() {
        assert_eq!(rounded(&[123.456_789, -0.000_4]), [123.46, 0.0]);
        assert_eq!(rounded(&[0.001_234_567, 0.0]), [0.001_234_6, 0.0]);
        assert_eq!(rounded(&[0.0]), [0.0]);
    }

    #[test]
    fn the_page_has_one_place_for_the_data() {
        assert_eq!(PAGE.matches(DATA).count(), 1);
        // Nothing is fetched from anywhere.
        assert!(!PAGE.contains("http"));
    }
}

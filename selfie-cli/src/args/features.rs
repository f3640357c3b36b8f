//! Flags of the commands that look at what a network makes of images.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use selfie_model::Pooling;

use super::{ConfigFlags, ForEvaluate, device_name};
use crate::data::Which;

pub(super) const EMBED_HELP: &str = "\
One vector for each image, behind norm and ReLU. Of a finetuned run it is the average over the last map, or with --head
attention the attention pooling's summary. A pretrained network, which saw patches, takes whole images as well; with
--pooling patches each patch of pretraining's grid goes through it by itself, and the vector is their average.
Images need no labels; an image that cannot be read is named and left out. The formats, by the extension of --out:
  .npy          float32 [n, width]; beside it FILE.images.csv with the columns name, label, class, a row for each vector
  .csv          columns name, label, class, f0, f1, ..
  .parquet      columns name (text), label (int64), class (text), embedding (list of float32); `about` in the metadata
  .safetensors  tensors `embedding` (F32 [n, width]) and `label` (I64 [n], -1 where unknown); in the metadata the JSON lists
                `names` and `classes`, and `about`
Names are the images' paths in the data; label is a number, class its name, both empty where unknown.

Examples:
  selfie embed runs/pre --data photos/ -o photos.npy
  selfie embed runs/pre --data photos/ --layer stage2 -o photos.parquet
  selfie embed runs/pre --data photos/ --part val --l2 -o val.csv";

/// Flags of `embed`.
#[derive(Debug, Args)]
pub struct Embed {
    /// Folder of a run
    pub run: PathBuf,
    /// The file to write: .npy, .csv, .parquet or .safetensors
    #[arg(short, long, value_name = "FILE")]
    pub out: PathBuf,
    /// Divide every vector by its Euclidean length
    #[arg(long)]
    pub l2: bool,
    /// What `embed`, `neighbors` and `map` share.
    #[command(flatten)]
    pub features: FeatureFlags,
}

/// Which features of which images, and how they are answered with.
#[derive(Debug, Args)]
pub struct FeatureFlags {
    /// Which images: all, those to train on, or those held out
    #[arg(long, value_name = "PART", default_value = "all")]
    pub part: PartName,
    /// Where they are taken.
    #[command(flatten)]
    pub layer: LayerFlags,
    /// Replace the file if it is there
    #[arg(long, visible_alias = "force")]
    pub overwrite: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// The configuration.
    #[command(flatten)]
    pub flags: ConfigFlags<ForEvaluate>,
}

/// Where features are taken.
#[derive(Debug, Args)]
pub struct LayerFlags {
    /// Take features behind an earlier stage: stage1, stage2 and so on [default: the last]
    #[arg(long, value_name = "STAGE", value_parser = stage)]
    pub layer: Option<usize>,
    /// What is averaged: the map of the whole image, or a pretrained network's patches [default: map]
    #[arg(long, value_name = "POOLING")]
    pub pooling: Option<PoolingName>,
}

/// A value of `--layer`.
fn stage(text: &str) -> Result<usize, String> {
    let stage = text.strip_prefix("stage").and_then(|stage| stage.parse().ok()).filter(|stage| *stage > 0);
    stage.ok_or_else(|| "expected stage1, stage2, stage3 or stage4".into())
}

/// A pooling that can be asked for.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum PoolingName {
    /// The average over the map of the whole image
    Map,
    /// The average over the patches of pretraining's grid, each through the network by itself
    Patches,
}

impl From<PoolingName> for Pooling {
    fn from(name: PoolingName) -> Self {
        match name {
            PoolingName::Map => Self::Map,
            PoolingName::Patches => Self::Patches,
        }
    }
}

/// A part of the data.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum PartName {
    /// All images
    All,
    /// The images to train on; all where the data have no parts
    Train,
    /// The images held out: val/ or test/
    #[value(alias = "test")]
    Val,
}

impl From<PartName> for Which {
    fn from(name: PartName) -> Self {
        match name {
            PartName::All => Which::All,
            PartName::Train => Which::Train,
            PartName::Val => Which::Test,
        }
    }
}

pub(super) const NEIGHBORS_HELP: &str = "\
Distances are angles between features, exact over all images. Without IMAGE some images of the data are taken, always the same
ones, and each is left out of its own neighbours. On the sheet neighbours of the same class are framed green, others red, and
grey where no class is known.

Keys of --json:
  run, layer, k, n, sheet, queries: [{name, class, neighbours: [{name, class, similarity}]}], skipped: [{name, reason}]

Examples:
  selfie neighbors runs/pre --data photos/ -o neighbors.png
  selfie neighbors runs/pre --data photos/ some.jpg -k 20";

/// Flags of `neighbors`.
#[derive(Debug, Args)]
pub struct Neighbors {
    /// Folder of a run
    pub run: PathBuf,
    /// An image file, of the data or any other, whose neighbours are wanted
    pub image: Option<PathBuf>,
    /// Neighbours of each; 8, or as many as there are if these are fewer
    #[arg(short, long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub k: Option<u32>,
    /// Images whose neighbours are shown, where none is given
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=200))]
    pub queries: u32,
    /// Write a sheet of pictures as well: a .png file
    #[arg(short, long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// What `embed`, `neighbors` and `map` share.
    #[command(flatten)]
    pub features: FeatureFlags,
}

pub(super) const MAP_HELP: &str = "\
One HTML file with everything in it; a browser shows the images as points, the picture where the pointer is, classes by
colour. Two layouts: t-SNE of cosine distances, in which neighbours lie together (distances between groups say little), and
the two principal components. At most 2000 images of a part are taken unless --limit says otherwise (0: all). The same data
give the same map.

Keys of --json:
  file, n, layer, layouts, perplexity, explained (shares of the variance), skipped: [{name, reason}]

Examples:
  selfie map runs/pre --data photos/ -o map.html
  selfie map runs/pre --data photos/ --part val --limit 5000 -o map.html";

/// Flags of `map`.
#[derive(Debug, Args)]
pub struct Map {
    /// Folder of a run
    pub run: PathBuf,
    /// The file to write: .html
    #[arg(short, long, value_name = "FILE")]
    pub out: PathBuf,
    /// How many neighbours of an image count, about; less where there are fewer than 3 times as many
    #[arg(long, value_name = "N", default_value_t = 30.0, value_parser = perplexity)]
    pub perplexity: f32,
    /// Side of a picture in the file, in pixels
    #[arg(long, value_name = "PIXELS", default_value_t = 40, value_parser = clap::value_parser!(u32).range(8..=256))]
    pub side: u32,
    /// What `embed`, `neighbors` and `map` share.
    #[command(flatten)]
    pub features: FeatureFlags,
}

/// A value of `--perplexity`.
fn perplexity(text: &str) -> Result<f32, String> {
    let value = text.parse().ok().filter(|value: &f32| (1.0..=1000.0).contains(value));
    value.ok_or_else(|| "expected a number from 1 to 1000".into())
}

pub(super) const PREDICT_HELP: &str = "\
Images are decoded, resized and cropped as `evaluate` does it. What cannot be read is named, and the rest goes on; the
exit code is then 3.
  --csv         columns name, rank, class, probability
  --json        a line for each image: {name, predictions: [{class, probability}]}, or {name, error}

Examples:
  selfie predict runs/fine a.jpg b.png
  selfie predict runs/fine photos/ --top 1 --csv > classes.csv
  find photos -name '*.jpg' | selfie predict runs/fine - --json";

/// Flags of `predict`.
#[derive(Debug, Args)]
pub struct Predict {
    /// Folder of a finetuned run
    pub run: PathBuf,
    /// Image files; folders of images; or - for names on standard input, one a line
    #[arg(required = true, value_name = "FILE|FOLDER|-")]
    pub inputs: Vec<PathBuf>,
    /// The likeliest K classes of each image
    #[arg(long, value_name = "K", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub top: u32,
    /// Print a table for programs
    #[arg(long, conflicts_with = "json")]
    pub csv: bool,
    /// Print a JSON object for each image, one a line
    #[arg(long)]
    pub json: bool,
    /// Images at a time; does not change results on the CPU
    #[arg(long, value_name = "N", default_value = "64")]
    pub batch: String,
    /// Where to compute
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = device_name)]
    pub device: String,
    /// Type of the activations
    #[arg(long, value_name = "TYPE", default_value = "auto", value_parser = ["auto", "f32", "bf16"])]
    pub precision: String,
    /// Threads that compute; 0 takes one per core that this process may use
    #[arg(long, value_name = "N", default_value = "0")]
    pub threads: String,
    /// Threads that read and decode images ahead of the network; 0 reads when needed
    #[arg(long, value_name = "N", default_value = "1")]
    pub workers: String,
}

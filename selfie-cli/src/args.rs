//! The command line. Flags of the configuration are made from the table of keys; the rest is declared here.

mod evaluate;
mod features;
mod weights;

pub use evaluate::*;
pub use features::*;
pub use weights::*;

use std::marker::PhantomData;
use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Args, Parser, Subcommand, ValueEnum};
use selfie_data::LabelBudget;
use selfie_model::probe::Similarity;

use crate::commands::fewlabel::OF_A_RUN;
use crate::config::{KEYS, Key, Kind, Request, Task, by_preset};
use crate::device::Wish;
use crate::training::Answer;

/// Self-supervised pretraining of image networks by the Selfie method: hide patches of an image, learn which belongs
/// where, then train a classifier on few labels.
#[derive(Debug, Parser)]
#[command(
    name = "selfie",
    version,
    propagate_version = true,
    subcommand_required = true,
    arg_required_else_help = true,
    max_term_width = 110,
    after_help = "Start here:
  selfie demo                                                  no data needed, two minutes
  selfie data check --data photos/                             is anything wrong with the images?
  selfie pretrain --data photos/ --out runs/pre                any folder of images
  selfie finetune --data photos/ --init runs/pre --labels 5% --out runs/fine
  selfie fewlabel --data photos/ --init runs/pre --out runs/table      did it help, and by how much?
  selfie evaluate runs/fine --data photos/

Exit codes: 0 done, 1 failed, 2 wrong flag, key or value, 3 data or file missing or malformed,
4 training diverged, 5 out of memory, 75 saved and stopped on a signal (run it again to go on)."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// See it work: no data, no GPU, no network; under two minutes
    Demo(Demo),
    /// Pretrain on images without labels; the same --out continues
    #[command(after_help = "Examples:
  selfie pretrain --data photos/ --out runs/pre
  selfie pretrain --data cifar-10-binary.tar.gz --out runs/pre --preset small --minutes 10
  selfie pretrain --data photos/ --out runs/pre --steps 3000     go on with a run, for longer
  selfie pretrain -c runs/pre/config.toml --seed 1 --out runs/pre-1")]
    Pretrain(Training<ForPretrain>),
    /// Train a classifier on all or few labels, from pretrained weights or from scratch
    #[command(after_help = "Examples:
  selfie finetune --data photos/ --init runs/pre --labels 5% --out runs/fine
  selfie finetune --data photos/ --init scratch --labels 5% --out runs/scratch      the baseline
  selfie finetune --data photos/ --init resnetv2_50.safetensors --preset resnet50 --out runs/timm")]
    Finetune(Training<ForFinetune>),
    /// Did pretraining help? The paper's table on your data: pretrained and scratch, few labels to all, several seeds
    #[command(after_help = FEWLABEL_HELP)]
    Fewlabel(Fewlabel),
    /// Test accuracy of finetuned runs with its interval, of each class, confusion matrix and calibration
    #[command(after_help = evaluate::EVALUATE_HELP)]
    Evaluate(Evaluate),
    /// What the features of a run are worth as they are: neighbours or a linear classifier on them
    #[command(subcommand, arg_required_else_help = true)]
    Probe(Probe),
    /// The features of images, labelled or not, as a file
    #[command(after_help = features::EMBED_HELP)]
    Embed(Embed),
    /// The nearest images of some, as a list, in the terminal and as a sheet of pictures
    #[command(after_help = features::NEIGHBORS_HELP)]
    Neighbors(Neighbors),
    /// A map of the images, those that the network takes for alike together, as one HTML file
    #[command(after_help = features::MAP_HELP)]
    Map(Map),
    /// The classes that a finetuned run gives to image files
    #[command(after_help = features::PREDICT_HELP)]
    Predict(Predict),
    /// The weights of a run for other programs: timm, ONNX, safetensors
    #[command(after_help = weights::EXPORT_HELP)]
    Export(Export),
    /// What is in a run folder or weights file, and how to load it
    #[command(after_help = "Examples:
  selfie inspect runs/pre
  selfie inspect runs/pre/weights/model.safetensors --json")]
    Inspect(Inspect),
    /// Take a step again whose loss or gradient was not finite
    #[command(after_help = "A run writes not-finite-STEP.safetensors for such a step, with its images and parameters.
Examples:
  selfie replay runs/pre                                       the last one of a run
  selfie replay runs/pre/not-finite-00001200.safetensors --precision f32")]
    Replay(Replay),
    /// What this machine has, what would be used, and why
    #[command(after_help = "Examples:
  selfie doctor
  selfie doctor --device cuda:1          is that GPU sound? exit 1 if not
  selfie doctor --parity                 a training step on the GPU against the CPU, layer by layer
  selfie doctor --json")]
    Doctor(Doctor),
    /// How fast it is here, and what is slow: loader, step, whole run, and every pass of a step
    #[command(after_help = BENCH_HELP)]
    Bench(Bench),
    /// Look at images before training on them
    #[command(subcommand, arg_required_else_help = true)]
    Data(Data),
    /// Show or write the configuration
    #[command(subcommand, arg_required_else_help = true)]
    Config(Config),
}

/// Flags of `demo`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  selfie demo
  selfie demo --seconds 30 --out runs/quick")]
pub struct Demo {
    /// Time for all of it, by the clock
    #[arg(long, value_name = "SECONDS", default_value_t = 90, value_parser = clap::value_parser!(u64).range(5..=86_400))]
    pub seconds: u64,
    /// Where the run folders go; an earlier demo there is replaced
    #[arg(long, value_name = "FOLDER", default_value = "runs/demo")]
    pub out: PathBuf,
    /// Seed of the images, the weights and the choice of labels
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Threads that compute; 0 takes one per core that this process may use
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
}

/// Flags of `pretrain` and `finetune`.
#[derive(Debug, Args)]
pub struct Training<P: Purpose> {
    /// Print one JSON object at the end: how the run stands, and its result
    #[arg(long)]
    pub json: bool,
    /// The configuration.
    #[command(flatten)]
    pub flags: ConfigFlags<P>,
}

impl<P: Purpose> Training<P> {
    /// What is printed at the end.
    pub fn answer(&self) -> Answer {
        if self.json { Answer::Json } else { Answer::Words }
    }
}

const FEWLABEL_HELP: &str = "\
Finetunes from each --init and from scratch, with each share of the labels, with each seed, and compares the test accuracies.
The same for all arms: images (balanced over classes, nested, drawn by the seed), steps, batch, augmentation, and the learning
rates tried. The rate is chosen once for each arm and share, with seed 0, by accuracy on a part of the labelled images that is
kept from training then (--validation). The test part is measured once for each run of the table, at its end.

In --out: table.md, table.csv, table.json, cells.csv, plot.svg, all kept up to date while it runs; plan.json; and a run folder
for each run, as `selfie finetune` makes it, in cells/ARM/LABELS/seed-N and search/ARM/LABELS/lr-RATE.
The same command goes on where it was stopped or killed, to the same table; no run is computed twice.

A gain is a difference of mean accuracies, with its 95% interval by Welch's t; it is significant if that excludes 0.
Keys of --json (accuracies and gains between 0 and 1; null where there are too few seeds):
  finished, baseline, steps, seeds, learning_rates, validation, test_images,
  rows: [{labels, images, arm, learning_rate, n, diverged, mean, std, gain, gain_low, gain_high, significant,
    std_ratio, std_ratio_low, std_ratio_high}],
  cells: [{labels, arm, seed, learning_rate, top1, top5, loss, run}],
  search: [{labels, arm, learning_rate, accuracy, loss, images, run}]

Examples:
  selfie fewlabel --data photos/ --init runs/pre --out runs/table
  selfie fewlabel --data photos/ --init runs/pre --labels 1%,5%,20% --minutes 90 --out runs/table
  selfie fewlabel --data photos/ --init runs/a --init runs/b --lr 0.05 --steps 800 --out runs/two
  selfie fewlabel --out runs/table                             go on with it
  selfie evaluate runs/table/cells/pre/5%/seed-0               one of its runs";

/// Flags of `fewlabel`.
#[derive(Debug, Args)]
pub struct Fewlabel {
    /// An arm of the table: the folder of a pretraining run or a .safetensors file with timm's names; may be repeated
    #[arg(long, value_name = "RUN|FILE")]
    pub init: Vec<String>,
    /// Leave out the arm from scratch: gains are then over the first --init
    #[arg(long)]
    pub no_scratch: bool,
    /// Label budgets, each as `selfie finetune --labels` takes it; N% without @SEED is drawn anew for each seed
    /// [default: 5%,8%,20%,100%]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = label_budget)]
    pub labels: Vec<String>,
    /// Runs of each arm and budget, with seeds 0 to N - 1 [default: 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub seeds: Option<u64>,
    /// Highest learning rates to choose from; a single one is not searched for
    /// [default: 0.4, 1 and 2.5 times the preset's]
    #[arg(long, value_name = "LIST", value_delimiter = ',', allow_negative_numbers = true, value_parser = learning_rate)]
    pub lr: Vec<f64>,
    /// Part of the labelled images by which the learning rate is chosen [default: 0.2]
    #[arg(long, value_name = "FRACTION", allow_negative_numbers = true, value_parser = validation)]
    pub validation: Option<f64>,
    /// Steps of each run [default: the preset's for finetune]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1 << 40))]
    pub steps: Option<u64>,
    /// Time for all of it, instead of --steps: from a short measurement follow the steps, which are then kept
    #[arg(long, value_name = "N", conflicts_with = "steps", allow_negative_numbers = true, value_parser = minutes)]
    pub minutes: Option<f64>,
    /// Print the table as one JSON object
    #[arg(long)]
    pub json: bool,
    /// The configuration.
    #[command(flatten)]
    pub flags: ConfigFlags<ForFewlabel>,
}

fn label_budget(text: &str) -> Result<String, String> {
    text.parse::<LabelBudget>().map(|_| text.to_owned()).map_err(|error| error.to_string())
}

fn learning_rate(text: &str) -> Result<f64, String> {
    number(Kind::Above(0.0, 100.0), text)
}

fn validation(text: &str) -> Result<f64, String> {
    number(Kind::Above(0.0, 0.9), text)
}

fn minutes(text: &str) -> Result<f64, String> {
    number(Kind::Above(0.0, 1e7), text)
}

fn number(kind: Kind, text: &str) -> Result<f64, String> {
    let number = kind.parse(text).and_then(|_| text.trim().parse().ok());
    number.ok_or_else(|| format!("expected {}", kind.expected()))
}

/// Commands of `probe`.
#[derive(Debug, Subcommand)]
pub enum Probe {
    /// Classify the test images by their nearest training images
    #[command(
        after_help = "Weighted k-NN of cosine similarities, exact (Wu et al. 2018, arXiv 1805.01978): each neighbour votes with
exp(similarity / temperature). Features are whitened first, as most of what they vary by lies in few directions: by
the training images' covariance, shrunk as Ledoit and Wolf (2004) do; --similarity cosine leaves that out. Beside it
the same with the network as it was before any training.
Examples:
  selfie probe knn runs/pre --data photos/
  selfie probe knn runs/pre --data photos/ --labels 5% --json"
    )]
    Knn(Knn),
    /// Classify the test images by a linear classifier on the training images' features
    #[command(
        after_help = "Multinomial logistic regression on standardised features, solved to its optimum (L-BFGS). The penalty is chosen on
a part of the training images, then all of them are fitted; the test images are touched once. Beside it the same
with the network as it was before any training.
Examples:
  selfie probe linear runs/pre --data photos/
  selfie probe linear runs/pre --data photos/ --labels 5% --json"
    )]
    Linear(LinearProbe),
}

/// Flags of `probe knn`.
#[derive(Debug, Args)]
pub struct Knn {
    /// Folder of a run
    pub run: PathBuf,
    /// Neighbours; 20, or the training images there are if these are fewer
    #[arg(short, long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    pub k: Option<u32>,
    /// Temperature of the votes
    #[arg(long, value_name = "T", default_value_t = selfie_model::probe::DEFAULT_TEMPERATURE, value_parser = temperature)]
    pub temperature: f64,
    /// What is near
    #[arg(long, value_name = "SIMILARITY", default_value = "whitened")]
    pub similarity: SimilarityName,
    /// Training images that have a vote: all, or as `selfie finetune --labels` takes it (balanced over classes)
    #[arg(long, value_name = "BUDGET", default_value = "all")]
    pub labels: String,
    /// Where features are taken.
    #[command(flatten)]
    pub layer: LayerFlags,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// The configuration.
    #[command(flatten)]
    pub flags: ConfigFlags<ForEvaluate>,
}

/// Flags of `probe linear`.
#[derive(Debug, Args)]
pub struct LinearProbe {
    /// Folder of a run
    pub run: PathBuf,
    /// Training images to fit to: all, or as `selfie finetune --labels` takes it (balanced over classes)
    #[arg(long, value_name = "BUDGET", default_value = "all")]
    pub labels: String,
    /// Fraction of these by which the penalty is chosen
    #[arg(long, value_name = "FRACTION", default_value_t = 0.2, value_parser = fraction)]
    pub validation: f64,
    /// Where features are taken.
    #[command(flatten)]
    pub layer: LayerFlags,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// The configuration.
    #[command(flatten)]
    pub flags: ConfigFlags<ForEvaluate>,
}

/// A value of `--similarity`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum SimilarityName {
    /// Cosines of features without the mean and the correlations that they have over the training images
    Whitened,
    /// Cosines of features as they are
    Cosine,
}

impl From<SimilarityName> for Similarity {
    fn from(name: SimilarityName) -> Self {
        match name {
            SimilarityName::Whitened => Self::Whitened,
            SimilarityName::Cosine => Self::Cosine,
        }
    }
}

/// A value of `--temperature`.
fn temperature(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|value: &f64| *value > 0.0 && value.is_finite());
    value.ok_or_else(|| "expected a number above 0".into())
}

/// A value of `--validation`.
fn fraction(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|value: &f64| *value > 0.0 && *value < 1.0);
    value.ok_or_else(|| "expected a number between 0 and 1".into())
}

/// Flags of `replay`.
#[derive(Clone, Debug, Args)]
pub struct Replay {
    /// A not-finite-*.safetensors file, or a run folder
    pub path: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Where to compute
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = device_name)]
    pub device: String,
    /// Type of the activations: the run's own shows what it met, f32 whether that is the cause
    #[arg(long, value_name = "TYPE", default_value = "auto", value_parser = ["auto", "f32", "bf16"])]
    pub precision: String,
    /// Threads that compute; 0 takes one per core that this process may use
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
}

/// A value of `--device`.
fn device_name(text: &str) -> Result<String, String> {
    Wish::parse(text).map(|_| text.to_owned()).ok_or_else(|| format!("expected {}", Kind::Device.expected()))
}

/// Flags of `doctor`.
#[derive(Clone, Debug, Args)]
pub struct Doctor {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Take one training step on the chosen device and on the CPU in f64, and compare layer by layer
    #[arg(long)]
    pub parity: bool,
    /// Where to compute
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = device_name)]
    pub device: String,
    /// Type of the activations
    #[arg(long, value_name = "TYPE", default_value = "auto", value_parser = ["auto", "f32", "bf16"])]
    pub precision: String,
    /// Threads that compute; 0 takes one per core that this process may use
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
}

const BENCH_HELP: &str = "\
Nothing is written but the trace, the picture, or the table of --tune. Without --data, images are made up. What is printed:
  loader      images/s of reading, decoding, resizing and choosing crops, with nothing beside it
  step        images/s of training on batches that are there: each is brought to the device and augmented
  whole run   images/s of both together, as pretrain and finetune run
  ceilings    what this device was seen to do at most: bytes copied and added, products of matrices
  passes      every operation of a step, forward and backward; below each its shapes that take longest.
              rate: bytes or floating-point operations (B/s or F/s) that it must move or do, whichever is nearer
              to the ceiling. roofline: the time that takes at the ceiling, over the time taken. It may pass 100%:
              what lies in a cache is faster than memory, and on a CPU 3x3 convolutions do 16 products of 36.
              A convolution includes the normalisation and the ReLU in front of it.

Keys of --json:
  task, preset, image_size, batch, device: {kind, name, precision}, data: {description, workers},
  images_per_second: {loader, step, run}, bound_by: loader or step, waited_for_loader (part of the run, or null),
  peak_memory_bytes, ceilings: {bytes_per_second, flops_per_second, matrix_side},
  step: {seconds, timed_steps, timed_seconds, between_seconds, roofline}: as trained, and with its passes timed,
  passes and shapes (the same calls by pass, and by pass and shape): [{pass, shape, calls, seconds, flops, bytes,
    flops_per_second, bytes_per_second, roofline}], seconds of a step: they and between_seconds add up to timed_seconds,
  compare: null or {peer, turns, ours_images_per_second, peer_images_per_second, speed_ratio, _min, _max}

With --tune the program's own choices of kernels are compared with all others that do the same, in turns, by the time they take in
a step of this network, task and batch. The table of those that are faster in every round, by 3% or more, goes to
$XDG_CACHE_HOME/selfie/choices (~/.cache), for this GPU, driver and version; what it has of other networks stays in it. It is
written if whole steps are faster with it, and then every command goes by it. Another kernel may round otherwise, so a run keeps
the table that it was begun with. Keys of --json then: place, contests: [{pass, shape, variants: [{name, seconds}], fastest}],
step_seconds: [{rules, table}], entries, file.

Examples:
  selfie bench                                            pretraining of `small`, on made-up images
  selfie bench --data photos/ --preset resnet50 --batch 64 --workers 4
  selfie bench finetune --data cifar-10-binary.tar.gz --device cuda --precision bf16 --json
  selfie bench --trace step.json                          a step, to look at on https://ui.perfetto.dev
  selfie bench --tune --preset resnet50 --batch 256       the fastest kernels here, for later trainings
  selfie bench --roofline step.svg                        what is held back by the memory, and what by the products
  selfie bench --compare python                           in turns with the same steps in PyTorch";

/// Flags of `bench`.
#[derive(Debug, Args)]
pub struct Bench {
    /// What a step is
    #[arg(value_enum, default_value = "pretrain")]
    pub task: Timed,
    /// Time for all measurements; each takes at least three steps, and PyTorch's turns come on top
    #[arg(long, value_name = "SECONDS", default_value_t = 40, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub seconds: u64,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Write the fastest of the timed steps, pass by pass, in Chrome's trace format
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Instead of all that: time every kernel that could do a pass of this step on this GPU, and keep a table of those that
    /// are faster than what the program would choose
    #[arg(long, conflicts_with_all = ["trace", "roofline", "compare"])]
    pub tune: bool,
    /// Write a picture (SVG) of how near each pass with products comes to what the device can do
    #[arg(long, value_name = "FILE")]
    pub roofline: Option<PathBuf>,
    /// Take turns with the same network in PyTorch: `python`, or the path of a Python that has it
    #[arg(long, value_name = "PYTHON")]
    pub compare: Option<String>,
    /// The configuration.
    #[command(flatten)]
    pub flags: ConfigFlags<ForBench>,
}

/// What `bench` takes steps of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Timed {
    /// The puzzle.
    Pretrain,
    /// Training of a classifier.
    Finetune,
    /// A classifier's forward pass.
    Infer,
}

/// Commands of `data`.
#[derive(Debug, Subcommand)]
pub enum Data {
    /// What is wrong with the images: unreadable, leaking into the test part, duplicate, constant, tiny, misnamed
    #[command(after_help = DATA_CHECK_HELP)]
    Check(DataCheck),
}

const DATA_CHECK_HELP: &str = "\
Reads every image of both parts once and writes nothing. What training does with each finding:
  unreadable            skipped and listed in skipped.txt; above --max-bad (1%) an error
  in train and test     used as it is: test accuracy flatters
  duplicate             used as it is: seen more often; if classes differ, labels contradict
  constant              used as it is: all patches are alike, so the puzzle has no answer
  tiny                  used, enlarged where the network takes larger images
  misnamed              used as it is: the content decides, not the extension
Duplicates are exact: the same size and the same pixels after decoding, whatever the file format.

Keys of --json (all findings, not only the first ten; images by their path in the data):
  path, seconds, min_side, class_mismatch: text or null,
  leaks: [{train: [..], test: [..], classes: [..]}],
  train and test (null if there is none), each with
    description, images, unlabelled, allowed_bad (unreadable ones that --max-bad 1% allows),
    unreadable: [{key, reason}], misnamed: [{key, extension, content}],
    duplicates: [{keys: [..], classes: [..]}], constant: [..], tiny: [{key, height, width}],
    classes: {name: images},
    sizes: {short_side, long_side, aspect}, each {min, median, max}, or null

Exit code 0 whenever the data could be opened; with --strict 3 if one is unreadable or leaks.

Examples:
  selfie data check --data photos/
  selfie data check --data cifar-10-binary.tar.gz --json > audit.json
  selfie data check --data photos/ --strict && selfie pretrain --data photos/ --out runs/pre";

/// Flags of `data check`.
#[derive(Debug, Args)]
pub struct DataCheck {
    /// A folder of images, a CIFAR archive or folder, a tar of images, or `synthetic:`
    #[arg(long, value_name = "PATH")]
    pub data: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Exit with 3 if an image is unreadable, or in both the training and the test part
    #[arg(long)]
    pub strict: bool,
    /// Report images with a side of fewer pixels
    #[arg(long, value_name = "PIXELS", default_value_t = selfie_data::DEFAULT_MIN_SIDE)]
    pub min_side: usize,
    /// Threads that read; 0 takes one per core that this process may use
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
}

/// Commands of `config`.
#[derive(Debug, Subcommand)]
pub enum Config {
    /// The resolved configuration, with the origin of each value
    #[command(after_help = "Examples:
  selfie config show --preset resnet50
  selfie config show --for finetune -c run.toml --set train.lr=0.05 --json")]
    Show(ConfigShow),
    /// A commented TOML file with every key, its meaning and its default
    #[command(after_help = "Example:
  selfie config init > run.toml")]
    Init,
}

/// Flags of `config show`.
#[derive(Debug, Args)]
pub struct ConfigShow {
    /// The command that would be configured
    #[arg(long = "for", value_name = "COMMAND", default_value = "pretrain")]
    pub task: TaskName,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// The configuration.
    #[command(flatten)]
    pub flags: ConfigFlags<ForAny>,
}

/// A command with a configuration.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum TaskName {
    /// `selfie pretrain`
    Pretrain,
    /// `selfie finetune`
    Finetune,
    /// `selfie evaluate`
    Evaluate,
}

impl From<TaskName> for Task {
    fn from(name: TaskName) -> Self {
        match name {
            TaskName::Pretrain => Task::Pretrain,
            TaskName::Finetune => Task::Finetune,
            TaskName::Evaluate => Task::Evaluate,
        }
    }
}

/// For which command flags are made.
pub trait Purpose {
    /// The command; none takes the flags of all.
    const TASK: Option<Task>;
    /// Whether it has the key's flag.
    fn takes(key: &Key) -> bool {
        Self::TASK.is_none_or(|task| key.used_by.contains(&task))
    }
}

/// Flags of `pretrain`.
#[derive(Debug)]
pub struct ForPretrain;
/// Flags of `finetune`.
#[derive(Debug)]
pub struct ForFinetune;
/// Flags of `fewlabel`.
#[derive(Debug)]
pub struct ForFewlabel;
/// Flags of `evaluate`.
#[derive(Debug)]
pub struct ForEvaluate;
/// Flags of `bench`.
#[derive(Debug)]
pub struct ForBench;
/// Flags of all commands.
#[derive(Debug)]
pub struct ForAny;

impl Purpose for ForPretrain {
    const TASK: Option<Task> = Some(Task::Pretrain);
}
impl Purpose for ForFinetune {
    const TASK: Option<Task> = Some(Task::Finetune);
}
impl Purpose for ForFewlabel {
    const TASK: Option<Task> = Some(Task::Finetune);
    fn takes(key: &Key) -> bool {
        key.used_by.contains(&Task::Finetune) && !OF_A_RUN.contains(&key.name)
    }
}
impl Purpose for ForEvaluate {
    const TASK: Option<Task> = Some(Task::Evaluate);
}
impl Purpose for ForBench {
    const TASK: Option<Task> = Some(Task::Pretrain);
    /// What decides over the speed, and no more: nothing is learned or kept.
    fn takes(key: &Key) -> bool {
        let of_training = ["data.holdout", "run.out"];
        match key.split().0 {
            "train" => key.name == "train.batch",
            _ => key.used_by.contains(&Task::Pretrain) && !of_training.contains(&key.name),
        }
    }
}
impl Purpose for ForAny {
    const TASK: Option<Task> = None;
}

/// `-c`, `--set` and a flag for every key that the command uses.
#[derive(Debug)]
pub struct ConfigFlags<P> {
    /// What was typed, with the environment.
    pub request: Request,
    purpose: PhantomData<P>,
}

fn keys<P: Purpose>() -> impl Iterator<Item = (&'static Key, &'static str)> {
    KEYS.iter().filter(|key| P::takes(key)).filter_map(|key| Some((key, key.flag?)))
}

fn flag<P: Purpose>(key: &'static Key, flag: &'static str) -> Arg {
    let heading = match key.split().0 {
        "data" => "Data",
        "model" => "Network",
        "train" => "Training",
        _ => "Run",
    };
    let by_preset = P::TASK.and_then(|task| by_preset(key, task));
    let note = match key.default_value().plain() {
        _ if by_preset.is_some() => format!(" [default: {}]", by_preset.unwrap_or_default()),
        default if default.is_empty() || ["train.epochs", "train.minutes"].contains(&key.name) => String::new(),
        default => format!(" [default: {default}]"),
    };
    let arg = Arg::new(key.name)
        .long(flag)
        .value_name(key.value_name)
        .help_heading(heading)
        .help(format!("{}{note}", key.help))
        .allow_negative_numbers(true)
        .action(ArgAction::Set);
    match key.kind {
        // `--switch` alone turns it on.
        Kind::Switch => arg.num_args(0..=1).require_equals(true).default_missing_value("true"),
        Kind::Choice(words) => arg.hide_possible_values(words.len() > 8),
        _ => arg,
    }
}

impl<P: Purpose> clap::FromArgMatches for ConfigFlags<P> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let flags = keys::<P>().filter_map(|(key, _)| Some((key, matches.get_one::<String>(key.name)?.clone())));
        let request = Request {
            files: matches.get_many("config").into_iter().flatten().cloned().collect(),
            set: matches.get_many("set").into_iter().flatten().cloned().collect(),
            flags: flags.collect(),
            environment: Request::process_environment(),
            run: None,
        };
        Ok(Self { request, purpose: PhantomData })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl<P: Purpose> Args for ConfigFlags<P> {
    fn augment_args(command: clap::Command) -> clap::Command {
        let command = command
            .arg(
                Arg::new("config")
                    .short('c')
                    .long("config")
                    .value_name("FILE")
                    .help_heading("Configuration")
                    .help("TOML file of values (`selfie config init` prints one); may be repeated, later files win")
                    .value_parser(clap::value_parser!(PathBuf))
                    .action(ArgAction::Append),
            )
            .arg(
                Arg::new("set")
                    .long("set")
                    .value_name("SECTION.KEY=VALUE")
                    .help_heading("Configuration")
                    .help("Set any key, such as --set model.depths=1,2,2,1; may be repeated")
                    .action(ArgAction::Append),
            );
        keys::<P>().fold(command, |command, (key, name)| command.arg(flag::<P>(key, name)))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}

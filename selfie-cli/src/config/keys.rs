//! Every configuration key, once: its flag, meaning, range, default, who uses it and whether it may change on resume.

use super::presets;
use super::value::{Kind, Value};

/// A command that is configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// `selfie pretrain`.
    Pretrain,
    /// `selfie finetune`.
    Finetune,
    /// `selfie evaluate`.
    Evaluate,
}

impl Task {
    /// All of them.
    pub const ALL: &'static [Task] = &[Task::Pretrain, Task::Finetune, Task::Evaluate];

    /// The command's name.
    pub const fn name(self) -> &'static str {
        match self {
            Task::Pretrain => "pretrain",
            Task::Finetune => "finetune",
            Task::Evaluate => "evaluate",
        }
    }
}

/// What becomes of a run that is continued with another value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnResume {
    /// Refused: it would be another run.
    Fixed,
    /// Taken over.
    MayChange,
    /// Taken over, and said: the bits that follow differ from those of an uninterrupted run.
    ChangesBits,
}

/// A configuration key.
#[derive(Debug)]
pub struct Key {
    /// `section.key`.
    pub name: &'static str,
    /// The flag, without dashes; none for keys that are set in files or by `--set`.
    pub flag: Option<&'static str>,
    /// What the value is called in help.
    pub value_name: &'static str,
    /// What it takes.
    pub kind: Kind,
    /// Built-in default, as it would be typed.
    pub default: &'static str,
    /// Its meaning in a sentence or two.
    pub help: &'static str,
    /// The commands that use it.
    pub used_by: &'static [Task],
    /// Whether it may change on resume.
    pub on_resume: OnResume,
}

impl Key {
    /// Section and name inside it.
    pub fn split(&self) -> (&'static str, &'static str) {
        self.name.split_once('.').expect("every key has a section, a test checks it")
    }

    /// `SELFIE_SECTION_KEY`.
    pub fn environment(&self) -> String {
        format!("SELFIE_{}", self.name.replace('.', "_").to_uppercase())
    }

    /// The built-in default.
    pub fn default_value(&self) -> Value {
        self.kind.parse(self.default).expect("every default is in range, a test checks it")
    }

    /// The key of that name.
    pub fn find(name: &str) -> Option<&'static Key> {
        KEYS.iter().find(|key| key.name == name)
    }

    /// Whether the value names a file or folder, which has several names.
    pub fn is_path(&self) -> bool {
        ["data.path", "train.init", "train.probe_data", "run.out"].contains(&self.name)
    }

    /// The name nearest to a mistyped one.
    pub fn nearest(name: &str) -> &'static str {
        // A name of a megabyte is like none, and comparing it would take minutes.
        let name = name.char_indices().nth(100).map_or(name, |(end, _)| &name[..end]);
        let last = |name: &str| name.rsplit('.').next().unwrap_or_default().to_string();
        let likeness = |key: &Key| {
            let whole = strsim::jaro_winkler(key.name, name);
            whole.max(strsim::jaro_winkler(&last(key.name), &last(name)) - 0.01)
        };
        let best = KEYS.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
        best.expect("the table of keys is not empty").name
    }
}

const ANY: u64 = i64::MAX as u64;
const TRAINING: &[Task] = &[Task::Pretrain, Task::Finetune];
const PRETRAIN: &[Task] = &[Task::Pretrain];
const FINETUNE: &[Task] = &[Task::Finetune];
use OnResume::{ChangesBits, Fixed, MayChange};

/// The table.
pub const KEYS: &[Key] = &[
    Key {
        name: "data.path",
        flag: Some("data"),
        value_name: "PATH",
        kind: Kind::Text,
        default: "",
        help: "Where the images are: a folder of images, a tar of one, CIFAR-10 or CIFAR-100 (binary or Python edition, \
               archive or folder), downsampled ImageNet (train_data_batch_1 and so on), WebDataset shards (a folder of \
               tars, or `shards/train-{000..146}.tar`), or `synthetic:` for a made-up world. The kind is recognised by \
               content.",
        used_by: Task::ALL,
        on_resume: Fixed,
    },
    Key {
        name: "data.image_size",
        flag: Some("image-size"),
        value_name: "PIXELS",
        kind: Kind::Whole(0, 4096),
        default: "0",
        help: "Side of the square images the network sees; 0 follows the data: 32 for CIFAR and `synthetic:`, 224 for image files.",
        used_by: TRAINING,
        on_resume: Fixed,
    },
    Key {
        name: "data.limit",
        flag: Some("limit"),
        value_name: "N",
        kind: Kind::Whole(0, ANY),
        default: "0",
        help: "Use only N images of each part of the data, always the same ones; 0 uses all.",
        used_by: Task::ALL,
        on_resume: Fixed,
    },
    Key {
        name: "data.labels",
        flag: Some("labels"),
        value_name: "BUDGET",
        kind: Kind::Text,
        default: "all",
        help: "How many labels training may use: all, a percentage such as 5% (5%@3 chooses by seed 3), a number of images per \
               class such as 40, or a file of image names. Balanced over classes; nested for one seed.",
        used_by: FINETUNE,
        on_resume: Fixed,
    },
    Key {
        name: "data.validation",
        flag: Some("validation"),
        value_name: "FRACTION",
        kind: Kind::Number(0.0, 0.9),
        default: "0.0",
        help: "Fraction of the labelled images kept from training and evaluated on the way: choose learning rates by it, so that \
               the test images are touched once, at the end.",
        used_by: FINETUNE,
        on_resume: Fixed,
    },
    Key {
        name: "data.holdout",
        flag: Some("holdout"),
        value_name: "FRACTION",
        kind: Kind::Number(0.0, 0.9),
        default: "0.05",
        help: "Fraction of the images kept from pretraining to measure it by, when the data have no test part of their own.",
        used_by: PRETRAIN,
        on_resume: Fixed,
    },
    Key {
        name: "data.max_bad",
        flag: Some("max-bad"),
        value_name: "FRACTION",
        kind: Kind::Number(0.0, 1.0),
        default: "0.01",
        help: "Fraction of images that may be unreadable: they are skipped and listed in skipped.txt; more end the run.",
        used_by: Task::ALL,
        on_resume: MayChange,
    },
    Key {
        name: "data.workers",
        flag: Some("workers"),
        value_name: "N",
        kind: Kind::Whole(0, 1024),
        default: "1",
        help: "Threads that read and decode images ahead of the network; 0 reads when needed. Does not change results.",
        used_by: Task::ALL,
        on_resume: MayChange,
    },
    Key {
        name: "data.mean",
        flag: None,
        value_name: "R,G,B",
        kind: Kind::Numbers { count: 3, min: 0.0, max: 1.0 },
        default: "0.5,0.5,0.5",
        help: "Subtracted from each channel, after division by 255.",
        used_by: TRAINING,
        on_resume: Fixed,
    },
    Key {
        name: "data.std",
        flag: None,
        value_name: "R,G,B",
        kind: Kind::Numbers { count: 3, min: 1e-3, max: 10.0 },
        default: "0.5,0.5,0.5",
        help: "Each channel is divided by it, after `data.mean` was subtracted.",
        used_by: TRAINING,
        on_resume: Fixed,
    },
    Key {
        name: "model.preset",
        flag: Some("preset"),
        value_name: "NAME",
        kind: Kind::Choice(presets::NAMES),
        default: "small",
        help: "The network: tiny (seconds to try), small (two cores, ten minutes) or resnet50 (the paper's ResNet-50 v2).",
        used_by: TRAINING,
        on_resume: Fixed,
    },
    Key {
        name: "model.stem",
        flag: None,
        value_name: "KIND",
        kind: Kind::Choice(&["auto", "small", "large"]),
        default: "auto",
        help: "First convolution: small is 3x3, large is 7x7 with stride 2 and max pooling; auto is small for images of up to 64 \
               pixels.",
        used_by: TRAINING,
        on_resume: Fixed,
    },
    Key {
        name: "model.stem_width",
        flag: None,
        value_name: "N",
        kind: Kind::Whole(1, 4096),
        default: "16",
        help: "Channels of the stem; the stages have 4, 8, 16 and 32 times as many.",
        used_by: TRAINING,
        on_resume: Fixed,
    },
    Key {
        name: "model.depths",
        flag: None,
        value_name: "A,B,C,D",
        kind: Kind::Wholes { count: 4, min: 1, max: 1000 },
        default: "1,2,2,1",
        help: "Blocks of the four stages; the patch network has the first three.",
        used_by: TRAINING,
        on_resume: Fixed,
    },
    Key {
        name: "model.patch_size",
        flag: None,
        value_name: "PIXELS",
        kind: Kind::Whole(0, 4096),
        default: "0",
        help: "Side of a patch; 0 follows the images: 8 up to 64 pixels, 32 above.",
        used_by: TRAINING,
        on_resume: Fixed,
    },
    Key {
        name: "model.hidden_fraction",
        flag: None,
        value_name: "FRACTION",
        kind: Kind::Above(0.0, 0.99),
        default: "0.25",
        help: "Share of an image's patches that are hidden, and guessed.",
        used_by: PRETRAIN,
        on_resume: Fixed,
    },
    Key {
        name: "model.heads",
        flag: None,
        value_name: "N",
        kind: Kind::Whole(1, 4096),
        default: "8",
        help: "Heads of the attention pooling; must divide 16 * stem_width.",
        used_by: TRAINING,
        on_resume: Fixed,
    },
    Key {
        name: "model.ffn",
        flag: None,
        value_name: "N",
        kind: Kind::Whole(1, 1 << 20),
        default: "160",
        help: "Width inside the blocks of the attention pooling.",
        used_by: TRAINING,
        on_resume: Fixed,
    },
    Key {
        name: "model.pool_blocks",
        flag: None,
        value_name: "N",
        kind: Kind::Whole(1, 1000),
        default: "3",
        help: "Blocks of the attention pooling.",
        used_by: TRAINING,
        on_resume: Fixed,
    },
    Key {
        name: "model.dropout",
        flag: None,
        value_name: "RATE",
        kind: Kind::Number(0.0, 0.99),
        default: "0.1",
        help: "Dropout inside the attention pooling.",
        used_by: TRAINING,
        on_resume: Fixed,
    },
    Key {
        name: "model.positions",
        flag: None,
        value_name: "KIND",
        kind: Kind::Choice(&["auto", "table", "rowcol"]),
        default: "auto",
        help: "Embedding of a place: a table of vectors, or the sum of a row's and a column's; auto is a table up to 16 places.",
        used_by: TRAINING,
        on_resume: Fixed,
    },
    Key {
        name: "model.encoder_positions",
        flag: None,
        value_name: "SWITCH",
        kind: Kind::Switch,
        default: "true",
        help: "Whether the patches that the attention pooling reads carry the embedding of their place.",
        used_by: TRAINING,
        on_resume: Fixed,
    },
    Key {
        name: "model.query",
        flag: None,
        value_name: "KIND",
        kind: Kind::Choice(&["summary", "places"]),
        default: "summary",
        help: "What asks for the hidden patches: one summary of the visible ones (the paper), or a token for each place. Decides how \
               the attention pooling begins, too.",
        used_by: TRAINING,
        on_resume: Fixed,
    },
    Key {
        name: "model.logit_scale",
        flag: None,
        value_name: "SCALE",
        kind: Kind::Text,
        default: "none",
        help: "Factor of the puzzle's logits with negatives of the same image: none (the paper), 1/sqrt(d), or a number.",
        used_by: PRETRAIN,
        on_resume: Fixed,
    },
    Key {
        name: "model.head",
        flag: Some("head"),
        value_name: "KIND",
        kind: Kind::Choice(&["conv", "attention"]),
        default: "conv",
        help: "Last layers of the classifier: conv is the fourth stage; attention is pretraining's attention pooling over the cells of \
               the third stage's map, from its weights where there are some (the paper's variant).",
        used_by: FINETUNE,
        on_resume: Fixed,
    },
    Key {
        name: "model.reuse_patch_norm",
        flag: Some("reuse-patch-norm"),
        value_name: "SWITCH",
        kind: Kind::Switch,
        default: "false",
        help: "Start the first norm of stage 4 from the patch network's last one.",
        used_by: FINETUNE,
        on_resume: Fixed,
    },
    Key {
        name: "objective.negatives",
        flag: Some("negatives"),
        value_name: "KIND",
        kind: Kind::Choice(&["image", "batch"]),
        default: "image",
        help: "What a hidden place's patch is told apart from: image, the other hidden patches of the same image (the paper); batch, \
               those of all images of the batch, too, as unit vectors at a temperature. With --accumulate that is each part of \
               the batch.",
        used_by: PRETRAIN,
        on_resume: Fixed,
    },
    Key {
        name: "objective.temperature",
        flag: Some("temperature"),
        value_name: "T",
        kind: Kind::Above(0.0, 100.0),
        default: "0.1",
        help: "Divides the logits where the negatives are those of the batch.",
        used_by: PRETRAIN,
        on_resume: Fixed,
    },
    Key {
        name: "train.init",
        flag: Some("init"),
        value_name: "RUN|FILE|scratch",
        kind: Kind::Text,
        default: "",
        help: "Where the first weights come from: the folder of a pretraining run, a .safetensors file with timm's names, or \
               `scratch` for random ones (the baseline to compare with).",
        used_by: FINETUNE,
        on_resume: Fixed,
    },
    Key {
        name: "train.steps",
        flag: Some("steps"),
        value_name: "N",
        kind: Kind::Whole(0, 1 << 40),
        default: "0",
        help: "Length of training in steps (batches). Give only one of steps, epochs and minutes.",
        used_by: TRAINING,
        on_resume: MayChange,
    },
    Key {
        name: "train.epochs",
        flag: Some("epochs"),
        value_name: "N",
        kind: Kind::Number(0.0, 1e9),
        default: "0",
        help: "Length of training in passes over the training images, instead of steps.",
        used_by: TRAINING,
        on_resume: MayChange,
    },
    Key {
        name: "train.minutes",
        flag: Some("minutes"),
        value_name: "N",
        kind: Kind::Number(0.0, 1e7),
        default: "0",
        help: "Length of training by the clock, instead of steps; the learning rate falls with the time. Two such runs are not \
               the same bits.",
        used_by: TRAINING,
        on_resume: MayChange,
    },
    Key {
        name: "train.batch",
        flag: Some("batch"),
        value_name: "N",
        kind: Kind::Whole(1, 1 << 20),
        default: "256",
        help: "Images per step.",
        used_by: Task::ALL,
        on_resume: Fixed,
    },
    Key {
        name: "train.accumulate",
        flag: Some("accumulate"),
        value_name: "N",
        kind: Kind::Whole(1, 1 << 16),
        default: "1",
        help: "Cut each batch into N parts and sum their gradients: for batches larger than memory. Batch normalisation then \
               sees the parts.",
        used_by: TRAINING,
        on_resume: Fixed,
    },
    Key {
        name: "train.lr",
        flag: Some("lr"),
        value_name: "RATE",
        kind: Kind::Above(0.0, 100.0),
        default: "0.1",
        help: "Highest learning rate. It rises over the warm-up and falls to 0 as half a cosine. Try 0.01 to 0.4.",
        used_by: TRAINING,
        on_resume: Fixed,
    },
    Key {
        name: "train.warmup",
        flag: Some("warmup"),
        value_name: "STEPS",
        kind: Kind::Whole(0, 1 << 40),
        default: "100",
        help: "Steps over which the learning rate rises; at most a tenth of all steps are taken.",
        used_by: TRAINING,
        on_resume: Fixed,
    },
    Key {
        name: "train.momentum",
        flag: None,
        value_name: "FACTOR",
        kind: Kind::Number(0.0, 0.9999),
        default: "0.9",
        help: "Nesterov momentum.",
        used_by: TRAINING,
        on_resume: Fixed,
    },
    Key {
        name: "train.weight_decay",
        flag: Some("weight-decay"),
        value_name: "FACTOR",
        kind: Kind::Number(0.0, 1.0),
        default: "0.0001",
        help: "L2 penalty on every parameter.",
        used_by: TRAINING,
        on_resume: Fixed,
    },
    Key {
        name: "train.augment",
        flag: None,
        value_name: "SWITCH",
        kind: Kind::Switch,
        default: "true",
        help: "Random crops and flips of the training images.",
        used_by: TRAINING,
        on_resume: Fixed,
    },
    Key {
        name: "train.seed",
        flag: Some("seed"),
        value_name: "N",
        kind: Kind::Whole(0, ANY),
        default: "0",
        help: "Of weights, order, masks, crops and dropout. The same seed gives the same weights, byte for byte.",
        used_by: TRAINING,
        on_resume: Fixed,
    },
    Key {
        name: "train.log_every",
        flag: Some("log-every"),
        value_name: "STEPS",
        kind: Kind::Whole(1, 1 << 40),
        default: "10",
        help: "A line of metrics.jsonl and metrics.csv every N steps.",
        used_by: TRAINING,
        on_resume: MayChange,
    },
    Key {
        name: "train.eval_every",
        flag: Some("eval-every"),
        value_name: "STEPS",
        kind: Kind::Whole(0, 1 << 40),
        default: "500",
        help: "Measure on held-out images every N steps; 0 only at the end.",
        used_by: TRAINING,
        on_resume: MayChange,
    },
    Key {
        name: "train.eval_images",
        flag: Some("eval-images"),
        value_name: "N",
        kind: Kind::Whole(1, ANY),
        default: "2000",
        help: "Held-out images used on the way; at the end all of them are.",
        used_by: TRAINING,
        on_resume: MayChange,
    },
    Key {
        name: "train.probe_every",
        flag: Some("probe-every"),
        value_name: "STEPS",
        kind: Kind::Whole(0, 1 << 40),
        default: "0",
        help: "Classify labelled images by their nearest neighbours among the features every N steps, and at the end, as \
               `selfie probe knn` does; 0 never. Does not change training.",
        used_by: PRETRAIN,
        on_resume: MayChange,
    },
    Key {
        name: "train.probe_data",
        flag: Some("probe-data"),
        value_name: "PATH",
        kind: Kind::Text,
        default: "",
        help: "The labelled images of --probe-every, with a test part, as --data takes them; those of --data if not given.",
        used_by: PRETRAIN,
        on_resume: MayChange,
    },
    Key {
        name: "train.probe_images",
        flag: Some("probe-images"),
        value_name: "N",
        kind: Kind::Whole(1, ANY),
        default: "5000",
        help: "Images of each part that the probe uses, always the same ones.",
        used_by: PRETRAIN,
        on_resume: MayChange,
    },
    Key {
        name: "train.save_every",
        flag: Some("save-every"),
        value_name: "STEPS",
        kind: Kind::Whole(0, 1 << 40),
        default: "500",
        help: "Save a checkpoint every N steps; 0 only at the end and on a signal.",
        used_by: TRAINING,
        on_resume: MayChange,
    },
    Key {
        name: "train.keep",
        flag: Some("keep"),
        value_name: "N",
        kind: Kind::Whole(1, 1 << 20),
        default: "2",
        help: "Checkpoints kept: the newest N, and the one that did best on held-out images.",
        used_by: TRAINING,
        on_resume: MayChange,
    },
    Key {
        name: "run.out",
        flag: Some("out"),
        value_name: "FOLDER",
        kind: Kind::Text,
        default: "",
        help: "The run folder: everything is written there. The same folder continues an interrupted run.",
        used_by: TRAINING,
        on_resume: MayChange,
    },
    Key {
        name: "run.device",
        flag: Some("device"),
        value_name: "DEVICE",
        kind: Kind::Device,
        default: "auto",
        help: "Where to compute: auto, cpu, cuda or cuda:NUMBER. auto takes the first GPU if it can be used, else the CPU, and says so.",
        used_by: Task::ALL,
        on_resume: ChangesBits,
    },
    Key {
        name: "run.precision",
        flag: Some("precision"),
        value_name: "TYPE",
        kind: Kind::Choice(&["auto", "f32", "bf16"]),
        default: "auto",
        help: "Type of activations: auto, f32 or bf16. Weights and sums stay f32. auto is bf16 on a GPU, f32 on the CPU.",
        used_by: Task::ALL,
        on_resume: ChangesBits,
    },
    Key {
        name: "run.threads",
        flag: Some("threads"),
        value_name: "N",
        kind: Kind::Whole(0, 1024),
        default: "0",
        help: "Threads that compute; 0 takes one per core that this process may use (a container's quota counts). Does not change results.",
        used_by: Task::ALL,
        on_resume: MayChange,
    },
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_table_is_consistent() {
        let (mut names, mut flags) = (HashSet::new(), HashSet::new());
        for key in KEYS {
            let (section, name) = key.split();
            assert!(["data", "model", "objective", "train", "run"].contains(&section), "{}", key.name);
            assert!(names.insert(key.name), "{} twice", key.name);
            assert!(key.kind.parse(key.default).is_some(), "{} = {}", key.name, key.default);
            assert!(!key.used_by.is_empty(), "{}", key.name);
            if let Some(flag) = key.flag {
                assert!(flags.insert(flag), "--{flag} twice");
                assert!(key.name == "data.path" || flag.replace('-', "_") == name, "--{flag} is not {}", key.name);
            }
        }
    }

    #[test]
    fn the_nearest_name_is_named() {
        for (typo, meant) in [
            ("train.lrr", "train.lr"),
            ("train.weight-decay", "train.weight_decay"),
            ("lr", "train.lr"),
            ("data.worker", "data.workers"),
            ("tarin.seed", "train.seed"),
        ] {
            assert_eq!(Key::nearest(typo), meant);
        }
    }
}

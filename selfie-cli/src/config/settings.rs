//! The resolved configuration as a struct; the meaning of each field is the help of its key.

use std::path::PathBuf;

use selfie_model::{Head, LogitScale, ModelConfig, NamedScale, Negatives, Positions, Preset, Query, Stem, TrainConfig};
use serde::{Deserialize, Serialize};

use crate::exit::Problem;

/// All of it.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// `[data]`
    pub data: Data,
    /// `[model]`
    pub model: Model,
    /// `[objective]`
    pub objective: Objective,
    /// `[train]`
    pub train: Train,
    /// `[run]`
    pub run: Run,
}

/// `[data]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    pub path: PathBuf,
    pub image_size: usize,
    pub limit: usize,
    pub labels: String,
    pub validation: f64,
    pub holdout: f64,
    pub max_bad: f64,
    pub workers: usize,
    pub mean: [f64; 3],
    pub std: [f64; 3],
}

/// `[model]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    pub preset: String,
    pub stem: Stem,
    pub stem_width: usize,
    pub depths: [usize; 4],
    pub patch_size: usize,
    pub hidden_fraction: f64,
    pub heads: usize,
    pub ffn: usize,
    pub pool_blocks: usize,
    pub dropout: f64,
    pub positions: Positions,
    pub encoder_positions: bool,
    pub query: Query,
    pub logit_scale: String,
    pub head: Head,
    pub reuse_patch_norm: bool,
}

/// `[objective]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Objective {
    pub negatives: Negatives,
    pub temperature: f64,
}

/// `[train]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Train {
    pub init: String,
    pub steps: u64,
    pub epochs: f64,
    pub minutes: f64,
    pub batch: usize,
    pub accumulate: usize,
    pub lr: f64,
    pub warmup: u64,
    pub momentum: f64,
    pub weight_decay: f64,
    pub augment: bool,
    pub seed: u64,
    pub log_every: u64,
    pub eval_every: u64,
    pub eval_images: usize,
    pub probe_every: u64,
    pub probe_data: PathBuf,
    pub probe_images: usize,
    pub save_every: u64,
    pub keep: usize,
}

/// `[run]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    pub out: PathBuf,
    pub device: String,
    pub precision: String,
    pub threads: usize,
}

impl Settings {
    /// The network for images of `image_size` pixels a side.
    ///
    /// # Errors
    /// A logit scale that is none: usage.
    pub fn network(&self, image_size: usize) -> anyhow::Result<ModelConfig> {
        let model = &self.model;
        let logit_scale = match model.logit_scale.as_str() {
            "none" => LogitScale::Named(NamedScale::None),
            "1/sqrt(d)" => LogitScale::Named(NamedScale::InverseSqrt),
            other => match other.parse() {
                Ok(factor) if factor > 0.0 && f64::is_finite(factor) => LogitScale::Factor(factor),
                _ => {
                    return Err(Problem::usage(format!(
                        "model.logit_scale = {other}: expected none, 1/sqrt(d) or a number above 0"
                    )));
                }
            },
        };
        Ok(ModelConfig {
            image_size,
            patch_size: (model.patch_size > 0).then_some(model.patch_size),
            stem: model.stem,
            stem_width: model.stem_width,
            depths: model.depths,
            heads: model.heads,
            ffn: model.ffn,
            pool_blocks: model.pool_blocks,
            dropout: model.dropout,
            hidden_fraction: model.hidden_fraction,
            positions: model.positions,
            encoder_positions: model.encoder_positions,
            query: model.query,
            logit_scale,
            negatives: self.objective.negatives,
            temperature: self.objective.temperature,
            head: model.head,
            mean: self.data.mean,
            std: self.data.std,
            // The rest is PyTorch's batch normalisation, the same in all presets.
            ..ModelConfig::preset(Preset::Resnet50, image_size)
        })
    }

    /// How to train.
    pub fn training(&self) -> TrainConfig {
        let train = &self.train;
        TrainConfig {
            steps: (train.steps > 0).then_some(train.steps),
            epochs: (train.epochs > 0.0).then_some(train.epochs),
            minutes: (train.minutes > 0.0).then_some(train.minutes),
            batch: train.batch,
            accumulate: train.accumulate,
            lr: train.lr,
            warmup: train.warmup,
            momentum: train.momentum,
            weight_decay: train.weight_decay,
            augment: train.augment,
            seed: train.seed,
            log_every: train.log_every,
            save_every: train.save_every,
            eval_every: train.eval_every,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::keys::{KEYS, Task};
    use super::super::{Request, Resolved};
    use super::Settings;

    fn settings(preset: &str) -> Settings {
        let set = vec![format!("model.preset={preset}")];
        Resolved::new(Task::Pretrain, &Request { set, ..Request::default() }).expect("valid").settings()
    }

    #[test]
    fn every_key_has_a_field_and_every_field_a_key() {
        let json = serde_json::to_value(settings("tiny")).expect("plain values");
        let fields: usize =
            json.as_object().expect("sections").values().filter_map(|section| Some(section.as_object()?.len())).sum();
        assert_eq!(fields, KEYS.len());
        for key in KEYS {
            let (section, name) = key.split();
            assert!(json[section].get(name).is_some(), "{}", key.name);
        }
    }

    /// The presets of the library are reached through keys alone: none of their numbers is lost on the way.
    #[test]
    fn presets_are_those_of_the_library() {
        use selfie_model::{ModelConfig, Preset};
        for (name, preset) in [("tiny", Preset::Tiny), ("small", Preset::Small), ("resnet50", Preset::Resnet50)] {
            let settings = settings(name);
            for image_size in [32, 224] {
                assert_eq!(settings.network(image_size).expect("valid"), ModelConfig::preset(preset, image_size));
            }
            settings.training().check().expect("presets are valid");
        }
        // The paper's training is the library's default.
        let paper = selfie_model::TrainConfig { steps: Some(selfie_model::DEFAULT_STEPS), ..Default::default() };
        let ours = settings("resnet50").training();
        assert_eq!((ours.steps, ours.batch, ours.lr, ours.warmup), (paper.steps, paper.batch, paper.lr, paper.warmup));
        assert_eq!(
            (ours.momentum, ours.weight_decay, ours.augment),
            (paper.momentum, paper.weight_decay, paper.augment)
        );
    }
}

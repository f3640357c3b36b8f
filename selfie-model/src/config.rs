//! What a network is made of: every number of the method that is a choice, with presets.

use crate::{Error, Result};
use selfie_kernels::attention::MAX_TOKENS;
use selfie_kernels::tokens::{PatchDims, PositionKind, QueryKind};
use serde::{Deserialize, Serialize};

/// The network's shape. `Default` is the paper's for 32px images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// Side of an image in pixels, after cropping.
    pub image_size: usize,
    /// Side of a patch in pixels; none: 8 for images of at most 64 pixels, 32 for larger ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patch_size: Option<usize>,
    /// The first convolution.
    pub stem: Stem,
    /// Channels of the stem; stage i has `4 * stem_width * 2^i`.
    pub stem_width: usize,
    /// Blocks of the four stages. The patch network has the first three.
    pub depths: [usize; 4],
    /// Heads of the attention pooling; must divide its width, the channels of the third stage.
    pub heads: usize,
    /// Intermediate size of the attention pooling's blocks.
    pub ffn: usize,
    /// Blocks of the attention pooling.
    pub pool_blocks: usize,
    /// Dropout rate inside the attention pooling, in [0, 1).
    pub dropout: f64,
    /// Share of an image's patches that are hidden; the count is rounded to nearest.
    pub hidden_fraction: f64,
    /// How the embedding of a place is made.
    pub positions: Positions,
    /// Whether visible patches carry their place's embedding.
    pub encoder_positions: bool,
    /// What asks for the hidden patches.
    pub query: Query,
    /// Factor of the objective's logits, with negatives of the same image.
    pub logit_scale: LogitScale,
    /// What a hidden place's patch is told apart from.
    pub negatives: Negatives,
    /// Divides the logits with negatives of the whole batch.
    pub temperature: f64,
    /// The last layers of a classifier.
    pub head: Head,
    /// Added to the variance by batch normalisation.
    pub bn_eps: f64,
    /// Weight of a batch in the running statistics.
    pub bn_momentum: f64,
    /// Subtracted from the pixels, after division by 255; red, green, blue.
    pub mean: [f64; 3],
    /// Divides the pixels after that.
    pub std: [f64; 3],
}

/// The first convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stem {
    /// Small for images of at most 64 pixels, large for larger ones.
    Auto,
    /// 3x3, stride 1, no pooling.
    Small,
    /// 7x7, stride 2, then 3x3 max pooling with stride 2.
    Large,
}

/// How the embedding of a place is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Positions {
    /// A table up to 16 places, row and column vectors above.
    Auto,
    /// A vector for each place.
    Table,
    /// The sum of a row's and a column's vector.
    RowCol,
}

/// What asks for the hidden patches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Query {
    /// The paper: `v_l = u + e(l)`, with one summary u of the visible patches. As `v_l . h_j = u . h_j + e(l) . h_j`, what
    /// is visible cannot tell one hidden place from another: patches are told apart by where such patches tend to lie.
    Summary,
    /// A token for each hidden place, `u0 + e(l)`, as BERT's masks: `v_l = u_l + e(l)`, so that what is visible around
    /// a place counts.
    Places,
}

/// What a hidden place's patch is told apart from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Negatives {
    /// The other hidden patches of the same image: the paper.
    Image,
    /// Those of all images that go through the network together (a micro-batch), too; vectors are brought to unit length and
    /// logits divided by a temperature, as in SimCLR (Chen et al. 2020, arXiv 2002.05709).
    Batch,
}

/// The last layers of a classifier, below its classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Head {
    /// The fourth stage, and the average over its map.
    Conv,
    /// The attention pooling of pretraining, over the cells of the third stage's map: nothing is hidden, and u0 sums up all
    /// of them. Source: Trinh, Luong, Le 2019 (arXiv 1906.02940).
    Attention,
}

/// Factor of the objective's logits.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected \"none\", \"1/sqrt(d)\" or a number")]
pub enum LogitScale {
    /// By name.
    Named(NamedScale),
    /// The number itself.
    Factor(f64),
}

/// The scales that have a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NamedScale {
    /// 1: the paper.
    #[serde(rename = "none")]
    None,
    /// `1 / sqrt(d)`, d the width of a patch's vector.
    #[serde(rename = "1/sqrt(d)")]
    InverseSqrt,
}

/// The named networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// For the demonstration and for tests: one thin block a stage.
    Tiny,
    /// For two cores and ten minutes.
    Small,
    /// The paper's.
    Resnet50,
}

/// The pretext task's numbers, resolved and checked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Pretext {
    /// Side of a patch in pixels.
    pub(crate) patch: usize,
    /// Patches, for a batch.
    pub(crate) dims: PatchDims,
    /// Factor of the logits, with negatives of the same image.
    pub(crate) logit_scale: f64,
    /// With negatives of the whole batch.
    pub(crate) temperature: Option<f64>,
}

/// Images up to this side get the 32px geometry.
const SMALL_IMAGE: usize = 64;

impl Default for ModelConfig {
    fn default() -> Self {
        Self::preset(Preset::Resnet50, 32)
    }
}

impl ModelConfig {
    /// A named network for images of `image_size` pixels a side.
    pub fn preset(preset: Preset, image_size: usize) -> Self {
        let (stem_width, depths) = match preset {
            Preset::Tiny => (8, [1, 1, 1, 1]),
            Preset::Small => (16, [1, 2, 2, 1]),
            Preset::Resnet50 => (64, [3, 4, 6, 3]),
        };
        // A token for each place learns within minutes in one block without dropout; three were behind after 100 steps.
        let (query, pool_blocks, dropout) = match preset {
            Preset::Tiny | Preset::Small => (Query::Places, 1, 0.0),
            Preset::Resnet50 => (Query::Summary, 3, 0.1),
        };
        Self {
            image_size,
            patch_size: None,
            stem: Stem::Auto,
            stem_width,
            depths,
            // Heads of size 32, and the intermediate size in the paper's proportion (32 heads and 640 at full width).
            heads: stem_width / 2,
            ffn: 10 * stem_width,
            pool_blocks,
            dropout,
            hidden_fraction: 0.25,
            positions: Positions::Auto,
            encoder_positions: true,
            query,
            logit_scale: LogitScale::Named(NamedScale::None),
            negatives: Negatives::Image,
            temperature: 0.1,
            head: Head::Conv,
            bn_eps: 1e-5,
            bn_momentum: 0.1,
            mean: [0.5; 3],
            std: [0.5; 3],
        }
    }

    /// Channels of a stage, counted from 0.
    pub fn channels(&self, stage: usize) -> usize {
        (4 * self.stem_width) << stage
    }

    /// Width of a patch's vector and of the attention pooling.
    pub fn pool_width(&self) -> usize {
        self.channels(2)
    }

    /// Stages of a classifier's backbone.
    pub fn stages(&self) -> usize {
        match self.head {
            Head::Conv => 4,
            Head::Attention => 3,
        }
    }

    /// Width of a classifier's pooled features.
    pub fn feature_width(&self) -> usize {
        self.channels(self.stages() - 1)
    }

    /// Side of a patch in pixels.
    pub fn patch_side(&self) -> usize {
        self.patch_size.unwrap_or(if self.image_size <= SMALL_IMAGE { 8 } else { 32 })
    }

    /// Whether the stem is the large one.
    pub fn has_large_stem(&self) -> bool {
        match self.stem {
            Stem::Auto => self.image_size > SMALL_IMAGE,
            Stem::Small => false,
            Stem::Large => true,
        }
    }

    /// Patches along a side of an image, once [`ModelConfig::check_pretext`] has passed.
    pub fn grid(&self) -> usize {
        self.image_size.checked_div(self.patch_side()).unwrap_or(0)
    }

    /// Patches of an image.
    pub fn patches(&self) -> usize {
        self.grid().pow(2)
    }

    /// Hidden patches of an image.
    pub fn hidden_patches(&self) -> usize {
        (self.hidden_fraction * self.patches() as f64).round() as usize
    }

    /// Checks what every network needs.
    ///
    /// # Errors
    /// [`Error::Usage`] names the key.
    pub fn check(&self) -> Result<()> {
        require((1..=1 << 14).contains(&self.image_size), "image_size", self.image_size, || "1 to 16384".into())?;
        require((1..=1 << 12).contains(&self.stem_width), "stem_width", self.stem_width, || "1 to 4096".into())?;
        require(self.depths.iter().all(|d| (1..=1000).contains(d)), "depths", self.depths, || {
            "1 to 1000 blocks in each stage".into()
        })?;
        require(self.heads > 0, "heads", self.heads, || "at least 1".into())?;
        require((1..=1 << 20).contains(&self.ffn), "ffn", self.ffn, || "1 to 1048576".into())?;
        require(self.bn_eps > 0.0 && self.bn_eps.is_finite(), "bn_eps", self.bn_eps, || "a positive number".into())?;
        require((0.0..=1.0).contains(&self.bn_momentum), "bn_momentum", self.bn_momentum, || "0 to 1".into())?;
        require(self.mean.iter().all(|m| m.is_finite()), "mean", self.mean, || "three numbers".into())?;
        require(self.std.iter().all(|&s| s > 0.0 && s.is_finite()), "std", self.std, || "three positive numbers".into())
    }

    /// Checks what pretraining needs beside that.
    ///
    /// # Errors
    /// [`Error::Usage`] names the key.
    pub fn check_pretext(&self) -> Result<()> {
        self.pretext(1).map(|_| ())
    }

    /// The places of an image, all of them visible, for a batch of `b`: what the attention pooling reads as a head.
    pub(crate) fn places(&self, b: usize) -> Result<PatchDims> {
        self.check()?;
        let (image, patch, width) = (self.image_size, self.patch_side(), self.pool_width());
        require(patch > 0 && image.is_multiple_of(patch), "patch_size", patch, || {
            format!("a divisor of the image size {image}")
        })?;
        require(width.is_multiple_of(self.heads), "heads", self.heads, || {
            format!("a divisor of the pooling width {width} (16 * stem_width)")
        })?;
        require((1..=1000).contains(&self.pool_blocks), "pool_blocks", self.pool_blocks, || "1 to 1000".into())?;
        require((0.0..1.0).contains(&self.dropout), "dropout", self.dropout, || "0 up to, not including, 1".into())?;
        let n = self.patches();
        require(n < MAX_TOKENS, "patch_size", patch, || {
            format!("at most {} patches of an image, not {n}", MAX_TOKENS - 1)
        })?;
        let positions = match self.positions {
            Positions::Auto if n <= 16 => PositionKind::Table,
            Positions::Table => PositionKind::Table,
            Positions::Auto | Positions::RowCol => PositionKind::RowCol,
        };
        Ok(PatchDims { b, grid: image / patch, hidden: 0, d: width, positions, queries: QueryKind::Summary })
    }

    /// The pretext task for a batch of `b` images.
    pub(crate) fn pretext(&self, b: usize) -> Result<Pretext> {
        let places = self.places(b)?;
        let (n, hidden) = (places.n(), self.hidden_patches());
        require((1..n).contains(&hidden), "hidden_fraction", self.hidden_fraction, || {
            format!("at least one hidden and one visible of the {n} patches, not {hidden} hidden")
        })?;
        let logit_scale = match self.logit_scale {
            LogitScale::Named(NamedScale::None) => 1.0,
            LogitScale::Named(NamedScale::InverseSqrt) => 1.0 / (places.d as f64).sqrt(),
            LogitScale::Factor(factor) => factor,
        };
        require(logit_scale > 0.0 && logit_scale.is_finite(), "logit_scale", logit_scale, || {
            "\"none\", \"1/sqrt(d)\" or a positive number".into()
        })?;
        let temperature = (self.negatives == Negatives::Batch).then_some(self.temperature);
        require(temperature.is_none() || logit_scale == 1.0, "logit_scale", logit_scale, || {
            "none where objective.negatives = batch: objective.temperature divides the logits there".into()
        })?;
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return Err(Error::usage("objective.temperature", self.temperature, "a positive number"));
        }
        let queries = match self.query {
            Query::Summary => QueryKind::Summary,
            Query::Places => QueryKind::Places,
        };
        require(self.encoder_positions || self.query == Query::Summary, "query", "places", || {
            "summary, or model.encoder_positions = true: a place that asks must know where it is".into()
        })?;
        let dims = PatchDims { hidden, queries, ..places };
        Ok(Pretext { patch: self.patch_side(), dims, logit_scale, temperature })
    }
}

/// Refuses a value unless `ok`.
fn require(ok: bool, key: &str, given: impl std::fmt::Debug, expected: impl FnOnce() -> String) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::usage(&format!("model.{key}"), format!("{given:?}"), expected())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_configurations_name_the_key() {
        type Change = fn(&mut ModelConfig);
        let cases: [(&str, Change); 18] = [
            ("image_size", |c| c.image_size = 0),
            ("patch_size", |c| c.image_size = 36),
            ("patch_size", |c| c.patch_size = Some(0)),
            ("patch_size", |c| c.patch_size = Some(1)),
            ("stem_width", |c| c.stem_width = 0),
            ("depths", |c| c.depths[2] = 0),
            ("heads", |c| c.heads = 3),
            ("ffn", |c| c.ffn = 0),
            ("ffn", |c| c.ffn = usize::MAX),
            ("pool_blocks", |c| c.pool_blocks = 0),
            ("pool_blocks", |c| c.pool_blocks = usize::MAX),
            ("dropout", |c| c.dropout = 1.0),
            ("hidden_fraction", |c| c.hidden_fraction = 0.02),
            ("hidden_fraction", |c| c.hidden_fraction = 1.0),
            ("logit_scale", |c| c.logit_scale = LogitScale::Factor(f64::NAN)),
            ("logit_scale", |c| {
                (c.negatives, c.logit_scale) = (Negatives::Batch, LogitScale::Named(NamedScale::InverseSqrt));
            }),
            ("std", |c| c.std[1] = 0.0),
            ("query", |c| (c.query, c.encoder_positions) = (Query::Places, false)),
        ];
        for (key, change) in cases {
            let mut config = ModelConfig::preset(Preset::Small, 32);
            config.check_pretext().expect("the preset is sound");
            change(&mut config);
            let message = config.check_pretext().expect_err(key).to_string();
            assert!(message.contains(&format!("model.{key} = ")), "{message}");
        }
        let frozen = ModelConfig { temperature: 0.0, ..ModelConfig::preset(Preset::Small, 32) };
        assert!(frozen.check_pretext().expect_err("zero").to_string().contains("objective.temperature = 0"));
    }

    #[test]
    fn presets_are_the_methods() {
        let small = ModelConfig::preset(Preset::Small, 32);
        assert_eq!((small.pool_width(), small.heads, small.ffn), (256, 8, 160));
        assert_eq!((small.query, small.pool_blocks, small.dropout), (Query::Places, 1, 0.0));
        let paper = ModelConfig::preset(Preset::Resnet50, 224);
        assert_eq!((paper.pool_width(), paper.heads, paper.ffn, paper.feature_width()), (1024, 32, 640, 2048));
        assert_eq!((paper.patch_side(), paper.has_large_stem()), (32, true));
        assert_eq!((paper.query, paper.pool_blocks, paper.dropout), (Query::Summary, 3, 0.1));
        let attention = ModelConfig { head: Head::Attention, ..paper };
        assert_eq!((attention.stages(), attention.feature_width()), (3, 1024));
    }

    #[test]
    fn travels_through_json_and_refuses_unknown_keys() {
        for scale in
            [LogitScale::Named(NamedScale::InverseSqrt), LogitScale::Named(NamedScale::None), LogitScale::Factor(0.5)]
        {
            let config = ModelConfig { logit_scale: scale, patch_size: Some(4), ..ModelConfig::default() };
            let text = serde_json::to_string(&config).expect("serialises");
            assert_eq!(serde_json::from_str::<ModelConfig>(&text).expect("round trip"), config);
        }
        let error = serde_json::from_str::<ModelConfig>(r#"{"depth": [1, 1, 1, 1]}"#).expect_err("unknown").to_string();
        assert!(error.contains("unknown field `depth`"), "{error}");
        let error = serde_json::from_str::<ModelConfig>(r#"{"logit_scale": "half"}"#).expect_err("unknown").to_string();
        assert!(error.contains("1/sqrt(d)"), "{error}");
        assert_eq!(serde_json::from_str::<ModelConfig>("{}").expect("all defaults"), ModelConfig::default());
    }
}

//! What weights are of, as their file and the `config.json` beside it tell: enough to build the network, for files of
//! runs, of timm, and of [`crate::Export`].

use crate::config::{Head, ModelConfig, Preset, Stem};
use crate::encoder::EncoderLayers;
use crate::error::{Error, Result, reading};
use crate::tensor_file::TensorFile;
use crate::weights::{
    About, CHECKPOINT_FILE, Card, HEAD, MODEL_FILE, NO_RESNET, POOL, Place, Resize, find_weights, stage, stages_of,
};
use safetensors::tensor::SafeTensors;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Key of a safetensors file's metadata that has what `config.json` has.
pub(crate) const CONFIG_KEY: &str = "config";

/// The largest side of images that is believed.
const MAX_IMAGE_SIZE: u64 = 4096;

/// What the weights in a file are of.
#[derive(Debug, Clone, PartialEq)]
pub struct Description {
    /// The network's shape, the images that it takes, and how their pixels are normalised. What only the pretext task has
    /// is a preset's.
    pub model: ModelConfig,
    /// Its layers, without an attention pooling, and without a classifier that stands behind one.
    pub layers: EncoderLayers,
    /// Names of the classes, in their order; none where the file does not tell, or has no classifier.
    pub classes: Vec<String>,
    /// Classes of a classifier behind an attention pooling.
    pub pooled_classes: usize,
    /// How an image gets its size.
    pub resize: Resize,
    /// Where size and normalisation of the images come from; none where nothing tells, and they are assumed.
    pub told_by: Option<PathBuf>,
}

impl Description {
    /// Of the weight file that a path means, as [`find_weights`] says.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::Malformed`] for tensors of another network, and for a description that is none.
    pub fn of(source: &Path) -> Result<Self> {
        Self::with_tensors(source).map(|(description, _)| description)
    }

    /// The same, with the tensors.
    pub(crate) fn with_tensors(source: &Path) -> Result<(Self, TensorFile<f32>)> {
        let path = find_weights(source)?;
        let bytes = std::fs::read(&path).map_err(reading(&path))?;
        let file = TensorFile::parse(&path, &bytes)?;
        let (told_by, config) =
            config_of(&path, &bytes)?.map_or((None, Value::Null), |(from, config)| (Some(from), config));
        let (model, layers) = network(&path, &file)?;
        let from = told_by.as_deref().unwrap_or(&path);
        let resize = Resize::ours(&model);
        let mut description = Self { resize, model, layers, classes: Vec::new(), pooled_classes: 0, told_by: None };
        description.take(from, &config)?;
        description.told_by = told_by;
        Ok((description, file))
    }

    /// Takes over what `config`, in the file `path`, says of images and classes.
    pub(crate) fn take(&mut self, path: &Path, config: &Value) -> Result<()> {
        let wrong = |key: &str, expected: &str, found: &Value| {
            let advice = "correct it, or remove the file, and what is usual is assumed";
            Error::malformed(path, format!("{expected} in `{key}`"), shortened(found), advice)
        };
        let about = |key: &str| config.pointer(&format!("/pretrained_cfg/{key}")).filter(|value| !value.is_null());
        if let Some(value) = about("input_size/1") {
            let size = value.as_u64().filter(|size| (1..=MAX_IMAGE_SIZE).contains(size));
            let expected = format!("1 to {MAX_IMAGE_SIZE} pixels");
            self.model.image_size = size.ok_or_else(|| wrong("input_size", &expected, value))? as usize;
        }
        for (key, place) in [("mean", &mut self.model.mean), ("std", &mut self.model.std)] {
            if let Some(value) = about(key) {
                let numbers = value.as_array().map(|list| list.iter().filter_map(Value::as_f64).collect::<Vec<_>>());
                let three = numbers.and_then(|numbers| numbers.try_into().ok());
                *place = three.ok_or_else(|| wrong(key, "three numbers", value))?;
            }
        }
        if let Some(value) = about("interpolation") {
            let name = value.as_str().ok_or_else(|| wrong("interpolation", "a name", value))?;
            self.resize.interpolation = name.into();
        }
        if let Some(value) = about("crop_pct") {
            let part = value.as_f64().filter(|part| *part > 0.0 && *part <= 1.0);
            self.resize.crop = part.ok_or_else(|| wrong("crop_pct", "a number above 0, up to 1", value))?;
        }
        if let Some(value) = config.get("label_names").filter(|value| !value.is_null()) {
            let names = value.as_array().map(|list| list.iter().filter_map(Value::as_str).map(String::from).collect());
            let names: Option<Vec<String>> = names;
            let expected = format!("{} names of classes", self.layers.classes);
            let is_pooled = self.layers.classes == 0;
            let names = names.filter(|names| is_pooled || names.len() == self.layers.classes);
            let names = names.ok_or_else(|| wrong("label_names", &expected, value))?;
            (self.classes, self.pooled_classes) = if is_pooled { (Vec::new(), names.len()) } else { (names, 0) };
        }
        let advice = "correct it, or remove the file, and what is usual is assumed";
        self.model.check().map_err(|error| Error::malformed(path, "possible images", error.to_string(), advice))
    }

    fn about(&self) -> About<'_> {
        About { model: &self.model, classes: &self.classes }
    }

    pub(crate) fn card(&self) -> Card<'_> {
        Card::of_encoder(self.about(), self.layers, self.resize.clone())
    }

    /// The lines of Python that load the weights that `source` means, of which this is the description.
    ///
    /// # Errors
    /// As [`find_weights`].
    pub fn loading(&self, source: &Path) -> Result<String> {
        let file = find_weights(source)?;
        let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let is_timms = file.file_name().is_some_and(|name| name == MODEL_FILE) && folder.join("config.json").is_file();
        let (folder, file) = (folder.display().to_string(), file.display().to_string());
        Ok(self.card().loading(if is_timms { Place::Folder(&folder) } else { Place::File(&file) }))
    }

    /// What the network takes, in words.
    pub fn input(&self) -> String {
        self.card().input()
    }
}

/// What `config.json` says, and where that was found: beside the weights, in them, or, for a checkpoint's, beside the
/// weights of its run.
fn config_of(path: &Path, bytes: &[u8]) -> Result<Option<(PathBuf, Value)>> {
    let beside = path.with_file_name("config.json");
    let of_run = path.ancestors().nth(3).map(|run| run.join("weights/config.json"));
    let of_run = of_run.filter(|_| path.file_name().is_some_and(|name| name == CHECKPOINT_FILE));
    let inside = SafeTensors::read_metadata(bytes).ok().and_then(|(_, header)| header.metadata().clone());
    let inside = inside.and_then(|metadata| metadata.get(CONFIG_KEY).cloned());
    let (from, text) = if let Some(text) = inside {
        (path.to_path_buf(), text.into_bytes())
    } else if let Some(from) = [Some(beside), of_run].into_iter().flatten().find(|from| from.is_file()) {
        let text = std::fs::read(&from).map_err(reading(&from))?;
        (from, text)
    } else {
        return Ok(None);
    };
    match serde_json::from_slice(&text) {
        Ok(config) => Ok(Some((from, config))),
        Err(error) => {
            let found = format!("text that is none ({error})");
            Err(Error::malformed(&from, "the description of the weights, as JSON", found, "restore it, or remove it"))
        }
    }
}

/// The network whose tensors a file has, by their names and shapes.
fn network(path: &Path, file: &TensorFile<f32>) -> Result<(ModelConfig, EncoderLayers)> {
    let (width, side) = match file.shape("stem.conv.weight") {
        Some(&[width, 3, 7, 7]) => (width, 7),
        Some(&[width, 3, 3, 3]) => (width, 3),
        other => {
            let found = other.map_or("no such tensor".into(), |shape| format!("{shape:?}"));
            return Err(Error::malformed(path, "`stem.conv.weight` of [n, 3, 7, 7] or [n, 3, 3, 3]", found, NO_RESNET));
        }
    };
    let stages = stages_of(file)?;
    let mut depths = [1; 4];
    for (name, _) in file.shapes() {
        let block = name.split('.').nth(3).and_then(|block| block.parse::<usize>().ok());
        if let (Some(stage), Some(block)) = (stage(name), block) {
            depths[stage] = depths[stage].max(block.saturating_add(1));
        }
    }
    let (stem, image_size) = if side == 7 { (Stem::Large, 224) } else { (Stem::Small, 32) };
    let model = ModelConfig { stem, stem_width: width, depths, ..ModelConfig::preset(Preset::Resnet50, image_size) };
    model.check().map_err(|error| Error::malformed(path, "a possible network", error.to_string(), NO_RESNET))?;
    // A checkpoint has a classifier behind its pooling in the same file.
    let has_pool = file.shapes().any(|(name, _)| name.starts_with(POOL));
    let classes = file.shape(HEAD).filter(|_| !has_pool).and_then(|shape| shape.first()).map_or(0, |&classes| classes);
    Ok((model, EncoderLayers { stages, head: Head::Conv, classes }))
}

/// A value as a message quotes it.
fn shortened(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 100 { text } else { text.chars().take(99).chain(['…']).collect() }
}

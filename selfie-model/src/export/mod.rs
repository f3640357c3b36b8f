//! Weights on their way out: the network that a file holds, as timm's folder, as one safetensors file, or as ONNX.

mod check;

pub use check::Agreement;
pub(crate) use check::{Outputs, normalised};

use crate::config::ModelConfig;
use crate::description::{CONFIG_KEY, Description};
use crate::durable::{write_file, write_folder};
use crate::encoder::backbone_and_classifier;
use crate::error::{Error, Result};
use crate::layers::Tables;
use crate::onnx;
use crate::parameters::{Entry, Table};
use crate::tensor_file::{serialize_items, stored};
use crate::weights::{MODEL_FILE, POOL, Place, find_weights, refuse_not_finite};
use std::path::{Path, PathBuf};

/// What an [`Export`] is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A folder that timm loads: `model.safetensors`, `config.json`, and a `README.md` with the lines that load it.
    Timm,
    /// ONNX of opset 17.
    Onnx,
    /// One safetensors file, with what `config.json` says in its metadata.
    Safetensors,
}

impl Format {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Format::Timm => "timm",
            Format::Onnx => "onnx",
            Format::Safetensors => "safetensors",
        }
    }
}

/// A network without objective, with its weights: stem, stages, norm, and the head of a classifier.
#[derive(Debug)]
pub struct Export {
    source: PathBuf,
    description: Description,
    tables: Tables,
    /// As the tables say.
    master: Vec<f32>,
    running: Vec<f32>,
}

impl Export {
    /// Reads the weights that a path means: a run, a folder of weights, a checkpoint's folder or a file.
    ///
    /// # Errors
    /// As [`Description::of`]; [`Error::OtherNetwork`] when a tensor is missing, too many or of another shape, and
    /// [`Error::Malformed`] for numbers that are not finite. A file's attention pooling is passed over.
    pub fn read(source: &Path) -> Result<Self> {
        let (description, file) = Description::with_tensors(source)?;
        let mut tables = Tables::default();
        backbone_and_classifier(&mut tables, &description.model, description.layers, 1);
        let all = [&tables.parameters, &tables.statistics];
        // Neither a pooling nor a classifier behind it.
        let is_ours =
            |name: &str| !name.starts_with(POOL) && (description.layers.classes > 0 || !name.starts_with("head."));
        file.expect_only(&all, is_ours)?;
        let flat = |table: &Table| {
            let flat = file.flat(table)?;
            let check = |entry: &Entry| refuse_not_finite(file.path(), &entry.name, &flat[entry.range.clone()]);
            table.entries().iter().try_for_each(check)?;
            Ok::<_, Error>(flat)
        };
        let (master, running) = (flat(&tables.parameters)?, flat(&tables.statistics)?);
        Ok(Self { source: find_weights(source)?, description, tables, master, running })
    }

    /// What the weights are of.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// Writes a file, or timm's folder: all of it, or nothing. What is there is replaced.
    ///
    /// # Errors
    /// [`Error::Write`]; usage: a network too large for the format.
    pub fn write(&self, format: Format, path: &Path) -> Result<()> {
        match format {
            Format::Timm => {
                let card = self.description.card();
                let config = serde_json::to_vec_pretty(&card.config()).expect("plain values with string keys");
                let model = self.safetensors(None);
                write_folder(
                    path,
                    &[("config.json", &config), ("README.md", card.readme().as_bytes()), (MODEL_FILE, &model)],
                )
            }
            Format::Safetensors => {
                let config = self.description.card().config().to_string();
                write_file(path, &self.safetensors(Some((CONFIG_KEY, config))))
            }
            Format::Onnx => write_file(path, &onnx::write(self)?),
        }
    }

    /// The lines of Python that load what [`Export::write`] wrote to `path`.
    pub fn loading(&self, format: Format, path: &Path) -> String {
        let path = path.display().to_string();
        let card = self.description.card();
        match format {
            Format::Timm => card.loading(Place::Folder(&path)),
            Format::Safetensors => card.loading(Place::File(&path)),
            Format::Onnx => {
                let outputs = if self.description.layers.classes > 0 { "logits, embedding =" } else { "embedding, =" };
                format!(
                    "import onnxruntime\n\n\
                     session = onnxruntime.InferenceSession({})\n\
                     # images: float32 [n, 3, {side}, {side}], {}\n\
                     {outputs} session.run(None, {{\"images\": images}})",
                    serde_json::Value::from(path),
                    self.description.input(),
                    side = self.model().image_size
                )
            }
        }
    }

    /// Numbers that are trained.
    pub fn parameters(&self) -> usize {
        self.tables.parameters.elements()
    }

    /// The bytes of a file with all tensors.
    fn safetensors(&self, about: Option<(&'static str, String)>) -> Vec<u8> {
        let items = self.flats().into_iter().flat_map(|(table, flat)| stored(table, flat));
        // The key that PyTorch's readers look for.
        serialize_items(items, [("format", "pt".to_string())].into_iter().chain(about))
    }

    /// Parameters and running statistics, with their tables.
    pub(crate) fn flats(&self) -> [(&Table, &[f32]); 2] {
        [(&self.tables.parameters, &self.master), (&self.tables.statistics, &self.running)]
    }

    pub(crate) fn model(&self) -> &ModelConfig {
        &self.description.model
    }
}

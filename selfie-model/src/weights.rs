//! Weight files: what a run leaves for others, and what another's weights start.
//!
//! The backbone is in `model.safetensors` under timm's names (`resnetv2_50`), the attention pooling in
//! `pool.safetensors`, and so are classes that stand behind it: a name that timm doesn't know makes it refuse the file.

use crate::config::{Head, ModelConfig};
use crate::durable::{create_folder, write_file};
use crate::encoder::EncoderLayers;
use crate::error::{Error, Result};
use crate::network::Network;
use crate::parameters::{Entry, Table};
use crate::tensor_file::{TensorFile, serialize};
use crate::transfer::{download, upload};
use selfie_kernels::{Backend, Element, Wide};
use serde_json::{Map, Value, json};
use std::fmt;
use std::path::{Path, PathBuf};

/// File of the backbone.
pub const MODEL_FILE: &str = "model.safetensors";
/// File of the attention pooling.
pub const POOL_FILE: &str = "pool.safetensors";
/// File of all parameters in a checkpoint's folder.
pub(crate) const CHECKPOINT_FILE: &str = "weights.safetensors";
pub(crate) const POOL: &str = "pool.";
pub(crate) const HEAD: &str = "head.fc.weight";
/// Advice for a file of another network.
pub(crate) const NO_RESNET: &str = "give the weights of a run, or of timm's resnetv2_50";

/// Whether a tensor of a network with these tensors goes into [`POOL_FILE`].
fn goes_apart(table: &Table) -> impl Fn(&Entry) -> bool + use<> {
    let has_pool = table.entries().iter().any(|entry| entry.name.starts_with(POOL));
    move |entry| entry.name.starts_with(POOL) || has_pool && entry.name.starts_with("head.")
}

/// What the weights are of, for those who load them.
#[derive(Debug, Clone, Copy)]
pub struct About<'a> {
    /// The network's shape.
    pub model: &'a ModelConfig,
    /// Names of the classes in label order; none of a pretrained network.
    pub classes: &'a [String],
}

/// Whether the norm that ends the patch network starts the norm that follows its last stage in a classifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PatchNorm {
    /// The classifier's norm starts fresh.
    Fresh,
    /// It starts as the patch network's.
    Reuse,
}

/// What [`initialize`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Initialized {
    /// The files that were read.
    pub files: Vec<PathBuf>,
    /// Tensors of the network that were read, in its order.
    pub loaded: Vec<String>,
    /// Tensors of the network that were left as they were, in its order.
    pub fresh: Vec<String>,
    /// Tensors of the files that the network has no use for, sorted.
    pub unused: Vec<String>,
}

/// By part: `stem, stages.0-2 from FILE; fresh: stages.3, norm, head; not used: norm`.
impl fmt::Display for Initialized {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let files: Vec<_> = self.files.iter().map(|file| file.display().to_string()).collect();
        write!(f, "{} from {}", parts(&self.loaded), files.join(" and "))?;
        if !self.fresh.is_empty() {
            write!(f, "; fresh: {}", parts(&self.fresh))?;
        }
        if !self.unused.is_empty() {
            write!(f, "; not used: {}", parts(&self.unused))?;
        }
        Ok(())
    }
}

/// Writes `model.safetensors`, `pool.safetensors` (if the network has a pooling), `config.json` and `README.md` to
/// `folder`, which is made if it isn't there. Each file is replaced as a whole.
///
/// # Errors
/// [`Error::Write`]; those of the device.
pub fn write_weights<B, T, N>(network: &N, about: About<'_>, folder: &Path) -> Result<()>
where
    B: Backend<T>,
    T: Element,
    N: Network<B, T>,
{
    let (device, parameters, statistics) = (&**network.device(), network.parameters(), network.statistics());
    let master = download(device, &parameters.master)?;
    let running = download(device, &statistics.running)?;
    let flats = [(&parameters.table, &master[..]), (&statistics.table, &running[..])];
    let apart = goes_apart(&parameters.table);
    create_folder(folder)?;
    write_file(&folder.join(MODEL_FILE), &serialize(&flats, |entry| !apart(entry)))?;
    if parameters.table.entries().iter().any(&apart) {
        write_file(&folder.join(POOL_FILE), &serialize(&flats, &apart))?;
    }
    let card = Card::new(about, &parameters.table);
    let config = serde_json::to_vec_pretty(&card.config()).expect("plain values with string keys");
    write_file(&folder.join("config.json"), &config)?;
    write_file(&folder.join("README.md"), card.readme().as_bytes())
}

/// Gives the network every parameter and running statistic from a file, or from a run's or an export's folder.
///
/// # Errors
/// [`Error::Read`], [`Error::Malformed`]; [`Error::OtherNetwork`] when a tensor is missing, too many or of another
/// shape. The network is then untouched. Those of the device. Tensors that are no floating-point numbers are passed over.
pub fn load_weights<B, T, N>(network: &mut N, source: &Path) -> Result<Initialized>
where
    B: Backend<T>,
    T: Element,
    N: Network<B, T>,
{
    let weights = Weights::open(source, &network.parameters().table)?;
    let tables = [&network.parameters().table, &network.statistics().table];
    weights.files().try_for_each(|file| file.expect_only(&tables, |_| true))?;
    fill(network, &weights, |entry| Some(entry.name.clone()))
}

/// Gives the network what it shares with the weights in a file, or in a run's or an export's folder; the rest stays as
/// it is.
///
/// Stem and stages are shared; the final norm and the classes only by networks of equally many stages; the attention pooling
/// by those that have one. So a classifier takes stem and stages 0-2 from a pretrained patch network, with [`Head::Attention`]
/// everything but the classes, and everything from timm's `resnetv2_50` but a head for other classes.
///
/// # Errors
/// As [`load_weights`], for the tensors that are shared.
pub fn initialize<B, T, N>(network: &mut N, source: &Path, patch_norm: PatchNorm) -> Result<Initialized>
where
    B: Backend<T>,
    T: Element,
    N: Network<B, T>,
{
    let table = &network.parameters().table;
    let weights = Weights::open(source, table)?;
    let stages = stages(table.entries().iter().map(|entry| entry.name.as_str()));
    let given = self::stages(weights.model.shapes().map(|(name, _)| name));
    let pooled = table.entries().iter().any(|entry| entry.name.starts_with(POOL)) && weights.have_pool();
    // A deeper stage or pooling must not lose its last blocks in silence.
    let tables = [table, &network.statistics().table];
    let wanted = |name: &str| stage(name).is_some_and(|stage| stage < stages) || pooled && name.starts_with(POOL);
    weights.files().try_for_each(|file| file.expect_only(&tables, wanted))?;
    let head = table.get(HEAD).map(|entry| entry.shape.clone());
    let same_head = head.as_deref() == weights.file_of(HEAD).shape(HEAD);
    let reused = format!("stages.{given}.blocks.0.norm1.");
    fill(network, &weights, |entry| {
        let name = &entry.name;
        let part = name.split('.').next().unwrap_or_default();
        let shared = match part {
            "norm" => stages == given,
            "head" => stages == given && same_head,
            "stages" => stage(name).is_some_and(|stage| stage < given),
            "pool" => pooled,
            _ => true,
        };
        match name.strip_prefix(&reused) {
            Some(rest) if patch_norm == PatchNorm::Reuse => Some(format!("norm.{rest}")),
            _ => shared.then(|| name.clone()),
        }
    })
}

/// The weight file that a path means: itself, or `weights/model.safetensors`, `model.safetensors` or a checkpoint's
/// `weights.safetensors` in it.
///
/// # Errors
/// [`Error::Read`] when there is nothing; [`Error::Malformed`] for a folder that holds neither.
pub fn find_weights(source: &Path) -> Result<PathBuf> {
    let about = std::fs::metadata(source).map_err(crate::error::reading(source))?;
    if !about.is_dir() {
        return Ok(source.into());
    }
    let candidates = [source.join("weights").join(MODEL_FILE), source.join(MODEL_FILE), source.join(CHECKPOINT_FILE)];
    candidates.into_iter().find(|file| file.is_file()).ok_or_else(|| {
        Error::malformed(
            source,
            format!("weights/{MODEL_FILE}, {MODEL_FILE}, or {CHECKPOINT_FILE} of a checkpoint"),
            "none of them",
            "give a run that has saved its weights, a checkpoint's folder, or a weight file",
        )
    })
}

/// The layers that the weights of a path are of, see [`EncoderLayers::of`].
pub(crate) fn layers_of(source: &Path) -> Result<EncoderLayers> {
    let weights = Weights::<f32>::read(source, Pool::Beside)?;
    let stages = stages_of(&weights.model)?;
    let classes = weights.file_of(HEAD).shape(HEAD).and_then(|shape| shape.first()).map_or(0, |&classes| classes);
    // Classes stand behind the pooling, if there is one: without classes it is the puzzle's.
    let head = if classes > 0 && weights.have_pool() { Head::Attention } else { Head::Conv };
    Ok(EncoderLayers { stages, head, classes })
}

/// Number of stages that a ResNet's file has.
///
/// # Errors
/// [`Error::Malformed`]: none, or more than four.
pub(crate) fn stages_of<W: Wide>(file: &TensorFile<W>) -> Result<usize> {
    let stages = stages(file.shapes().map(|(name, _)| name));
    if !(1..=4).contains(&stages) {
        let (expected, found) = ("tensors of 1 to 4 stages (stages.0 and so on)", format!("{stages} stages"));
        return Err(Error::malformed(file.path(), expected, found, NO_RESNET));
    }
    Ok(stages)
}

/// What tells one weight file from another, wherever it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Fingerprint {
    /// Its length.
    pub bytes: u64,
    /// CRC-32 of its bytes.
    pub crc32: u32,
}

/// The fingerprint of the weight file that a path means, as [`find_weights`] says.
///
/// # Errors
/// [`Error::Read`]; those of [`find_weights`].
pub fn fingerprint(source: &Path) -> Result<Fingerprint> {
    let path = find_weights(source)?;
    let bytes = std::fs::read(&path).map_err(crate::error::reading(&path))?;
    Ok(Fingerprint { bytes: bytes.len() as u64, crc32: crc32fast::hash(&bytes) })
}

/// What is read beside a weight file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pool {
    /// Its pooling, if it lies there.
    Beside,
    /// Nothing.
    Left,
}

/// The tensors of a weight file, and of the pooling beside it.
struct Weights<W> {
    model: TensorFile<W>,
    pool: Option<TensorFile<W>>,
}

impl<W: Wide> Weights<W> {
    /// Reads what a network with `table` may need.
    fn open(source: &Path, table: &Table) -> Result<Self> {
        let has_pool = table.entries().iter().any(|entry| entry.name.starts_with(POOL));
        Self::read(source, if has_pool { Pool::Beside } else { Pool::Left })
    }

    fn read(source: &Path, pool: Pool) -> Result<Self> {
        let path = find_weights(source)?;
        let beside = path.with_file_name(POOL_FILE);
        let wanted = pool == Pool::Beside && path.file_name().is_some_and(|name| name == MODEL_FILE);
        let pool = if wanted && beside.is_file() { Some(TensorFile::read(&beside)?) } else { None };
        Ok(Self { model: TensorFile::read(&path)?, pool })
    }

    /// Whether there are tensors of an attention pooling.
    fn have_pool(&self) -> bool {
        self.files().any(|file| file.shapes().any(|(name, _)| name.starts_with(POOL)))
    }

    fn files(&self) -> impl Iterator<Item = &TensorFile<W>> {
        std::iter::once(&self.model).chain(&self.pool)
    }

    /// The file that a tensor of that name is in, or would be.
    fn file_of(&self, name: &str) -> &TensorFile<W> {
        let pool = self.pool.as_ref().filter(|pool| name.starts_with(POOL) || pool.shape(name).is_some());
        pool.unwrap_or(&self.model)
    }
}

/// Overwrites the parameters and statistics for which `source` gives a name in the files.
fn fill<B, T, N>(
    network: &mut N,
    weights: &Weights<T::Wide>,
    source: impl Fn(&Entry) -> Option<String>,
) -> Result<Initialized>
where
    B: Backend<T>,
    T: Element,
    N: Network<B, T>,
{
    let device = network.device().clone();
    let mut master = download(&*device, &network.parameters().master)?;
    let mut running = download(&*device, &network.statistics().running)?;
    let (mut loaded, mut fresh, mut used) = (Vec::new(), Vec::new(), Vec::new());
    let flats = [(&network.parameters().table, &mut master), (&network.statistics().table, &mut running)];
    for (table, flat) in flats {
        for entry in table.entries() {
            match source(entry) {
                Some(name) => {
                    weights.file_of(&name).place(&name, entry, flat)?;
                    refuse_not_finite(weights.file_of(&name).path(), &name, &flat[entry.range.clone()])?;
                    loaded.push(entry.name.clone());
                    used.push(name);
                }
                None => fresh.push(entry.name.clone()),
            }
        }
    }
    give(network, &master, &running)?;
    let names = |file: &TensorFile<T::Wide>| {
        let numbers = file.shapes().map(|(name, _)| name.to_string());
        numbers.chain(file.others().map(|(name, ..)| name.to_string())).collect::<Vec<_>>()
    };
    let mut unused: Vec<_> = weights.files().flat_map(names).filter(|name| !used.contains(name)).collect();
    unused.sort_unstable();
    Ok(Initialized { files: weights.files().map(|file| file.path().into()).collect(), loaded, fresh, unused })
}

/// Gives the network every parameter and running statistic, as they are, from a file that has nothing else, and the momenta
/// from another.
///
/// # Errors
/// [`Error::OtherNetwork`] when a tensor is missing, too many or of another shape. The network is then untouched. Those of the
/// device.
pub(crate) fn restore<B, T, N>(
    network: &mut N,
    weights: &TensorFile<T::Wide>,
    velocity: Option<&TensorFile<T::Wide>>,
) -> Result<()>
where
    B: Backend<T>,
    T: Element,
    N: Network<B, T>,
{
    let (parameters, statistics) = (&network.parameters().table, &network.statistics().table);
    let (master, running) = (weights.flat(parameters)?, weights.flat(statistics)?);
    weights.expect_only(&[parameters, statistics], |_| true)?;
    weights.expect_no_others()?;
    let of = |file: &TensorFile<_>| {
        file.expect_only(&[parameters], |_| true)?;
        file.expect_no_others()?;
        file.flat(parameters)
    };
    let velocity = velocity.map(of).transpose()?;
    if let Some(velocity) = velocity {
        let device = network.device().clone();
        upload(&*device, &velocity, &mut network.parameters_mut().velocity)?;
    }
    give(network, &master, &running)
}

/// Overwrites parameters and statistics.
pub(crate) fn give<B, T, N>(network: &mut N, master: &[T::Wide], running: &[T::Wide]) -> Result<()>
where
    B: Backend<T>,
    T: Element,
    N: Network<B, T>,
{
    let device = network.device().clone();
    upload(&*device, master, &mut network.parameters_mut().master)?;
    upload(&*device, running, &mut network.statistics_mut().running)?;
    Ok(network.refresh_copy()?)
}

/// Numbers that are not finite would only show as steps that are not.
pub(crate) fn refuse_not_finite<W: Wide>(path: &Path, name: &str, values: &[W]) -> Result<()> {
    let bad = values.iter().filter(|&&value| !Wide::to_f64(value).is_finite()).count();
    if bad == 0 {
        return Ok(());
    }
    let found = format!("{bad} of {} that are not", values.len());
    let advice = "its training diverged, or the file is damaged: give an earlier one";
    Err(Error::malformed(path, format!("finite numbers in `{name}`"), found, advice))
}

/// The stage in a name such as `stages.2.blocks.0.conv1.weight`.
pub(crate) fn stage(name: &str) -> Option<usize> {
    name.strip_prefix("stages.")?.split('.').next()?.parse().ok()
}

/// Number of stages that names speak of.
pub(crate) fn stages<'a>(names: impl Iterator<Item = &'a str>) -> usize {
    names.filter_map(stage).max().map_or(0, |last| last.saturating_add(1))
}

/// The parts of the network that names speak of: `stem, stages.0-2, norm`.
fn parts(names: &[String]) -> String {
    let mut found: Vec<String> = Vec::new();
    let mut numbers: Vec<usize> = names.iter().filter_map(|name| stage(name)).collect();
    numbers.sort_unstable();
    numbers.dedup();
    let ranges = numbers.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
        [first, .., last] => format!("stages.{first}-{last}"),
        one => format!("stages.{}", one[0]),
    });
    let mut ranges = Some(ranges);
    for name in names {
        match name.split('.').next().unwrap_or(name) {
            "stages" => found.extend(ranges.take().into_iter().flatten()),
            part if found.iter().any(|known| known == part) => {}
            part => found.push(part.into()),
        }
    }
    if found.is_empty() { "nothing".into() } else { found.join(", ") }
}

/// What the names in a file say of its network.
#[cfg(fuzzing)]
pub(crate) fn describe(file: &TensorFile<f32>) -> String {
    let names: Vec<String> = file.shapes().map(|(name, _)| name.into()).collect();
    format!("{} in {} stages", parts(&names), stages(names.iter().map(String::as_str)))
}

/// How an image gets its size.
#[derive(Debug, Clone, PartialEq)]
pub struct Resize {
    /// timm's name of the filter.
    pub interpolation: String,
    /// Side of the central square that is taken, as a part of the shorter side.
    pub crop: f64,
}

impl Resize {
    /// What [`selfie_data`] does for such a network.
    pub(crate) fn ours(model: &ModelConfig) -> Self {
        // Images that already have their size are not cropped: see the loader.
        Self { interpolation: "bilinear".into(), crop: if model.has_large_stem() { 0.875 } else { 1.0 } }
    }
}

/// Where weights lie, as Python is to find them.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place<'a> {
    /// A folder that has `config.json` as well.
    Folder(&'a str),
    /// The file itself.
    File(&'a str),
}

/// What others need to know to load the weights.
pub(crate) struct Card<'a> {
    about: About<'a>,
    resize: Resize,
    stages: usize,
    /// Of the backbone's file.
    classes: usize,
    /// Those behind the attention pooling, in its file.
    pooled_classes: usize,
    large_stem: bool,
    /// Whether [`POOL_FILE`] lies beside the weights.
    has_pool: bool,
}

impl<'a> Card<'a> {
    fn new(about: About<'a>, table: &Table) -> Self {
        let apart = goes_apart(table);
        let classes =
            |wanted: bool| table.get(HEAD).filter(|head| apart(head) == wanted).map_or(0, |head| head.shape[0]);
        let stages = stages(table.entries().iter().map(|entry| entry.name.as_str()));
        let layers = EncoderLayers { stages, head: Head::Conv, classes: classes(false) };
        let has_pool = table.entries().iter().any(&apart);
        let pooled_classes = classes(true);
        Self { has_pool, pooled_classes, ..Self::of_encoder(about, layers, Resize::ours(about.model)) }
    }

    /// Of the layers that make features and scores, alone.
    pub(crate) fn of_encoder(about: About<'a>, layers: EncoderLayers, resize: Resize) -> Self {
        let EncoderLayers { stages, classes, .. } = layers;
        let large_stem = about.model.has_large_stem();
        Self { about, resize, stages, classes, pooled_classes: 0, large_stem, has_pool: false }
    }

    /// Arguments that make timm's `resnetv2_50` this network.
    fn model_args(&self) -> Map<String, Value> {
        let model = self.about.model;
        let mut args = Map::new();
        if self.stages < 4 || model.depths != [3, 4, 6, 3] || model.stem_width != 64 {
            let channels: Vec<_> = (0..self.stages).map(|stage| model.channels(stage)).collect();
            args.insert("layers".into(), json!(model.depths[..self.stages]));
            args.insert("channels".into(), json!(channels));
        }
        if model.stem_width != 64 {
            args.insert("stem_chs".into(), json!(model.stem_width));
        }
        args
    }

    /// The keys of timm's `config.json`.
    pub(crate) fn config(&self) -> Value {
        let model = self.about.model;
        let size = model.image_size;
        let stem_stride = if self.large_stem { 4 } else { 1 };
        let last_map = size.div_ceil(stem_stride << (self.stages.max(1) - 1));
        let mut config = json!({
            // timm has no model with the small stem, and says so when it meets this name.
            "architecture": if self.large_stem { "resnetv2_50" } else { "selfie_resnetv2_small_stem" },
            "num_classes": self.classes,
            "num_features": model.channels(self.stages.max(1) - 1),
            "global_pool": "avg",
            "pretrained_cfg": {
                "tag": "selfie",
                "custom_load": false,
                "input_size": [3, size, size],
                "fixed_input_size": false,
                "interpolation": self.resize.interpolation,
                "crop_pct": self.resize.crop,
                "crop_mode": "center",
                "mean": model.mean,
                "std": model.std,
                "num_classes": self.classes,
                "pool_size": [last_map, last_map],
                "first_conv": "stem.conv",
                "classifier": "head.fc",
            },
        });
        let args = self.model_args();
        if !args.is_empty() {
            config["model_args"] = args.into();
        }
        if !self.about.classes.is_empty() {
            config["label_names"] = json!(self.about.classes);
        }
        config
    }

    /// The lines of Python that load the weights.
    pub(crate) fn loading(&self, place: Place<'_>) -> String {
        let literal = |text: &str| Value::from(text).to_string();
        let file = match place {
            Place::Folder(folder) if self.large_stem => {
                let folder = literal(&format!("local-dir:{folder}"));
                return format!("import timm\n\nmodel = timm.create_model({folder}, pretrained=True)");
            }
            Place::Folder(folder) => literal(&format!("{folder}/{MODEL_FILE}")),
            Place::File(file) => literal(file),
        };
        let mut args: Vec<_> = self.model_args().iter().map(|(key, value)| format!(", {key}={value}")).collect();
        args.push(format!(", num_classes={}", self.classes));
        let args = args.concat();
        let model = format!("model = timm.create_model(\"resnetv2_50\"{args})");
        let load = format!("model.load_state_dict(safetensors.torch.load_file({file}))");
        if self.large_stem {
            return format!("import safetensors.torch, timm\n\n{model}\n{load}");
        }
        format!(
            "import safetensors.torch, timm, torch\n\n\
             # The 3x3 stem for small images is not a timm model: replace the 7x7 one and its pooling.\n\
             {model}\n\
             model.stem.conv = torch.nn.Conv2d(3, {}, 3, stride=1, padding=1, bias=False)\n\
             model.stem.pool = torch.nn.Identity()\n\
             {load}",
            self.about.model.stem_width
        )
    }

    /// What the network takes, in words.
    pub(crate) fn input(&self) -> String {
        let model = self.about.model;
        let [mean, std] = [model.mean, model.std].map(|values| format!("{values:?}"));
        format!(
            "RGB, {size} x {size}, `(pixel / 255 - mean) / std` with mean {mean} and std {std}",
            size = model.image_size
        )
    }

    pub(crate) fn readme(&self) -> String {
        let last = self.stages - 1;
        let what = match (self.classes, self.pooled_classes) {
            (0, 0) => format!("The patch network of a Selfie pretraining: stem, stages 0-{last} and norm."),
            (0, classes) => format!(
                "Stem, stages 0-{last} and norm of a network that tells {classes} classes apart by an attention pooling of what \
                 they make of an image."
            ),
            (classes, _) => format!("A ResNet v2 that tells {classes} classes apart."),
        };
        // Where timm has the model it takes the folder, which the reader has to name.
        let place = if self.large_stem { Place::Folder("PATH/OF/THIS/FOLDER") } else { Place::File(MODEL_FILE) };
        let pool = match (self.has_pool, self.pooled_classes) {
            (false, _) => String::new(),
            (true, 0) => {
                format!("`{POOL_FILE}` is the attention pooling of the pretext task, which timm has no place for.\n\n")
            }
            (true, _) => format!(
                "`{POOL_FILE}` is that pooling and the classifier behind it, which timm has no place for: what is loaded above \
                 makes features.\n\n"
            ),
        };
        format!(
            "# Weights\n\n{what} Tensor names and shapes are those of timm's `resnetv2_50`.\n\n\
             ```python\n{}\n```\n\n\
             Input: {}.\n\n{pool}\
             With selfie: `selfie finetune --init PATH/OF/THIS/FOLDER`, `selfie inspect PATH/OF/THIS/FOLDER`.\n",
            self.loading(place),
            self.input()
        )
    }
}

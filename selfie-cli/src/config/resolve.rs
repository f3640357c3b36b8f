//! From layers to one table: built-in < preset < first weights < run folder < `-c` < environment < `--set` < flag.

use std::fmt;
use std::path::{Path, PathBuf};

use selfie_data::LabelBudget;

use super::keys::{KEYS, Key, OnResume, Task};
use super::presets;
use super::settings::Settings;
use super::value::Value;
use crate::exit::Problem;

/// Where a value comes from; later ones win.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// The table of keys.
    BuiltIn,
    /// The preset of that name.
    Preset(String),
    /// The run that the first weights come from.
    Init(PathBuf),
    /// The run folder that is continued.
    Run(PathBuf),
    /// A file given by `-c`; the number is its place among them.
    File(usize, PathBuf),
    /// An environment variable.
    Environment(String),
    /// `--set`; the number is its place among them.
    Set(usize),
    /// A flag.
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::BuiltIn => write!(f, "default"),
            Origin::Preset(name) => write!(f, "preset {name}"),
            Origin::Init(path) | Origin::Run(path) | Origin::File(_, path) => write!(f, "{}", path.display()),
            Origin::Environment(name) => write!(f, "environment {name}"),
            Origin::Set(_) => write!(f, "--set"),
            Origin::Flag(name) => write!(f, "--{name}"),
        }
    }
}

/// Values of one origin.
struct Layer {
    origin: Origin,
    values: Vec<(&'static Key, Value)>,
}

impl Layer {
    /// The value of a key, if the layer has it; the last one, if it has several.
    fn get(&self, name: &str) -> Option<String> {
        self.values.iter().rev().find(|(key, _)| key.name == name).map(|(_, value)| value.plain())
    }
}

/// What was typed, and the environment.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Files of `-c`, in order.
    pub files: Vec<PathBuf>,
    /// `section.key=value` of `--set`, in order.
    pub set: Vec<String>,
    /// Flags that were given.
    pub flags: Vec<(&'static Key, String)>,
    /// Variables that begin with `SELFIE_`.
    pub environment: Vec<(String, String)>,
    /// The run that is evaluated: its values stand below those typed.
    pub run: Option<PathBuf>,
}

impl Request {
    /// The variables of this process that concern the configuration.
    pub fn process_environment() -> Vec<(String, String)> {
        let ours = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
        let ours = ours.filter(|(name, _)| name.starts_with("SELFIE_"));
        ours.map(|(name, value)| (name, value.to_string_lossy().into_owned())).collect()
    }
}

/// Variables that begin with `SELFIE_` and are no configuration keys. `cargo run` sets the first one, from `build.rs`.
const OTHER_VARIABLES: &[&str] = &[
    "SELFIE_COMMIT",
    "SELFIE_CUDA_PROBE_SECONDS",
    "SELFIE_DATA",
    "SELFIE_FAULT",
    "SELFIE_OVERLAP",
    "SELFIE_REQUIRE_GPU",
    "SELFIE_SIMD",
    "SELFIE_SYNC",
];

/// One key, resolved.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The key.
    pub key: &'static Key,
    /// Its value.
    pub value: Value,
    /// Where the value comes from.
    pub origin: Origin,
}

/// The resolved configuration: a value for every key.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// For which command.
    pub task: Task,
    entries: Vec<Entry>,
}

impl Resolved {
    /// Resolves a request.
    ///
    /// # Errors
    /// Unknown keys, values of the wrong type or out of range, keys that the command does not use, contradictions:
    /// usage. A `-c` file that cannot be read: input.
    pub fn new(task: Task, request: &Request) -> anyhow::Result<Self> {
        let typed = typed_layers(task, request)?;
        let last = |name: &str| typed.iter().rev().find_map(|layer| layer.get(name));
        let mut layers = Vec::new();
        let out = last("run.out").filter(|_| task != Task::Evaluate);
        let of_run = match (&request.run, out) {
            (Some(run), _) => saved(run, Origin::Run, |key| key.split().0 != "run" && key.name != "data.limit")?,
            (None, Some(out)) => saved(Path::new(&out), Origin::Run, |key| key.name != "run.out")?,
            (None, None) => None,
        };
        let of_run_init = of_run.as_ref().and_then(|layer| layer.get("train.init"));
        if let Some(init) = last("train.init").or(of_run_init).filter(|_| task == Task::Finetune) {
            let layer = saved(Path::new(&init), Origin::Init, Key::describes_network)?;
            // Another preset was asked for: the weights will not fit, and the error names the first that doesn't.
            let contradicted =
                |layer: &Layer| last("model.preset").is_some() && last("model.preset") != layer.get("model.preset");
            layers.extend(layer.filter(|layer| !contradicted(layer)));
        }
        layers.extend(of_run);
        layers.extend(typed);
        let mut entries: Vec<Entry> =
            KEYS.iter().map(|key| Entry { key, value: key.default_value(), origin: Origin::BuiltIn }).collect();
        let mut apply = |layer: Layer| {
            for (key, value) in layer.values {
                let entry = entries.iter_mut().find(|entry| entry.key.name == key.name);
                let entry = entry.expect("entries hold every key");
                (entry.value, entry.origin) = (value, layer.origin.clone());
            }
        };
        let preset = layers.iter().rev().find_map(|layer| layer.get("model.preset"));
        let preset =
            preset.unwrap_or_else(|| Key::find("model.preset").expect("it is in the table").default_value().plain());
        apply(Layer { values: presets::values(&preset, task), origin: Origin::Preset(preset) });
        layers.into_iter().for_each(apply);
        let mut resolved = Self { task, entries };
        resolved.choose_length()?;
        Ok(resolved)
    }

    /// Of steps, epochs and minutes, the one that was said last; the others become 0.
    fn choose_length(&mut self) -> anyhow::Result<()> {
        const LENGTHS: [&str; 3] = ["train.steps", "train.epochs", "train.minutes"];
        let given = |entry: &&Entry| {
            LENGTHS.contains(&entry.key.name) && !matches!(entry.value, Value::Whole(0) | Value::Number(0.0))
        };
        // Flags are of one rank, whatever their names.
        let rank = |origin: &Origin| match origin {
            Origin::Flag(_) => Origin::Flag(""),
            Origin::Environment(_) => Origin::Environment(String::new()),
            other => other.clone(),
        };
        let Some(winner) = self.entries.iter().filter(given).max_by_key(|entry| rank(&entry.origin)).cloned() else {
            return Ok(());
        };
        for entry in self.entries.iter_mut().filter(|entry| LENGTHS.contains(&entry.key.name)) {
            if entry.key.name == winner.key.name {
                continue;
            }
            if given(&&*entry) && rank(&entry.origin) == rank(&winner.origin) {
                return Err(Problem::usage(format!(
                    "{} = {} ({}) and {} = {} ({}) contradict each other: give only one of steps, epochs and minutes",
                    entry.key.name, entry.value, entry.origin, winner.key.name, winner.value, winner.origin
                )));
            }
            entry.value = entry.key.default_value();
            entry.origin = winner.origin.clone();
        }
        Ok(())
    }

    /// All keys that the command uses.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(|entry| entry.key.used_by.contains(&self.task))
    }

    /// One key.
    pub fn entry(&self, name: &str) -> &Entry {
        let entry = self.entries.iter().find(|entry| entry.key.name == name);
        entry.expect("only names in the table are asked for")
    }

    /// The same as a struct.
    pub fn settings(&self) -> Settings {
        let mut root = toml::Table::new();
        for entry in &self.entries {
            let (section, name) = entry.key.split();
            let table = root.entry(section).or_insert_with(|| toml::Table::new().into());
            if let toml::Value::Table(table) = table {
                table.insert(name.into(), entry.value.to_toml());
            }
        }
        root.try_into().expect("settings have a field of the right type for every key, a test checks it")
    }

    /// The values that the command uses, by section and name: what a checkpoint remembers.
    pub fn as_json(&self) -> serde_json::Value {
        let mut root = serde_json::json!({});
        for entry in self.entries().filter(|entry| entry.key.name != "run.out") {
            let (section, name) = entry.key.split();
            root[section][name] = entry.value.as_json();
        }
        root
    }

    /// Compares with what the checkpoint of the run that is continued remembers.
    ///
    /// # Errors
    /// Usage: a key that may not change has another value.
    pub fn check_continues(&self, saved: &serde_json::Value) -> anyhow::Result<Changes> {
        let mut changes = Changes::default();
        for difference in selfie_model::differences(saved, &self.as_json()) {
            let Some(key) = Key::find(&difference.key) else { continue };
            let entry = self.entry(key.name);
            if key.is_path() && same_file(&difference.saved, &difference.now) {
                continue;
            }
            // The run is older than the key, and nobody asked for another value than it had without it.
            if difference.saved.is_null() && entry.origin < Origin::Run(PathBuf::new()) {
                continue;
            }
            let change = format!("{} = {} where the run has {}", key.name, entry.value, difference.saved);
            match key.on_resume {
                OnResume::Fixed => {
                    let change = Change { key: key.name, text: change, origin: entry.origin.clone() };
                    let places = [difference.saved.as_str(), difference.now.as_str()];
                    if !places.iter().all(|place| place.is_some_and(|place| key.is_place(place))) {
                        return Err(change.refused("a run goes on with the values it began with; leave this one out"));
                    }
                    changes.moved.push(change);
                }
                OnResume::MayChange => changes.allowed.push(change),
                OnResume::ChangesBits => {
                    let told = format!("{change}: the bits that follow differ from those of an uninterrupted run");
                    changes.allowed.push(told);
                }
            }
        }
        Ok(changes)
    }
}

/// What differs from the run that is continued.
#[derive(Debug, Default)]
pub struct Changes {
    /// Changes that are allowed, in words.
    pub allowed: Vec<String>,
    /// Other places of what the run was given: allowed, if the same is there.
    pub moved: Vec<Change>,
}

/// Another value of a key.
#[derive(Debug)]
pub struct Change {
    /// The key.
    pub key: &'static str,
    /// Both values, in words.
    pub text: String,
    /// Where the new one comes from.
    pub origin: Origin,
}

impl Change {
    /// The usage error that it is.
    pub fn refused(&self, why: &str) -> anyhow::Error {
        Problem::usage(format!("{} (now from {}): {why}, or give another --out", self.text, self.origin))
    }
}

/// What a run was trained on, by its `config.toml`.
pub fn saved_data_path(run: &Path) -> Option<PathBuf> {
    let values = read_file(&run.join("config.toml")).ok()?;
    let path = values.into_iter().find(|(key, _)| key.name == "data.path")?.1.plain();
    (!path.is_empty()).then(|| path.into())
}

/// Whether two texts name the same file or folder.
fn same_file(one: &serde_json::Value, other: &serde_json::Value) -> bool {
    let real = |value: &serde_json::Value| Path::new(value.as_str()?).canonicalize().ok();
    matches!((real(one), real(other)), (Some(one), Some(other)) if one == other)
}

/// Layers of what was typed, lowest first.
fn typed_layers(task: Task, request: &Request) -> anyhow::Result<Vec<Layer>> {
    let mut layers = Vec::new();
    for (place, path) in request.files.iter().enumerate() {
        layers.push(Layer { origin: Origin::File(place, path.clone()), values: read_file(path)? });
    }
    for (name, text) in &request.environment {
        if OTHER_VARIABLES.contains(&name.as_str()) {
            continue;
        }
        let origin = Origin::Environment(name.clone());
        let Some(key) = KEYS.iter().find(|key| key.environment() == *name) else {
            let path = name.trim_start_matches("SELFIE_").to_lowercase().replacen('_', ".", 1);
            let nearest = Key::find(Key::nearest(&path)).map(Key::environment).unwrap_or_default();
            return Err(Problem::usage(format!(
                "the environment variable {name} is no configuration key; did you mean {nearest}? (or unset it)"
            )));
        };
        layers.push(Layer { values: vec![(key, parse(key, text, &origin)?)], origin });
    }
    for (place, text) in request.set.iter().enumerate() {
        let origin = Origin::Set(place);
        let Some((name, value)) = text.split_once('=') else {
            return Err(Problem::usage(format!("--set {text}: expected section.key=value, such as train.lr=0.1")));
        };
        let key = known(name.trim(), &format!("--set {text}"))?;
        if !key.used_by.contains(&task) {
            return Err(Problem::usage(format!("--set {text}: {} does not use {}", task.name(), key.name)));
        }
        layers.push(Layer { values: vec![(key, parse(key, value, &origin)?)], origin });
    }
    for (key, text) in &request.flags {
        let origin = Origin::Flag(key.flag.unwrap_or(key.name));
        layers.push(Layer { values: vec![(*key, parse(key, text, &origin)?)], origin });
    }
    Ok(layers)
}

/// The layer of a run folder, if it has a configuration.
fn saved(
    folder: &Path,
    origin: impl FnOnce(PathBuf) -> Origin,
    wanted: impl Fn(&Key) -> bool,
) -> anyhow::Result<Option<Layer>> {
    let path = folder.join("config.toml");
    if !path.is_file() {
        return Ok(None);
    }
    let values = read_file(&path)?.into_iter().filter(|(key, _)| wanted(key)).collect();
    Ok(Some(Layer { origin: origin(path), values }))
}

fn parse(key: &'static Key, text: &str, origin: &Origin) -> anyhow::Result<Value> {
    // --set takes TOML's quotes, too.
    let bare = text.trim();
    let bare = bare.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(bare);
    key.kind.parse(bare).ok_or_else(|| out_of_range(key, text, origin))
}

fn out_of_range(key: &Key, given: impl fmt::Display, origin: impl fmt::Display) -> anyhow::Error {
    let given = shortened(&given.to_string());
    Problem::usage(format!("{} = {given} ({origin}): expected {}", key.name, key.kind.expected()))
}

/// The beginning of what was given, for messages: a list of a million depths is none that one reads.
fn shortened(given: &str) -> String {
    const MOST: usize = 100;
    match given.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}... ({} bytes)", &given[..end], given.len()),
        None => given.into(),
    }
}

fn known(name: &str, origin: &str) -> anyhow::Result<&'static Key> {
    Key::find(name).ok_or_else(|| {
        let nearest = Key::nearest(name);
        let name = shortened(name);
        Problem::usage(format!(
            "{origin}: there is no key `{name}`; did you mean `{nearest}`? (`selfie config init` lists all)"
        ))
    })
}

/// Bytes of the largest configuration file.
const MAX_FILE: u64 = 16 << 20;

/// Reads a configuration file.
fn read_file(path: &Path) -> anyhow::Result<Vec<(&'static Key, Value)>> {
    let place = path.display();
    let cannot = |error| Problem::input(format!("cannot read the configuration file {place}: {error}"));
    let about = std::fs::metadata(path).map_err(cannot)?;
    if !about.is_file() || about.len() > MAX_FILE {
        return Err(Problem::usage(format!(
            "{place} is no configuration: expected a file of at most {MAX_FILE} bytes, as `selfie config init` prints one"
        )));
    }
    let text = std::fs::read_to_string(path).map_err(cannot)?;
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
        // It quotes the line, which is of any length.
        let whole = error.to_string();
        let said = if whole.len() > 500 { shortened(error.message()) } else { whole };
        Problem::usage(format!("{place} is not valid TOML: {said}"))
    })?;
    let mut values = Vec::new();
    for (section, content) in &table {
        let toml::Value::Table(content) = content else {
            let (inside, section) = (Key::nearest(section), shortened(section));
            return Err(Problem::usage(format!(
                "{place}: `{section}` stands outside of a section; did you mean `{inside}`, under its [section]?"
            )));
        };
        for (name, value) in content {
            let key = known(&format!("{section}.{name}"), &place.to_string())?;
            let parsed = key.kind.read_toml(value).ok_or_else(|| out_of_range(key, value, place.to_string()))?;
            values.push((key, parsed));
        }
    }
    Ok(values)
}

impl Key {
    /// Whether this value of the key names a place, where the same thing may lie as at another.
    fn is_place(&self, value: &str) -> bool {
        match self.name {
            "data.path" => !value.starts_with("synthetic:"),
            "train.init" => value != "scratch",
            "data.labels" => matches!(value.parse(), Ok(LabelBudget::Named(_))),
            _ => false,
        }
    }

    /// Whether the key belongs to the attention pooling, which a classifier has only as its head.
    pub fn describes_pooling(&self) -> bool {
        const POOLING: [&str; 7] =
            ["heads", "ffn", "pool_blocks", "dropout", "positions", "encoder_positions", "query"];
        self.split().0 == "model" && POOLING.contains(&self.split().1)
    }

    /// Whether the key belongs to the network that weights fit: taken over from the run they come from.
    pub fn describes_network(&self) -> bool {
        self.name.starts_with("model.") || ["data.image_size", "data.mean", "data.std"].contains(&self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::super::render::as_toml;
    use super::*;
    use crate::exit::Exit;
    use proptest::prelude::*;

    fn read(bytes: &[u8]) -> anyhow::Result<Resolved> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("file.toml");
        std::fs::write(&path, bytes).expect("written");
        Resolved::new(Task::Pretrain, &Request { files: vec![path], ..Request::default() })
    }

    fn is_said(result: &anyhow::Result<Resolved>) -> bool {
        result.as_ref().err().is_none_or(|error| {
            [Exit::Usage, Exit::Input].contains(&Exit::of(error)) && error.to_string().contains("file.toml")
        })
    }

    fn valid() -> Vec<u8> {
        as_toml(&Resolved::new(Task::Pretrain, &Request::default()).expect("defaults")).into_bytes()
    }

    proptest! {
        #[test]
        fn any_change_of_a_file_is_read_or_said(at: prop::sample::Index, byte: u8, cut: prop::sample::Index) {
            let mut bytes = valid();
            let (at, cut) = (at.index(bytes.len()), cut.index(bytes.len() + 1));
            bytes[at] = byte;
            prop_assert!(is_said(&read(&bytes)));
            prop_assert!(is_said(&read(&bytes[..cut])));
        }

        #[test]
        fn any_number_is_in_range_or_said(
            key in prop::sample::select(KEYS.iter().collect::<Vec<_>>()),
            number in prop_oneof![any::<f64>().prop_map(|x| format!("{x:?}")), any::<i64>().prop_map(|x| x.to_string())],
        ) {
            let (section, name) = key.split();
            let result = read(format!("[{section}]\n{name} = {number}\n").as_bytes());
            prop_assert!(is_said(&result));
            let training = result.ok().map(|resolved| resolved.settings().training());
            prop_assert!(training.is_none_or(|training| training.check().is_ok() || key.name == "train.accumulate"));
        }
    }

    #[test]
    fn long_values_are_shortened() {
        assert_eq!(shortened("short"), "short");
        let long = "é".repeat(150);
        assert_eq!(shortened(&long), format!("{}... (300 bytes)", "é".repeat(100)));
    }
}

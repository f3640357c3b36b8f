//! Checkpoints: everything that resume needs, whole or not at all.
//!
//! ```text
//! state/last                         name of the newest, for people and scripts
//! state/best                         name of the best so far
//! state/step-00012000/manifest.json  name, size and CRC-32 of the files below
//!                     state.json     progress and configuration
//!                     weights.safetensors    parameters (the master copy) and running statistics
//!                     velocity.safetensors   momenta
//! ```
//! A checkpoint is written under another name, flushed to the disk and renamed, so that one that is there is complete.
//! What was damaged later is found by size and checksum, and the one before is taken.

use crate::durable::{self, create_folder, names, write_file, write_flushed};
use crate::error::{Error, Result, reading, writing};
use crate::network::Network;
use crate::parameters::Table;
use crate::tensor_file::{TensorFile, serialize};
use crate::train_config::MAX_STEPS;
use crate::trainer::MAX_SKIPPED_IN_A_ROW;
use crate::transfer::download;
use crate::weights::restore;
use selfie_kernels::{Backend, Element, Wide};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// Where training stands.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Steps taken, skipped ones included.
    pub step: u64,
    /// Time they took, evaluation included.
    pub seconds: f64,
    /// Steps whose update was not applied, because it was not finite.
    pub skipped: u64,
    /// How many of them came last, without a good one after.
    pub skipped_in_a_row: u32,
    /// Seed of the run.
    pub seed: u64,
}

/// The checkpoints of a run: the newest few, and the best.
#[derive(Debug, Clone)]
pub struct CheckpointStore {
    folder: PathBuf,
    keep: usize,
}

/// A checkpoint that was read and found undamaged.
#[derive(Debug)]
pub struct Checkpoint<W> {
    /// Its folder.
    pub folder: PathBuf,
    /// Where training stood.
    pub progress: Progress,
    /// The run's configuration at that time.
    pub config: Value,
    weights: TensorFile<W>,
    velocity: TensorFile<W>,
}

/// The newest undamaged checkpoint of a run.
#[derive(Debug)]
pub struct Newest<W> {
    /// The checkpoint.
    pub checkpoint: Checkpoint<W>,
    /// What is wrong with newer ones that were passed over.
    pub damaged: Vec<Error>,
}

/// A configuration value that is not what it was.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    /// Dotted key, as `train.lr`.
    pub key: String,
    /// In the checkpoint; `null` where it had none.
    pub saved: Value,
    /// Now.
    pub now: Value,
}

/// What a checkpoint is made of.
pub(crate) struct Snapshot<'a, W> {
    pub(crate) progress: Progress,
    pub(crate) config: &'a Value,
    pub(crate) parameters: (&'a Table, &'a [W]),
    pub(crate) statistics: (&'a Table, &'a [W]),
    pub(crate) velocity: &'a [W],
}

const FORMAT: &str = "selfie checkpoint 1";
const MANIFEST: &str = "manifest.json";
const STATE: &str = "state.json";
const WEIGHTS: &str = crate::weights::CHECKPOINT_FILE;
const VELOCITY: &str = "velocity.safetensors";
const FILES: [&str; 3] = [STATE, WEIGHTS, VELOCITY];
const LAST: &str = "last";
const BEST: &str = "best";

/// A training of thirty years.
const MAX_SECONDS: f64 = 1e9;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format: String,
    files: Vec<Listed>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Listed {
    name: String,
    bytes: usize,
    crc32: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    progress: Progress,
    config: Value,
}

impl CheckpointStore {
    /// The checkpoints in `folder` (`state` of a run), of which the last `keep`, at least one, are kept. The folder is
    /// made when the first is saved.
    pub fn new(folder: impl Into<PathBuf>, keep: usize) -> Self {
        Self { folder: folder.into(), keep: keep.max(1) }
    }

    /// Saves a network in training, and removes checkpoints that are too many.
    ///
    /// # Errors
    /// [`Error::Write`]; those of the device.
    pub fn save<B, T, N>(&self, network: &N, progress: Progress, config: &Value) -> Result<PathBuf>
    where
        B: Backend<T>,
        T: Element,
        N: Network<B, T>,
    {
        let (device, parameters, statistics) = (&**network.device(), network.parameters(), network.statistics());
        self.save_snapshot(&Snapshot {
            progress,
            config,
            parameters: (&parameters.table, &download(device, &parameters.master)?),
            statistics: (&statistics.table, &download(device, &statistics.running)?),
            velocity: &download(device, &parameters.velocity)?,
        })
    }

    pub(crate) fn save_snapshot<W: Wide>(&self, snapshot: &Snapshot<'_, W>) -> Result<PathBuf> {
        create_folder(&self.folder)?;
        self.remove_unfinished()?;
        let folder = self.folder_of(snapshot.progress.step);
        // Training is a function of the step: a sound checkpoint of it needs no second writing.
        if read_files(&folder).is_err() {
            let unfinished = durable::unfinished(&folder);
            create_folder(&unfinished)?;
            let mut written = write_files(&unfinished, snapshot);
            if written.is_ok() {
                written = remove(&folder).and_then(|()| durable::rename(&unfinished, &folder));
            }
            if written.is_err() {
                // On a full disk half a checkpoint helps nobody.
                let _ = remove(&unfinished);
            }
            written?;
        }
        write_file(&self.folder.join(LAST), format!("{}\n", folder_name(snapshot.progress.step)).as_bytes())?;
        let best = self.best();
        for (step, folder) in self.list()?.into_iter().rev().skip(self.keep) {
            // One beyond the step just saved is of an earlier history, and goes by the same rule.
            if step != snapshot.progress.step && Some(step) != best {
                remove(&folder)?;
            }
        }
        Ok(folder)
    }

    /// Says that the checkpoint of `step`, which was saved, is the best so far: it is kept until another one is.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn mark_best(&self, step: u64) -> Result<()> {
        write_file(&self.folder.join(BEST), format!("{}\n", folder_name(step)).as_bytes())
    }

    /// The step of the best checkpoint, if one was marked and is there.
    pub fn best(&self) -> Option<u64> {
        let name = fs::read_to_string(self.folder.join(BEST)).ok()?;
        let step = step_of(name.trim_end())?;
        self.folder_of(step).is_dir().then_some(step)
    }

    /// The folder of the checkpoint of `step`, which need not be there.
    pub fn folder_of(&self, step: u64) -> PathBuf {
        self.folder.join(folder_name(step))
    }

    /// Reads the newest checkpoint that is not damaged; `None` when there is none at all.
    ///
    /// # Errors
    /// What is wrong with the newest, when all are damaged.
    pub fn newest<W: Wide>(&self) -> Result<Option<Newest<W>>> {
        let mut damaged = Vec::new();
        for (_, folder) in self.list()?.into_iter().rev() {
            match Checkpoint::read(&folder) {
                Ok(checkpoint) => return Ok(Some(Newest { checkpoint, damaged })),
                Err(error) => damaged.push(error),
            }
        }
        damaged.into_iter().next().map_or(Ok(None), Err)
    }

    /// Steps and folders of the checkpoints, oldest first.
    fn list(&self) -> Result<Vec<(u64, PathBuf)>> {
        let mut list: Vec<_> =
            names(&self.folder)?.iter().filter_map(|name| Some((step_of(name)?, self.folder.join(name)))).collect();
        list.sort_unstable();
        Ok(list)
    }

    /// What a kill left behind in the middle of a save.
    fn remove_unfinished(&self) -> Result<()> {
        for name in names(&self.folder)? {
            if name.starts_with(durable::UNFINISHED) {
                remove(&self.folder.join(name))?;
            }
        }
        Ok(())
    }
}

impl<W: Wide> Checkpoint<W> {
    /// Reads a checkpoint's folder.
    ///
    /// # Errors
    /// [`Error::Read`], or [`Error::Malformed`] with the file that is missing or damaged.
    pub fn read(folder: &Path) -> Result<Self> {
        let [state, weights, velocity] = read_files(folder)?;
        let State { progress, config } = State::parse(&folder.join(STATE), &state)?;
        Ok(Self {
            progress,
            config,
            weights: TensorFile::parse(&folder.join(WEIGHTS), &weights)?,
            velocity: TensorFile::parse(&folder.join(VELOCITY), &velocity)?,
            folder: folder.into(),
        })
    }

    /// Gives the network the parameters, momenta and running statistics of the checkpoint.
    ///
    /// # Errors
    /// [`Error::OtherNetwork`] when a tensor does not fit; the network is then untouched. Those of the device.
    pub fn restore<B, T, N>(&self, network: &mut N) -> Result<()>
    where
        B: Backend<T>,
        T: Element<Wide = W>,
        N: Network<B, T>,
    {
        restore(network, &self.weights, Some(&self.velocity))
    }
}

/// The values that differ between two configurations, by key.
pub fn differences(saved: &Value, now: &Value) -> Vec<Difference> {
    fn compare(key: &str, saved: &Value, now: &Value, found: &mut Vec<Difference>) {
        if let (Value::Object(before), Value::Object(after)) = (saved, now) {
            let keys = before.keys().chain(after.keys().filter(|key| !before.contains_key(*key)));
            for name in keys {
                let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                compare(&key, &saved[name.as_str()], &now[name.as_str()], found);
            }
        } else if saved != now {
            found.push(Difference { key: key.into(), saved: saved.clone(), now: now.clone() });
        }
    }
    let mut found = Vec::new();
    compare("", saved, now, &mut found);
    found
}

fn folder_name(step: u64) -> String {
    format!("step-{step:08}")
}

fn step_of(folder_name: &str) -> Option<u64> {
    folder_name.strip_prefix("step-")?.parse().ok()
}

fn write_files<W: Wide>(folder: &Path, snapshot: &Snapshot<'_, W>) -> Result<()> {
    let mut files = Vec::new();
    let mut write = |name: &str, bytes: Vec<u8>| {
        files.push(Listed { name: name.into(), bytes: bytes.len(), crc32: crc32fast::hash(&bytes) });
        write_flushed(&folder.join(name), &bytes)
    };
    write(STATE, json(&State { progress: snapshot.progress, config: snapshot.config.clone() }))?;
    write(WEIGHTS, serialize(&[snapshot.parameters, snapshot.statistics], |_| true))?;
    write(VELOCITY, serialize(&[(snapshot.parameters.0, snapshot.velocity)], |_| true))?;
    write_flushed(&folder.join(MANIFEST), &json(&Manifest { format: FORMAT.into(), files }))?;
    durable::flush_folder(folder)
}

impl Manifest {
    /// From the contents of `path`. It lists the files of a checkpoint and no others, wherever they may lie.
    fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let manifest: Self = parse(path, bytes)?;
        let names: Vec<_> = manifest.files.iter().map(|file| file.name.as_str()).collect();
        if manifest.format != FORMAT || names != FILES {
            let found = format!("`{}` with {names:?}", manifest.format);
            return Err(Error::malformed(path, format!("`{FORMAT}` with {FILES:?}"), found, ADVICE));
        }
        Ok(manifest)
    }
}

impl State {
    /// From the contents of `path`, with numbers that training can go on from.
    fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let state: Self = parse(path, bytes)?;
        let Progress { step, seconds, skipped, skipped_in_a_row, .. } = state.progress;
        let possible = step <= MAX_STEPS && (0.0..=MAX_SECONDS).contains(&seconds);
        if possible && skipped <= MAX_STEPS && skipped_in_a_row <= MAX_SKIPPED_IN_A_ROW {
            return Ok(state);
        }
        let expected = format!(
            "at most {MAX_STEPS} steps in 0 to {MAX_SECONDS} seconds, at most {MAX_SKIPPED_IN_A_ROW} skipped in a row"
        );
        Err(Error::malformed(path, expected, format!("{:?}", state.progress), ADVICE))
    }
}

/// The files of a checkpoint, in the order of [`FILES`], each as the manifest says.
fn read_files(folder: &Path) -> Result<[Vec<u8>; 3]> {
    let path = folder.join(MANIFEST);
    let manifest = Manifest::parse(&path, &fs::read(&path).map_err(reading(&path))?)?;
    let mut contents = [const { Vec::new() }; 3];
    for (listed, contents) in manifest.files.iter().zip(&mut contents) {
        let path = folder.join(&listed.name);
        *contents = fs::read(&path).map_err(reading(&path))?;
        let found = (contents.len(), crc32fast::hash(contents));
        if found != (listed.bytes, listed.crc32) {
            let say = |(bytes, crc32): (usize, u32)| format!("{bytes} bytes with CRC-32 {crc32:08x}");
            return Err(Error::malformed(&path, say((listed.bytes, listed.crc32)), say(found), ADVICE));
        }
    }
    Ok(contents)
}

const ADVICE: &str = "the checkpoint is damaged: copy it again from where it came, or remove its folder";

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec_pretty(value).expect("plain structures with string keys")
}

fn parse<'a, S: Deserialize<'a>>(path: &Path, bytes: &'a [u8]) -> Result<S> {
    serde_json::from_slice(bytes)
        .map_err(|error| Error::malformed(path, "the JSON of a checkpoint", format!("`{error}`"), ADVICE))
}

/// Removes a folder or a file, if it is there. A folder loses its name first: half of one must not look like all.
fn remove(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(about) if about.is_dir() => {
            let _ = fs::remove_file(path.join(MANIFEST));
            fs::remove_dir_all(path)
        }
        Ok(_) => fs::remove_file(path),
    };
    removed.map_err(writing(path))
}

#[cfg(fuzzing)]
pub(crate) fn parse_manifest_and_state(bytes: &[u8]) {
    let _ = Manifest::parse(Path::new(MANIFEST), bytes);
    if let Ok(State { progress, config }) = State::parse(Path::new(STATE), bytes) {
        let training = crate::TrainConfig::default();
        let seconds = std::time::Duration::from_secs_f64(progress.seconds);
        assert!(training.schedule(50_000).rate(progress.step, seconds) <= training.lr);
        assert!(differences(&config, &config).is_empty());
        differences(&config, &Value::Null);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::parameters::{ALIGNMENT, Layout};
    use serde_json::json;

    struct Net {
        parameters: Table,
        statistics: Table,
    }

    fn net() -> Net {
        let mut net = Net { parameters: Table::default(), statistics: Table::default() };
        net.parameters.push("stem.conv.weight", &[2, 3, 1, 1], Layout::Filter);
        net.parameters.push_behind("norm.weight", &[2], Layout::Plain);
        net.statistics.push("norm.running_mean", &[2], Layout::Plain);
        net
    }

    /// A buffer of so many numbers, and zeros to its end.
    fn numbers(len: usize, first: f32) -> Vec<f32> {
        let mut numbers: Vec<f32> = (0..len).map(|i| first + i as f32 / 3.0).collect();
        numbers.resize(len.next_multiple_of(ALIGNMENT), 0.0);
        numbers
    }

    fn save(store: &CheckpointStore, step: u64) -> PathBuf {
        let net = net();
        let progress = Progress { step, seconds: 0.1, skipped: 2, skipped_in_a_row: 1, seed: u64::MAX };
        let snapshot = Snapshot {
            progress,
            config: &json!({ "train": { "lr": 0.1 } }),
            parameters: (&net.parameters, &numbers(8, step as f32)),
            statistics: (&net.statistics, &numbers(2, -1.0)),
            velocity: &numbers(8, 0.5),
        };
        store.save_snapshot(&snapshot).expect("a writable folder")
    }

    fn newest_step(store: &CheckpointStore) -> u64 {
        store.newest::<f32>().expect("one is sound").expect("there are some").checkpoint.progress.step
    }

    #[test]
    fn what_was_saved_is_read() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = CheckpointStore::new(folder.path().join("state"), 2);
        assert!(store.newest::<f32>().expect("no folder is no error").is_none());
        let saved = save(&store, 12_000);
        assert_eq!(saved, folder.path().join("state/step-00012000"));
        let Newest { checkpoint, damaged } = store.newest::<f32>().expect("sound").expect("there");
        assert!(damaged.is_empty());
        let progress = Progress { step: 12_000, seconds: 0.1, skipped: 2, skipped_in_a_row: 1, seed: u64::MAX };
        assert_eq!(checkpoint.progress, progress);
        assert_eq!(checkpoint.config, json!({ "train": { "lr": 0.1 } }));
        let net = net();
        assert_eq!(checkpoint.weights.flat(&net.parameters).expect("same table"), numbers(8, 12_000.0));
        assert_eq!(checkpoint.velocity.flat(&net.parameters).expect("same table"), numbers(8, 0.5));
        assert_eq!(checkpoint.weights.flat(&net.statistics).expect("same table"), numbers(2, -1.0));
    }

    #[test]
    fn the_last_ones_are_kept() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = CheckpointStore::new(folder.path(), 2);
        for step in [1, 2, 30] {
            save(&store, step);
        }
        let names = names(folder.path()).expect("readable");
        assert_eq!(names, ["last", "step-00000002", "step-00000030"]);
        assert_eq!(fs::read_to_string(folder.path().join("last")).expect("written"), "step-00000030\n");
    }

    #[test]
    fn the_best_one_is_kept() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = CheckpointStore::new(folder.path(), 1);
        assert_eq!(store.best(), None);
        save(&store, 1);
        store.mark_best(1).expect("writable");
        for step in [2, 3] {
            save(&store, step);
        }
        assert_eq!((store.best(), newest_step(&store)), (Some(1), 3));
        store.mark_best(3).expect("writable");
        save(&store, 4);
        assert_eq!(names(folder.path()).expect("readable"), ["best", "last", "step-00000003", "step-00000004"]);
        fs::write(folder.path().join(BEST), "step-00000009\n").expect("writable");
        assert_eq!(store.best(), None, "not there");
        fs::write(folder.path().join(BEST), [0xff, 0]).expect("writable");
        assert_eq!(store.best(), None, "no name");
    }

    #[test]
    fn an_unfinished_one_is_none_and_goes() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = CheckpointStore::new(folder.path(), 2);
        let saved = save(&store, 1);
        let killed = folder.path().join(".unfinished-step-00000002");
        fs::create_dir(&killed).expect("writable");
        fs::copy(saved.join(STATE), killed.join(STATE)).expect("writable");
        assert_eq!(newest_step(&store), 1);
        save(&store, 2);
        assert!(!killed.exists());
        assert_eq!(newest_step(&store), 2);
    }

    /// A bit of every byte of every file, every file cut by a byte or emptied, and every file missing.
    #[test]
    fn damage_is_recognised_wherever_it_is() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let saved = save(&CheckpointStore::new(folder.path(), 2), 7);
        let refuse = |path: &Path, what: &str| {
            let error = Checkpoint::<f32>::read(&saved).expect_err(what);
            let text = error.to_string();
            assert_eq!(error.kind(), ErrorKind::Input, "{text}");
            assert!(text.contains(&saved.display().to_string()), "{what} of {}: {text}", path.display());
        };
        for name in FILES.into_iter().chain([MANIFEST]) {
            let path = saved.join(name);
            let sound = fs::read(&path).expect("written");
            let mut bytes = sound.clone();
            for byte in 0..sound.len() {
                bytes[byte] ^= 1 << (byte % 8);
                fs::write(&path, &bytes).expect("writable");
                refuse(&path, &format!("a bit of byte {byte}"));
                bytes[byte] = sound[byte];
            }
            for len in [0, sound.len() - 1] {
                fs::write(&path, &sound[..len]).expect("writable");
                refuse(&path, &format!("{len} bytes"));
            }
            fs::remove_file(&path).expect("there");
            refuse(&path, "absence");
            fs::write(&path, &sound).expect("writable");
            Checkpoint::<f32>::read(&saved).expect("sound again");
        }
    }

    #[test]
    fn a_manifest_names_the_files_of_a_checkpoint_and_no_others() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let saved = save(&CheckpointStore::new(folder.path(), 2), 7);
        let path = saved.join(MANIFEST);
        let sound = fs::read_to_string(&path).expect("written");
        for (from, to) in [
            (WEIGHTS, "../../../../etc/passwd"),
            (WEIGHTS, "/etc/passwd"),
            (WEIGHTS, STATE),
            (FORMAT, "selfie checkpoint 2"),
        ] {
            fs::write(&path, sound.replacen(from, to, 1)).expect("writable");
            let error = Checkpoint::<f32>::read(&saved).expect_err(to);
            assert_eq!(error.kind(), ErrorKind::Input);
            assert!(error.to_string().contains("manifest.json: expected `selfie checkpoint 1` with"), "{error}");
        }
    }

    #[test]
    fn impossible_progress_is_damage() {
        let refused = |progress: Value| {
            let state = json!({ "progress": progress, "config": {} });
            let bytes = serde_json::to_vec(&state).expect("plain values");
            State::parse(Path::new(STATE), &bytes).err().map(|error| error.to_string())
        };
        let progress = |step: u64, seconds: f64, in_a_row: u32| {
            refused(json!({ "step": step, "seconds": seconds, "skipped": 3, "skipped_in_a_row": in_a_row, "seed": 0 }))
        };
        assert_eq!(progress(1 << 40, 1e9, 2), None);
        for impossible in [
            progress(u64::MAX, 1.0, 0),
            progress(1, -1.0, 0),
            progress(1, 1e300, 0),
            progress(1, f64::NAN, 0),
            progress(1, 1.0, u32::MAX),
            refused(json!({ "step": -1, "seconds": 0.0, "skipped": 0, "skipped_in_a_row": 0, "seed": 0 })),
            refused(json!([])),
        ] {
            assert!(impossible.expect("refused").starts_with("state.json: expected"));
        }
    }

    #[test]
    fn the_one_before_a_damaged_one_is_taken() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = CheckpointStore::new(folder.path(), 2);
        let [first, second] = [10, 20].map(|step| save(&store, step));
        fs::write(second.join(VELOCITY), b"cut").expect("writable");
        let newest = store.newest::<f32>().expect("one is sound").expect("there are two");
        assert_eq!(newest.checkpoint.progress.step, 10);
        let message = newest.damaged[0].to_string();
        assert!(message.contains("step-00000020") && message.contains("3 bytes"), "{message}");

        // Training comes to the same step again.
        save(&store, 20);
        assert_eq!(newest_step(&store), 20);

        for folder in [first, second] {
            fs::remove_file(folder.join(MANIFEST)).expect("there");
        }
        let none_sound = store.newest::<f32>().expect_err("both are damaged").to_string();
        assert!(none_sound.contains("step-00000020"), "{none_sound}");
    }

    #[test]
    fn differences_have_dotted_keys() {
        let saved = json!({ "train": { "lr": 0.1, "steps": 5 }, "model": { "depths": [1, 2] } });
        let now = json!({ "train": { "lr": 0.2, "epochs": 1 }, "model": { "depths": [1, 2] } });
        let found: Vec<_> = differences(&saved, &now)
            .into_iter()
            .map(|Difference { key, saved, now }| format!("{key}: {saved}, {now}"))
            .collect();
        assert_eq!(found, ["train.lr: 0.1, 0.2", "train.steps: 5, null", "train.epochs: null, 1"]);
        assert!(differences(&saved, &saved).is_empty());
    }
}

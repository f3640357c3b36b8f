//! Tables of kernels: which one is the fastest of several that do the same, as `bench --tune` measured it on a GPU. They lie in
//! the user's cache folder, each for one GPU, driver and version of this program; a run keeps a copy of the one it began with.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use selfie_kernels::Cuda;
use selfie_kernels::cuda::{self, Choices, Misfit};
use selfie_model::durable;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::screen;

/// The copy that a run keeps.
pub const OF_A_RUN: &str = "choices.toml";

/// Tables that the program carries, each for a GPU of which there is none in the user's cache folder: of those that were measured,
/// and none has been yet.
const SHIPPED: [&str; 0] = [];

/// What a file of this program may be long at most; a table of all shapes of a ResNet-50 is 20 KiB.
const MOST_BYTES: u64 = 4 << 20;

/// Where a table was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// Name of the GPU and how many multiprocessors it has.
    pub gpu: String,
    /// CUDA version of its driver.
    pub driver: String,
    /// Version of this program.
    pub selfie: String,
}

/// A table: by pass and shape, the variant that was the fastest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// Where it was measured.
    pub measured: Place,
    /// By pass and shape, as [`selfie_kernels::Choice`] has them.
    #[serde(default)]
    pub passes: BTreeMap<String, BTreeMap<String, String>>,
}

/// A table that is there, or why there is none.
#[derive(Debug)]
pub enum Found {
    /// It is there and is of this place.
    Table(Table),
    /// There is no file.
    None,
    /// There is a file that cannot be used; what is wrong with it, in a line.
    Ignored(String),
}

impl Place {
    /// Where a device is.
    pub fn of(cuda: &Cuda) -> Self {
        let facts = cuda.facts();
        let driver = match cuda::probe() {
            Ok(probe) => format!("CUDA {}.{}", probe.driver / 1000, probe.driver % 1000 / 10),
            Err(_) => "none".into(),
        };
        Self {
            gpu: format!("{}, {} multiprocessors", facts.name, facts.multiprocessors),
            driver,
            selfie: env!("CARGO_PKG_VERSION").into(),
        }
    }

    /// The name of its table.
    pub fn name(&self) -> String {
        let Self { gpu, driver, selfie } = self;
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c.to_ascii_lowercase() } else { '-' };
        let name: String = format!("{gpu} {driver} selfie {selfie}").chars().map(plain).collect();
        name.split('-').filter(|word| !word.is_empty()).collect::<Vec<_>>().join("-")
    }

    /// The file of its table.
    ///
    /// # Errors
    /// Neither `XDG_CACHE_HOME` nor a home folder is known.
    pub fn file(&self) -> anyhow::Result<PathBuf> {
        let caches = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|folder| folder.is_absolute());
        let caches = caches.or_else(|| Some(std::env::home_dir()?.join(".cache")));
        let caches = caches.context("no folder for tables of kernels: set XDG_CACHE_HOME to one")?;
        Ok(caches.join("selfie/choices").join(self.name() + ".toml"))
    }
}

impl Table {
    /// Without an entry.
    pub fn empty(measured: Place) -> Self {
        Self { measured, passes: BTreeMap::new() }
    }

    /// The table of a device: in the user's cache folder, or one that is carried for such GPUs.
    pub fn of(cuda: &Cuda) -> Found {
        let here = Place::of(cuda);
        match here.file().map_or(Found::None, |file| read(&file)) {
            Found::None => Self::carried(&SHIPPED, &here.gpu).map_or(Found::None, Found::Table),
            Found::Table(table) if table.measured != here => Found::Ignored(format!(
                "the one of this name is of {}, here is {}: measure anew by selfie bench --tune",
                table.measured.in_words(),
                here.in_words()
            )),
            found => found,
        }
    }

    /// Of tables in TOML the one for a GPU.
    fn carried(tables: &[&str], gpu: &str) -> Option<Self> {
        tables.iter().filter_map(|table| toml::from_str::<Self>(table).ok()).find(|table| table.measured.gpu == gpu)
    }

    /// The table that a run keeps, in its folder. Another GPU computes other bits in any case, so the run goes on by the rules
    /// there; with another driver or version it goes on with its table.
    pub fn of_run(folder: &Path, cuda: &Cuda) -> Found {
        let (file, here) = (folder.join(OF_A_RUN), Place::of(cuda));
        match read(&file) {
            Found::Table(table) if table.measured.gpu != here.gpu => {
                Found::Ignored(format!("{} is of {}, here is {}", file.display(), table.measured.gpu, here.gpu))
            }
            found => found,
        }
    }

    /// How many entries it has.
    pub fn len(&self) -> usize {
        self.passes.values().map(BTreeMap::len).sum()
    }

    /// The same device, with kernels by this table.
    pub fn applied(&self, cuda: &Cuda) -> Cuda {
        cuda.with_choices(Choices::Table(self.passes.clone()), |Misfit { pass, shape, named }| {
            screen::line(format!(
                "note: the table of kernels names {named:?} for {pass} of {shape}, which is no kernel for it: the rule's is \
                 taken, and so wherever else it does not fit"
            ));
        })
    }

    /// As a file has it.
    pub fn as_toml(&self) -> String {
        let head = "# Kernels that were measured to be the fastest, by selfie bench --tune. What is not here is left to the \
                    program's rules.\n\n";
        head.to_owned() + &toml::to_string(self).expect("words and tables of words are TOML")
    }

    /// Writes it where [`Table::of`] looks.
    ///
    /// # Errors
    /// No place for it, what the system refuses.
    pub fn write(&self) -> anyhow::Result<PathBuf> {
        let file = self.measured.file()?;
        if let Some(folder) = file.parent() {
            durable::create_folder(folder)?;
        }
        durable::write_file(&file, self.as_toml().as_bytes())?;
        Ok(file)
    }

    /// For `env.json`: its name, how long it is, and a checksum of its file as a run keeps it.
    pub fn about(&self) -> Value {
        let crc32 = crc32fast::hash(self.as_toml().as_bytes());
        json!({ "name": self.measured.name(), "entries": self.len(), "crc32": crc32 })
    }
}

impl Place {
    fn in_words(&self) -> String {
        format!("{}, {}, selfie {}", self.gpu, self.driver, self.selfie)
    }
}

fn read(file: &Path) -> Found {
    let read = || -> anyhow::Result<Option<Table>> {
        match fs::metadata(file) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            // A pipe would have no end.
            Ok(about) if !about.is_file() => return Err(anyhow!("it is no file")),
            Ok(about) if about.len() > MOST_BYTES => return Err(anyhow!("{} bytes, more than any table", about.len())),
            _ => {}
        }
        // Of the parser's words the first line says where; the others draw it.
        let broken = |error: toml::de::Error| anyhow!("{}", error.message());
        toml::from_str(&fs::read_to_string(file)?).map(Some).map_err(broken)
    };
    match read() {
        Ok(Some(table)) => Found::Table(table),
        Ok(None) => Found::None,
        Err(error) => Found::Ignored(format!("{} is no table of kernels: {error:#}", file.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let measured = Place {
            gpu: "NVIDIA RTX 6000 (Ada), 142 multiprocessors".into(),
            driver: "CUDA 12.8".into(),
            selfie: "1.2.3".into(),
        };
        let shapes = BTreeMap::from([("bf16 1x1 64->64 at 8x8, 4 images".into(), "gather_wide".into())]);
        Table { measured, passes: BTreeMap::from([("norm_relu_conv_forward".into(), shapes)]) }
    }

    #[test]
    fn a_table_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join(OF_A_RUN);
        assert!(matches!(read(&file), Found::None));
        fs::write(&file, table().as_toml()).expect("written");
        assert!(matches!(read(&file), Found::Table(read) if read == table()));
        assert_eq!(table().len(), 1);
        let (ours, gpu) = (table().as_toml(), table().measured.gpu);
        assert_eq!(Table::carried(&["of another kind", &ours], &gpu), Some(table()));
        assert_eq!(Table::carried(&[&ours], "NVIDIA H200, 132 multiprocessors"), None);
        assert_eq!(table().measured.name(), "nvidia-rtx-6000-ada-142-multiprocessors-cuda-12.8-selfie-1.2.3");
    }

    #[test]
    fn a_broken_file_is_said_in_a_line() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join(OF_A_RUN);
        let whole = table().as_toml();
        for broken in [b"\xff\xfe".to_vec(), whole[..whole.len() - 4].into(), b"a = 1".to_vec(), b"".to_vec()] {
            fs::write(&file, &broken).expect("written");
            let Found::Ignored(why) = read(&file) else { panic!("{broken:?} is taken for a table") };
            assert!(why.contains(OF_A_RUN) && !why.contains('\n'), "{why}");
        }
        fs::File::create(&file).and_then(|file| file.set_len(MOST_BYTES + 1)).expect("a large file");
        assert!(matches!(read(&file), Found::Ignored(_)));
        fs::remove_file(&file).and_then(|()| fs::create_dir(&file)).expect("a folder");
        assert!(matches!(read(&file), Found::Ignored(why) if why.ends_with("it is no file")));
    }
}

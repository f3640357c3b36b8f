//! WebDataset: tar shards of samples, <https://github.com/webdataset/webdataset>.
//!
//! A member's key is its name up to the first dot after the last slash, what follows is its
//! extension. Members with one key, one after the other, are a sample: the first one with the
//! extension of an image, and `.cls`, a whole number. Shards are told apart by their names and those
//! of their folders: a word `val` (or `test`) makes them the held-out part, all others are for
//! training. Headers and labels are read when the data are opened; images when they are asked for,
//! by any thread.

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::dataset::{Dataset, Geometry, Need, Split};
use crate::error::{Error, Result, reading};
use crate::folder::{EXTENSIONS, is_image};
use crate::left_out::LeftOut;
use crate::names;
use crate::parts::{self, Role};
use crate::picture::{Image, check_size};
use crate::tar_index::{self, Index, Member, read_exact_at};
use crate::tree::{Extent, is_hidden};

/// Files of class names, one a line.
const NAMES: [&str; 2] = ["classes.txt", "classnames.txt"];

/// Above this a `.cls` is taken for something else.
const MAX_CLASSES: u64 = 1 << 16;

/// Shards that braces may stand for; ImageNet-21k has 2,048.
const MAX_SHARDS: usize = 100_000;

/// Digits of a shard's number, leading zeros included: as many as 2^64 has.
const MAX_DIGITS: usize = 20;

/// Folders in folders that shards are looked for in.
const MAX_DEPTH: usize = 3;

/// One image.
struct Sample {
    shard: u32,
    extent: Extent,
    label: Option<u32>,
    /// Its image's name in the shard, with `/`.
    name: String,
}

/// What a shard holds.
#[derive(Default)]
struct Shard {
    samples: Vec<Sample>,
    /// Samples without an image, by what they have instead.
    without_image: LeftOut,
    /// Links that lead to no file.
    links: usize,
}

/// Image samples in tar shards.
pub(crate) struct Shards {
    origin: PathBuf,
    shards: Vec<PathBuf>,
    /// What the paths of all shards begin with.
    common: PathBuf,
    samples: Vec<Sample>,
    classes: Vec<String>,
    without_image: LeftOut,
    links: usize,
}

/// The shards of a folder, and of folders in it, that holds nothing else (but text beside them), sorted by name.
pub(crate) fn in_folder(folder: &Path) -> Result<Option<Vec<PathBuf>>> {
    let mut shards = Vec::new();
    let only_shards = collect(folder, MAX_DEPTH, &mut shards)?;
    shards.sort();
    Ok((only_shards && !shards.is_empty()).then_some(shards))
}

/// Collects the tars of a folder; whether there are no images, and no folders below `depth` levels, beside them.
fn collect(folder: &Path, depth: usize, shards: &mut Vec<PathBuf>) -> Result<bool> {
    let mut folders = Vec::new();
    for entry in fs::read_dir(folder).map_err(reading(folder))? {
        let path = entry.map_err(reading(folder))?.path();
        if path.file_name().is_some_and(is_hidden) {
            continue;
        }
        if path.is_dir() {
            folders.push(path);
        } else if is_image(&path) {
            return Ok(false);
        } else if path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("tar")) {
            shards.push(path);
        }
    }
    for folder in folders {
        if depth == 0 || !collect(&folder, depth - 1, shards)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The paths that a pattern such as `train-{000..127}.tar` or `{train,val}-{0..9}.tar` stands for;
/// `None` without braces.
///
/// # Errors
/// [`Error::Usage`] for braces that are neither a range nor a list.
pub(crate) fn expand(pattern: &str) -> Result<Option<Vec<PathBuf>>> {
    let wrong = || {
        let expected = format!("braces such as {{000..127}} or {{train,val}}, for at most {MAX_SHARDS} shards");
        Error::usage("data", pattern, expected)
    };
    if !pattern.contains('{') {
        return Ok(None);
    }
    let mut done = vec![String::new()];
    let mut rest = pattern;
    while let Some((before, after)) = rest.split_once('{') {
        let (inside, after) = after.split_once('}').ok_or_else(wrong)?;
        let choices: Vec<String> = match inside.split_once("..") {
            Some((first, last)) => {
                let number = |text: &str| {
                    text.parse::<usize>().ok().filter(|_| !text.starts_with('+') && text.len() <= MAX_DIGITS)
                };
                let (low, high) = (number(first).ok_or_else(wrong)?, number(last).ok_or_else(wrong)?);
                if high < low || high - low >= MAX_SHARDS {
                    return Err(wrong());
                }
                (low..=high).map(|number| format!("{number:0width$}", width = first.len())).collect()
            }
            None if inside.contains(',') => inside.split(',').map(String::from).collect(),
            None => return Err(wrong()),
        };
        if done.len().checked_mul(choices.len()).is_none_or(|count| count > MAX_SHARDS) {
            return Err(wrong());
        }
        let join = |start: &String| choices.iter().map(|end| format!("{start}{before}{end}")).collect::<Vec<_>>();
        done = done.iter().flat_map(join).collect();
        rest = after;
    }
    Ok(Some(done.into_iter().map(|start| PathBuf::from(format!("{start}{rest}"))).collect()))
}

/// Whether a tar holds samples, and not a folder of images.
pub(crate) fn is_shard(index: &Index) -> bool {
    index.files().any(|member| member.path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("cls")))
}

/// The folder that all shards lie in: what it is called says nothing of one of them.
fn common_folder(shards: &[PathBuf]) -> PathBuf {
    let mut common = shards.first().and_then(|shard| shard.parent()).map(Path::to_path_buf).unwrap_or_default();
    while !shards.iter().all(|shard| shard.starts_with(&common)) && common.pop() {}
    common
}

impl Shards {
    /// `origin` is what was given, for messages; `shards` are not empty.
    pub(crate) fn open(origin: &Path, shards: Vec<PathBuf>, split: Split, need: Need) -> Result<Self> {
        let common = common_folder(&shards);
        let role = |path: &PathBuf| {
            parts::of_shard(path.strip_prefix(&common).unwrap_or(path)).map_err(|found| {
                let advice = "give shards and their folders the name of one part";
                Error::malformed(origin, "shards of one part, by their names and folders", found, advice)
            })
        };
        let roles = shards.iter().map(role).collect::<Result<Vec<Role>>>()?;
        // A folder that is itself called `val` is its own test part.
        let is_test = parts::is_held_out(common.file_name()) && roles.iter().all(|role| *role == Role::Train);
        let held_out = match [Role::Val, Role::Test].into_iter().find(|role| roles.contains(role)) {
            None if is_test => Some(Role::Train),
            found => found,
        };
        let is_chosen = |role: Role| match split {
            Split::Train => role == Role::Train,
            Split::Test => Some(role) == held_out,
        };
        if !roles.iter().any(|role| is_chosen(*role)) {
            return Err(match split {
                Split::Test => {
                    let found = format!("{} shards, none of them called val or test", shards.len());
                    Error::NoTestPart { path: origin.into(), found }
                }
                Split::Train => Error::malformed(
                    origin,
                    "shards to train on, such as train-000000.tar",
                    format!("only {}", if held_out == Some(Role::Val) { "val" } else { "test" }),
                    "give the shards of both parts",
                ),
            });
        }
        // All shards are looked through, so that both parts have the same classes.
        let (mut samples, mut without_image, mut links) = (Vec::new(), LeftOut::default(), 0);
        let (mut top, mut unlabelled) = (None, None);
        let mut kept = Vec::new();
        for (path, role) in shards.into_iter().zip(roles) {
            let shard = index(&path, kept.len() as u32)?;
            top = top.max(shard.samples.iter().filter_map(|sample| sample.label).max());
            if !is_chosen(role) {
                continue;
            }
            if let Some(sample) = shard.samples.iter().find(|sample| sample.label.is_none()) {
                unlabelled.get_or_insert_with(|| (path.clone(), sample.name.clone()));
            }
            without_image.append(shard.without_image);
            links += shard.links;
            samples.extend(shard.samples);
            kept.push(path);
        }
        if samples.is_empty() || u32::try_from(samples.len()).is_err() {
            let without = match without_image.count() {
                0 => "none without an image".into(),
                count => format!("{count} without an image ({})", without_image.kinds().join(", ")),
            };
            return Err(Error::malformed(
                origin,
                format!("samples with an image ({}), at least 1 and fewer than 2^32", EXTENSIONS.join(" ")),
                format!("{}, and {without}", samples.len()),
                "give tar shards as WebDataset writes them",
            ));
        }
        let classes = match (unlabelled, need) {
            (None, _) => class_names(&kept[0], &common, top)?,
            (Some((path, name)), Need::Labels | Need::Scoring) => {
                return Err(Error::malformed(
                    path,
                    "a label (.cls) for every image",
                    format!("none for {name}"),
                    "add it, or leave the sample out",
                ));
            }
            (Some(_), Need::Images) => {
                samples.iter_mut().for_each(|sample| sample.label = None);
                Vec::new()
            }
        };
        Ok(Self { origin: origin.into(), shards: kept, common, samples, classes, without_image, links })
    }
}

/// The samples of a shard.
fn index(path: &Path, number: u32) -> Result<Shard> {
    let file = File::open(path).map_err(reading(path))?;
    let mut shard = Shard::default();
    let mut seen: HashSet<String> = HashSet::new();
    let mut current = Pending::default();
    let members = tar_index::index(path, &file)?;
    shard.links = members.other_links();
    for member in members.files() {
        let (key, extension) = key(&member.path);
        // Hidden files are by-products of packing.
        if key.rsplit('/').next() == Some("") {
            continue;
        }
        if current.key.as_ref() != Some(&key) {
            current.finish(&mut shard);
            let wrong = |found: String| {
                Error::malformed(path, "the members of a sample one after the other", found, "sort the shard by name")
            };
            if !seen.insert(key.clone()) {
                return Err(wrong(format!("{key} again after others")));
            }
            current.key = Some(key);
        }
        let twice = |what: &str| {
            let found = format!("two of {}", member.path.display());
            Error::malformed(path, format!("one {what} per sample"), found, "give samples keys of their own")
        };
        if !current.extensions.insert(extension.clone()) {
            return Err(twice(&format!(".{extension}")));
        }
        if EXTENSIONS.contains(&extension.as_str()) && current.image.is_none() {
            current.image =
                Some(Sample { shard: number, extent: member.extent, label: None, name: names::key(&member.path) });
        } else if extension == "cls" {
            current.label = Some(label(path, &file, &member)?);
        }
    }
    current.finish(&mut shard);
    Ok(shard)
}

/// A sample whose members are still coming.
#[derive(Default)]
struct Pending {
    key: Option<String>,
    extensions: BTreeSet<String>,
    image: Option<Sample>,
    label: Option<u32>,
}

impl Pending {
    fn finish(&mut self, shard: &mut Shard) {
        let Pending { key, extensions, image, label } = std::mem::take(self);
        match image {
            Some(sample) => shard.samples.push(Sample { label, ..sample }),
            None if key.is_some() => {
                // What could be a picture comes before what tells of one.
                let about = |ending: &&String| {
                    ending.rsplit('.').next().is_some_and(|last| ["cls", "json", "txt"].contains(&last))
                };
                let ending = extensions.iter().find(|ending| !about(ending)).or(extensions.iter().next());
                shard
                    .without_image
                    .add(ending.map_or_else(|| "without extension".into(), |ending| format!(".{ending}")));
            }
            None => {}
        }
    }
}

/// The name up to the first dot after the last slash, and what follows, in lower case.
fn key(path: &Path) -> (String, String) {
    let name = names::key(path);
    let start = name.rfind('/').map_or(0, |slash| slash + 1);
    match name[start..].find('.') {
        Some(dot) => (name[..start + dot].to_string(), name[start + dot + 1..].to_lowercase()),
        None => (name, String::new()),
    }
}

/// The number in a `.cls` member.
fn label(path: &Path, file: &File, member: &Member) -> Result<u32> {
    let wrong = |found: String| {
        let expected = format!("a whole number below {MAX_CLASSES} in {}", member.path.display());
        Error::malformed(path, expected, found, "write the class as a number in ASCII")
    };
    let bytes = member.extent.bytes;
    if bytes > 20 {
        return Err(wrong(format!("{bytes} bytes")));
    }
    let mut bytes = vec![0; bytes as usize];
    read_exact_at(file, &mut bytes, member.extent.offset).map_err(reading(path))?;
    let text = String::from_utf8_lossy(&bytes);
    let number = text.trim_ascii().parse::<u64>().ok().filter(|number| *number < MAX_CLASSES);
    number.map(|number| number as u32).ok_or_else(|| wrong(format!("`{}`", text.escape_default())))
}

/// Names from a file beside the shards, or in the folder that all lie in; or numbers up to the highest label.
fn class_names(shard: &Path, common: &Path, top: Option<u32>) -> Result<Vec<String>> {
    let count = top.map_or(0, |top| top as usize + 1);
    let folders = [shard.parent().unwrap_or(Path::new("")), common];
    let mut paths = folders.iter().flat_map(|folder| NAMES.iter().map(move |name| folder.join(name)));
    let Some(path) = paths.find(|path| path.is_file()) else {
        return Ok((0..count).map(|class| class.to_string()).collect());
    };
    let text = fs::read_to_string(&path).map_err(reading(&path))?;
    let names: Vec<String> = text.lines().map(|line| line.trim().to_string()).filter(|line| !line.is_empty()).collect();
    if names.len() < count {
        return Err(Error::malformed(
            path,
            format!("a name for each of at least {count} classes, one a line"),
            names.len().to_string(),
            "add the missing ones, or remove the file",
        ));
    }
    Ok(names)
}

impl Dataset for Shards {
    fn len(&self) -> usize {
        self.samples.len()
    }

    fn describe(&self) -> String {
        let labels = match self.classes.len() {
            0 => "no classes".to_string(),
            count => format!("{count} classes"),
        };
        let mut without = match self.without_image.count() {
            0 => String::new(),
            count => format!("; {count} without an image left out: {}", self.without_image.kinds().join(", ")),
        };
        if self.links > 0 {
            without = format!("{without}; {} links that lead to no file left out", self.links);
        }
        let (images, shards) = (self.len(), self.shards.len());
        format!("WebDataset, {shards} shards, {images} images, {labels} ({}){without}", self.origin.display())
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> Option<u32> {
        self.samples[index].label
    }

    fn geometry(&self) -> Geometry {
        Geometry::Variable
    }

    fn key(&self, index: usize) -> String {
        let sample = &self.samples[index];
        let shard = &self.shards[sample.shard as usize];
        format!("{}/{}", names::key(shard.strip_prefix(&self.common).unwrap_or(shard)), sample.name)
    }

    fn check_there(&self) -> Result<()> {
        self.shards.iter().try_for_each(|shard| std::fs::metadata(shard).map(|_| ()).map_err(reading(shard)))
    }

    fn read(&self, index: usize) -> Result<Image> {
        let sample = &self.samples[index];
        let bad = |reason: String| Error::BadImage { key: self.key(index), reason };
        check_size(sample.extent.bytes).map_err(|error| bad(error.to_string()))?;
        let mut bytes = vec![0; sample.extent.bytes as usize];
        // Opened anew: there may be more shards than files that a process may hold open.
        let read = File::open(&self.shards[sample.shard as usize])
            .and_then(|file| read_exact_at(&file, &mut bytes, sample.extent.offset));
        read.map_err(|error| bad(error.to_string()))?;
        Image::decode(&bytes).map_err(bad)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn expanded(pattern: &str) -> Vec<String> {
        let paths = expand(pattern).expect("well formed").expect("braces");
        paths.into_iter().map(|path| path.display().to_string()).collect()
    }

    #[test]
    fn braces_are_ranges_and_lists() {
        assert_eq!(expanded("a-{098..101}.tar"), ["a-098.tar", "a-099.tar", "a-100.tar", "a-101.tar"]);
        assert_eq!(expanded("{train,val}-{0..1}.tar"), ["train-0.tar", "train-1.tar", "val-0.tar", "val-1.tar"]);
        assert_eq!(expand("a.tar").expect("no braces"), None);
        assert!(expand(&format!("{{{}..9}}.tar", "0".repeat(70_000))).is_err(), "a number as wide as no file name");
    }

    #[test]
    fn keys_end_at_the_first_dot_of_the_name() {
        for (name, expected) in [
            ("a/b.c/d.e.JPG", ("a/b.c/d", "e.jpg")),
            ("1.cls", ("1", "cls")),
            ("a/plain", ("a/plain", "")),
            (".hidden", ("", "hidden")),
        ] {
            let (key, extension) = key(Path::new(name));
            assert_eq!((key.as_str(), extension.as_str()), expected);
        }
    }

    proptest! {
        #[test]
        fn any_pattern_is_expanded_or_refused(pattern in "[a{},.0-9]{0,16}") {
            if let Ok(Some(paths)) = expand(&pattern) {
                prop_assert!(!paths.is_empty() && paths.len() <= MAX_SHARDS);
            }
        }
    }
}

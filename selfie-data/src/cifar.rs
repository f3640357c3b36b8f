//! CIFAR-10 and CIFAR-100, binary and Python editions: <https://www.cs.toronto.edu/~kriz/cifar.html>.
//!
//! Binary: a record is the label byte(s) and 3,072 pixel bytes, planes R, G, B of 32 x 32,
//! row-major; the number of records is the published one. Python: pickled dicts of `data`, the same
//! planes, and labels; their numbers decide how many records there are.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use crate::bounded::Bounded;
use crate::dataset::Split;
use crate::error::{Error, Result, reading};
use crate::gzip::Gunzip;
use crate::pickle::Pickle;
use crate::records::{Batch, Layout, Records};
use crate::tar_index;

const SIDE: usize = 32;
const IMAGE_BYTES: usize = SIDE * SIDE * 3;

/// More than any member of the Python editions has (155 MB): what an archive may unpack into memory.
const MAX_MEMBER_BYTES: u64 = 512 << 20;

/// What an archive may unpack to: the editions have up to 187 MB. A file of 10 MB can hold 10 GB of zeros.
const MAX_UNPACKED_BYTES: u64 = 256 << 20;

/// One edition of the data.
struct Edition {
    name: &'static str,
    /// The folder that the archive unpacks to.
    folder: &'static str,
    train: &'static [&'static str],
    test: &'static [&'static str],
    /// The file of class names.
    names: &'static str,
    /// Files any of which shows that a folder holds this edition.
    marks: &'static [&'static str],
    layout: Layout,
    format: Format,
}

enum Format {
    /// Label bytes before the pixels, of which the last one is the label (CIFAR-100: coarse, fine),
    /// and records per member.
    Binary { label_bytes: usize, train_records: usize, test_records: usize },
    /// Pickles; the key of the class names.
    Python { names: &'static str },
}

const fn layout(labels: &'static str, classes: usize) -> Layout {
    Layout { labels, first_label: 0, classes, sides: &[SIDE] }
}

const EDITIONS: [Edition; 4] = [
    Edition {
        name: "CIFAR-10",
        folder: "cifar-10-batches-bin",
        train: &["data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin"],
        test: &["test_batch.bin"],
        names: "batches.meta.txt",
        marks: &["data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"],
        layout: layout("labels", 10),
        format: Format::Binary { label_bytes: 1, train_records: 10_000, test_records: 10_000 },
    },
    Edition {
        name: "CIFAR-100",
        folder: "cifar-100-binary",
        train: &["train.bin"],
        test: &["test.bin"],
        names: "fine_label_names.txt",
        marks: &["train.bin", "test.bin"],
        layout: layout("fine_labels", 100),
        format: Format::Binary { label_bytes: 2, train_records: 50_000, test_records: 10_000 },
    },
    Edition {
        name: "CIFAR-10 (Python edition)",
        folder: "cifar-10-batches-py",
        train: &["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"],
        test: &["test_batch"],
        names: "batches.meta",
        marks: &["data_batch_1", "data_batch_2", "test_batch"],
        layout: layout("labels", 10),
        format: Format::Python { names: "label_names" },
    },
    Edition {
        name: "CIFAR-100 (Python edition)",
        folder: "cifar-100-python",
        train: &["train"],
        test: &["test"],
        names: "meta",
        // Files called train and test may be anything.
        marks: &["meta"],
        layout: layout("fine_labels", 100),
        format: Format::Python { names: "fine_label_names" },
    },
];

impl Edition {
    fn members(&self, split: Split) -> &'static [&'static str] {
        match split {
            Split::Train => self.train,
            Split::Test => self.test,
        }
    }

    fn has(&self, name: &str) -> bool {
        self.train.contains(&name) || self.test.contains(&name) || self.names == name
    }
}

/// How a file holds its members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Container {
    TarGz,
    Tar,
}

impl Container {
    /// By the first bytes; `None` for anything else.
    pub(crate) fn of(path: &Path) -> Result<Option<Self>> {
        let mut start = Vec::new();
        File::open(path).and_then(|file| file.take(512).read_to_end(&mut start)).map_err(reading(path))?;
        Ok(if start.starts_with(&[0x1f, 0x8b]) {
            Some(Container::TarGz)
        } else if start.get(257..262) == Some(b"ustar") || is_old_tar(&start) {
            Some(Container::Tar)
        } else {
            None
        })
    }
}

/// Whether a block is the first of a tar from before there was a mark for it: its checksum is right.
fn is_old_tar(block: &[u8]) -> bool {
    let Some(digits) = block.get(148..156).filter(|_| block.len() == 512) else { return false };
    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    let others = sum - digits.iter().map(|byte| u64::from(*byte)).sum::<u64>();
    // The checksum is counted as if it were eight spaces.
    let digits = std::str::from_utf8(digits).map(|text| text.trim_matches(['\0', ' ']));
    digits.ok().and_then(|digits| u64::from_str_radix(digits, 8).ok()) == Some(others + 8 * 32)
}

/// The folder that holds the batches: `path`, or the one the archive unpacks to inside it.
pub(crate) fn in_folder(path: &Path) -> Option<PathBuf> {
    let holds = |folder: &PathBuf| edition_in(&EDITIONS, |name| folder.join(name).is_file()).is_some();
    let inside = EDITIONS.iter().map(|edition| path.join(edition.folder));
    std::iter::once(path.to_path_buf()).chain(inside).find(holds)
}

/// Whether a plain tar is one of CIFAR, not of images.
pub(crate) fn is_in_tar(index: &tar_index::Index) -> bool {
    edition_in_tar(index).is_some()
}

fn edition_in_tar(index: &tar_index::Index) -> Option<&'static Edition> {
    let wrapper = index.wrapper();
    let marks: Vec<&str> = EDITIONS.iter().flat_map(|edition| edition.marks).copied().collect();
    let found: Vec<&str> = index
        .files()
        .filter_map(|member| {
            let name = member.path.file_name()?;
            marks.iter().copied().find(|mark| name == *mark && member.is_shallow(&wrapper))
        })
        .collect();
    edition_in(&EDITIONS, |mark| found.contains(&mark))
}

fn edition_in(editions: &'static [Edition], is_file: impl Fn(&str) -> bool) -> Option<&'static Edition> {
    editions.iter().find(|edition| edition.marks.iter().any(|mark| is_file(mark)))
}

/// From the folder that holds the batches.
pub(crate) fn from_folder(folder: &Path, split: Split) -> Result<Records> {
    from_folder_of(&EDITIONS, folder, split)
}

fn from_folder_of(editions: &'static [Edition], folder: &Path, split: Split) -> Result<Records> {
    let edition = edition_in(editions, |name| folder.join(name).exists()).unwrap_or(&editions[0]);
    let mut parts = Parts::new(edition, split, folder);
    for name in parts.members.iter().copied().chain([edition.names]) {
        let path = folder.join(name);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other.map_err(reading(&path))?,
        };
        let bytes = file.metadata().map_err(reading(&path))?.len();
        parts.take(name, &path, bytes, &mut BufReader::with_capacity(1 << 18, file))?;
    }
    parts.finish()
}

/// From a plain tar.
pub(crate) fn from_tar(path: &Path, file: &File, index: &tar_index::Index, split: Split) -> Result<Records> {
    let mut parts = Parts::new(edition_in_tar(index).unwrap_or(&EDITIONS[0]), split, path);
    let wrapper = index.wrapper();
    for member in index.files().filter(|member| member.is_shallow(&wrapper)) {
        let Some(name) = member.path.file_name().and_then(|name| name.to_str()) else { continue };
        let mut from = BufReader::with_capacity(1 << 18, member.reader(file));
        parts.take(name, &member.path, member.extent.bytes, &mut from)?;
    }
    parts.finish()
}

/// From the archive, read to its end: a damaged one shows by its checksum at the latest.
pub(crate) fn from_tar_gz(path: &Path, split: Split) -> Result<Records> {
    from_tar_gz_of(&EDITIONS, path, split)
}

fn from_tar_gz_of(editions: &'static [Edition], path: &Path, split: Split) -> Result<Records> {
    let file = File::open(path).map_err(reading(path))?;
    let bytes = file.metadata().map_err(reading(path))?.len();
    from_gzip(editions, split, path, bytes, BufReader::with_capacity(1 << 18, file))
}

/// From the contents of the archive `path`, of `file_bytes` bytes.
fn from_gzip(
    editions: &'static [Edition],
    split: Split,
    path: &Path,
    file_bytes: u64,
    contents: impl BufRead,
) -> Result<Records> {
    let damaged = |error: io::Error| {
        Error::malformed(
            path,
            "a complete gzip tar archive",
            format!("{file_bytes} bytes that break off or are damaged ({error})"),
            "download it again and compare its checksum",
        )
    };
    let contents = Bounded::new(Gunzip::new(contents), MAX_UNPACKED_BYTES, "unpacked data");
    let mut archive = tar::Archive::new(contents);
    let mut parts: Option<Parts> = None;
    let mut seen = Vec::new();
    // Raw, as long names and other extensions, which no edition has, would be kept in memory whatever their length.
    for entry in archive.entries().map_err(damaged)?.raw(true) {
        let mut entry = entry.map_err(damaged)?;
        let member = entry.path().map_err(damaged)?.into_owned();
        let Some(name) = member.file_name().and_then(|name| name.to_str()) else { continue };
        if !entry.header().entry_type().is_file() {
            continue;
        }
        if seen.len() < 8 {
            seen.push(name.to_string());
        }
        let Some(edition) = editions.iter().find(|edition| edition.has(name)) else { continue };
        let bytes = entry.size();
        parts.get_or_insert_with(|| Parts::new(edition, split, path)).take(name, &member, bytes, &mut entry)?;
    }
    io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(damaged)?;
    match parts {
        Some(parts) => parts.finish(),
        None => Err(Error::malformed(
            path,
            "CIFAR-10 or CIFAR-100 (data_batch_1.bin, data_batch_1, train.bin, ...)",
            format!("files named {}", if seen.is_empty() { "nothing".into() } else { seen.join(", ") }),
            "images are read from a folder or a plain .tar: unpack this archive",
        )),
    }
}

/// A split while its members come in, in any order.
struct Parts {
    edition: &'static Edition,
    split: Split,
    origin: PathBuf,
    members: &'static [&'static str],
    /// By place in `members`, and where each lies.
    batches: BTreeMap<usize, (PathBuf, Batch)>,
    classes: Vec<String>,
}

impl Parts {
    fn new(edition: &'static Edition, split: Split, origin: &Path) -> Self {
        let (members, origin) = (edition.members(split), origin.into());
        Self { edition, split, origin, members, batches: BTreeMap::new(), classes: Vec::new() }
    }

    fn malformed(&self, expected: String, found: String) -> Error {
        Error::malformed(&self.origin, expected, found, "the data are truncated or damaged: download them again")
    }

    /// Reads a member that lies at `path`, if it belongs to the split. One that comes again is the last one, as tar
    /// unpacks it.
    fn take(&mut self, name: &str, path: &Path, bytes: u64, from: &mut impl Read) -> Result<()> {
        if name == self.edition.names {
            return self.names(bytes, from);
        }
        let Some(part) = self.members.iter().position(|member| *member == name) else { return Ok(()) };
        let batch = match self.edition.format {
            Format::Binary { label_bytes, train_records, test_records } => {
                let records = match self.split {
                    Split::Train => train_records,
                    Split::Test => test_records,
                };
                self.binary(name, bytes, from, label_bytes, records)?
            }
            Format::Python { .. } => {
                let pickle = self.whole(name, bytes, MAX_MEMBER_BYTES, from)?;
                Batch::from_pickle(&self.origin, name, &pickle, &self.edition.layout)?
            }
        };
        match self.batches.insert(part, (path.into(), batch)) {
            Some((before, _)) if before != path => {
                let found = format!("it twice, as {} and {}", before.display(), path.display());
                Err(self.malformed(format!("{name} once"), found))
            }
            Some(_) | None => Ok(()),
        }
    }

    fn binary(
        &self,
        name: &str,
        bytes: u64,
        from: &mut impl Read,
        label_bytes: usize,
        records: usize,
    ) -> Result<Batch> {
        let record_bytes = label_bytes + IMAGE_BYTES;
        let expected = (records * record_bytes) as u64;
        if bytes != expected {
            return Err(self.malformed(
                format!("{expected} bytes in {name} ({records} records of {record_bytes})"),
                format!("{bytes} bytes"),
            ));
        }
        let mut batch = Batch::new(name, SIDE);
        batch.reserve(records);
        let mut record = vec![0; record_bytes];
        for at in 0..records {
            from.read_exact(&mut record).map_err(|error| {
                self.malformed(
                    format!("{records} records in {name}"),
                    format!("{at}, then the data break off ({error})"),
                )
            })?;
            let (labels, planes) = record.split_at(label_bytes);
            let label = labels[label_bytes - 1];
            let class = self.edition.layout.class(label.into()).ok_or_else(|| {
                let range = self.edition.layout.label_range();
                let byte = at * record_bytes + label_bytes - 1;
                self.malformed(format!("{range} in record {at} of {name}, byte {byte}"), label.to_string())
            })?;
            batch.push(class, planes);
        }
        Ok(batch)
    }

    /// All of a member, which may have up to `limit` bytes.
    fn whole(&self, name: &str, bytes: u64, limit: u64, from: &mut impl Read) -> Result<Vec<u8>> {
        if bytes > limit {
            return Err(self.malformed(format!("at most {limit} bytes in {name}"), format!("{bytes} bytes")));
        }
        // Grows with what comes, not with what is claimed.
        let mut whole = Vec::new();
        let read = from.take(bytes).read_to_end(&mut whole);
        match read {
            Ok(read) if read as u64 == bytes => Ok(whole),
            Ok(read) => Err(self.malformed(format!("{bytes} bytes in {name}"), format!("{read} bytes"))),
            Err(error) => Err(self.malformed(format!("{bytes} bytes in {name}"), error.to_string())),
        }
    }

    fn names(&mut self, bytes: u64, from: &mut impl Read) -> Result<()> {
        let file = self.edition.names;
        // The file has a few hundred bytes; anything larger is not it.
        let bytes = self.whole(file, bytes, 1 << 16, from)?;
        let malformed = |found: String| self.malformed(format!("class names in {file}"), found);
        self.classes = match self.edition.format {
            Format::Binary { .. } => {
                let text = String::from_utf8(bytes).map_err(|error| malformed(error.to_string()))?;
                text.lines().map(str::trim).filter(|line| !line.is_empty()).map(String::from).collect()
            }
            Format::Python { names } => {
                let pickle = Pickle::read(&bytes).map_err(malformed)?;
                let list = pickle.get(names).and_then(|list| pickle.items(&list));
                let text = |name| pickle.bytes(name).and_then(|name| std::str::from_utf8(name).ok()).map(String::from);
                let found = list.and_then(|list| list.iter().map(text).collect());
                found.ok_or_else(|| malformed(format!("no list of names `{names}` in {}", pickle.keys())))?
            }
        };
        Ok(())
    }

    fn finish(mut self) -> Result<Records> {
        let missing: Vec<_> = (0..self.members.len())
            .filter(|part| !self.batches.contains_key(part))
            .map(|part| self.members[part])
            .collect();
        if !missing.is_empty() {
            return Err(self.malformed(self.members.join(", "), format!("no {}", missing.join(", no "))));
        }
        let classes = self.edition.layout.classes;
        match self.classes.len() {
            0 => self.classes = (0..classes).map(|class| class.to_string()).collect(),
            found if found == classes => {}
            found => {
                return Err(self.malformed(format!("{classes} names in {}", self.edition.names), found.to_string()));
            }
        }
        let batches = self.batches.into_values().map(|(_, batch)| batch).collect();
        Ok(Records::new(self.edition.name.into(), self.split, self.origin, self.classes, batches))
    }
}

/// An edition small enough for tests.
#[cfg(any(test, fuzzing))]
static TINY: [Edition; 1] = [Edition {
    name: "tiny",
    folder: "tiny",
    train: &["data_batch_1.bin", "data_batch_2.bin"],
    test: &["test_batch.bin"],
    names: "batches.meta.txt",
    marks: &["data_batch_1.bin", "data_batch_2.bin"],
    layout: layout("labels", 3),
    format: Format::Binary { label_bytes: 2, train_records: 4, test_records: 2 },
}];

/// The contents of an archive of the tiny edition.
#[cfg(fuzzing)]
pub(crate) fn from_tiny(contents: &[u8], split: Split) -> Result<Records> {
    from_gzip(&TINY, split, Path::new("tiny.tar.gz"), contents.len() as u64, contents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::Dataset;
    use flate2::Compression;
    use flate2::write::GzEncoder;

    const RECORD: usize = 2 + IMAGE_BYTES;

    fn value(member: usize, record: usize, at: usize) -> u8 {
        (member * 31 + record * 7 + at * 13 + at / 256) as u8
    }

    fn member(number: usize, records: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for record in 0..records {
            bytes.extend([99, (record % 3) as u8]);
            bytes.extend((0..IMAGE_BYTES).map(|at| value(number, record, at)));
        }
        bytes
    }

    fn members() -> Vec<(&'static str, Vec<u8>)> {
        vec![
            ("batches.meta.txt", b"cat\ndog\nship\n\n".to_vec()),
            ("data_batch_2.bin", member(2, 4)),
            ("test_batch.bin", member(3, 2)),
            ("data_batch_1.bin", member(1, 4)),
        ]
    }

    fn archive(members: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        for (name, bytes) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, format!("cifar-10-batches-bin/{name}"), bytes.as_slice()).expect("in memory");
        }
        tar.into_inner().and_then(GzEncoder::finish).expect("in memory")
    }

    fn from_archive(bytes: &[u8], split: Split) -> Result<Records> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("a.tar.gz");
        std::fs::write(&path, bytes).expect("written");
        from_tar_gz_of(&TINY, &path, split)
    }

    fn from_folder(members: &[(&str, Vec<u8>)], split: Split) -> Result<Records> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for (name, bytes) in members {
            std::fs::write(folder.path().join(name), bytes).expect("written");
        }
        from_folder_of(&TINY, folder.path(), split)
    }

    fn check(data: &Records, first_member: usize, per_member: usize, len: usize) {
        assert_eq!(data.len(), len);
        assert_eq!(data.classes(), ["cat", "dog", "ship"]);
        for index in 0..len {
            let (part, record) = (index / per_member, index % per_member);
            assert_eq!(data.label(index), Some(record as u32 % 3));
            let image = data.read(index).expect("in memory");
            for (at, pixel) in image.pixels.chunks(3).enumerate() {
                let expected = [0, 1, 2].map(|channel| value(first_member + part, record, channel * 1024 + at));
                assert_eq!(pixel, expected, "image {index}, pixel {at}");
            }
        }
        assert_eq!(data.key(len - 1).rsplit(':').next(), Some((per_member - 1).to_string().as_str()));
    }

    #[test]
    fn archive_and_folder_give_the_same_images_in_order() {
        let members = members();
        for load in [from_folder(&members, Split::Train), from_archive(&archive(&members), Split::Train)] {
            let data = load.expect("well formed");
            check(&data, 1, 4, 8);
            assert_eq!(data.key(5), "data_batch_2.bin:1");
        }
        for load in [from_folder(&members, Split::Test), from_archive(&archive(&members), Split::Test)] {
            check(&load.expect("well formed"), 3, 2, 2);
        }
    }

    #[test]
    fn every_truncation_of_the_archive_is_refused() {
        let whole = archive(&members());
        for cut in (0..40).map(|part| whole.len() * part / 40).chain(whole.len() - 12..whole.len()) {
            let error = from_archive(&whole[..cut], Split::Train).err();
            let error = error.unwrap_or_else(|| panic!("{cut} of {} bytes were accepted", whole.len()));
            assert!(matches!(error, Error::Malformed { .. }), "{cut}: {error:?}");
            assert!(error.to_string().contains("a.tar.gz"), "{error}");
        }
    }

    #[test]
    fn every_flipped_bit_of_the_archive_is_noticed() {
        let whole = archive(&members());
        // Bytes 3 to 9 of a gzip header (flags, time, system) are covered by no checksum.
        for at in (10..whole.len()).step_by(97).chain([0, 1, whole.len() - 8, whole.len() - 1]) {
            let mut damaged = whole.clone();
            damaged[at] ^= 4;
            assert!(from_archive(&damaged, Split::Train).is_err(), "byte {at} of {}", whole.len());
        }
    }

    #[test]
    fn wrong_members_are_named() {
        let change = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
            let mut members = members();
            let (_, bytes) = members.iter_mut().find(|(member, _)| *member == name).expect("there");
            change(bytes);
            members
        };
        let cases: [(Vec<_>, &[&str]); 5] = [
            (
                change("data_batch_2.bin", &|bytes| bytes.truncate(3 * RECORD)),
                &["12296 bytes in data_batch_2.bin", "9222"],
            ),
            (change("data_batch_1.bin", &|bytes| bytes.push(0)), &["12296 bytes in data_batch_1.bin", "12297"]),
            (
                change("data_batch_1.bin", &|bytes| bytes[2 * RECORD + 1] = 3),
                &["a label from 0 to 2 in record 2 of data_batch_1.bin, byte 6149", "found 3"],
            ),
            (change("batches.meta.txt", &|bytes| bytes.truncate(7)), &["3 names in batches.meta.txt", "found 2"]),
            (members().into_iter().filter(|(name, _)| *name != "data_batch_1.bin").collect(), &["no data_batch_1.bin"]),
        ];
        for (members, parts) in cases {
            for load in [from_folder(&members, Split::Train), from_archive(&archive(&members), Split::Train)] {
                let message = load.expect_err("must be refused").to_string();
                assert!(parts.iter().all(|part| message.contains(part)), "{message}");
            }
        }
        // In two folders: one of them is meant.
        let elsewhere = [("other/data_batch_2.bin", member(9, 4))];
        let all: Vec<_> = members().into_iter().chain(elsewhere).collect();
        let message = from_archive(&archive(&all), Split::Train).expect_err("must be refused").to_string();
        assert!(message.contains("twice") && message.contains("other/data_batch_2.bin"), "{message}");
    }

    #[test]
    fn a_member_that_comes_again_is_the_last_one() {
        let mut all = members();
        all[3].1 = member(7, 4);
        all.push(("data_batch_1.bin", member(1, 4)));
        check(&from_archive(&archive(&all), Split::Train).expect("as tar unpacks it"), 1, 4, 8);
    }

    #[test]
    fn members_of_a_gzip_are_one_stream() {
        let whole = archive(&members());
        let mut tar = Vec::new();
        flate2::read::GzDecoder::new(whole.as_slice()).read_to_end(&mut tar).expect("in memory");
        let mut packed = Vec::new();
        for piece in tar.chunks(10_000) {
            let mut gzip = GzEncoder::new(&mut packed, Compression::fast());
            io::Write::write_all(&mut gzip, piece).and_then(|()| gzip.finish().map(drop)).expect("in memory");
        }
        check(&from_archive(&packed, Split::Train).expect("well formed"), 1, 4, 8);
        for cut in (0..packed.len()).step_by(packed.len() / 40) {
            assert!(from_archive(&packed[..cut], Split::Train).is_err(), "{cut} of {} bytes", packed.len());
        }
    }

    #[test]
    fn bombs_are_refused() {
        let refused = |name: &str, kind: tar::EntryType, bytes: u64| {
            let mut header = tar::Header::new_gnu();
            header.set_path(name).expect("a short name");
            header.set_entry_type(kind);
            header.set_size(bytes);
            header.set_cksum();
            let mut tar = header.as_bytes().chain(io::repeat(0).take(MAX_UNPACKED_BYTES + (1 << 20)));
            let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
            io::copy(&mut tar, &mut gzip).expect("in memory");
            from_archive(&gzip.finish().expect("in memory"), Split::Train).expect_err("a bomb").to_string()
        };
        use tar::EntryType;
        for (name, kind) in
            [("zeros", EntryType::Regular), ("long", EntryType::GNULongName), ("pax", EntryType::XHeader)]
        {
            let message = refused(name, kind, MAX_UNPACKED_BYTES + 5);
            assert!(message.contains("unpacked data of more than 268435456 bytes"), "{message}");
        }
        // The archive is over at the first block of zeros, but not the file.
        assert!(refused("end", EntryType::Regular, 0).contains("unpacked data"));
        let message = refused("data_batch_1.bin", EntryType::Regular, 1 << 60);
        assert!(message.contains("12296 bytes in data_batch_1.bin"), "{message}");
        assert!(refused("size", EntryType::Regular, u64::MAX).contains("size overflow"));
    }

    #[test]
    fn links_are_no_members() {
        let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        tar.append_link(&mut header, "data_batch_1.bin", "/etc/passwd").expect("in memory");
        let bytes = tar.into_inner().and_then(GzEncoder::finish).expect("in memory");
        let message = from_archive(&bytes, Split::Train).expect_err("no batches").to_string();
        assert!(message.contains("files named nothing"), "{message}");
    }

    #[test]
    fn other_archives_are_told_apart() {
        let other = archive(&[("readme.md", vec![0; 10])]);
        let message = from_archive(&other, Split::Train).expect_err("must be refused").to_string();
        assert!(message.contains("readme.md"), "{message}");
    }
}

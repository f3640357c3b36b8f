//! CIFAR-10 and CIFAR-100, binary edition: <https://www.cs.toronto.edu/~kriz/cifar.html>.
//! A record is the label byte(s) and 3,072 pixel bytes, planes R, G, B of 32 x 32, row-major.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;

use crate::bounded::Bounded;
use crate::dataset::{Dataset, Geometry, Split};
use crate::error::{Error, Result, reading};
use crate::picture::Image;

const SIDE: usize = 32;
const IMAGE_BYTES: usize = SIDE * SIDE * 3;

/// What an archive may unpack to: the editions have 185 MB. A file of 10 MB can hold 10 GB of zeros.
const MAX_UNPACKED_BYTES: u64 = 256 << 20;

/// One edition of the data.
struct Edition {
    name: &'static str,
    /// Label bytes before the pixels; the last one is the label (CIFAR-100: coarse, fine).
    label_bytes: usize,
    classes: usize,
    train: &'static [&'static str],
    test: &'static [&'static str],
    train_records: usize,
    test_records: usize,
    /// The file of class names, one a line.
    names: &'static str,
}

const EDITIONS: [Edition; 2] = [
    Edition {
        name: "CIFAR-10",
        label_bytes: 1,
        classes: 10,
        train: &["data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin"],
        test: &["test_batch.bin"],
        train_records: 10_000,
        test_records: 10_000,
        names: "batches.meta.txt",
    },
    Edition {
        name: "CIFAR-100",
        label_bytes: 2,
        classes: 100,
        train: &["train.bin"],
        test: &["test.bin"],
        train_records: 50_000,
        test_records: 10_000,
        names: "fine_label_names.txt",
    },
];

impl Edition {
    fn members(&self, split: Split) -> (&'static [&'static str], usize) {
        match split {
            Split::Train => (self.train, self.train_records),
            Split::Test => (self.test, self.test_records),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.train.contains(&name) || self.test.contains(&name) || self.names == name
    }

    fn record_bytes(&self) -> usize {
        self.label_bytes + IMAGE_BYTES
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
        } else if start.get(257..262) == Some(b"ustar") {
            Some(Container::Tar)
        } else {
            None
        })
    }
}

/// The folder that holds the batches: `path`, or the one the archive unpacks to inside it.
pub(crate) fn in_folder(path: &Path) -> Result<Option<PathBuf>> {
    let candidates = ["", "cifar-10-batches-bin", "cifar-100-binary"].map(|inside| path.join(inside));
    let holds = |folder: &&PathBuf| {
        EDITIONS.iter().any(|edition| edition.train.iter().chain(edition.test).any(|name| folder.join(name).is_file()))
    };
    if let Some(found) = candidates.iter().find(holds) {
        return Ok(Some(found.clone()));
    }
    let python = [path.join("data_batch_1"), path.join("cifar-10-batches-py"), path.join("cifar-100-python")];
    match python.iter().find(|path| path.exists()) {
        Some(found) => Err(python_edition(path, &found.display().to_string())),
        None => Ok(None),
    }
}

fn python_edition(path: &Path, found: &str) -> Error {
    Error::malformed(
        path,
        "the binary edition of CIFAR",
        format!("the Python edition ({found})"),
        "take cifar-10-binary.tar.gz from the page of the dataset: only the binary edition is read",
    )
}

/// A split of CIFAR, whole in memory.
pub(crate) struct Cifar {
    name: &'static str,
    split: Split,
    origin: PathBuf,
    members: &'static [&'static str],
    records: usize,
    classes: Vec<String>,
    labels: Vec<u8>,
    /// [n, 32, 32, 3]
    pixels: Vec<u8>,
}

impl Cifar {
    /// From the folder that holds the batches.
    pub(crate) fn from_folder(folder: &Path, split: Split) -> Result<Self> {
        Self::from_folder_of(&EDITIONS, folder, split)
    }

    fn from_folder_of(editions: &'static [Edition], folder: &Path, split: Split) -> Result<Self> {
        let there =
            |edition: &&Edition| edition.train.iter().chain(edition.test).any(|name| folder.join(name).exists());
        let edition = editions.iter().find(there).unwrap_or(&editions[0]);
        let mut parts = Parts::new(edition, split, folder);
        for &name in parts.members {
            let path = folder.join(name);
            let file = match File::open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other.map_err(reading(&path))?,
            };
            let bytes = file.metadata().map_err(reading(&path))?.len();
            parts.member(name, bytes, &mut BufReader::with_capacity(1 << 18, file))?;
        }
        let names = folder.join(edition.names);
        if names.is_file() {
            parts.names(&mut File::open(&names).map_err(reading(&names))?)?;
        }
        parts.finish()
    }

    /// From the archive, read to its end: a damaged one shows by its checksum at the latest.
    pub(crate) fn from_tar_gz(path: &Path, split: Split) -> Result<Self> {
        Self::from_tar_gz_of(&EDITIONS, path, split)
    }

    fn from_tar_gz_of(editions: &'static [Edition], path: &Path, split: Split) -> Result<Self> {
        let file = File::open(path).map_err(reading(path))?;
        let bytes = file.metadata().map_err(reading(path))?.len();
        Self::from_gzip(editions, split, path, bytes, BufReader::with_capacity(1 << 18, file))
    }

    /// From the contents of the archive `path`, of `file_bytes` bytes.
    fn from_gzip(
        editions: &'static [Edition],
        split: Split,
        path: &Path,
        file_bytes: u64,
        contents: impl BufRead,
    ) -> Result<Self> {
        let damaged = |error: io::Error| {
            Error::malformed(
                path,
                "a complete gzip tar archive",
                format!("{file_bytes} bytes that break off or are damaged ({error})"),
                "download it again and compare its checksum",
            )
        };
        let contents = Bounded::new(GzDecoder::new(contents), MAX_UNPACKED_BYTES, "unpacked data");
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
            let parts = parts.get_or_insert_with(|| Parts::new(edition, split, path));
            let bytes = entry.size();
            if name == parts.edition.names {
                parts.names(&mut entry)?;
            } else if parts.members.contains(&name) {
                parts.member(name, bytes, &mut entry)?;
            }
        }
        io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(damaged)?;
        match parts {
            Some(parts) => parts.finish(),
            None if seen.iter().any(|name| name == "data_batch_1") => Err(python_edition(path, "data_batch_1")),
            None => Err(Error::malformed(
                path,
                "CIFAR-10 or CIFAR-100, binary edition (data_batch_1.bin, train.bin, ...)",
                format!("files named {}", if seen.is_empty() { "nothing".into() } else { seen.join(", ") }),
                "images are read from a folder or a plain .tar: unpack this archive",
            )),
        }
    }
}

/// A split while its members come in, in any order.
struct Parts {
    edition: &'static Edition,
    split: Split,
    origin: PathBuf,
    members: &'static [&'static str],
    records: usize,
    seen: BTreeSet<usize>,
    classes: Vec<String>,
    labels: Vec<u8>,
    pixels: Vec<u8>,
}

impl Parts {
    fn new(edition: &'static Edition, split: Split, origin: &Path) -> Self {
        let (members, records) = edition.members(split);
        Self {
            edition,
            split,
            origin: origin.into(),
            members,
            records,
            seen: BTreeSet::new(),
            classes: Vec::new(),
            labels: vec![0; members.len() * records],
            pixels: vec![0; members.len() * records * IMAGE_BYTES],
        }
    }

    fn malformed(&self, expected: String, found: String) -> Error {
        Error::malformed(&self.origin, expected, found, "the data are truncated or damaged: download them again")
    }

    fn member(&mut self, name: &str, bytes: u64, from: &mut impl Read) -> Result<()> {
        let record_bytes = self.edition.record_bytes();
        let expected = (self.records * record_bytes) as u64;
        if bytes != expected {
            return Err(self.malformed(
                format!("{expected} bytes in {name} ({} records of {record_bytes})", self.records),
                format!("{bytes} bytes"),
            ));
        }
        let part = self.members.iter().position(|member| *member == name).expect("callers pass members only");
        if !self.seen.insert(part) {
            return Err(self.malformed(format!("{name} once"), "it twice".into()));
        }
        let mut record = vec![0; record_bytes];
        for at in 0..self.records {
            from.read_exact(&mut record).map_err(|error| {
                self.malformed(
                    format!("{} records in {name}", self.records),
                    format!("{at}, then the data break off ({error})"),
                )
            })?;
            let (labels, planes) = record.split_at(self.edition.label_bytes);
            let label = labels[labels.len() - 1];
            if usize::from(label) >= self.edition.classes {
                return Err(self.malformed(
                    format!(
                        "a label below {} in record {at} of {name}, byte {}",
                        self.edition.classes,
                        at * record_bytes
                    ),
                    label.to_string(),
                ));
            }
            let index = part * self.records + at;
            self.labels[index] = label;
            let (red, rest) = planes.split_at(SIDE * SIDE);
            let (green, blue) = rest.split_at(SIDE * SIDE);
            let (pixels, _) = self.pixels[index * IMAGE_BYTES..][..IMAGE_BYTES].as_chunks_mut::<3>();
            for (pixel, ((&r, &g), &b)) in pixels.iter_mut().zip(red.iter().zip(green).zip(blue)) {
                *pixel = [r, g, b];
            }
        }
        Ok(())
    }

    fn names(&mut self, from: &mut impl Read) -> Result<()> {
        let mut text = String::new();
        // The file has a few hundred bytes; anything larger is not it.
        from.take(1 << 16)
            .read_to_string(&mut text)
            .map_err(|error| self.malformed(format!("class names in {}", self.edition.names), error.to_string()))?;
        self.classes = text.lines().map(str::trim).filter(|line| !line.is_empty()).map(String::from).collect();
        Ok(())
    }

    fn finish(mut self) -> Result<Cifar> {
        let missing: Vec<_> =
            (0..self.members.len()).filter(|part| !self.seen.contains(part)).map(|part| self.members[part]).collect();
        if !missing.is_empty() {
            return Err(self.malformed(self.members.join(", "), format!("no {}", missing.join(", no "))));
        }
        let classes = self.edition.classes;
        match self.classes.len() {
            0 => self.classes = (0..classes).map(|class| class.to_string()).collect(),
            found if found == classes => {}
            found => {
                return Err(self.malformed(format!("{classes} names in {}", self.edition.names), found.to_string()));
            }
        }
        Ok(Cifar {
            name: self.edition.name,
            split: self.split,
            origin: self.origin,
            members: self.members,
            records: self.records,
            classes: self.classes,
            labels: self.labels,
            pixels: self.pixels,
        })
    }
}

impl Cifar {
    fn pixels(&self, index: usize) -> &[u8] {
        &self.pixels[index * IMAGE_BYTES..][..IMAGE_BYTES]
    }
}

impl Dataset for Cifar {
    fn len(&self) -> usize {
        self.labels.len()
    }

    fn describe(&self) -> String {
        let split = match self.split {
            Split::Train => "training",
            Split::Test => "test",
        };
        format!(
            "{}, {} {split} images, 32 x 32, {} classes ({})",
            self.name,
            self.len(),
            self.classes.len(),
            self.origin.display()
        )
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> Option<u32> {
        Some(u32::from(self.labels[index]))
    }

    fn geometry(&self) -> Geometry {
        Geometry::Fixed { height: SIDE, width: SIDE }
    }

    fn key(&self, index: usize) -> String {
        format!("{}:{}", self.members[index / self.records], index % self.records)
    }

    fn read(&self, index: usize) -> Result<Image> {
        Ok(Image { height: SIDE, width: SIDE, pixels: self.pixels(index).to_vec() })
    }

    fn read_into(&self, index: usize, pixels: &mut [u8]) -> Result<()> {
        pixels.copy_from_slice(self.pixels(index));
        Ok(())
    }
}

/// An edition small enough for tests.
#[cfg(any(test, fuzzing))]
static TINY: [Edition; 1] = [Edition {
    name: "tiny",
    label_bytes: 2,
    classes: 3,
    train: &["data_batch_1.bin", "data_batch_2.bin"],
    test: &["test_batch.bin"],
    train_records: 4,
    test_records: 2,
    names: "batches.meta.txt",
}];

#[cfg(fuzzing)]
impl Cifar {
    /// The contents of an archive of the tiny edition.
    pub(crate) fn from_tiny(contents: &[u8], split: Split) -> Result<Self> {
        Self::from_gzip(&TINY, split, Path::new("tiny.tar.gz"), contents.len() as u64, contents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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

    fn from_archive(bytes: &[u8], split: Split) -> Result<Cifar> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("a.tar.gz");
        std::fs::write(&path, bytes).expect("written");
        Cifar::from_tar_gz_of(&TINY, &path, split)
    }

    fn from_folder(members: &[(&str, Vec<u8>)], split: Split) -> Result<Cifar> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for (name, bytes) in members {
            std::fs::write(folder.path().join(name), bytes).expect("written");
        }
        Cifar::from_folder_of(&TINY, folder.path(), split)
    }

    fn check(data: &Cifar, first_member: usize, per_member: usize, len: usize) {
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
                &["label below 3 in record 2 of data_batch_1.bin, byte 6148", "found 3"],
            ),
            (change("batches.meta.txt", &|bytes| bytes.truncate(7)), &["3 names in batches.meta.txt", "found 2"]),
            (members().into_iter().filter(|(name, _)| *name != "data_batch_1.bin").collect(), &["no data_batch_1.bin"]),
        ];
        for (members, parts) in cases {
            for load in [from_folder(&members, Split::Train), from_archive(&archive(&members), Split::Train)] {
                let message = load.err().expect("must be refused").to_string();
                assert!(parts.iter().all(|part| message.contains(part)), "{message}");
            }
        }
        let twice = [members(), members()].concat();
        let message = from_archive(&archive(&twice), Split::Train).err().expect("must be refused").to_string();
        assert!(message.contains("twice"), "{message}");
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
            from_archive(&gzip.finish().expect("in memory"), Split::Train).err().expect("a bomb").to_string()
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
        let message = from_archive(&bytes, Split::Train).err().expect("no batches").to_string();
        assert!(message.contains("files named nothing"), "{message}");
    }

    #[test]
    fn other_archives_are_told_apart() {
        let python = archive(&[("data_batch_1", vec![0; 10])]);
        let message = from_archive(&python, Split::Train).err().expect("must be refused").to_string();
        assert!(message.contains("Python edition"), "{message}");
        let other = archive(&[("readme.md", vec![0; 10])]);
        let message = from_archive(&other, Split::Train).err().expect("must be refused").to_string();
        assert!(message.contains("readme.md"), "{message}");
    }
}

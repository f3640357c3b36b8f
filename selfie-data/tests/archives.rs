//! Archives as people make them, written by Python's tarfile and gzip: see `fixtures/make.py`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

#[cfg(unix)]
use proptest::prelude::*;
use selfie_data::{Dataset, Draws, LabelBudget, Need, Purpose, Result, Split, open, write_labels};

struct Zero;

impl Draws for Zero {
    fn words(&self, _: Purpose, _: u64, _: u32) -> [u32; 4] {
        [0; 4]
    }
}

fn seeded(_: u64) -> Arc<dyn Draws> {
    Arc::new(Zero)
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn opened(name: &str, split: Split) -> Result<Arc<dyn Dataset>> {
    open(&fixture(name), split, Need::Labels, &seeded)
}

/// The number of the image that `make.py` wrote.
fn number(data: &dyn Dataset, index: usize) -> usize {
    let image = data.read(index).unwrap_or_else(|error| panic!("{error}"));
    // The first byte of record i is i * 37, and there are fewer than 10.
    (0..10).find(|i| (i * 37 % 256) as u8 == image.pixels[0]).expect("one of make.py's")
}

/// Key, class and image of all.
fn all(data: &dyn Dataset) -> Vec<(String, Option<u32>, usize)> {
    (0..data.len()).map(|index| (data.key(index), data.label(index), number(data, index))).collect()
}

fn expect(data: &dyn Dataset, expected: &[(&str, u32, usize)]) {
    let expected: Vec<_> = expected.iter().map(|(key, label, image)| (key.to_string(), Some(*label), *image)).collect();
    assert_eq!(all(data), expected, "{}", data.describe());
}

#[test]
fn what_lies_beside_the_one_folder_does_not_hide_it() {
    for name in ["plain", "mac", "zip", "readme", "cover", "absolute", "deep", "old"] {
        let name = format!("archives/top_{name}.tar");
        let train = opened(&name, Split::Train).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(train.classes(), ["cat", "dog"], "{name}");
        expect(&*train, &[("train/cat/0.png", 0, 0), ("train/dog/1.png", 1, 1)]);
        let test = opened(&name, Split::Test).unwrap_or_else(|error| panic!("{name}: {error}"));
        expect(&*test, &[("val/cat/0.png", 0, 2), ("val/dog/1.png", 1, 3)]);
        assert_eq!(train.describe().contains("beside the parts, and not used: 1 image"), name.contains("cover"));
    }
}

/// What the system's tar makes of an archive.
#[cfg(unix)]
fn unpacked(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let tar = std::process::Command::new("tar").arg("-xf").arg(fixture(name)).arg("-C").arg(folder.path()).output();
    // It says what it cannot link, and unpacks the rest.
    tar.expect("there is a tar");
    folder
}

#[test]
fn links_lead_to_members_or_are_counted() {
    let data = opened("archives/links.tar", Split::Train).expect("well formed");
    assert_eq!(data.classes(), ["cat", "dog", "emu"]);
    let cat = [("cat/0.png", 0, 0), ("cat/hard.png", 0, 0), ("cat/soft.png", 0, 1)];
    let dog = [("dog/1.png", 1, 1), ("dog/2.png", 1, 2), ("dog/later.png", 1, 2), ("dog/twice.png", 1, 1)];
    let emu = [("emu/0.png", 2, 0), ("emu/hard.png", 2, 0), ("emu/soft.png", 2, 1)];
    expect(&*data, &[cat.as_slice(), &dog, &emu].concat());
    // emu/ has the two of cat/ as well.
    let said = "5 files left out: 5 links that lead nowhere in the archive";
    assert!(data.describe().contains(said), "{}", data.describe());
    // On a disk, a link to nothing is an image that cannot be read.
    #[cfg(unix)]
    {
        let folder = unpacked("archives/links.tar");
        let unpacked = open(folder.path(), Split::Train, Need::Labels, &seeded).expect("well formed");
        let readable = (0..unpacked.len()).filter(|index| unpacked.read(*index).is_ok());
        let readable: Vec<_> = readable.map(|index| (unpacked.key(index), unpacked.label(index))).collect();
        assert_eq!(readable, all(&*data).into_iter().map(|(key, label, _)| (key, label)).collect::<Vec<_>>());
    }
}

#[test]
fn a_name_that_comes_again_is_the_last_one() {
    let data = opened("archives/twice.tar", Split::Train).expect("well formed");
    expect(&*data, &[("cat/0.png", 0, 0), ("dog/1.png", 1, 1)]);
    #[cfg(unix)]
    {
        let folder = unpacked("archives/twice.tar");
        let unpacked = open(folder.path(), Split::Train, Need::Labels, &seeded).expect("well formed");
        assert_eq!(all(&*unpacked), all(&*data));
    }
}

/// A member of a random tar.
#[cfg(unix)]
#[derive(Clone, Debug)]
enum Packed {
    File(u8),
    Soft(&'static str),
    Hard(&'static str),
}

#[cfg(unix)]
fn member() -> impl Strategy<Value = (&'static str, Packed)> {
    const FILES: [&str; 5] = ["p/a/1.ppm", "p/a/2.ppm", "p/b/1.ppm", "./p/b/2.ppm", "p/c/1.ppm"];
    const TARGETS: [&str; 7] =
        ["1.ppm", "2.ppm", "../a/1.ppm", "../b/2.ppm", "../c/1.ppm", "../../out.ppm", "../d/1.ppm"];
    let file = prop::sample::select(&FILES[..]);
    let packed = prop_oneof![
        3 => any::<u8>().prop_map(Packed::File),
        2 => prop::sample::select(&TARGETS[..]).prop_map(Packed::Soft),
        1 => prop::sample::select(&FILES[..]).prop_map(Packed::Hard),
    ];
    let folder = prop::sample::select(&["a", "b", "c", ".."][..]).prop_map(|target| ("p/d", Packed::Soft(target)));
    prop_oneof![5 => (file, packed), 1 => folder]
}

#[cfg(unix)]
proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    /// What is read of a tar is what can be read of the folder that the system's tar makes of it.
    #[test]
    fn any_tar_is_what_tar_unpacks(more in prop::collection::vec(member(), 0..12)) {
        let root = tempfile::tempdir().expect("a temporary folder");
        let path = root.path().join("data.tar");
        let mut tar = tar::Builder::new(std::fs::File::create(&path).expect("writable"));
        let first = [("p/a/0.ppm", Packed::File(1)), ("p/b/0.ppm", Packed::File(2)), ("p/c/0.ppm", Packed::File(3))];
        for (name, packed) in first.iter().chain(&more) {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_size(0);
            let (kind, target, bytes) = match packed {
                Packed::File(red) => (tar::EntryType::Regular, None, [b"P6 1 1 255\n".as_slice(), &[*red, 0, 0]].concat()),
                Packed::Soft(target) => (tar::EntryType::Symlink, Some(target), Vec::new()),
                Packed::Hard(target) => (tar::EntryType::Link, Some(target), Vec::new()),
            };
            header.set_entry_type(kind);
            header.set_size(bytes.len() as u64);
            header.set_path(name).expect("a short name");
            if let Some(target) = target {
                header.set_link_name(target).expect("a short name");
            }
            header.set_cksum();
            tar.append(&header, bytes.as_slice()).expect("writable");
        }
        tar.finish().expect("writable");
        let folder = root.path().join("unpacked");
        std::fs::create_dir(&folder).expect("writable");
        // With -P links are made at once, and not in the end, when a later member of the same name can be lost.
        let said = std::process::Command::new("tar").arg("-xPf").arg(&path).arg("-C").arg(&folder).output();
        prop_assert!(said.is_ok());

        let red = |data: &dyn Dataset, index: usize| data.read(index).map(|image| image.pixels[0]);
        let packed = open(&path, Split::Train, Need::Images, &seeded).expect("three images at least");
        let packed: Vec<_> =
            (0..packed.len()).map(|index| (packed.key(index), red(&*packed, index).expect("a member"))).collect();
        let unpacked = open(&folder, Split::Train, Need::Images, &seeded).expect("three images at least");
        let unpacked: Vec<_> = (0..unpacked.len())
            .filter_map(|index| Some((unpacked.key(index), red(&*unpacked, index).ok()?)))
            .collect();
        prop_assert_eq!(packed, unpacked);
    }
}

#[cfg(unix)]
#[test]
fn names_that_are_no_text_are_kept_apart_in_lists_as_well() {
    let data = opened("archives/latin.tar", Split::Train).expect("three classes");
    assert_eq!(data.classes(), ["H\\xE4he", "H\\xF6he", "dog"]);
    expect(&*data, &[("H\\xE4he/\\xFC.png", 0, 1), ("H\\xF6he/\\xFC.png", 1, 0), ("dog/\\xFC.png", 2, 2)]);
    // A list as we write it, and one as `find` prints it.
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut ours = Vec::new();
    write_labels(&*data, &[1, 2], &mut ours).expect("in memory");
    for list in [ours.as_slice(), b"H\xf6he/\xfc.png\ndog/\xfc.png\n"] {
        let path = folder.path().join("list.txt");
        std::fs::write(&path, list).expect("written");
        assert_eq!(LabelBudget::Named(path).select(&*data, &seeded).expect("known names"), [1, 2]);
    }
    let path = folder.path().join("list.txt");
    std::fs::write(&path, b"\xfc.png\n").expect("written");
    let error = LabelBudget::Named(path).select(&*data, &seeded).expect_err("three have it").to_string();
    assert!(error.contains("`\\xFC.png` on line 1"), "{error}");
}

#[test]
fn all_members_of_a_gzip_are_read() {
    for split in [Split::Train, Split::Test] {
        let several = opened("archives/cifar-10-members.tar.gz", split).expect("whole");
        let one = opened("cifar-10-python.tar.gz", split).expect("whole");
        assert_eq!((several.len(), several.classes()), (one.len(), one.classes()));
        for index in 0..one.len() {
            assert_eq!(several.read(index).expect("there"), one.read(index).expect("there"));
        }
    }
}

#[cfg(unix)]
#[test]
fn shards_in_folders_are_parts() {
    for path in ["shards_by_folder", "shards_by_folder/{train,val}/00000.tar"] {
        let train = opened(path, Split::Train).unwrap_or_else(|error| panic!("{path}: {error}"));
        let name = |part: &str, byte: usize| format!("{part}/00000.tar/H\\x{byte:02X}he.png");
        let expected = (0..3).map(|i| (name("train", 0xe4 + i), Some(i as u32 % 3), i));
        assert_eq!(all(&*train), expected.collect::<Vec<_>>());
        let test = opened(path, Split::Test).unwrap_or_else(|error| panic!("{path}: {error}"));
        let expected = (3..5).map(|i| (name("val", 0xe4 + i), Some(i as u32 % 3), i));
        assert_eq!(all(&*test), expected.collect::<Vec<_>>());
    }
}

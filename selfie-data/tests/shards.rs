//! WebDataset shards.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use selfie_data::{Dataset, Draws, Error, Image, Need, Purpose, Result, Split, open};

struct Zero;

impl Draws for Zero {
    fn words(&self, _: Purpose, _: u64, _: u32) -> [u32; 4] {
        [0; 4]
    }
}

fn opened(path: impl AsRef<Path>, split: Split, need: Need) -> Result<Arc<dyn Dataset>> {
    open(path.as_ref(), split, need, &|_| Arc::new(Zero))
}

/// An image of one pixel.
fn pixel(red: u8) -> Vec<u8> {
    [b"P6 1 1 255\n".as_slice(), &[red, 0, 0]].concat()
}

fn tar(members: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_ustar();
        // Written as it is: names that lead out of the archive are part of the tests.
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_entry_type(tar::EntryType::Regular);
        header.set_cksum();
        tar.append(&header, bytes.as_slice()).expect("in memory");
    }
    tar.into_inner().expect("in memory")
}

fn sample(key: &str, red: u8, class: &str) -> Vec<(&'static str, Vec<u8>)> {
    let name = |extension: &str| &*Box::leak(format!("{key}.{extension}").into_boxed_str());
    vec![(name("cls"), class.as_bytes().to_vec()), (name("jpg"), pixel(red)), (name("json"), b"{}".to_vec())]
}

fn colours(data: &dyn Dataset) -> Vec<(u8, Option<u32>)> {
    (0..data.len()).map(|index| (data.read(index).expect("one pixel").pixels[0], data.label(index))).collect()
}

fn write(folder: &Path, name: &str, members: &[(&str, Vec<u8>)]) {
    fs::write(folder.join(name), tar(members)).expect("writable");
}

fn three_shards() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write(folder.path(), "train-000000.tar", &[sample("a/1.5", 1, "0"), sample("a/2", 2, "2\n")].concat());
    write(folder.path(), "train-000001.tar", &sample("b", 3, " 1 "));
    write(folder.path(), "val-000000.tar", &sample("c", 4, "3"));
    folder
}

#[test]
fn shards_are_found_by_folder_pattern_and_name() {
    let folder = three_shards();
    fs::write(folder.path().join("README.md"), "").expect("writable");
    let pattern = |text: &str| folder.path().join(text);
    // A dot in the key: `a/1.5.jpg` has the key `a/1` and no extension of an image.
    let expected = [(2, Some(2)), (3, Some(1))];
    for path in [folder.path().to_path_buf(), pattern("{train,val}-{000000..000001}.tar")] {
        if path != folder.path() {
            fs::copy(pattern("val-000000.tar"), pattern("val-000001.tar")).expect("writable");
        }
        let train = opened(&path, Split::Train, Need::Labels).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(colours(&*train), expected);
        assert_eq!(train.classes().join(" "), "0 1 2 3", "the highest label is in val");
        assert_eq!(train.key(0), "train-000000.tar/a/2.jpg");
        let description = train.describe();
        assert!(
            description.contains("2 shards, 2 images") && description.contains("1 without an image left out: 1 .5.jpg"),
            "{description}"
        );
        let test = opened(&path, Split::Test, Need::Labels).expect("val shards");
        assert_eq!((colours(&*test)[0], test.classes().len()), ((4, Some(3)), 4));
    }
    let train = opened(pattern("train-{000000..000001}.tar"), Split::Train, Need::Labels).expect("well formed");
    assert_eq!((colours(&*train), train.classes().len()), (expected.to_vec(), 3));
    let error = opened(pattern("train-{000000..000001}.tar"), Split::Test, Need::Labels).err().expect("no val");
    assert!(matches!(error, Error::NoTestPart { .. }), "{error:?}");
    let error = opened(pattern("train-{000000..000002}.tar"), Split::Train, Need::Labels).err().expect("missing");
    assert!(error.to_string().contains("train-000002.tar"), "{error}");
    let error = opened(pattern("val-{000000..000001}.tar"), Split::Train, Need::Labels).err().expect("only val");
    assert!(error.to_string().contains("only val"), "{error}");
    let single = opened(pattern("train-000001.tar"), Split::Train, Need::Labels).expect("well formed");
    assert_eq!(colours(&*single), [(3, Some(1))]);

    fs::write(pattern("classes.txt"), "ant\nbee\ncat\ndog\nelk\n").expect("writable");
    let train = opened(folder.path(), Split::Train, Need::Labels).expect("well formed");
    assert_eq!(train.classes().join(" "), "ant bee cat dog elk");
    fs::write(pattern("classes.txt"), "ant\nbee\ncat\n").expect("writable");
    let error = opened(folder.path(), Split::Train, Need::Labels).err().expect("3 names for 4 classes");
    assert!(error.to_string().contains("at least 4 classes") && error.to_string().contains("found 3"), "{error}");
}

#[test]
fn the_folder_of_a_shard_counts() {
    let root = tempfile::tempdir().expect("a temporary folder");
    for part in ["train", "val"] {
        fs::create_dir_all(root.path().join("shards").join(part)).expect("made");
    }
    let path = |text: &str| root.path().join("shards").join(text);
    write(root.path(), "shards/train/00000.tar", &sample("a", 1, "0"));
    write(root.path(), "shards/train/00001.tar", &sample("a", 2, "1"));
    write(root.path(), "shards/val/00000.tar", &sample("b", 3, "2"));
    fs::write(path("classes.txt"), "ant\nbee\ncat\n").expect("writable");
    fs::write(path("train/index.json"), "{}").expect("writable");
    fs::copy(path("val/00000.tar"), path("val/00001.tar")).expect("writable");
    for data in [path(""), path("{train,val}/{00000..00001}.tar")] {
        let train = opened(&data, Split::Train, Need::Labels).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(colours(&*train), [(1, Some(0)), (2, Some(1))]);
        assert_eq!(train.key(0), "train/00000.tar/a.jpg");
        assert_eq!(train.classes().join(" "), "ant bee cat");
        let test = opened(&data, Split::Test, Need::Labels).expect("val shards");
        assert_eq!(colours(&*test), [(3, Some(2)), (3, Some(2))]);
    }
    // A folder that all shards lie in says nothing of one of them, but is its own test part.
    let alone = opened(path("val"), Split::Train, Need::Labels).expect("all of them");
    assert_eq!((alone.len(), alone.key(0).as_str()), (2, "00000.tar/b.jpg"));
    assert_eq!(opened(path("val"), Split::Test, Need::Labels).expect("itself").len(), 2);
    let error = opened(path("train"), Split::Test, Need::Labels).err().expect("no val");
    assert!(matches!(error, Error::NoTestPart { .. }), "{error:?}");
    fs::rename(path("val/00001.tar"), path("val/train-1.tar")).expect("writable");
    let error = opened(path(""), Split::Train, Need::Images).err().expect("a contradiction");
    assert!(error.to_string().contains("train-1.tar in the folder val"), "{error}");
}

#[test]
fn wrong_patterns_are_refused() {
    for text in [
        "x-{}.tar",
        "x-{1}.tar",
        "x-{5..1}.tar",
        "x-{0..a}.tar",
        "x-{0..1.tar",
        "x-{0..99999999}.tar",
        "x-{0..9999}-{0..9999}.tar",
        "x-{..}.tar",
        "x-{+1..2}.tar",
    ] {
        let error = opened(text, Split::Train, Need::Images).err().expect("must be refused");
        assert!(matches!(&error, Error::Usage { given, .. } if given == text), "{error:?}");
    }
}

fn single(members: &[(&str, Vec<u8>)], need: Need) -> Result<Vec<(u8, Option<u32>)>> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write(folder.path(), "train.tar", members);
    opened(folder.path(), Split::Train, need).map(|data| colours(&*data))
}

#[test]
fn samples_are_runs_of_one_key() {
    let image = |red: u8| pixel(red);
    let label = |text: &str| text.as_bytes().to_vec();
    // The first image counts; upper case is the same; masks and text are no images.
    let members = [
        ("1.seg.png", image(9)),
        ("1.JPG", image(1)),
        ("1.png", image(8)),
        ("1.cls", label("1")),
        ("2.txt", label("no image")),
        ("3.cls", label("0")),
        ("3.webp", image(3)),
    ];
    assert_eq!(single(&members, Need::Labels).expect("well formed"), [(1, Some(1)), (3, Some(0))]);
    // A name that comes again is the last one, as tar unpacks it, in the place of the first.
    let again = [("1.jpg", image(1)), ("1.cls", label("0")), ("2.jpg", image(2)), ("2.cls", label("1"))];
    let again = [again.as_slice(), &[("1.jpg", image(5)), ("1.cls", label("2"))]].concat();
    assert_eq!(single(&again, Need::Labels).expect("well formed"), [(5, Some(2)), (2, Some(1))]);
    let unlabelled = [("1.jpg", image(1)), ("2.jpg", image(2)), ("2.cls", label("0"))];
    assert_eq!(single(&unlabelled, Need::Images).expect("no labels needed"), [(1, None), (2, None)]);
    for (members, part) in [
        (unlabelled.to_vec(), "none for 1.jpg"),
        (vec![("1.jpg", image(1)), ("2.jpg", image(1)), ("1.cls", label("0"))], "1 again after others"),
        (vec![("1.jpg", image(1)), ("1.JPG", image(1)), ("1.cls", label("0"))], "one .jpg per sample"),
        (vec![("1.jpg", image(1)), ("1.cls", label("-1"))], "found `-1`"),
        (vec![("1.jpg", image(1)), ("1.cls", label("65536"))], "below 65536 in 1.cls"),
        (vec![("1.jpg", image(1)), ("1.cls", label("one\n"))], "found `one\\n`"),
        (vec![("1.jpg", image(1)), ("1.cls", vec![b'1'; 1000])], "found 1000 bytes"),
        (vec![("1.txt", label("no image"))], "found 0, and 1 without an image (1 .txt)"),
    ] {
        let message = single(&members, Need::Labels).expect_err("must be refused").to_string();
        assert!(message.contains(part), "{part}: {message}");
    }
}

#[test]
fn names_are_keys_and_links_are_skipped() {
    let outside = [("../../up.jpg", pixel(1)), ("/etc/root.jpg", pixel(2)), ("a/../b.jpg", pixel(3))];
    assert_eq!(single(&outside, Need::Images).expect("names only"), [(1, None), (2, None), (3, None)]);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut bytes = tar(&outside);
    // Links to a file outside, in front: a symbolic and a hard one.
    for kind in [tar::EntryType::Symlink, tar::EntryType::Link] {
        let mut header = tar::Header::new_ustar();
        header.set_path("link.jpg").and_then(|()| header.set_link_name("/etc/hostname")).expect("short");
        header.set_entry_type(kind);
        header.set_size(0);
        header.set_cksum();
        bytes = [header.as_bytes().as_slice(), &bytes].concat();
    }
    for (name, keys) in [
        ("shards/x.tar", ["x.tar/up.jpg", "x.tar/etc/root.jpg", "x.tar/b.jpg"]),
        ("plain.tar", ["b.jpg", "etc/root.jpg", "up.jpg"]),
    ] {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().expect("inside")).expect("writable");
        fs::write(&path, &bytes).expect("writable");
        let path = if name == "plain.tar" { path } else { folder.path().join("shards") };
        let data = opened(&path, Split::Train, Need::Images).expect("three images");
        assert_eq!((0..data.len()).map(|index| data.key(index)).collect::<Vec<_>>(), keys);
    }
    let names: Vec<_> =
        fs::read_dir(folder.path()).expect("readable").map(|entry| entry.expect("there").file_name()).collect();
    assert_eq!(names.len(), 2, "nothing was written: {names:?}");
}

#[test]
fn damaged_shards_are_refused_or_whole() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("train-0.tar");
    let whole = tar(&[sample("1", 1, "0"), sample("2", 2, "1")].concat());
    let one = |red| Image { height: 1, width: 1, pixels: vec![red, 0, 0] };
    for cut in (0..whole.len()).step_by(64) {
        fs::write(&path, &whole[..cut]).expect("writable");
        match opened(folder.path(), Split::Train, Need::Labels) {
            Err(error) => assert!(matches!(error, Error::Malformed { .. }), "{error:?}"),
            Ok(data) => {
                assert!(cut >= whole.len() - 512, "{cut} of {}", whole.len());
                assert_eq!([data.read(0).expect("there"), data.read(1).expect("there")], [one(1), one(2)]);
            }
        }
    }
    // Any flipped byte of a header is noticed by its checksum, or changes nothing that is read.
    for at in (0..whole.len()).step_by(11) {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x10;
        fs::write(&path, &damaged).expect("writable");
        if let Ok(data) = opened(folder.path(), Split::Train, Need::Images) {
            (0..data.len()).for_each(|index| drop(data.read(index)));
        }
    }
}

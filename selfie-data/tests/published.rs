//! Published data sets in small, written by numpy, Python and Pillow: see `fixtures/make.py`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use selfie_data::{Dataset, Draws, Error, ErrorKind, Geometry, Need, Purpose, Result, Split, open};

struct Zero;

impl Draws for Zero {
    fn words(&self, _: Purpose, _: u64, _: u32) -> [u32; 4] {
        [0; 4]
    }
}

fn opened(path: impl AsRef<Path>, split: Split) -> Result<Arc<dyn Dataset>> {
    open(path.as_ref(), split, Need::Labels, &|_| Arc::new(Zero))
}

fn refused(path: impl AsRef<Path>, split: Split) -> String {
    let error = opened(path, split).err().expect("must be refused");
    assert_eq!(error.kind(), ErrorKind::Input);
    error.to_string()
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The pixels that `make.py` gives record `i`.
fn record(i: usize, side: usize) -> Vec<u8> {
    let value = |c: usize, y: usize, x: usize| (i * 37 + c * 80 + y * 5 + x * 3) as u8;
    (0..side).flat_map(|y| (0..side).flat_map(move |x| (0..3).map(move |c| value(c, y, x)))).collect()
}

/// Checks that `data` are the records from `first` on with labels as `label` says.
fn check(data: &dyn Dataset, first: usize, len: usize, side: usize, label: impl Fn(usize) -> usize) {
    assert_eq!((data.len(), data.geometry()), (len, Geometry::Fixed { height: side, width: side }));
    for index in 0..len {
        assert_eq!(data.label(index), Some(label(first + index) as u32), "{index}");
        assert_eq!(data.read(index).expect("in memory").pixels, record(first + index, side), "{index}");
        let mut pixels = vec![0; side * side * 3];
        data.read_into(index, &mut pixels).expect("in memory");
        assert_eq!(pixels, record(first + index, side));
    }
}

/// The archive as a plain tar, and unpacked, in a folder of its own.
fn unpacked(archive: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let bytes = fs::read(fixture(archive)).expect("there");
    let mut plain = Vec::new();
    std::io::copy(&mut flate2::read::GzDecoder::new(bytes.as_slice()), &mut plain).expect("well formed");
    tar::Archive::new(plain.as_slice()).unpack(folder.path().join("unpacked")).expect("writable");
    let tar = folder.path().join("data.tar");
    fs::write(&tar, plain).expect("writable");
    (folder, tar)
}

#[test]
fn the_python_editions_of_cifar() {
    for (archive, inner, train, test, classes) in [
        ("cifar-10-python.tar.gz", "cifar-10-batches-py", 10, (10, 2), 10),
        ("cifar-100-python.tar.gz", "cifar-100-python", 3, (3, 3), 100),
    ] {
        let (folder, tar) = unpacked(archive);
        let above = folder.path().join("unpacked");
        for path in [fixture(archive), tar, above.clone(), above.join(inner)] {
            let label = |i: usize| if classes == 10 { i % 10 } else { i * 11 % 100 };
            let data = opened(&path, Split::Train).unwrap_or_else(|error| panic!("{error}"));
            check(&*data, 0, train, 32, label);
            let first_names = if classes == 10 { "airplane automobile" } else { "fine 0 fine 1" };
            assert_eq!((data.classes().len(), data.classes()[..2].join(" ").as_str()), (classes, first_names));
            assert!(data.describe().contains("Python edition") && data.describe().contains(&train.to_string()));
            let data = opened(&path, Split::Test).unwrap_or_else(|error| panic!("{error}"));
            check(&*data, test.0, test.1, 32, label);
        }
    }
    let (folder, _) = unpacked("cifar-10-python.tar.gz");
    let batches = folder.path().join("unpacked/cifar-10-batches-py");
    let train = opened(&batches, Split::Train).expect("well formed");
    assert_eq!((train.key(0), train.key(9)), ("data_batch_1:0".into(), "data_batch_5:1".into()));
    fs::remove_file(batches.join("data_batch_3")).expect("there");
    assert!(refused(&batches, Split::Train).contains("no data_batch_3"));
    fs::write(batches.join("test_batch"), fs::read(fixture("hostile/system_2")).expect("there")).expect("writable");
    let message = refused(&batches, Split::Test);
    assert!(message.contains("test_batch") && message.contains("asks for posix.system"), "{message}");
}

#[test]
fn downsampled_imagenet_as_pickles_and_npz() {
    let label = |i: usize| i * 300 % 1000;
    for kind in ["imagenet8_pickles", "imagenet8_npz"] {
        let train = opened(fixture(kind), Split::Train).unwrap_or_else(|error| panic!("{error}"));
        check(&*train, 0, 5, 8, label);
        assert!(train.describe().starts_with("ImageNet 8 x 8, 2 batches, 5 training images"), "{}", train.describe());
        assert_eq!((train.classes().len(), train.classes()[999].as_str()), (1000, "1000"));
        assert_eq!(train.key(4), "train_data_batch_2:1");
        let test = opened(fixture(kind), Split::Test).unwrap_or_else(|error| panic!("{error}"));
        check(&*test, 5, 2, 8, label);
    }
}

#[test]
fn downsampled_imagenet_in_folders_of_its_own() {
    let root = tempfile::tempdir().expect("a temporary folder");
    let copy = |from: &str, to: &str| {
        let to = root.path().join(to);
        fs::create_dir_all(to.parent().expect("inside")).expect("writable");
        fs::copy(fixture("imagenet8_npz").join(from), to).expect("writable");
    };
    copy("train_data_batch_1.npz", "Imagenet8_train_npz/train_data_batch_1.npz");
    copy("val_data.npz", "Imagenet8_val_npz/val_data.npz");
    let lines: Vec<_> = (1..=1000).rev().map(|id| format!("n{id:08} {id} word_{id}\n")).collect();
    fs::write(root.path().join("map_clsloc.txt"), lines.concat()).expect("writable");
    let [train, test] = [Split::Train, Split::Test].map(|split| opened(root.path(), split).expect("well formed"));
    assert_eq!((train.len(), test.len(), train.classes()[0].as_str()), (3, 2, "n00000001 word_1"));

    copy("train_data_batch_2.npz", "Imagenet8_train_npz/train_data_batch_3.npz");
    let message = refused(root.path(), Split::Train);
    assert!(message.contains("train_data_batch_2 before") && message.contains("train_data_batch_3.npz"), "{message}");
    copy("train_data_batch_1.npz", "imagenet16/train_data_batch_1.npz");
    assert!(refused(root.path(), Split::Train).contains("expected one train_data_batch_1"));
    fs::remove_dir_all(root.path().join("imagenet16")).expect("there");
    fs::remove_dir_all(root.path().join("Imagenet8_train_npz")).expect("there");
    assert!(refused(root.path(), Split::Train).contains("train_data_batch_1 beside val_data"));
    for (text, part) in [
        ("n1 1 a\nn1 1 b\n", "class 1 again on line 2"),
        ("n1 0 a\n", "`n1 0 a` on line 1"),
        ("n1 1001 a", "on line 1"),
        ("n1 2 a", "none for 1"),
    ] {
        fs::write(root.path().join("map_clsloc.txt"), text).expect("writable");
        let message = refused(root.path(), Split::Test);
        assert!(message.contains(part) && message.contains("map_clsloc.txt"), "{message}");
    }
    let error = opened(fixture("pickles"), Split::Test).err().expect("no images");
    assert!(matches!(error, Error::NoTestPart { .. }));
}

/// Opens one file as the validation part of a folder.
fn as_val(name: &str, bytes: &[u8]) -> Result<Arc<dyn Dataset>> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::write(folder.path().join(name), bytes).expect("writable");
    opened(folder.path(), Split::Test)
}

#[test]
fn pickles_of_every_age() {
    let mut seen = 0;
    for file in fs::read_dir(fixture("pickles")).expect("there") {
        let path = file.expect("readable").path();
        let data = as_val("val_data", &fs::read(&path).expect("readable"));
        let data = data.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        check(&*data, 0, 3, 8, |i| i * 300 % 1000);
        seen += 1;
    }
    assert_eq!(seen, 23);
}

#[test]
fn hostile_files_are_refused_by_name() {
    let bytes = |name: &str| fs::read(fixture("hostile").join(name)).expect("there");
    for (file, part) in [
        ("system_0", "asks for posix.system"),
        ("system_3", "asks for posix.system"),
        ("system_4", "asks for posix.system"),
        ("system_5", "asks for posix.system"),
        ("eval", "asks for __builtin__.eval"),
        ("object_array", "O"),
        ("fortran", "Fortran order"),
        ("big_endian", "big-endian"),
    ] {
        let message = as_val("val_data", &bytes(file)).err().expect("must be refused").to_string();
        assert!(message.contains(part) && message.contains("val_data"), "{file}: {message}");
    }
    let message = as_val("val_data.npz", &bytes("bomb.npz")).err().expect("must be refused").to_string();
    assert!(message.contains("bomb"), "{message}");
}

#[test]
fn labels_count_from_1_to_1000() {
    let pickle = |label: &[u8]| {
        let whole = fs::read(fixture("pickles/list_2")).expect("there");
        // The last label of the list, 601.
        let at = whole.windows(3).rposition(|window| window == b"M\x59\x02").expect("there");
        [&whole[..at], label, &whole[at + 3..]].concat()
    };
    assert_eq!(as_val("val_data", &pickle(b"M\xe8\x03")).expect("1000").label(2), Some(999));
    for (label, number) in [
        (b"K\0".as_slice(), "0"),
        (b"M\xe9\x03", "1001"),
        (b"J\xff\xff\xff\xff", "-1"),
        (b"\x8a\x08\0\0\0\0\0\0\0\x80", "-9223372036854775808"),
    ] {
        let message = as_val("val_data", &pickle(label)).err().expect("must be refused").to_string();
        let expected = format!("expected a label from 1 to 1000 in record 2 of val_data, found {number};");
        assert!(message.contains(&expected), "{message}");
    }
    let message = as_val("val_data", &pickle(b"")).err().expect("must be refused").to_string();
    assert!(message.contains("3 images and 2 labels"), "{message}");
}

#[test]
fn every_truncation_is_refused() {
    for (file, name) in [
        ("pickles/list_0", "val_data"),
        ("pickles/list_2", "val_data"),
        ("pickles/array_5", "val_data"),
        ("pickles/python_2", "val_data"),
        ("imagenet8_npz/val_data.npz", "val_data.npz"),
        ("imagenet8_npz/train_data_batch_1.npz", "val_data.npz"),
    ] {
        let whole = fs::read(fixture(file)).expect("there");
        for cut in (0..whole.len()).step_by(7) {
            let error = as_val(name, &whole[..cut]).err();
            let error = error.unwrap_or_else(|| panic!("{cut} of {} bytes of {file} were accepted", whole.len()));
            assert!(matches!(error, Error::Malformed { .. }), "{error:?}");
        }
    }
}

#[test]
fn every_damage_of_an_npz_is_noticed_or_harmless() {
    let good = as_val("val_data.npz", &fs::read(fixture("imagenet8_npz/val_data.npz")).expect("there"));
    let good = good.expect("well formed");
    let whole = fs::read(fixture("imagenet8_npz/val_data.npz")).expect("there");
    for at in 0..whole.len() {
        for bit in [1, 0x80] {
            let mut damaged = whole.clone();
            damaged[at] ^= bit;
            // Dates and attributes do not matter; data that come through are the data.
            if let Ok(data) = as_val("val_data.npz", &damaged) {
                assert_eq!(data.len(), good.len());
                for index in 0..data.len() {
                    assert_eq!(data.read(index).expect("in memory"), good.read(index).expect("in memory"), "byte {at}");
                }
            }
        }
    }
}

/// Checks images of 8 x 8 in files, whose sizes nobody has looked at.
fn check_files(data: &dyn Dataset, first: usize, len: usize) {
    assert_eq!(data.len(), len);
    for index in 0..len {
        let image = data.read(index).expect("a PNG");
        assert_eq!((image.height, image.width, image.pixels), (8, 8, record(first + index, 8)), "{index}");
        assert_eq!(data.label(index), Some((first + index) as u32 % 3), "{index}");
    }
}

#[test]
fn shards_of_pythons_tarfile_in_its_three_forms() {
    let folder = fixture("shards");
    let pattern = folder.join("train-{000000..000001}.tar");
    for path in [&folder, &pattern] {
        check_files(&*opened(path, Split::Train).expect("two shards"), 0, 5);
    }
    check_files(&*opened(&folder, Split::Test).expect("a shard of validation"), 5, 2);
    check_files(&*opened(folder.join("train-000001.tar"), Split::Train).expect("one shard"), 3, 2);
}

#[test]
fn a_flat_validation_folder_in_its_three_forms() {
    for form in ["imagenet", "val", "LOC"] {
        let tar = fixture("flat_val").join(format!("{form}.tar"));
        check_files(&*opened(&tar, Split::Test).expect(form), 0, 4);
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = fs::File::open(&tar).expect("there");
        tar::Archive::new(file).unpack(folder.path()).expect("writable");
        check_files(&*opened(folder.path(), Split::Test).expect(form), 0, 4);
        assert_eq!(opened(folder.path(), Split::Train).expect(form).classes(), ["n01440764", "n01443537", "n01484850"]);
    }
}

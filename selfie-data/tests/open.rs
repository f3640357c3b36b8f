//! What lies at a path is recognised, and what is wrong with it is said.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use selfie_data::{Dataset, Draws, Error, ErrorKind, Need, Purpose, Result, Split, match_classes, open};

struct Zero;

impl Draws for Zero {
    fn words(&self, _: Purpose, _: u64, _: u32) -> [u32; 4] {
        [0; 4]
    }
}

fn train(path: impl AsRef<Path>) -> Result<Arc<dyn Dataset>> {
    open(path.as_ref(), Split::Train, Need::Images, &|_| Arc::new(Zero))
}

fn refused(path: impl AsRef<Path>) -> Error {
    train(path).err().expect("must be refused")
}

#[test]
fn the_synthetic_world_needs_no_files() {
    let data = train("synthetic:train=30,classes=3").expect("well formed");
    assert_eq!((data.len(), data.classes().len()), (30, 3));
    let error = refused("synthetic:trian=30");
    assert_eq!(error.kind(), ErrorKind::Usage);
    assert!(error.to_string().contains("trian=30") && error.to_string().contains("train, test"), "{error}");
}

#[test]
fn a_missing_path_says_how_far_it_leads() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let error = refused(folder.path().join("no/such"));
    assert_eq!(error.kind(), ErrorKind::Input);
    let (message, there) = (error.to_string(), folder.path().display().to_string());
    assert!(
        message.contains(&format!("{there}/no/such")) && message.contains(&format!("({there} exists)")),
        "{message}"
    );
}

#[test]
fn files_of_no_known_kind_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("data");
    for bytes in [b"".as_slice(), b"PK\x03\x04", &[0; 700], b"\x1f\x8b", b"\x1f\x8b\x08\0\0\0\0\0\0\0"] {
        fs::write(&path, bytes).expect("written");
        let error = refused(&path);
        assert_eq!(error.kind(), ErrorKind::Input, "{error}");
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    }
}

#[test]
fn cifar_folders_are_recognised() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    // The folder above the batches is accepted, too.
    let batches = folder.path().join("cifar-10-batches-bin");
    fs::create_dir(&batches).expect("made");
    fs::write(batches.join("test_batch.bin"), [0; 3073]).expect("written");
    let message = refused(folder.path()).to_string();
    assert!(message.contains("no data_batch_1.bin, no data_batch_2.bin"), "{message}");
    let data = open(folder.path(), Split::Test, Need::Images, &|_| Arc::new(Zero));
    let message = data.err().expect("too short").to_string();
    assert!(
        message.contains("expected 30730000 bytes in test_batch.bin") && message.contains("found 3073"),
        "{message}"
    );
}

#[test]
fn classes_of_the_two_parts_are_compared() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for file in ["train/cat/1.ppm", "train/dog/1.ppm", "val/cat/1.ppm", "val/cow/1.ppm"] {
        let path = folder.path().join(file);
        fs::create_dir_all(path.parent().expect("inside the folder")).expect("made");
        fs::write(path, b"P6 1 1 255\n\0\0\0").expect("written");
    }
    let [train, test] = [Split::Train, Split::Test]
        .map(|split| open(folder.path(), split, Need::Labels, &|_| Arc::new(Zero)).expect("a good folder"));
    let classes = train.classes().to_vec();
    assert!(match_classes(train, &classes, "itself").expect("the same").missing.is_empty());
    let message = match_classes(test, &classes, "training").err().expect("they differ").to_string();
    assert!(message.contains("the 2 classes of training (cat, dog)"), "{message}");
    assert!(message.contains("none of those: cow; absent: dog"), "{message}");
}

#[test]
fn a_part_of_the_classes_is_matched_by_name() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for file in ["train/cat/1.ppm", "train/dog/1.ppm", "train/emu/1.ppm", "val/emu/1.ppm", "val/dog/1.ppm"] {
        let path = folder.path().join(file);
        fs::create_dir_all(path.parent().expect("inside the folder")).expect("made");
        fs::write(path, b"P6 1 1 255\n\0\0\0").expect("written");
    }
    let part = |split, need| open(folder.path(), split, need, &|_| Arc::new(Zero)).expect("a good folder");
    let classes = part(Split::Train, Need::Labels).classes().to_vec();
    let without = || match_classes(part(Split::Test, Need::Scoring), &classes, "training").expect("a part of them");
    let matched = without();
    assert_eq!((matched.dataset.classes(), matched.missing.join(" ")), (classes.as_slice(), "cat".into()));
    let keyed: Vec<_> = (0..2).map(|index| (matched.dataset.key(index), matched.dataset.label(index))).collect();
    assert_eq!(keyed, [("val/dog/1.ppm".into(), Some(1)), ("val/emu/1.ppm".into(), Some(2))]);
    assert_eq!(matched.missing_text().as_deref(), Some("no image of 1 of the 3 classes (cat)"));
    // An empty folder is no image either.
    fs::create_dir(folder.path().join("val/cat")).expect("made");
    assert_eq!(without().missing, ["cat"]);
}

#[test]
fn a_class_that_is_spelled_in_another_way_is_said_to_be() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (ours, theirs, how) in [
        ("caf\u{e9}", "cafe\u{301}", "cafe\\u{301} is caf\\u{e9} with other composed and decomposed accents"),
        ("cat", "Cat", "Cat is cat with other capitals"),
        ("cat", "cat ", "cat  is cat with other spaces"),
    ] {
        let root = folder.path().join(how);
        for class in [theirs, "dog"] {
            fs::create_dir_all(root.join(class)).expect("made");
            fs::write(root.join(class).join("1.ppm"), b"P6 1 1 255\n\0\0\0").expect("written");
        }
        let test = open(&root, Split::Train, Need::Scoring, &|_| Arc::new(Zero)).expect("a good folder");
        let error = match_classes(test, &[ours.into(), "dog".into()], "training").err().expect("another name");
        assert!(error.to_string().contains(how), "{error}");
    }
}

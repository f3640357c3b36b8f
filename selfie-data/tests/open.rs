//! What lies at a path is recognised, and what is wrong with it is said.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use selfie_data::{Dataset, Draws, Error, ErrorKind, Need, Purpose, Result, Split, check_same_classes, open};

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
    check_same_classes(&*train, &*train).expect("itself");
    let message = check_same_classes(&*train, &*test).expect_err("they differ").to_string();
    assert!(message.contains("only in training: dog; only in test: cow"), "{message}");
}

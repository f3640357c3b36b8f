//! Data as people have them: parts by other names, classes without test images, a part given alone.

use std::fs;
use std::path::Path;

use crate::support::{bitmap_of, fails, text, works, write};
use serde_json::json;

/// Two different pictures of 32 x 32 pixels in each of the folders.
fn write_pictures(root: &Path, folders: &[&str]) {
    for (number, folder) in (0..).zip(folders) {
        for i in 0..2 {
            let picture = bitmap_of(32, |at| (at * (2 * number + i + 3) % 251) as u8);
            write(&root.join(folder).join(format!("{i}.bmp")), &picture);
        }
    }
}

/// Finetunes for a step, as far as that goes.
fn finetune(data: &Path, out: &Path) -> String {
    let (data, out) = (text(data), text(out));
    format!("finetune --init scratch --data {data} --preset tiny --image-size 32 --steps 1 --batch 4 --out {out}")
}

#[test]
fn a_class_without_test_images_is_said_and_the_others_are_measured() {
    let root = tempfile::tempdir().expect("a temporary folder");
    let (data, run) = (root.path().join("data"), root.path().join("run"));
    write_pictures(&data, &["train/cat", "train/dog", "train/emu", "val/cat", "val/emu"]);
    let line = works(&finetune(&data, &run));
    line.says(&["4 images, touched once, at the end; no image of 1 of the 3 classes (dog)"]);

    let evaluate = |data: &Path| format!("evaluate {} --data {} --json", text(&run), text(data));
    fs::create_dir(data.join("val/dog")).expect("an empty folder");
    let found = works(&evaluate(&data));
    found.says(&["the data have no image of 1 of the 3 classes (dog)"]);
    let found = found.json();
    assert_eq!(found["n"], 4);
    // Labels are the run's: emu stays the third class.
    let of_class = |class: usize| found["per_class"][class]["n"].as_u64();
    assert_eq!([0, 1, 2].map(of_class), [Some(2), Some(0), Some(2)]);
    assert_eq!(found["per_class"][2]["class"], "emu");
    // A folder of one class alone.
    let single = works(&evaluate(&data.join("val").join("emu").join("..")));
    assert_eq!(single.json()["n"], 4);
    write_pictures(&root.path().join("new"), &["emu"]);
    let single = works(&evaluate(&root.path().join("new"))).json();
    assert_eq!((&single["n"], &single["per_class"][2]["n"]), (&json!(2), &json!(2)));

    let report = works(&format!("data check --data {}", text(&data))).out;
    assert!(report.contains("the test part has no image of 1 of the 3 classes (dog)"), "{report}");
    assert!(!report.contains("finetuning will refuse"), "{report}");

    // What is no class of the run stays refused, also where it is only spelled in another way.
    write_pictures(&root.path().join("other"), &["cat", "cow"]);
    fails(&evaluate(&root.path().join("other")), 3, &["3 classes", "none of those: cow"]);
    write_pictures(&root.path().join("capital"), &["Cat", "emu"]);
    fails(&evaluate(&root.path().join("capital")), 3, &["Cat is cat with other capitals"]);
    fs::rename(data.join("val/cat"), data.join("val/cow")).expect("renamed");
    fails(&finetune(&data, &root.path().join("none")), 3, &["none of those: cow", "classes of the training images"]);
}

#[test]
fn parts_by_other_names_are_no_classes() {
    let root = tempfile::tempdir().expect("a temporary folder");
    for (train, test) in [("Train", "Test"), ("training", "validation"), ("around/train_set", "around/test_set")] {
        let data = root.path().join(train.replace('/', "-"));
        let folders = [train, test].map(|part| ["cat", "dog"].map(|class| format!("{part}/{class}"))).concat();
        write_pictures(&data, &folders.iter().map(String::as_str).collect::<Vec<_>>());
        let found = works(&format!("data check --json --data {}", text(&data))).json();
        for part in ["train", "test"] {
            assert_eq!((&found[part]["images"], &found[part]["classes"]["cat"]), (&json!(4), &json!(2)), "{found}");
        }
    }
    let unclear = root.path().join("unclear");
    write_pictures(&unclear, &["good_train/cat", "bad_test/cat"]);
    fails(&format!("data check --data {}", text(&unclear)), 3, &["bad_test, good_train", "rename"]);
}

#[test]
fn what_is_left_out_is_said_before_training() {
    let root = tempfile::tempdir().expect("a temporary folder");
    let data = root.path().join("data");
    write_pictures(&data, &["cat", "dog"]);
    for name in ["cat/1.heic", "cat/2.heic", "dog/3.gif"] {
        write(&data.join(name), b"x");
    }
    works(&finetune(&data, &root.path().join("run"))).says(&["3 files left out: 2 .heic, 1 .gif"]);
}

#[test]
fn a_test_part_given_alone_is_not_its_own_test() {
    let root = tempfile::tempdir().expect("a temporary folder");
    let data = root.path().join("val");
    write_pictures(&data, &["cat", "dog"]);
    works(&finetune(&data, &root.path().join("run"))).says(&["test      none"]);
}

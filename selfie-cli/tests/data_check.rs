//! `data check` over a folder that has every fault, and over images that have none.

use std::fs;
use std::path::Path;

use crate::support::{bitmap_of, fails, text, works, write};
use serde_json::{Value, json};

/// A picture of 40 x 40 pixels, different for each number.
fn picture(number: u32) -> Vec<u8> {
    bitmap_of(40, |at| (at * (number + 3) % 251) as u8)
}

/// Two classes in `train/` and `val/`, and nothing wrong with them.
fn write_good(folder: &Path) {
    for (number, name) in (0..).zip(["train/cat/1", "train/cat/2", "train/dog/3", "val/cat/4", "val/dog/5"]) {
        write(&folder.join(name).with_extension("bmp"), &picture(number));
    }
}

/// The same, and one of each fault.
fn write_faulty(folder: &Path) {
    write_good(folder);
    write(&folder.join("train/cat/broken.jpg"), b"not a picture");
    write(&folder.join("train/cat/copy.bmp"), &picture(0));
    write(&folder.join("train/dog/contradicts.bmp"), &picture(1));
    write(&folder.join("train/dog/grey.bmp"), &bitmap_of(40, |_| 90));
    write(&folder.join("train/dog/named.jpg"), &picture(20));
    write(&folder.join("train/dog/small.bmp"), &bitmap_of(8, |at| at as u8));
    write(&folder.join("val/dog/leak.bmp"), &picture(2));
    fs::create_dir(folder.join("train/emu")).expect("a folder");
}

/// The numbers of a line of the table.
fn counts(table: &str, name: &str) -> Vec<String> {
    let line = table.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name}: {table}"));
    line.split_whitespace().take(2).map(String::from).collect()
}

#[test]
fn every_fault_is_in_the_text() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write_faulty(folder.path());
    let out = works(&format!("data check --data {}", text(folder.path()))).out;
    for (name, expected) in [
        ("unreadable", ["1", "-"]),
        ("in train and test", ["1", "1"]),
        ("same pixels, other class", ["2", "-"]),
        ("duplicate", ["2", "-"]),
        ("constant", ["1", "-"]),
        ("a side below 32 pixels", ["1", "-"]),
        ("misnamed", ["1", "-"]),
    ] {
        assert_eq!(counts(&out, name), expected, "{name}: {out}");
    }
    for line in [
        "train/cat/broken.jpg: no known image format",
        "train/dog/3.bmp = val/dog/leak.bmp\n",
        "train/cat/1.bmp = train/cat/copy.bmp\n",
        "train/cat/2.bmp = train/dog/contradicts.bmp (cat, dog)\n",
        "train/dog/grey.bmp\n",
        "train/dog/small.bmp: 8 x 8\n",
        "train/dog/named.jpg: image/bmp\n",
        "3 classes of 0 (emu) to 5 (dog) images; 1 empty: emu\n",
        "2 classes of 1 (cat) to 2 (dog) images\n",
        "finetuning will refuse these parts",
    ] {
        assert!(out.contains(line), "no {line}: {out}");
    }
    // One of nine is allowed: 1%, rounded up.
    assert!(!out.contains("training will stop"), "{out}");
    write(&folder.path().join("train/cat/empty.jpg"), b"");
    let out = works(&format!("data check --data {}", text(folder.path()))).out;
    assert!(out.contains("training will stop at the unreadable images of train: 2 of 10"), "{out}");
}

#[test]
fn every_fault_is_in_the_json() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write_faulty(folder.path());
    let check = |more: &str| works(&format!("data check --json --data {} {more}", text(folder.path()))).json();
    let found = check("");
    let train = &found["train"];
    assert_eq!(train["images"], 9);
    assert_eq!(train["allowed_bad"], 1);
    assert_eq!(train["unreadable"][0]["key"], "train/cat/broken.jpg");
    assert!(train["unreadable"][0]["reason"].as_str().is_some_and(|reason| reason.contains("format")), "{train}");
    assert_eq!(
        train["duplicates"],
        json!([
            { "keys": ["train/cat/1.bmp", "train/cat/copy.bmp"], "classes": ["cat"] },
            { "keys": ["train/cat/2.bmp", "train/dog/contradicts.bmp"], "classes": ["cat", "dog"] },
        ])
    );
    assert_eq!(train["constant"], json!(["train/dog/grey.bmp"]));
    assert_eq!(train["tiny"], json!([{ "key": "train/dog/small.bmp", "height": 8, "width": 8 }]));
    let misnamed = json!([{ "key": "train/dog/named.jpg", "extension": "jpg", "content": "image/bmp" }]);
    assert_eq!(train["misnamed"], misnamed);
    assert_eq!(train["classes"], json!({ "cat": 4, "dog": 5, "emu": 0 }));
    assert_eq!(train["sizes"]["short_side"], json!({ "min": 8, "median": 40, "max": 40 }));
    assert_eq!(train["sizes"]["aspect"], json!({ "min": 1.0, "median": 1.0, "max": 1.0 }));
    assert_eq!(found["test"]["classes"], json!({ "cat": 1, "dog": 2 }));
    assert_eq!(
        found["leaks"],
        json!([{ "train": ["train/dog/3.bmp"], "test": ["val/dog/leak.bmp"], "classes": ["dog"] }])
    );
    assert!(found["class_mismatch"].as_str().is_some_and(|text| text.contains("emu")), "{found}");
    // Nothing but the time depends on the threads.
    let without_time = |mut found: Value| {
        found["seconds"] = Value::Null;
        found
    };
    assert_eq!(without_time(check("--threads 1")), without_time(check("--threads 3")));
    assert_eq!(check("--min-side 8")["train"]["tiny"], json!([]));
}

#[test]
fn long_lists_are_cut_in_the_text_alone() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    (0..14).for_each(|number| write(&folder.path().join(format!("{number:02}.png")), b"torn"));
    (0..5).for_each(|number| write(&folder.path().join(format!("same {number}.bmp")), &picture(0)));
    let line = format!("data check --data {}", text(folder.path()));
    let out = works(&line).out;
    assert!(out.contains("09.png") && !out.contains("10.png") && out.contains("  and 4 more\n"), "{out}");
    assert!(out.contains("same 0.bmp = same 1.bmp = same 2.bmp and 2 more\n"), "{out}");
    assert_eq!(counts(&out, "duplicate")[0], "4");
    assert!(out.contains("test   none") && out.contains("no classes"), "{out}");
    let found = works(&format!("{line} --json")).json();
    assert_eq!(found["train"]["unreadable"].as_array().map(Vec::len), Some(14));
    assert_eq!((&found["test"], &found["class_mismatch"]), (&Value::Null, &Value::Null));
}

#[test]
fn strict_is_an_exit_code() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write_good(folder.path());
    let line = format!("data check --strict --data {}", text(folder.path()));
    assert!(works(&line).out.contains("nothing is wrong with these images"));
    // A duplicate is worth knowing and no more.
    write(&folder.path().join("train/cat/copy.bmp"), &picture(0));
    works(&line);
    let leak = folder.path().join("val/cat/leak.bmp");
    write(&leak, &picture(0));
    fails(&line, 3, &["0 unreadable and 1 in both", text(folder.path())]);
    fs::remove_file(leak).expect("removed");
    write(&folder.path().join("val/cat/broken.png"), b"torn");
    fails(&line, 3, &["1 unreadable and 0 in both"]);
    fails("data check --data nowhere", 3, &["nowhere"]);
    fails("data check", 2, &["--data"]);
}

#[test]
fn all_kinds_of_data_are_looked_at() {
    let synthetic = works("data check --data synthetic:train=60,test=20 --json --strict").json();
    assert_eq!((&synthetic["train"]["images"], &synthetic["test"]["images"]), (&json!(60), &json!(20)));
    // A folder called `val` is its own test part, and does not leak into itself.
    let folder = tempfile::tempdir().expect("a temporary folder");
    write_good(folder.path());
    let val = works(&format!("data check --json --data {}", text(&folder.path().join("val")))).json();
    assert_eq!((&val["train"]["images"], &val["test"], &val["leaks"]), (&json!(2), &Value::Null, &json!([])));
}

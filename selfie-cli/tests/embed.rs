//! `embed`: its files, read by code that knows nothing of ours.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{fails, text, works, write, write_images};
use serde_json::Value;

const DATA: &str = "synthetic:train=30,test=10,classes=3";

/// A pretraining of a few steps.
fn pretrained(folder: &Path) -> PathBuf {
    let run = folder.join("pre");
    works(&format!("pretrain --data {DATA} --out {} --preset tiny --batch 8 --steps 6 --seed 7", text(&run)));
    run
}

/// Shape and numbers of a file of NumPy's, by its documented format.
fn read_npy(path: &Path) -> ([usize; 2], Vec<f32>) {
    let bytes = fs::read(path).expect("written");
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
    let header = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    assert_eq!(header % 64, 0, "readers map the numbers into memory");
    let text = std::str::from_utf8(&bytes[10..header]).expect("ASCII");
    assert!(
        text.contains("'descr': '<f4'") && text.contains("'fortran_order': False") && text.ends_with('\n'),
        "{text}"
    );
    let shape = text.split_once("'shape': (").expect("a shape").1.split_once(')').expect("a tuple").0;
    let shape: Vec<usize> = shape.split(", ").map(|side| side.parse().expect("a number")).collect();
    let values = bytes[header..].chunks(4).map(|four| f32::from_le_bytes(four.try_into().expect("whole numbers")));
    ([shape[0], shape[1]], values.collect())
}

#[test]
fn every_format_has_the_same_vectors() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = pretrained(folder.path());
    let file = |name: &str| folder.path().join(name);
    let embed = |name: &str, more: &str| works(&format!("embed {} -o {} {more}", text(&run), text(&file(name))));

    // The data are the run's own: the flag says where they are now.
    let answer = embed("all.npy", "--json").json();
    assert_eq!((&answer["n"], &answer["width"], &answer["labelled"]), (&40.into(), &128.into(), &40.into()));
    let (shape, values) = read_npy(&file("all.npy"));
    assert_eq!((shape, values.len()), ([40, 128], 40 * 128));
    let images = fs::read_to_string(file("all.images.csv")).expect("beside it");
    let images: Vec<&str> = images.lines().collect();
    assert_eq!((images.len(), images[0]), (41, "name,label,class"));
    assert!(images[1].starts_with("train:0,") && images[31].starts_with("test:0,"), "{images:?}");

    embed("all.csv", &format!("--data {DATA}"));
    let csv = fs::read_to_string(file("all.csv")).expect("written");
    let mut lines = csv.lines();
    let header = lines.next().expect("a header");
    assert!(header.starts_with("name,label,class,f0,f1,") && header.ends_with(",f127"), "{header}");
    for (i, line) in lines.enumerate() {
        let fields: Vec<&str> = line.split(',').collect();
        assert_eq!(fields[..3].join(","), images[i + 1]);
        let numbers: Vec<f32> = fields[3..].iter().map(|field| field.parse().expect("a number")).collect();
        assert_eq!(numbers, values[i * 128..][..128], "line {i}");
    }

    embed("all.safetensors", "");
    let bytes = fs::read(file("all.safetensors")).expect("written");
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight")) as usize;
    assert_eq!(header % 8, 0, "tensors are aligned");
    let about: Value = serde_json::from_slice(&bytes[8..8 + header]).expect("JSON");
    let tensor = |name: &str, kind: &str, shape: Value| {
        assert_eq!((&about[name]["dtype"], &about[name]["shape"]), (&kind.into(), &shape));
        let [from, to] = [0, 1].map(|i| about[name]["data_offsets"][i].as_u64().expect("an offset") as usize);
        &bytes[8 + header..][from..to]
    };
    let embedding = tensor("embedding", "F32", serde_json::json!([40, 128]));
    let embedding: Vec<f32> = embedding.chunks(4).map(|four| f32::from_le_bytes(four.try_into().expect("4"))).collect();
    assert_eq!(embedding, values);
    let labels = tensor("label", "I64", serde_json::json!([40]));
    let labels: Vec<i64> = labels.chunks(8).map(|eight| i64::from_le_bytes(eight.try_into().expect("8"))).collect();
    let list = |key: &str| -> Vec<String> {
        serde_json::from_str(about["__metadata__"][key].as_str().expect("a text")).expect("a list")
    };
    let (names, classes) = (list("names"), list("classes"));
    for (line, (name, &label)) in images[1..].iter().zip(names.iter().zip(&labels)) {
        assert_eq!(*line, format!("{name},{label},{}", classes[label as usize]));
    }
    assert_eq!(bytes.len(), 8 + header + 40 * 8 + 40 * 128 * 4);
}

#[test]
fn neither_batch_nor_threads_matter_and_l2_is_a_length_of_one() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = pretrained(folder.path());
    let embed = |name: &str, more: &str| {
        let out = folder.path().join(name);
        works(&format!("embed {} --data {DATA} -o {} {more}", text(&run), text(&out)));
        fs::read(out).expect("written")
    };
    let one = embed("1.npy", "--batch 1 --threads 1 --workers 0");
    assert_eq!(one, embed("16.npy", "--batch 16 --threads 2 --workers 2"));
    let parts = [embed("train.npy", "--part train"), embed("val.npy", "--part val")];
    let numbers = |bytes: &[u8]| bytes[128..].to_vec();
    assert_eq!(numbers(&one), parts.map(|part| numbers(&part)).concat());
    embed("l2.npy", "--l2");
    let ([_, width], long) = read_npy(&folder.path().join("1.npy"));
    let (_, unit) = read_npy(&folder.path().join("l2.npy"));
    for (long, unit) in long.chunks(width).zip(unit.chunks(width)) {
        let length = long.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        // A rounding to f32 each.
        for (&long, &unit) in long.iter().zip(unit) {
            assert!((f64::from(long) / length - f64::from(unit)).abs() <= f64::from(f32::EPSILON));
        }
    }
}

#[test]
fn a_pretrained_network_takes_images_or_patches() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = pretrained(folder.path());
    let embed = |run: &Path, more: &str| {
        let out = folder.path().join("x.npy");
        let answer = works(&format!("embed {} --overwrite --json -o {} {more}", text(run), text(&out))).json();
        (answer["layer"].as_str().expect("a text").to_owned(), read_npy(&out))
    };
    let (layer, map) = embed(&run, "");
    assert_eq!(layer, "norm behind stage 3, average over the image");
    assert_eq!(embed(&run, "--pooling map --layer stage3").1, map);
    let (layer, patches) = embed(&run, "--pooling patches");
    assert_eq!((layer.as_str(), patches.0), ("norm behind stage 3, average over the patches", map.0));
    assert_ne!(map.1, patches.1);
    let (layer, earlier) = embed(&run, "--layer stage2 --pooling patches");
    assert_eq!((layer.as_str(), earlier.0), ("norm behind stage 2, average over the patches", [40, 64]));

    let fine = folder.path().join("fine");
    let finetune = format!("finetune --data {DATA} --init {} --out {} --batch 8 --steps 2", text(&run), text(&fine));
    works(&format!("{finetune} --preset tiny"));
    assert_eq!(embed(&fine, "").0, "norm behind stage 4, average over the image");
    let out = folder.path().join("y.npy");
    let patches = format!("embed {} --pooling patches -o {}", text(&fine), text(&out));
    fails(&patches, 2, &["--pooling patches", "trained on whole images"]);
    assert!(!out.exists());
}

#[test]
fn images_without_labels() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = pretrained(folder.path());
    let data = folder.path().join("photos");
    write_images(&data, 5);
    // One outside the class folders, and one that is no image.
    fs::rename(data.join("a/0.bmp"), data.join("0.bmp")).expect("moved");
    write(&data.join("a/broken.png"), b"not a picture");
    let out = folder.path().join("photos.csv");
    let ran = works(&format!("embed {} --data {} -o {} --max-bad 0.5 --json", text(&run), text(&data), text(&out)));
    ran.says(&["a/broken.png"]);
    assert_eq!((&ran.json()["n"], &ran.json()["labelled"]), (&5.into(), &0.into()));
    assert_eq!(ran.json()["skipped"][0]["name"], "a/broken.png");
    let csv = fs::read_to_string(out).expect("written");
    let begins: Vec<String> =
        csv.lines().skip(1).map(|line| line.split(',').take(3).collect::<Vec<_>>().join(",")).collect();
    assert_eq!(begins, ["0.bmp,,", "a/2.bmp,,", "a/4.bmp,,", "b/1.bmp,,", "b/3.bmp,,"]);
}

#[test]
fn what_cannot_be_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = pretrained(folder.path());
    let out = |name: &str| folder.path().join(name).display().to_string();
    let embed = |out: &str, more: &str, code, words: &[&str]| {
        fails(&format!("embed {} -o {out} {more}", text(&run)), code, words);
    };
    embed(&out("x.txt"), "", 2, &["x.txt", ".npy", ".safetensors"]);
    embed(&out("x.npy"), "--layer stage4", 2, &["stage4", "stage1 to stage3"]);
    embed(&out("x.npy"), "--layer pool", 2, &["pool", "stage1"]);
    embed(&out("x.npy"), "--pooling u", 2, &["'u'", "map", "patches"]);
    embed(&out("x"), "", 2, &[".npy"]);
    embed(&out("nowhere/x.npy"), "", 2, &["there is no folder"]);
    write(&folder.path().join("y.images.csv"), b"mine");
    embed(&out("y.npy"), "", 2, &["y.images.csv", "--overwrite"]);
    assert_eq!(fs::read(folder.path().join("y.images.csv")).expect("it stays"), b"mine");
    works(&format!("embed {} -o {} --overwrite", text(&run), out("y.npy")));
    let data = folder.path().join("photos");
    write_images(&data, 4);
    let inside = format!("--data {}", text(&data));
    embed(text(&data.join("x.npy")), &inside, 2, &["inside the data"]);
    embed(&out("z.npy"), &format!("{inside} --part val"), 3, &["val/ or test/"]);
    embed(&out("z.npy"), "--data nowhere", 3, &["nowhere"]);
    embed(&out("z.npy"), "--batch 0", 2, &["train.batch"]);
    fails(&format!("embed nowhere -o {}", out("z.npy")), 3, &["nowhere", "pretrain"]);
    let without = folder.path().join("without");
    write(&without.join("config.toml"), b"");
    fails(&format!("embed {} -o {}", text(&without), out("z.npy")), 3, &["weights/model.safetensors"]);
    write(&data.join("a/0.bmp"), b"torn");
    for name in ["a/2", "b/1", "b/3"] {
        write(&data.join(format!("{name}.bmp")), b"torn");
    }
    embed(&out("z.npy"), &inside, 3, &["max-bad"]);
    embed(&out("z.npy"), &format!("{inside} --max-bad 1"), 3, &["none that can be read"]);
    assert!(!folder.path().join("z.npy").exists());
}

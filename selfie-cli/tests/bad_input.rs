//! What goes wrong in the field: each with its exit code, and a message that helps.

mod support;

use std::fs;

use support::{fails, ran, selfie, text, works, write, write_images};

#[test]
fn data_that_are_not_there() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("run");
    let pretrain = |data: &str, code, words: &[&str]| {
        fails(&format!("pretrain --data {data} --out {}", text(&out)), code, words);
        assert!(!out.exists(), "nothing is written before the data are open");
    };
    pretrain("nowhere/at/all", 3, &["nowhere/at/all"]);
    pretrain("synthetic:trian=5", 2, &["trian"]);
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).expect("a folder");
    pretrain(text(&empty), 3, &["0 images", text(&empty)]);
    let archive = folder.path().join("cifar-10-binary.tar.gz");
    // The magic of gzip, and no more.
    write(&archive, &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 1, 2, 3]);
    pretrain(text(&archive), 3, &["cifar-10-binary.tar.gz"]);
    fails(&format!("pretrain --out {}", text(&out)), 2, &["--data is missing"]);
    fails("pretrain --data synthetic:", 2, &["--out is missing"]);
}

#[test]
fn a_corrupt_image_is_skipped_and_listed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("data");
    write_images(&data, 12);
    write(&data.join("a/broken.png"), b"not a picture");
    let pretrain = |out: &str, max_bad| {
        let out = folder.path().join(out);
        format!(
            "pretrain --data {} --out {} --preset tiny --steps 4 --batch 4 --image-size 32 --holdout 0 --max-bad {max_bad}",
            text(&data),
            text(&out)
        )
    };
    works(&pretrain("run", "0.2")).says(&["a/broken.png", "skipped.txt", "held out  none"]);
    let skipped = fs::read_to_string(folder.path().join("run/skipped.txt")).expect("the list");
    assert!(skipped.contains("a/broken.png"), "{skipped}");
    fails(&pretrain("strict", "0"), 3, &["a/broken.png", "max-bad"]);
}

#[test]
fn folders_that_must_not_be_written() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("data");
    write_images(&data, 4);
    fails(&format!("pretrain --data {0} --out {0}/runs/x", text(&data)), 2, &["inside the data"]);
    assert!(!data.join("runs").exists());
    let other = folder.path().join("other");
    write(&other.join("thesis.tex"), b"");
    fails(&format!("pretrain --data synthetic: --out {}", text(&other)), 2, &["no run folder", "thesis.tex"]);
    fails(&format!("demo --out {}", text(&other)), 2, &["no earlier demo"]);
    assert!(other.join("thesis.tex").exists());
}

#[test]
fn requests_that_cannot_be_met() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("run");
    let check = |command: &str, more: &str, code, words: &[&str]| {
        let line = format!("{command} --data synthetic:train=20,test=10 --out {} --preset tiny {more}", text(&out));
        fails(&line, code, words);
    };
    check("pretrain", "--batch 64", 2, &["train.batch = 64", "20 images"]);
    check("pretrain", "--batch 4 --device cuda", 2, &["CUDA", "--device cpu"]);
    check("pretrain", "--batch 5 --accumulate 2", 2, &["train.accumulate"]);
    check("pretrain", "--batch 4 --set model.patch_size=5", 2, &["patch_size", "5"]);
    check("pretrain", "--batch 4 --set model.logit_scale=big", 2, &["model.logit_scale", "big"]);
    check("finetune", "", 2, &["--init is missing"]);
    check("finetune", "--init scratch --labels many", 2, &["labels", "many"]);
    check("finetune", "--init nowhere.safetensors", 3, &["nowhere.safetensors"]);
    let enormous = "--batch 16 --set model.stem_width=4096 --set model.depths=900,900,900,1";
    check("pretrain", enormous, 5, &["GiB", "--batch"]);
}

#[test]
fn files_that_are_not_what_they_should_be() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("weights.safetensors");
    write(&file, b"something else");
    fails(&format!("inspect {}", text(&file)), 3, &["weights.safetensors", "expected a safetensors file"]);
    fails(&format!("inspect {}", text(folder.path())), 3, &["run folder"]);
    fails("inspect nowhere", 3, &["nowhere", "found nothing"]);
    fails("evaluate nowhere", 3, &["nowhere", "finetune"]);
    let out = folder.path().join("run");
    let finetune = format!("finetune --data synthetic: --init {} --out {} --preset tiny", text(&file), text(&out));
    fails(&finetune, 3, &["weights.safetensors"]);
}

#[test]
fn two_writers() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("run");
    let data = "synthetic:train=64,test=8";
    let pretrain =
        |steps| format!("pretrain --data {data} --out {} --preset tiny --batch 8 --steps {steps}", text(&out));
    let mut first = selfie(&pretrain(100_000)).stderr(std::process::Stdio::null()).spawn().expect("it starts");
    while !out.join("config.toml").exists() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    // Short, so that it ends if nothing stops it.
    let second = ran(&mut selfie(&pretrain(3)));
    first.kill().expect("it runs");
    first.wait().expect("it ended");
    assert_eq!(second.code, Some(1), "{}", second.err);
    second.says(&["another process", text(&out)]);
    // A killed process leaves no lock behind.
    works(&pretrain(3));
}

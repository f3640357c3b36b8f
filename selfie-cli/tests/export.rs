//! `export`: files for other programs, and back by `--init`.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{fails, ran, selfie, text, works, write};

const DATA: &str = "synthetic:train=30,test=10,classes=3";

fn pretrained(folder: &Path) -> PathBuf {
    let run = folder.join("pre");
    works(&format!("pretrain --data {DATA} --out {} --preset tiny --batch 8 --steps 4", text(&run)));
    run
}

fn finetuned(folder: &Path) -> PathBuf {
    let run = folder.join("fine");
    let more = "--preset tiny --batch 8 --steps 6 --init scratch --save-every 3 --threads 1";
    works(&format!("finetune --data {DATA} --out {} {more}", text(&run)));
    run
}

#[test]
fn every_format_is_written_and_checked() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for run in [pretrained(folder.path()), finetuned(folder.path())] {
        let is_classifier = run.ends_with("fine");
        for (to, out) in [("timm", "timm"), ("onnx", "x.onnx"), ("safetensors", "x.safetensors")] {
            let out = run.join(out);
            let export = works(&format!("export {} --to {to} -o {} --check --json", text(&run), text(&out)));
            let answer = export.json();
            assert_eq!((&answer["format"], &answer["path"]), (&to.into(), &text(&out).into()));
            assert!(answer["check"]["distance"].as_f64().expect("a number") <= 1e-9, "{answer}");
            assert_eq!(answer["classes"].as_array().expect("a list").len(), if is_classifier { 3 } else { 0 });
            assert!(answer["loading"].as_str().expect("lines").contains(text(&out)), "{answer}");
            export.says(&["wrote", "checked", "bit for bit"]);
        }
        let alone = run.join("alone.safetensors");
        works(&format!("export {} --to timm -o {}", text(&run), text(&alone)));
        // Behind the header, whose metadata come in any order.
        let numbers = |file: PathBuf| {
            let bytes = fs::read(file).expect("a file");
            let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
            bytes[8 + header..].to_vec()
        };
        assert!(numbers(alone) == numbers(run.join("x.safetensors")), "the same tensors");
        let tensors = fs::read(run.join("timm/model.safetensors")).expect("written");
        assert_eq!(tensors, fs::read(run.join("weights/model.safetensors")).expect("written"));
        let (own, config) = (run.join("weights/config.json"), run.join("timm/config.json"));
        assert_eq!(fs::read_to_string(own).expect("written"), fs::read_to_string(config).expect("written"));
    }
    let words = works(&format!("export {0} --to onnx -o {0}/y.onnx", text(&folder.path().join("fine")))).out;
    assert!(words.contains("import onnxruntime") && words.contains("logits, embedding = session.run"), "{words}");

    // And back.
    let [pre, fine] = ["pre", "fine"].map(|run| folder.path().join(run).join("x.safetensors"));
    for (init, fresh) in [(&pre, "stages.3, norm, head"), (&fine, "")] {
        let out = folder.path().join("again");
        let line = format!(
            "finetune --data {DATA} --init {} --preset tiny --batch 8 --steps 1 --out {}",
            text(init),
            text(&out)
        );
        let weights = works(&line).err;
        let weights = weights.lines().find(|line| line.starts_with("weights")).expect("a line of the weights");
        assert_eq!(weights.split("fresh: ").nth(1).unwrap_or_default().split(';').next(), Some(fresh), "{weights}");
        fs::remove_dir_all(out).expect("removed");
    }
    // A checkpoint, whose images the run knows; its pooling stays behind.
    for run in ["pre", "fine"] {
        let run = folder.path().join(run);
        let last = fs::read_to_string(run.join("state/last")).expect("a checkpoint");
        let checkpoint = run.join("state").join(last.trim());
        let out = run.join("last.onnx");
        works(&format!("export {} --to onnx -o {} --check", text(&checkpoint), text(&out)));
        assert_eq!(fs::read(&out).expect("written"), fs::read(run.join("x.onnx")).expect("written"));
    }
}

#[test]
fn inspect_tells_how_to_load_any_of_them() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = finetuned(folder.path());
    works(&format!("export {0} --to safetensors -o {0}/x.safetensors", text(&run)));
    let lines = |path: &Path| {
        let found = works(&format!("inspect {} --json", text(path))).json();
        found["loading"].as_str().map(String::from)
    };
    let one = lines(&run.join("x.safetensors")).expect("lines");
    assert!(one.contains(&format!("load_file(\"{}\")", text(&run.join("x.safetensors")))), "{one}");
    // Whatever the README says, or does not.
    write(&run.join("weights/README.md"), b"```python\nimport nonsense\n```\n");
    let whole = lines(&run).expect("lines");
    let file = run.join("weights/model.safetensors");
    assert!(whole.contains("model.stem.conv") && whole.contains(text(&file)), "{whole}");
    assert_eq!(lines(&run.join("weights")), Some(whole));
    let words = works(&format!("inspect {}", text(&run))).out;
    assert!(words.contains("to load it in Python (input: RGB, 32 x 32"), "{words}");
    let last = fs::read_to_string(run.join("state/last")).expect("a checkpoint");
    assert!(lines(&run.join("state").join(last.trim())).is_some());
    let pre = pretrained(folder.path());
    assert!(lines(&pre.join("weights/pool.safetensors")).is_none());
}

#[test]
fn what_is_there_stays_unless_it_is_to_be_replaced() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = finetuned(folder.path());
    let file = folder.path().join("mine.onnx");
    write(&file, b"mine");
    let export = |to: &str, out: &Path| format!("export {} --to {to} -o {}", text(&run), text(out));
    fails(&export("onnx", &file), 2, &["mine.onnx", "--overwrite"]);
    assert_eq!(fs::read(&file).expect("it stays"), b"mine");
    works(&format!("{} --force", export("onnx", &file)));
    assert_ne!(fs::read(&file).expect("replaced"), b"mine");
    let taken = folder.path().join("taken");
    write(&taken.join("notes.txt"), b"mine");
    fails(&export("timm", &taken), 2, &["taken", "not empty", "--overwrite"]);
    works(&format!("{} --overwrite", export("timm", &taken)));
    assert_eq!(fs::read(taken.join("notes.txt")).expect("it stays"), b"mine");
    assert!(taken.join("model.safetensors").is_file());
    fails(&export("timm", &file), 2, &["mine.onnx", "no folder"]);
    fails(&export("safetensors", &taken), 2, &["taken", "a folder"]);
    fails(&export("onnx", &folder.path().join("nowhere/x.onnx")), 2, &["there is no folder"]);
    fails(&export("tflite", &folder.path().join("x")), 2, &["tflite", "onnx"]);
}

#[test]
fn what_is_no_network_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("x.onnx");
    let export = |source: &Path, words: &[&str]| {
        fails(&format!("export {} --to onnx -o {}", text(source), text(&out)), 3, words);
        assert!(!out.exists());
    };
    export(&folder.path().join("nowhere"), &["nowhere"]);
    let torch = folder.path().join("resnet.pth");
    write(&torch, b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.");
    export(&torch, &["PyTorch", "\nimport torch, safetensors.torch", "\nsafetensors.torch.save_file"]);
    fails(
        &format!(
            "finetune --data {DATA} --init {} --preset tiny --out {}",
            text(&torch),
            text(&folder.path().join("f"))
        ),
        3,
        &["PyTorch", "\nimport torch", "resnet.safetensors"],
    );
    let run = pretrained(folder.path());
    export(&run.join("weights/pool.safetensors"), &["stem.conv.weight"]);
    // A part of a network.
    let weights = run.join("weights/model.safetensors");
    let mut bytes = fs::read(&weights).expect("written");
    let at = bytes.windows(11).position(|part| part == b"norm.weight").expect("a norm");
    bytes[at..at + 4].copy_from_slice(b"morn");
    write(&weights, &bytes);
    export(&run, &["model.safetensors", "no such tensor"]);
}

/// Refuses every write, flush, rename and new folder of an export in turn.
#[cfg(debug_assertions)]
#[test]
fn a_full_disk_leaves_nothing_or_what_was_there() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = finetuned(folder.path());
    for to in ["timm", "onnx", "safetensors"] {
        let mut refused = 0;
        for fault in 1.. {
            let place = folder.path().join("place");
            fs::create_dir(&place).expect("a folder");
            let line = format!("export {} --to {to} -o {}", text(&run), text(&place.join("x")));
            let ran = ran(selfie(&line).env("SELFIE_FAULT", fault.to_string()));
            let left = fs::read_dir(&place).expect("a folder").count();
            fs::remove_dir_all(&place).expect("removed");
            if ran.code == Some(0) {
                break;
            }
            refused += 1;
            assert_eq!((ran.code, left), (Some(1), 0), "{to}, fault {fault}: {}", ran.err);
            ran.says(&["cannot write"]);
        }
        assert!(refused >= 4, "{to}: only {refused} writes");
    }
}

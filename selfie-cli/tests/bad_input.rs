//! What goes wrong in the field: each with its exit code, and a message that helps.

use std::fs;

#[cfg(target_os = "linux")]
use crate::support::behind;
use crate::support::{fails, ran, selfie, text, works, write, write_images};

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

/// The system refuses memory that the machine has: a limit, as of a batch system.
#[cfg(target_os = "linux")]
#[test]
fn memory_that_the_system_refuses() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let line = format!(
        "pretrain --data synthetic:train=300,test=8 --out {} --preset small --batch 256 --steps 2 --threads 2",
        text(&folder.path().join("run"))
    );
    let found = ran(&mut behind("ulimit -v 400000; exec \"$0\" \"$@\"", &selfie(&line)));
    assert_eq!(found.code, Some(5), "{}", found.err);
    found.says(&["out of memory", "lower --batch"]);
}

/// A control group of the memory controller, of either version, removed when dropped.
#[cfg(target_os = "linux")]
struct ControlGroup(std::path::PathBuf);

#[cfg(target_os = "linux")]
impl ControlGroup {
    fn with_memory(bytes: u64) -> Self {
        let name = format!("selfie-test-{}", std::process::id());
        let root = std::path::Path::new("/sys/fs/cgroup");
        let (folder, limit) = match root.join("memory").is_dir() {
            true => (root.join("memory").join(name), "memory.limit_in_bytes"),
            false => (root.join(name), "memory.max"),
        };
        fs::create_dir(&folder).expect("making a control group needs root");
        let group = Self(folder);
        fs::write(group.0.join(limit), bytes.to_string()).expect("it has the memory controller");
        group
    }

    /// Runs `line` in it.
    fn ran(&self, line: &str) -> crate::support::Ran {
        let enter = format!("echo $$ > '{}'; exec \"$0\" \"$@\"", self.0.join("cgroup.procs").display());
        ran(&mut behind(&enter, &selfie(line)))
    }
}

#[cfg(target_os = "linux")]
impl Drop for ControlGroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[cfg(target_os = "linux")]
#[test]
#[ignore = "needs root, to make a control group"]
fn a_control_group_of_200_megabytes() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let group = ControlGroup::with_memory(200 << 20);
    let data = "--data synthetic:train=512,test=8,classes=4";
    let line =
        |command: &str, out: &str| format!("{command} {data} --steps 2 --out {}", text(&folder.path().join(out)));
    for (command, words) in [
        ("pretrain --preset small --batch 256", "for a batch of 256"),
        ("pretrain --preset small --batch 512 --accumulate 2", "for a batch of 256 (a step of 512"),
        ("finetune --init scratch --preset small --batch 4096", "for a batch of 512, with"),
    ] {
        let found = group.ran(&line(command, "refused"));
        assert_eq!(found.code, Some(5), "{command}: {}", found.err);
        found.says(&[
            "before the first step",
            "the control group of this process",
            "200.0 MiB",
            "lower --batch",
            words,
        ]);
        assert!(!folder.path().join("refused/state").exists());
    }
    // What it allows works in it.
    let found = group.ran(&line("finetune --init scratch --preset tiny --batch 8", "fine"));
    assert_eq!(found.code, Some(0), "{}", found.err);
    let environment = fs::read(folder.path().join("fine/env.json")).expect("it is written");
    let environment: serde_json::Value = serde_json::from_slice(&environment).expect("JSON");
    assert_eq!(environment["memory_bytes"], 200 << 20);
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

#[test]
fn configurations_that_no_machine_could_run() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (file, out) = (folder.path().join("hostile.toml"), folder.path().join("run"));
    let million = format!("[{}]", "1, ".repeat(1_000_000));
    let long = "x".repeat(1_000_000);
    for (section, line, key) in [
        ("train", "steps = 9223372036854775807", "train.steps"),
        ("train", "steps = -1", "train.steps"),
        ("train", "lr = nan", "train.lr"),
        ("train", "lr = -inf", "train.lr"),
        ("train", "lr = 1e400", "lr = 1e400"),
        ("train", "batch = 0", "train.batch"),
        ("train", "batch = 4611686018427387904", "train.batch"),
        ("train", "minutes = 1e300", "train.minutes"),
        ("train", "momentum = nan", "train.momentum"),
        ("train", "seed = -5", "train.seed"),
        ("model", "stem_width = 0", "model.stem_width"),
        ("model", "ffn = 1152921504606846976", "model.ffn"),
        ("model", "pool_blocks = 1001", "model.pool_blocks"),
        ("model", "depths = [1, 2, 3]", "model.depths"),
        ("model", &format!("depths = {million}"), "model.depths"),
        ("model", &format!("preset = \"{long}\""), "model.preset"),
        ("model", &format!("{long} = 1"), "model.xxx"),
        ("data", "image_size = 1000000000", "data.image_size"),
        ("data", "mean = [nan, 0.5, 0.5]", "data.mean"),
        ("data", "workers = 1000000000", "data.workers"),
        ("run", "threads = 1000000000", "run.threads"),
    ] {
        write(&file, format!("[{section}]\n{line}\n").as_bytes());
        let line = format!("pretrain --data synthetic: --out {} -c {}", text(&out), text(&file));
        let ran = ran(&mut selfie(&line));
        assert_eq!(ran.code, Some(2), "{key}: {}", &ran.err[..ran.err.len().min(500)]);
        assert!(ran.err.contains(key) && ran.err.len() < 1_000, "{key}: {} bytes", ran.err.len());
        assert!(!out.exists(), "{key}");
    }
    let deep = format!("a = {}{}", "[".repeat(100_000), "]".repeat(100_000));
    for (bytes, code) in [(deep.as_bytes(), 2), (b"\xff\xfe[train]", 3), (b"[train", 2), (b"train = 1", 2)] {
        write(&file, bytes);
        fails(&format!("config show -c {}", text(&file)), code, &["hostile.toml"]);
    }
}

/// A run of three steps, in a folder of its own.
fn small_run(folder: &std::path::Path, more: &str) -> String {
    let out = folder.join("run");
    let line = format!(
        "pretrain --data synthetic:train=16,test=8 --out {} --preset tiny --batch 8 --steps 3 --save-every 1 {more}",
        text(&out)
    );
    works(&line);
    line
}

#[test]
fn damaged_run_folders() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let line = small_run(folder.path(), "");
    let run = folder.path().join("run");
    let longer = line.replace("--steps 3", "--steps 4");
    for (name, damage, code, word) in [
        ("status.json", &b"{"[..], 3, "status.json"),
        ("status.json", b"{\"command\": 5}", 3, "status.json"),
        ("status.json", b"\xff", 3, "status.json"),
        ("data.json", b"{", 3, "data.json"),
        ("data.json", b"[]", 3, "the data changed"),
        ("data.json", b"{\"train\": {\"images\": 99}}", 3, "train.images was 99, now it is 16"),
        ("config.toml", b"\xff", 3, "config.toml"),
        ("config.toml", b"[train", 2, "config.toml"),
        ("config.toml", b"[train]\nlr = nan", 2, "train.lr"),
    ] {
        let file = run.join(name);
        let sound = fs::read(&file).expect("the run wrote it");
        write(&file, damage);
        fails(&longer, code, &[word]);
        assert_eq!(fs::read(&file).expect("still there"), damage, "{name} is left as it was");
        write(&file, &sound);
    }

    // A damaged line of metrics costs no other, and a damaged checkpoint one step.
    let metrics = run.join("metrics.jsonl");
    let sound = fs::read(&metrics).expect("the run wrote it");
    write(&metrics, &[b"\xff\xfe\n{\"step\": 1e99}\n", &sound[..]].concat());
    write(&run.join("state/step-00000003/weights.safetensors"), b"nothing");
    works(&longer).says(&["passed over", "step-00000003"]);
    let lines = fs::read_to_string(&metrics).expect("text again");
    assert!(lines.lines().all(|line| line.starts_with("{\"step\":")) && lines.contains("\"step\":1,"), "{lines}");

    // Another's state.
    let other = tempfile::tempdir().expect("a temporary folder");
    small_run(other.path(), "--set model.stem_width=4 --set model.heads=2");
    fs::remove_dir_all(run.join("state")).expect("there");
    fs::rename(other.path().join("run/state"), run.join("state")).expect("moved");
    fails(&longer.replace("--steps 4", "--steps 9"), 2, &["model.stem_width = 8 where the run has 4"]);
    // And one that leads elsewhere.
    let manifest = run.join("state/step-00000003/manifest.json");
    let sound = fs::read_to_string(&manifest).expect("there");
    write(&manifest, sound.replace("velocity.safetensors", "../../../../../etc/passwd").as_bytes());
    fails(&format!("inspect {}", text(&run.join("state/step-00000003"))), 3, &["manifest.json", "../../etc/passwd"]);

    let names: Vec<_> =
        fs::read_dir(folder.path()).expect("there").map(|entry| entry.expect("readable").file_name()).collect();
    assert_eq!(names, ["run"], "nothing is written beside the run");
}

#[test]
fn descriptions_of_weights_that_lie() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("run");
    let data = "synthetic:train=16,test=8,classes=2";
    works(&format!("finetune --init scratch --data {data} --out {} --preset tiny --batch 8 --steps 1", text(&out)));
    let (card, evaluate) = (out.join("weights/config.json"), format!("evaluate {} --data {data}", text(&out)));
    let sound = fs::read_to_string(&card).expect("the run wrote it");
    works(&evaluate);
    let nested = "[".repeat(100_000);
    for (lie, word) in [
        ("[]", "no classes"),
        ("{", "config.json"),
        (&nested, "config.json"),
        ("{\"label_names\": [1, 2]}", "no classes"),
        ("{\"label_names\": [\"a\"]}", "expected the 1 classes"),
        (&sound.replace("3,\n      32,", "3,\n      1152921504606846976,"), "input_size of 1152921504606846976"),
        (&sound.replace("3,\n      32,", "3,\n      -32,"), "input_size of -32"),
        (&sound.replace("3,\n      32,", "3,\n      0,"), "input_size of 0"),
    ] {
        write(&card, lie.as_bytes());
        fails(&evaluate, 3, &[word]);
    }
}

//! Training end to end on made-up images, and its exactness: the same bytes whatever happens on the way.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::support::traces::{assert_same, traces};
use crate::support::{fails, selfie, text, works, write_images};
use serde_json::Value;

const DATA: &str = "synthetic:train=60,test=20,classes=4";

/// Of the runs that are compared: enough that a signal comes long before the end.
const STEPS: u64 = 60;

/// A small pretraining, with lines, evaluations and checkpoints at steps that do not coincide.
fn pretrain(out: &Path, steps: u64) -> String {
    format!(
        "pretrain --data {DATA} --out {} --preset tiny --batch 8 --steps {steps} --log-every 1 --eval-every 6 \
         --save-every 4 --seed 5",
        text(out)
    )
}

fn start(line: &str) -> Child {
    selfie(line).stderr(Stdio::null()).spawn().expect("it starts")
}

/// Waits until the run has logged a step.
fn wait_for_step(out: &Path, step: u64) {
    let began = Instant::now();
    while last_step(out) < step {
        assert!(began.elapsed() < Duration::from_secs(60), "step {step} never came");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn last_step(out: &Path) -> u64 {
    let text = fs::read_to_string(out.join("metrics.jsonl")).unwrap_or_default();
    let steps = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()?["step"].as_u64());
    steps.max().unwrap_or(0)
}

/// The reference run: one thread, uninterrupted.
fn reference(folder: &Path) -> PathBuf {
    let out = folder.join("reference");
    works(&(pretrain(&out, STEPS) + " --threads 1 --workers 0"));
    out
}

#[test]
fn the_same_bytes_on_two_threads_and_resumed_after_a_kill() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let reference = reference(folder.path());

    let threads = folder.path().join("threads");
    works(&(pretrain(&threads, STEPS) + " --threads 2 --workers 2"));
    assert_same(&reference, &threads);

    let killed = folder.path().join("killed");
    for step in [6, 15] {
        let mut child = start(&pretrain(&killed, STEPS));
        wait_for_step(&killed, step);
        child.kill().expect("it runs");
        child.wait().expect("it ended");
        // Not after its last checkpoint, or the test shows nothing.
        assert!(last_step(&killed) < STEPS, "it was too fast");
    }
    works(&pretrain(&killed, STEPS)).says(&["continuing"]);
    assert_same(&reference, &killed);

    // Other values are other bytes: what was compared can differ.
    let other = folder.path().join("other");
    works(&(pretrain(&other, STEPS) + " --lr 0.099"));
    let differ = |(name, one): (&String, &Vec<u8>)| traces(&other).get(name) != Some(one);
    let traces = traces(&reference);
    assert!(traces.iter().filter(|(name, _)| name.ends_with(".safetensors")).all(differ));
}

#[cfg(unix)]
#[test]
fn a_signal_saves_and_the_same_command_goes_on() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let reference = reference(folder.path());
    let out = folder.path().join("stopped");
    for (signal, step) in [("TERM", 3), ("INT", 9), ("USR1", 14), ("HUP", 20)] {
        let mut child = start(&pretrain(&out, STEPS));
        wait_for_step(&out, step);
        let killed = std::process::Command::new("kill").args(["-s", signal, &child.id().to_string()]).status();
        assert!(killed.expect("kill runs").success());
        assert_eq!(child.wait().expect("it ended").code(), Some(75), "SIG{signal}");
        assert_eq!(status(&out)["state"], "stopped");
        assert!(out.join("weights/model.safetensors").exists());
    }
    works(&pretrain(&out, STEPS));
    assert_same(&reference, &out);
}

/// The first signal asks for a save; who asks again does not wait for it.
#[cfg(unix)]
#[test]
fn a_second_signal_ends_at_once() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("run");
    // A step takes seconds, though not gigabytes, which a system takes its time to clear away.
    let data = "synthetic:train=8000,test=8";
    let line = format!("pretrain --data {data} --out {} --preset small --batch 8000 --accumulate 80", text(&out));
    let mut child = start(&line);
    let signal = || {
        let killed = std::process::Command::new("kill").args(["-s", "INT", &child.id().to_string()]).status();
        assert!(killed.expect("kill runs").success());
    };
    let began = Instant::now();
    while !out.join("status.json").exists() {
        assert!(began.elapsed() < Duration::from_secs(60), "it never began");
        std::thread::sleep(Duration::from_millis(20));
    }
    signal();
    std::thread::sleep(Duration::from_millis(200));
    signal();
    let asked = Instant::now();
    assert_eq!(child.wait().expect("it ended").code(), Some(130));
    assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
    assert!(!out.join("state").exists(), "nothing was saved: the first step was not at its end");
}

/// A disk that goes away is not so many bad images: the run stops, and once it is back, goes on to the same bytes.
#[test]
fn data_that_go_away_and_come_back() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (data, away) = (folder.path().join("data"), folder.path().join("away"));
    write_images(&data, 24);
    let line = |out: &str| {
        format!(
            "pretrain --data {} --out {} --preset tiny --batch 8 --steps {STEPS} --log-every 1 --eval-every 0 \
             --save-every 1 --image-size 32 --holdout 0 --max-bad 0.5",
            text(&data),
            text(&folder.path().join(out))
        )
    };
    works(&line("whole"));
    let out = folder.path().join("out");
    let child = selfie(&line("out")).stderr(Stdio::piped()).spawn().expect("it starts");
    wait_for_step(&out, 3);
    fs::rename(&data, &away).expect("they go away");
    let ended = child.wait_with_output().expect("it ended");
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(3), "{said}");
    assert!(said.contains("cannot read") && said.contains(text(&data)), "{said}");
    assert!(!out.join("skipped.txt").exists(), "none of them is bad");
    assert!(last_step(&out) < STEPS, "it was too fast");
    fs::rename(&away, &data).expect("they come back");
    works(&line("out"));
    assert_same(&folder.path().join("whole"), &out);
}

fn status(out: &Path) -> Value {
    serde_json::from_slice(&fs::read(out.join("status.json")).expect("a status")).expect("JSON")
}

#[test]
fn a_finished_run_says_so_and_can_be_extended() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = folder.path().join("run");
    let out = text(&run);
    works(&pretrain(&run, 6));
    works(&pretrain(&run, 6)).says(&["finished", "--steps"]);
    // Without flags: the run's own values hold. Only the length changes.
    works(&format!("pretrain --out {out} --steps 30")).says(&["continuing", "train.steps = 30"]);
    assert_eq!(last_step(&run), 30);
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).expect("metrics");
    let steps: Vec<u64> = metrics
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON lines"))
        .filter(|line| line.get("loss").is_some())
        .map(|line| line["step"].as_u64().expect("a number"))
        .collect();
    assert_eq!(steps, (1..=30).collect::<Vec<_>>(), "no gaps, no repeats");
    // The resolved configuration runs as is.
    works(&format!("pretrain -c {out}/config.toml")).says(&["finished"]);
    // What may not change is refused by name, with both values.
    fails(&format!("pretrain --out {out} --lr 0.03"), 2, &["train.lr = 0.03", "0.1"]);
    fails(&format!("pretrain --out {out} --seed 6"), 2, &["train.seed = 6", "5"]);
    fails(&format!("pretrain --out {out} --data synthetic:train=61"), 2, &["data.path", DATA]);
    fails(&format!("finetune --out {out} --data {DATA} --init scratch"), 2, &["a run of `pretrain`"]);
}

#[test]
fn from_pretraining_to_test_accuracy() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (pre, fine) = (folder.path().join("pre"), folder.path().join("fine"));
    let (at_pre, at_fine) = (text(&pre), text(&fine));
    let done = works(&format!("pretrain --data {DATA} --out {at_pre} --preset tiny --batch 8 --steps 8 --json"));
    done.says(&["memory", "MiB: ", "held-out accuracy", "chance", "device  "]);
    assert_eq!(done.json()["result"]["chance"], 0.25);
    for file in ["command.txt", "env.json", "data.json", "metrics.csv", "log.txt", "status.json", "state/last"] {
        assert!(pre.join(file).exists(), "{file}");
    }

    let finetune = format!("finetune --data {DATA} --out {at_fine} --init {at_pre} --labels 5 --batch 64 --epochs 3");
    works(&finetune).says(&["stages.0-2 from", "fresh: stages.3", "20 instead of 64", "top-1", "n = 20"]);
    assert_eq!(fs::read_to_string(fine.join("labels.txt")).expect("the labels").lines().count(), 20);
    // The network is the run's that it starts from, though no preset was named.
    assert!(fs::read_to_string(fine.join("config.toml")).expect("a configuration").contains("preset = \"tiny\""));

    let found = works(&format!("evaluate {at_fine} --json")).json();
    for key in ["top1", "top5", "n", "loss"] {
        assert_eq!(found[key], status(&fine)["result"][key], "{key}");
    }
    assert_eq!(found["n"], 20);
    let table = works(&format!("evaluate {at_fine} --data {DATA} --limit 10")).out;
    assert!(table.contains("n = 10") && table.contains("top-1"), "{table}");
    fails(&format!("evaluate {at_fine} --data synthetic:classes=5"), 3, &["4 classes", "found 5"]);
    fails(&format!("evaluate {at_pre} --data {DATA}"), 3, &["pretraining run"]);

    let seen = works(&format!("inspect {at_pre}")).out;
    for word in ["stem.conv.weight", "pool.", "stages.3, norm, head", "--init", "finished at step 8", "timm"] {
        assert!(seen.contains(word), "no `{word}` in {seen}");
    }
    let seen = works(&format!("inspect {at_fine}/weights/model.safetensors --json")).json();
    assert_eq!(seen["config"]["num_classes"], 4);
    assert!(works(&format!("inspect {at_pre}/state/step-00000008")).out.contains("is a checkpoint"));

    // A checkpoint starts a finetuning as well.
    let (other, init) = (folder.path().join("from-checkpoint"), format!("{at_pre}/state/step-00000008"));
    let finetune = format!("finetune --data {DATA} --out {} --init {init} --preset tiny --labels 5", text(&other));
    works(&(finetune + " --steps 1")).says(&["stages.0-2 from", "weights.safetensors", "not used: norm, pool"]);
    assert!(works(&format!("inspect {at_pre}")).out.contains("best:        step-00000008"));

    // Weights of another network.
    let other = folder.path().join("other");
    let finetune = format!("finetune --data {DATA} --out {} --init {at_pre} --preset small --labels 5", text(&other));
    fails(&finetune, 3, &["stem.conv.weight", "expects", "the file has", "model.safetensors"]);
}

#[test]
fn scratch_with_validation_and_parts_of_batches() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("scratch");
    let line = format!(
        "finetune --data {DATA} --out {} --init scratch --preset tiny --labels 10 --batch 16 --steps 4 \
         --validation 0.5 --eval-every 2 --accumulate 2",
        text(&out)
    );
    works(&line).says(&["random (scratch)", "20 of these for validation", "held-out accuracy", "top-1"]);
    let metrics = fs::read_to_string(out.join("metrics.jsonl")).expect("metrics");
    assert_eq!(metrics.matches("eval_accuracy").count(), 2, "{metrics}");
}

#[test]
fn a_folder_of_images_without_a_test_part() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (data, pre, fine) = (folder.path().join("data"), folder.path().join("pre"), folder.path().join("fine"));
    write_images(&data, 12);
    let common = format!("--data {} --preset tiny --steps 2 --batch 4 --image-size 32", text(&data));
    works(&format!("pretrain {common} --out {} --holdout 0.25", text(&pre))).says(&["3 training images", "n = 3"]);
    let done = works(&format!("finetune {common} --out {} --init {} --json", text(&fine), text(&pre)));
    done.says(&["test      none: the data have no test part", "test      not measured, as said above"]);
    assert_eq!(done.json()["result"]["top1"], Value::Null);
    works(&format!("evaluate {}", text(&fine))).says(&["no test part", "all 12 images are used"]);
}

#[test]
fn the_clock_ends_a_run() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("run");
    let began = Instant::now();
    let line = format!("pretrain --data {DATA} --out {} --preset tiny --batch 8 --minutes 0.03", text(&out));
    works(&(line + " --precision bf16"));
    assert!(began.elapsed() > Duration::from_secs_f64(1.8) && last_step(&out) > 0);
}

#[test]
fn a_run_that_diverges_says_so_and_keeps_the_batches() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("run");
    let line = format!(
        "pretrain --data {DATA} --out {} --preset tiny --batch 8 --steps 300 --lr 100 --warmup 0 --eval-every 0",
        text(&out)
    );
    fails(&line, 4, &["diverged", "not finite", "train.lr"]);
    assert_eq!(status(&out)["state"], "diverged");
    let names = fs::read_dir(&out).expect("the run").filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let files: Vec<_> = names.filter(|name| name.starts_with("not-finite-")).collect();
    assert!((3..=5).contains(&files.len()), "{files:?}");
    let seen = works(&format!("replay {}", text(&out))).out;
    for word in ["not finite, as it was", "gradients that are not finite", "lower train.lr", "train:"] {
        assert!(seen.contains(word), "no `{word}` in {seen}");
    }
    let seen = works(&format!("replay {} --json", text(&out.join(&files[0])))).json();
    assert_eq!((seen["finite"].as_bool(), seen["images"].as_array().map(Vec::len)), (Some(false), Some(8)));
    fails(&format!("replay {}", text(folder.path())), 3, &["not-finite", "found none"]);
    fails(&format!("replay {}", text(&out.join("config.toml"))), 3, &["config.toml", "the file of a step"]);
}

#[test]
#[ignore = "needs SELFIE_DATA"]
fn real_images_of_both_sizes() {
    let beside = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data"));
    let data = std::env::var_os("SELFIE_DATA").map_or_else(beside, PathBuf::from);
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (archive, classes) in [("cifar-10-binary.tar.gz", 10), ("imagenette-224.tar", 10)] {
        let (pre, fine) = (folder.path().join(archive).join("pre"), folder.path().join(archive).join("fine"));
        let common = format!("--data {} --preset tiny --batch 8 --steps 6 --limit 40", text(&data.join(archive)));
        works(&format!("pretrain {common} --out {}", text(&pre))).says(&["n = 40"]);
        let finetune = format!("finetune {common} --init {} --labels 2 --out {}", text(&pre), text(&fine));
        works(&finetune).says(&[&format!("{} of", 2 * classes), "n = 40", "top-1"]);
    }
}

/// The whole of it, as short as it can be: what matters here is that it ends, and says what it found.
#[test]
fn the_demonstration_runs_by_itself() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("demo");
    let done = works(&format!("demo --seconds 5 --out {}", text(&out)));
    done.says(&["machine", "puzzle    step", "right on 1000 held-out images", "x chance", "with 100 labels (n = "]);
    assert!(!done.err.contains('\u{1b}'), "escape sequences where no terminal is: {}", done.err);
    let labels = |run: &str| fs::read(out.join(run).join("labels.txt")).expect("a run folder");
    assert_eq!(labels("pretrained-0"), labels("scratch-0"));
    assert!(out.join("pretrain/weights/model.safetensors").exists());
}

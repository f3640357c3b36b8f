//! The objective's switches on the command line: an attention head from its training to its use, negatives of the batch, and
//! the probe of a pretraining that runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::support::traces::{assert_same, traces};
use crate::support::{fails, selfie, text, works};
use serde_json::Value;

const DATA: &str = "synthetic:train=60,test=20,classes=4";

fn pretrain(out: &Path, more: &str) -> String {
    format!("pretrain --data {DATA} --out {} --preset tiny --batch 8 --seed 5 {more}", text(out))
}

/// A short pretraining, in `folder`.
fn pretrained(folder: &Path) -> PathBuf {
    let out = folder.join("pre");
    works(&pretrain(&out, "--steps 4"));
    out
}

fn lines(out: &Path) -> Vec<Value> {
    let text = fs::read_to_string(out.join("metrics.jsonl")).expect("metrics");
    text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

#[test]
fn an_attention_head_is_trained_resumed_and_used() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pre = pretrained(folder.path());
    let finetune = |out: &Path, head: &str| {
        let run = format!("--data {DATA} --init {} --batch 8 --labels 10 --eval-every 0", text(&pre));
        format!("finetune {run} --save-every 3 --steps 9 --out {} --head {head}", text(out))
    };
    let (whole, out) = (folder.path().join("whole"), folder.path().join("fine"));
    let done = works(&finetune(&whole, "attention"));
    done.says(&["stem, stages.0-2, norm, pool from", "pool.safetensors; fresh: head", "memory", "top-1"]);

    // Stopped and gone on with, it is the same run.
    let mut child = selfie(&finetune(&out, "attention")).stderr(Stdio::null()).spawn().expect("it starts");
    let began = Instant::now();
    while !out.join("state/last").exists() {
        assert!(began.elapsed() < Duration::from_secs(60), "no checkpoint came");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().expect("it runs, or has ended");
    child.wait().expect("it ended");
    works(&finetune(&out, "attention"));
    assert_same(&whole, &out);
    fails(&finetune(&out, "conv"), 2, &["model.head", "conv", "attention"]);

    let evaluated = works(&format!("evaluate {} --data {DATA} --json", text(&out))).json();
    assert_eq!(evaluated["n"], 20);
    let probed = works(&format!("probe knn {} --data {DATA} --json", text(&out))).json();
    assert_eq!((&probed["width"], &probed["layer"]), (&128.into(), &"norm behind stage 3, attention pooling".into()));
    let vectors = folder.path().join("vectors.csv");
    let embedded = works(&format!("embed {} --data {DATA} --part val --json -o {}", text(&out), text(&vectors))).json();
    assert_eq!((&embedded["n"], &embedded["width"]), (&20.into(), &128.into()));
    let shown = works(&format!("inspect {}", text(&out))).out;
    for words in ["head.fc.weight", "num_classes=0", "begins afresh: nothing"] {
        assert!(shown.contains(words), "no `{words}` in {shown}");
    }

    // From scratch there is no pooling to take, and from another network none that fits.
    let (scratch, wide) = (folder.path().join("scratch"), folder.path().join("wide"));
    let line = format!("finetune --data {DATA} --preset tiny --head attention --batch 8 --labels 10 --steps 2");
    works(&format!("{line} --init scratch --out {}", text(&scratch))).says(&["random (scratch)"]);
    let line = format!("{line} --init {} --set model.ffn=96 --out {}", text(&pre), text(&wide));
    fails(&line, 3, &["pool.blocks.0.fc1.weight", "expects"]);
}

#[test]
fn a_table_has_arms_of_other_poolings_unless_they_are_its_head() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pre = pretrained(folder.path());
    let deep = folder.path().join("deep");
    works(&pretrain(&deep, "--steps 2 --set model.pool_blocks=2"));
    let table = |head: &str| {
        let out = folder.path().join(head);
        format!(
            "fewlabel --data {DATA} --init {} --init {} --head {head} --labels 100% --seeds 1 --steps 1 --lr 0.05 --out {}",
            text(&pre),
            text(&deep),
            text(&out)
        )
    };
    works(&table("conv"));
    fails(&table("attention"), 2, &["model.pool_blocks", "train the same network"]);
}

#[test]
fn negatives_of_the_batch_are_said_and_kept() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (out, parts) = (folder.path().join("batch"), folder.path().join("parts"));
    let more = "--negatives batch --temperature 0.2 --steps 4 --eval-every 2";
    works(&pretrain(&out, more)).says(&["told apart from those of 8 images at once, at the temperature 0.2"]);
    works(&pretrain(&parts, &format!("{more} --accumulate 2"))).says(&["those of 4 images at once"]);
    let config = fs::read_to_string(out.join("config.toml")).expect("a run has one");
    assert!(config.contains("[objective]") && config.contains("negatives = \"batch\""), "{config}");
    // 32 patches to tell apart, at first by nothing: ln 32 = 3.5; the accuracy is among four.
    let first = &lines(&out)[0];
    assert!(first["loss"].as_f64().is_some_and(|loss| (2.5..8.0).contains(&loss)), "{first}");
    assert_eq!(first["x_chance"].as_f64().zip(first["accuracy"].as_f64()).map(|(x, a)| x / a), Some(4.0));
    fails(&pretrain(&out, "--negatives image --steps 4"), 2, &["objective.negatives", "image", "batch"]);
    fails(&pretrain(&parts, "--temperature 0"), 2, &["objective.temperature", "above 0"]);
    let scaled = pretrain(&folder.path().join("scaled"), "--negatives batch --set model.logit_scale=2 --steps 1");
    fails(&scaled, 2, &["model.logit_scale", "objective.temperature"]);
}

#[test]
fn a_probe_on_the_way_changes_nothing_else() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (plain, probed) = (folder.path().join("plain"), folder.path().join("probed"));
    let more = "--steps 20 --log-every 1 --eval-every 6 --save-every 4";
    let probing = format!("{more} --probe-every 5 --probe-data {DATA} --probe-images 30");
    works(&pretrain(&plain, more));
    works(&pretrain(&probed, &probing)).says(&[
        "probe     20 images of",
        "among 30",
        "guessing finds 25.0%",
        "k-NN accuracy",
    ]);
    // All but the lines of the probe.
    let (one, mut other) = (traces(&plain), traces(&probed));
    let metrics = other.get_mut("metrics.jsonl").expect("metrics");
    let kept = String::from_utf8(metrics.clone()).expect("text");
    *metrics =
        kept.split_inclusive('\n').filter(|line| !line.contains("knn_accuracy")).collect::<String>().into_bytes();
    assert!(
        one == other,
        "a probe changed {:?}",
        one.keys().filter(|name| one[*name] != other[*name]).collect::<Vec<_>>()
    );

    let lines = lines(&probed);
    let of = |key: &str| lines.iter().filter(|line| line.get(key).is_some()).collect::<Vec<_>>();
    let steps = |lines: Vec<&Value>| lines.iter().filter_map(|line| line["step"].as_u64()).collect::<Vec<_>>();
    assert_eq!(steps(of("knn_accuracy")), [5, 10, 15, 20]);
    assert!(
        of("knn_accuracy").iter().all(|line| (0.0..=1.0).contains(&line["knn_accuracy"].as_f64().expect("a share")))
    );
    assert_eq!(steps(of("feature_std")), [6, 12, 18, 20]);
    for line in of("eval_accuracy") {
        assert!(line["feature_std"].as_f64().expect("a number") > 0.0, "{line}");
        let [x, accuracy] = ["x_chance", "eval_accuracy"].map(|key| line[key].as_f64().expect("a number"));
        assert!((x - 4.0 * accuracy).abs() < 1e-12, "{line}");
    }
    // It is `probe knn` of the same weights, on the same images.
    let last = of("knn_accuracy")[3]["knn_accuracy"].as_f64();
    let asked = works(&format!("probe knn {} --data {DATA} --limit 30 --json", text(&probed))).json();
    assert_eq!(asked["top1"].as_f64(), last);

    // Killed on the way, the run goes on to the same lines.
    let killed = folder.path().join("killed");
    let mut child = selfie(&pretrain(&killed, &probing)).stderr(Stdio::null()).spawn().expect("it starts");
    let began = Instant::now();
    while !fs::read_to_string(killed.join("metrics.jsonl")).unwrap_or_default().contains("knn_accuracy") {
        assert!(began.elapsed() < Duration::from_secs(60), "no probe came");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().expect("it runs");
    child.wait().expect("it ended");
    works(&pretrain(&killed, &probing));
    assert_same(&probed, &killed);
}

#[test]
fn a_probe_needs_labels_and_steps() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (flat, out) = (folder.path().join("flat"), folder.path().join("out"));
    crate::support::write(&flat.join("1.bmp"), &crate::support::bitmap_of(32, |at| at as u8));
    fails(&pretrain(&out, &format!("--probe-data {DATA}")), 2, &["--probe-data", "--probe-every"]);
    let line = pretrain(&out, &format!("--steps 2 --probe-every 1 --probe-data {}", text(&flat)));
    fails(&line, 3, &["--probe-data", "class"]);
}

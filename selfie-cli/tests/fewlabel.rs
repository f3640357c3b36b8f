//! `fewlabel`: the table is what its runs say, whatever happened on the way.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::support::moments::{Moments, number};
use crate::support::{fails, ran, selfie, text, works, write, write_images};
use serde_json::Value;

const DATA: &str = "synthetic:train=60,test=200,classes=4";

/// What a table leaves that must not depend on how it went.
const FILES: [&str; 5] = ["table.md", "table.csv", "table.json", "cells.csv", "plot.svg"];

/// A pretraining of a few steps.
fn pretrained(folder: &Path, name: &str, more: &str) -> PathBuf {
    let out = folder.join(name);
    works(&format!("pretrain --data {DATA} --out {} --preset tiny --batch 8 --steps 4 {more}", text(&out)));
    out
}

/// A table of two arms, two budgets, three seeds and two learning rates.
fn fewlabel(init: &Path, out: &Path) -> String {
    format!(
        "fewlabel --data {DATA} --init {} --labels 20%,100% --seeds 3 --lr 0.02,0.1 --steps 6 --batch 8 --out {}",
        text(init),
        text(out)
    )
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))).expect("JSON")
}

fn lines(path: &Path) -> BTreeSet<String> {
    fs::read_to_string(path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        .lines()
        .map(String::from)
        .collect()
}

#[track_caller]
fn assert_same(one: &Path, other: &Path) {
    for name in FILES {
        let (one, other) = (fs::read(one.join(name)).expect("there"), fs::read(other.join(name)).expect("there"));
        assert!(one == other, "{name}:\n{}\n---\n{}", String::from_utf8_lossy(&one), String::from_utf8_lossy(&other));
    }
}

/// The point that Student's t with `free` degrees of freedom stays below with probability 0.975: its density, by Simpson's rule.
fn quantile(free: f64) -> f64 {
    let density = |x: f64| (1.0 + x * x / free).powf(-(free + 1.0) / 2.0);
    // The whole is gamma functions; here it is summed, over x = tan(angle).
    let integral = |to: f64| {
        const PIECES: usize = 20_000;
        let h = to / PIECES as f64;
        let at = |angle: f64| density(angle.tan()) / angle.cos().powi(2);
        (0..=PIECES)
            .map(|i| at(i as f64 * h) * [1.0, 4.0, 2.0][if i == 0 || i == PIECES { 0 } else { 2 - i % 2 }])
            .sum::<f64>()
            * h
            / 3.0
    };
    let half = integral(std::f64::consts::FRAC_PI_2 - 1e-9);
    let (mut low, mut high) = (0.0, std::f64::consts::FRAC_PI_2 - 1e-9);
    for _ in 0..60 {
        let middle: f64 = (low + high) / 2.0;
        if integral(middle) < 0.95 * half { low = middle } else { high = middle }
    }
    f64::tan(low)
}

fn mean_and_variance(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    (mean, values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0))
}

#[test]
fn the_table_is_what_its_runs_say() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (init, out) = (pretrained(folder.path(), "pre", ""), folder.path().join("table"));
    let command = fewlabel(&init, &out);
    let printed = works(&(command.clone() + " --json")).json();
    let table = json(&out.join("table.json"));
    assert_eq!(printed, table);
    assert_eq!((table["finished"].as_bool(), &table["baseline"]), (Some(true), &"scratch".into()));

    let run = |arm: &str, labels: &str, seed: u64| out.join(format!("cells/{arm}/{labels}/seed-{seed}"));
    let top1 = |arm: &str, labels: &str| -> Vec<f64> {
        let one =
            |seed| json(&run(arm, labels, seed).join("status.json"))["result"]["top1"].as_f64().expect("measured");
        (0..3).map(one).collect()
    };
    let rows = table["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 4);
    let mut compared = 0;
    for row in rows {
        let (arm, labels) = (row["arm"].as_str().expect("text"), row["labels"].as_str().expect("text"));
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key} of {row}"));
        let near = |key: &str, expected: f64| {
            assert!((number(key) - expected).abs() <= 1e-7 * expected.abs().max(0.1), "{key}: {row}, not {expected}");
        };
        let (mean, variance) = mean_and_variance(&top1(arm, labels));
        near("mean", mean);
        near("std", variance.sqrt());
        if arm == "scratch" {
            assert_eq!(row["gain"], Value::Null);
        } else {
            let (other, other_variance) = mean_and_variance(&top1("scratch", labels));
            let (a, b) = (variance / 3.0, other_variance / 3.0);
            let half = quantile((a + b).powi(2) / (a * a / 2.0 + b * b / 2.0)) * (a + b).sqrt();
            near("gain", mean - other);
            near("gain_low", mean - other - half);
            near("gain_high", mean - other + half);
            assert_eq!(row["significant"], (mean - other).abs() > half);
            if variance > 0.0 && other_variance > 0.0 {
                near("std_ratio", (variance / other_variance).sqrt());
                // Of F with 2 and 2 degrees of freedom the quantile of p is p / (1 - p).
                near("std_ratio_low", (variance / other_variance / 39.0).sqrt());
                near("std_ratio_high", (variance / other_variance * 39.0).sqrt());
                compared += 1;
            }
        }

        // The rate is the one that did best on validation images, which the test part is not among.
        let trials: Vec<_> = [0.02, 0.1]
            .iter()
            .map(|rate| {
                (rate, json(&out.join(format!("search/{arm}/{labels}/lr-{rate}/status.json")))["result"].clone())
            })
            .collect();
        let order = |result: &Value| {
            let number = |key: &str| result[key].as_f64().expect("measured");
            (number("validation_accuracy"), -number("validation_loss"))
        };
        let best = trials.iter().max_by(|one, other| order(&one.1).partial_cmp(&order(&other.1)).expect("numbers"));
        assert_eq!(number("learning_rate"), *best.expect("two").0);
        for (rate, result) in &trials {
            assert_eq!(result["top1"], Value::Null);
            let search = out.join(format!("search/{arm}/{labels}/lr-{rate}"));
            assert_eq!(json(&search.join("data.json"))["test"], Value::Null);
            assert!(!search.join("state").exists(), "its checkpoint serves nothing");
            // Trained on a part of what the run of seed 0 is, and measured on the rest of it.
            let (searched, all) = (lines(&search.join("labels.txt")), lines(&run(arm, labels, 0).join("labels.txt")));
            assert!(searched.is_subset(&all), "{searched:?}");
            assert_eq!(result["validation_n"].as_u64(), Some((all.len() - searched.len()) as u64));
        }
    }
    assert!(compared > 0, "no row spread: {table}");
    // The same images for all arms, few inside many, others for another seed.
    for seed in 0..3 {
        let labels = |arm, labels| lines(&run(arm, labels, seed).join("labels.txt"));
        assert_eq!(labels("pre", "20%"), labels("scratch", "20%"));
        assert!(labels("pre", "20%").is_subset(&labels("pre", "100%")));
        assert_eq!((labels("pre", "20%").len(), labels("pre", "100%").len()), (12, 60));
    }
    assert_ne!(lines(&run("pre", "20%", 0).join("labels.txt")), lines(&run("pre", "20%", 1).join("labels.txt")));

    // A run of the table is a run: it can be evaluated, and it is what `finetune` makes.
    let cell = run("pre", "20%", 1);
    let evaluated = works(&format!("evaluate {} --data {DATA} --json", text(&cell))).json();
    assert_eq!(evaluated["top1"], json(&cell.join("status.json"))["result"]["top1"]);
    let alone = folder.path().join("alone");
    let rate = rows[1]["learning_rate"].as_f64().expect("chosen");
    works(&format!(
        "finetune --data {DATA} --init {} --labels 20%@1 --seed 1 --lr {rate} --steps 6 --batch 8 --out {}",
        text(&init),
        text(&alone)
    ));
    let weights = |run: &Path| fs::read(run.join("weights/model.safetensors")).expect("written");
    assert!(weights(&cell) == weights(&alone), "it trains as finetune does");

    // Nothing is computed twice, and the table is printed again.
    let again = works(&command);
    assert!(again.out.contains("gain over scratch"), "{}", again.out);
    assert_eq!(fs::read_to_string(cell.join("command.txt")).expect("there").lines().count(), 1);
    assert_eq!(json(&out.join("table.json")), table);

    // The files say the same.
    let markdown = fs::read_to_string(out.join("table.md")).expect("there");
    assert!(!markdown.to_lowercase().contains("better"), "{markdown}");
    assert_eq!(markdown.lines().filter(|line| line.starts_with("| 20%") || line.starts_with("| 100%")).count(), 4);
    assert_eq!(lines(&out.join("cells.csv")).len(), 1 + 12);
    assert_eq!(lines(&out.join("table.csv")).len(), 1 + 4);
    let svg = fs::read_to_string(out.join("plot.svg")).expect("there");
    // Every run, every mean, every gain, two entries of the legend.
    assert_eq!(svg.matches("<circle").count(), 12 + 4 + 2 + 2, "{svg}");
}

#[test]
fn several_pretrainings_are_compared() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (one, other) = (pretrained(folder.path(), "one", ""), pretrained(folder.path(), "other", "--seed 1"));
    let file = folder.path().join("file.safetensors");
    fs::copy(other.join("weights/model.safetensors"), &file).expect("copied");
    let out = folder.path().join("table");
    let table = |inits: &str, more: &str| {
        format!(
            "fewlabel --data {DATA} {inits} --labels 3 --seeds 2 --lr 0.05 --steps 3 --batch 8 {more} --out {}",
            text(&out)
        )
    };
    let both = format!("--init {} --init {}", text(&one), text(&other));
    fails(&table(&format!("{both} --init {}", text(&file)), ""), 2, &["file.safetensors", "the same weights"]);
    works(&table(&format!("--init {} --init {}", text(&one), text(&file)), "--no-scratch"));
    let made = json(&out.join("table.json"));
    assert_eq!(made["baseline"], "one");
    let arms: Vec<_> = made["rows"].as_array().expect("rows").iter().map(|row| row["arm"].clone()).collect();
    assert_eq!(arms, ["one", "file"]);
    assert_eq!(made["search"], serde_json::json!([]));
    // The same weights in another place are the same arm; others are not.
    works(&table(&both, "--no-scratch"));
    fails(
        &table(&format!("--init {} --init {}", text(&other), text(&one)), "--no-scratch"),
        2,
        &["other weights", "CRC-32"],
    );
    fails(&table(&both, ""), 2, &["scratch", "where the table has"]);
}

#[test]
fn killed_at_random_moments_it_ends_with_the_same_table() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    let init = pretrained(folder.path(), "pre", "");
    let began = Instant::now();
    works(&(fewlabel(&init, &whole) + " --threads 1 --save-every 2"));
    let span = began.elapsed().as_secs_f64();

    let mut moments = Moments::new();
    let kills = number("SELFIE_KILLS").unwrap_or(6);
    let (mut done, mut began_runs) = (0, BTreeSet::new());
    // Until they came in different runs: else all it shows is the first one going on.
    while done < kills || began_runs.len() < 2 {
        let line = fewlabel(&init, &killed) + &format!(" --threads {} --save-every 2", 1 + done % 2);
        let mut child = selfie(&line).stderr(Stdio::null()).stdout(Stdio::null()).spawn().expect("it starts");
        std::thread::sleep(Duration::from_secs_f64(2.0 * span / kills as f64 * moments.next()));
        if child.try_wait().expect("it is ours").is_some() {
            assert_same(&whole, &killed);
            fs::remove_dir_all(&killed).expect("ours");
            continue;
        }
        child.kill().expect("it runs");
        child.wait().expect("it ended");
        done += 1;
        let status = fs::read(killed.join("status.json")).unwrap_or_default();
        began_runs.extend(serde_json::from_slice::<Value>(&status).ok().and_then(|status| status["step"].as_u64()));
    }
    works(&fewlabel(&init, &killed));
    assert_same(&whole, &killed);
}

#[cfg(unix)]
#[test]
fn a_signal_stops_it_and_the_folder_alone_goes_on() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (whole, out) = (folder.path().join("whole"), folder.path().join("stopped"));
    let init = pretrained(folder.path(), "pre", "");
    works(&fewlabel(&init, &whole));
    for cells in [1, 4] {
        let child = selfie(&(fewlabel(&init, &out) + " --json")).stderr(Stdio::null()).stdout(Stdio::piped()).spawn();
        let child = child.expect("it starts");
        let began = Instant::now();
        let done = || fs::read_to_string(out.join("cells.csv")).unwrap_or_default().lines().count().saturating_sub(1);
        while done() < cells {
            assert!(began.elapsed() < Duration::from_secs(120), "it never came so far");
            std::thread::sleep(Duration::from_millis(2));
        }
        let killed = std::process::Command::new("kill").args(["-s", "TERM", &child.id().to_string()]).status();
        assert!(killed.expect("kill runs").success());
        let ended = child.wait_with_output().expect("it ended");
        assert_eq!(ended.status.code(), Some(75));
        assert_eq!(serde_json::from_slice::<Value>(&ended.stdout).expect("JSON")["finished"], false);
        let status = json(&out.join("status.json"));
        assert_eq!((&status["command"], &status["state"]), (&"fewlabel".into(), &"stopped".into()));
        assert!(fs::read_to_string(out.join("table.md")).expect("there").contains("Unfinished: "));
    }
    works(&format!("fewlabel --out {}", text(&out))).says(&["continuing"]);
    assert_same(&whole, &out);
    assert_eq!(json(&out.join("status.json"))["state"], "finished");
}

#[test]
fn another_plan_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (init, out) = (pretrained(folder.path(), "pre", ""), folder.path().join("table"));
    let other = pretrained(folder.path(), "other", "--seed 1");
    let line =
        |init: &Path, rest: &str| format!("fewlabel --data {DATA} --init {} {rest} --out {}", text(init), text(&out));
    works(&line(&init, "--labels 3 --seeds 2 --lr 0.05 --steps 3 --batch 8"));
    let before = fs::read(out.join("plan.json")).expect("there");
    for (flags, words) in [
        ("--labels 4", ["--labels 4", "has 3"]),
        ("--seeds 3", ["--seeds 3", "has 2"]),
        ("--lr 0.06", ["--lr 0.06", "has 0.05"]),
        ("--steps 4", ["--steps 4", "has 3"]),
        ("--minutes 1", ["--minutes 1", "has none"]),
        ("--validation 0.5", ["--validation 0.5", "has 0.2"]),
        ("--no-scratch", ["--no-scratch", "an arm from scratch"]),
        ("--batch 9", ["train.batch = 9", "has 8"]),
        ("--weight-decay 0.5", ["train.weight_decay = 0.5", "has 0.0001"]),
    ] {
        fails(&line(&init, flags), 2, &[words[0], words[1], "another --out"]);
    }
    fails(&line(&other, ""), 2, &["other weights", "the arm pre"]);
    fails(&line(&init, "").replace("train=60", "train=64"), 2, &["synthetic:train=64"]);
    // The weights of a run that went on are others.
    works(&format!("pretrain --out {} --steps 6", text(&init)));
    fails(&line(&init, ""), 2, &["other weights"]);
    fails(&format!("fewlabel --out {}", text(&out)), 2, &["other weights"]);
    assert_eq!(fs::read(out.join("plan.json")).expect("there"), before);
    // Nor is it a run of another command.
    fails(&format!("finetune --data {DATA} --init scratch --out {}", text(&out)), 2, &["a run of `fewlabel`"]);
    write(&out.join("plan.json"), b"{}");
    fails(&line(&init, ""), 3, &["plan.json", "expected the plan"]);
}

#[test]
fn requests_that_cannot_be_met_leave_nothing() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (init, out) = (pretrained(folder.path(), "pre", ""), folder.path().join("table"));
    let tiny = folder.path().join("thin");
    works(&format!(
        "pretrain --data {DATA} --out {} --preset tiny --batch 8 --steps 1 --set model.stem_width=4 --set model.heads=4",
        text(&tiny)
    ));
    let photos = folder.path().join("photos");
    write_images(&photos, 8);
    let one = folder.path().join("one/train");
    write_images(&one, 8);
    fs::remove_dir_all(one.join("b")).expect("ours");
    let noise = folder.path().join("noise.safetensors");
    write(&noise, b"something else");
    let refused = |flags: &str, code, words: &[&str]| {
        fails(&format!("fewlabel {flags} --out {}", text(&out)), code, words);
        assert!(!out.exists(), "{flags} left something");
    };
    let init = text(&init);
    refused(&format!("--data {DATA}"), 2, &["--init is missing"]);
    refused(&format!("--init {init}"), 2, &["--data is missing"]);
    refused(&format!("--data nowhere --init {init}"), 3, &["nowhere"]);
    refused(&format!("--data {DATA} --labels 20% --init nowhere"), 3, &["nowhere"]);
    refused(&format!("--data {DATA} --labels 20% --init {} --preset tiny", text(&noise)), 3, &["noise.safetensors"]);
    refused(&format!("--data {DATA} --labels 20% --init scratch"), 2, &["two arms"]);
    refused(&format!("--data {DATA} --labels 20% --init {init} --no-scratch"), 2, &["two arms"]);
    refused(
        &format!("--data {DATA} --labels 20% --init {init} --init {}", text(&tiny)),
        2,
        &["model.stem_width = 4", "the same network"],
    );
    refused(&format!("--data {} --init {init}", text(&photos)), 3, &["test part"]);
    refused(&format!("--data {} --init {init}", text(one.parent().expect("a folder"))), 3, &["2 classes"]);
    // A class has 15 images.
    refused(&format!("--data {DATA} --init {init} --labels 6%"), 2, &["6%", "less than one image of class", "6.667%"]);
    refused(&format!("--data {DATA} --init {init} --labels 16"), 2, &["16", "15"]);
    refused(&format!("--data {DATA} --init {init} --labels 5%,many"), 2, &["many", "a percentage"]);
    refused(&format!("--data {DATA} --init {init} --labels 20%,20%"), 2, &["20% twice"]);
    refused(&format!("--data {DATA} --init {init} --labels lists/none.txt"), 3, &["lists/none.txt"]);
    refused(&format!("--data {DATA} --init {init} --labels 1"), 2, &["--labels 1", "--validation 0.2", "--lr"]);
    refused(&format!("--data {DATA} --labels 20% --init {init} --lr 0.1,0.1"), 2, &["0.1 twice"]);
    refused(&format!("--data {DATA} --labels 20% --init {init} --lr -1"), 2, &["-1", "a number above 0"]);
    refused(&format!("--data {DATA} --labels 20% --init {init} --seeds 0"), 2, &["--seeds"]);
    refused(&format!("--data {DATA} --labels 20% --init {init} --validation 1"), 2, &["--validation", "0.9"]);
    refused(&format!("--data {DATA} --init {init} --minutes 0.0001 --labels 20%"), 2, &["too short"]);
    refused(&format!("--data {DATA} --labels 20% --init {init} --minutes 1 --steps 3"), 2, &["--minutes", "--steps"]);
    refused(
        &format!("--data {DATA} --labels 20% --init {init} --set train.lr=0.1"),
        2,
        &["train.lr", "--set", "fewlabel --help"],
    );
    refused(&format!("--data {DATA} --labels 20% --init {init} --epochs 3"), 2, &["--epochs"]);
    fails(&format!("fewlabel --data {DATA} --init {init}"), 2, &["--out is missing"]);
    let inside = format!("fewlabel --data {0} --init {init} --out {0}/table", text(&photos));
    fails(&inside, 2, &["inside the data"]);
    let foreign = folder.path().join("foreign");
    write(&foreign.join("thesis.tex"), b"");
    fails(
        &format!("fewlabel --data {DATA} --init {init} --out {}", text(&foreign)),
        2,
        &["no run folder", "thesis.tex"],
    );
}

#[test]
fn minutes_become_steps_once() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (init, out) = (pretrained(folder.path(), "pre", ""), folder.path().join("table"));
    let line = |minutes: f64| {
        format!(
            "fewlabel --data {DATA} --init {} --labels 3 --seeds 2 --lr 0.05 --minutes {minutes} --batch 8 --out {}",
            text(&init),
            text(&out)
        )
    };
    // What is too short says what is not, on this machine.
    let short = ran(&mut selfie(&line(0.0001)));
    assert_eq!(short.code, Some(2), "{}", short.err);
    short.says(&["--minutes 0.0001 is too short", " are the least"]);
    let least =
        short.err.split(" are the least").next().and_then(|before| before.rsplit(' ').next()?.parse::<f64>().ok());
    let line = line(3.0 * least.expect("a number").max(0.02));
    works(&line).says(&["(by --minutes "]);
    let steps = json(&out.join("plan.json"))["steps"].as_u64().expect("a number");
    assert!(steps >= 10, "{steps}");
    let table = fs::read(out.join("table.json")).expect("there");
    works(&line);
    assert_eq!(json(&out.join("plan.json"))["steps"], steps);
    assert_eq!(fs::read(out.join("table.json")).expect("there"), table);
}

/// A run that diverges is in the table as that, and takes the gain away.
#[test]
fn runs_that_diverge_are_said() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (init, out) = (pretrained(folder.path(), "pre", ""), folder.path().join("table"));
    let line = |rates: &str, out: &Path| {
        format!(
            "fewlabel --data {DATA} --init {} --labels 5 --seeds 2 --lr {rates} --steps 12 --batch 8 --weight-decay 1 --out {}",
            text(&init),
            text(out)
        )
    };
    // A decay of the weights by 99 times themselves, in each step.
    fails(&line("99,100", &folder.path().join("hopeless")), 4, &["every learning rate", "--lr"]);
    works(&line("0.001,100", &out));
    let table = json(&out.join("table.json"));
    for row in table["rows"].as_array().expect("rows") {
        assert_eq!((row["learning_rate"].as_f64(), row["diverged"].as_u64()), (Some(0.001), Some(0)));
    }
    assert_eq!(table["search"][1]["accuracy"], Value::Null);
    let fixed = folder.path().join("fixed");
    let ran = ran(&mut selfie(&line("100", &fixed)));
    assert_eq!(ran.code, Some(4), "{}", ran.err);
    let table = json(&fixed.join("table.json"));
    assert_eq!((table["rows"][1]["diverged"].as_u64(), &table["rows"][1]["gain"]), (Some(2), &Value::Null));
}

/// A disk that is full at some moments: nothing is lost.
#[cfg(debug_assertions)]
#[test]
fn a_full_disk_costs_nothing() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (whole, out) = (folder.path().join("whole"), folder.path().join("out"));
    let init = pretrained(folder.path(), "pre", "");
    let line = |out: &Path| {
        format!(
            "fewlabel --data {DATA} --init {} --labels 3 --seeds 2 --lr 0.05 --steps 2 --batch 8 --out {}",
            text(&init),
            text(out)
        )
    };
    works(&line(&whole));
    for fault in [1, 5, 9, 14, 40, 77, 120] {
        let ran = ran(selfie(&line(&out)).env("SELFIE_FAULT", fault.to_string()));
        assert_eq!(ran.code, Some(1), "fault {fault}: {}", ran.err);
        ran.says(&["cannot write", "the same command goes on"]);
        assert_eq!(ran.err.matches("error:").count(), 1, "fault {fault}: {}", ran.err);
    }
    works(&line(&out));
    assert_same(&whole, &out);
}

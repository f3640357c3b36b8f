//! `bench`: its numbers hang together, its trace is one, and PyTorch's side is asked as it should be.

use std::fs;

use crate::support::{Ran, fails, text, works};
use serde_json::Value;

/// Seconds that belong together, up to the rounding of sums.
const ROUNDING: f64 = 1e-9;

fn number(value: &Value, pointer: &str) -> f64 {
    let number = value.pointer(pointer).and_then(Value::as_f64);
    number.unwrap_or_else(|| panic!("no number {pointer} in {value}"))
}

fn sum(rows: &Value, key: &str) -> f64 {
    rows.as_array().expect("a list").iter().map(|row| number(row, &format!("/{key}"))).sum()
}

fn bench(options: &str) -> Ran {
    works(&format!("bench --preset tiny --batch 8 --threads 1 --seconds 1 {options}"))
}

#[test]
fn the_passes_add_up_to_the_step_and_the_trace_has_them() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("step.json");
    let found = bench(&format!("--json --trace {}", text(&file))).json();
    for key in ["task", "preset", "image_size", "batch", "device", "data", "bound_by", "compare"] {
        assert!(found.get(key).is_some(), "no {key} in {found}");
    }
    let [loader, step, run] =
        ["loader", "step", "run"].map(|key| number(&found["images_per_second"], &format!("/{key}")));
    assert!(loader > 0.0 && run > 0.0 && step > 0.0, "{found}");
    assert_eq!(found["bound_by"], if loader < step { "loader" } else { "step" });
    assert!((step * number(&found, "/step/seconds") - 8.0).abs() < ROUNDING, "{found}");

    let whole = number(&found, "/step/timed_seconds");
    for rows in ["passes", "shapes"] {
        let sum = sum(&found[rows], "seconds") + number(&found, "/step/between_seconds");
        assert!((sum - whole).abs() < ROUNDING, "{rows}: {sum} of {whole}");
    }
    assert!(number(&found, "/step/between_seconds") > 0.0, "the host takes time, too");
    for key in ["calls", "flops", "bytes"] {
        assert_eq!(sum(&found["passes"], key), sum(&found["shapes"], key), "{key}");
    }
    let [bytes, flops] = ["bytes", "flops"].map(|key| number(&found, &format!("/ceilings/{key}_per_second")));
    for row in found["shapes"].as_array().expect("a list") {
        let least = (number(row, "/bytes") / bytes).max(number(row, "/flops") / flops);
        let beyond = number(row, "/roofline") * number(row, "/seconds") / least - 1.0;
        // Calls of one shape may differ in what they read beside it, and be held back by one or the other.
        let most = if row["calls"] == 1 { ROUNDING } else { 1.0 };
        assert!((-ROUNDING..most).contains(&beyond), "{beyond}: {row}");
    }
    // A step of the puzzle, backward included.
    let passes: Vec<_> = found["passes"].as_array().expect("a list").iter().map(|row| &row["pass"]).collect();
    for pass in ["augment", "norm_relu_conv_backward_filter", "contrast", "sgd_update", "bn_commit"] {
        assert!(passes.iter().any(|known| *known == pass), "no {pass} in {passes:?}");
    }

    let trace: Value = serde_json::from_slice(&fs::read(&file).expect("written")).expect("JSON");
    let events = trace["traceEvents"].as_array().expect("a list");
    let of_track = |track: u64| events.iter().filter(move |event| event["ph"] == "X" && event["tid"] == track);
    assert_eq!(of_track(2).count() as f64, sum(&found["passes"], "calls"));
    let [step] = of_track(1).collect::<Vec<_>>()[..] else { panic!("one step in {trace}") };
    let mut passed = 0.0;
    for event in of_track(2) {
        let (begin, duration) = (number(event, "/ts"), number(event, "/dur"));
        // A nanosecond for the rounding of what both were subtracted from.
        assert!(begin >= passed - 1e-3 && duration >= 0.0, "{event} begins before {passed}");
        assert!(event["args"]["shape"].is_string() && number(event, "/args/bytes") > 0.0, "{event}");
        passed = begin + duration;
    }
    assert!((passed - number(step, "/dur")).abs() < 1e-3, "{step} ends at {passed}");
}

/// Values of an attribute of all elements of a kind, in order.
fn attributes(svg: &str, element: &str, attribute: &str) -> Vec<f64> {
    let begin = format!("<{element} ");
    let elements = svg.split(&begin).skip(1);
    let value = |text: &str| text.split_once(&format!(" {attribute}=\""))?.1.split('"').next()?.parse().ok();
    elements.filter_map(|text| value(&format!(" {text}"))).collect()
}

#[test]
fn the_roofline_has_every_shape_with_products() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("step.svg");
    let found = bench(&format!("--json --roofline {}", text(&file))).json();
    let svg = fs::read_to_string(&file).expect("written");
    let shapes = found["shapes"].as_array().expect("a list");
    let drawn: Vec<_> = shapes.iter().filter(|row| number(row, "/flops") > 0.0).collect();
    assert!(drawn.len() > 10 && drawn.len() < shapes.len(), "{found}");
    for row in &drawn {
        let [pass, shape] = ["pass", "shape"].map(|key| row[key].as_str().expect("words").replace('>', "&gt;"));
        let name = format!("<title>{pass} {shape}: ");
        assert_eq!(svg.matches(&name).count(), 1, "{name} in {svg}");
    }
    // Circles of 5 units are the legend's.
    let radii = attributes(&svg, "circle", "r");
    let [x, y] = ["cx", "cy"].map(|name| attributes(&svg, "circle", name));
    let of_shapes = |values: Vec<f64>| values.into_iter().take(drawn.len()).collect::<Vec<_>>();
    let (x, y, radii) = (of_shapes(x), of_shapes(y), of_shapes(radii));
    assert!(x.iter().all(|x| (70.0..=870.0).contains(x)) && y.iter().all(|y| (70.0..=480.0).contains(y)), "{svg}");
    // What takes longer is larger; a decade is as wide everywhere.
    assert!(radii.is_sorted_by(|a, b| a >= b), "{radii:?}");
    let axes = [(&x, "flops", "bytes"), (&y, "flops", "seconds")];
    for (places, of, by) in axes {
        let decades: Vec<f64> =
            drawn.iter().map(|row| (number(row, &format!("/{of}")) / number(row, &format!("/{by}"))).log10()).collect();
        let far = (1..decades.len())
            .max_by(|&a, &b| (decades[a] - decades[0]).abs().total_cmp(&(decades[b] - decades[0]).abs()));
        let far = far.expect("several shapes");
        let decade = (places[far] - places[0]) / (decades[far] - decades[0]);
        for (place, value) in places.iter().zip(&decades) {
            let expected = places[0] + decade * (value - decades[0]);
            assert!((place - expected).abs() < 0.2, "{place}, where {expected} is {of} by {by}");
        }
    }
}

#[test]
fn every_task_is_told_of_on_80_columns() {
    for (task, words) in [
        ("pretrain", ["pretraining of tiny", "conv backward filter"]),
        ("finetune", ["finetuning of tiny", "conv backward filter"]),
        ("infer", ["inference of tiny", "conv forward"]),
    ] {
        let told = bench(task).out;
        for word in words.into_iter().chain(["loader", "whole run", "bound by the", "ceilings", "between the passes"]) {
            assert!(told.contains(word), "no `{word}` in {told}");
        }
        let widest = told.lines().map(|line| line.chars().count()).max();
        assert!(widest <= Some(80), "{widest:?} columns: {told}");
        assert!(told.lines().count() <= 40, "{told}");
        assert_eq!(told.contains("backward"), task != "infer", "{told}");
    }
}

#[test]
fn what_cannot_be_measured_is_said_before() {
    fails("bench train", 2, &["train", "pretrain, finetune, infer"]);
    fails("bench --seconds 0", 2, &["--seconds"]);
    fails("bench --lr 1", 2, &["--lr"]);
    fails("bench --tune --device cpu", 2, &["--tune", "takes a GPU"]);
    fails("bench --tune --trace step.json", 2, &["--tune", "--trace"]);
    fails("bench --trace nowhere/step.json", 2, &["nowhere/step.json", "--trace"]);
    fails("bench --roofline nowhere/step.svg", 2, &["nowhere/step.svg", "--roofline"]);
    fails("bench --data nowhere", 3, &["nowhere"]);
    fails("bench --preset tiny --image-size 36", 2, &["model.patch_size"]);
    fails("bench --compare python --set model.heads=2", 2, &["--compare", "heads"]);
    fails("bench --compare /nowhere/python", 1, &["/nowhere/python", "install", "torch"]);
}

/// Programs that stand for a Python, as none with PyTorch is at hand.
#[cfg(unix)]
mod with_a_python {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    fn program(folder: &tempfile::TempDir, script: &str) -> PathBuf {
        let path = folder.path().join("python");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("ours");
        path
    }

    #[test]
    fn one_without_pytorch_says_what_to_install() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let complaint = "ModuleNotFoundError: No module named 'torch'";
        let python = program(&folder, &format!("echo \"{complaint}\" >&2; exit 1"));
        fails(&format!("bench --compare {}", text(&python)), 1, &[complaint, "install", "--compare venv/bin/python"]);
        let python = program(&folder, "echo 'out of cheese' >&2");
        fails(&format!("bench --compare {}", text(&python)), 1, &["PyTorch's side ended: out of cheese"]);
        let python = program(&folder, "read line; echo '{\"error\": \"no such device\"}'");
        fails(&format!("bench --compare {}", text(&python)), 1, &["no such device"]);
    }

    #[test]
    fn turns_are_taken_with_the_same_network() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let asked = folder.path().join("asked");
        let answer = r#"{"peer": "pytorch 0", "images_per_second": 2.0}"#;
        let record = format!("while read line; do echo \"$line\" >> {}; echo '{answer}'; done", text(&asked));
        let found = bench(&format!("--json --compare {}", text(&program(&folder, &record)))).json();
        let compared = &found["compare"];
        assert_eq!(compared["peer"], "pytorch 0");
        assert_eq!((number(compared, "/turns"), number(compared, "/peer_images_per_second")), (3.0, 2.0));
        let ratios = ["_min", "", "_max"].map(|which| number(compared, &format!("/speed_ratio{which}")));
        assert!(ratios.is_sorted() && ratios[1] > 0.0, "{compared}");
        assert!((ratios[1] * 2.0 / number(compared, "/ours_images_per_second") - 1.0).abs() < ROUNDING, "{compared}");
        let asked = fs::read_to_string(&asked).expect("asked");
        let asked: Vec<Vec<String>> =
            asked.lines().map(|line| serde_json::from_str(line).expect("a list of words")).collect();
        assert_eq!((asked.len(), asked[0].join(" ").as_str()), (4, "about"));
        let words = asked[3].join(" ");
        for word in [
            "bench --task pretrain --image-size 32 --batch 8",
            "--depths 1,1,1,1 --width 8 --device cpu --dtype f32",
            "--pool-blocks 1 --dropout 0 --query places --logit-scale 1",
        ] {
            assert!(words.contains(word), "no `{word}` in {words}");
        }
    }
}

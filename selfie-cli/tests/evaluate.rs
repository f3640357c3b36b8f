//! `evaluate`: what it says of one run and of several, and the matrix as a file.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{bitmap_of, fails, text, works, write};
use serde_json::Value;

const DATA: &str = "synthetic:train=40,test=30,classes=4";

fn finetuned(folder: &Path, name: &str, seed: u64, data: &str) -> PathBuf {
    let run = folder.join(name);
    let more = format!("--preset tiny --batch 8 --steps 12 --init scratch --seed {seed}");
    works(&format!("finetune --data {data} --out {} {more}", text(&run)));
    run
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key} in {value}"))
}

#[test]
fn one_run_has_its_interval_and_its_calibration() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = finetuned(folder.path(), "fine", 0, DATA);
    let found = works(&format!("evaluate {} --json", text(&run))).json();
    let (top1, low, high) = (number(&found, "top1"), number(&found, "top1_low"), number(&found, "top1_high"));
    assert!(low < top1 && top1 < high, "{found}");
    // Wilson's interval from its two defining equations: |top1 - p| = 1.96 sqrt(p (1 - p) / n) at both ends.
    for end in [low, high] {
        let (n, z) = (number(&found, "n"), 1.959_963_984_540_054);
        assert!(((top1 - end).abs() - z * (end * (1.0 - end) / n).sqrt()).abs() < 1e-12, "{end} in {found}");
    }
    assert!((0.0..=1.0).contains(&number(&found, "calibration_error")), "{found}");
    let words = works(&format!("evaluate {}", text(&run))).out;
    for word in ["top-1", "(95%: ", "calibration error", "15 bins", "rows: the class"] {
        assert!(words.contains(word), "{word} in {words}");
    }
}

/// From the probabilities that `predict` prints of the same files.
#[test]
fn the_calibration_error_is_that_of_the_predictions() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("data");
    for i in 0..24u8 {
        let (part, class) = (if i < 8 { "train" } else { "val" }, ["a", "b"][usize::from(i % 2)]);
        let image = bitmap_of(16, |at| (at as u8).wrapping_mul(i + 3).wrapping_add(40 * (i % 2)));
        write(&data.join(part).join(class).join(format!("{i:02}.bmp")), &image);
    }
    let run = folder.path().join("fine");
    let more = "--preset tiny --image-size 32 --batch 8 --steps 6 --init scratch";
    works(&format!("finetune --data {} --out {} {more}", text(&data), text(&run)));
    let found = works(&format!("evaluate {} --json", text(&run))).json();
    let lines = works(&format!("predict {} {} --json", text(&run), text(&data.join("val")))).out;
    let mut bins = [[0.0; 2]; 15];
    for line in lines.lines() {
        let line: Value = serde_json::from_str(line).expect("JSON");
        let best = &line["predictions"][0];
        let (confidence, class) = (number(best, "probability"), best["class"].as_str().expect("a class"));
        let is_right = line["name"].as_str().expect("a name").contains(&format!("/{class}/"));
        let bin = (0..15).find(|&bin| confidence <= f64::from(bin + 1) / 15.0).expect("at most 1") as usize;
        bins[bin][0] += confidence;
        bins[bin][1] += f64::from(u8::from(is_right));
    }
    let expected = bins.iter().map(|[confidence, right]| (confidence - right).abs()).sum::<f64>() / 16.0;
    // `predict` subtracts scores in f32: half an epsilon of differences that are below 2 here, as the loss is.
    let far = (number(&found, "calibration_error") - expected).abs();
    assert!(expected > 0.0 && far <= f64::from(f32::EPSILON), "{expected} {found}");
}

#[test]
fn several_runs_have_a_mean() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let runs: Vec<_> = (0..3).map(|seed| finetuned(folder.path(), &format!("fine-{seed}"), seed, DATA)).collect();
    let all = runs.iter().map(|run| text(run)).collect::<Vec<_>>().join(" ");
    let matrix = folder.path().join("matrix.csv");
    let found = works(&format!("evaluate {all} --json --matrix {}", text(&matrix))).json();
    assert_eq!(found["n"], 3);
    let each = found["runs"].as_array().expect("a list");
    let ones: Vec<Value> = runs.iter().map(|run| works(&format!("evaluate {} --json", text(run))).json()).collect();
    assert_eq!(*each, ones);
    for key in ["top1", "top5", "loss", "calibration_error"] {
        let values: Vec<f64> = ones.iter().map(|one| number(one, key)).collect();
        let mean = values.iter().sum::<f64>() / 3.0;
        let std = (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / 2.0).sqrt();
        let over = &found["over_runs"][key];
        assert!((number(over, "mean") - mean).abs() < 1e-12 && (number(over, "std") - std).abs() < 1e-12, "{over}");
    }
    let words = works(&format!("evaluate {all}")).out;
    assert!(words.contains("mean ± std over 3 runs") && words.contains(text(&runs[2])), "{words}");
    // The matrix is that of all together.
    let table = fs::read_to_string(&matrix).expect("written");
    for (class, line) in table.lines().skip(1).enumerate() {
        let counts: Vec<u64> = line.split(',').skip(1).map(|count| count.parse().expect("a count")).collect();
        let count = |one: &Value, predicted: usize| one["confusion"][class][predicted].as_u64().expect("a count");
        let sum = |predicted: usize| ones.iter().map(|one| count(one, predicted)).sum();
        assert_eq!(counts, (0..4).map(sum).collect::<Vec<u64>>());
    }
    assert_eq!(table.lines().count(), 5);
}

#[test]
fn what_cannot_be_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = finetuned(folder.path(), "fine", 0, DATA);
    let file = |name: &str| folder.path().join(name);
    fails(&format!("evaluate {} --matrix x.png", text(&run)), 2, &["x.png", ".svg or .csv"]);
    write(&file("x.svg"), b"mine");
    let matrix = format!("evaluate {} --matrix {}", text(&run), text(&file("x.svg")));
    fails(&matrix, 2, &["--matrix", "x.svg", "--overwrite"]);
    assert_eq!(fs::read(file("x.svg")).expect("it stays"), b"mine");
    works(&format!("{matrix} --overwrite"));
    let picture = fs::read_to_string(file("x.svg")).expect("replaced");
    assert!(picture.starts_with("<svg") && picture.contains("of 4 classes, 30 images"), "{picture}");
    fails(&format!("evaluate {} --matrix {}", text(&run), text(&file("nowhere/x.csv"))), 2, &["there is no folder"]);
    fails(&format!("evaluate {} nowhere", text(&run)), 3, &["nowhere"]);
    fails("evaluate", 2, &["<RUN>"]);
    let other = finetuned(folder.path(), "other", 0, "synthetic:train=20,test=10,classes=2");
    let both = format!("{} {}", text(&run), text(&other));
    fails(&format!("evaluate {both} --matrix {}", text(&file("y.csv"))), 2, &["other classes", "other"]);
    works(&format!("evaluate {both}"));
}

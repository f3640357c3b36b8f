//! `probe`: against computations of its own on the vectors that `embed` writes.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{fails, ran, selfie, text, works, write_images};
use serde_json::Value;

const DATA: &str = "synthetic:train=120,test=60,classes=3";

fn pretrained(folder: &Path) -> PathBuf {
    let run = folder.join("pre");
    works(&format!("pretrain --data {DATA} --out {} --preset tiny --batch 16 --steps 20 --seed 3", text(&run)));
    run
}

/// Vectors and labels of a part.
fn embedded(run: &Path, part: &str, folder: &Path) -> Vec<(Vec<f64>, usize)> {
    let out = folder.join(format!("{part}.csv"));
    works(&format!("embed {} --part {part} -o {}", text(run), text(&out)));
    let csv = fs::read_to_string(out).expect("written");
    let line = |line: &str| {
        let fields: Vec<&str> = line.split(',').collect();
        let numbers = fields[3..].iter().map(|field| field.parse().expect("a number")).collect();
        (numbers, fields[1].parse().expect("a label"))
    };
    csv.lines().skip(1).map(line).collect()
}

/// The inner product of vectors less the mean of `rows`, by the inverse of their covariance: shrunk towards the mean variance
/// by the share of its distance to it that is chance (Ledoit and Wolf 2004). By elimination.
fn whitened_product(rows: &[Vec<f64>]) -> impl Fn(&[f64], &[f64]) -> f64 {
    let (n, d) = (rows.len() as f64, rows[0].len());
    let mean: Vec<f64> = (0..d).map(|j| rows.iter().map(|row| row[j]).sum::<f64>() / n).collect();
    let less = |row: &[f64]| row.iter().zip(&mean).map(|(x, mean)| x - mean).collect::<Vec<f64>>();
    let centred: Vec<Vec<f64>> = rows.iter().map(|row| less(row)).collect();
    let covariance = |i: usize, j: usize| centred.iter().map(|row| row[i] * row[j]).sum::<f64>() / n;
    let mut matrix: Vec<Vec<f64>> = (0..d).map(|i| (0..d).map(|j| covariance(i, j)).collect()).collect();
    let scale = (0..d).map(|i| matrix[i][i]).sum::<f64>() / d as f64;
    let squares: f64 = matrix.iter().flatten().map(|x| x * x).sum();
    let fourth: f64 = centred.iter().map(|row| row.iter().map(|x| x * x).sum::<f64>().powi(2)).sum();
    let shrinkage = ((fourth / n - squares) / n / (squares - d as f64 * scale * scale)).min(1.0);
    for (i, row) in matrix.iter_mut().enumerate() {
        row.iter_mut().for_each(|x| *x *= 1.0 - shrinkage);
        row[i] += shrinkage * scale;
        row.extend((0..d).map(|j| f64::from(u8::from(i == j))));
    }
    for i in 0..d {
        let pivot: Vec<f64> = matrix[i].iter().map(|x| x / matrix[i][i]).collect();
        for row in &mut matrix {
            let factor = row[i];
            row.iter_mut().zip(&pivot).for_each(|(x, pivot)| *x -= factor * pivot);
        }
        matrix[i] = pivot;
    }
    move |a, b| {
        let [a, b] = [a, b].map(|row| row.iter().zip(&mean).map(|(x, mean)| x - mean).collect::<Vec<f64>>());
        (0..d).map(|i| a[i] * (0..d).map(|j| matrix[i][d + j] * b[j]).sum::<f64>()).sum()
    }
}

fn number(answer: &Value, pointer: &str) -> f64 {
    answer.pointer(pointer).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {pointer} in {answer}"))
}

#[test]
fn neighbours_are_those_of_all_pairs() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = pretrained(folder.path());
    let (train, test) = (embedded(&run, "train", folder.path()), embedded(&run, "val", folder.path()));
    let plain = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let rows: Vec<Vec<f64>> = train.iter().map(|(row, _)| row.clone()).collect();
    let whitened = whitened_product(&rows);
    let top1 = |k: usize, temperature: f64, product: &dyn Fn(&[f64], &[f64]) -> f64| {
        let right = test.iter().filter(|(query, label)| {
            let cosine = |row: &[f64]| product(row, query) / (product(row, row) * product(query, query)).sqrt();
            let mut all: Vec<_> = train.iter().map(|(row, label)| (cosine(row), *label)).collect();
            all.sort_by(|a, b| b.0.total_cmp(&a.0));
            let vote = |class: usize| -> f64 {
                let votes = all[..k].iter().filter(|(_, label)| *label == class);
                votes.map(|(cosine, _)| (cosine / temperature).exp()).sum()
            };
            (0..3).max_by(|&a, &b| vote(a).total_cmp(&vote(b))) == Some(*label)
        });
        right.count() as f64 / test.len() as f64
    };
    let probe = |more: &str| works(&format!("probe knn {} --data {DATA} --json {more}", text(&run))).json();
    let answer = probe("");
    assert_eq!(number(&answer, "/top1"), top1(20, 0.07, &whitened));
    assert_eq!(answer["settings"]["similarity"], "cosine of whitened features");
    let cosine = probe("--similarity cosine");
    assert_eq!(number(&cosine, "/top1"), top1(20, 0.07, &plain));
    assert_eq!(cosine["settings"]["similarity"], "cosine");
    assert_eq!(number(&answer, "/settings/k"), 20.0);
    assert_eq!((number(&answer, "/n"), number(&answer, "/train_images")), (60.0, 120.0));
    let (share, error) = (number(&answer, "/top1"), number(&answer, "/standard_error"));
    assert!((error - (share * (1.0 - share) / 60.0).sqrt()).abs() < 1e-15);
    assert_eq!(number(&probe("-k 3 --temperature 1.0"), "/top1"), top1(3, 1.0, &whitened));
    assert_eq!(number(&probe("-k 120 --temperature 0.5 --similarity cosine"), "/top1"), top1(120, 0.5, &plain));
    let patches = probe("--pooling patches --layer stage2");
    assert_eq!(
        (number(&patches, "/width"), &patches["layer"]),
        (64.0, &"norm behind stage 2, average over the patches".into())
    );
    assert_eq!(probe("--threads 1 --batch 1 --workers 0"), probe("--threads 2 --batch 50"));

    // The gain is over the untrained network's, and words and JSON agree.
    let difference = number(&answer, "/top1") - number(&answer, "/untrained/top1");
    assert!((number(&answer, "/gain") - difference).abs() < 1e-12);
    let words = works(&format!("probe knn {} --data {DATA}", text(&run))).out;
    for part in [format!("trained   top-1 {:.2}%", 100.0 * share), "k = 20".into(), "n = 60".into(), "seed 3".into()] {
        assert!(words.contains(&part), "no `{part}` in {words}");
    }
}

#[test]
fn the_reference_is_the_network_of_no_steps() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = pretrained(folder.path());
    let other = folder.path().join("other");
    // Another length of training, the same seed: another network, the same reference.
    works(&format!("pretrain --data {DATA} --out {} --preset tiny --batch 16 --steps 3 --seed 3", text(&other)));
    let probe = |run: &Path| works(&format!("probe knn {} --data {DATA} --json", text(run))).json();
    assert_eq!(probe(&run)["untrained"], probe(&other)["untrained"]);
    let seeded = folder.path().join("seeded");
    works(&format!("pretrain --data {DATA} --out {} --preset tiny --batch 16 --steps 3 --seed 4", text(&seeded)));
    assert_eq!(probe(&seeded)["untrained"]["seed"], 4);
}

#[test]
fn a_linear_probe_ends_at_its_optimum() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = pretrained(folder.path());
    let probe = |more: &str| works(&format!("probe linear {} --data {DATA} --json {more}", text(&run))).json();
    let answer = probe("");
    for fit in ["fit", "untrained_fit"] {
        let number = |key: &str| number(&answer, &format!("/settings/{fit}/{key}"));
        assert!(number("gradient") <= 1e-6, "{answer}");
        assert_eq!(answer["settings"][fit]["converged"], true);
        // No classifier is worse than none, ln 3, on the images that it is fitted to.
        assert!(number("objective") > 0.0 && number("objective") < 3f64.ln(), "{answer}");
        assert!(
            answer["settings"]["penalties"].as_array().expect("a list").contains(&answer["settings"][fit]["penalty"])
        );
    }
    assert_eq!((number(&answer, "/train_images"), number(&answer, "/n")), (120.0, 60.0), "refitted to all");
    assert!(number(&answer, "/top1") > 1.0 / 3.0, "better than guessing: {answer}");
    assert_eq!(answer, probe("--threads 2 --batch 7"));
    let few = probe("--labels 10");
    assert_eq!(number(&few, "/train_images"), 30.0);
    let words = works(&format!("probe linear {} --data {DATA}", text(&run))).out;
    assert!(words.contains("logistic regression") && words.contains("penalty") && words.contains("20%"), "{words}");
}

#[test]
fn a_finetuned_run_is_probed_before_its_head() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = folder.path().join("fine");
    let finetune = "--preset tiny --batch 16 --steps 4 --init scratch --labels 50%";
    works(&format!("finetune --data {DATA} --out {} {finetune}", text(&run)));
    let answer = works(&format!("probe knn {} --json", text(&run))).json();
    // All labels vote, though the run had only half of them.
    assert_eq!((number(&answer, "/train_images"), number(&answer, "/width")), (120.0, 256.0));
    assert!(answer["layer"].as_str().expect("a text").contains("stage 4"), "{answer}");
}

#[test]
fn what_cannot_be_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = pretrained(folder.path());
    let probe = |line: &str, code, words: &[&str]| fails(&format!("probe {line}"), code, words);
    let run = text(&run);
    probe(&format!("knn {run} -k 121"), 2, &["-k 121", "120 training images"]);
    probe(&format!("knn {run} --labels 41"), 2, &["labels", "41"]);
    probe(&format!("linear {run} --validation 0.001"), 2, &["--validation 0.001"]);
    for wrong in ["-k 0", "--temperature 0", "--temperature nan"] {
        let ran = ran(&mut selfie(&format!("probe knn {run} {wrong}")));
        assert_eq!(ran.code, Some(2), "{wrong}: {}", ran.err);
    }
    // Fewer images than the usual number of neighbours: said, and done.
    let few = works(&format!("probe knn {run} --labels 2 --json"));
    few.says(&["k = 6 instead of 20"]);
    assert_eq!(few.json()["settings"]["k"], 6);
    probe("knn nowhere", 3, &["nowhere"]);
    let data = folder.path().join("photos");
    write_images(&data, 6);
    probe(&format!("knn {run} --data {}", text(&data)), 3, &["test part", "val/ or test/"]);
    fs::rename(data.join("a"), folder.path().join("flat")).expect("moved");
    probe(&format!("knn {run} --data {}", text(&folder.path().join("flat"))), 3, &["class"]);
}

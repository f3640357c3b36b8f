//! Ours and PyTorch's step in turns (A B A B ..) on one machine; appends a JSON line for each row to a results file.
//!
//! `cargo run --release -p selfie-benches --bin compare -- --python venv/bin/python`
//!
//! Each turn is a process of its own that reports the time of its steps and its peak memory. The ratio quoted is the
//! median of the turns' ratios: both sides of a turn see the same state of the machine.

use anyhow::{Context, Result, bail};
use clap::Parser;
use selfie_benches::median;
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

#[derive(Parser)]
#[command(about = "Compares our steps with PyTorch's, interleaved")]
struct Args {
    /// A Python with the packages of benches/pytorch/requirements.txt.
    #[arg(long, default_value = "python3")]
    python: PathBuf,
    /// Where results are appended.
    #[arg(long, default_value = "benches/results/cpu.jsonl")]
    results: PathBuf,
    /// Pairs of runs for each row.
    #[arg(long, default_value_t = 5)]
    turns: usize,
    /// Timed steps of each run, after one that is not.
    #[arg(long, default_value_t = 3)]
    steps: usize,
    /// f32 or bf16.
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// Only rows whose name contains this, as "finetune 224".
    #[arg(long, default_value = "")]
    only: String,
}

/// The rows of the speed targets: name, options of either bench.
const ROWS: [(&str, &str); 5] = [
    ("pretrain 32", "--task pretrain --image-size 32 --batch 64"),
    ("finetune 32", "--task finetune --image-size 32 --batch 64"),
    ("finetune 224", "--task finetune --image-size 224 --batch 8 --classes 1000"),
    ("pretrain 224", "--task pretrain --image-size 224 --batch 8"),
    ("infer 224", "--task infer --image-size 224 --batch 8 --classes 1000"),
];

fn main() -> Result<()> {
    let args = Args::parse();
    let ours = std::env::current_exe()?.with_file_name("step");
    let theirs = Path::new(env!("CARGO_MANIFEST_DIR")).join("pytorch/torch_selfie.py");
    let mut results = std::fs::OpenOptions::new().create(true).append(true).open(&args.results)?;
    for (name, options) in ROWS.iter().filter(|(name, _)| name.contains(&args.only)) {
        let steps = format!("--dtype {} --warmup 1 --repeats {}", args.dtype, args.steps);
        let run = |command: &mut Command| measure(command.args(options.split(' ')).args(steps.split(' ')));
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for _ in 0..args.turns {
            a.push(run(&mut Command::new(&ours))?);
            // glibc gives every large block back to the kernel, which zeroes it again; PyTorch is faster without.
            b.push(run(Command::new(&args.python).arg(&theirs).arg("bench").args(["--malloc", "retain"]))?);
        }
        // Memory is compared with the allocator's defaults, which need less.
        let default = run(Command::new(&args.python).arg(&theirs).arg("bench").args(["--malloc", "default"]))?;
        let column = |runs: &[Value], key: &str| runs.iter().map(|r| number(r, key)).collect::<Result<Vec<f64>>>();
        let (ours_ms, theirs_ms) = (column(&a, "step_ms_median")?, column(&b, "step_ms_median")?);
        let ratios: Vec<f64> = theirs_ms.iter().zip(&ours_ms).map(|(theirs, ours)| theirs / ours).collect();
        let batch = number(&a[0], "batch")?;
        let memory = number(&a[0], "peak_memory_bytes")? / number(&default, "peak_memory_bytes")?;
        let row = json!({
            "date": output(Command::new("date").arg("+%F"))?,
            "commit": output(Command::new("git").args(["describe", "--always", "--dirty"]))?,
            "cpu": cpu_name(),
            "device": a[0]["device"],
            "row": name,
            "dtype": args.dtype,
            "peer": b[0]["peer"],
            "turns": args.turns,
            "ours_images_per_second": round(1e3 * batch / median(&ours_ms)),
            "peer_images_per_second": round(1e3 * batch / median(&theirs_ms)),
            "speed_ratio": round(median(&ratios)),
            "speed_ratio_min": round(ratios.iter().copied().fold(f64::INFINITY, f64::min)),
            "speed_ratio_max": round(ratios.iter().copied().fold(0.0, f64::max)),
            "ours_peak_memory_bytes": a[0]["peak_memory_bytes"],
            "peer_peak_memory_bytes": default["peak_memory_bytes"],
            "memory_ratio": round(memory),
        });
        println!("{row}");
        writeln!(results, "{row}")?;
    }
    Ok(())
}

fn measure(command: &mut Command) -> Result<Value> {
    let text = output(command)?;
    serde_json::from_str(&text).with_context(|| format!("{command:?} printed no JSON object: {text}"))
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

fn number(run: &Value, key: &str) -> Result<f64> {
    run[key].as_f64().with_context(|| format!("no number {key} in {run}"))
}

fn round(x: f64) -> f64 {
    (x * 1000.0).round() / 1000.0
}

fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name"));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{}, {cores} cores", name.map_or("unknown", |name| name.trim_start_matches([' ', '\t', ':'])))
}

//! Times whole training steps (or inference) on random data and prints one JSON object, with the keys of
//! `pytorch/torch_selfie.py bench`, so that `compare` can run either.

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use cpu_time::ProcessTime;
use half::bf16;
use selfie_benches::{median, random};
use selfie_kernels::{Cpu, Element, Memory};
use selfie_model::{Begin, Build, Classifier, Mode, ModelConfig, Network, Preset, Purpose, Selfie, Update};
use serde_json::json;
use std::time::Instant;

#[derive(Parser)]
#[command(about = "Times whole steps and prints one JSON object")]
struct Args {
    /// What a step is.
    #[arg(long, value_enum, default_value = "pretrain")]
    task: Task,
    /// Side of an image in pixels.
    #[arg(long, default_value_t = 32)]
    image_size: usize,
    /// Images of a batch.
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Classes (finetune, infer).
    #[arg(long, default_value_t = 10)]
    classes: usize,
    /// Element type of activations.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Dtype,
    /// 0: one per core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Steps before the clock starts.
    #[arg(long, default_value_t = 2)]
    warmup: usize,
    /// Timed steps.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Task {
    Pretrain,
    Finetune,
    Infer,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    F32,
    Bf16,
}

fn main() -> Result<()> {
    let args = Args::parse();
    match args.dtype {
        Dtype::F32 => run::<f32>(&args),
        Dtype::Bf16 => run::<bf16>(&args),
    }
}

fn run<T: Element>(args: &Args) -> Result<()> {
    let cpu = Cpu::new(args.threads)?;
    let config = ModelConfig::preset(Preset::Resnet50, args.image_size);
    let purpose = if args.task == Task::Infer { Purpose::Evaluate } else { Purpose::Train };
    let build = Build { config: &config, batch: args.batch, purpose, seed: 0 };
    let pixels = random::<T>(1, args.batch * args.image_size * args.image_size * 3);
    let (wall, cpu_time) = match args.task {
        Task::Pretrain => {
            let mut network = Selfie::<Cpu, T>::new(cpu.clone(), build)?;
            let orders = orders(args.batch, config.patches());
            time(args, |step| {
                network.put_pixels(&pixels, &orders, (step * args.batch) as u64)?;
                train(&mut network)
            })?
        }
        Task::Finetune | Task::Infer => {
            let mut network = Classifier::<Cpu, T>::new(cpu.clone(), build, args.classes)?;
            let labels: Vec<u32> = (0..args.batch).map(|i| (i % args.classes) as u32).collect();
            time(args, |step| {
                network.put_pixels(&pixels, &labels, (step * args.batch) as u64)?;
                match args.task {
                    Task::Infer => {
                        network.begin(Begin::Evaluation)?;
                        Ok(network.forward(Mode::Evaluate)?)
                    }
                    _ => train(&mut network),
                }
            })?
        }
    };
    let median = median(&wall);
    let result = json!({
        "peer": concat!("selfie ", env!("CARGO_PKG_VERSION")),
        "task": args.task.to_possible_value().map(|v| v.get_name().to_owned()),
        "image_size": args.image_size,
        "batch": args.batch,
        "device": cpu.describe(),
        "dtype": args.dtype.to_possible_value().map(|v| v.get_name().to_owned()),
        "threads": cpu.threads(),
        "step_ms": wall,
        "cpu_ms": cpu_time,
        "step_ms_median": median,
        "step_ms_min": wall.iter().copied().fold(f64::INFINITY, f64::min),
        "images_per_second": 1e3 * args.batch as f64 / median,
        "peak_memory_bytes": peak_memory_bytes()?,
    });
    println!("{result}");
    Ok(())
}

fn train<T: Element>(network: &mut impl Network<Cpu, T>) -> Result<()> {
    network.begin(Begin::Step { rate: 0.01 })?;
    network.train_step(Update { momentum: 0.9, weight_decay: 1e-4 })?;
    // Waits for the step, as the trainer does.
    network.metrics()?;
    Ok(())
}

/// Milliseconds of each timed step: on the wall, and of all threads together.
fn time(args: &Args, mut step: impl FnMut(usize) -> Result<()>) -> Result<(Vec<f64>, Vec<f64>)> {
    for i in 0..args.warmup {
        step(i)?;
    }
    let mut times = (Vec::new(), Vec::new());
    for i in 0..args.repeats {
        let (wall, cpu) = (Instant::now(), ProcessTime::now());
        step(args.warmup + i)?;
        times.0.push(1e3 * wall.elapsed().as_secs_f64());
        times.1.push(1e3 * cpu.elapsed().as_secs_f64());
    }
    Ok(times)
}

/// A random permutation of the patches for each image.
fn orders(images: usize, patches: usize) -> Vec<u32> {
    let keys = random::<f32>(2, images * patches);
    let mut orders = Vec::with_capacity(keys.len());
    for keys in keys.chunks_exact(patches) {
        let mut order: Vec<u32> = (0..patches as u32).collect();
        order.sort_by(|&a, &b| keys[a as usize].total_cmp(&keys[b as usize]));
        orders.extend(order);
    }
    orders
}

/// The most memory that this process ever held.
fn peak_memory_bytes() -> Result<usize> {
    let status = std::fs::read_to_string("/proc/self/status").context("the peak memory is read from Linux's /proc")?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).context("VmHWM in /proc/self/status")?;
    let kib: usize = line.split_whitespace().nth(1).context("a number behind VmHWM")?.parse()?;
    Ok(kib * 1024)
}

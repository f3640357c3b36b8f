//! Times whole training steps (or inference) on random data and prints one JSON object, with the keys of
//! `pytorch/torch_selfie.py bench`, so that `compare` and `gpu/run` can run either.
//!
//! The clock runs over `--steps` steps and stops when the device has done them all: what is measured is what a device keeps up,
//! recorded steps on a GPU. With `--input resident` the batch lies on the device, normalised, as PyTorch's does in its bench;
//! `staged` brings another batch of bytes for each step, and augments it, as training does.

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use cpu_time::ProcessTime;
use half::bf16;
use selfie_benches::median;
use selfie_kernels::{Backend, Cpu, Cuda, Element, Memory};
use selfie_model::{Build, Classifier, Feed, ModelConfig, Network, Preset, Purpose, Selfie, Steps};
use serde_json::json;
use std::path::PathBuf;
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
    /// Blocks of the four stages.
    #[arg(long, value_delimiter = ',', default_values_t = [3, 4, 6, 3], num_args = 1)]
    depths: Vec<usize>,
    /// Channels of the stem, from which all widths follow as in the peer's bench.
    #[arg(long, default_value_t = 64)]
    width: usize,
    /// cpu, cuda, cuda:NUMBER, or the file of the emulator's library.
    #[arg(long, default_value = "cpu", value_parser = Place::parse)]
    device: Place,
    /// Element type of activations.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Dtype,
    /// Where a step finds its batch.
    #[arg(long, value_enum, default_value = "resident")]
    input: Input,
    /// Of the CPU; 0: one per core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Steps before the clock starts: a GPU works plainly in the first and records the second.
    #[arg(long, default_value_t = 2)]
    warmup: usize,
    /// Steps of a stretch, after which the clock is read.
    #[arg(long, default_value_t = 1)]
    steps: usize,
    /// Timed stretches.
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

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Input {
    Resident,
    Staged,
}

impl From<Input> for Feed {
    fn from(input: Input) -> Self {
        match input {
            Input::Resident => Feed::Resident,
            Input::Staged => Feed::Staged,
        }
    }
}

#[derive(Clone)]
enum Place {
    Cpu,
    Cuda(usize),
    /// CUDA kernels without a GPU: says nothing about speed.
    Emulator(PathBuf),
}

impl Place {
    fn parse(text: &str) -> Result<Self, String> {
        match text.strip_prefix("cuda") {
            Some("") => Ok(Self::Cuda(0)),
            Some(number) if number.starts_with(':') => {
                number[1..].parse().map(Self::Cuda).map_err(|_| "expected cuda:NUMBER".into())
            }
            _ if text == "cpu" => Ok(Self::Cpu),
            _ if text.ends_with(".so") => Ok(Self::Emulator(text.into())),
            _ => Err("expected cpu, cuda, cuda:NUMBER, or a file that ends in .so".into()),
        }
    }
}

/// What of a result the device's kind decides.
#[derive(Clone, Copy)]
struct Kind {
    peak: Peak,
    /// Of a CPU.
    threads: Option<usize>,
}

/// Where the peak of memory is read.
#[derive(Clone, Copy)]
enum Peak {
    /// What this process held: the activations are in its own memory.
    Process,
    /// What the device has less than when it was opened, and its workspace.
    Device { free: usize },
}

fn main() -> Result<()> {
    let args = Args::parse();
    match &args.device {
        Place::Cpu => {
            let cpu = Cpu::new(args.threads)?;
            let threads = Some(cpu.threads());
            in_precision(&args, cpu, Kind { peak: Peak::Process, threads })
        }
        Place::Emulator(library) => {
            in_precision(&args, Cuda::emulated(library)?, Kind { peak: Peak::Process, threads: None })
        }
        Place::Cuda(ordinal) => {
            let cuda = Cuda::new(*ordinal)?;
            let free = cuda.capacity().context("the device does not say how much memory is free")?;
            in_precision(&args, cuda, Kind { peak: Peak::Device { free }, threads: None })
        }
    }
}

fn in_precision<B: Backend<f32> + Backend<bf16>>(args: &Args, device: B, kind: Kind) -> Result<()> {
    match args.dtype {
        Dtype::F32 => run::<B, f32>(args, device, kind),
        Dtype::Bf16 => run::<B, bf16>(args, device, kind),
    }
}

fn run<B: Backend<T>, T: Element>(args: &Args, device: B, kind: Kind) -> Result<()> {
    let config = model(args)?;
    let purpose = if args.task == Task::Infer { Purpose::Evaluate } else { Purpose::Train };
    let build = Build { config: &config, batch: args.batch, purpose, seed: 0 };
    match args.task {
        Task::Pretrain => report(args, kind, purpose, Selfie::<B, T>::new(device, build)?),
        Task::Finetune | Task::Infer => {
            report(args, kind, purpose, Classifier::<B, T>::new(device, build, args.classes)?)
        }
    }
}

/// The network, made smaller by the rules of the peer's bench.
fn model(args: &Args) -> Result<ModelConfig> {
    let depths = args.depths.as_slice().try_into().context("--depths takes four numbers, as 3,4,6,3")?;
    let full = ModelConfig::preset(Preset::Resnet50, args.image_size);
    let part = |whole: usize| (whole * args.width / full.stem_width).max(1);
    Ok(ModelConfig { stem_width: args.width, depths, heads: part(full.heads), ffn: part(full.ffn), ..full })
}

/// Times the steps and prints what is found.
fn report<B: Backend<T>, T: Element, N: Network<B, T>>(
    args: &Args,
    kind: Kind,
    purpose: Purpose,
    network: N,
) -> Result<()> {
    let mut steps = Steps::new(network, purpose, args.input.into(), args.classes)?;
    let (wall, cpu_time) = time(args, &mut steps)?;
    let median = median(&wall);
    let device = &**steps.network().device();
    let result = json!({
        "peer": concat!("selfie ", env!("CARGO_PKG_VERSION")),
        "task": word(&args.task),
        "image_size": args.image_size,
        "batch": args.batch,
        "device": device.describe(),
        "dtype": word(&args.dtype),
        "input": word(&args.input),
        "threads": kind.threads,
        "step_ms": wall,
        "cpu_ms": cpu_time,
        "step_ms_median": median,
        "step_ms_min": wall.iter().copied().fold(f64::INFINITY, f64::min),
        "images_per_second": 1e3 * args.batch as f64 / median,
        "peak_memory_bytes": kind.peak.bytes(device)?,
    });
    println!("{result}");
    Ok(())
}

/// Milliseconds of a step in each timed stretch: on the wall, and of all threads together.
fn time<B: Backend<T>, T: Element, N: Network<B, T>>(
    args: &Args,
    steps: &mut Steps<B, T, N>,
) -> Result<(Vec<f64>, Vec<f64>)> {
    (0..args.warmup).try_for_each(|_| steps.step())?;
    if args.warmup > 0 {
        steps.finish()?;
    }
    let mut times = (Vec::new(), Vec::new());
    for _ in 0..args.repeats {
        let (wall, cpu) = (Instant::now(), ProcessTime::now());
        (0..args.steps).try_for_each(|_| steps.step())?;
        steps.finish()?;
        times.0.push(1e3 * wall.elapsed().as_secs_f64() / args.steps as f64);
        times.1.push(1e3 * cpu.elapsed().as_secs_f64() / args.steps as f64);
    }
    Ok(times)
}

/// A value as the command line takes it.
fn word(value: &impl ValueEnum) -> Option<String> {
    value.to_possible_value().map(|value| value.get_name().to_owned())
}

impl Peak {
    fn bytes(self, device: &impl Memory) -> Result<usize> {
        match self {
            Self::Process => process_peak_bytes(),
            // Nothing is given back between the steps, so what is held now is the most that was; modules and graphs count.
            Self::Device { free } => {
                let left = device.capacity().context("the device does not say how much memory is free")?;
                Ok(free.saturating_sub(left) + device.workspace_bytes(0))
            }
        }
    }
}

/// The most memory that this process ever held.
fn process_peak_bytes() -> Result<usize> {
    let status = std::fs::read_to_string("/proc/self/status").context("the peak memory is read from Linux's /proc")?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).context("VmHWM in /proc/self/status")?;
    let kib: usize = line.split_whitespace().nth(1).context("a number behind VmHWM")?.parse()?;
    Ok(kib * 1024)
}

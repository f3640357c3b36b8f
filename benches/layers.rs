//! Times every convolution of a ResNet-50 v2, each pass by itself, and prints a table: where the time of a step goes, and
//! how far each pass is from what the machine can multiply.
//!
//! `cargo run --release -p selfie-benches --bin layers -- --image-size 224 --batch 8`

use clap::Parser;
use selfie_benches::{Convolution, PASSES, Pass, cpu, median};
use selfie_kernels::ConvDims;
use selfie_kernels::{Cpu, Memory, Result};
use std::time::Instant;

#[derive(Parser)]
#[command(about = "Times every convolution of a ResNet-50, pass by pass")]
struct Args {
    /// Side of an image: 64 pixels and more begin with the stem of stride 4, smaller ones with that of stride 1.
    #[arg(long, default_value_t = 224)]
    image_size: usize,
    /// Images of a batch.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Runs of each pass, of which the median counts.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Only convolutions whose name contains this, as "3x3".
    #[arg(long, default_value = "")]
    only: String,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let cpu = cpu();
    println!("{}, images of {}px, batch {}, f32", cpu.describe(), args.image_size, args.batch);
    println!("{:<36} {:>5}{}", "convolution", "times", PASSES.map(|(name, _)| format!("  {name:>17}")).concat());
    println!("{:<36} {:>5}{}", "", "", format!("  {:>7} {:>9}", "ms", "GFLOP/s").repeat(PASSES.len()));
    let mut totals = [0.0; PASSES.len()];
    for (name, times, dims) in convolutions(args.image_size, args.batch) {
        if !name.contains(&args.only) {
            continue;
        }
        print!("{name:<36} {times:>5}");
        let mut convolution = Convolution::new(dims);
        for ((_, pass), total) in PASSES.into_iter().zip(&mut totals) {
            let seconds = time(&mut convolution, pass, &cpu, args.repeats.max(1))?;
            print!("  {:>7.2} {:>9.0}", 1e3 * seconds, dims.flops() as f64 / seconds / 1e9);
            *total += times as f64 * 1e3 * seconds;
        }
        println!();
    }
    println!("{:<36} {:>5}{}", "all", "", totals.map(|ms| format!("  {ms:>7.1} {:>9}", "")).concat());
    Ok(())
}

/// Name, how often the network has it, dims.
fn convolutions(image_size: usize, n: usize) -> Vec<(String, usize, ConvDims)> {
    let mut side = if image_size >= 64 { image_size / 4 } else { image_size };
    let mut channels = 64;
    let mut all = Vec::new();
    for (stage, blocks) in [3, 4, 6, 3].into_iter().enumerate() {
        let (width, stride) = (64 << stage, if stage == 0 { 1 } else { 2 });
        let conv = |h, c, k, r, stride| ConvDims { n, h, w: h, c, k, r, s: r, stride, pad: r / 2 };
        let mut push = |times: usize, dims: ConvDims| {
            let ConvDims { h, c, k, r, stride, .. } = dims;
            let stride = if stride == 1 { String::new() } else { format!(" stride {stride}") };
            all.push((format!("stage {}: {r}x{r} {c}-{k}{stride} on {h}", stage + 1), times, dims));
        };
        let inside = side / stride;
        push(1, conv(side, channels, width, 1, 1));
        push(1, conv(side, channels, 4 * width, 1, stride));
        push(1, conv(side, width, width, 3, stride));
        push(blocks - 1, conv(inside, 4 * width, width, 1, 1));
        push(blocks - 1, conv(inside, width, width, 3, 1));
        push(blocks, conv(inside, width, 4 * width, 1, 1));
        (side, channels) = (inside, 4 * width);
    }
    all
}

/// Median of the seconds of some runs after one that is not timed.
fn time(convolution: &mut Convolution, pass: Pass, cpu: &Cpu, repeats: usize) -> Result<f64> {
    pass(convolution, cpu)?;
    let mut seconds = Vec::new();
    for _ in 0..repeats {
        let start = Instant::now();
        pass(convolution, cpu)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    Ok(median(&seconds))
}

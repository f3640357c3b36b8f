//! Where to compute, and in which precision.

use selfie_kernels::{Cpu, Memory};

use crate::config::Run;
use crate::exit::Problem;
use crate::system::{Source, System};

/// Type of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// 32 bits.
    F32,
    /// bfloat16, computed in f32.
    Bf16,
}

/// The choice, and why.
#[derive(Debug)]
pub struct Chosen {
    /// The device.
    pub device: Cpu,
    /// The type of activations.
    pub precision: Precision,
    /// Lines for people.
    pub notes: Vec<String>,
}

/// Chooses device and precision.
///
/// # Errors
/// Usage: a GPU was asked for.
pub fn choose(run: &Run) -> anyhow::Result<Chosen> {
    if run.device == "cuda" {
        return Err(Problem::usage(
            "run.device = cuda: this build has no CUDA kernels yet; use --device cpu, or auto, which takes the CPU",
        ));
    }
    let system = System::here();
    let threads = if run.threads == 0 { system.threads.most } else { run.threads };
    let device = Cpu::new(threads)?;
    let precision = if run.precision == "bf16" { Precision::Bf16 } else { Precision::F32 };
    let name = match precision {
        Precision::F32 => "f32",
        Precision::Bf16 => "bf16",
    };
    let mut notes = vec![format!("device    {}, {name}", device.describe())];
    if run.threads == 0
        && let limit @ Source::ControlGroup(_) = &system.threads.source
    {
        notes.push(format!("          ({threads} of {} processors, by {limit})", system.processors));
    }
    if run.device == "auto" {
        notes.push("          (the CPU, as this build has no CUDA kernels yet)".into());
    }
    Ok(Chosen { device, precision, notes })
}

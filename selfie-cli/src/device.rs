//! Where to compute, and in which precision: chosen here, and matched here, once.

use std::path::Path;

use half::bf16;
use selfie_kernels::cuda::KernelForm;
use selfie_kernels::{Backend, Cpu, Cuda, Element, Memory};

use crate::choices::{Found, Place, Table};
use crate::config::Run;
use crate::exit::Problem;
use crate::run_folder;
use crate::system::{Source, System};

/// Type of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// 32 bits.
    F32,
    /// bfloat16; sums, masters and momenta in f32.
    Bf16,
}

/// A device that computes.
#[derive(Clone, Debug)]
pub enum Device {
    /// This machine's processors.
    Cpu(Cpu),
    /// A GPU.
    Cuda(Cuda),
}

/// The choice, and why.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// The device.
    pub device: Device,
    /// The type of activations.
    pub precision: Precision,
    /// What it is, in lines for people.
    about: Vec<String>,
    /// The table that chooses kernels beside the rules; GPUs alone have one.
    pub table: Option<Table>,
    /// What is to be said of it.
    about_table: Option<String>,
    /// Why it is not the GPU that `auto` would have taken.
    pub no_gpu: Option<String>,
}

/// Something to be done on the device and in the precision that were chosen.
pub trait Work {
    /// What it gives.
    type Output;
    /// Does it.
    ///
    /// # Errors
    /// Its own.
    fn run<B: Backend<T>, T: Element>(self, device: B) -> anyhow::Result<Self::Output>;
}

impl Chosen {
    /// Does `work`.
    ///
    /// # Errors
    /// Those of the work.
    pub fn run<W: Work>(&self, work: W) -> anyhow::Result<W::Output> {
        match (self.device.clone(), self.precision) {
            (Device::Cpu(device), Precision::F32) => work.run::<_, f32>(device),
            (Device::Cpu(device), Precision::Bf16) => work.run::<_, bf16>(device),
            (Device::Cuda(device), Precision::F32) => work.run::<_, f32>(device),
            (Device::Cuda(device), Precision::Bf16) => work.run::<_, bf16>(device),
        }
    }

    /// Lines for people.
    pub fn notes(&self) -> impl Iterator<Item = &String> {
        self.about.iter().chain(&self.about_table)
    }

    /// The same with another device in its place.
    #[must_use]
    pub fn on(&self, device: Device) -> Self {
        Self { device, ..self.clone() }
    }

    /// The same for the run in a folder: one that was begun goes on with its own table, or with none.
    #[must_use]
    pub fn for_run(self, root: &Path) -> Self {
        match &self.device {
            Device::Cuda(cuda) if run_folder::is_begun(root) => {
                let found = Table::of_run(root, cuda);
                self.with_table(found)
            }
            _ => self,
        }
    }

    fn with_table(self, found: Found) -> Self {
        let Device::Cuda(cuda) = &self.device else { return self };
        let (table, about_table) = match found {
            Found::Table(table) => {
                let about =
                    format!("          (kernels by the table {}, {} entries)", table.measured.name(), table.len());
                (Some(table), Some(about))
            }
            Found::None => (None, None),
            Found::Ignored(why) => (None, Some(format!("          (kernels by the rules, without a table: {why})"))),
        };
        let rules = || Table::empty(Place::of(cuda));
        let device = Device::Cuda(table.as_ref().unwrap_or(&rules()).applied(cuda));
        Self { device, table, about_table, ..self }
    }

    /// The choice as files and machines read it: `cpu` or `cuda`, and the type.
    pub fn names(&self) -> [&'static str; 2] {
        let device = match self.device {
            Device::Cpu(_) => "cpu",
            Device::Cuda(_) => "cuda",
        };
        [device, self.precision.name()]
    }
}

impl Precision {
    /// As `--precision` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

/// What `--device` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// A GPU if one can be used, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of that number.
    Cuda(usize),
}

impl Wish {
    /// From `auto`, `cpu`, `cuda` or `cuda:NUMBER`.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "auto" => Some(Self::Auto),
            "cpu" => Some(Self::Cpu),
            "cuda" => Some(Self::Cuda(0)),
            _ => text.strip_prefix("cuda:")?.parse().ok().map(Self::Cuda),
        }
    }
}

/// Chooses device and precision.
///
/// # Errors
/// A GPU was asked for and cannot be used.
pub fn choose(run: &Run) -> anyhow::Result<Chosen> {
    let wish = Wish::parse(&run.device).ok_or_else(|| {
        Problem::usage(format!("run.device = {}: expected auto, cpu, cuda or cuda:NUMBER", run.device))
    })?;
    let (device, why) = match wish {
        Wish::Cpu => (None, None),
        Wish::Cuda(ordinal) => (Some(Cuda::new(ordinal).map_err(with_the_way_out)?), None),
        Wish::Auto => match Cuda::new(0) {
            Ok(cuda) => (Some(cuda), None),
            Err(error) => (None, Some(error.to_string())),
        },
    };
    let device = match device {
        Some(cuda) => Device::Cuda(cuda),
        None => Device::Cpu(cpu(run.threads)?),
    };
    let precision = match (run.precision.as_str(), &device) {
        ("bf16", _) | ("auto", Device::Cuda(_)) => Precision::Bf16,
        _ => Precision::F32,
    };
    let described = match &device {
        Device::Cpu(cpu) => cpu.describe(),
        Device::Cuda(cuda) => cuda.describe(),
    };
    let mut about = vec![format!("device    {described}, {}", precision.name())];
    let system = System::here();
    if matches!(device, Device::Cpu(_))
        && run.threads == 0
        && let limit @ Source::ControlGroup(_) = &system.threads.source
    {
        about.push(format!("          ({} of {} processors, by {limit})", system.threads.most, system.processors));
    }
    if let Device::Cuda(cuda) = &device
        && let form @ KernelForm::Ptx(_) = cuda.kernel_form()?
    {
        about.push(format!("          (kernels as {form}; the first time on this machine that takes seconds)"));
    }
    if let Some(why) = &why {
        about.push(format!("          (the CPU, as no GPU can be used: {why})"));
    }
    let found = match &device {
        Device::Cuda(cuda) => Table::of(cuda),
        Device::Cpu(_) => Found::None,
    };
    Ok(Chosen { device, precision, about, table: None, about_table: None, no_gpu: why }.with_table(found))
}

/// A GPU that cannot be used, with what can.
fn with_the_way_out(error: selfie_kernels::Error) -> selfie_kernels::Error {
    use selfie_kernels::Error;
    match error {
        Error::Device { device, reason } => {
            Error::Device { device, reason: format!("{reason} (--device cpu goes without)") }
        }
        Error::Module { module, reason } => {
            Error::Module { module, reason: format!("{reason} (--device cpu goes without)") }
        }
        other => other,
    }
}

/// The CPU with so many threads; 0 takes what this process may use.
///
/// # Errors
/// Threads that the system refuses.
pub fn cpu(threads: usize) -> anyhow::Result<Cpu> {
    let threads = if threads == 0 { System::here().threads.most } else { threads };
    Ok(Cpu::new(threads)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wishes() {
        assert_eq!(Wish::parse("auto"), Some(Wish::Auto));
        assert_eq!(Wish::parse("cpu"), Some(Wish::Cpu));
        assert_eq!(Wish::parse("cuda"), Some(Wish::Cuda(0)));
        assert_eq!(Wish::parse("cuda:3"), Some(Wish::Cuda(3)));
        for wrong in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA"] {
            assert_eq!(Wish::parse(wrong), None, "{wrong}");
        }
    }
}

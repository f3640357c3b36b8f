//! `doctor`: what this machine has, what would be used, and why.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Instant;

use selfie_kernels::Cuda;
use selfie_kernels::cuda::{self, GpuFacts, KernelStart};
use serde_json::{Value, json};

use crate::args::Doctor;
use crate::choices::Table;
use crate::config::Run;
use crate::device::{self, Chosen, Device};
use crate::exit::Exit;
use crate::parity;
use crate::screen;
use crate::system::System;

/// What every writer to a `String` is.
const INFALLIBLE: &str = "writing to a string cannot fail";

/// Runs the command.
///
/// # Errors
/// The device that was asked for cannot be used; a parity that is not there.
pub fn run(arguments: &Doctor) -> anyhow::Result<Exit> {
    let system = System::here();
    let gpus = cuda::gpus();
    let Doctor { device, precision, threads, .. } = arguments.clone();
    let chosen = device::choose(&Run { out: PathBuf::new(), device, precision, threads });
    let kernels = match &chosen {
        Ok(Chosen { device: Device::Cuda(cuda), .. }) => Some(Kernels::load(cuda)?),
        _ => None,
    };
    let parity = match &chosen {
        Ok(chosen) if arguments.parity => Some(parity::measure(chosen)?),
        _ => None,
    };
    if arguments.json {
        let value = as_json(&system, &gpus, chosen.as_ref(), kernels.as_ref(), parity.as_ref());
        screen::print(&format!("{value:#}\n"))?;
    } else {
        screen::print(&in_words(&system, &gpus, chosen.as_ref(), kernels.as_ref(), parity.as_ref()))?;
    }
    chosen?;
    match parity {
        Some(parity) if !parity.holds() => Ok(Exit::Failed),
        _ => Ok(Exit::Done),
    }
}

/// All kernels of a GPU, loaded.
struct Kernels {
    /// Files, by how they got there.
    files: BTreeMap<String, Vec<&'static str>>,
    /// That it took.
    seconds: f64,
    start: KernelStart,
}

impl Kernels {
    fn load(cuda: &Cuda) -> selfie_kernels::Result<Self> {
        let began = Instant::now();
        let mut files = BTreeMap::<_, Vec<_>>::new();
        for (file, form) in cuda.load_kernels()? {
            files.entry(form.to_string()).or_default().push(file);
        }
        Ok(Self { files, seconds: began.elapsed().as_secs_f64(), start: cuda.kernel_start()? })
    }

    fn in_words(&self) -> String {
        let lines = self.files.iter().map(|(form, files)| match files[..] {
            [file] => format!("{file}, {form}"),
            _ => format!("{} files, {form}", files.len()),
        });
        let start = match self.start {
            KernelStart::Early => "each begins beside the end of the one before",
            KernelStart::InTurn => "each begins when the one before has ended",
        };
        format!(
            "kernels   {}, in {:.2} s\n          {start}\n",
            lines.collect::<Vec<_>>().join("\n          "),
            self.seconds
        )
    }

    fn as_json(&self) -> Value {
        json!({ "files": self.files, "seconds": self.seconds, "begin_early": self.start == KernelStart::Early })
    }
}

fn in_words(
    system: &System,
    gpus: &selfie_kernels::Result<Vec<GpuFacts>>,
    chosen: Result<&Chosen, &anyhow::Error>,
    kernels: Option<&Kernels>,
    parity: Option<&parity::Parity>,
) -> String {
    let mut text = String::new();
    writeln!(text, "selfie    {}", env!("CARGO_PKG_VERSION")).expect(INFALLIBLE);
    writeln!(text, "processor {}, {} processors, {}", system.cpu, system.processors, selfie_kernels::instruction_set())
        .expect(INFALLIBLE);
    writeln!(text, "threads   {} (by {})", system.threads.most, system.threads.source).expect(INFALLIBLE);
    match &system.memory {
        Some(memory) => writeln!(text, "memory    {:.1} GiB (by {})", gibibytes(memory.most), memory.source),
        None => writeln!(text, "memory    unknown: the system does not say"),
    }
    .expect(INFALLIBLE);
    match gpus {
        Err(error) => writeln!(text, "GPU       none that can be used: {error}").expect(INFALLIBLE),
        Ok(gpus) => {
            for (number, gpu) in gpus.iter().enumerate() {
                writeln!(
                    text,
                    "GPU {number}     {}, compute capability {}.{}, {} multiprocessors, {:.1} GiB",
                    gpu.name,
                    gpu.capability / 10,
                    gpu.capability % 10,
                    gpu.multiprocessors,
                    gibibytes(gpu.memory_bytes as u64)
                )
                .expect(INFALLIBLE);
            }
        }
    }
    if let Ok(probe) = cuda::probe() {
        let [major, minor] = [probe.driver / 1000, probe.driver % 1000 / 10];
        writeln!(text, "driver    CUDA {major}.{minor}, {}", probe.library).expect(INFALLIBLE);
    }
    match chosen {
        Ok(chosen) => {
            // Said once, where the GPUs are.
            let said = gpus.as_ref().err().map(ToString::to_string);
            let is_news = |note: &&String| said.as_ref().is_none_or(|said| !note.contains(said));
            for note in chosen.notes().filter(is_news) {
                writeln!(text, "{}", note.replacen("device   ", "uses     ", 1)).expect(INFALLIBLE);
            }
            if kernels.is_some() && chosen.table.is_none() {
                writeln!(text, "          (kernels by the rules: selfie bench --tune measures which are faster here)")
                    .expect(INFALLIBLE);
            }
        }
        Err(_) => writeln!(text, "uses      nothing: what was asked for cannot be used").expect(INFALLIBLE),
    }
    if let Some(kernels) = kernels {
        text += &kernels.in_words();
    }
    if let Some(parity) = parity {
        write!(text, "{parity}").expect(INFALLIBLE);
    }
    text
}

fn as_json(
    system: &System,
    gpus: &selfie_kernels::Result<Vec<GpuFacts>>,
    chosen: Result<&Chosen, &anyhow::Error>,
    kernels: Option<&Kernels>,
    parity: Option<&parity::Parity>,
) -> Value {
    let probe = cuda::probe();
    let no_gpu = chosen.ok().and_then(|chosen| chosen.no_gpu.clone());
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "cpu": system.cpu,
        "processors": system.processors,
        "instruction_set": selfie_kernels::instruction_set(),
        "threads": system.threads.most,
        "threads_by": system.threads.source.to_string(),
        "memory_bytes": system.memory.as_ref().map(|memory| memory.most),
        "memory_by": system.memory.as_ref().map(|memory| memory.source.to_string()),
        "cuda": {
            "library": probe.as_ref().ok().map(|probe| probe.library.clone()),
            "driver": probe.as_ref().ok().map(|probe| probe.driver),
            "problem": gpus.as_ref().err().map(ToString::to_string).or(no_gpu),
            "gpus": gpus.as_ref().map_or_else(|_| Vec::new(), |gpus| gpus.iter().map(gpu_as_json).collect()),
        },
        "uses": chosen.as_ref().ok().map(|chosen| {
            let [device, precision] = chosen.names();
            let notes: Vec<_> = chosen.notes().collect();
            json!({ "device": device, "precision": precision, "notes": notes, "table": chosen.table.as_ref().map(Table::about) })
        }),
        "kernels": kernels.map(Kernels::as_json),
        "problem": chosen.as_ref().err().map(|error| format!("{error:#}")),
        "parity": parity.map(parity::Parity::as_json),
    })
}

fn gpu_as_json(gpu: &GpuFacts) -> Value {
    json!({
        "name": gpu.name,
        "capability": gpu.capability,
        "multiprocessors": gpu.multiprocessors,
        "memory_bytes": gpu.memory_bytes,
    })
}

fn gibibytes(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

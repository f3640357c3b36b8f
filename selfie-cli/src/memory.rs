//! Whether there is the memory that a command will take, before it takes it: systems hand out memory that they don't
//! have, and end the process later, without a word.

use anyhow::Context;
use selfie_kernels::Memory;
use selfie_model::MemoryPlan;

use crate::exit::Problem;
use crate::progress::Reporter;
use crate::system::{Limit, Source, System, held_bytes};

/// Of the program itself, and of each thread that computes. Measured in control groups: trainings of `small`, batches of 32
/// to 256 on 2 threads, held at most 18 MiB more than what is planned and counted here.
const PROGRAM: u64 = 16 << 20;
const THREAD: u64 = 4 << 20;

/// What is held beside the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beside {
    /// Batches of images on their way to a training, and the copies that a save makes.
    Training {
        /// Threads that load.
        workers: usize,
        /// Batches of a step.
        accumulate: usize,
    },
    /// Batches of images on their way to an evaluation.
    Evaluation {
        /// Threads that load.
        workers: usize,
    },
    /// The images of a step, which are there already.
    Nothing,
}

/// What will be held: a network for `batch` images of `image_size` pixels a side, and what is beside it.
#[derive(Clone, Copy, Debug)]
pub struct Need<'a> {
    /// The network's buffers.
    pub plan: &'a MemoryPlan,
    /// Images that it is built for.
    pub batch: usize,
    /// Side of the images.
    pub image_size: usize,
    /// The rest.
    pub beside: Beside,
}

impl Need<'_> {
    /// Bytes beside the network, from the data that are held already to the buffers of loaders.
    fn beside_bytes(&self) -> u64 {
        let images = (self.batch as u64).saturating_mul((3 * self.image_size * self.image_size) as u64);
        let master = self.plan.rows().iter().find(|(name, _)| name == "parameters.master");
        let master = master.map_or(0, |&(_, bytes)| bytes as u64);
        let (batches, copies) = match self.beside {
            // Two finished and one in the making for each worker, those of the step, and an evaluation's own.
            Beside::Training { workers, accumulate } => (5 * workers + accumulate + 3, 4),
            Beside::Evaluation { workers } => (2 * workers + 3, 2),
            Beside::Nothing => (0, 0),
        };
        images.saturating_mul(batches as u64).saturating_add(master.saturating_mul(copies))
    }

    /// How to need less.
    fn advice(&self) -> String {
        let images = match self.beside {
            Beside::Training { .. } if self.batch > 1 => "lower --batch, or cut it by --accumulate",
            Beside::Evaluation { .. } if self.batch > 1 => "lower --batch",
            Beside::Training { .. } => "the batch cannot be smaller (--batch): take a smaller --preset or --image-size",
            Beside::Evaluation { .. } | Beside::Nothing => "take a machine with more memory",
        };
        images.into()
    }

    /// The batch that would be built, and the step that it is a part of.
    fn batch_in_words(&self) -> String {
        match self.beside {
            Beside::Training { accumulate, .. } if accumulate > 1 => {
                format!("{} (a step of {}, cut by --accumulate {accumulate})", self.batch, self.batch * accumulate)
            }
            _ => self.batch.to_string(),
        }
    }

    /// What is too much for a device with memory of its own, if it is.
    fn refusal_of_device(&self, capacity: u64) -> Option<String> {
        let network = self.plan.total_bytes() as u64;
        (network > capacity).then(|| {
            format!(
                "the network needs {} for a batch of {}, and the device has {} free: {}",
                size(network),
                self.batch_in_words(),
                size(capacity),
                self.advice()
            )
        })
    }

    /// What is too much for the machine, if it is: `held` bytes are held already, and `network` is what of the network lies
    /// in its memory.
    fn refusal(&self, network: u64, there: &Limit<u64>, held: u64) -> Option<String> {
        let beside = self.beside_bytes().saturating_add(held);
        if network.saturating_add(beside) <= there.most {
            return None;
        }
        let whose = match &there.source {
            Source::Machine => "the machine has".into(),
            source => format!("{source} allows"),
        };
        Some(format!(
            "the network needs {} for a batch of {}, with {} for images, saving and what is held already, and {whose} {}: {}",
            size(network),
            self.batch_in_words(),
            size(beside),
            size(there.most),
            self.advice()
        ))
    }
}

/// Says what memory the network takes, and refuses what the device, the machine or its control group cannot hold.
///
/// # Errors
/// Out of memory.
pub fn check(need: &Need<'_>, device: &impl Memory, reporter: &Reporter) -> anyhow::Result<()> {
    let plan = need.plan;
    let mut parts = plan.summary();
    parts.sort_by_key(|&(_, bytes)| std::cmp::Reverse(bytes));
    let mebibytes = |bytes: usize| bytes as f64 / (1 << 20) as f64;
    // The log has them all.
    tracing::info!("{plan}");
    parts.retain(|&(_, bytes)| 20 * bytes > plan.total_bytes());
    let parts: Vec<_> = parts.iter().map(|(name, bytes)| format!("{name} {:.1}", mebibytes(*bytes))).collect();
    reporter.say(format!("memory    {:.1} MiB: {}", mebibytes(plan.total_bytes()), parts.join(", ")));
    let System { threads, memory, .. } = System::here();
    let held = held_bytes().unwrap_or(0) + PROGRAM + THREAD * threads.most as u64;
    let here = |network: u64| memory.as_ref().and_then(|there| need.refusal(network, there, held));
    let refusal = match device.capacity() {
        Some(capacity) => need.refusal_of_device(capacity as u64).or_else(|| here(0)),
        None => here(plan.total_bytes() as u64),
    };
    match refusal {
        Some(text) => Err(Problem::OutOfMemory(text)).context("out of memory, before the first step"),
        None => Ok(()),
    }
}

/// Bytes for people.
fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000_000 => format!("{:.1} MiB", bytes as f64 / (1u64 << 20) as f64),
        _ => format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use selfie_kernels::Cpu;
    use selfie_model::{Build, Classifier, ModelConfig, Preset, Purpose};

    #[test]
    fn a_refusal_names_what_would_be_built_and_whose_limit_it_is() {
        let config = ModelConfig::preset(Preset::Tiny, 32);
        let build = Build { config: &config, batch: 20, purpose: Purpose::Accumulate, seed: 0 };
        let plan = Classifier::<Cpu, f32>::memory_plan(build, 4).expect("a sound network");
        let network = plan.total_bytes() as u64;
        let training = Beside::Training { workers: 1, accumulate: 4 };
        let need = |beside| Need { plan: &plan, batch: 20, image_size: 32, beside };
        let group = Source::ControlGroup("/sys/fs/cgroup/memory.max".into());
        let there = |most| Limit { most, source: group.clone() };

        // Images: (5 + 4 + 3) batches of 20 * 32 * 32 * 3 bytes; and copies of the parameters.
        let beside = need(training).beside_bytes();
        assert!((12 * 20 * 3072 + 1..network).contains(&beside), "{beside}");
        assert_eq!(need(training).refusal(network, &there(network + beside), 0), None);
        assert!(need(training).refusal(network, &there(network + beside), 1).is_some(), "what is held counts");
        let text = need(training).refusal(network, &there(network + beside - 1), 0).expect("a byte too much");
        for word in ["for a batch of 20 (a step of 80, cut by --accumulate 4)", "memory.max) allows", "lower --batch"] {
            assert!(text.contains(word), "no `{word}` in {text}");
        }
        let text = need(training).refusal_of_device(network - 1).expect("a byte too much");
        assert!(text.contains("cut by --accumulate 4") && text.contains("the device has"), "{text}");
        assert_eq!(need(training).refusal_of_device(network), None);
        let there = Limit { most: 1, source: Source::Machine };
        let text = need(Beside::Evaluation { workers: 1 }).refusal(network, &there, 0).expect("one byte");
        assert!(text.contains("for a batch of 20, with") && text.contains("the machine has"), "{text}");
        assert!(text.ends_with("lower --batch"), "evaluate has no --accumulate: {text}");
        let text = Need { batch: 1, ..need(training) }.refusal(network, &there, 0).expect("one byte");
        assert!(text.contains("--image-size"), "{text}");
    }
}

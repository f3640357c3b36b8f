//! Whole training steps of every backend against `Cpu<f64>`: loss, gradients, momenta, parameters, running statistics.
//!
//! In f32 a backend may be four times as far from f64 as the CPU's f32, tensor by tensor. In bf16 a ReLU that changes sides
//! decides over a small tensor, so what is compared is all gradients, all momenta and so on, at most 1.5 times as far as the
//! CPU's bf16. `follows_f64!` at the end has a line for each backend.
//!
//! The networks are such that rounding stays small: channels are moved away from the ReLU's edge ([`moved`]), logits are small
//! and the rate is so low that a step does not magnify the difference of the one before.

use crate::support::{cuda, download};
use half::bf16;
use selfie_kernels::{Backend, Cpu, Cuda, Element, Wide};
use selfie_model::{
    Begin, Build, Classifier, Head, Inputs, LogitScale, Mode, ModelConfig, NamedScale, Negatives, Network, Preset,
    Purpose, Query, Selfie, Stem, Table, Update,
};
use std::collections::BTreeMap;

/// Enough for a device to work plainly, to record, and to repeat what it recorded.
const STEPS: usize = 4;
const RATE: f64 = 0.001;
/// How much further from f64 than the CPU single numbers may be. There are four or five of each kind, so the CPU's may be near by
/// luck: if both were drawn from one normal distribution, four times would happen once in two hundred.
const NUMBERS: f64 = 4.0;
/// Relative error of a gradient's norm: sums in f32 of parts in a fixed order, and what is kept of it.
const NORM_ERROR: f64 = 1e-5;

/// A network and how it is trained.
struct Case {
    model: ModelConfig,
    /// Of a classifier; none in pretraining.
    classes: Option<usize>,
    batch: usize,
    parts: usize,
}

fn reduced(model: ModelConfig) -> ModelConfig {
    let logit_scale = LogitScale::Named(NamedScale::InverseSqrt);
    let narrow = ModelConfig { stem_width: 16, depths: [1, 2, 1, 1], heads: 4, ffn: 96, ..model };
    ModelConfig { pool_blocks: 2, dropout: 0.1, logit_scale, ..narrow }
}

fn against_the_batch(model: ModelConfig) -> ModelConfig {
    let logit_scale = LogitScale::Named(NamedScale::None);
    ModelConfig { negatives: Negatives::Batch, temperature: 0.5, logit_scale, ..model }
}

/// Both networks, both stems, both heads, both kinds of queries and of negatives, and micro-batches.
fn cases() -> BTreeMap<&'static str, Case> {
    let small = reduced(ModelConfig::preset(Preset::Resnet50, 32));
    let large = ModelConfig { stem: Stem::Large, image_size: 64, patch_size: Some(16), ..small.clone() };
    let places = ModelConfig { query: Query::Places, ..large.clone() };
    let pretrain = |model: ModelConfig| Case { model, classes: None, batch: 8, parts: 1 };
    let finetune = |model: ModelConfig| Case { model, classes: Some(5), batch: 8, parts: 1 };
    BTreeMap::from([
        ("classifier", finetune(small.clone())),
        ("classifier, large stem", finetune(large.clone())),
        ("classifier by attention", finetune(ModelConfig { head: Head::Attention, ..small.clone() })),
        ("classifier, micro-batches", Case { parts: 2, ..finetune(small.clone()) }),
        ("puzzle by summary", pretrain(ModelConfig { query: Query::Summary, ..small.clone() })),
        ("puzzle by places, large stem", pretrain(places.clone())),
        ("puzzle against the batch", pretrain(against_the_batch(small.clone()))),
        ("puzzle against the batch by places", pretrain(against_the_batch(places))),
        ("puzzle, micro-batches", Case { parts: 2, ..pretrain(small) }),
    ])
}

/// What training leaves, by kind (`gradient`, `loss`, ..) and name.
type Trace = BTreeMap<&'static str, BTreeMap<String, Vec<f64>>>;

/// Bytes that look random: the middle of splitmix64's words.
fn noise(seed: u64, n: usize) -> impl Iterator<Item = u8> {
    (1..=n as u64).map(move |i| {
        let z = (seed << 40).wrapping_add(i).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (z >> 32) as u8
    })
}

impl Case {
    fn trace<B: Backend<T>, T: Element>(&self, device: B) -> Trace {
        let purpose = if self.parts > 1 { Purpose::Accumulate } else { Purpose::Train };
        let build = Build { config: &self.model, batch: self.batch, purpose, seed: 3 };
        match self.classes {
            None => self.train(Selfie::<B, T>::new(device, build).expect("a sound configuration")),
            Some(classes) => {
                self.train(Classifier::<B, T>::new(device, build, classes).expect("a sound configuration"))
            }
        }
    }

    fn train<B: Backend<T>, T: Element, N: Network<B, T>>(&self, mut network: N) -> Trace {
        let update = Update { momentum: 0.9, weight_decay: 1e-3 };
        let mut trace = Trace::new();
        disturb(&mut network);
        for step in 0..STEPS {
            for part in 0..self.parts {
                let begin = if part == 0 { Begin::Step { rate: RATE } } else { Begin::Part };
                self.load(&mut network, (step * self.parts + part) as u64, begin);
                match self.parts {
                    1 => network.train_step(update),
                    parts => network.train_part(1.0 / parts as f64),
                }
                .expect("a working device");
            }
            if self.parts > 1 {
                network.update(update).expect("a working device");
            }
            let metrics = network.metrics().expect("a working device");
            assert!(metrics.finite, "step {step}: {metrics:?}");
            note(&mut trace, "loss", format!("of step {step}"), vec![metrics.loss]);
            note(&mut trace, "norm", format!("of step {step}"), vec![metrics.gradient_norm]);
            // With micro-batches the gradient that can be read is the last one's, not the sum.
            if self.parts == 1 {
                let gradient = self.gradient(&network).iter().map(|value| value.powi(2)).sum::<f64>().sqrt();
                let off = (metrics.gradient_norm / gradient - 1.0).abs();
                assert!(off <= NORM_ERROR, "step {step}: {metrics:?}, but the gradient's norm is {gradient}");
            }
            if step == 0 {
                self.read(&network, step, &mut trace);
                // In between, so that a recording is shown to be none the worse for it.
                self.load(&mut network, 99, Begin::Evaluation);
                network.forward(Mode::Evaluate).expect("a working device");
                let loss = network.loss().expect("a working device").loss;
                note(&mut trace, "loss", "of the evaluation".into(), vec![loss]);
            }
        }
        self.read(&network, STEPS - 1, &mut trace);
        trace
    }

    /// Batch `number`: images of coarse colours, crops, flips, and targets.
    fn load<B: Backend<T>, T: Element, N: Network<B, T>>(&self, network: &mut N, number: u64, begin: Begin) {
        let (n, side) = (self.batch, self.model.image_size);
        let colours: Vec<u8> = noise(number, n * 8 * 8 * 3).collect();
        let fine = noise(1000 + number, n * side * side * 3);
        let colour = |i: usize| {
            let (image, y, x, channel) = (i / (side * side * 3), i / (side * 3) % side, i / 3 % side, i % 3);
            colours[((image * 8 + 8 * y / side) * 8 + 8 * x / side) * 3 + channel]
        };
        let images: Vec<u8> = fine.enumerate().map(|(i, fine)| colour(i) / 2 + fine / 2).collect();
        let draws: Vec<i32> = (0..3 * n as i32).map(|i| if i % 3 == 2 { i % 2 } else { i % 7 - 3 }).collect();
        let targets: Vec<u32> = match self.classes {
            Some(classes) => (0..n as u32).map(|i| (i + number as u32) % classes as u32).collect(),
            None => {
                let patches = self.model.patches() as u32;
                (0..n as u32).flat_map(|b| (0..patches).map(move |i| (5 * i + 3 * b) % patches)).collect()
            }
        };
        let first_sample = number * n as u64;
        let inputs = Inputs { images: &images, draws: &draws, targets: &targets, first_sample, valid: n };
        network.load(&inputs, begin).expect("inputs fit");
    }

    fn gradient<B: Backend<T>, T: Element, N: Network<B, T>>(&self, network: &N) -> Vec<f64> {
        let gradient = download::<B, T::Wide>(network.device(), &network.parameters().gradient);
        gradient.into_iter().map(Wide::to_f64).collect()
    }

    fn read<B: Backend<T>, T: Element, N: Network<B, T>>(&self, network: &N, step: usize, trace: &mut Trace) {
        let device = &**network.device();
        let (parameters, statistics) = (network.parameters(), network.statistics());
        let mut tensors = |kind, table: &Table, flat: Vec<T::Wide>| {
            for entry in table.entries() {
                let values = flat[entry.range.clone()].iter().map(|&value| Wide::to_f64(value)).collect();
                note(trace, kind, format!("{} after step {step}", entry.name), values);
            }
        };
        tensors("gradient", &parameters.table, download::<B, _>(device, &parameters.gradient));
        tensors("momentum", &parameters.table, download::<B, _>(device, &parameters.velocity));
        tensors("parameter", &parameters.table, download::<B, _>(device, &parameters.master));
        tensors("statistic", &statistics.table, download::<B, _>(device, &statistics.running));
    }
}

fn note(trace: &mut Trace, kind: &'static str, name: String, values: Vec<f64>) {
    trace.entry(kind).or_default().insert(name, values);
}

/// By how many standard deviations a normalisation's channels are moved away from the ReLU behind it, in turns up and down. Both
/// of its sides still occur, but far fewer values are so near zero that rounding decides over their side, which changes a
/// gradient by more than a thousand roundings do. Later stages have fewer values, of which some shall be on the other side.
fn moved(name: &str) -> f64 {
    match name.split_once("norm") {
        Some((place, rest)) if rest.ends_with("bias") => match place.split('.').nth(1) {
            _ if place.is_empty() => 2.5,
            Some(stage) if place.starts_with("stages") => {
                [3.5, 3.3, 3.0, 2.5][stage.parse::<usize>().expect("a number")]
            }
            _ => 0.0,
        },
        _ => 0.0,
    }
}

/// Away from the initial zeros and ones, which hide mistakes: up to an eighth is added to vectors, in steps that every type
/// represents.
fn disturb<B: Backend<T>, T: Element, N: Network<B, T>>(network: &mut N) {
    let device = network.device().clone();
    let mut master = download::<B, _>(&*device, &network.parameters().master);
    for (i, entry) in network.parameters().table.entries().iter().enumerate() {
        let moved = moved(&entry.name);
        // As drawn in f64, rounded to f32 in every type.
        let values = master[entry.range.clone()].iter_mut().zip(noise(7 + i as u64, entry.len()));
        for (channel, (value, byte)) in values.enumerate() {
            let added = if entry.shape.len() == 1 { (f64::from(byte) - 128.0) / 1024.0 } else { 0.0 };
            let moved = if channel % 2 == 0 { moved } else { -moved };
            *value = T::Wide::from_f64(f64::from(Wide::to_f64(*value) as f32) + added + moved);
        }
    }
    device.upload(&master, B::all_mut(&mut network.parameters_mut().master)).expect("as many");
    network.refresh_copy().expect("a working device");
}

/// What is compared as one.
#[derive(Clone, Copy)]
enum Grain {
    Tensor,
    Kind,
}

/// How far a trace may be from the exact one, in distances of the CPU in the same type.
#[derive(Clone, Copy)]
struct Bound {
    grain: Grain,
    factor: f64,
    /// Half a unit in the last place of the type, relative.
    rounding: f64,
}

/// A type's bound.
trait Bounded: Element {
    const BOUND: Bound;
}

impl Bounded for f32 {
    const BOUND: Bound = Bound { grain: Grain::Tensor, factor: 4.0, rounding: f32::EPSILON as f64 / 2.0 };
}

impl Bounded for bf16 {
    const BOUND: Bound = Bound { grain: Grain::Kind, factor: 1.5, rounding: 1.0 / 512.0 };
}

/// Sum of squared differences, and of squares.
fn squares(values: &[f64], exact: &[f64]) -> [f64; 2] {
    assert_eq!(values.len(), exact.len());
    let differences = values.iter().zip(exact).map(|(a, b)| (a - b).powi(2)).sum();
    [differences, exact.iter().map(|b| b.powi(2)).sum()]
}

/// Distances relative to the norm, by what is compared as one.
fn distances(trace: &Trace, exact: &Trace, grain: Grain) -> BTreeMap<String, f64> {
    let mut sums: BTreeMap<String, [f64; 2]> = BTreeMap::new();
    for (kind, tensors) in exact {
        for (name, exact) in tensors {
            // A single number may be right by luck.
            let key = match grain {
                Grain::Tensor if exact.len() > 1 => format!("{kind} {name}"),
                Grain::Tensor | Grain::Kind => kind.to_string(),
            };
            let [differences, norm] = squares(&trace[kind][name], exact);
            let sums = sums.entry(key).or_default();
            *sums = [sums[0] + differences, sums[1] + norm];
        }
    }
    sums.into_iter().map(|(key, [differences, norm])| (key, (differences / norm).sqrt())).collect()
}

/// What is further from `exact` than `cpu`, times the factor. Even a perfect result is rounded to what it is kept in, f32, and
/// so off by up to half a unit in the last place of a tensor's norm.
///
/// Of single numbers the CPU's may be near by luck. So a loss may always be off by one rounding of what it is made of, and a
/// norm by as much as the whole gradient, which no norm is further off than.
fn violations(trace: &Trace, cpu: &Trace, exact: &Trace, bound: Bound) -> Vec<String> {
    let of_cpu = distances(cpu, exact, bound.grain);
    let gradient = distances(cpu, exact, Grain::Kind)["gradient"];
    let allowed = |key: &str| match key {
        "loss" => (NUMBERS * of_cpu[key]).max(bound.rounding),
        "norm" => (NUMBERS * of_cpu[key]).max(bound.factor * gradient),
        _ => bound.factor * of_cpu[key].max(f32::BOUND.rounding),
    };
    // A NaN is within no bound.
    let found = distances(trace, exact, bound.grain).into_iter();
    let violations = found.filter(|(key, distance)| distance.is_nan() || *distance > allowed(key));
    violations.map(|(key, distance)| format!("{key}: {distance:e}, the CPU {:e}", of_cpu[&key])).collect()
}

fn cpu() -> Cpu {
    Cpu::new(2).expect("threads")
}

/// One case on a backend of its own.
fn follows_f64<B: Backend<T>, T: Bounded>(name: &str, device: impl Fn() -> B) {
    let case = &cases()[name];
    let (exact, cpu) = (case.trace::<Cpu, f64>(cpu()), case.trace::<Cpu, T>(cpu()));
    let trace = case.trace::<B, T>(device());
    for (kind, distance) in distances(&trace, &exact, Grain::Kind) {
        println!(
            "{name} in {}: {kind}: {distance:.1e}, the CPU {:.1e}",
            T::NAME,
            distances(&cpu, &exact, Grain::Kind)[&kind]
        );
    }
    let found = violations(&trace, &cpu, &exact, T::BOUND);
    assert!(found.is_empty(), "{name} in {}:\n{}", T::NAME, found.join("\n"));
}

/// A backend that were four and a half times as far off in one tensor, or had a NaN there, would be seen.
#[test]
fn a_single_tensor_that_is_off_is_seen() {
    let case = &cases()["classifier"];
    let (exact, cpu) = (case.trace::<Cpu, f64>(cpu()), case.trace::<Cpu, f32>(cpu()));
    let name = "stages.1.blocks.1.conv2.weight after step 0";
    for kind in ["gradient", "momentum"] {
        for (factor, seen) in [(3.5, 0), (4.5, 1), (f64::NAN, 1)] {
            let mut other = cpu.clone();
            let values = other.get_mut(kind).and_then(|tensors| tensors.get_mut(name)).expect("the network's");
            for (value, exact) in values.iter_mut().zip(&exact[kind][name]) {
                *value = exact + factor * (*value - exact);
            }
            let found = violations(&other, &cpu, &exact, f32::BOUND);
            assert_eq!(found.len(), seen, "{kind} times {factor}: {found:?}");
        }
    }
}

/// A module of tests, one for each case, for each backend and type.
macro_rules! follows_f64 {
    ($($(#[$attribute:meta])* $backend_in_type:ident: $backend:ty, $element:ty, $device:expr;)*) => {
        $(mod $backend_in_type {
            use super::*;
            follows_f64!(@cases [$(#[$attribute])*] $backend, $element, $device;
                classifier "classifier",
                classifier_with_large_stem "classifier, large stem",
                classifier_by_attention "classifier by attention",
                classifier_by_micro_batches "classifier, micro-batches",
                puzzle_by_summary "puzzle by summary",
                puzzle_by_places_with_large_stem "puzzle by places, large stem",
                puzzle_against_the_batch "puzzle against the batch",
                puzzle_against_the_batch_by_places "puzzle against the batch by places",
                puzzle_by_micro_batches "puzzle, micro-batches",
            );
        })*
    };
    (@cases $attributes:tt $backend:ty, $element:ty, $device:expr; $($test:ident $name:literal,)*) => {
        $(follows_f64!(@test $attributes $backend, $element, $device, $test, $name);)*
    };
    (@test [$(#[$attribute:meta])*] $backend:ty, $element:ty, $device:expr, $test:ident, $name:literal) => {
        #[test]
        $(#[$attribute])*
        fn $test() {
            follows_f64::<$backend, $element>($name, $device);
        }
    };
}

follows_f64! {
    // Other threads than the CPU that is compared with.
    cpu_in_f32: Cpu, f32, || Cpu::new(1).expect("a thread");
    cpu_in_bf16: Cpu, bf16, || Cpu::new(1).expect("a thread");
    #[ignore = "takes a CUDA device, or the emulator"]
    cuda_in_f32: Cuda, f32, cuda;
    #[ignore = "takes a CUDA device, or the emulator"]
    cuda_in_bf16: Cuda, bf16, cuda;
}

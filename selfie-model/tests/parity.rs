//! One training step, and three, against PyTorch: see `fixtures/README.md`.

use crate::support::{cuda, download};
use half::bf16;
use selfie_kernels::{Backend, Cpu, Element, Len, Wide};
use selfie_model::{
    Begin, Build, Classifier, Classify, Entry, Head, LogitScale, Loss, ModelConfig, Negatives, Network, Preset,
    Purpose, Query, Selfie, Table, Update,
};
use serde_json::Value;
use std::cmp::Ordering::{Equal, Less};
use std::collections::BTreeMap;
use std::path::Path;

type Tensors = BTreeMap<String, Vec<f64>>;

/// What f64 must agree to, relative to a tensor's norm. Rounding of the inputs alone moves a tensor by up to 2e-12.
const F64_TOLERANCE: f64 = 1e-9;
/// How much further from f64 than PyTorch's f32 ours may be.
const F32_FACTOR: f64 = 4.0;

/// The distances of PyTorch's f32 lie in the program, as it runs on machines without the sources, too.
const F32: &str = include_str!("fixtures/f32.json");

fn fixture(name: &str) -> Value {
    if name == "f32" {
        return serde_json::from_str(F32).expect("a table of cases");
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(format!("{name}.json"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// `n` multiples of 2^-15 in [-1, 1): FNV-1a of the name seeds splitmix64, of which the top 16 bits are taken.
fn hashed(name: &str, n: usize) -> Vec<f64> {
    let seed = name
        .bytes()
        .fold(0xCBF2_9CE4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3));
    let value = |i: u64| {
        let z = seed.wrapping_add(i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (((z ^ (z >> 31)) >> 48) as f64 - 32768.0) / 32768.0
    };
    (1..=n as u64).map(value).collect()
}

/// The `config` of a fixture.
struct Case {
    pretrain: bool,
    model: ModelConfig,
    batch: usize,
    classes: usize,
    rate: f64,
    steps: usize,
    /// Name of the input that stands for input 0.
    first_input: u64,
}

impl Case {
    fn new(fixture: &Value) -> Self {
        let config = &fixture["config"];
        let number =
            |key: &str| config[key].as_u64().unwrap_or_else(|| panic!("config.{key}: {}", config[key])) as usize;
        let depths: [usize; 4] = serde_json::from_value(config["depths"].clone()).expect("four depths");
        let width = number("width");
        let model = ModelConfig {
            stem_width: width,
            depths,
            heads: width / 2,
            ffn: 10 * width,
            dropout: 0.0,
            encoder_positions: config["encoder_positions"].as_bool().expect("a switch"),
            query: serde_json::from_value::<Query>(config["query"].clone()).expect("a kind"),
            negatives: config.get("negatives").map_or(Negatives::Image, |negatives| {
                serde_json::from_value::<Negatives>(negatives.clone()).expect("a kind")
            }),
            temperature: config.get("temperature").map_or(1.0, |value| value.as_f64().expect("a number")),
            head: config
                .get("head")
                .map_or(Head::Conv, |head| serde_json::from_value::<Head>(head.clone()).expect("a kind")),
            logit_scale: LogitScale::Factor(config["logit_scale"].as_f64().expect("a number")),
            ..ModelConfig::preset(Preset::Resnet50, number("image_size"))
        };
        Self {
            pretrain: config["task"] == "pretrain",
            model,
            batch: number("batch"),
            classes: number("classes"),
            rate: config["lr"].as_f64().expect("a number"),
            steps: number("steps"),
            first_input: fixture["first_input"].as_u64().unwrap_or(0),
        }
    }

    fn build(&self) -> Build<'_> {
        Build { config: &self.model, batch: self.batch, purpose: Purpose::Train, seed: 0 }
    }

    fn input(&self, step: usize) -> u64 {
        if step == 0 { self.first_input } else { step as u64 }
    }

    /// The images of a step, `[b, h, w, 3]`.
    fn pixels<T: Element>(&self, step: usize) -> Vec<T> {
        let side = self.model.image_size;
        let channels_first = hashed(&format!("images/{}", self.input(step)), self.batch * 3 * side * side);
        let mut pixels = Vec::with_capacity(channels_first.len());
        for image in channels_first.chunks_exact(3 * side * side) {
            for i in 0..side * side {
                pixels.extend((0..3).map(|c| narrow::<T>(image[c * side * side + i])));
            }
        }
        pixels
    }

    /// The order of each image's patches, or the labels.
    fn targets(&self, step: usize) -> Vec<u32> {
        if !self.pretrain {
            return (0..self.batch as u32).map(|i| i % self.classes as u32).collect();
        }
        let n = self.model.patches();
        let keys = hashed(&format!("order/{}", self.input(step)), self.batch * n);
        let order = |keys: &[f64]| {
            let mut order: Vec<u32> = (0..n as u32).collect();
            order.sort_by(|&a, &b| keys[a as usize].total_cmp(&keys[b as usize]));
            order
        };
        keys.chunks_exact(n).flat_map(order).collect()
    }

    /// The yardstick's name of a tensor.
    fn name(&self, name: &str) -> String {
        let has_pool = self.pretrain || self.model.head == Head::Attention;
        if has_pool && !name.starts_with("pool.") && !name.starts_with("head.") {
            format!("backbone.{name}")
        } else {
            name.into()
        }
    }

    /// The yardstick's initial values of a parameter, in the order of the file.
    fn initial(&self, entry: &Entry) -> Vec<f64> {
        let name = self.name(&entry.name);
        let mut values = hashed(&name, entry.len());
        if entry.shape.len() >= 2 {
            let m = (entry.len() / entry.shape[0]) as f64;
            let scale = (-(m / 3.0).sqrt().log2().ceil()).exp2();
            values.iter_mut().for_each(|v| *v *= scale);
        } else if name.ends_with("weight") {
            values.iter_mut().for_each(|v| *v = 1.0 + *v / 4.0);
        } else {
            values.iter_mut().for_each(|v| *v /= 4.0);
        }
        values
    }
}

fn narrow<T: Element>(value: f64) -> T {
    T::narrow(T::Wide::from_f64(value))
}

/// What a run leaves.
struct Run {
    loss: Vec<Loss>,
    logits: Vec<Vec<f64>>,
    gradients: Tensors,
    parameters: Tensors,
    running: Tensors,
}

/// Both networks behind one face.
trait Subject<B: Backend<T>, T: Element>: Network<B, T> {
    fn put(&mut self, pixels: &[T], targets: &[u32]);
    fn logits(&self) -> Option<Vec<f64>>;
}

impl<B: Backend<T>, T: Element> Subject<B, T> for Selfie<B, T> {
    fn put(&mut self, pixels: &[T], targets: &[u32]) {
        Selfie::put_pixels(self, pixels, targets, 0).expect("inputs fit");
    }
    fn logits(&self) -> Option<Vec<f64>> {
        None
    }
}

impl<B: Backend<T>, T: Element> Subject<B, T> for Classifier<B, T> {
    fn put(&mut self, pixels: &[T], targets: &[u32]) {
        Classifier::put_pixels(self, pixels, targets, 0).expect("inputs fit");
    }
    fn logits(&self) -> Option<Vec<f64>> {
        let logits = Classify::logits(self);
        let mut host = vec![T::default(); logits.len()];
        self.device().download(logits, &mut host).expect("as many");
        Some(host.into_iter().map(|v| v.widen().to_f64()).collect())
    }
}

/// Threads as the machine has.
fn cpu() -> Cpu {
    Cpu::new(0).expect("threads")
}

/// The steps of a case in `T`.
fn run<B: Backend<T>, T: Element>(device: B, case: &Case, steps: usize) -> Run {
    if case.pretrain {
        steps_of(case, steps, Selfie::<B, T>::new(device, case.build()).expect("a sound configuration"))
    } else {
        steps_of(
            case,
            steps,
            Classifier::<B, T>::new(device, case.build(), case.classes).expect("a sound configuration"),
        )
    }
}

fn steps_of<B: Backend<T>, T: Element, N: Subject<B, T>>(case: &Case, steps: usize, mut network: N) -> Run {
    let (device, table) = (network.device().clone(), network.parameters().table.clone());
    let mut master = download::<B, T::Wide>(&device, &network.parameters().master);
    for entry in table.entries() {
        let values: Vec<T::Wide> = case.initial(entry).into_iter().map(T::Wide::from_f64).collect();
        master[entry.range.clone()].copy_from_slice(&entry.from_file(&values));
    }
    device.upload(&master, B::all_mut(&mut network.parameters_mut().master)).expect("as many");
    network.refresh_copy().expect("a working device");
    let mut run = Run {
        loss: Vec::new(),
        logits: Vec::new(),
        gradients: Tensors::new(),
        parameters: Tensors::new(),
        running: Tensors::new(),
    };
    for step in 0..steps {
        network.put(&case.pixels::<T>(step), &case.targets(step));
        network.begin(Begin::Step { rate: case.rate }).expect("inputs were put");
        network.train_step(Update { momentum: 0.9, weight_decay: 1e-4 }).expect("a working device");
        if step == 0 {
            run.gradients = tensors(case, &table, &download::<B, T::Wide>(&device, &network.parameters().gradient));
        }
        run.loss.push(network.loss().expect("a working device"));
        run.logits.extend(network.logits());
        assert!(network.metrics().expect("a working device").finite, "step {step} is not finite");
    }
    run.parameters = tensors(case, &table, &download::<B, T::Wide>(&device, &network.parameters().master));
    let statistics = network.statistics();
    run.running = tensors(case, &statistics.table, &download::<B, T::Wide>(&device, &statistics.running));
    run
}

/// A flat buffer as named tensors in the order of the file.
fn tensors<W: Wide>(case: &Case, table: &Table, flat: &[W]) -> Tensors {
    let tensor = |entry: &Entry| entry.to_file(&flat[entry.range.clone()]).into_iter().map(Wide::to_f64).collect();
    table.entries().iter().map(|entry| (case.name(&entry.name), tensor(entry))).collect()
}

/// The largest distance of a tensor to a fingerprint, relative to its norm.
fn distance_to_fingerprint(fixture: &Value, name: &str, tensor: &[f64], fingerprint: &Value) -> f64 {
    let expected: Vec<f64> = serde_json::from_value(fingerprint.clone()).expect("numbers");
    let count = |key: &str| fixture[key].as_u64().expect("a count") as usize;
    assert_eq!(expected[0], tensor.len() as f64, "{name}: elements");
    let norm = expected[1];
    let mut got = vec![tensor.len() as f64, tensor.iter().map(|v| v * v).sum::<f64>().sqrt()];
    for i in 0..count("projections") {
        let direction = hashed(&format!("{name}/projection{i}"), tensor.len());
        got.push(tensor.iter().zip(&direction).map(|(a, b)| a * b).sum());
    }
    got.extend((0..count("entries").min(tensor.len())).map(|j| tensor[j * 2_654_435_761 % tensor.len()]));
    assert_eq!(got.len(), expected.len(), "{name}: numbers in the fingerprint");
    got.iter().zip(&expected).map(|(a, b)| (a - b).abs() / norm).fold(0.0, nan_max)
}

fn nan_max(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

/// Compares tensors with fingerprints and returns the worst relative distance.
fn expect_tensors(fixture: &Value, what: &str, tensors: &Tensors) -> f64 {
    let expected = fixture[what].as_object().unwrap_or_else(|| panic!("{what}: a table of tensors"));
    let names: Vec<&String> = expected.keys().collect();
    assert_eq!(names.len(), tensors.len(), "{what}: {names:?} against {:?}", tensors.keys());
    let mut worst = 0.0;
    for (name, fingerprint) in expected {
        let tensor = tensors.get(name).unwrap_or_else(|| panic!("{what}: we have no {name}"));
        let distance = distance_to_fingerprint(fixture, name, tensor, fingerprint);
        assert!(distance <= F64_TOLERANCE, "{what} of {name}: off by {distance:e} of its norm");
        worst = nan_max(worst, distance);
    }
    worst
}

/// f64 against PyTorch's f64.
fn check_f64(name: &str) {
    let fixture = fixture(name);
    let case = Case::new(&fixture);
    let run = run::<Cpu, f64>(cpu(), &case, case.steps);
    for (step, loss) in run.loss.iter().enumerate() {
        let expected = fixture["loss"][step].as_f64().expect("a loss for each step");
        assert!(
            (loss.loss - expected).abs() <= F64_TOLERANCE * expected.abs(),
            "loss of step {step}: {} instead of {expected}",
            loss.loss
        );
        if case.pretrain {
            // PyTorch's accuracy is an f32 mean.
            let expected = fixture["accuracy"][step].as_f64().expect("an accuracy for each step");
            assert!(
                (loss.accuracy - expected).abs() <= 1e-7,
                "accuracy of step {step}: {} instead of {expected}",
                loss.accuracy
            );
        }
    }
    for (step, logits) in run.logits.iter().enumerate() {
        let distance = distance_to_fingerprint(&fixture, "logits", logits, &fixture["logits"][step]);
        assert!(distance <= F64_TOLERANCE, "logits of step {step}: off by {distance:e} of their norm");
    }
    let worst = ["gradients", "parameters", "running"].map(|what| {
        expect_tensors(
            &fixture,
            what,
            match what {
                "gradients" => &run.gradients,
                "parameters" => &run.parameters,
                _ => &run.running,
            },
        )
    });
    println!(
        "{name}: gradients within {:.1e}, parameters {:.1e}, running statistics {:.1e}",
        worst[0], worst[1], worst[2]
    );
}

macro_rules! f64_parity {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            check_f64(stringify!($name));
        })*
    };
}
f64_parity! {
    pretrain_32 pretrain_32_scaled pretrain_32_places pretrain_32_deep pretrain_32_full
    pretrain_32_batch pretrain_224_batch
    pretrain_224 pretrain_224_places pretrain_224_deep
    finetune_32_attention finetune_224_attention
    finetune_32 finetune_32_deep finetune_32_full finetune_224 finetune_224_deep
}

/// `||a - b|| / ||b||`.
fn relative_distance(a: &[f64], b: &[f64]) -> f64 {
    let square = |x: f64| x * x;
    (a.iter().zip(b).map(|(a, b)| square(a - b)).sum::<f64>() / b.iter().map(|&b| square(b)).sum::<f64>()).sqrt()
}

/// Our f32 is as close to our f64 as PyTorch's f32 to its f64, up to [`F32_FACTOR`], tensor by tensor.
fn f32_is_as_accurate_as_the_yardsticks<B: Backend<f32>>(device: impl Fn() -> B) {
    let mut failed = Vec::new();
    for (name, fixture) in fixture("f32").as_object().expect("a table of cases") {
        let case = Case::new(fixture);
        let (narrow, wide) = (run::<B, f32>(device(), &case, 1), run::<Cpu, f64>(cpu(), &case, 1));
        let loss = (narrow.loss[0].loss / wide.loss[0].loss - 1.0).abs();
        let mut worst = (0.0, String::new());
        let mut compare = |what: &str, distance: f64, yardstick: &Value| {
            let yardstick = yardstick.as_f64().unwrap_or_else(|| panic!("{name}: no distance of {what}"));
            // A NaN fails.
            if !matches!(distance.partial_cmp(&(F32_FACTOR * yardstick)), Some(Less | Equal)) {
                failed.push(format!("{name}: {what}: {distance:e}, the yardstick {yardstick:e}"));
            }
            if distance / yardstick > worst.0 {
                worst = (distance / yardstick, what.to_owned());
            }
        };
        compare("loss", loss, &fixture["loss"]);
        for (what, narrow, wide) in
            [("gradients", &narrow.gradients, &wide.gradients), ("running", &narrow.running, &wide.running)]
        {
            for (tensor, wide) in wide {
                compare(tensor, relative_distance(&narrow[tensor], wide), &fixture[what][tensor]);
            }
        }
        println!("{name}: at most {:.2} times the yardstick's distance ({})", worst.0, worst.1);
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// bf16 has 2^16 times the rounding of f32, so loss and statistics may be that much further from f64 than PyTorch's f32.
/// Some ReLUs change sides, so the gradient has no such bound; within 0.5 of its norm it points less than 30 degrees off.
fn bf16_is_as_accurate_as_its_digits<B: Backend<bf16>>(device: impl Fn() -> B) {
    let ratio = bf16::EPSILON.to_f64() / f64::from(f32::EPSILON);
    for (name, fixture) in fixture("f32").as_object().expect("a table of cases") {
        let case = Case::new(fixture);
        let (narrow, wide) = (run::<B, bf16>(device(), &case, 1), run::<Cpu, f64>(cpu(), &case, 1));
        let mut worst = 0.0;
        let mut compare = |what: &str, distance: f64, yardstick: &Value| {
            let bound = ratio * yardstick.as_f64().unwrap_or_else(|| panic!("{name}: no distance of {what}"));
            assert!(distance <= bound, "{name}: {what}: {distance:e}, expected at most {bound:e}");
            worst = nan_max(worst, distance / bound);
        };
        compare("loss", (narrow.loss[0].loss / wide.loss[0].loss - 1.0).abs(), &fixture["loss"]);
        for (tensor, wide) in &wide.running {
            compare(tensor, relative_distance(&narrow.running[tensor], wide), &fixture["running"][tensor]);
        }
        let whole = |run: &Run| run.gradients.values().flatten().copied().collect::<Vec<f64>>();
        let of_gradient = relative_distance(&whole(&narrow), &whole(&wide));
        assert!(of_gradient <= 0.5, "{name}: the gradient is off by {of_gradient} of its norm");
        println!("{name}: loss and statistics within {worst:.2} of the bound, gradient within {of_gradient:.2}");
    }
}

macro_rules! accuracy {
    ($($(#[$attribute:meta])* $backend:ident: $device:expr;)*) => {
        $(mod $backend {
            use super::*;
            #[test]
            $(#[$attribute])*
            fn f32_is_as_accurate_as_the_yardsticks() {
                super::f32_is_as_accurate_as_the_yardsticks($device);
            }
            #[test]
            $(#[$attribute])*
            fn bf16_is_as_accurate_as_its_digits() {
                super::bf16_is_as_accurate_as_its_digits($device);
            }
        })*
    };
}
accuracy! {
    on_cpu: cpu;
    #[ignore = "takes a CUDA device, or the emulator"]
    on_cuda: cuda;
}

#[test]
fn hashed_is_the_yardsticks() {
    for (name, expected) in fixture("hashed").as_object().expect("a table of streams") {
        let expected: Vec<f64> = serde_json::from_value(expected.clone()).expect("numbers");
        assert_eq!(hashed(name, expected.len()), expected, "{name}");
    }
}

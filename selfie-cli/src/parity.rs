//! One training step on the chosen device and on the CPU, compared layer by layer: is this device's arithmetic sound?

use std::fmt;

use selfie_kernels::{Backend, Cpu, Element, Philox, Purpose as Draw, Wide};
use selfie_model::{
    Begin, Build, Classifier, Inputs, ModelConfig, Network, Preset, Purpose, Selfie, Update, evaluation_order,
};
use serde_json::{Value, json};

use crate::device::{Chosen, Precision, Work, cpu};

const BATCH: usize = 8;
const CLASSES: usize = 5;
const SIDE: usize = 32;
/// A tensor in f32 may be so many times as far from f64 as the CPU's f32 is. In bf16 a ReLU that changes sides decides over a
/// small tensor, so all tensors together are compared, by the second factor.
const FACTORS: [f64; 2] = [4.0, 1.5];
/// What even a perfect f32 is off by.
const KEPT: f64 = f32::EPSILON as f64 / 2.0;

/// The comparison.
#[derive(Debug)]
pub struct Parity {
    /// Of each network: its name and its layers.
    networks: Vec<(&'static str, Vec<Layer>)>,
    precision: Precision,
}

/// How far the gradient of a layer's parameter is from the CPU's in f64, relative to its norm.
#[derive(Debug)]
struct Layer {
    name: String,
    device: f64,
    cpu: f64,
}

/// Name and values of each tensor.
type Gradients = Vec<(String, Vec<f64>)>;

/// Takes the steps.
///
/// # Errors
/// Those of the devices.
pub fn measure(chosen: &Chosen) -> anyhow::Result<Parity> {
    let reference = cpu(0)?;
    let networks = [Kind::Puzzle, Kind::Classifier].map(|kind| -> anyhow::Result<_> {
        let exact = gradients::<Cpu, f64>(reference.clone(), kind)?;
        let beside = match chosen.precision {
            Precision::F32 => gradients::<Cpu, f32>(reference.clone(), kind)?,
            Precision::Bf16 => gradients::<Cpu, half::bf16>(reference.clone(), kind)?,
        };
        let found = chosen.run(Step(kind))?;
        let layers = exact.iter().zip(&beside).zip(&found).map(|((exact, cpu), found)| Layer {
            name: exact.0.clone(),
            device: distance(&found.1, &exact.1),
            cpu: distance(&cpu.1, &exact.1),
        });
        Ok((kind.name(), layers.collect()))
    });
    Ok(Parity { networks: networks.into_iter().collect::<anyhow::Result<_>>()?, precision: chosen.precision })
}

/// Of two vectors, relative to the second's norm.
fn distance(values: &[f64], exact: &[f64]) -> f64 {
    let square = |x: f64| x * x;
    let norm: f64 = exact.iter().map(|&x| square(x)).sum();
    let apart: f64 = values.iter().zip(exact).map(|(a, b)| square(a - b)).sum();
    (apart / norm.max(f64::MIN_POSITIVE)).sqrt()
}

#[derive(Clone, Copy)]
enum Kind {
    Puzzle,
    Classifier,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Puzzle => "puzzle",
            Self::Classifier => "classifier",
        }
    }
}

struct Step(Kind);

impl Work for Step {
    type Output = Gradients;
    fn run<B: Backend<T>, T: Element>(self, device: B) -> anyhow::Result<Gradients> {
        gradients::<B, T>(device, self.0)
    }
}

fn gradients<B: Backend<T>, T: Element>(device: B, kind: Kind) -> anyhow::Result<Gradients> {
    let config = ModelConfig { dropout: 0.1, ..ModelConfig::preset(Preset::Tiny, SIDE) };
    let build = Build { config: &config, batch: BATCH, purpose: Purpose::Train, seed: 7 };
    match kind {
        Kind::Puzzle => {
            let mut orders = Vec::new();
            (0..BATCH as u64).for_each(|image| evaluation_order(image, config.patches(), &mut orders));
            step(Selfie::<B, T>::new(device, build)?, &orders)
        }
        Kind::Classifier => {
            let labels: Vec<u32> = (0..BATCH).map(|image| (image % CLASSES) as u32).collect();
            step(Classifier::<B, T>::new(device, build, CLASSES)?, &labels)
        }
    }
}

/// Loss and gradients of a step on random images.
fn step<B: Backend<T>, T: Element, N: Network<B, T>>(mut network: N, targets: &[u32]) -> anyhow::Result<Gradients> {
    let images = random_bytes(BATCH * SIDE * SIDE * 3);
    let inputs = Inputs { images: &images, draws: &[0; 3 * BATCH], targets, first_sample: 0, valid: BATCH };
    network.load(&inputs, Begin::Step { rate: 0.01 })?;
    network.train_step(Update { momentum: 0.9, weight_decay: 1e-4 })?;
    let metrics = network.metrics()?;
    let parameters = network.parameters();
    let mut flat = vec![T::Wide::from_f64(0.0); B::len(&parameters.gradient)];
    network.device().download(B::all(&parameters.gradient), &mut flat)?;
    let tensors = parameters
        .table
        .entries()
        .iter()
        .map(|entry| (entry.name.clone(), flat[entry.range.clone()].iter().map(|&x| Wide::to_f64(x)).collect()));
    Ok(std::iter::once(("loss".to_owned(), vec![metrics.loss])).chain(tensors).collect())
}

fn random_bytes(len: usize) -> Vec<u8> {
    let philox = Philox { seed: 11 };
    (0..len as u64).map(|i| philox.words(Draw::Synthetic as u32, i, 0)[0] as u8).collect()
}

impl Layer {
    fn holds(&self) -> bool {
        self.device <= FACTORS[0] * self.cpu.max(KEPT)
    }
}

impl Parity {
    /// Whether the device is as near to f64 as it must be.
    pub fn holds(&self) -> bool {
        self.networks.iter().all(|(_, layers)| match self.precision {
            Precision::F32 => layers.iter().all(Layer::holds),
            Precision::Bf16 => {
                let sum = |of: fn(&Layer) -> f64| layers.iter().map(of).map(|x| x * x).sum::<f64>().sqrt();
                sum(|layer| layer.device) <= FACTORS[1] * sum(|layer| layer.cpu)
            }
        })
    }

    /// For machines.
    pub fn as_json(&self) -> Value {
        let layers = |layers: &[Layer]| -> Vec<Value> {
            let value = |layer: &Layer| json!({ "name": layer.name, "device": layer.device, "cpu": layer.cpu });
            layers.iter().map(value).collect()
        };
        let networks = self.networks.iter().map(|(name, all)| ((*name).to_owned(), Value::from(layers(all))));
        json!({ "holds": self.holds(), "networks": networks.collect::<serde_json::Map<_, _>>() })
    }
}

/// A line for each layer: how far the gradient is from f64 on the device, and on the CPU in the same type.
impl fmt::Display for Parity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (network, layers) in &self.networks {
            writeln!(f, "\nA step of the {network}: distance of each gradient from the CPU's in f64")?;
            writeln!(f, "{:<44} {:>10} {:>10}", "", "device", "CPU")?;
            for layer in layers {
                let mark = match self.precision {
                    Precision::F32 if !layer.holds() => "  too far",
                    _ => "",
                };
                writeln!(f, "{:<44} {:>10.1e} {:>10.1e}{mark}", layer.name, layer.device, layer.cpu)?;
            }
        }
        let verdict =
            if self.holds() { "as near to f64 as the CPU is" } else { "too far from f64: do not train on it" };
        writeln!(f, "\nparity    the device is {verdict}")
    }
}

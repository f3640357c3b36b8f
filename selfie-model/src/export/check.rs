//! What was written, read again, against the network itself.

use super::{Export, Format};
use crate::config::ModelConfig;
use crate::encoder::Encoder;
use crate::error::{Error, Result};
use crate::network::{Build, Purpose};
use crate::onnx;
use selfie_kernels::{Cpu, Philox, Purpose as Random};
use std::path::Path;

/// Random images that both are given.
const IMAGES: usize = 2;

/// The largest relative distance of two computations in `f64`: that of the tests against PyTorch.
const ALLOWED: f64 = 1e-9;

/// How far what was written is from the network.
#[derive(Debug, Clone, PartialEq)]
pub struct Agreement {
    /// Tensors that are the same, bit for bit.
    pub tensors: usize,
    /// Random images that both computed.
    pub images: usize,
    /// Euclidean distance of the features and scores over their length, the larger of the two.
    pub distance: f64,
}

/// `[n, width]` and `[n, classes]` of what a network makes of images.
pub(crate) struct Outputs {
    pub(crate) embedding: Vec<f64>,
    pub(crate) logits: Vec<f64>,
}

impl Export {
    /// Reads again what [`Export::write`] has written, and compares it: every tensor bit for bit, what is said of images and
    /// classes, and in `f64` what it makes of two random images. For timm's folder and safetensors the network computes that
    /// as `selfie` reads it back; for ONNX the file's graph is computed, node by node, from the definitions of ONNX, on
    /// pixels that are normalised as its metadata say.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a difference; those of reading.
    pub fn check(&self, format: Format, path: &Path, threads: usize) -> Result<Agreement> {
        let differs = |what: &str, found: String| {
            let expected = format!("the same {what} as {}", self.source.display());
            Error::malformed(path, expected, found, "the disk may be damaged: export it again, to another place")
        };
        let images = self.images();
        let expected = self.outputs(self.model(), &images, threads)?;
        let found = match format {
            Format::Timm | Format::Safetensors => {
                let again = Export::read(path)?;
                let same = |one: &[f32], other: &[f32]| {
                    one.len() == other.len() && one.iter().zip(other).all(|(a, b)| a.to_bits() == b.to_bits())
                };
                if !same(&self.master, &again.master) || !same(&self.running, &again.running) {
                    return Err(differs("tensors", "others".into()));
                }
                let (ours, theirs) = (&self.description, &again.description);
                let about = |d: &super::Description| (d.model.clone(), d.layers, d.classes.clone(), d.resize.clone());
                if about(ours) != about(theirs) {
                    return Err(differs("description", format!("{theirs:?}")));
                }
                again.outputs(again.model(), &images, threads)?
            }
            Format::Onnx => {
                let file = onnx::OnnxFile::read(path)?;
                file.compare(self).map_err(|found| differs("network", found))?;
                file.run(&images, IMAGES, threads)?
            }
        };
        let pairs = [(&found.embedding, &expected.embedding), (&found.logits, &expected.logits)];
        let distance =
            pairs.map(|(found, expected)| relative_distance(found, expected)).into_iter().fold(0.0, f64::max);
        if distance.is_nan() || distance > ALLOWED {
            return Err(differs("outputs", format!("ones at a relative distance of {distance:.1e}")));
        }
        let tensors = self.flats().iter().map(|(table, _)| table.entries().len()).sum();
        Ok(Agreement { tensors, images: IMAGES, distance })
    }

    /// `[n, side, side, 3]` random bytes, the same for every call.
    fn images(&self) -> Vec<u8> {
        let side = self.model().image_size;
        let words = (0..).flat_map(|i| Philox { seed: 0 }.words(Random::Synthetic as u32, i, 0));
        words.flat_map(u32::to_le_bytes).take(IMAGES * side * side * 3).collect()
    }

    /// What the network makes of bytes, in `f64`.
    fn outputs(&self, model: &ModelConfig, images: &[u8], threads: usize) -> Result<Outputs> {
        // ONNX keeps it in f32.
        let model = ModelConfig { bn_eps: f64::from(model.bn_eps as f32), ..model.clone() };
        let build = Build { config: &model, batch: IMAGES, purpose: Purpose::Evaluate, seed: 0 };
        let layers = self.description.layers;
        let mut encoder = Encoder::<Cpu, f64>::new(Cpu::new(threads)?, build, layers, layers.last())?;
        let [master, running] = self.flats().map(|(_, flat)| flat.iter().copied().map(f64::from).collect::<Vec<_>>());
        encoder.give(&master, &running)?;
        let pixels: Vec<f64> = normalised(images, model.mean, model.std).collect();
        let (embedding, logits) = encoder.of_pixels(&pixels)?;
        Ok(Outputs { embedding, logits })
    }
}

/// Bytes of red, green and blue in turn as the network takes them.
pub(crate) fn normalised(bytes: &[u8], mean: [f64; 3], std: [f64; 3]) -> impl Iterator<Item = f64> {
    bytes.iter().enumerate().map(move |(i, &byte)| (f64::from(byte) / 255.0 - mean[i % 3]) / std[i % 3])
}

/// `|found - expected| / |expected|`; not finite where the lengths or a number are not sound.
fn relative_distance(found: &[f64], expected: &[f64]) -> f64 {
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    let length = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = length(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    if difference == 0.0 { 0.0 } else { difference / length(&mut expected.iter().copied()) }
}

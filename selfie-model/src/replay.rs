//! A step whose update was refused, in a file of its own: its batch and the parameters that it met, so that it can be
//! taken again, elsewhere and in another precision.
//!
//! A safetensors file: `batch.images`, `batch.draws`, `batch.targets`, `batch.indices`, the parameters (the master copy)
//! and running statistics under their names, and everything else as JSON in the metadata.

use crate::ModelConfig;
use crate::durable::write_file;
use crate::error::{Error, Result, reading};
use crate::network::{Begin, Build, Inputs, Loss, Metrics, Network, Purpose, Update};
use crate::tensor_file::{Item, TensorFile, serialize_items, stored};
use crate::transfer::download;
use crate::weights::restore;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use selfie_kernels::{Backend, Element, Wide};
use serde::{Deserialize, Serialize};
use std::path::Path;

const FORMAT: &str = "selfie step 1";
const BATCH: &str = "batch.";
const ADVICE: &str = "give a not-finite-*.safetensors file that a run has written";

/// What a step's file says beside its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// The step, counted from 1.
    pub step: u64,
    /// Of the run: keys the dropout.
    pub seed: u64,
    /// Mean loss of the step's last micro-batch, as text: it may be no number.
    pub loss: String,
    /// Global number of the first sample of each micro-batch.
    pub first_samples: Vec<u64>,
    /// Names of the images, in order.
    pub keys: Vec<String>,
    /// The network.
    pub model: ModelConfig,
    /// Classes of a classifier; none in pretraining.
    pub classes: Option<usize>,
}

/// Images and targets of a step, its micro-batches one after the other.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepBatch {
    /// `[n, h, w, 3]`.
    pub images: Vec<u8>,
    /// `[n, 3]`: crop row, crop column, flip.
    pub draws: Vec<i32>,
    /// `[n, targets]`.
    pub targets: Vec<u32>,
    /// `[n]`: indices in the dataset.
    pub indices: Vec<u64>,
}

/// A step's file, read.
#[derive(Debug)]
pub struct Replay<W> {
    /// What it is of.
    pub about: About,
    batch: StepBatch,
    tensors: TensorFile<W>,
}

/// What a step did when it was taken again.
#[derive(Debug, Clone, PartialEq)]
pub struct Replayed {
    /// Mean loss and accuracy.
    pub loss: Loss,
    /// Norm of the whole gradient.
    pub gradient_norm: f64,
    /// Whether loss and gradient were finite.
    pub finite: bool,
    /// The tensors, in the network's order.
    pub tensors: Vec<TensorReport>,
}

/// A parameter in a step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorReport {
    /// Its name.
    pub name: String,
    /// Its elements.
    pub elements: usize,
    /// Its elements that are not finite.
    pub not_finite: usize,
    /// The greatest magnitude among the others.
    pub largest: f64,
    /// Elements of its gradient that are not finite.
    pub gradient_not_finite: usize,
    /// Norm of the others.
    pub gradient_norm: f64,
}

/// Writes a step's file.
///
/// # Errors
/// [`Error::Write`]; those of the device.
pub(crate) fn write<B, T, N>(network: &N, about: &About, batch: &StepBatch, path: &Path) -> Result<()>
where
    B: Backend<T>,
    T: Element,
    N: Network<B, T>,
{
    let (device, sizes) = (&**network.device(), network.sizes());
    let master = download(device, &network.parameters().master)?;
    let running = download(device, &network.statistics().running)?;
    let n = batch.indices.len();
    let [h, w] = sizes.image;
    let tensors = [
        ("images", Dtype::U8, vec![n, h, w, 3], &batch.images[..]),
        ("draws", Dtype::I32, vec![n, 3], bytemuck::cast_slice(&batch.draws)),
        ("targets", Dtype::U32, vec![n, sizes.targets], bytemuck::cast_slice(&batch.targets)),
        ("indices", Dtype::U64, vec![n], bytemuck::cast_slice(&batch.indices)),
    ];
    let views = tensors.map(|(name, dtype, shape, bytes)| {
        let view = TensorView::new(dtype, shape, bytes).expect("every image has as many elements as the shape says");
        (format!("{BATCH}{name}"), Item::View(view))
    });
    let parameters = stored(&network.parameters().table, &master);
    let statistics = stored(&network.statistics().table, &running);
    let items = views.into_iter().chain(parameters.chain(statistics).map(|(name, item)| (name.to_string(), item)));
    let about = serde_json::to_string(about).expect("plain structures with string keys");
    write_file(path, &serialize_items(items, [("selfie", FORMAT.to_string()), ("about", about)]))
}

impl<W: Wide> Replay<W> {
    /// Reads a step's file.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::Malformed`] for anything but such a file.
    pub fn read(path: &Path) -> Result<Self> {
        Self::parse(path, &std::fs::read(path).map_err(reading(path))?)
    }

    /// The same from the contents of `path`.
    pub(crate) fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let malformed = |expected: &str, found: String| Error::malformed(path, expected, found, ADVICE);
        let none = |error: &dyn std::fmt::Display| malformed("the file of a step", format!("none ({error})"));
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| none(&error))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        if metadata.get("selfie").map(String::as_str) != Some(FORMAT) {
            return Err(malformed("the file of a step", "a safetensors file of something else".into()));
        }
        let about = metadata.get("about").map_or("", String::as_str);
        let about: About = serde_json::from_str(about).map_err(|error| none(&error))?;
        let file = SafeTensors::deserialize(bytes).map_err(|error| none(&error))?;
        let tensor = |name: &str, dtype: Dtype| {
            let view = file.tensor(&format!("{BATCH}{name}")).map_err(|error| none(&error))?;
            let found = format!("{:?} of shape {:?}", view.dtype(), view.shape());
            (view.dtype() == dtype)
                .then(|| view.data())
                .ok_or_else(|| malformed(&format!("{dtype:?} in {BATCH}{name}"), found))
        };
        let batch = StepBatch {
            images: tensor("images", Dtype::U8)?.to_vec(),
            draws: bytemuck::pod_collect_to_vec(tensor("draws", Dtype::I32)?),
            targets: bytemuck::pod_collect_to_vec(tensor("targets", Dtype::U32)?),
            indices: bytemuck::pod_collect_to_vec(tensor("indices", Dtype::U64)?),
        };
        let tensors = TensorFile::from_safetensors(path, &file, |name| !name.starts_with(BATCH));
        about.model.check()?;
        let replay = Self { about, batch, tensors };
        replay.check(path)?;
        Ok(replay)
    }

    /// Every part of the batch is of the same images.
    fn check(&self, path: &Path) -> Result<()> {
        let Self { about, batch, .. } = self;
        let (n, parts) = (batch.indices.len(), about.first_samples.len());
        let targets = match about.classes {
            None => about.model.patches(),
            Some(_) => 1,
        };
        let lens = [batch.images.len(), batch.draws.len(), batch.targets.len(), about.keys.len()];
        let pixels = about.model.image_size.saturating_mul(about.model.image_size).saturating_mul(3);
        let expected = [n.saturating_mul(pixels), n.saturating_mul(3), n.saturating_mul(targets), n];
        if lens != expected || n == 0 || parts == 0 || !n.is_multiple_of(parts) {
            let expected = format!("{expected:?} pixels, draws, targets and names of {n} images in {parts} parts");
            return Err(Error::malformed(path, expected, format!("{lens:?}"), ADVICE));
        }
        let malformed = |expected: String, found: u64| Err(Error::malformed(path, expected, found.to_string(), ADVICE));
        let below = about.classes.unwrap_or(targets);
        if let Some(&target) = batch.targets.iter().find(|&&target| target as usize >= below) {
            return malformed(format!("targets below {below}"), target.into());
        }
        let side = about.model.image_size;
        let far = |draw: &&i32| draw.unsigned_abs() as usize > side;
        match batch.draws.iter().find(far) {
            Some(&draw) => malformed(format!("crops within {side} pixels"), draw.unsigned_abs().into()),
            None => Ok(()),
        }
    }

    /// Images of a micro-batch.
    pub fn micro_batch(&self) -> usize {
        self.batch.indices.len() / self.about.first_samples.len()
    }

    /// How to build the network that takes the step again.
    pub fn build(&self) -> Build<'_> {
        let purpose = if self.about.first_samples.len() > 1 { Purpose::Accumulate } else { Purpose::Train };
        Build { config: &self.about.model, batch: self.micro_batch(), purpose, seed: self.about.seed }
    }

    /// Takes the step again. The network, built as [`Replay::build`] says, is given the file's
    /// parameters and keeps them: nothing is updated.
    ///
    /// # Errors
    /// [`Error::OtherNetwork`] for another network; targets or crops that are none; those of the device.
    pub fn run<B, T, N>(&self, network: &mut N) -> Result<Replayed>
    where
        B: Backend<T>,
        T: Element<Wide = W>,
        N: Network<B, T>,
    {
        restore(network, &self.tensors, None)?;
        let (sizes, parts) = (network.sizes(), self.about.first_samples.len());
        let n = sizes.batch;
        let pixels = sizes.image[0] * sizes.image[1] * 3;
        let share = 1.0 / parts as f64;
        // A rate of zero: norm and flag are computed as in training, parameters stay.
        let (begin, update) = (Begin::Step { rate: 0.0 }, Update { momentum: 0.0, weight_decay: 0.0 });
        let mut gradient = vec![0.0; network.parameters().table.len()];
        for (part, &first_sample) in self.about.first_samples.iter().enumerate() {
            let inputs = Inputs {
                images: &self.batch.images[part * n * pixels..][..n * pixels],
                draws: &self.batch.draws[part * n * 3..][..n * 3],
                targets: &self.batch.targets[part * n * sizes.targets..][..n * sizes.targets],
                first_sample,
                valid: n,
            };
            network.load(&inputs, if part == 0 { begin } else { Begin::Part })?;
            match parts {
                1 => network.train_step(update)?,
                _ => network.train_part(share)?,
            }
            let of_part = download(&**network.device(), &network.parameters().gradient)?;
            gradient.iter_mut().zip(of_part).for_each(|(sum, part)| *sum += part.to_f64() * share);
        }
        if parts > 1 {
            network.update(update)?;
        }
        let Metrics { loss, accuracy, gradient_norm, finite } = network.metrics()?;
        let master = download(&**network.device(), &network.parameters().master)?;
        let tensors = network.parameters().table.entries().iter().map(|entry| {
            let values = || master[entry.range.clone()].iter().map(|&value| value.to_f64());
            let slopes = || gradient[entry.range.clone()].iter().copied();
            TensorReport {
                name: entry.name.clone(),
                elements: entry.len(),
                not_finite: values().filter(|value| !value.is_finite()).count(),
                largest: values().filter(|value| value.is_finite()).fold(0.0, |most, value| most.max(value.abs())),
                gradient_not_finite: slopes().filter(|slope| !slope.is_finite()).count(),
                gradient_norm: slopes()
                    .filter(|slope| slope.is_finite())
                    .map(|slope| slope * slope)
                    .sum::<f64>()
                    .sqrt(),
            }
        });
        Ok(Replayed { loss: Loss { loss, accuracy }, gradient_norm, finite, tensors: tensors.collect() })
    }
}

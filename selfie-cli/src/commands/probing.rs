//! The k-NN probe of a pretraining while it runs: `selfie probe knn` on the network as it is, which it leaves so.

use anyhow::Context;
use selfie_kernels::{Backend, Element, Memory};
use selfie_model::probe::{self, DEFAULT_NEIGHBOURS, DEFAULT_TEMPERATURE, Knn};
use selfie_model::{Build, Encoder, EncoderLayers, Head, Images, MemoryPlan, Network, Purpose};

use super::begin::Beginning;
use super::probe::Features;
use crate::config::Data;
use crate::data;
use crate::exit::Problem;
use crate::progress::Reporter;

/// Those of the patch network, which takes whole images as it takes patches.
const LAYERS: EncoderLayers = EncoderLayers { stages: 3, head: Head::Conv, classes: 0 };

/// The labelled images of a probe.
pub struct Probing {
    train: Images,
    test: Images,
    classes: usize,
    threads: usize,
    /// Images of a batch.
    batch: usize,
}

impl Probing {
    /// Opens what was asked for; none where nothing was.
    ///
    /// # Errors
    /// Those of the data: also that they have no labels, or no test part.
    pub fn open(begin: &Beginning) -> anyhow::Result<Option<Self>> {
        let (train, data) = (&begin.settings.train, &begin.settings.data);
        if train.probe_every == 0 {
            return match train.probe_data.as_os_str().is_empty() {
                true => Ok(None),
                false => Err(Problem::usage(
                    "--probe-data is given, and no --probe-every: give the steps between two probes",
                )),
            };
        }
        let path = if train.probe_data.as_os_str().is_empty() { &data.path } else { &train.probe_data };
        let data = Data { path: path.clone(), limit: train.probe_images, ..data.clone() };
        let opened = data::for_probe(&data, "all", 0.0);
        let (parts, test) = opened.context("--probe-every needs labelled images: give them by --probe-data")?;
        let (classes, images) = (parts.train.dataset.classes().len(), parts.train.items.len().max(test.items.len()));
        let batch = begin.training.micro_batch().min(images);
        Ok(Some(Self { train: parts.train, test, classes, threads: begin.settings.run.threads, batch }))
    }

    /// What will be done, in a line.
    pub fn describe(&self) -> String {
        format!(
            "probe     {} images of {}, by their nearest among {}; guessing finds {:.1}%",
            self.test.items.len(),
            self.test.dataset.describe(),
            self.train.items.len(),
            100.0 / self.classes as f64
        )
    }

    fn build<'a>(&self, build: Build<'a>) -> Build<'a> {
        Build { batch: self.batch, purpose: Purpose::Evaluate, ..build }
    }

    /// Buffers of the encoder beside the network that is built so.
    ///
    /// # Errors
    /// Impossible configurations.
    pub fn memory_plan<B: Memory, T: Element>(&self, build: Build<'_>) -> anyhow::Result<MemoryPlan> {
        Ok(Encoder::<B, T>::memory_plan(self.build(build), LAYERS)?)
    }

    /// The encoder beside a network.
    ///
    /// # Errors
    /// Out of memory.
    pub fn encoder<B: Backend<T>, T: Element>(
        &self,
        network: &impl Network<B, T>,
        build: Build<'_>,
    ) -> anyhow::Result<Encoder<B, T>> {
        Ok(Encoder::new(network.device().clone(), self.build(build), LAYERS)?)
    }

    /// The share of test images that their neighbours, by the features of `network`, classify right; none where features are
    /// not finite, as training can mend what ails the network, and notices itself if it does not.
    ///
    /// # Errors
    /// Too many bad images; those of the device.
    pub fn accuracy<B: Backend<T>, T: Element>(
        &self,
        encoder: &mut Encoder<B, T>,
        network: &impl Network<B, T>,
        reporter: &Reporter,
    ) -> anyhow::Result<Option<f64>> {
        encoder.take(network)?;
        let mut encode = |images: &Images| {
            let mut features = Features::default();
            for file in encoder.encode(images, |image| features.add(images, image))? {
                reporter.warn(format!("the probe skipped {}: {}", file.key, file.reason));
            }
            anyhow::Ok(features)
        };
        let (train, test) = (encode(&self.train)?, encode(&self.test)?);
        if [&train, &test].iter().any(|part| part.features.iter().any(|value| !value.is_finite())) {
            return Ok(None);
        }
        let k = DEFAULT_NEIGHBOURS.min(train.labels.len());
        let knn = Knn { k, temperature: DEFAULT_TEMPERATURE, classes: self.classes };
        let predicted = knn.predict(train.labelled(), &test.features, self.threads)?;
        Ok(Some(probe::accuracy(&predicted, &test.labels).0))
    }
}

//! The k-NN probe of a pretraining while it runs: `selfie probe knn` on the network as it is, which it leaves so.

use anyhow::Context;
use selfie_kernels::{Backend, Element, Memory};
use selfie_model::probe::{self, DEFAULT_NEIGHBOURS, DEFAULT_TEMPERATURE, Knn, Similarity};
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
        Ok(Encoder::<B, T>::memory_plan(self.build(build), LAYERS, LAYERS.last())?)
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
        Ok(Encoder::new(network.device().clone(), self.build(build), LAYERS, LAYERS.last())?)
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
        let (temperature, similarity) = (DEFAULT_TEMPERATURE, Similarity::Whitened);
        let knn = Knn { k, temperature, classes: self.classes, similarity };
        let predicted = knn.predict(train.labelled(), &test.features, self.threads)?;
        Ok(Some(probe::accuracy(&predicted, &test.labels).0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use selfie_data::{Need, Split};
    use selfie_kernels::Cpu;
    use selfie_model::{ModelConfig, PhiloxDraws, Preset, Selfie};

    #[test]
    fn features_that_are_not_finite_have_no_accuracy_and_stop_nothing() {
        let images = |split| {
            let path = "synthetic:train=24,test=8,classes=2".as_ref();
            let dataset = selfie_data::open(path, split, Need::Labels, &PhiloxDraws::seeded).expect("made up");
            Images { items: (0..dataset.len()).collect(), dataset, workers: 0, max_bad: 0.0 }
        };
        let (train, test) = (images(Split::Train), images(Split::Test));
        let probing = Probing { train, test, classes: 2, threads: 1, batch: 8 };
        let config = ModelConfig::preset(Preset::Tiny, 32);
        let build = Build { config: &config, batch: 4, purpose: Purpose::Train, seed: 1 };
        let mut network = Selfie::<Cpu, f32>::new(Cpu::new(1).expect("a thread"), build).expect("a sound network");
        let mut encoder = probing.encoder(&network, build).expect("a sound network");
        let reporter = Reporter::new(crate::progress::Voice::Log);
        let mut accuracy = |network: &_| probing.accuracy(&mut encoder, network, &reporter).expect("no image is bad");
        let before = accuracy(&network).expect("finite");
        assert!((0.0..=1.0).contains(&before));
        let parameters = network.parameters_mut();
        let norm = parameters.table.get("norm.weight").expect("the last norm").range.clone();
        let weight = std::mem::replace(&mut parameters.master[norm.start], f32::NAN);
        assert_eq!(accuracy(&network), None);
        network.parameters_mut().master[norm.start] = weight;
        assert_eq!(accuracy(&network), Some(before), "nothing of it stays");
    }
}

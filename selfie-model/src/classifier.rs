//! Supervised training, from scratch or finetuning: ResNet-50 v2 on whole images, or its first stages and the attention pooling,
//! and a linear head.

use crate::features::{Features, FeaturesActs};
use crate::input::Input;
use crate::layers::{Dx, Linear, Tables};
use crate::memory_plan::{Dry, Ledger};
use crate::network::{Build, Passes};
use crate::state::{Buffer, State, StateArgs};
use crate::{Classify, MemoryPlan, Mode, Result};
use selfie_kernels::gemm::Write;
use selfie_kernels::{Backend, Element, Error, Memory, View, softmax_cross_entropy};
use std::sync::Arc;

/// The features of an image ([`crate::Head`]), the classifier on them, and cross-entropy.
#[derive(Debug)]
pub struct Classifier<B: Memory, T: Element> {
    classes: usize,
    features: Features,
    head: Linear,
    state: State<B, T>,
    input: Input<B, T>,
    acts: FeaturesActs<B, T>,
    /// `[n, classes]`, and their gradient.
    logits: Buffer<B, T>,
    dlogits: Buffer<B, T>,
}

impl<B: Memory, T: Element> Classifier<B, T> {
    /// The buffers of such a network, without allocating them.
    ///
    /// # Errors
    /// Impossible configurations.
    pub fn memory_plan(build: Build<'_>, classes: usize) -> Result<MemoryPlan> {
        let mut ledger = Ledger::new(Dry);
        Classifier::<Dry, T>::build(&mut ledger, build, classes)?;
        Ok(ledger.into_plan())
    }

    fn build(ledger: &mut Ledger<B>, build: Build<'_>, classes: usize) -> Result<Self> {
        let Build { config, batch, purpose, .. } = build.checked()?;
        if classes == 0 {
            return Err(crate::Error::usage("classes", classes, "at least 1"));
        }

        let mut tables = Tables::default();
        let features = Features::new(&mut tables, build, config.stages(), config.head.into())?;
        let head = Linear::shaped(&mut tables, "head.fc", &[classes, features.width(), 1, 1]);

        let input = Input::new(ledger, config, batch, 1, 1)?;
        let acts = features.acts(ledger, purpose)?;
        ledger.scope("head");
        let logits = ledger.alloc("logits", batch * classes)?;
        let dlogits = ledger.alloc("dlogits", purpose.trained(batch * classes))?;
        let partial = features.partial_len();
        let state = State::new(ledger, StateArgs { build, tables, partial })?;
        Ok(Self { classes, features, head, state, input, acts, logits, dlogits })
    }
}

impl<B: Backend<T>, T: Element> Classifier<B, T> {
    /// Allocates everything and draws the initial parameters.
    ///
    /// # Errors
    /// Impossible configurations; out of memory.
    pub fn new(device: impl Into<Arc<B>>, build: Build<'_>, classes: usize) -> Result<Self> {
        let mut network = Self::build(&mut Ledger::new(device), build, classes)?;
        network.features.prepare(&*network.state.device, &mut network.acts)?;
        network.state.initialise(build.config)?;
        Ok(network)
    }
}

impl<B: Backend<T>, T: Element> Classify<B, T> for Classifier<B, T> {
    fn classes(&self) -> usize {
        self.classes
    }

    fn logits(&self) -> View<'_, B, T> {
        B::all(&self.logits)
    }
}

impl<B: Backend<T>, T: Element> Passes<B, T> for Classifier<B, T> {
    fn state(&self) -> &State<B, T> {
        &self.state
    }

    fn input(&self) -> &Input<B, T> {
        &self.input
    }

    fn parts_mut(&mut self) -> (&mut State<B, T>, &mut Input<B, T>) {
        (&mut self.state, &mut self.input)
    }

    fn vectors(&self) -> (View<'_, B, T>, usize) {
        (self.features.vectors(&self.acts), self.features.width())
    }

    fn check_targets(&self, labels: &[u32]) -> selfie_kernels::Result<()> {
        self.input.check_len(labels)?;
        match labels.iter().position(|&label| label as usize >= self.classes) {
            None => Ok(()),
            Some(image) => {
                let reason = format!("image {image}: label {} where there are {} classes", labels[image], self.classes);
                Err(Error::Dims { op: "load", reason })
            }
        }
    }

    fn pass_forward(&mut self) -> selfie_kernels::Result<()> {
        let Self { classes, features, head, state, input, acts, logits, dlogits } = self;
        features.forward(state, &input.pixels, acts)?;
        head.forward(state, head.dense(input.batch()), features.output(acts), logits)?;
        state.device.softmax_cross_entropy(softmax_cross_entropy::Args {
            n: input.batch(),
            valid: input.about.valid,
            classes: *classes,
            rivals: *classes,
            logits: B::all(logits),
            labels: B::all(input.targets()),
            loss: state.metrics.loss_mut(),
            dlogits: (state.mode == Mode::Train).then(|| B::all_mut(dlogits)),
        })
    }

    fn pass_backward(&mut self) -> selfie_kernels::Result<()> {
        let Self { features, head, state, input, acts, dlogits, .. } = self;
        let rows = head.dense(input.batch());
        head.backward_weight(state, rows, features.output(acts), dlogits)?;
        let to = features.output_gradient_mut(acts);
        head.backward_data(state, rows, dlogits, Dx { gelu: None, addend: None, write: Write::Overwrite, to })?;
        features.backward(state, &input.pixels, acts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Head, ModelConfig, Preset, Purpose};

    #[test]
    fn parameter_counts() {
        for (image_size, classes, expected) in [(224, 1000, 25_549_352), (32, 10, 23_513_162)] {
            let config = &ModelConfig::preset(Preset::Resnet50, image_size);
            let build = Build { config, batch: 1, purpose: Purpose::Train, seed: 0 };
            let network = Classifier::<Dry, f32>::build(&mut Ledger::new(Dry), build, classes).expect("sound");
            assert_eq!(network.state.parameters.table.elements(), expected);
        }
    }

    /// The paper's P and A, less its final positions of the query, with classes: no stage is added.
    #[test]
    fn an_attention_head_is_the_pretrained_network_with_classes() {
        let config = &ModelConfig { head: Head::Attention, ..ModelConfig::preset(Preset::Resnet50, 32) };
        let build = Build { config, batch: 1, purpose: Purpose::Train, seed: 0 };
        let network = Classifier::<Dry, f32>::build(&mut Ledger::new(Dry), build, 10).expect("sound");
        assert_eq!(network.state.parameters.table.elements(), 25_094_080 + 10 * 1024 + 10);
        assert_eq!(network.state.parameters.table.get("head.fc.weight").expect("listed").shape, [10, 1024, 1, 1]);
        // 2 pixels a side are 16 x 16 places, and the map has 8 x 8 pixels.
        let config = &ModelConfig { patch_size: Some(2), ..config.clone() };
        let error = Classifier::<Dry, f32>::memory_plan(Build { config, ..build }, 10).expect_err("no such cells");
        assert!(error.to_string().contains("model.patch_size = 2"), "{error}");
    }

    #[test]
    fn names_are_timms() {
        let config = &ModelConfig::preset(Preset::Tiny, 224);
        let build = Build { config, batch: 1, purpose: Purpose::Train, seed: 0 };
        let network = Classifier::<Dry, f32>::build(&mut Ledger::new(Dry), build, 5).expect("sound");
        let names: Vec<_> = network.state.parameters.table.entries().iter().map(|entry| entry.name.as_str()).collect();
        let block = ["downsample.conv", "norm1", "conv1", "norm2", "conv2", "norm3", "conv3"];
        let mut expected = vec!["stem.conv.weight".to_owned()];
        for stage in 0..4 {
            for layer in block {
                expected.push(format!("stages.{stage}.blocks.0.{layer}.weight"));
                if layer.starts_with("norm") {
                    expected.push(format!("stages.{stage}.blocks.0.{layer}.bias"));
                }
            }
        }
        expected.extend(["norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"].map(String::from));
        assert_eq!(names, expected);
        assert_eq!(network.state.parameters.table.get("head.fc.weight").expect("listed").shape, [5, 256, 1, 1]);
    }
}

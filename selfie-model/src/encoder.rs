//! What a trained network makes of images: its pooled features, and its scores where it has classes. No objective, no labels.

use crate::error::{Error, Result};
use crate::evaluation::{Images, for_each_batch};
use crate::input::Input;
use crate::layers::{Linear, Tables};
use crate::memory_plan::{Dry, Ledger};
use crate::network::{Build, Passes};
use crate::resnet::{Resnet, ResnetActs};
use crate::state::{Buffer, State, StateArgs};
use crate::transfer::download;
use crate::weights::{HEAD, Initialized, find_weights, load_weights, stages};
use crate::{MemoryPlan, Purpose, TensorFile};
use selfie_data::BadFile;
use selfie_kernels::{Backend, Element, Memory, Wide};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// The layers of an [`Encoder`]: stem, so many stages, norm, average, and perhaps a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncoderLayers {
    /// 4 of a classifier; 3 of a pretrained patch network, which takes whole images as it takes patches.
    pub stages: usize,
    /// Of the head; 0 without one.
    pub classes: usize,
}

impl EncoderLayers {
    /// Those that a weight file has, or the one that a run's folder means ([`find_weights`]).
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::Malformed`] for what is no such file, and for names of no ResNet.
    pub fn of(source: &Path) -> Result<Self> {
        let path = find_weights(source)?;
        let file = TensorFile::<f32>::read(&path)?;
        let stages = stages(file.shapes().map(|(name, _)| name));
        if !(1..=4).contains(&stages) {
            let (expected, found) = ("tensors of 1 to 4 stages (stages.0 and so on)", format!("{stages} stages"));
            return Err(Error::malformed(
                &path,
                expected,
                found,
                "give the weights of a run, or of timm's resnetv2_50",
            ));
        }
        let classes = file.shape(HEAD).and_then(|shape| shape.first()).map_or(0, |&classes| classes);
        Ok(Self { stages, classes })
    }
}

/// Where the features are taken: `norm behind stage 3, average over the image`.
impl fmt::Display for EncoderLayers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "norm behind stage {}, average over the image", self.stages)
    }
}

/// An image as the encoder sees it.
#[derive(Debug, Clone, Copy)]
pub struct Encoded<'a> {
    /// Its place in the data set.
    pub index: usize,
    /// `[width]`: the average over the last map, behind the last norm and ReLU.
    pub features: &'a [f32],
    /// `[classes]`: logits of the head; none without one.
    pub scores: &'a [f32],
}

/// A network without objective, in evaluation mode. What it makes of an image depends on nothing else: not on the images
/// beside it, and on the CPU not on the batch size either, bit for bit.
#[derive(Debug)]
pub struct Encoder<B: Memory, T: Element> {
    network: Forward<B, T>,
}

/// The network itself, with everything that any network has.
#[derive(Debug)]
struct Forward<B: Memory, T: Element> {
    backbone: Resnet,
    head: Option<Linear>,
    state: State<B, T>,
    input: Input<B, T>,
    acts: ResnetActs<B, T>,
    /// `[n, width]`
    features: Buffer<B, T>,
    /// `[n, classes]`
    scores: Buffer<B, T>,
}

impl<B: Memory, T: Element> Encoder<B, T> {
    /// The buffers of such a network, without allocating them.
    ///
    /// # Errors
    /// As [`Encoder::new`].
    pub fn memory_plan(build: Build<'_>, layers: EncoderLayers) -> Result<MemoryPlan> {
        let mut ledger = Ledger::new(Dry);
        Forward::<Dry, T>::build(&mut ledger, build, layers)?;
        Ok(ledger.into_plan())
    }

    /// Numbers of an image's features.
    pub fn width(&self) -> usize {
        self.network.backbone.width()
    }
}

impl<B: Memory, T: Element> Forward<B, T> {
    fn build(ledger: &mut Ledger<B>, build: Build<'_>, layers: EncoderLayers) -> Result<Self> {
        let build = Build { purpose: Purpose::Evaluate, ..build.checked()? };
        let Build { config, batch, purpose, .. } = build;
        let EncoderLayers { stages, classes } = layers;
        if !(1..=config.depths.len()).contains(&stages) {
            return Err(Error::usage("stages", stages, format!("1 to {}", config.depths.len())));
        }
        let mut tables = Tables::default();
        let backbone = Resnet::new(&mut tables, config, stages, batch, config.image_size);
        let width = backbone.width();
        let head = (classes > 0).then(|| Linear::shaped(&mut tables, "head.fc", &[classes, width, 1, 1]));
        let input = Input::new(ledger, config, batch, 1, 0)?;
        let acts = backbone.acts(ledger, purpose)?;
        ledger.scope("head");
        let features = ledger.alloc("features", batch * width)?;
        let scores = ledger.alloc("scores", batch * classes)?;
        let partial = backbone.partial_len();
        let state = State::new(ledger, StateArgs { build, tables, partial })?;
        Ok(Self { backbone, head, state, input, acts, features, scores })
    }
}

impl<B: Backend<T>, T: Element> Encoder<B, T> {
    /// Allocates everything, with the initial parameters of `build.seed`: those with which a training of that seed begins.
    /// `build.purpose` does not matter.
    ///
    /// # Errors
    /// Impossible configurations; out of memory.
    pub fn new(device: impl Into<Arc<B>>, build: Build<'_>, layers: EncoderLayers) -> Result<Self> {
        let mut network = Forward::build(&mut Ledger::new(device), build, layers)?;
        network.state.initialise(build.config)?;
        Ok(Self { network })
    }

    /// Takes every parameter and running statistic from a file, or from a run's folder.
    ///
    /// # Errors
    /// As [`load_weights`].
    pub fn load(&mut self, source: &Path) -> Result<Initialized> {
        load_weights(&mut self.network, source)
    }

    /// Encodes `images`, in their order; those that cannot be read are left out, and returned.
    ///
    /// # Errors
    /// No image; too many bad ones; those of the device.
    pub fn encode(&mut self, images: &Images, mut each: impl FnMut(Encoded<'_>)) -> Result<Vec<BadFile>> {
        let width = self.width();
        let (mut features, mut scores) = (Vec::new(), Vec::new());
        let narrow = |value: T| value.widen().to_f64() as f32;
        for_each_batch(&mut self.network, images, |network, batch, _| {
            let device = &*network.state.device;
            features.clear();
            features.extend(download(device, &network.features)?.into_iter().map(narrow));
            scores.clear();
            if network.head.is_some() {
                scores.extend(download(device, &network.scores)?.into_iter().map(narrow));
            }
            let classes = scores.len() / batch.labels.len();
            for (slot, &index) in batch.indices[..batch.valid].iter().enumerate() {
                each(Encoded {
                    index: index as usize,
                    features: &features[slot * width..][..width],
                    scores: &scores[slot * classes..][..classes],
                });
            }
            Ok(())
        })
    }
}

impl<B: Backend<T>, T: Element> Passes<B, T> for Forward<B, T> {
    fn state(&self) -> &State<B, T> {
        &self.state
    }

    fn input(&self) -> &Input<B, T> {
        &self.input
    }

    fn parts_mut(&mut self) -> (&mut State<B, T>, &mut Input<B, T>) {
        (&mut self.state, &mut self.input)
    }

    fn check_targets(&self, targets: &[u32]) -> selfie_kernels::Result<()> {
        self.input.check_len(targets)
    }

    fn pass_forward(&mut self) -> selfie_kernels::Result<()> {
        let Self { backbone, head, state, input, acts, features, scores } = self;
        backbone.forward(state, &input.pixels, acts, features)?;
        match head {
            Some(head) => head.forward(state, head.dense(input.batch()), features, scores),
            None => Ok(()),
        }
    }

    fn pass_backward(&mut self) -> selfie_kernels::Result<()> {
        let reason = "an encoder has no objective".into();
        Err(selfie_kernels::Error::Dims { op: "backward", reason })
    }
}

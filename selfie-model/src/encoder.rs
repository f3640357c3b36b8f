//! What a trained network makes of images: its pooled features, and its scores where it has classes. No objective, no labels.

use crate::error::{Error, Result};
use crate::evaluation::{Images, for_each_batch};
use crate::input::Input;
use crate::layers::{Linear, Tables};
use crate::memory_plan::{Dry, Ledger};
use crate::network::{Begin, Build, Mode, Network, Passes};
use crate::resnet::{Resnet, ResnetActs};
use crate::state::{Buffer, State, StateArgs};
use crate::transfer::download;
use crate::weights::{HEAD, Initialized, find_weights, give, load_weights, stages};
use crate::{MemoryPlan, ModelConfig, Purpose, TensorFile};
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

impl EncoderLayers {
    /// Where features are taken unless asked otherwise: behind all stages.
    pub fn last(&self) -> Layer {
        Layer { stage: self.stages }
    }
}

/// Where features are taken: behind so many stages, by the norm that takes their output, averaged over the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    /// Counted from 1.
    pub stage: usize,
}

/// `norm behind stage 3, average over the image`
impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "norm behind stage {}, average over the image", self.stage)
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
    stages: usize,
    layer: Layer,
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
        self.network.backbone.width_behind(self.network.layer.stage)
    }

    /// Takes features at this layer from now on. There are scores at the last one alone.
    ///
    /// # Errors
    /// Usage: a stage that the network does not have.
    pub fn take_at(&mut self, layer: Layer) -> Result<()> {
        let stages = self.network.stages;
        if !(1..=stages).contains(&layer.stage) {
            return Err(Error::usage("layer", format!("stage{}", layer.stage), format!("stage1 to stage{stages}")));
        }
        self.network.layer = layer;
        Ok(())
    }
}

/// The layers of an encoder for `n` images.
pub(crate) fn backbone_and_head(
    tables: &mut Tables,
    config: &ModelConfig,
    layers: EncoderLayers,
    n: usize,
) -> (Resnet, Option<Linear>) {
    let EncoderLayers { stages, classes } = layers;
    let backbone = Resnet::new(tables, config, stages, n, config.image_size);
    let shape = [classes, backbone.width(), 1, 1];
    let head = (classes > 0).then(|| Linear::shaped(tables, "head.fc", &shape));
    (backbone, head)
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
        let (backbone, head) = backbone_and_head(&mut tables, config, layers, batch);
        let width = backbone.width();
        let input = Input::new(ledger, config, batch, 1, 0)?;
        let acts = backbone.acts(ledger, purpose)?;
        ledger.scope("head");
        let features = ledger.alloc("features", batch * width)?;
        let scores = ledger.alloc("scores", batch * classes)?;
        let partial = backbone.partial_len();
        let state = State::new(ledger, StateArgs { build, tables, partial })?;
        let layer = layers.last();
        Ok(Self { backbone, head, stages, layer, state, input, acts, features, scores })
    }
}

impl<B: Memory, T: Element> Forward<B, T> {
    /// Whether the features are those that the head takes.
    fn has_scores(&self) -> bool {
        self.head.is_some() && self.layer.stage == self.stages
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

    /// Overwrites parameters and running statistics, as they lie in the flat buffers.
    pub(crate) fn give(&mut self, master: &[T::Wide], running: &[T::Wide]) -> Result<()> {
        give(&mut self.network, master, running)
    }

    /// Features and scores, `[n, width]` and `[n, classes]`, of pixels `[n, side, side, 3]` that are normalised already, as
    /// many images as the batch.
    pub(crate) fn of_pixels(&mut self, pixels: &[T]) -> Result<(Vec<T>, Vec<T>)> {
        let network = &mut self.network;
        network.put_pixels(pixels, &[], 0)?;
        network.begin(Begin::Evaluation)?;
        network.forward(Mode::Evaluate)?;
        let device = &*network.state.device;
        Ok((download(device, &network.features)?, download(device, &network.scores)?))
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
            if network.has_scores() {
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
        let has_scores = self.has_scores();
        let Self { backbone, head, layer, state, input, acts, features, scores, .. } = self;
        backbone.forward_behind(layer.stage, state, &input.pixels, acts, features)?;
        match head {
            Some(head) if has_scores => head.forward(state, head.dense(input.batch()), features, scores),
            _ => Ok(()),
        }
    }

    fn pass_backward(&mut self) -> selfie_kernels::Result<()> {
        let reason = "an encoder has no objective".into();
        Err(selfie_kernels::Error::Dims { op: "backward", reason })
    }
}

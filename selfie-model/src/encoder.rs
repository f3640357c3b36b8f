//! What a trained network makes of images: its pooled features, and its scores where it has classes. No objective, no labels.

use crate::error::{Error, Result};
use crate::evaluation::{Images, for_each_batch};
use crate::features::{Features, FeaturesActs, mean_vector};
use crate::input::Input;
use crate::layers::{Linear, Tables};
use crate::memory_plan::{Dry, Ledger};
use crate::network::{Begin, Build, Mode, Passes};
use crate::resnet::Resnet;
use crate::selfie::STAGES;
use crate::state::{Buffer, State, StateArgs};
use crate::transfer::{download, download_view};
use crate::weights::{Initialized, give, layers_of, load_weights};
use crate::{Head, MemoryPlan, ModelConfig, Network, Purpose, Table};
use selfie_data::BadFile;
use selfie_kernels::{Backend, Element, Memory, View, Wide};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// The layers of an [`Encoder`]: stem, so many stages, norm, average or attention pooling, and perhaps classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncoderLayers {
    /// 4 of a classifier, 3 of one with an attention head and of a pretrained patch network.
    pub stages: usize,
    /// What makes the features of the last map. A pretrained network's own pooling is no such: it is of the puzzle.
    pub head: Head,
    /// Of the classifier on the features; 0 without one.
    pub classes: usize,
}

impl EncoderLayers {
    /// Those that a weight file has, or the one that a run's folder means ([`crate::find_weights`]).
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::Malformed`] for what is no such file, and for names of no ResNet.
    pub fn of(source: &Path) -> Result<Self> {
        layers_of(source)
    }
}

impl EncoderLayers {
    /// Where features are taken unless asked otherwise: behind all stages, pooled as a classifier takes them.
    pub fn last(&self) -> Layer {
        Layer { stage: self.stages, pooling: self.head.into() }
    }

    /// Whether it was pretrained, and saw patches only.
    pub fn is_patch_network(&self) -> bool {
        *self == Self { stages: STAGES, head: Head::Conv, classes: 0 }
    }

    /// Whether features can be taken there.
    pub fn has(&self, layer: Layer) -> bool {
        let has_pooling = match layer.pooling {
            Pooling::Map => true,
            Pooling::Patches => self.is_patch_network(),
            Pooling::Attention => layer == self.last(),
        };
        has_pooling && (1..=self.stages).contains(&layer.stage)
    }
}

/// Where features are taken: behind so many stages, by the norm that takes their output, pooled to one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    /// Counted from 1.
    pub stage: usize,
    /// How the map behind it becomes a vector.
    pub pooling: Pooling,
}

/// How an image becomes one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The whole image goes through the network: the average over the map.
    Map,
    /// The patches of pretraining's grid go through the network one by one: the average over their maps, and over the patches.
    /// So a patch network was trained; its running statistics are of patches.
    Patches,
    /// The whole image goes through the network, and the attention pooling sums up the map: [`Head::Attention`]. Behind the
    /// last stage alone.
    Attention,
}

/// As the classifier takes it.
impl From<Head> for Pooling {
    fn from(head: Head) -> Self {
        match head {
            Head::Conv => Self::Map,
            Head::Attention => Self::Attention,
        }
    }
}

/// `norm behind stage 3, average over the image`, `.., average over the patches`, `.., attention pooling`.
impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pooling = match self.pooling {
            Pooling::Map => "average over the image",
            Pooling::Patches => "average over the patches",
            Pooling::Attention => "attention pooling",
        };
        write!(f, "norm behind stage {}, {pooling}", self.stage)
    }
}

/// An image as the encoder sees it.
#[derive(Debug, Clone, Copy)]
pub struct Encoded<'a> {
    /// Its place in the data set.
    pub index: usize,
    /// `[width]`: what the [`Layer`] makes of it, behind norm and ReLU.
    pub features: &'a [f32],
    /// `[classes]`: logits of the head; none without one, and before the last layer.
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
    layers: EncoderLayers,
    layer: Layer,
    features: Features,
    classifier: Option<Linear>,
    state: State<B, T>,
    input: Input<B, T>,
    acts: FeaturesActs<B, T>,
    /// `[n, classes]`
    scores: Buffer<B, T>,
}

impl<B: Memory, T: Element> Encoder<B, T> {
    /// The buffers of such a network, without allocating them.
    ///
    /// # Errors
    /// As [`Encoder::new`].
    pub fn memory_plan(build: Build<'_>, layers: EncoderLayers, layer: Layer) -> Result<MemoryPlan> {
        let mut ledger = Ledger::new(Dry);
        Forward::<Dry, T>::build(&mut ledger, build, layers, layer)?;
        Ok(ledger.into_plan())
    }

    /// Numbers of an image's features.
    pub fn width(&self) -> usize {
        self.network.width()
    }
}

/// The layers of an encoder for `n` images that has no attention pooling, whatever `layers` say of one.
pub(crate) fn backbone_and_classifier(
    tables: &mut Tables,
    config: &ModelConfig,
    layers: EncoderLayers,
    n: usize,
) -> (Resnet, Option<Linear>) {
    let backbone = Resnet::new(tables, config, layers.stages, n, config.image_size);
    let classifier = classifier(tables, layers.classes, backbone.width());
    (backbone, classifier)
}

fn classifier(tables: &mut Tables, classes: usize, width: usize) -> Option<Linear> {
    (classes > 0).then(|| Linear::shaped(tables, "head.fc", &[classes, width, 1, 1]))
}

impl<B: Memory, T: Element> Forward<B, T> {
    fn build(ledger: &mut Ledger<B>, build: Build<'_>, layers: EncoderLayers, layer: Layer) -> Result<Self> {
        let build = Build { purpose: Purpose::Evaluate, ..build.checked()? };
        let Build { config, batch, purpose, .. } = build;
        let EncoderLayers { stages, head, classes } = layers;
        if !(1..=config.depths.len()).contains(&stages) {
            return Err(Error::usage("stages", stages, format!("1 to {}", config.depths.len())));
        }
        if !layers.has(layer) {
            let expected = format!("behind stage 1 to {stages}, or the last: {}", layers.last());
            return Err(Error::usage("layer", layer, expected));
        }
        // All parameters of the network have a place, whichever layers compute.
        let pooling = if layer.pooling == Pooling::Patches { Pooling::Patches } else { head.into() };
        let mut tables = Tables::default();
        let features = Features::new(&mut tables, build, stages, pooling)?;
        let classifier = classifier(&mut tables, classes, features.width());
        let input = Input::new(ledger, config, batch, features.grid(), 0)?;
        let acts = features.acts(ledger, purpose)?;
        ledger.scope("head");
        let scores = ledger.alloc("scores", batch * classes)?;
        let partial = features.partial_len();
        let state = State::new(ledger, StateArgs { build, tables, partial })?;
        Ok(Self { layers, layer, features, classifier, state, input, acts, scores })
    }

    /// Whether it computes all that the network has.
    fn is_at_last(&self) -> bool {
        let last = self.layers.last();
        [last, Layer { pooling: Pooling::Patches, ..last }].contains(&self.layer)
    }

    /// Numbers of an image's features.
    fn width(&self) -> usize {
        if self.is_at_last() { self.features.width() } else { self.features.width_behind(self.layer.stage) }
    }

    /// Those of the last forward, `[n, m, width]` with m vectors for each image.
    fn taken(&self) -> View<'_, B, T> {
        if self.is_at_last() {
            self.features.vectors(&self.acts)
        } else {
            self.features.averages(&self.acts, self.layer.stage)
        }
    }
}

impl<B: Backend<T>, T: Element> Encoder<B, T> {
    /// Allocates everything, with the initial parameters of `build.seed`: those with which a training of that seed begins.
    /// Features are taken at `layer`; scores are there at the last one alone. `build.purpose` does not matter.
    ///
    /// # Errors
    /// Usage: impossible configurations, and a stage or a pooling that the network does not have; out of memory.
    pub fn new(device: impl Into<Arc<B>>, build: Build<'_>, layers: EncoderLayers, layer: Layer) -> Result<Self> {
        let mut network = Forward::build(&mut Ledger::new(device), build, layers, layer)?;
        network.features.prepare(&*network.state.device, &mut network.acts)?;
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

    /// Takes every parameter and running statistic from a network that has them, such as one that is in training.
    ///
    /// # Errors
    /// [`Error::Usage`] for a network without one of them; those of the device.
    pub fn take(&mut self, other: &impl Network<B, T>) -> Result<()> {
        let (parameters, statistics) = (other.parameters(), other.statistics());
        let own = &self.network.state;
        let master =
            shared(&own.parameters.table, &parameters.table, &download(&**other.device(), &parameters.master)?)?;
        let running =
            shared(&own.statistics.table, &statistics.table, &download(&**other.device(), &statistics.running)?)?;
        give(&mut self.network, &master, &running)
    }

    /// Overwrites parameters and running statistics, as they lie in the flat buffers.
    pub(crate) fn give(&mut self, master: &[T::Wide], running: &[T::Wide]) -> Result<()> {
        give(&mut self.network, master, running)
    }

    /// Features and scores, `[n, width]` and `[n, classes]`, of pixels `[n, side, side, 3]` that are normalised already, as
    /// many images as the batch. Whole images only.
    pub(crate) fn of_pixels(&mut self, pixels: &[T]) -> Result<(Vec<T>, Vec<T>)> {
        let network = &mut self.network;
        network.put_pixels(pixels, &[], 0)?;
        network.begin(Begin::Evaluation)?;
        network.forward(Mode::Evaluate)?;
        let device = &*network.state.device;
        Ok((download_view(device, network.taken())?, download(device, &network.scores)?))
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
            let vectors = download_view(device, network.taken())?;
            features.clear();
            let of_image = vectors.chunks_exact(vectors.len() / batch.labels.len());
            features.extend(of_image.flat_map(|vectors| mean_vector(vectors, width)).map(|value| value as f32));
            scores.clear();
            if network.classifier.is_some() && network.is_at_last() {
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

/// The tensors of `table`, from a flat buffer that has them under the same names.
fn shared<W: Wide>(table: &Table, other: &Table, flat: &[W]) -> Result<Vec<W>> {
    let mut values = vec![W::zero(); table.len()];
    for entry in table.entries() {
        match other.get(&entry.name) {
            Some(found) if found.shape == entry.shape => {
                values[entry.range.clone()].copy_from_slice(&flat[found.range.clone()]);
            }
            found => {
                let found = found.map_or("none".into(), |found| format!("{:?}", found.shape));
                return Err(Error::usage(&entry.name, found, format!("{:?}, as in the encoder", entry.shape)));
            }
        }
    }
    Ok(values)
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

    fn vectors(&self) -> (View<'_, B, T>, usize) {
        (self.taken(), self.width())
    }

    fn check_targets(&self, targets: &[u32]) -> selfie_kernels::Result<()> {
        self.input.check_len(targets)
    }

    fn pass_forward(&mut self) -> selfie_kernels::Result<()> {
        let is_at_last = self.is_at_last();
        let Self { layer, features, classifier, state, input, acts, scores, .. } = self;
        if !is_at_last {
            return features.forward_behind(layer.stage, state, &input.pixels, acts);
        }
        features.forward(state, &input.pixels, acts)?;
        match classifier {
            Some(classifier) => {
                classifier.forward(state, classifier.dense(input.batch()), features.output(acts), scores)
            }
            None => Ok(()),
        }
    }

    fn pass_backward(&mut self) -> selfie_kernels::Result<()> {
        let reason = "an encoder has no objective".into();
        Err(selfie_kernels::Error::Dims { op: "backward", reason })
    }
}

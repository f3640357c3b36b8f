//! What `embed`, `probe` and `predict` share: the network of a run without its objective, and what it makes of images.

use std::path::{Path, PathBuf};

use selfie_data::BadFile;
use selfie_kernels::{Backend, Element};
use selfie_model::{Build, Encoded, Encoder, EncoderLayers, Images, Layer, ModelConfig, Pooling, Purpose};

use super::evaluate::Weights;
use crate::args::LayerFlags;
use crate::config::{Request, Resolved, Settings, Task};
use crate::device::{self, Chosen, Work};
use crate::exit::Problem;
use crate::memory::{self, Beside, Need};
use crate::progress::{Reporter, Voice};

/// A run whose network is used as it is.
pub struct Trained {
    run: PathBuf,
    /// The configuration: the run's, and what was typed.
    pub resolved: Resolved,
    /// The same as a struct.
    pub settings: Settings,
    /// The network's layers.
    pub layers: EncoderLayers,
    /// Where the features are taken.
    pub layer: Layer,
    /// The classes that it tells apart; none of a pretraining run.
    pub classes: Vec<String>,
    /// Speaks to the person.
    pub reporter: Reporter,
    model: ModelConfig,
    chosen: Chosen,
}

/// Which parameters a network has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parameters {
    /// Those of the run.
    Trained,
    /// Those that a training of the run's seed begins with: what the network is worth without.
    Untrained,
}

impl Trained {
    /// Reads the configuration of `run` and what its `weights` are of, and chooses the device.
    ///
    /// # Errors
    /// Usage, input, and what the system refuses.
    pub fn open(run: &Path, weights: Weights, typed: &Request) -> anyhow::Result<Self> {
        let request = Request { run: Some(run.into()), ..typed.clone() };
        let resolved = Resolved::new(Task::Evaluate, &request)?;
        let settings = resolved.settings();
        let layers = EncoderLayers::of(run)?;
        if layers.classes != weights.classes.len() {
            return Err(Problem::input(format!(
                "{}: expected a name for each of the {} classes of the weights, found {} in weights/config.json; \
                 restore that file",
                run.display(),
                layers.classes,
                weights.classes.len()
            )));
        }
        // The run's own geometry, whatever the data would suggest.
        let model = settings.network(weights.image_size.unwrap_or(settings.data.image_size))?;
        let chosen = device::choose(&settings.run)?;
        let (run, classes) = (run.to_path_buf(), weights.classes);
        let (layer, reporter) = (layers.last(), Reporter::new(Voice::Full));
        Ok(Self { run, resolved, settings, layers, layer, classes, reporter, model, chosen })
    }

    /// The same with its features taken where the flags say.
    ///
    /// # Errors
    /// Usage: a stage or a pooling that the network does not have.
    pub fn at(self, flags: &LayerFlags) -> anyhow::Result<Self> {
        let (layers, run) = (self.layers, self.run.display());
        let stage = flags.layer.unwrap_or(layers.stages);
        if !(1..=layers.stages).contains(&stage) {
            let stages = layers.stages;
            return Err(Problem::usage(format!(
                "--layer stage{stage}: expected stage1 to stage{stages}, which {run} has"
            )));
        }
        // There is no attention pooling behind an earlier stage.
        let usual = self.layer.pooling;
        let usual = if usual == Pooling::Attention && stage < layers.stages { Pooling::Map } else { usual };
        let layer = Layer { stage, pooling: flags.pooling.map_or(usual, Pooling::from) };
        if !layers.has(layer) {
            return Err(Problem::usage(format!(
                "--pooling patches: expected map, as {run} is no pretraining run: it was trained on whole images"
            )));
        }
        Ok(Self { layer, ..self })
    }

    /// Seed of the run: its network began with the parameters that were drawn from it, if it began from scratch.
    pub fn seed(&self) -> u64 {
        self.settings.train.seed
    }

    /// Says where it computes.
    pub fn introduce(&self) {
        self.chosen.notes().for_each(|note| self.reporter.say(note));
    }

    /// Encodes some parts of data one after another; `each` gets the number of the part and an image of it. Gives the images
    /// that could not be read, of each part.
    ///
    /// # Errors
    /// Too many bad images, out of memory, weights that do not fit.
    pub fn encode(
        &self,
        parameters: Parameters,
        parts: &[&Images],
        each: &mut dyn FnMut(usize, Encoded<'_>),
    ) -> anyhow::Result<Vec<Vec<BadFile>>> {
        let most = parts.iter().map(|images| images.items.len()).max().unwrap_or(0);
        let batch = self.settings.train.batch.min(most);
        let build = Build { config: &self.model, batch, purpose: Purpose::Evaluate, seed: self.seed() };
        self.chosen.run(Encoding { trained: self, parameters, build, parts, each })
    }
}

/// The work, on whatever device was chosen.
struct Encoding<'a> {
    trained: &'a Trained,
    parameters: Parameters,
    build: Build<'a>,
    parts: &'a [&'a Images],
    each: &'a mut dyn FnMut(usize, Encoded<'_>),
}

impl Work for Encoding<'_> {
    type Output = Vec<Vec<BadFile>>;
    fn run<B: Backend<T>, T: Element>(self, device: B) -> anyhow::Result<Self::Output> {
        let Self { trained: Trained { run, settings, layers, layer, reporter, .. }, parameters, build, parts, each } =
            self;
        // Scores of a network without training say nothing.
        let layers = match parameters {
            Parameters::Trained => *layers,
            Parameters::Untrained => EncoderLayers { classes: 0, ..*layers },
        };
        let plan = Encoder::<B, T>::memory_plan(build, layers, *layer)?.with_workspace(&device);
        if parameters == Parameters::Trained {
            let beside = Beside::Evaluation { workers: settings.data.workers };
            let need = Need { plan: &plan, batch: build.batch, image_size: build.config.image_size, beside };
            memory::check(&need, &device, reporter)?;
        }
        let mut encoder = Encoder::<B, T>::new(device, build, layers, *layer)?;
        if parameters == Parameters::Trained {
            for name in encoder.load(run)?.unused {
                reporter.warn(format!("the weights of {} have `{name}`, which is not used", run.display()));
            }
        }
        let parts = parts.iter().enumerate();
        parts.map(|(part, images)| Ok(encoder.encode(images, |image| each(part, image))?)).collect()
    }
}

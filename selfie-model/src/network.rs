//! What the trainer needs of a network: load a batch, forward, backward, update.

use crate::train_config::MAX_BATCH;
use crate::{Error, ModelConfig, Parameters, Statistics};
use selfie_kernels::{Backend, Element, Result};
use std::sync::Arc;

/// Which statistics normalise, and whether dropout is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Statistics of the batch; dropout; everything that backward needs is kept.
    Train,
    /// Running statistics; no dropout.
    Evaluate,
}

/// What a network is built for: decides which buffers it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Training, one batch an update.
    Train,
    /// Training, the gradients of several micro-batches an update.
    Accumulate,
    /// Evaluation: no gradients, no momenta; the feature maps of the blocks share their memory.
    Evaluate,
}

impl Purpose {
    /// `len`, or 0 in evaluation: the length of a buffer that only training needs.
    pub(crate) fn trained(self, len: usize) -> usize {
        match self {
            Purpose::Train | Purpose::Accumulate => len,
            Purpose::Evaluate => 0,
        }
    }
}

/// How a network is built.
#[derive(Debug, Clone, Copy)]
pub struct Build<'a> {
    /// Its shape.
    pub config: &'a ModelConfig,
    /// Images of a batch.
    pub batch: usize,
    /// What for.
    pub purpose: Purpose,
    /// Of the initial parameters and of the dropout.
    pub seed: u64,
}

impl Build<'_> {
    /// Itself, if the configuration and the batch are possible.
    pub(crate) fn checked(&self) -> crate::Result<Self> {
        self.config.check()?;
        if !(1..=MAX_BATCH).contains(&self.batch) {
            return Err(Error::usage("train.batch", self.batch, format!("1 to {MAX_BATCH}")));
        }
        Ok(*self)
    }

    /// In training, the statistics of a batch need `rows`, the pixels of the smallest map, to be several.
    pub(crate) fn check_rows(&self, rows: usize) -> crate::Result<()> {
        match self.purpose {
            Purpose::Train | Purpose::Accumulate if rows < 2 => {
                let expected = "at least 2: the last feature map has one pixel, of which there is no variance";
                Err(Error::usage("train.batch", self.batch, expected))
            }
            _ => Ok(()),
        }
    }
}

/// A batch on the host, as the loader and the trainer make it.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// `[n, h, w, 3]`, RGB bytes.
    pub images: &'a [u8],
    /// `[n, 3]`: crop row, crop column, flip; see [`selfie_kernels::augment`].
    pub draws: &'a [i32],
    /// Pretraining: `[n, patches]`, the order of each image's patches, the hidden ones first. Classification: `[n]`, the labels.
    pub targets: &'a [u32],
    /// Global number of the first sample (`step * batch`): keys the dropout.
    pub first_sample: u64,
    /// Images that count, the first ones; all in training.
    pub valid: usize,
}

/// Mean loss and accuracy of a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loss {
    /// Mean over the valid images (and hidden places).
    pub loss: f64,
    /// Between 0 and 1.
    pub accuracy: f64,
}

/// The numbers of one optimizer step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
    /// Learning rate.
    pub rate: f64,
    /// Nesterov momentum.
    pub momentum: f64,
    /// L2 penalty's factor.
    pub weight_decay: f64,
}

/// What a batch must look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Images of a batch.
    pub batch: usize,
    /// Height and width of an image as loaded.
    pub image: [usize; 2],
    /// Elements of [`Inputs::targets`] for an image: patches, or 1.
    pub targets: usize,
}

/// A network built for a batch size, with its parameters, its buffers and its objective.
///
/// A step is `load`, `forward(Train)`, `backward`, `update`; with micro-batches, `backward` and `accumulate` for each and
/// one `update` at the end. An evaluation is `load`, `forward(Evaluate)`. Nothing is allocated after construction.
pub trait Network<B: Backend<T>, T: Element> {
    /// Where its buffers are.
    fn device(&self) -> &Arc<B>;
    /// What a batch must look like.
    fn sizes(&self) -> Sizes;
    /// Parameters, copies, gradients, momenta.
    fn parameters(&self) -> &Parameters<B, T>;
    /// The same, writable. Whoever writes `master` calls [`Network::refresh_copy`] afterwards.
    fn parameters_mut(&mut self) -> &mut Parameters<B, T>;
    /// Running statistics.
    fn statistics(&self) -> &Statistics<B, T::Wide>;
    /// The same, writable.
    fn statistics_mut(&mut self) -> &mut Statistics<B, T::Wide>;
    /// Rounds the master into the copy.
    ///
    /// # Errors
    /// Those of the device.
    fn refresh_copy(&mut self) -> Result<()>;
    /// Uploads a batch and makes the network's input of it (crop, flip, normalise, cut).
    ///
    /// # Errors
    /// Lengths that do not fit [`Network::sizes`].
    fn load(&mut self, inputs: &Inputs<'_>) -> Result<()>;
    /// Loss and accuracy, left on the device: see [`Network::loss`].
    ///
    /// # Errors
    /// Those of the device.
    fn forward(&mut self, mode: Mode) -> Result<()>;
    /// All gradients of the last `forward(Train)`, into [`Parameters::gradient`].
    ///
    /// # Errors
    /// Those of the device.
    fn backward(&mut self) -> Result<()>;
    /// Adds the gradient, times `scale`, to the sum that the next update uses; see `Network`.
    ///
    /// # Errors
    /// Those of the device.
    fn accumulate(&mut self, scale: f64) -> Result<()>;
    /// Gradient norm, finite flag, SGD, running statistics. A step that is not finite writes nothing.
    ///
    /// # Errors
    /// Those of the device.
    fn update(&mut self, update: Update) -> Result<()>;
    /// Waits for the last forward and reads its loss.
    ///
    /// # Errors
    /// Those of the device.
    fn loss(&self) -> Result<Loss>;
    /// Waits for the last update: gradient norm, and whether loss and gradient were finite.
    ///
    /// # Errors
    /// Those of the device.
    fn gradient_norm(&self) -> Result<(f64, bool)>;
}

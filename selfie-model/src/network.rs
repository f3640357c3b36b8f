//! What the trainer needs of a network: stage a batch, take a step, read its metrics.

use crate::input::Input;
use crate::recording::Recorded;
use crate::state::{State, StepEnd, StepNumbers};
use crate::train_config::MAX_BATCH;
use crate::{Error, ModelConfig, Parameters, Statistics};
use selfie_kernels::{Backend, Element, Result, View};
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

/// Which batch begins, see [`Network::begin`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Begin {
    /// A training step's first, or only one.
    Step {
        /// Learning rate of the step.
        rate: f64,
    },
    /// A training step's next micro-batch.
    Part,
    /// One to evaluate.
    Evaluation,
}

/// Mean loss and accuracy of a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loss {
    /// Mean over the valid images (and hidden places).
    pub loss: f64,
    /// Between 0 and 1.
    pub accuracy: f64,
}

/// What an optimizer step says of itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Metrics {
    /// Mean over all images of the step (and hidden places), before the update.
    pub loss: f64,
    /// Between 0 and 1.
    pub accuracy: f64,
    /// Euclidean norm of the gradient, without weight decay.
    pub gradient_norm: f64,
    /// Whether loss and gradient norm were finite; otherwise nothing was written.
    pub finite: bool,
}

/// The numbers of the optimizer that are the same in every step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
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
    /// Elements of [`Inputs::targets`] for an image: patches, 1, or 0 where nothing is learned.
    pub targets: usize,
}

impl Sizes {
    /// Patches whose order is an image's target; 0 where labels or nothing are.
    pub(crate) fn ordered_patches(&self) -> usize {
        if self.targets > 1 { self.targets } else { 0 }
    }
}

/// A network built for a batch size, with its parameters, its buffers and its objective.
///
/// A step is `stage`, `begin(Step)`, `train_step`; with micro-batches `stage`, `begin`, `train_part` for each and one `update` at
/// the end. An evaluation is `stage`, `begin(Evaluation)`, `forward(Evaluate)`. All but `stage` and what reads are calls in the
/// device's queue, so the host may fetch and stage the next batch while the device works on this one, and read its metrics
/// afterwards. Nothing is allocated after construction.
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
    /// Checks the next batch and brings it to the device, beside what that is at work on; `inputs` is free afterwards. A batch
    /// that was staged and did not begin is replaced.
    ///
    /// # Errors
    /// Lengths that do not fit [`Network::sizes`]; labels or orders that are none.
    fn stage(&mut self, inputs: &Inputs<'_>) -> Result<()>;
    /// As [`Network::stage`], but of normalised pixels `[n, h, w, 3]`, which overwrite the present batch at once.
    ///
    /// # Errors
    /// Lengths that do not fit [`Network::sizes`]; labels or orders that are none.
    fn put_pixels(&mut self, pixels: &[T], targets: &[u32], first_sample: u64) -> Result<()>;
    /// Makes the staged batch the present one, and uploads what is different from step to step.
    ///
    /// # Errors
    /// No batch was staged; those of the device.
    fn begin(&mut self, begin: Begin) -> Result<()>;
    /// Both: for those who do nothing in between.
    ///
    /// # Errors
    /// As [`Network::stage`].
    fn load(&mut self, inputs: &Inputs<'_>, begin: Begin) -> Result<()> {
        self.stage(inputs)?;
        self.begin(begin)
    }
    /// A whole step on the present batch: forward, backward, update. A device may record it, see
    /// [`selfie_kernels::Memory::repeat`].
    ///
    /// # Errors
    /// A network not built with [`Purpose::Train`]; those of the device.
    fn train_step(&mut self, update: Update) -> Result<()>;
    /// Forward and backward on a micro-batch, and its gradient, loss and accuracy, times `share`, added to the step's. A device
    /// may record it.
    ///
    /// # Errors
    /// A network not built with [`Purpose::Accumulate`]; those of the device.
    fn train_part(&mut self, share: f64) -> Result<()>;
    /// Loss and accuracy of the present batch, left on the device: see [`Network::loss`].
    ///
    /// # Errors
    /// Those of the device.
    fn forward(&mut self, mode: Mode) -> Result<()>;
    /// All gradients of the last `forward(Train)`, into [`Parameters::gradient`].
    ///
    /// # Errors
    /// Those of the device.
    fn backward(&mut self) -> Result<()>;
    /// Gradient norm, finite flag, SGD, running statistics, from the gradient or from the sum over the micro-batches. A step
    /// that is not finite writes nothing.
    ///
    /// # Errors
    /// Those of the device.
    fn update(&mut self, update: Update) -> Result<()>;
    /// The vectors of the last forward, `[batch, m, width]` with m for each image: what is classified, or those of the patches.
    fn features(&self) -> View<'_, B, T>;
    /// Width of one of them.
    fn feature_width(&self) -> usize;
    /// Waits for the last forward and reads its loss.
    ///
    /// # Errors
    /// Those of the device.
    fn loss(&self) -> Result<Loss>;
    /// Waits for the last update and reads what the step says of itself.
    ///
    /// # Errors
    /// Those of the device.
    fn metrics(&self) -> Result<Metrics>;
}

/// What a network is made of and what it does, of which [`Network`] is made.
pub(crate) trait Passes<B: Backend<T>, T: Element> {
    /// Everything but the layers.
    fn state(&self) -> &State<B, T>;
    /// The way in.
    fn input(&self) -> &Input<B, T>;
    /// Both, writable.
    fn parts_mut(&mut self) -> (&mut State<B, T>, &mut Input<B, T>);
    /// What the network makes of images, and the width of a vector.
    fn vectors(&self) -> (View<'_, B, T>, usize);
    /// Refuses targets that the operations could not index by.
    fn check_targets(&self, targets: &[u32]) -> Result<()>;
    /// From pixels and targets to the loss, and in training to its gradient.
    fn pass_forward(&mut self) -> Result<()>;
    /// From the loss's gradient to the parameters'.
    fn pass_backward(&mut self) -> Result<()>;
}

impl<B: Backend<T>, T: Element, N: Passes<B, T>> Network<B, T> for N {
    fn device(&self) -> &Arc<B> {
        &self.state().device
    }

    fn sizes(&self) -> Sizes {
        let input = self.input();
        Sizes { batch: input.batch(), image: input.image(), targets: input.targets_per_image() }
    }

    fn parameters(&self) -> &Parameters<B, T> {
        &self.state().parameters
    }

    fn parameters_mut(&mut self) -> &mut Parameters<B, T> {
        let (state, _) = self.parts_mut();
        // A buffer may be exchanged for another.
        state.step = Recorded::default();
        &mut state.parameters
    }

    fn statistics(&self) -> &Statistics<B, T::Wide> {
        &self.state().statistics
    }

    fn statistics_mut(&mut self) -> &mut Statistics<B, T::Wide> {
        let (state, _) = self.parts_mut();
        state.step = Recorded::default();
        &mut state.statistics
    }

    fn refresh_copy(&mut self) -> Result<()> {
        self.parts_mut().0.refresh_copy()
    }

    fn stage(&mut self, inputs: &Inputs<'_>) -> Result<()> {
        self.check_targets(inputs.targets)?;
        let (state, input) = self.parts_mut();
        input.stage(&state.device, inputs)
    }

    fn put_pixels(&mut self, pixels: &[T], targets: &[u32], first_sample: u64) -> Result<()> {
        self.check_targets(targets)?;
        let (state, input) = self.parts_mut();
        input.put_pixels(&state.device, pixels, targets, first_sample)
    }

    fn begin(&mut self, begin: Begin) -> Result<()> {
        let (state, input) = self.parts_mut();
        input.advance(&state.device)?;
        state.begin(begin, input.about.first_sample)
    }

    fn train_step(&mut self, update: Update) -> Result<()> {
        self.state().require(Purpose::Train, "train_step")?;
        recorded_step(self, StepEnd::Update(update))
    }

    fn train_part(&mut self, share: f64) -> Result<()> {
        self.state().require(Purpose::Accumulate, "train_part")?;
        recorded_step(self, StepEnd::Accumulate(share))
    }

    fn forward(&mut self, mode: Mode) -> Result<()> {
        self.parts_mut().0.begin_forward(mode)?;
        forward_from_images(self)
    }

    fn backward(&mut self) -> Result<()> {
        self.state().begin_backward()?;
        self.pass_backward()
    }

    fn update(&mut self, update: Update) -> Result<()> {
        self.parts_mut().0.update(update)
    }

    fn features(&self) -> View<'_, B, T> {
        self.vectors().0
    }

    fn feature_width(&self) -> usize {
        self.vectors().1
    }

    fn loss(&self) -> Result<Loss> {
        self.state().metrics.read_loss(&self.state().device)
    }

    fn metrics(&self) -> Result<Metrics> {
        self.state().metrics.read(&self.state().device)
    }
}

/// The part of a step that a device may record. What the host keeps of it, the mode, is set before.
fn recorded_step<B: Backend<T>, T: Element>(network: &mut impl Passes<B, T>, end: StepEnd) -> Result<()> {
    let (state, input) = network.parts_mut();
    state.begin_forward(Mode::Train)?;
    let numbers = StepNumbers { input: input.about.source, valid: input.about.valid, end };
    let device = state.device.clone();
    let mut step = std::mem::take(&mut state.step);
    let result = step.repeat(&*device, numbers, || {
        forward_from_images(network)?;
        network.pass_backward()?;
        let (state, _) = network.parts_mut();
        match end {
            StepEnd::Update(update) => state.update(update),
            StepEnd::Accumulate(share) => state.accumulate(share),
        }
    });
    network.parts_mut().0.step = step;
    result
}

fn forward_from_images<B: Backend<T>, T: Element>(network: &mut impl Passes<B, T>) -> Result<()> {
    let (state, input) = network.parts_mut();
    input.make_pixels(&state.device)?;
    network.pass_forward()
}

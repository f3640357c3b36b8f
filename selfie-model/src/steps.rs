//! Steps on a made-up batch, one after the other: what is timed.

use crate::draws::evaluation_order;
use crate::network::{Begin, Inputs, Loss, Metrics, Mode, Network, Purpose, Sizes, Update};
use crate::{Error, Result};
use selfie_kernels::{Backend, Element, Memory, Philox, Purpose as Draw, Wide};
use std::marker::PhantomData;

/// Small enough that made-up batches don't make training diverge.
const RATE: f64 = 0.01;

/// Where a step finds its batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feed {
    /// Normalised on the device, put there before the first step.
    Resident,
    /// Brought to the device as bytes for each step, beside the step before, and augmented: as in training.
    Staged,
}

/// A batch of random bytes, with crops and targets: nothing is ever timed on zeros.
#[derive(Debug)]
struct MadeUp {
    images: Vec<u8>,
    draws: Vec<i32>,
    targets: Vec<u32>,
}

impl MadeUp {
    fn new(sizes: &Sizes, classes: usize) -> Self {
        let Sizes { batch, image: [h, w], targets } = *sizes;
        let philox = Philox { seed: 1 };
        let words = (0..(batch * h * w * 3).div_ceil(16) as u64).map(|i| philox.words(Draw::Synthetic as u32, i, 0));
        let mut images: Vec<u8> = words.flatten().flat_map(u32::to_le_bytes).collect();
        images.truncate(batch * h * w * 3);
        let mut numbers = Vec::with_capacity(batch * targets);
        match targets {
            1 => numbers.extend((0..batch).map(|image| (image % classes) as u32)),
            patches => (0..batch as u64).for_each(|image| evaluation_order(image, patches, &mut numbers)),
        }
        Self { images, draws: (0..3 * batch as i32).map(|i| i % 2).collect(), targets: numbers }
    }

    /// `[n, h, w, 3]`: the images as numbers in [-1, 1].
    fn pixels<T: Element>(&self) -> Vec<T> {
        self.images.iter().map(|&byte| T::narrow(T::Wide::from_f64(f64::from(byte) / 127.5 - 1.0))).collect()
    }
}

/// A network that takes one step after the other.
#[derive(Debug)]
pub struct Steps<B: Memory, T, N> {
    network: N,
    purpose: Purpose,
    feed: Feed,
    batch: MadeUp,
    /// Of inference; training keeps its own.
    recording: Option<B::Recording>,
    taken: u64,
    element: PhantomData<T>,
}

impl<B: Backend<T>, T: Element, N: Network<B, T>> Steps<B, T, N> {
    /// Steps of `network`, which was built for `purpose`: training with one batch an update, or inference. Labels are of so
    /// many classes.
    ///
    /// # Errors
    /// Those of the device.
    pub fn new(network: N, purpose: Purpose, feed: Feed, classes: usize) -> Result<Self> {
        let batch = MadeUp::new(&network.sizes(), classes);
        let mut steps = Self { network, purpose, feed, batch, recording: None, taken: 0, element: PhantomData };
        match feed {
            // Begun once: the steps find the batch, and the numbers of the step, where they lie.
            Feed::Resident => {
                let MadeUp { targets, .. } = &steps.batch;
                steps.network.put_pixels(&steps.batch.pixels(), targets, 0)?;
                steps.begin()?;
            }
            Feed::Staged => steps.stage()?,
        }
        Ok(steps)
    }

    /// Gives the device a step, and brings the next batch to it meanwhile.
    ///
    /// # Errors
    /// Those of the device.
    pub fn step(&mut self) -> Result<()> {
        if self.feed == Feed::Staged {
            self.begin()?;
        }
        self.taken += 1;
        let Self { network, recording, .. } = self;
        match self.purpose {
            Purpose::Evaluate => {
                let device = network.device().clone();
                device.repeat(recording, || network.forward(Mode::Evaluate))?;
            }
            Purpose::Train | Purpose::Accumulate => {
                network.train_step(Update { momentum: 0.9, weight_decay: 1e-4 })?;
            }
        }
        match self.feed {
            Feed::Resident => Ok(()),
            Feed::Staged => self.stage(),
        }
    }

    /// Waits for the steps so far, as the trainer does: by what they say of themselves.
    ///
    /// # Errors
    /// [`Error::Diverged`] where that is not finite; those of the device.
    pub fn finish(&self) -> Result<Loss> {
        let Metrics { loss, accuracy, gradient_norm, finite } = match self.purpose {
            Purpose::Evaluate => {
                let Loss { loss, accuracy } = self.network.loss()?;
                Metrics { loss, accuracy, gradient_norm: 0.0, finite: loss.is_finite() }
            }
            Purpose::Train | Purpose::Accumulate => self.network.metrics()?,
        };
        if finite {
            Ok(Loss { loss, accuracy })
        } else {
            Err(Error::Diverged { step: self.taken, loss, gradient_norm, in_a_row: 1 })
        }
    }

    /// The network.
    pub fn network(&self) -> &N {
        &self.network
    }

    /// The network, trained so far.
    pub fn into_network(self) -> N {
        self.network
    }

    fn begin(&mut self) -> Result<()> {
        let begin = match self.purpose {
            Purpose::Evaluate => Begin::Evaluation,
            Purpose::Train | Purpose::Accumulate => Begin::Step { rate: RATE },
        };
        Ok(self.network.begin(begin)?)
    }

    fn stage(&mut self) -> Result<()> {
        let MadeUp { images, draws, targets } = &self.batch;
        let valid = self.network.sizes().batch;
        let first_sample = self.taken * valid as u64;
        Ok(self.network.stage(&Inputs { images, draws, targets, first_sample, valid })?)
    }
}

//! What both networks have: device, parameters, statistics, and the end of a step.

use crate::layers::Tables;
use crate::memory_plan::Ledger;
use crate::network::Build;
use crate::{Loss, Mode, ModelConfig, Parameters, Purpose, Statistics, Update, init};
use selfie_kernels::{Backend, Element, Error, Memory, Partials, Result, Wide, bn_commit, sgd};
use std::sync::Arc;

/// A buffer of `B`.
pub(crate) type Buffer<B, S> = <B as Memory>::Buffer<S>;

/// Everything of a network but its layers and their activations.
#[derive(Debug)]
pub(crate) struct State<B: Memory, T: Element> {
    pub(crate) device: Arc<B>,
    pub(crate) purpose: Purpose,
    /// Of the last forward pass.
    pub(crate) mode: Mode,
    pub(crate) parameters: Parameters<B, T>,
    pub(crate) statistics: Statistics<B, T::Wide>,
    bn_momentum: f64,
    /// Sum of the micro-batches' gradients.
    total: Buffer<B, T::Wide>,
    /// Summands of `total` since the last update.
    micro_batches: usize,
    /// Partial sums of the operation that just ran, until they are finalised.
    pub(crate) partial: Partials<B, T::Wide>,
    /// Mean loss, accuracy.
    pub(crate) loss: Buffer<B, T::Wide>,
    /// What changes per step: seed and number of the first sample; learning rate.
    pub(crate) rng: Buffer<B, u64>,
    rate: Buffer<B, T::Wide>,
    norm: Buffer<B, T::Wide>,
    finite: Buffer<B, u32>,
    seed: u64,
}

/// How to build a [`State`].
pub(crate) struct StateArgs<'a> {
    pub(crate) build: Build<'a>,
    /// The names of all layers.
    pub(crate) tables: Tables,
    /// Elements of the largest partial sums.
    pub(crate) partial: usize,
}

impl<B: Memory, T: Element> State<B, T> {
    pub(crate) fn new(ledger: &mut Ledger<B>, args: StateArgs<'_>) -> Result<Self> {
        let StateArgs { build: Build { config, purpose, seed, .. }, tables, partial } = args;
        let total = if purpose == Purpose::Accumulate { tables.parameters.len() } else { 0 };
        let parameters = Parameters::new(ledger, tables.parameters, purpose)?;
        let total = ledger.alloc("total", total)?;
        let statistics = Statistics::new(ledger, tables.statistics)?;
        ledger.scope("step");
        Ok(Self {
            device: ledger.device(),
            purpose,
            mode: Mode::Evaluate,
            parameters,
            statistics,
            bn_momentum: config.bn_momentum,
            total,
            micro_batches: 0,
            partial: Partials::within(ledger.alloc("partial", partial)?),
            loss: ledger.alloc("loss", 2)?,
            rng: ledger.alloc("rng", 2)?,
            rate: ledger.alloc("rate", 1)?,
            norm: ledger.alloc("norm", 1)?,
            finite: ledger.alloc("finite", 1)?,
            seed,
        })
    }
}

impl<B: Backend<T>, T: Element> State<B, T> {
    /// Parameters drawn from the seed, statistics of mean 0 and variance 1, momenta 0.
    pub(crate) fn initialise(&mut self, config: &ModelConfig) -> Result<()> {
        let master = init::parameters::<T::Wide>(self.seed, &self.parameters.table, config);
        self.device.upload(&master, B::all_mut(&mut self.parameters.master))?;
        let running = init::statistics::<T::Wide>(&self.statistics.table);
        self.device.upload(&running, B::all_mut(&mut self.statistics.running))?;
        self.refresh_copy()
    }

    pub(crate) fn refresh_copy(&mut self) -> Result<()> {
        let master = self.read(B::all(&self.parameters.master))?;
        let copy: Vec<T> = master.into_iter().map(T::narrow).collect();
        self.device.upload(&copy, B::all_mut(&mut self.parameters.copy))
    }

    /// A view's numbers on the host, after everything called before.
    pub(crate) fn read<S: Element>(&self, view: B::View<'_, S>) -> Result<Vec<S>> {
        use selfie_kernels::Len;
        let mut host = vec![S::default(); view.len()];
        self.device.download(view, &mut host)?;
        Ok(host)
    }

    /// Numbers the samples of the batch to come.
    pub(crate) fn set_first_sample(&mut self, first_sample: u64) -> Result<()> {
        self.device.upload(&[self.seed, first_sample], B::all_mut(&mut self.rng))
    }

    /// Begins a forward pass.
    pub(crate) fn begin_forward(&mut self, mode: Mode) -> Result<()> {
        if mode == Mode::Train {
            self.require_training("forward(Train)")?;
        }
        self.mode = mode;
        Ok(())
    }

    /// Begins a backward pass.
    pub(crate) fn begin_backward(&self) -> Result<()> {
        self.require_training("backward")?;
        match self.mode {
            Mode::Train => Ok(()),
            Mode::Evaluate => Err(Error::Dims { op: "backward", reason: "the last forward was an evaluation".into() }),
        }
    }

    fn require_training(&self, op: &'static str) -> Result<()> {
        match self.purpose {
            Purpose::Train | Purpose::Accumulate => Ok(()),
            Purpose::Evaluate => Err(Error::Dims { op, reason: "the network was built for evaluation only".into() }),
        }
    }

    pub(crate) fn accumulate(&mut self, scale: f64) -> Result<()> {
        if self.purpose != Purpose::Accumulate {
            let reason = "the network was not built with Purpose::Accumulate".into();
            return Err(Error::Dims { op: "accumulate", reason });
        }
        if self.micro_batches == 0 {
            self.device.zero(B::all_mut(&mut self.total))?;
        }
        self.micro_batches += 1;
        self.device.gradient_accumulate(sgd::Accumulate {
            scale,
            gradient: B::all(&self.parameters.gradient),
            total: B::all_mut(&mut self.total),
        })
    }

    pub(crate) fn update(&mut self, update: Update) -> Result<()> {
        self.require_training("update")?;
        let Self { device, parameters, statistics, .. } = self;
        let gradient = if self.micro_batches > 0 { &self.total } else { &parameters.gradient };
        device.upload(&[T::Wide::from_f64(update.rate)], B::all_mut(&mut self.rate))?;
        device.gradient_norm(sgd::Norm {
            gradient: B::all(gradient),
            loss: B::all(&self.loss),
            norm: B::all_mut(&mut self.norm),
            finite: B::all_mut(&mut self.finite),
        })?;
        device.sgd_update(sgd::Update {
            rate: B::all(&self.rate),
            momentum: update.momentum,
            weight_decay: update.weight_decay,
            finite: B::all(&self.finite),
            gradient: B::all(gradient),
            velocity: B::all_mut(&mut parameters.velocity),
            master: B::all_mut(&mut parameters.master),
            copy: B::all_mut(&mut parameters.copy),
        })?;
        device.bn_commit(bn_commit::Commit {
            momentum: self.bn_momentum,
            finite: B::all(&self.finite),
            batch: B::all(&statistics.batch),
            running: B::all_mut(&mut statistics.running),
        })?;
        self.micro_batches = 0;
        Ok(())
    }

    pub(crate) fn loss(&self) -> Result<Loss> {
        let host = self.read(B::all(&self.loss))?;
        Ok(Loss { loss: host[0].to_f64(), accuracy: host[1].to_f64() })
    }

    pub(crate) fn gradient_norm(&self) -> Result<(f64, bool)> {
        let norm = self.read(B::all(&self.norm))?;
        let mut finite = [0];
        self.device.download(B::all(&self.finite), &mut finite)?;
        Ok((norm[0].to_f64(), finite[0] == 1))
    }
}

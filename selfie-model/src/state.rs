//! What both networks have: device, parameters, statistics, and the end of a step.

use crate::layers::Tables;
use crate::memory_plan::Ledger;
use crate::metrics::MetricsBlock;
use crate::network::{Begin, Build};
use crate::recording::Recorded;
use crate::{Mode, ModelConfig, Parameters, Purpose, Statistics, Update, init};
use selfie_kernels::{Backend, Element, Error, Memory, Partials, Result, bn_commit, sgd};
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
    /// Sum of the micro-batches' gradients; empty where a step has one batch.
    total: Buffer<B, T::Wide>,
    /// Partial sums of the operation that just ran, until they are finalised.
    pub(crate) partial: Partials<B, T::Wide>,
    pub(crate) metrics: MetricsBlock<B, T::Wide>,
    /// What changes from step to step: seed and number of the first sample; bits of the learning rate.
    pub(crate) numbers: Buffer<B, u64>,
    seed: u64,
    rate: f64,
    /// What a training step does with a batch.
    pub(crate) step: Recorded<B, StepNumbers>,
}

/// The host's numbers in the calls of a training step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct StepNumbers {
    pub(crate) input: crate::input::Source,
    pub(crate) valid: usize,
    pub(crate) end: StepEnd,
}

/// What becomes of a batch's gradient.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum StepEnd {
    /// It is the step's.
    Update(Update),
    /// It is added to the step's, times this.
    Accumulate(f64),
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
            partial: Partials::within(ledger.alloc("partial", partial)?),
            metrics: MetricsBlock::new(ledger, purpose)?,
            numbers: ledger.alloc("numbers", 3)?,
            seed,
            rate: 0.0,
            step: Recorded::default(),
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

    /// Before the work on a batch: uploads what is different from batch to batch. A step's sums begin at zero.
    pub(crate) fn begin(&mut self, begin: Begin, first_sample: u64) -> Result<()> {
        if let Begin::Step { rate } = begin {
            self.rate = rate;
            if self.purpose == Purpose::Accumulate {
                self.device.zero(B::all_mut(&mut self.total))?;
                self.device.zero(B::all_mut(&mut self.metrics.step))?;
            }
        }
        self.device.upload(&[self.seed, first_sample, self.rate.to_bits()], B::all_mut(&mut self.numbers))
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

    /// That what becomes of the gradients is what the network was built for.
    pub(crate) fn require(&self, purpose: Purpose, op: &'static str) -> Result<()> {
        if self.purpose == purpose {
            return Ok(());
        }
        Err(Error::Dims { op, reason: format!("the network was built for Purpose::{:?}", self.purpose) })
    }

    /// The batch's share of gradient, loss and accuracy, added to the step's.
    pub(crate) fn accumulate(&mut self, scale: f64) -> Result<()> {
        self.device.gradient_accumulate(sgd::Accumulate {
            scale,
            gradient: B::all(&self.parameters.gradient),
            total: B::all_mut(&mut self.total),
        })?;
        let (gradient, total) = self.metrics.part_and_step();
        self.device.gradient_accumulate(sgd::Accumulate { scale, gradient, total })
    }

    pub(crate) fn update(&mut self, update: Update) -> Result<()> {
        self.require_training("update")?;
        let Self { device, parameters, statistics, metrics, .. } = self;
        let gradient = match self.purpose {
            Purpose::Accumulate => &self.total,
            Purpose::Train | Purpose::Evaluate => &parameters.gradient,
        };
        device.gradient_norm(sgd::Norm {
            gradient: B::all(gradient),
            metrics: B::all_mut(&mut metrics.step),
            finite: B::all_mut(&mut metrics.finite),
        })?;
        device.sgd_update(sgd::Update {
            rate: B::view(&self.numbers, 2..3),
            momentum: update.momentum,
            weight_decay: update.weight_decay,
            finite: B::all(&metrics.finite),
            gradient: B::all(gradient),
            velocity: B::all_mut(&mut parameters.velocity),
            master: B::all_mut(&mut parameters.master),
            copy: B::all_mut(&mut parameters.copy),
        })?;
        device.bn_commit(bn_commit::Commit {
            momentum: self.bn_momentum,
            finite: B::all(&metrics.finite),
            batch: B::all(&statistics.batch),
            running: B::all_mut(&mut statistics.running),
        })
    }
}

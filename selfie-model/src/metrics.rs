//! What a step says of itself, on the device: one block, read at once when the step is done.

use crate::memory_plan::Ledger;
use crate::state::Buffer;
use crate::{Loss, Metrics, Purpose};
use selfie_kernels::{Element, Memory, Result, View, ViewMut, Wide};

/// Losses of forward passes, and the metrics of a step.
#[derive(Debug)]
pub(crate) struct MetricsBlock<M: Memory, W: Element> {
    /// Mean loss and accuracy of the last micro-batch; empty where a step has only one, whose are the step's.
    part: Buffer<M, W>,
    /// Mean loss, accuracy, gradient norm, 1 or 0 for finite.
    pub(crate) step: Buffer<M, W>,
    /// The same flag, as the operations of an update read it.
    pub(crate) finite: Buffer<M, u32>,
}

impl<M: Memory, W: Wide> MetricsBlock<M, W> {
    pub(crate) fn new(ledger: &mut Ledger<M>, purpose: Purpose) -> Result<Self> {
        let part = if purpose == Purpose::Accumulate { 2 } else { 0 };
        Ok(Self {
            part: ledger.alloc("part", part)?,
            step: ledger.alloc("metrics", 4)?,
            finite: ledger.alloc("finite", 1)?,
        })
    }

    /// Where a forward pass leaves loss and accuracy.
    pub(crate) fn loss_mut(&mut self) -> ViewMut<'_, M, W> {
        match M::len(&self.part) {
            0 => M::view_mut(&mut self.step, 0..2),
            _ => M::all_mut(&mut self.part),
        }
    }

    fn loss(&self) -> View<'_, M, W> {
        match M::len(&self.part) {
            0 => M::view(&self.step, 0..2),
            _ => M::all(&self.part),
        }
    }

    /// A micro-batch's loss and accuracy, and the step's that they are added to.
    pub(crate) fn part_and_step(&mut self) -> (View<'_, M, W>, ViewMut<'_, M, W>) {
        (M::all(&self.part), M::view_mut(&mut self.step, 0..2))
    }

    /// Waits for the last forward pass.
    pub(crate) fn read_loss(&self, device: &M) -> Result<Loss> {
        let mut host = [W::default(); 2];
        device.download(self.loss(), &mut host)?;
        let [loss, accuracy] = host.map(Wide::to_f64);
        Ok(Loss { loss, accuracy })
    }

    /// Waits for the step.
    pub(crate) fn read(&self, device: &M) -> Result<Metrics> {
        let mut host = [W::default(); 4];
        device.download(M::all(&self.step), &mut host)?;
        let [loss, accuracy, gradient_norm, finite] = host.map(Wide::to_f64);
        Ok(Metrics { loss, accuracy, gradient_norm, finite: finite == 1.0 })
    }
}

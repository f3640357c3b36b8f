//! Classification loss: `-log softmax(logits)[label]`, mean over the batch, its accuracy and its gradient.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

pub(crate) use cpu::Tally;

use crate::error::{Result, expect_len, require};
use crate::{Cost, Element, Len, Memory, View, ViewMut};

/// Arguments of [`SoftmaxCrossEntropy::softmax_cross_entropy`].
#[derive(Debug)]
pub struct Args<'a, M: Memory, T: Element> {
    /// Images.
    pub n: usize,
    /// Images that count, the first ones; fewer than `n` only in evaluation.
    pub valid: usize,
    /// Classes.
    pub classes: usize,
    /// The accuracy looks at groups of so many neighbouring classes, which divide all: an answer is right if the label's logit
    /// is the greatest of its group. The loss is over all classes.
    pub rivals: usize,
    /// `[n, classes]`.
    pub logits: View<'a, M, T>,
    /// `[n]`, each below `classes` (checked where the labels enter; the kernel yields NaN for others).
    pub labels: View<'a, M, u32>,
    /// `[2]`: mean loss, accuracy (the first of equal maxima counts).
    pub loss: ViewMut<'a, M, T::Wide>,
    /// `[n, classes]`: gradient of the mean loss.
    pub dlogits: Option<ViewMut<'a, M, T>>,
}

/// The operation; see the module.
pub trait SoftmaxCrossEntropy<T: Element>: Memory {
    /// Loss, accuracy, and the gradient when asked for.
    ///
    /// # Errors
    /// Lengths or dims that do not fit.
    fn softmax_cross_entropy(&self, args: Args<'_, Self, T>) -> Result<()>;
}

impl<M: Memory, T: Element> Args<'_, M, T> {
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "softmax_cross_entropy";
        require(OP, self.n > 0 && self.classes > 0, || format!("n = {}, classes = {}", self.n, self.classes))?;
        require(OP, self.rivals > 0 && self.classes.is_multiple_of(self.rivals), || {
            format!("groups of {} do not divide {} classes", self.rivals, self.classes)
        })?;
        require(OP, (1..=self.n).contains(&self.valid), || format!("{} of {} images valid", self.valid, self.n))?;
        require(OP, self.dlogits.is_none() || self.valid == self.n, || "gradients of a padded batch".into())?;
        expect_len(OP, "logits", self.logits.len(), self.n * self.classes)?;
        expect_len(OP, "labels", self.labels.len(), self.n)?;
        expect_len(OP, "loss", self.loss.len(), 2)?;
        match &self.dlogits {
            Some(dlogits) => expect_len(OP, "dlogits", dlogits.len(), self.n * self.classes),
            None => Ok(()),
        }
    }

    /// The least that the call must do.
    pub(crate) fn cost(&self) -> Cost {
        let dlogits = self.dlogits.as_ref().map_or(0, Len::len);
        Cost::of(format!("{}x{}", self.n, self.classes))
            .moves::<T>(self.logits.len() + dlogits)
            .moves::<u32>(self.labels.len())
            .moves::<T::Wide>(self.loss.len())
    }
}

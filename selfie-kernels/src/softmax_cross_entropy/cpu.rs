//! Rows in fixed chunks; their losses are added in `f64`, in order.

use super::Args;
use crate::cpu::{rows, vectorize};
use crate::{Cpu, Element, Result, Wide};
use num_traits::{One, Zero};
use rayon::prelude::*;

/// Rows of a task.
const ROWS: usize = 64;

/// Loss and right answers of some rows.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tally {
    loss: f64,
    right: u64,
}

impl Tally {
    /// Counts a row of logits, which become its probabilities. Its answer is right if the target is the greatest of its group
    /// of `rivals` neighbours. A target that is no class makes everything NaN.
    #[inline(always)]
    pub(crate) fn count<W: Wide>(&mut self, row: &mut [W], target: usize, rivals: usize) {
        let Some(&logit) = row.get(target) else {
            self.loss = f64::NAN;
            return row.fill(W::nan());
        };
        // The first of equal maxima counts; a NaN among the rivals is a wrong answer.
        let group = target / rivals * rivals;
        let (before, after) = (&row[group..target], &row[target..group + rivals]);
        let right = before.iter().all(|&x| x < logit) && after.iter().all(|&x| x <= logit);
        let (max, sum) = rows::exponentials(row);
        let normalizer = sum.recip();
        for x in row.iter_mut() {
            *x = *x * normalizer;
        }
        self.loss += ((max - logit) + sum.ln()).to_f64();
        self.right += u64::from(right);
    }

    pub(crate) fn add(self, other: Self) -> Self {
        Self { loss: self.loss + other.loss, right: self.right + other.right }
    }

    /// Mean loss and accuracy over `rows` rows.
    pub(crate) fn mean<W: Wide>(self, rows: usize) -> [W; 2] {
        [self.loss, self.right as f64].map(|sum| W::from_f64(sum / rows as f64))
    }
}

pub(crate) fn softmax_cross_entropy<T: Element>(cpu: &Cpu, args: Args<'_, Cpu, T>) -> Result<()> {
    let Args { n, valid, classes, rivals, logits, labels, loss, dlogits } = args;
    let share = T::Wide::from_f64(1.0 / n as f64);
    // Gradients come with all rows valid.
    let (logits, labels) = (&logits[..valid * classes], &labels[..valid]);
    let mut gradients: Vec<Option<&mut [T]>> = match dlogits {
        Some(dlogits) => dlogits.chunks_mut(ROWS * classes).map(Some).collect(),
        None => labels.chunks(ROWS).map(|_| None).collect(),
    };
    let tallies: Vec<Tally> = cpu.install(|| {
        let tasks = gradients.par_iter_mut().zip(logits.par_chunks(ROWS * classes)).zip(labels.par_chunks(ROWS));
        let tallies = tasks.map(|((gradient, logits), labels)| {
            let (mut tally, mut row) = (Tally::default(), vec![T::Wide::zero(); classes]);
            vectorize(
                #[inline(always)]
                || {
                    for (i, (logits, &label)) in logits.chunks_exact(classes).zip(labels).enumerate() {
                        rows::widen(logits, &mut row);
                        tally.count(&mut row, label as usize, rivals);
                        let Some(gradient) = gradient else { continue };
                        if let Some(p) = row.get_mut(label as usize) {
                            *p = *p - T::Wide::one();
                        }
                        for (to, &from) in gradient[i * classes..].iter_mut().zip(&row) {
                            *to = T::narrow(from * share);
                        }
                    }
                },
            );
            tally
        });
        tallies.collect()
    });
    loss.copy_from_slice(&tallies.into_iter().fold(Tally::default(), Tally::add).mean(valid));
    Ok(())
}

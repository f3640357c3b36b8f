//! The source of randomness and how its words become numbers.

use std::sync::Arc;

/// What a random number is for. The numbering of purposes lives with the implementor of [`Draws`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Order of an epoch; `sample` is the epoch's number.
    EpochOrder,
    /// Crop of the padded image; `sample` is the global sample number, step * batch + slot.
    Crop,
    /// Horizontal flip; `sample` is the global sample number.
    Flip,
    /// Random resized crop; `sample` is the global sample number.
    ResizedCrop,
    /// Label subsets; `sample` is the class, plus an offset that separates subset, validation
    /// part and plain subsets.
    Labels,
    /// The synthetic world; `sample` is the number of the image, plus an offset for the split.
    Synthetic,
}

/// Counter-based randomness: the same arguments always give the same words.
pub trait Draws: Send + Sync {
    /// Four random words for (`purpose`, `sample`, `block`) under the seed of this source.
    fn words(&self, purpose: Purpose, sample: u64, block: u32) -> [u32; 4];

    /// Appends the order of the patches of `sample`: the global sample number in training, the image's index in evaluation.
    /// Nothing, unless the source is one of pretraining.
    fn append_order(&self, _sample: u64, _orders: &mut Vec<u32>) {}
}

/// Gives the source of a seed. Label subsets and the synthetic world carry seeds of their own, so
/// that they stay the same while the seed of the training varies.
pub type Seeded<'a> = &'a dyn Fn(u64) -> Arc<dyn Draws>;

/// The words of one (purpose, sample), taken one after the other.
pub(crate) struct Words<'a> {
    draws: &'a dyn Draws,
    purpose: Purpose,
    sample: u64,
    block: u32,
    buffer: [u32; 4],
    used: usize,
}

impl<'a> Words<'a> {
    pub(crate) fn new(draws: &'a dyn Draws, purpose: Purpose, sample: u64) -> Self {
        Self { draws, purpose, sample, block: 0, buffer: [0; 4], used: 4 }
    }

    pub(crate) fn next(&mut self) -> u32 {
        if self.used == 4 {
            self.buffer = self.draws.words(self.purpose, self.sample, self.block);
            self.block += 1;
            self.used = 0;
        }
        self.used += 1;
        self.buffer[self.used - 1]
    }

    /// Uniform in `0..bound`, without bias: the multiply-shift method with rejection of Lemire,
    /// "Fast Random Integer Generation in an Interval", 2019. `bound` is at least 1.
    pub(crate) fn below(&mut self, bound: u32) -> u32 {
        loop {
            let product = u64::from(self.next()) * u64::from(bound);
            let low = product as u32;
            // 2^32 mod bound words of the range are surplus; the division is rarely needed.
            if low >= bound || low >= bound.wrapping_neg() % bound {
                return (product >> 32) as u32;
            }
        }
    }

    /// Uniform in [0, 1), a multiple of 2^-32.
    pub(crate) fn unit(&mut self) -> f64 {
        f64::from(self.next()) * (1.0 / 4_294_967_296.0)
    }

    /// Uniform in [low, high).
    pub(crate) fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// Shuffles by Fisher and Yates. Holds for fewer than 2^32 items.
    pub(crate) fn shuffle(&mut self, items: &mut [u32]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u32 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::HashDraws;

    #[test]
    fn bounded_draws_are_uniform() {
        let draws = HashDraws(1);
        let mut words = Words::new(&draws, Purpose::Crop, 0);
        let mut counts = [0u32; 9];
        for _ in 0..90_000 {
            counts[words.below(9) as usize] += 1;
        }
        // Chi-squared with 8 degrees of freedom: 26.1 is exceeded once in 1,000 seeds; this seed is fixed.
        let chi: f64 = counts.iter().map(|&c| (f64::from(c) - 10_000.0).powi(2) / 10_000.0).sum();
        assert!(chi < 26.1, "{counts:?}");
    }

    /// A source whose words are given, to see which are rejected.
    struct Given(Vec<u32>);
    impl Draws for Given {
        fn words(&self, _: Purpose, _: u64, block: u32) -> [u32; 4] {
            std::array::from_fn(|i| self.0[block as usize * 4 + i])
        }
    }

    #[test]
    fn words_of_the_surplus_are_rejected() {
        // 2^32 mod 3 = 1: of the words, exactly 0 is surplus.
        let draws = Given(vec![0, 1, u32::MAX, 0x5555_5556]);
        let mut words = Words::new(&draws, Purpose::Crop, 0);
        assert_eq!([words.below(3), words.below(3), words.below(3)], [0, 2, 1]);
    }
}

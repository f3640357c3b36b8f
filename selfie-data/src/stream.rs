//! The order of training: an endless stream of seeded epoch permutations.

use std::sync::{Arc, Mutex, PoisonError};

use crate::draws::{Draws, Purpose, Words};
use crate::error::{Error, Result};

/// Permutations kept: a batch of the usual size spans two epochs at most, and workers are at most
/// a few batches apart.
const CACHED_EPOCHS: usize = 4;

/// The endless concatenation of one permutation of the items per epoch. Sample number
/// `s = step * batch + slot` is item `permutation(s / len)[s % len]`, so every batch is full,
/// nothing is dropped, and any position can be reached directly.
pub struct EpochStream {
    items: Vec<usize>,
    draws: Arc<dyn Draws>,
    cache: Mutex<Vec<(u64, Arc<[u32]>)>>,
}

impl EpochStream {
    /// A stream over `items`, the indices of a dataset.
    ///
    /// # Errors
    /// [`Error::Usage`] when there are no items, or 2^32 or more.
    pub fn new(items: Vec<usize>, draws: Arc<dyn Draws>) -> Result<Self> {
        if items.is_empty() || u32::try_from(items.len()).is_err() {
            return Err(Error::usage("number of images", items.len(), "1 to 2^32 - 1"));
        }
        Ok(Self { items, draws, cache: Mutex::new(Vec::new()) })
    }

    /// A stream over all `len` images of a dataset.
    ///
    /// # Errors
    /// As [`EpochStream::new`].
    pub fn over_all(len: usize, draws: Arc<dyn Draws>) -> Result<Self> {
        Self::new((0..len).collect(), draws)
    }

    /// Number of items: the length of an epoch.
    pub fn epoch_len(&self) -> usize {
        self.items.len()
    }

    /// The epoch that sample number `sample` belongs to, from 0.
    pub fn epoch(&self, sample: u64) -> u64 {
        sample / self.items.len() as u64
    }

    /// The dataset index of sample number `sample`.
    pub fn index(&self, sample: u64) -> usize {
        self.neighbour(sample, 0)
    }

    /// The item `ahead` places after `sample` in its epoch, cyclically: it stands in for an image
    /// that cannot be read.
    pub(crate) fn neighbour(&self, sample: u64, ahead: usize) -> usize {
        let order = self.permutation(self.epoch(sample));
        let place = (sample % order.len() as u64) as usize;
        self.items[order[(place + ahead) % order.len()] as usize]
    }

    fn permutation(&self, epoch: u64) -> Arc<[u32]> {
        // A panic cannot leave the cache half written, so a poisoned one is as good.
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, order)) = cache.iter().find(|(cached, _)| *cached == epoch) {
            return order.clone();
        }
        let mut order: Vec<u32> = (0..self.items.len() as u32).collect();
        Words::new(&*self.draws, Purpose::EpochOrder, epoch).shuffle(&mut order);
        let order: Arc<[u32]> = order.into();
        if cache.len() == CACHED_EPOCHS {
            cache.remove(0);
        }
        cache.push((epoch, order.clone()));
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::seeded;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_epoch_is_a_permutation(len in 1usize..200, seed: u64, epoch in 0u64..1_000_000) {
            let items: Vec<usize> = (0..len).map(|i| i * 3 + 1).collect();
            let stream = EpochStream::new(items.clone(), seeded(seed)).expect("not empty");
            let first = epoch * len as u64;
            let mut seen: Vec<_> = (0..len as u64).map(|i| stream.index(first + i)).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, items);
        }

        #[test]
        fn random_access_equals_sequential(len in 1usize..50, seed: u64, mut places in prop::collection::vec(0u64..2_000, 1..50)) {
            let sequential = EpochStream::over_all(len, seeded(seed)).expect("not empty");
            let all: Vec<_> = (0..2_000).map(|s| sequential.index(s)).collect();
            let random = EpochStream::over_all(len, seeded(seed)).expect("not empty");
            places.push(0);
            for place in places {
                prop_assert_eq!(random.index(place), all[place as usize]);
            }
        }
    }

    #[test]
    fn epochs_and_seeds_differ() {
        let order = |seed, epoch: u64| {
            let stream = EpochStream::over_all(100, seeded(seed)).expect("not empty");
            (0..100).map(|i| stream.index(epoch * 100 + i)).collect::<Vec<_>>()
        };
        assert_ne!(order(0, 0), order(0, 1));
        assert_ne!(order(0, 0), order(1, 0));
        assert_ne!(order(0, 0), (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn no_items_are_refused() {
        assert!(matches!(EpochStream::over_all(0, seeded(0)), Err(Error::Usage { .. })));
    }
}

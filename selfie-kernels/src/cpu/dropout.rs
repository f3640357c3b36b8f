//! The factors of [`Dropout`], many at a time.

use crate::{Cpu, Dropout, Philox, Wide};

/// Writes dropout's multipliers, 0 or `1 / (1 - rate)`, of an image's elements from `first` on; without dropout, ones.
#[inline(always)]
pub(crate) fn dropout_multipliers<W: Wide>(
    dropout: Option<Dropout<'_, Cpu>>,
    image: usize,
    first: usize,
    mut out: &mut [W],
) {
    /// Blocks side by side, so that Philox vectorises.
    const BLOCKS: usize = 16;
    let Some(dropout) = dropout.filter(|dropout| dropout.rate > 0.0) else { return out.fill(W::one()) };
    let philox = Philox { seed: dropout.rng[0] };
    let (purpose, sample) = (dropout.purpose(), dropout.rng[1].wrapping_add(image as u64));
    let keep = W::from_f64(dropout.factor());
    let (mut block, mut skip) = ((first / 4) as u32, first % 4);
    while !out.is_empty() {
        let mut drawn = [[W::zero(); 4]; BLOCKS];
        for i in 0..BLOCKS {
            let words = philox.words(purpose, sample, block.wrapping_add(i as u32));
            drawn[i] = words.map(|word| if Philox::unit(word) >= dropout.rate { keep } else { W::zero() });
        }
        let drawn = &drawn.as_flattened()[skip..];
        let (now, later) = out.split_at_mut(out.len().min(drawn.len()));
        now.copy_from_slice(&drawn[..now.len()]);
        (out, block, skip) = (later, block.wrapping_add(BLOCKS as u32), 0);
    }
}

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), keyed by a run's seed.
///
/// Counter-based: a draw is a function of (seed, purpose, sample, block) and of nothing else, never of a thread, a
/// rank or a device, so the order of the calls does not matter and any step can be repeated alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Philox {
    /// The run's seed.
    pub seed: u64,
}

/// What a draw is for. The numbers are part of every checkpoint's meaning: never renumber, only append.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum Purpose {
    /// Initial parameters; the sample is the FNV-1a hash of the tensor's name, the block its elements by fours.
    Init = 0,
    /// Permutation of an epoch; the sample is the epoch.
    EpochOrder = 1,
    /// Order of an image's patches, the first of which are hidden.
    Mask = 2,
    /// Offset of the random crop.
    Crop = 3,
    /// Horizontal flip.
    Flip = 4,
    /// Area, ratio and place of the random resized crop.
    ResizedCrop = 5,
    /// Label subsets.
    Labels = 6,
    /// The synthetic world.
    Synthetic = 7,
    /// First dropout site; site i is this number + i, so it stays last.
    Dropout = 64,
}

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

impl Philox {
    /// Four words for (purpose, sample, block); the counter is [sample low, sample high, block, purpose].
    #[inline(always)]
    pub fn words(&self, purpose: u32, sample: u64, block: u32) -> [u32; 4] {
        philox4x32_10(
            [sample as u32, (sample >> 32) as u32, block, purpose],
            [self.seed as u32, (self.seed >> 32) as u32],
        )
    }

    /// A number in (0, 1): the middle of one of 2^24 equal intervals, the same in every precision.
    #[inline(always)]
    pub fn unit(word: u32) -> f32 {
        ((word >> 8) as f32 + 0.5) * (1.0 / 16_777_216.0)
    }
}

/// The bijection itself: ten rounds over a 128-bit counter with a 64-bit key.
#[inline(always)]
pub(crate) fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let a = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let b = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of Random123's `kat_vectors`.
    #[test]
    fn known_answers() {
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32_10([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32_10([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }
}

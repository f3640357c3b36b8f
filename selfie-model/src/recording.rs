//! Work that is done step after step, as a device may record it.

use selfie_kernels::{Memory, Result};

/// A recording, and the host's numbers that went into its calls: with other numbers it begins anew.
#[derive(Debug)]
pub(crate) struct Recorded<M: Memory, K> {
    recording: Option<M::Recording>,
    made_with: Option<K>,
}

impl<M: Memory, K> Default for Recorded<M, K> {
    fn default() -> Self {
        Self { recording: None, made_with: None }
    }
}

impl<M: Memory, K: PartialEq> Recorded<M, K> {
    /// Does `work`, whose calls depend on `numbers` and on nothing else that changes.
    pub(crate) fn repeat(&mut self, device: &M, numbers: K, work: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.made_with.as_ref() != Some(&numbers) {
            self.recording = None;
        }
        self.made_with = Some(numbers);
        device.repeat(&mut self.recording, work)
    }
}

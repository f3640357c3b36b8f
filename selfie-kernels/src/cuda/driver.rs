//! What the backend asks of a CUDA driver, and nothing more.
//!
//! Two answer: the machine's own driver through cudarc ([`super::device`]), and the emulator, which runs the same kernels on
//! the CPU ([`super::emulator`]). Everything above this trait is the same for both.

use crate::Result;
use crate::profile::Timeline;
use std::fmt::Debug;

/// A place in the device's memory; 0 stands for none.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, bytemuck::NoUninit)]
pub(crate) struct Address(pub(crate) u64);

impl Address {
    /// What an optional argument is where it is missing.
    pub(crate) const NONE: Self = Self(0);

    /// Whether kernels may read it in chunks of 16 bytes.
    pub(crate) fn is_aligned(self) -> bool {
        self.0.is_multiple_of(16)
    }

    /// The place so many bytes on.
    pub(crate) fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// What a GPU is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Its name.
    pub name: String,
    /// Major and minor compute capability, as 90 for 9.0.
    pub capability: u32,
    /// Multiprocessors: how many blocks run side by side.
    pub multiprocessors: usize,
    /// Memory in all.
    pub memory_bytes: usize,
    /// Shared memory that one block may ask for.
    pub shared_bytes: usize,
}

/// A kernel call.
#[derive(Debug)]
pub(crate) struct Call<'a> {
    /// The kernel's source file, `<module>.cu`.
    pub(crate) module: &'static str,
    /// Its name there.
    pub(crate) kernel: &'a str,
    /// Blocks along x, y, z.
    pub(crate) grid: [u32; 3],
    /// Threads of a block.
    pub(crate) threads: u32,
    /// Shared memory that the kernel sizes at its launch.
    pub(crate) shared_bytes: u32,
    /// The kernel's one argument, a structure by value.
    pub(crate) args: &'a [u8],
}

/// A device with one queue of work. Calls are answered in their order; only [`Driver::stage`] runs beside it.
pub(crate) trait Driver: Debug + Send + Sync {
    /// What it is.
    fn facts(&self) -> &Facts;
    /// Memory that can still be had, in bytes.
    fn free_bytes(&self) -> Result<usize>;
    /// So many bytes, aligned to 256, of any content.
    fn alloc(&self, bytes: usize) -> Result<Address>;
    /// Gives back what [`Driver::alloc`] gave, after the work queued so far.
    fn free(&self, address: Address);
    /// Host to device; the host's bytes are free when it returns.
    fn upload(&self, host: &[u8], to: Address) -> Result<()>;
    /// Host to device beside the queue; the host's bytes are free when it returns. It comes after copies, and replays, that
    /// were called before, and before those that are called later.
    fn stage(&self, host: &[u8], to: Address) -> Result<()>;
    /// Device to host, after the work queued so far.
    fn download(&self, from: Address, host: &mut [u8]) -> Result<()>;
    /// Device to device.
    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()>;
    /// Sets every byte.
    fn fill(&self, to: Address, byte: u8, bytes: usize) -> Result<()>;
    /// Queues a kernel.
    fn launch(&self, call: &Call<'_>) -> Result<()>;
    /// Waits for everything queued.
    fn sync(&self) -> Result<()>;
    /// From here to [`Driver::end_recording`] kernels, copies on the device and fills are written down, not run. Uploads,
    /// downloads and allocations are bugs of the caller meanwhile.
    fn begin_recording(&self) -> Result<()>;
    /// What was written down.
    fn end_recording(&self) -> Result<Box<dyn Replay>>;
    /// Points of the queue, and when it passed them.
    fn timeline(&self) -> Box<dyn Timeline>;
    /// To be called before a replay, which may copy out of what was staged.
    fn before_replay(&self) -> Result<()> {
        Ok(())
    }
    /// To be called behind a replay.
    fn after_replay(&self) -> Result<()> {
        Ok(())
    }
}

/// Recorded work.
pub(crate) trait Replay: Debug + Send {
    /// Queues all of it.
    fn replay(&self) -> Result<()>;
}

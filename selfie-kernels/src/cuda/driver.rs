//! What the backend asks of a CUDA driver, and nothing more.
//!
//! Two answer: the machine's own driver through cudarc ([`super::device`]), and the emulator, which runs the same kernels on
//! the CPU ([`super::emulator`]). Everything above this trait is the same for both.

use super::modules::Form;
use crate::profile::Timeline;
use crate::{ConvDims, Error, Result};
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
    /// Its L2 cache.
    pub l2_bytes: usize,
    /// Whether kernels for compute capability 9.0, and for no other, may be launched: those with TMA and wgmma.
    pub hopper: bool,
}

/// A tensor of `bf16` in the device's memory, of which kernels copy boxes by TMA. Dimension 0 is contiguous; in shared memory
/// its rows are 128 bytes, swizzled.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Boxes<'a> {
    /// Of the first element; a multiple of 16.
    pub(crate) address: Address,
    /// Elements along each dimension.
    pub(crate) dims: &'a [usize],
    /// Bytes from one element to the next of each dimension but the first; multiples of 16.
    pub(crate) strides: &'a [usize],
    /// Elements of a box along each dimension.
    pub(crate) sides: &'a [usize],
}

impl Boxes<'_> {
    /// What every driver asks for, in the emulator too.
    ///
    /// # Errors
    /// [`Error::Launch`] when it cannot be copied by TMA.
    pub(crate) fn check(&self) -> Result<()> {
        let Self { address, dims, strides, sides } = *self;
        let whole = |bytes: &usize| bytes.is_multiple_of(16) && *bytes < 1 << 40;
        let fits = (1..=5).contains(&dims.len())
            && strides.len() + 1 == dims.len()
            && sides.len() == dims.len()
            && address.is_aligned()
            && strides.iter().all(whole)
            && dims.iter().all(|&dim| dim > 0 && dim <= 1 << 32)
            && sides.iter().all(|&side| side > 0 && side <= 256)
            && sides[0] == 64;
        if fits { Ok(()) } else { Err(self.refused("not a tensor that TMA copies")) }
    }

    pub(crate) fn refused(&self, reason: &str) -> Error {
        Error::Launch { kernel: "with copies by TMA".into(), reason: format!("{reason}: {self:?}") }
    }
}

/// Maps `[n, h, w, c]` of `bf16`, of which kernels copy rows of 64 channels by TMA, a pixel for each of so many windows one
/// after the other: the same one in each. In shared memory as [`Boxes`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Windows {
    /// Of the first element; a multiple of 16.
    pub(crate) address: Address,
    /// Whose windows they are: filters, square ones, are placed on the maps as a convolution places them.
    pub(crate) dims: ConvDims,
    /// Windows of a copy.
    pub(crate) count: usize,
}

impl Windows {
    /// What every driver asks for, in the emulator too.
    ///
    /// # Errors
    /// [`Error::Launch`] when they cannot be copied by TMA.
    pub(crate) fn check(&self) -> Result<()> {
        let Self { address, dims: d, count } = *self;
        let fits = address.is_aligned()
            && d.c.is_multiple_of(8)
            && (d.r, d.pad < d.r) == (d.s, true)
            && d.r <= 128
            && d.stride <= 8
            && (1..=256).contains(&count);
        if fits { Ok(()) } else { Err(self.refused("not windows that TMA copies")) }
    }

    pub(crate) fn refused(&self, reason: &str) -> Error {
        Error::Launch { kernel: "with copies by TMA".into(), reason: format!("{reason}: {self:?}") }
    }

    /// The first window's corner, along either side, and how far the last one's is from the side's last pixel.
    pub(crate) fn corners(&self) -> [i32; 2] {
        let ConvDims { r, pad, .. } = self.dims;
        [-(pad as i32), pad as i32 - (r as i32 - 1)]
    }

    /// Channels, width, height, images.
    pub(crate) fn sizes(&self) -> [u64; 4] {
        let ConvDims { n, h, w, c, .. } = self.dims;
        [c, w, h, n].map(|size| size as u64)
    }

    /// Bytes from one pixel, line and image to the next.
    pub(crate) fn strides(&self) -> [u64; 3] {
        let [c, w, h, _] = self.sizes();
        [2 * c, 2 * c * w, 2 * c * w * h]
    }
}

/// [`Boxes`] or [`Windows`] as kernels take them (`TensorMap` of `hopper.h`): the driver's own form.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, bytemuck::NoUninit)]
pub(crate) struct TensorMap(pub(crate) [u8; 128]);

/// When a kernel begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Beside the last blocks of the kernel before, where that is what comes before it. It waits for its end before it does
    /// anything (`KERNEL` of `device.h`): what is hidden is what a launch takes, and blocks take to begin.
    Early,
    /// When the kernel before has ended.
    InTurn,
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

/// A device with one queue of work. Calls are answered in their order; only [`Driver::stage`] runs beside it, and what lies
/// between [`Driver::branch`] and [`Driver::join`].
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
    /// Host to device beside the queue, replays too; the host's bytes are free when it returns. It comes after copies that
    /// were called before, and before those that are called later, but for recorded ones.
    fn stage(&self, host: &[u8], to: Address) -> Result<()>;
    /// Device to host, after the work queued so far.
    fn download(&self, from: Address, host: &mut [u8]) -> Result<()>;
    /// Device to device.
    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()>;
    /// Sets every byte.
    fn fill(&self, to: Address, byte: u8, bytes: usize) -> Result<()>;
    /// For a kernel's arguments; only where [`Facts::hopper`] says so.
    fn map_boxes(&self, boxes: &Boxes<'_>) -> Result<TensorMap>;
    /// As [`Driver::map_boxes`].
    fn map_windows(&self, windows: &Windows) -> Result<TensorMap>;
    /// Loads `<module>.cu`, if it is not loaded, and tells how; a launch does so too.
    fn load(&self, module: &'static str) -> Result<Form>;
    /// When a kernel begins, at the earliest; loads it.
    fn start(&self, module: &'static str, kernel: &str) -> Result<Start>;
    /// Queues a kernel.
    fn launch(&self, call: &Call<'_>) -> Result<()>;
    /// Kernels, copies on the device and fills from here to [`Driver::trunk`] run behind what was queued before, and beside
    /// those from there to [`Driver::join`]. A branch has no branches.
    fn branch(&self) -> Result<()>;
    /// Ends what [`Driver::branch`] began.
    fn trunk(&self) -> Result<()>;
    /// What is queued from here on comes behind both.
    fn join(&self) -> Result<()>;
    /// Waits for everything queued.
    fn sync(&self) -> Result<()>;
    /// From here to [`Driver::end_recording`] kernels, copies on the device and fills are written down, not run. Uploads,
    /// downloads and allocations are bugs of the caller meanwhile.
    fn begin_recording(&self) -> Result<()>;
    /// What was written down.
    fn end_recording(&self) -> Result<Box<dyn Replay>>;
    /// Points of the queue, and when it passed them.
    fn timeline(&self) -> Box<dyn Timeline>;
}

/// Recorded work.
pub(crate) trait Replay: Debug + Send {
    /// Queues all of it.
    fn replay(&self) -> Result<()>;
}

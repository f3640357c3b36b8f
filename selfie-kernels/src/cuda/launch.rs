//! The way from an operation's arguments to a kernel.

use super::driver::{Address, Call};
use super::{Cuda, CudaElement, Window, WindowMut};
use crate::error::require;
use crate::{Affine, Error, Grad, Result};

/// How many threads, and how they are grouped.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    /// Blocks along x, y, z.
    pub(crate) blocks: [usize; 3],
    /// Threads of a block, as the kernel's `KERNEL(..)` line has them.
    pub(crate) threads: usize,
    /// Shared memory that the kernel sizes at its launch (`DYN_SHARED`), in bytes.
    pub(crate) shared_bytes: usize,
}

impl Grid {
    /// A row of blocks without memory of their own.
    pub(crate) fn line(blocks: usize, threads: usize) -> Self {
        Self { blocks: [blocks, 1, 1], threads, shared_bytes: 0 }
    }
}

/// Channels of a block of `tile_sums.h`.
pub(crate) const TILE_CHANNELS: usize = 32;

/// Blocks of `threads` for one thread an item.
pub(crate) fn blocks(items: usize, threads: usize) -> usize {
    items.div_ceil(threads)
}

impl Cuda {
    /// Queues kernel `<name>_<T>` of `<module>.cu`. `args` is the kernel's structure, field for field, without gaps.
    pub(crate) fn launch<T: CudaElement>(
        &self,
        module: &'static str,
        name: &str,
        grid: Grid,
        args: &impl bytemuck::NoUninit,
    ) -> Result<()> {
        self.launch_plain(module, &format!("{name}_{}", T::SUFFIX), grid, args)
    }

    /// Queues a kernel that is the same for every element type.
    pub(crate) fn launch_plain(
        &self,
        module: &'static str,
        kernel: &str,
        grid: Grid,
        args: &impl bytemuck::NoUninit,
    ) -> Result<()> {
        let too_large = |what: &str, n: usize| Error::Launch { kernel: kernel.into(), reason: format!("{n} {what}") };
        let narrow = |what: &str, n: usize| u32::try_from(n).map_err(|_| too_large(what, n));
        let [x, y, z] = grid.blocks;
        if x * y * z == 0 {
            return Ok(()); // Nothing to compute; a driver refuses empty grids.
        }
        // What every device of compute capability 8.0 and later takes.
        if y > 65_535 || z > 65_535 || x > i32::MAX as usize {
            return Err(too_large("blocks", x.max(y).max(z)));
        }
        self.driver.launch(&Call {
            module,
            kernel,
            grid: [narrow("blocks", x)?, narrow("blocks", y)?, narrow("blocks", z)?],
            threads: narrow("threads", grid.threads)?,
            shared_bytes: narrow("bytes of shared memory", grid.shared_bytes)?,
            args: bytemuck::bytes_of(args),
        })
    }
}

impl Cuda {
    /// Pieces of the workspace of so many bytes, one after the other, each aligned to 256 bytes.
    ///
    /// # Errors
    /// [`Error::Dims`] when they do not fit.
    pub(crate) fn workspace_parts<const N: usize>(&self, op: &'static str, bytes: [usize; N]) -> Result<[Address; N]> {
        let mut end = 0;
        let parts = bytes.map(|bytes| {
            let start = end;
            end += bytes.next_multiple_of(256);
            self.workspace().offset(start)
        });
        require(op, end <= self.workspace_bytes(), || {
            format!("{end} bytes of scratch, more than the {} that there are", self.workspace_bytes())
        })?;
        Ok(parts)
    }
}

/// A [`Grad`] as kernels take it: `dy`, or `dz`, the raw value `x` and `coef`; `x` is null where it is plain.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::NoUninit)]
pub(crate) struct GradArgs {
    pub(crate) dy: Address,
    pub(crate) x: Address,
    pub(crate) coef: Address,
}

impl GradArgs {
    /// How kernels are called that are compiled for each kind.
    pub(crate) fn kind(&self) -> &'static str {
        if self.coef == Address::NONE { "plain" } else { "affine" }
    }
}

impl<T: CudaElement> From<Grad<'_, Cuda, T>> for GradArgs {
    fn from(grad: Grad<'_, Cuda, T>) -> Self {
        match grad {
            Grad::Plain(dy) => Self { dy: dy.into(), x: Address::NONE, coef: Address::NONE },
            Grad::Affine(Affine { dz, x, coef }) => Self { dy: dz.into(), x: x.into(), coef: coef.into() },
        }
    }
}

impl<S> From<Window<'_, S>> for Address {
    fn from(view: Window<'_, S>) -> Self {
        view.address()
    }
}

impl<S> From<WindowMut<'_, S>> for Address {
    fn from(view: WindowMut<'_, S>) -> Self {
        view.address()
    }
}

impl<V: Into<Address>> From<Option<V>> for Address {
    /// [`Address::NONE`] for a missing argument.
    fn from(view: Option<V>) -> Self {
        view.map_or(Address::NONE, Into::into)
    }
}

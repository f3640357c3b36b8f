//! An NVIDIA GPU as a device: memory, launches, and the recording of a step.
//!
//! An operation's kernels are `<op>/<op>.cu`, its launchers `<op>/cuda.rs`. Everything runs in one queue of the device, in
//! the order of the calls. No launch waits: errors of a kernel surface at a later call (`SELFIE_SYNC=1` waits after each
//! launch and names the kernel). From compute capability 9.0 on kernels begin beside the end of those before them
//! (`SELFIE_OVERLAP=0`: when those have ended).

mod arguments;
mod choices;
#[cfg(test)]
mod conformance;
#[cfg(test)]
mod conformance_sm90;
mod device;
mod driver;
mod element;
mod emulator;
mod launch;
mod modules;
mod probe;
mod stuck;

pub(crate) use arguments::{Access, ColumnSums, DropoutArgs, narrow};
pub use choices::{Choices, Misfit};
pub use device::gpus;
pub(crate) use driver::Address;
pub use driver::{Facts as GpuFacts, Start as KernelStart};
pub use element::CudaElement;
pub(crate) use launch::{GradArgs, Grid, TILE_CHANNELS, blocks};
pub use modules::Form as KernelForm;
pub use probe::{Probe, probe};

use crate::error::expect_len;
use crate::profile::Log;
use crate::{Call, Cost, Len, Memory, Profile, Result, Scalar};
use choices::Chooser;
pub(crate) use driver::{Boxes, TensorMap, Windows};
use driver::{Driver, Facts, Replay};
use parking_lot::{ReentrantMutex, ReentrantMutexGuard};
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of scratch that operations share, one after the other: partial sums of filters' gradients above all, of which the
/// largest (512 x 512 x 9 in f32) fits six times.
const WORKSPACE_BYTES: usize = 64 << 20;
/// Counters that blocks of one kernel share; zero between kernels.
const TICKETS: usize = 4096;

/// The CUDA backend: `f32` (no TF32) and `bf16` (stored; sums in `f32`).
#[derive(Clone)]
pub struct Cuda {
    driver: Arc<dyn Driver>,
    workspace: Arc<Allocation>,
    tickets: Arc<Allocation>,
    /// An operation may launch several kernels that share the workspace: one operation at a time.
    turn: Arc<ReentrantMutex<()>>,
    /// What was done, if that is noted.
    log: Option<Arc<Log>>,
    /// How kernels are chosen, if not by the rules alone.
    chooser: Option<Arc<Chooser>>,
}

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Cuda").field(&self.driver.facts().name).finish()
    }
}

impl Cuda {
    /// GPU number `ordinal` of this machine.
    ///
    /// # Errors
    /// [`crate::Error::Device`] with what is missing and the way out: no driver, an old one, no such GPU, one too old.
    /// [`crate::Error::Module`] when its driver takes no kernels.
    pub fn new(ordinal: usize) -> Result<Self> {
        let cuda = Self::over(Arc::new(device::Device::open(ordinal)?))?;
        cuda.kernel_form()?;
        Ok(cuda)
    }

    /// How the kernels get onto this device, as the smallest file shows, which is loaded.
    ///
    /// # Errors
    /// [`crate::Error::Module`] when its driver takes none.
    pub fn kernel_form(&self) -> Result<KernelForm> {
        self.driver.load(modules::SMALLEST)
    }

    /// When kernels begin on this device, as that of the smallest file shows, which is loaded.
    ///
    /// # Errors
    /// [`crate::Error::Module`] when its driver takes none.
    pub fn kernel_start(&self) -> Result<KernelStart> {
        self.driver.start(modules::SMALLEST, modules::ITS_KERNEL)
    }

    /// Loads all kernel files that operations use here, each of which would be loaded at its first launch; their names, and
    /// how each got onto the device.
    ///
    /// # Errors
    /// [`crate::Error::Module`] for one that the driver does not take.
    pub fn load_kernels(&self) -> Result<Vec<(&'static str, KernelForm)>> {
        modules::names(self.facts()).map(|name| Ok((name, self.driver.load(name)?))).collect()
    }

    /// The kernels on the CPU, by the library that `cuda/emulator/build` made: for tests.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when it cannot be loaded.
    #[doc(hidden)]
    pub fn emulated(library: &Path) -> Result<Self> {
        // Few, so that small shapes are cut as large ones are on a GPU.
        const MULTIPROCESSORS: usize = 3;
        Self::emulated_of(library, MULTIPROCESSORS)
    }

    /// The same, of so many multiprocessors.
    pub(crate) fn emulated_of(library: &Path, multiprocessors: usize) -> Result<Self> {
        Self::over(Arc::new(emulator::Emulator::open(library, multiprocessors)?))
    }

    fn over(driver: Arc<dyn Driver>) -> Result<Self> {
        let workspace = Arc::new(Allocation::new(&driver, WORKSPACE_BYTES)?);
        let tickets = Arc::new(Allocation::new(&driver, TICKETS * size_of::<u32>())?);
        driver.fill(tickets.address, 0, tickets.bytes)?;
        Ok(Self { driver, workspace, tickets, turn: Arc::default(), log: None, chooser: None })
    }

    /// What the device is.
    pub fn facts(&self) -> &Facts {
        self.driver.facts()
    }

    /// A tensor as kernels that use TMA take it; only where [`Facts::hopper`] says so.
    pub(crate) fn map_boxes(&self, boxes: &Boxes<'_>) -> Result<TensorMap> {
        self.driver.map_boxes(boxes)
    }

    /// The same for the windows of a convolution.
    pub(crate) fn map_windows(&self, windows: &Windows) -> Result<TensorMap> {
        self.driver.map_windows(windows)
    }

    /// To be held over an operation, and whatever else may go to a branch: what another thread queues must not.
    pub(crate) fn turn(&self) -> ReentrantMutexGuard<'_, ()> {
        self.turn.lock()
    }

    /// Does a pass, noted where that is asked for.
    pub(crate) fn pass<A>(
        &self,
        name: &'static str,
        args: A,
        cost: impl FnOnce(&A) -> Cost,
        work: impl FnOnce(A) -> Result<()>,
    ) -> Result<()> {
        match &self.log {
            None => work(args),
            Some(log) => log.note(name, cost(&args), || work(args)),
        }
    }

    /// Does both, one beside the other. Neither may touch what the other writes: no part of the workspace either, and no
    /// tickets.
    pub(crate) fn beside(&self, branch: impl FnOnce() -> Result<()>, trunk: impl FnOnce() -> Result<()>) -> Result<()> {
        self.driver.branch()?;
        let branched = branch();
        // Whatever becomes of a side, the two are joined again.
        let done = self.driver.trunk().and_then(|()| trunk());
        self.driver.join()?;
        branched.and(done)
    }

    /// Scratch of an operation, of any content; aligned to 256 bytes.
    pub(crate) fn workspace(&self) -> Address {
        self.workspace.address
    }

    /// Bytes of the workspace.
    pub(crate) fn workspace_bytes(&self) -> usize {
        self.workspace.bytes
    }

    /// `[4096]` counters that are zero, and that the kernel leaves zero.
    pub(crate) fn tickets(&self) -> Address {
        self.tickets.address
    }
}

macro_rules! launchers {
    ($($module:ident::$operation:ident { $($pass:ident($args:ident)),* $(; $joint:ident($of_both:ident))? })*) => {
        $(impl<T: CudaElement> crate::$module::$operation<T> for Cuda {
            $(fn $pass(&self, args: crate::$module::$args<'_, Self, T>) -> Result<()> {
                args.check()?;
                let _turn = self.turn();
                let launch = |args| crate::$module::cuda::$pass::<T>(self, args);
                self.pass(stringify!($pass), args, crate::$module::$args::cost, launch)
            })*
            $(fn $joint(&self, args: crate::$module::$of_both<'_, Self, T>) -> Result<()> {
                args.check()?;
                let _turn = self.turn();
                crate::$module::cuda::$joint::<T>(self, args)
            })?
        })*
    };
}
crate::passes::for_each_pass!(launchers);

impl<T: CudaElement> crate::Backend<T> for Cuda {}

/// Work that was done once; from the second time on, as it is replayed.
pub struct Recording(Mutex<Option<Box<dyn Replay>>>);

impl fmt::Debug for Recording {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Recording")
    }
}

impl Cuda {
    /// Writes `work` down.
    fn record(&self, work: impl FnOnce() -> Result<()>) -> Result<Box<dyn Replay>> {
        self.driver.begin_recording()?;
        let worked = work();
        let replay = self.driver.end_recording();
        worked?;
        replay
    }
}

/// Device memory, given back when dropped.
#[derive(Debug)]
struct Allocation {
    driver: Arc<dyn Driver>,
    address: Address,
    bytes: usize,
}

impl Allocation {
    fn new(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Self> {
        Ok(Self { driver: driver.clone(), address: driver.alloc(bytes)?, bytes })
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        self.driver.free(self.address);
    }
}

/// Owned storage on the device.
#[derive(Debug)]
pub struct Buffer<S> {
    /// None where there are no elements.
    allocation: Option<Allocation>,
    len: usize,
    kind: PhantomData<S>,
}

/// A read-only window of a [`Buffer`].
#[derive(Debug, Clone, Copy)]
pub struct Window<'a, S> {
    address: Address,
    len: usize,
    kind: PhantomData<&'a S>,
}

/// A writable window of a [`Buffer`].
#[derive(Debug)]
pub struct WindowMut<'a, S> {
    address: Address,
    len: usize,
    kind: PhantomData<&'a mut S>,
}

impl<S> Buffer<S> {
    fn place(&self, range: &Range<usize>) -> Address {
        assert!(range.start <= range.end && range.end <= self.len, "window {range:?} of {} elements", self.len);
        self.allocation
            .as_ref()
            .map_or(Address::NONE, |allocation| allocation.address.offset(range.start * size_of::<S>()))
    }
}

impl<S> Window<'_, S> {
    /// Of the first element.
    pub(crate) fn address(&self) -> Address {
        self.address
    }
}

impl<S> WindowMut<'_, S> {
    /// Of the first element.
    pub(crate) fn address(&self) -> Address {
        self.address
    }
}

impl<S> Len for Window<'_, S> {
    fn len(&self) -> usize {
        self.len
    }
}
impl<S> Len for WindowMut<'_, S> {
    fn len(&self) -> usize {
        self.len
    }
}

impl Memory for Cuda {
    type Buffer<S: Scalar> = Buffer<S>;
    type View<'a, S: Scalar> = Window<'a, S>;
    type ViewMut<'a, S: Scalar> = WindowMut<'a, S>;

    type Recording = Recording;

    fn describe(&self) -> String {
        let Facts { name, memory_bytes, capability, .. } = self.facts();
        format!("{name}, {:.1} GiB, sm_{capability}", *memory_bytes as f64 / (1u64 << 30) as f64)
    }

    /// What is free, and what this device holds already.
    fn capacity(&self) -> Option<usize> {
        self.driver.free_bytes().ok().map(|free| free.saturating_add(self.workspace.bytes))
    }

    fn workspace_bytes(&self, _largest: usize) -> usize {
        self.workspace.bytes
    }

    fn alloc<S: Scalar>(&self, len: usize) -> Result<Buffer<S>> {
        let _turn = self.turn();
        let bytes = len.saturating_mul(size_of::<S>());
        let allocation = match bytes {
            0 => None,
            bytes => {
                let allocation = Allocation::new(&self.driver, bytes)?;
                self.driver.fill(allocation.address, 0, bytes)?;
                Some(allocation)
            }
        };
        Ok(Buffer { allocation, len, kind: PhantomData })
    }

    fn len<S: Scalar>(buffer: &Buffer<S>) -> usize {
        buffer.len
    }

    fn view<S: Scalar>(buffer: &Buffer<S>, range: Range<usize>) -> Window<'_, S> {
        Window { address: buffer.place(&range), len: range.len(), kind: PhantomData }
    }

    fn view_mut<S: Scalar>(buffer: &mut Buffer<S>, range: Range<usize>) -> WindowMut<'_, S> {
        WindowMut { address: buffer.place(&range), len: range.len(), kind: PhantomData }
    }

    fn split_at<'a, S: Scalar>(view: Self::ViewMut<'a, S>, at: usize) -> (Self::ViewMut<'a, S>, Self::ViewMut<'a, S>) {
        assert!(at <= view.len, "split at {at} of {} elements", view.len);
        let second = view.address.offset(at * size_of::<S>());
        (
            WindowMut { address: view.address, len: at, kind: PhantomData },
            WindowMut { address: second, len: view.len - at, kind: PhantomData },
        )
    }

    fn upload<S: Scalar>(&self, host: &[S], device: WindowMut<'_, S>) -> Result<()> {
        expect_len("upload", "host", host.len(), device.len)?;
        if host.is_empty() {
            return Ok(());
        }
        self.driver.upload(bytemuck::cast_slice(host), device.address)
    }

    fn stage<S: Scalar>(&self, host: &[S], device: WindowMut<'_, S>) -> Result<()> {
        expect_len("stage", "host", host.len(), device.len)?;
        if host.is_empty() {
            return Ok(());
        }
        self.driver.stage(bytemuck::cast_slice(host), device.address)
    }

    fn copy<S: Scalar>(&self, from: Window<'_, S>, to: WindowMut<'_, S>) -> Result<()> {
        expect_len("copy", "from", from.len, to.len)?;
        let _turn = self.turn();
        if from.len == 0 {
            return Ok(());
        }
        self.driver.copy(from.address, to.address, from.len * size_of::<S>())
    }

    fn download<S: Scalar>(&self, device: Window<'_, S>, host: &mut [S]) -> Result<()> {
        expect_len("download", "host", host.len(), device.len)?;
        if host.is_empty() {
            return Ok(());
        }
        self.driver.download(device.address, bytemuck::cast_slice_mut(host))
    }

    fn zero<S: Scalar>(&self, device: WindowMut<'_, S>) -> Result<()> {
        let _turn = self.turn();
        if device.len == 0 {
            return Ok(());
        }
        self.driver.fill(device.address, 0, device.len * size_of::<S>())
    }

    fn sync(&self) -> Result<()> {
        self.driver.sync()
    }

    fn repeat(&self, recording: &mut Option<Recording>, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let _turn = self.turn();
        let work = || {
            if let Some(log) = &self.log {
                log.clear();
            }
            work()
        };
        match recording.take() {
            None => {
                // The first time loads kernels, and finds errors where they can be named.
                work()?;
                *recording = Some(Recording(Mutex::new(None)));
            }
            Some(Recording(kept)) => {
                let kept = kept.into_inner().unwrap_or_else(PoisonError::into_inner);
                let replay = match kept {
                    Some(replay) => replay,
                    None => self.record(work)?,
                };
                replay.replay()?;
                *recording = Some(Recording(Mutex::new(Some(replay))));
            }
        }
        Ok(())
    }
}

impl Profile for Cuda {
    fn profiled(&self) -> Self {
        Self { log: Some(Arc::new(Log::new(self.driver.timeline()))), ..self.clone() }
    }

    fn calls(&self) -> Result<Vec<Call>> {
        self.log.as_ref().map_or(Ok(Vec::new()), |log| log.calls())
    }
}

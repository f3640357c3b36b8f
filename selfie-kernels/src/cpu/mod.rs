//! The CPU as a device: host memory, a rayon pool, and the matrix engine that the heavy operations share.
//!
//! Work is cut into tasks by shape alone and never by the number of threads, so results are the same bits on any.

pub(crate) mod dropout;
pub(crate) mod engine;
pub(crate) mod lanes;
mod micro;
mod plan;
pub(crate) mod rows;
mod scratch;
mod simd;
pub(crate) mod sums;
mod table;
pub(crate) mod transform;
pub(crate) mod winograd;

/// Name of the instruction set that the CPU's kernels use here.
pub fn instruction_set() -> &'static str {
    simd::Level::detect().name()
}

pub use micro::{KernelShape, MicroKernel};
pub(crate) use plan::Reach;
pub(crate) use simd::{prefetch, vectorize};
pub use table::Table;

use crate::error::expect_len;
use crate::profile::{Log, Timeline};
use crate::{Call, Element, Error, Memory, Profile, Result, Scalar};
use std::convert::Infallible;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// The CPU backend: `f32`, `bf16` (stored; computed in `f32`) and `f64`.
#[derive(Debug, Clone)]
pub struct Cpu {
    pool: Arc<rayon::ThreadPool>,
    scratch: Arc<scratch::ScratchPool>,
    plans: Arc<plan::PlanCache>,
    /// What was done, if that is noted.
    log: Option<Arc<Log>>,
}

impl Cpu {
    /// A device of `threads` threads; 0 takes one per core.
    ///
    /// # Errors
    /// [`Error::Dims`] when the system refuses the threads.
    pub fn new(threads: usize) -> Result<Self> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("selfie-cpu-{i}"))
            .build()
            .map_err(|e| Error::Dims { op: "cpu", reason: format!("cannot start {threads} threads: {e}") })?;
        Ok(Self { pool: Arc::new(pool), scratch: Arc::default(), plans: Arc::default(), log: None })
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Bytes that the operations hold beside the buffers that they were given; at most [`Memory::workspace_bytes`].
    pub fn scratch_bytes(&self) -> usize {
        self.scratch.bytes()
    }

    /// Runs `work` on the device's threads: rayon iterators inside it use them. Many calls of operations inside one
    /// `install` save a hand-over each.
    pub fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.install(work)
    }
}

impl<T: Element> crate::Backend<T> for Cpu {}

impl Memory for Cpu {
    type Buffer<S: Scalar> = Vec<S>;
    type View<'a, S: Scalar> = &'a [S];
    type ViewMut<'a, S: Scalar> = &'a mut [S];
    /// A call costs next to nothing beside its work, so nothing is kept.
    type Recording = Infallible;

    fn describe(&self) -> String {
        format!("CPU, {} threads, {}", self.threads(), simd::Level::detect().name())
    }

    fn capacity(&self) -> Option<usize> {
        None
    }

    fn workspace_bytes(&self, largest: usize) -> usize {
        scratch::most_bytes(self.threads(), largest)
    }

    fn alloc<S: Scalar>(&self, len: usize) -> Result<Vec<S>> {
        let bytes = len.saturating_mul(size_of::<S>());
        let refused = || Error::OutOfMemory { bytes, device: "the CPU".into() };
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(len).map_err(|_| refused())?;
        buffer.resize(len, S::default());
        Ok(buffer)
    }

    fn len<S: Scalar>(buffer: &Vec<S>) -> usize {
        buffer.len()
    }

    fn view<S: Scalar>(buffer: &Vec<S>, range: Range<usize>) -> &[S] {
        &buffer[range]
    }

    fn view_mut<S: Scalar>(buffer: &mut Vec<S>, range: Range<usize>) -> &mut [S] {
        &mut buffer[range]
    }

    fn split_at<'a, S: Scalar>(view: Self::ViewMut<'a, S>, at: usize) -> (Self::ViewMut<'a, S>, Self::ViewMut<'a, S>) {
        view.split_at_mut(at)
    }

    fn upload<S: Scalar>(&self, host: &[S], device: &mut [S]) -> Result<()> {
        expect_len("upload", "host", host.len(), device.len())?;
        device.copy_from_slice(host);
        Ok(())
    }

    fn stage<S: Scalar>(&self, host: &[S], device: &mut [S]) -> Result<()> {
        expect_len("stage", "host", host.len(), device.len())?;
        device.copy_from_slice(host);
        Ok(())
    }

    fn copy<S: Scalar>(&self, from: &[S], to: &mut [S]) -> Result<()> {
        expect_len("copy", "from", from.len(), to.len())?;
        to.copy_from_slice(from);
        Ok(())
    }

    fn download<S: Scalar>(&self, device: &[S], host: &mut [S]) -> Result<()> {
        expect_len("download", "host", host.len(), device.len())?;
        host.copy_from_slice(device);
        Ok(())
    }

    fn zero<S: Scalar>(&self, device: &mut [S]) -> Result<()> {
        device.fill(S::default());
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn repeat(&self, _recording: &mut Option<Infallible>, work: impl FnOnce() -> Result<()>) -> Result<()> {
        if let Some(log) = &self.log {
            log.clear();
        }
        work()
    }
}

/// Calls are done when they return.
#[derive(Debug, Default)]
struct Clock(Mutex<Vec<Instant>>);

impl Clock {
    fn with_marks<R>(&self, use_marks: impl FnOnce(&mut Vec<Instant>) -> R) -> R {
        use_marks(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Timeline for Clock {
    fn mark(&self) -> Result<()> {
        self.with_marks(|marks| marks.push(Instant::now()));
        Ok(())
    }

    fn clear(&self) {
        self.with_marks(Vec::clear);
    }

    fn seconds(&self) -> Result<Vec<f64>> {
        Ok(self.with_marks(|marks| marks.iter().map(|mark| (*mark - marks[0]).as_secs_f64()).collect()))
    }
}

impl Profile for Cpu {
    fn profiled(&self) -> Self {
        Self { log: Some(Arc::new(Log::new(Box::<Clock>::default()))), ..self.clone() }
    }

    fn calls(&self) -> Result<Vec<Call>> {
        self.log.as_ref().map_or(Ok(Vec::new()), |log| log.calls())
    }
}

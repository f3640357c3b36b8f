use crate::{Result, Scalar};
use std::fmt::Debug;
use std::ops::Range;

/// Number of elements of a view.
pub trait Len {
    /// Number of elements.
    fn len(&self) -> usize;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<S> Len for &[S] {
    fn len(&self) -> usize {
        <[S]>::len(self)
    }
}
impl<S> Len for &mut [S] {
    fn len(&self) -> usize {
        <[S]>::len(self)
    }
}

/// A read-only window of a buffer of `M`.
pub type View<'a, M, S> = <M as Memory>::View<'a, S>;
/// A writable window of a buffer of `M`.
pub type ViewMut<'a, M, S> = <M as Memory>::ViewMut<'a, S>;

/// Where numbers live: allocation, windows, copies from and to the host.
///
/// **Order.** All calls but [`Memory::stage`] stand in one queue, operations included: each sees what those before it wrote.
/// They may return before the device is done; [`Memory::download`] and [`Memory::sync`] wait.
///
/// **Host memory** is the caller's again when a call returns: what was given to [`Memory::upload`] and [`Memory::stage`] has been
/// read, what was given to [`Memory::download`] is written.
pub trait Memory: Sized + Send + Sync + 'static {
    /// Owned storage of `S` on this device.
    type Buffer<S: Scalar>: Debug + Send + Sync;
    /// A read-only window.
    type View<'a, S: Scalar>: Copy + Debug + Len + Send + Sync;
    /// A writable window.
    type ViewMut<'a, S: Scalar>: Debug + Len + Send;
    /// What the device keeps of a piece of work so as to do it again, see [`Memory::repeat`].
    type Recording: Debug + Send + Sync;

    /// The device in words, for logs and errors.
    fn describe(&self) -> String;
    /// Bytes that a network may take here, [`Memory::workspace_bytes`] included; `None` where only the system knows.
    fn capacity(&self) -> Option<usize>;
    /// Bytes that the operations need at most beside the buffers that they are given, whatever the batch, for a network
    /// whose largest parameter takes `largest` bytes in the master copy: a row of its memory plan. A device takes them
    /// when it is opened or as they are needed.
    fn workspace_bytes(&self, largest: usize) -> usize;
    /// `len` zeroed elements.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`] when the device has not as much left.
    fn alloc<S: Scalar>(&self, len: usize) -> Result<Self::Buffer<S>>;
    /// Elements of a buffer.
    fn len<S: Scalar>(buffer: &Self::Buffer<S>) -> usize;
    /// Window of a buffer; the range must lie inside (an out-of-range window is a bug of the caller and panics).
    fn view<S: Scalar>(buffer: &Self::Buffer<S>, range: Range<usize>) -> Self::View<'_, S>;
    /// Writable window of a buffer; the range must lie inside.
    fn view_mut<S: Scalar>(buffer: &mut Self::Buffer<S>, range: Range<usize>) -> Self::ViewMut<'_, S>;
    /// Two disjoint windows of one: `[..at]` and `[at..]`.
    fn split_at<'a, S: Scalar>(view: Self::ViewMut<'a, S>, at: usize) -> (Self::ViewMut<'a, S>, Self::ViewMut<'a, S>);
    /// Whole buffer, read-only.
    fn all<S: Scalar>(buffer: &Self::Buffer<S>) -> Self::View<'_, S> {
        Self::view(buffer, 0..Self::len(buffer))
    }
    /// Whole buffer, writable.
    fn all_mut<S: Scalar>(buffer: &mut Self::Buffer<S>) -> Self::ViewMut<'_, S> {
        let len = Self::len(buffer);
        Self::view_mut(buffer, 0..len)
    }
    /// Host to device; lengths must agree.
    ///
    /// # Errors
    /// [`crate::Error::Length`] when they don't.
    fn upload<S: Scalar>(&self, host: &[S], device: Self::ViewMut<'_, S>) -> Result<()>;
    /// Host to device beside the queue, while earlier calls may still be at work; lengths must agree. It comes after the
    /// [`Memory::copy`]s out of the buffer that were called before, and before those that are called later; with other
    /// calls on the buffer, and with all inside of [`Memory::repeat`], it has no order: a buffer that is staged into is only
    /// ever copied from, and not in there.
    ///
    /// # Errors
    /// [`crate::Error::Length`] when the lengths differ.
    fn stage<S: Scalar>(&self, host: &[S], device: Self::ViewMut<'_, S>) -> Result<()>;
    /// From one buffer to another on the device; lengths must agree.
    ///
    /// # Errors
    /// [`crate::Error::Length`] when they don't.
    fn copy<S: Scalar>(&self, from: Self::View<'_, S>, to: Self::ViewMut<'_, S>) -> Result<()>;
    /// Device to host, after everything called before.
    ///
    /// # Errors
    /// [`crate::Error::Length`] when the lengths differ.
    fn download<S: Scalar>(&self, device: Self::View<'_, S>, host: &mut [S]) -> Result<()>;
    /// Sets every element to zero.
    ///
    /// # Errors
    /// Those of the device.
    fn zero<S: Scalar>(&self, device: Self::ViewMut<'_, S>) -> Result<()>;
    /// Waits until everything called so far is done.
    ///
    /// # Errors
    /// Those of the calls it waited for.
    fn sync(&self) -> Result<()>;
    /// Does `work`, which calls operations, [`Memory::copy`] and [`Memory::zero`] of this device and nothing else of it. The
    /// device may keep in `recording`, `None` at first, what was called, and later do that again instead of calling `work`.
    ///
    /// So whatever is given with the same recording must make the same calls with the same arguments on the same buffers
    /// and leave no other trace on the host; what differs from one time to the next is read from the device's memory. The
    /// buffers must live as long as the recording. No `work` calls `repeat`.
    ///
    /// A CPU just works. A GPU works plainly the first time, when kernels are loaded, the second time captures the calls
    /// as a graph, and launches that from then on.
    ///
    /// # Errors
    /// Those of the calls; `recording` is `None` then.
    fn repeat(&self, recording: &mut Option<Self::Recording>, work: impl FnOnce() -> Result<()>) -> Result<()>;
}

//! Working memory that is taken, used and given back, so that a step allocates nothing once the first one has run.

use super::winograd::KEPT_BYTES;
use crate::Scalar;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// One cache line; the unit of allocation, so that every buffer is aligned to it.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u64; 8]);

/// A thread's tiles, transformed squares and products, with what reuse by larger buffers leaves over.
const THREAD_BYTES: usize = 4 << 20;

/// Parts of a filter's gradient, each with sums of its own, and the packed and transformed filter, which takes less than two.
const FILTERS: usize = 16 + 2;

/// Sums of a small filter's gradient by minimal filtering: tasks of 64 by 64, of which there are at most 32, by 16 slices.
const SLICED_BYTES: usize = 32 * 16 * (64 * 64) * size_of::<f32>();

/// What the operations take here at most for a network whose largest parameter takes `largest` bytes: nothing in it grows
/// with the batch.
pub(crate) fn most_bytes(threads: usize, largest: usize) -> usize {
    (KEPT_BYTES + SLICED_BYTES + threads * THREAD_BYTES).saturating_add(FILTERS.saturating_mul(largest))
}

/// Buffers that are not in use.
#[derive(Debug, Default)]
pub(crate) struct ScratchPool {
    free: Mutex<Vec<Vec<Line>>>,
    /// Of all buffers, on loan or not.
    bytes: AtomicUsize,
}

/// A buffer on loan; its content is left over from earlier uses.
pub(crate) struct Scratch<'a, S: Scalar> {
    pool: &'a ScratchPool,
    lines: Vec<Line>,
    len: usize,
    element: std::marker::PhantomData<S>,
}

impl ScratchPool {
    /// `len` elements with arbitrary content, aligned to a cache line. Takes the smallest buffer that is large enough.
    pub(crate) fn take<S: Scalar>(&self, len: usize) -> Scratch<'_, S> {
        let wanted = (len * size_of::<S>()).div_ceil(size_of::<Line>());
        let mut lines = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            let place = free.partition_point(|buffer| buffer.len() < wanted).min(free.len().saturating_sub(1));
            if free.is_empty() { Vec::new() } else { free.remove(place) }
        };
        if lines.len() < wanted {
            // Not `resize`: the old content would be copied for nothing.
            self.bytes.fetch_sub(size_of_val(&lines[..]), Ordering::Relaxed);
            drop(std::mem::take(&mut lines));
            lines = vec![bytemuck::Zeroable::zeroed(); wanted];
            self.bytes.fetch_add(size_of_val(&lines[..]), Ordering::Relaxed);
        }
        Scratch { pool: self, lines, len, element: std::marker::PhantomData }
    }

    /// Of all buffers.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl<S: Scalar> Drop for Scratch<'_, S> {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        let mut free = self.pool.free.lock().unwrap_or_else(PoisonError::into_inner);
        let place = free.partition_point(|buffer| buffer.len() < lines.len());
        free.insert(place, lines);
    }
}

impl<S: Scalar> Deref for Scratch<'_, S> {
    type Target = [S];
    fn deref(&self) -> &[S] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl<S: Scalar> DerefMut for Scratch<'_, S> {
    fn deref_mut(&mut self) -> &mut [S] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_reused_and_never_shared() {
        let pool = ScratchPool::default();
        let mut a = pool.take::<f32>(100);
        let mut b = pool.take::<u32>(7);
        a.fill(1.0);
        b.fill(3);
        assert!(a.iter().all(|&x| x == 1.0) && b.iter().all(|&x| x == 3));
        assert_eq!((a.len(), b.len()), (100, 7));
        let place = a.as_ptr() as usize;
        assert_eq!(place % 64, 0);
        drop(a);
        drop(b);
        assert_eq!(pool.take::<f64>(50).as_ptr() as usize, place, "the large buffer serves the large request");
        assert_eq!(pool.bytes(), (7 + 1) * 64);
        pool.take::<u8>(1000);
        assert_eq!(pool.bytes(), (16 + 1) * 64, "a buffer that is too small makes way for the larger one");
    }
}

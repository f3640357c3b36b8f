//! Short runs of channels as arrays of a fixed length.
//!
//! An epilogue sees 32 columns at a time, fewer than what the compiler's own vector loop handles in one round (four
//! vectors), so a plain loop would end in its scalar remainder: 85 cycles for a vector instead of 10. Loops over arrays of
//! [`LANES`] elements become vector instructions without one.

use crate::{Element, Wide};

/// Elements of a block: one AVX-512 register of `f32`.
pub(crate) const LANES: usize = 16;

/// A block in the type of computation.
pub(crate) type Block<W> = [W; LANES];

/// Element by element: `map!(|j| a[j] + b[j])`.
macro_rules! map {
    (|$j:ident| $value:expr) => {
        $crate::cpu::lanes::fill(
            #[inline(always)]
            |$j| $value,
        )
    };
}
pub(crate) use map;

// Loops, not `std::array::from_fn` or `map`: the compiler may leave those functions of their own, without the vector
// instructions (a fifth of a profile of pooling and `grad_join`). The rest at the end is copied in line: out of line the
// arrays fell apart into scalars (`grad_join` in f32: 51 ms in place of 21).

/// Elements `start..start + LANES` as they are; the default beyond the end.
#[inline(always)]
pub(crate) fn chunk<S: Copy + Default>(from: &[S], start: usize) -> [S; LANES] {
    match from[start..].first_chunk() {
        Some(chunk) => *chunk,
        None => {
            let mut chunk = [S::default(); LANES];
            chunk[..from.len() - start].copy_from_slice(&from[start..]);
            chunk
        }
    }
}

/// Writes elements `start..start + LANES`, those before the end.
#[inline(always)]
pub(crate) fn set_chunk<S: Copy>(to: &mut [S], start: usize, values: &[S; LANES]) {
    match to[start..].first_chunk_mut() {
        Some(chunk) => *chunk = *values,
        None => {
            let rest = to.len() - start;
            to[start..].copy_from_slice(&values[..rest]);
        }
    }
}

/// Elements `start..start + LANES`, widened; zero beyond the end.
#[inline(always)]
pub(crate) fn load<T: Element>(from: &[T], start: usize) -> Block<T::Wide> {
    let chunk = chunk(from, start);
    map!(|j| chunk[j].widen())
}

/// Rounds and writes elements `start..start + LANES`, those before the end; returns what was stored.
#[inline(always)]
pub(crate) fn store<T: Element>(to: &mut [T], start: usize, values: &Block<T::Wide>) -> Block<T::Wide> {
    let mut rounded = [T::default(); LANES];
    for j in 0..LANES {
        rounded[j] = T::narrow(values[j]);
    }
    set_chunk(to, start, &rounded);
    map!(|j| rounded[j].widen())
}

/// What [`map!`] calls.
#[inline(always)]
pub(crate) fn fill<W: Wide>(value: impl Fn(usize) -> W) -> Block<W> {
    let mut block = [W::zero(); LANES];
    for (j, to) in block.iter_mut().enumerate() {
        *to = value(j);
    }
    block
}

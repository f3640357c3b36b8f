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

/// Where in a row a block begins.
///
/// Whole blocks and the shorter one at the end are types of their own, so that [`blocks!`] compiles its body for each. One
/// body for both copies every block by a call of `memcpy` with a length, and keeps it in memory in between: the data
/// gradient of a 256 to 64 channel 1x1 convolution took 65 ms in place of 47 (64 images of 32 pixels, one thread, Zen 4).
pub(crate) trait Place: Copy {
    /// Where.
    fn start(self) -> usize;
    /// The elements from here as they are; the default beyond the end.
    fn chunk<S: Copy + Default>(self, from: &[S]) -> [S; LANES];
    /// Writes the elements from here, those before the end.
    fn set_chunk<S: Copy>(self, to: &mut [S], values: &[S; LANES]);

    /// The elements from here, widened; zero beyond the end.
    #[inline(always)]
    fn load<T: Element>(self, from: &[T]) -> Block<T::Wide> {
        let chunk = self.chunk(from);
        map!(|j| chunk[j].widen())
    }

    /// Rounds and writes the elements from here, those before the end; returns what was stored.
    #[inline(always)]
    fn store<T: Element>(self, to: &mut [T], values: &Block<T::Wide>) -> Block<T::Wide> {
        let mut rounded = [T::default(); LANES];
        for j in 0..LANES {
            rounded[j] = T::narrow(values[j]);
        }
        self.set_chunk(to, &rounded);
        map!(|j| rounded[j].widen())
    }
}

/// A block of which all elements are there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Whole(pub(crate) usize);

/// The block at the end, fewer than [`LANES`] elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rest(pub(crate) usize);

impl Place for Whole {
    #[inline(always)]
    fn start(self) -> usize {
        self.0
    }

    #[inline(always)]
    fn chunk<S: Copy + Default>(self, from: &[S]) -> [S; LANES] {
        *from[self.0..].first_chunk().expect("a whole block")
    }

    #[inline(always)]
    fn set_chunk<S: Copy>(self, to: &mut [S], values: &[S; LANES]) {
        *to[self.0..].first_chunk_mut().expect("a whole block") = *values;
    }
}

impl Place for Rest {
    #[inline(always)]
    fn start(self) -> usize {
        self.0
    }

    #[inline(always)]
    fn chunk<S: Copy + Default>(self, from: &[S]) -> [S; LANES] {
        let mut chunk = [S::default(); LANES];
        chunk[..from.len() - self.0].copy_from_slice(&from[self.0..]);
        chunk
    }

    #[inline(always)]
    fn set_chunk<S: Copy>(self, to: &mut [S], values: &[S; LANES]) {
        let rest = to.len() - self.0;
        to[self.0..].copy_from_slice(&values[..rest]);
    }
}

/// Runs a body for each block of a row of `len` elements: `blocks!(len, |at| { at.store(y, &at.load(x)); })`.
macro_rules! blocks {
    ($len:expr, |$at:ident| $body:expr) => {{
        let len: usize = $len;
        let whole = len - len % $crate::cpu::lanes::LANES;
        for start in (0..whole).step_by($crate::cpu::lanes::LANES) {
            let $at = $crate::cpu::lanes::Whole($crate::cpu::lanes::opaque(start));
            $body
        }
        if whole < len {
            let $at = $crate::cpu::lanes::Rest(whole);
            $body
        }
    }};
}
pub(crate) use blocks;

/// The number itself, by a way that the compiler cannot see through.
///
/// Otherwise it takes the 16 elements of a block for 16 arrays and vectorises over the blocks, by gathers: the loading of a
/// tile took four times as long.
#[inline(always)]
pub(crate) fn opaque(mut start: usize) -> usize {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    // SAFETY: no instruction at all; the register keeps its value.
    unsafe {
        std::arch::asm!("/* {0} */", inout(reg) start, options(pure, nomem, nostack, preserves_flags));
    }
    start
}

// A loop, not `std::array::from_fn` or `map`: the compiler may leave those functions of their own, without the vector
// instructions (a fifth of a profile of pooling and `grad_join`).

/// What [`map!`] calls.
#[inline(always)]
pub(crate) fn fill<W: Wide>(value: impl Fn(usize) -> W) -> Block<W> {
    let mut block = [W::zero(); LANES];
    for (j, to) in block.iter_mut().enumerate() {
        *to = value(j);
    }
    block
}

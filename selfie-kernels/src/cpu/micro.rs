//! The inner loops that all matrix products are made of, for each instruction set.
//!
//! `rows`: a few rows of a row-major left operand times a packed panel of the right one. The left elements are broadcast
//! from where they lie, so a convolution needs no im2col: each tap only names other rows. `outer`: sums of outer products
//! of rows, for the gradients of filters, where neither operand needs packing.
//!
//! With AVX-512, 8 rows by 2 vectors hold 16 sums in registers: 16 multiply-adds for 10 loads, twice what hides their
//! latency on two ports.

use super::simd::Level;
use super::winograd::{Square, Transform, squares};

/// Rows of the largest `rows` kernel.
pub(crate) const MAX_ROWS: usize = 8;

/// One tap of a convolution for the rows of a micro tile: which slice of the panel, and where each row's elements begin.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tap {
    /// Number of the slice of the panel, `kc` by the panel's width.
    pub(crate) slice: u32,
    /// First element of each row in the tile.
    pub(crate) rows: [u32; MAX_ROWS],
}

/// Where a pair of rows begins in the two tiles of an `outer` call.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Pair {
    /// First element of the row whose elements are broadcast.
    pub(crate) left: u32,
    /// First element of the row that is loaded as vectors.
    pub(crate) right: u32,
}

/// Sizes of the kernels on this machine, in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelShape {
    /// Elements of a vector; a panel is one or two vectors wide.
    pub lanes: usize,
    /// Rows of a micro tile of `rows`, at most 8.
    pub rows: usize,
    /// Left elements of `outer`, at most 8.
    pub outer: usize,
}

/// The inner loops for a type of computation; sealed, implemented for `f32` and `f64`.
#[allow(private_interfaces)]
pub trait MicroKernel: Sized {
    /// Sizes on this machine.
    fn shape() -> KernelShape;

    /// `out[i][j] = sum over taps, k of a[tap.rows[i] + k] * b[(tap.slice * kc + k) * width + j]`, for all rows of the
    /// micro tile and `width = vectors * lanes` columns; `out` is dense.
    ///
    /// # Safety
    /// `a` must be valid for `kc` reads from each tap's row offset, `b` for every slice named, `out` for
    /// `rows * width` writes; `vectors` is 1 or 2.
    #[doc(hidden)]
    unsafe fn rows(vectors: usize, taps: &[Tap], kc: usize, a: *const Self, b: *const Self, out: *mut Self);

    /// `out[i * stride + j] += sum over pairs of a[pair.left + i] * b[pair.right + j]` for `outer` by
    /// `vectors * lanes` elements.
    ///
    /// # Safety
    /// `a` and `b` must be valid for these reads, `out` for these reads and writes; `vectors` is 1 or 2.
    #[doc(hidden)]
    unsafe fn outer(vectors: usize, pairs: &[Pair], a: *const Self, b: *const Self, out: *mut Self, stride: usize);

    /// Winograd's transforms of `len` elements, whole vectors of them, of each square's rows.
    ///
    /// # Safety
    /// `from` must be valid for these reads from each place that a square reads, `to` for the writes.
    #[doc(hidden)]
    unsafe fn squares(transform: Transform, squares: &[Square], len: usize, from: *const Self, to: *mut Self);
}

/// A register of numbers.
pub(super) trait Lanes: Copy {
    type S: Copy;
    const N: usize;
    /// # Safety
    /// The instruction set must be there.
    unsafe fn zero() -> Self;
    /// # Safety
    /// As `zero`, and one element is read.
    unsafe fn splat(from: *const Self::S) -> Self;
    /// # Safety
    /// As `zero`, and `N` elements are read.
    unsafe fn load(from: *const Self::S) -> Self;
    /// # Safety
    /// As `zero`, and `N` elements are written.
    unsafe fn store(self, to: *mut Self::S);
    /// `a * b + self`.
    /// # Safety
    /// As `zero`.
    unsafe fn add_product(self, a: Self, b: Self) -> Self;
    /// # Safety
    /// As `zero`.
    unsafe fn add(self, other: Self) -> Self;
    /// # Safety
    /// As `zero`.
    unsafe fn sub(self, other: Self) -> Self;
}

/// Vectors by plain loops, for targets without a kernel of their own.
#[derive(Clone, Copy)]
struct Portable<S>([S; 4]);

macro_rules! portable_lanes {
    ($s:ty) => {
        impl Lanes for Portable<$s> {
            type S = $s;
            const N: usize = 4;
            #[inline(always)]
            unsafe fn zero() -> Self {
                Self([0.0; 4])
            }
            #[inline(always)]
            unsafe fn splat(from: *const $s) -> Self {
                // SAFETY: the caller vouches for one element.
                Self([unsafe { *from }; 4])
            }
            #[inline(always)]
            unsafe fn load(from: *const $s) -> Self {
                // SAFETY: the caller vouches for four elements.
                Self(unsafe { from.cast::<[$s; 4]>().read_unaligned() })
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut $s) {
                // SAFETY: the caller vouches for four elements.
                unsafe { to.cast::<[$s; 4]>().write_unaligned(self.0) }
            }
            #[inline(always)]
            unsafe fn add_product(self, a: Self, b: Self) -> Self {
                // Without an FMA instruction `mul_add` is a slow library call.
                Self(std::array::from_fn(|i| {
                    if cfg!(target_arch = "aarch64") {
                        a.0[i].mul_add(b.0[i], self.0[i])
                    } else {
                        a.0[i] * b.0[i] + self.0[i]
                    }
                }))
            }
            #[inline(always)]
            unsafe fn add(self, other: Self) -> Self {
                Self(std::array::from_fn(|i| self.0[i] + other.0[i]))
            }
            #[inline(always)]
            unsafe fn sub(self, other: Self) -> Self {
                Self(std::array::from_fn(|i| self.0[i] - other.0[i]))
            }
        }
    };
}
portable_lanes!(f32);
portable_lanes!(f64);

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Lanes;
    use std::arch::x86_64::*;

    macro_rules! x86_lanes {
        ($v:ty, $s:ty, $n:literal, $zero:ident, $splat:ident, $load:ident, $store:ident, $fma:ident, $add:ident, $sub:ident) => {
            impl Lanes for $v {
                type S = $s;
                const N: usize = $n;
                #[inline(always)]
                unsafe fn zero() -> Self {
                    // SAFETY: the caller vouches for the instruction set, here and below.
                    unsafe { $zero() }
                }
                #[inline(always)]
                unsafe fn splat(from: *const $s) -> Self {
                    // SAFETY: as above, and the element is readable.
                    unsafe { $splat(*from) }
                }
                #[inline(always)]
                unsafe fn load(from: *const $s) -> Self {
                    // SAFETY: as above, and the elements are readable.
                    unsafe { $load(from) }
                }
                #[inline(always)]
                unsafe fn store(self, to: *mut $s) {
                    // SAFETY: as above, and the elements are writable.
                    unsafe { $store(to, self) }
                }
                #[inline(always)]
                unsafe fn add_product(self, a: Self, b: Self) -> Self {
                    // SAFETY: as above.
                    unsafe { $fma(a, b, self) }
                }
                #[inline(always)]
                unsafe fn add(self, other: Self) -> Self {
                    // SAFETY: as above.
                    unsafe { $add(self, other) }
                }
                #[inline(always)]
                unsafe fn sub(self, other: Self) -> Self {
                    // SAFETY: as above.
                    unsafe { $sub(self, other) }
                }
            }
        };
    }
    #[rustfmt::skip]
    x86_lanes!(__m512, f32, 16, _mm512_setzero_ps, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_fmadd_ps, _mm512_add_ps, _mm512_sub_ps);
    #[rustfmt::skip]
    x86_lanes!(__m512d, f64, 8, _mm512_setzero_pd, _mm512_set1_pd, _mm512_loadu_pd, _mm512_storeu_pd, _mm512_fmadd_pd, _mm512_add_pd, _mm512_sub_pd);
    #[rustfmt::skip]
    x86_lanes!(__m256, f32, 8, _mm256_setzero_ps, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_fmadd_ps, _mm256_add_ps, _mm256_sub_ps);
    #[rustfmt::skip]
    x86_lanes!(__m256d, f64, 4, _mm256_setzero_pd, _mm256_set1_pd, _mm256_loadu_pd, _mm256_storeu_pd, _mm256_fmadd_pd, _mm256_add_pd, _mm256_sub_pd);
}

/// # Safety
/// That of [`MicroKernel::rows`], and the instruction set of `V` must be there.
#[inline(always)]
unsafe fn rows<V: Lanes, const R: usize, const NV: usize>(
    taps: &[Tap],
    kc: usize,
    a: *const V::S,
    b: *const V::S,
    out: *mut V::S,
) {
    // SAFETY: every access is one that the caller vouched for.
    unsafe {
        let mut sums = [[V::zero(); NV]; R];
        for tap in taps {
            let mut rows = [a; R];
            for i in 0..R {
                rows[i] = a.add(tap.rows[i] as usize);
            }
            let mut panel = b.add(tap.slice as usize * kc * NV * V::N);
            for k in 0..kc {
                let mut right = [V::zero(); NV];
                for j in 0..NV {
                    right[j] = V::load(panel.add(j * V::N));
                }
                for i in 0..R {
                    let left = V::splat(rows[i].add(k));
                    for j in 0..NV {
                        sums[i][j] = sums[i][j].add_product(left, right[j]);
                    }
                }
                panel = panel.add(NV * V::N);
            }
        }
        for i in 0..R {
            for j in 0..NV {
                sums[i][j].store(out.add((i * NV + j) * V::N));
            }
        }
    }
}

/// # Safety
/// That of [`MicroKernel::outer`], and the instruction set of `V` must be there.
#[inline(always)]
unsafe fn outer<V: Lanes, const R: usize, const NV: usize>(
    pairs: &[Pair],
    a: *const V::S,
    b: *const V::S,
    out: *mut V::S,
    stride: usize,
) {
    // SAFETY: every access is one that the caller vouched for.
    unsafe {
        let mut sums = [[V::zero(); NV]; R];
        for pair in pairs {
            let (left, right) = (a.add(pair.left as usize), b.add(pair.right as usize));
            let mut vectors = [V::zero(); NV];
            for j in 0..NV {
                vectors[j] = V::load(right.add(j * V::N));
            }
            for i in 0..R {
                let left = V::splat(left.add(i));
                for j in 0..NV {
                    sums[i][j] = sums[i][j].add_product(left, vectors[j]);
                }
            }
        }
        for i in 0..R {
            for j in 0..NV {
                let place = out.add(i * stride + j * V::N);
                V::load(place).add(sums[i][j]).store(place);
            }
        }
    }
}

macro_rules! kernels {
    ($s:ty, $avx512:ty, $avx2:ty) => {
        #[allow(private_interfaces)]
        impl MicroKernel for $s {
            fn shape() -> KernelShape {
                match Level::detect() {
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx512 => KernelShape { lanes: <$avx512>::N, rows: 8, outer: 8 },
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx2 => KernelShape { lanes: <$avx2>::N, rows: 6, outer: 6 },
                    Level::Portable => KernelShape { lanes: 4, rows: 4, outer: 4 },
                }
            }

            unsafe fn rows(vectors: usize, taps: &[Tap], kc: usize, a: *const $s, b: *const $s, out: *mut $s) {
                #[cfg(target_arch = "x86_64")]
                #[target_feature(enable = "avx512f,avx2,fma")]
                unsafe fn avx512<const NV: usize>(taps: &[Tap], kc: usize, a: *const $s, b: *const $s, out: *mut $s) {
                    // SAFETY: the caller's.
                    unsafe { rows::<$avx512, 8, NV>(taps, kc, a, b, out) }
                }
                #[cfg(target_arch = "x86_64")]
                #[target_feature(enable = "avx2,fma")]
                unsafe fn avx2<const NV: usize>(taps: &[Tap], kc: usize, a: *const $s, b: *const $s, out: *mut $s) {
                    // SAFETY: the caller's.
                    unsafe { rows::<$avx2, 6, NV>(taps, kc, a, b, out) }
                }
                // SAFETY: the caller vouches for the memory, `detect` for the instruction set.
                unsafe {
                    match (Level::detect(), vectors) {
                        #[cfg(target_arch = "x86_64")]
                        (Level::Avx512, 1) => avx512::<1>(taps, kc, a, b, out),
                        #[cfg(target_arch = "x86_64")]
                        (Level::Avx512, _) => avx512::<2>(taps, kc, a, b, out),
                        #[cfg(target_arch = "x86_64")]
                        (Level::Avx2, 1) => avx2::<1>(taps, kc, a, b, out),
                        #[cfg(target_arch = "x86_64")]
                        (Level::Avx2, _) => avx2::<2>(taps, kc, a, b, out),
                        (Level::Portable, 1) => rows::<Portable<$s>, 4, 1>(taps, kc, a, b, out),
                        (Level::Portable, _) => rows::<Portable<$s>, 4, 2>(taps, kc, a, b, out),
                    }
                }
            }

            unsafe fn outer(vectors: usize, pairs: &[Pair], a: *const $s, b: *const $s, out: *mut $s, stride: usize) {
                #[cfg(target_arch = "x86_64")]
                #[target_feature(enable = "avx512f,avx2,fma")]
                unsafe fn avx512<const NV: usize>(
                    pairs: &[Pair],
                    a: *const $s,
                    b: *const $s,
                    out: *mut $s,
                    stride: usize,
                ) {
                    // SAFETY: the caller's.
                    unsafe { outer::<$avx512, 8, NV>(pairs, a, b, out, stride) }
                }
                #[cfg(target_arch = "x86_64")]
                #[target_feature(enable = "avx2,fma")]
                unsafe fn avx2<const NV: usize>(
                    pairs: &[Pair],
                    a: *const $s,
                    b: *const $s,
                    out: *mut $s,
                    stride: usize,
                ) {
                    // SAFETY: the caller's.
                    unsafe { outer::<$avx2, 6, NV>(pairs, a, b, out, stride) }
                }
                // SAFETY: the caller vouches for the memory, `detect` for the instruction set.
                unsafe {
                    match (Level::detect(), vectors) {
                        #[cfg(target_arch = "x86_64")]
                        (Level::Avx512, 1) => avx512::<1>(pairs, a, b, out, stride),
                        #[cfg(target_arch = "x86_64")]
                        (Level::Avx512, _) => avx512::<2>(pairs, a, b, out, stride),
                        #[cfg(target_arch = "x86_64")]
                        (Level::Avx2, 1) => avx2::<1>(pairs, a, b, out, stride),
                        #[cfg(target_arch = "x86_64")]
                        (Level::Avx2, _) => avx2::<2>(pairs, a, b, out, stride),
                        (Level::Portable, 1) => outer::<Portable<$s>, 4, 1>(pairs, a, b, out, stride),
                        (Level::Portable, _) => outer::<Portable<$s>, 4, 2>(pairs, a, b, out, stride),
                    }
                }
            }

            unsafe fn squares(kind: Transform, all: &[Square], len: usize, from: *const $s, to: *mut $s) {
                #[cfg(target_arch = "x86_64")]
                #[target_feature(enable = "avx512f,avx2,fma")]
                unsafe fn avx512(kind: Transform, all: &[Square], len: usize, from: *const $s, to: *mut $s) {
                    // SAFETY: the caller's.
                    unsafe { squares::<$avx512>(kind, all, len, from, to) }
                }
                #[cfg(target_arch = "x86_64")]
                #[target_feature(enable = "avx2,fma")]
                unsafe fn avx2(kind: Transform, all: &[Square], len: usize, from: *const $s, to: *mut $s) {
                    // SAFETY: the caller's.
                    unsafe { squares::<$avx2>(kind, all, len, from, to) }
                }
                // SAFETY: the caller vouches for the memory, `detect` for the instruction set.
                unsafe {
                    match Level::detect() {
                        #[cfg(target_arch = "x86_64")]
                        Level::Avx512 => avx512(kind, all, len, from, to),
                        #[cfg(target_arch = "x86_64")]
                        Level::Avx2 => avx2(kind, all, len, from, to),
                        Level::Portable => squares::<Portable<$s>>(kind, all, len, from, to),
                    }
                }
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
kernels!(f32, std::arch::x86_64::__m512, std::arch::x86_64::__m256);
#[cfg(target_arch = "x86_64")]
kernels!(f64, std::arch::x86_64::__m512d, std::arch::x86_64::__m256d);
#[cfg(not(target_arch = "x86_64"))]
kernels!(f32, Portable<f32>, Portable<f32>);
#[cfg(not(target_arch = "x86_64"))]
kernels!(f64, Portable<f64>, Portable<f64>);

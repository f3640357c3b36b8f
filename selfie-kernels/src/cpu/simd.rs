//! One binary for every x86-64 and aarch64: the instruction set is chosen when the program runs.

/// Instruction sets that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    /// AVX-512 F, BW, DQ, VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Whatever the target has at least: SSE2, NEON.
    Portable,
}

impl Level {
    /// The best that this machine has. `SELFIE_SIMD=avx2|portable` asks for less, to test those paths.
    pub(crate) fn detect() -> Level {
        static LEVEL: std::sync::OnceLock<Level> = std::sync::OnceLock::new();
        *LEVEL.get_or_init(|| {
            #[cfg(target_arch = "x86_64")]
            {
                let wanted = std::env::var("SELFIE_SIMD").unwrap_or_default();
                let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
                let avx512 = avx2
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl");
                if avx512 && wanted != "avx2" && wanted != "portable" {
                    return Level::Avx512;
                }
                if avx2 && wanted != "portable" {
                    return Level::Avx2;
                }
            }
            Level::Portable
        })
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "AVX-512",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "AVX2",
            Level::Portable => "portable instructions",
        }
    }
}

/// Runs `work` compiled for the machine's own instruction set.
///
/// The closure and the `#[inline(always)]` functions that it calls are compiled once for each [`Level`] (the closure is
/// inlined into a function with the features switched on), so plain loops vectorise and `mul_add` is one instruction.
/// Put it around the loop over a chunk, inside the parallel iterator; iterators of rayon do not inherit it.
///
/// The closure itself must be `#[inline(always)]`: a large one is else compiled once, for no features, where `mul_add`
/// is a library call (attention at 32px: 183 ms in place of 7).
#[inline(always)]
pub(crate) fn vectorize<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi1,bmi2,lzcnt,popcnt,f16c")]
        fn avx512<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        #[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt,f16c")]
        fn avx2<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        match Level::detect() {
            // SAFETY: `detect` found these features (bmi, lzcnt, popcnt and f16c come with every AVX2 processor).
            Level::Avx512 => unsafe { avx512(work) },
            // SAFETY: as above.
            Level::Avx2 => unsafe { avx2(work) },
            Level::Portable => work(),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    work()
}

/// Asks for the cache lines of `data[at..at + len]` ahead of their use; out-of-range is no harm.
///
/// An epilogue touches 128 bytes of each of eight rows, which no hardware prefetcher foresees: a 64 to 256 channel 1x1
/// convolution's data gradient spent half its time waiting for them.
#[inline(always)]
pub(crate) fn prefetch<S>(data: &[S], at: usize, len: usize) {
    #[cfg(target_arch = "x86_64")]
    for start in (0..len * size_of::<S>()).step_by(64) {
        let line = data.as_ptr().wrapping_add(at).cast::<i8>().wrapping_add(start);
        // SAFETY: a prefetch is a hint: it reads and writes nothing and cannot fault, whatever the address.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (data, at, len);
}

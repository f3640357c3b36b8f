//! What the operations' tests share: seeded inputs, guarded buffers, derived error bounds, gradient checks.
//!
//! A test draws inputs *as stored* ([`Draws`]), runs the operation on [`Guarded`] buffers, and compares with an `f64`
//! oracle that returns each value with the magnitude of its terms ([`Exact`]), from which [`assert_close`] derives how
//! far rounding alone can move the result. No tolerance is chosen.

mod bounded;
mod convolution;

pub(crate) use bounded::*;
pub(crate) use convolution::*;

use crate::cuda::Choices;
use crate::partials::{Cut, partials_room};
use crate::{
    Affine, Backend, ConvDims, Cpu, Cuda, Element, Error, Grad, Len, Memory, Partials, Philox, Result, Scalar, View,
    ViewMut, Wide,
};
use num_traits::Float;
use proptest::strategy::Strategy;
use proptest::test_runner::{Config as ProptestConfig, TestRunner};
use std::fmt::Debug;
use std::sync::OnceLock;

/// Turns checks that are generic over the device into tests of every device: of each element type that it has (`elements`,
/// checks `fn check<D: Tested<T>, T: Element>()`), or once (`once`, checks `fn check<D: Tested<f32>>()`). Those of `gpu_elements`
/// are only for GPUs: their shapes lie at edges of tiles that a CPU does not have.
///
/// The CUDA backend's are called `on_cuda::..` and ignored unless asked for: they take a GPU, or the emulator's library in
/// `SELFIE_EMULATOR`.
macro_rules! on_every_device {
    (@cuda_elements $($each:ident)*) => {
        $(#[test]
        #[ignore = "takes a CUDA device, or the emulator"]
        fn $each() {
            super::$each::<Cuda, f32>();
            super::$each::<Cuda, half::bf16>();
        })*
    };
    ($(elements: $($each:ident),+;)? $(gpu_elements: $($gpu:ident),+;)? $(once: $($once:ident),+;)?) => {
        mod on_cpu {
            use crate::Cpu;
            $($(#[test]
            fn $each() {
                super::$each::<Cpu, f32>();
                super::$each::<Cpu, half::bf16>();
                super::$each::<Cpu, f64>();
            })+)?
            $($(#[test]
            fn $once() {
                super::$once::<Cpu>();
            })+)?
        }
        mod on_cuda {
            use crate::Cuda;
            crate::testing::on_every_device! { @cuda_elements $($($each)+)? $($($gpu)+)? }
            $($(#[test]
            #[ignore = "takes a CUDA device, or the emulator"]
            fn $once() {
                super::$once::<Cuda>();
            })+)?
        }
    };
}
pub(crate) use on_every_device;

/// A device that the operations' tests run on.
pub(crate) trait TestDevice: Memory {
    /// The one that tests share.
    fn get() -> &'static Self;
    /// One that no other test has: for those that record work, beside which nothing else may be queued.
    fn own() -> Self;
    /// One of its own on which sums are cut into more parts than on the one that tests share, where that can be had.
    fn larger() -> Self {
        Self::own()
    }
    /// How many of a property test's cases are run, of those that a CPU runs.
    fn cases(cases: u32) -> u32;
    /// What operands of products are rounded to, as the distance from 1 to the next number; 0 if they are not.
    fn operand_epsilon<T: Element>() -> f64;
    /// Whether the convolution is done by minimal filtering, whose terms are others.
    fn filters_minimally(dims: &ConvDims) -> bool;
}

/// A device with all operations in `T`.
pub(crate) trait Tested<T: Element>: TestDevice + Backend<T> {}
impl<T: Element, D: TestDevice + Backend<T>> Tested<T> for D {}

impl TestDevice for Cpu {
    fn get() -> &'static Self {
        static CPU: OnceLock<Cpu> = OnceLock::new();
        CPU.get_or_init(Self::own)
    }

    fn own() -> Self {
        Self::new(2).expect("two threads start")
    }

    fn cases(cases: u32) -> u32 {
        cases
    }

    fn operand_epsilon<T: Element>() -> f64 {
        0.0
    }

    fn filters_minimally(dims: &ConvDims) -> bool {
        crate::cpu::winograd::pays(dims)
    }
}

impl TestDevice for Cuda {
    fn get() -> &'static Self {
        static CUDA: OnceLock<Cuda> = OnceLock::new();
        CUDA.get_or_init(Self::own)
    }

    /// Of several kernels for a pass it takes the one of the number in `SELFIE_VARIANT`, counted around.
    fn own() -> Self {
        let device = match std::env::var_os("SELFIE_EMULATOR") {
            Some(library) => Self::emulated(library.as_ref()).expect("the emulator loads"),
            None => Self::new(0).expect("a GPU, or the emulator's library in SELFIE_EMULATOR"),
        };
        match std::env::var("SELFIE_VARIANT") {
            Ok(number) => device.with_choices(Choices::Number(number.parse().expect("a number")), drop),
            Err(_) => device,
        }
    }

    fn larger() -> Self {
        std::env::var_os("SELFIE_EMULATOR")
            .map_or_else(Self::own, |library| Self::emulated_of(library.as_ref(), 7).expect("the emulator loads"))
    }

    /// Emulation is slow, and each case takes a GPU several transfers.
    fn cases(cases: u32) -> u32 {
        cases.div_ceil(8)
    }

    fn operand_epsilon<T: Element>() -> f64 {
        // bf16 goes through the tensor cores, f32 does not.
        if T::EPSILON > f64::from(f32::EPSILON) { T::EPSILON } else { 0.0 }
    }

    fn filters_minimally(_dims: &ConvDims) -> bool {
        false
    }
}

/// The device of tests that are the CPU's own.
pub(crate) fn cpu() -> &'static Cpu {
    Cpu::get()
}

/// A property test: `check` on values that `strategy` draws, so many on a CPU.
pub(crate) fn for_any<D: TestDevice, S: Strategy>(cases: u32, strategy: S, check: impl Fn(S::Value)) {
    let config = ProptestConfig { cases: D::cases(cases), failure_persistence: None, ..ProptestConfig::default() };
    let outcome = TestRunner::new(config).run(&strategy, |value| {
        check(value);
        Ok(())
    });
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
}

/// Asserts that `run` returns the same bits on one thread and on three.
pub(crate) fn assert_same_on_any_threads(run: impl Fn(&Cpu) -> Vec<u8>) {
    let [one, three] = [1, 3].map(|threads| run(&Cpu::new(threads).expect("the threads start")));
    assert!(one == three, "the result depends on the number of threads");
}

/// Bytes of several results one after the other, for comparisons that mean the bits.
pub(crate) fn bits<S: Scalar>(values: &[S]) -> Vec<u8> {
    bytemuck::cast_slice(values).to_vec()
}

/// Asserts that an operation refused its arguments because of the length of `argument`.
pub(crate) fn assert_refuses_length<R: Debug>(result: Result<R>, argument: &str) {
    match result {
        Err(Error::Length { argument: named, .. }) => assert_eq!(named, argument),
        other => panic!("expected a refusal of {argument}, got {other:?}"),
    }
}

/// Asserts that an operation refused its dims.
pub(crate) fn assert_refuses_dims<R: Debug>(result: Result<R>) {
    assert!(matches!(result, Err(Error::Dims { .. })), "expected a refusal of the dims, got {result:?}");
}

// ---------------------------------------------------------------------------------------------------------- inputs

/// `x` rounded to `S`.
pub(crate) fn stored<S: Element>(x: f64) -> S {
    S::narrow(S::Wide::from_f64(x))
}

/// The stored values, for the oracle.
pub(crate) fn exact<S: Element>(values: &[S]) -> Vec<f64> {
    values.iter().map(|x| x.widen().to_f64()).collect()
}

/// Seeded inputs.
#[derive(Debug)]
pub(crate) struct Draws {
    philox: Philox,
    drawn: u64,
    words: [u32; 4],
}

impl Draws {
    pub(crate) fn new(seed: u64) -> Self {
        Self { philox: Philox { seed }, drawn: 0, words: [0; 4] }
    }

    /// 32 random bits.
    pub(crate) fn word(&mut self) -> u32 {
        let place = (self.drawn % 4) as usize;
        if place == 0 {
            self.words = self.philox.words(0, self.drawn, 0);
        }
        self.drawn += 1;
        self.words[place]
    }

    /// A number in `0..end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.word() as usize % end
    }

    /// Numbers in (low, high).
    pub(crate) fn uniform<S: Element>(&mut self, len: usize, low: f64, high: f64) -> Vec<S> {
        (0..len).map(|_| stored(low + (high - low) * f64::from(Philox::unit(self.word())))).collect()
    }

    /// Normal numbers.
    pub(crate) fn normal<S: Element>(&mut self, len: usize, mean: f64, std: f64) -> Vec<S> {
        let mut draw = || {
            let (u, v) = (f64::from(Philox::unit(self.word())), f64::from(Philox::unit(self.word())));
            stored(mean + std * (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos())
        };
        (0..len).map(|_| draw()).collect()
    }

    /// Standard normal numbers with an exact zero among sixteen: the usual input.
    pub(crate) fn values<S: Element>(&mut self, len: usize) -> Vec<S> {
        let mut values = self.normal(len, 0.0, 1.0);
        values.iter_mut().for_each(|x| {
            if self.below(16) == 0 {
                *x = S::default();
            }
        });
        values
    }

    /// Multiples of one half from -1 to 1: neighbours are often equal.
    pub(crate) fn ties<S: Element>(&mut self, len: usize) -> Vec<S> {
        (0..len).map(|_| stored(self.below(5) as f64 / 2.0 - 1.0)).collect()
    }

    /// A permutation of `0..n` for each image.
    pub(crate) fn orders(&mut self, images: usize, n: usize) -> Vec<u32> {
        let mut orders: Vec<u32> = (0..images).flat_map(|_| 0..n as u32).collect();
        for order in orders.chunks_mut(n) {
            for i in (1..n).rev() {
                order.swap(i, self.below(i + 1));
            }
        }
        orders
    }

    /// Multiples of 1/16, all different, in random order: no kink of a maximum or a ReLU within 1/32 (0 is left out).
    pub(crate) fn distinct<S: Element>(&mut self, len: usize) -> Vec<S> {
        let mut values: Vec<f64> = (0..len).map(|i| (i as f64 - (len / 2) as f64 + 0.5) / 16.0).collect();
        for i in (1..len).rev() {
            values.swap(i, self.below(i + 1));
        }
        values.into_iter().map(stored).collect()
    }
}

// --------------------------------------------------------------------------------------------------------- buffers

/// Elements on each side of a [`Guarded`] buffer; 64 keep any element type's alignment for vector loads.
const GUARD: usize = 64;

/// A device buffer between guards, all bits set (a NaN in every floating-point type): what a kernel reads beside it
/// poisons the result, what it writes beside it is seen by [`Guarded::read`].
#[derive(Debug)]
pub(crate) struct Guarded<M: Memory, S: Scalar> {
    buffer: M::Buffer<S>,
    len: usize,
}

fn all_bits_set<S: Scalar>() -> S {
    let mut value = S::default();
    bytemuck::bytes_of_mut(&mut value).fill(0xFF);
    value
}

impl<M: Memory, S: Scalar> Guarded<M, S> {
    /// An input.
    pub(crate) fn new(device: &M, values: &[S]) -> Self {
        let mut host = vec![all_bits_set(); values.len() + 2 * GUARD];
        host[GUARD..GUARD + values.len()].copy_from_slice(values);
        let mut buffer = device.alloc(host.len()).expect("a test's buffer fits");
        device.upload(&host, M::all_mut(&mut buffer)).expect("lengths agree");
        Self { buffer, len: values.len() }
    }

    /// An output: every element starts as NaN, so that one never written is seen.
    pub(crate) fn poisoned(device: &M, len: usize) -> Self {
        Self::new(device, &vec![all_bits_set(); len])
    }

    pub(crate) fn view(&self) -> View<'_, M, S> {
        M::view(&self.buffer, GUARD..GUARD + self.len)
    }

    pub(crate) fn view_mut(&mut self) -> ViewMut<'_, M, S> {
        M::view_mut(&mut self.buffer, GUARD..GUARD + self.len)
    }

    /// From an element on, for places that are not aligned.
    pub(crate) fn view_from(&self, first: usize) -> View<'_, M, S> {
        M::view(&self.buffer, GUARD + first..GUARD + self.len)
    }

    pub(crate) fn view_mut_from(&mut self, first: usize) -> ViewMut<'_, M, S> {
        M::view_mut(&mut self.buffer, GUARD + first..GUARD + self.len)
    }

    /// The values; asserts that the guards are whole.
    pub(crate) fn read(&self, device: &M) -> Vec<S> {
        let mut host = vec![S::default(); self.len + 2 * GUARD];
        device.download(M::all(&self.buffer), &mut host).expect("lengths agree");
        let guards = [&host[..GUARD], &host[GUARD + self.len..]].concat();
        assert!(bits(&guards).iter().all(|&byte| byte == 0xFF), "written beside the buffer");
        host[GUARD..GUARD + self.len].to_vec()
    }
}

/// Room for partial sums of `[rows, c]`, all of it NaN, with guards behind.
pub(crate) fn room<M: Memory, W: Scalar>(device: &M, rows: usize, c: usize) -> Partials<M, W> {
    poisoned_partials(device, partials_room(rows, c) + GUARD)
}

/// The same without guards, for calls that are to be refused.
pub(crate) fn bare_room<M: Memory, W: Scalar>(device: &M, rows: usize, c: usize) -> Partials<M, W> {
    poisoned_partials(device, partials_room(rows, c))
}

fn poisoned_partials<M: Memory, W: Scalar>(device: &M, len: usize) -> Partials<M, W> {
    let mut buffer = device.alloc(len).expect("a test's buffer fits");
    device.upload(&vec![all_bits_set::<W>(); len], M::all_mut(&mut buffer)).expect("lengths agree");
    Partials::within(buffer)
}

/// The partial sums as they were made, one tile `[2, c]` after the other; asserts that nothing was written behind them.
pub(crate) fn read_partials<M: Memory, W: Scalar>(device: &M, partials: &Partials<M, W>) -> (Cut, Vec<W>) {
    let (cut, made) = partials.made();
    let made = made.len();
    let mut all = vec![W::default(); M::len(partials.buffer())];
    device.download(M::all(partials.buffer()), &mut all).expect("lengths agree");
    assert!(bits(&all[made..]).iter().all(|&byte| byte == 0xFF), "written behind the partial sums");
    all.truncate(made);
    (cut, all)
}

/// Buffers of these lengths, for calls that are to be refused.
pub(crate) fn buffers<D: TestDevice, S: Scalar, const N: usize>(lens: [usize; N]) -> [Guarded<D, S>; N] {
    lens.map(|len| Guarded::poisoned(D::get(), len))
}

/// A [`Grad`] on the host.
#[derive(Debug, Clone)]
pub(crate) enum HostGrad<T: Element> {
    Plain(Vec<T>),
    Affine { dz: Vec<T>, x: Vec<T>, coef: Vec<T::Wide> },
}

impl<T: Element> HostGrad<T> {
    /// Roundings of an element as [`Grad::Affine`] forms it.
    pub(crate) const ROUNDINGS: usize = 2;

    /// The gradient, of a map with `c` channels.
    pub(crate) fn oracle(&self, c: usize) -> Vec<Exact> {
        match self {
            Self::Plain(dy) => exact(dy).into_iter().map(Exact::new).collect(),
            Self::Affine { dz, x, coef } => {
                let coef = exact(coef);
                let terms = |k: usize, dz: f64, x: f64| [coef[k] * dz, coef[c + k] * x, coef[2 * c + k]];
                let pairs = exact(dz).into_iter().zip(exact(x)).enumerate();
                pairs.map(|(i, (dz, x))| terms(i % c, dz, x).into_iter().sum()).collect()
            }
        }
    }

    /// What an element is rounded to as an operand, where operands are rounded to `operand`: plain ones are of that type.
    pub(crate) fn operand_epsilon(&self, operand: f64) -> f64 {
        match self {
            Self::Plain(_) => 0.0,
            Self::Affine { .. } => operand,
        }
    }

    pub(crate) fn upload<M: Memory>(&self, device: &M) -> DeviceGrad<M, T> {
        match self {
            Self::Plain(dy) => DeviceGrad::Plain(Guarded::new(device, dy)),
            Self::Affine { dz, x, coef } => DeviceGrad::Affine {
                dz: Guarded::new(device, dz),
                x: Guarded::new(device, x),
                coef: Guarded::new(device, coef),
            },
        }
    }
}

/// A [`HostGrad`]'s buffers on a device.
#[derive(Debug)]
pub(crate) enum DeviceGrad<M: Memory, T: Element> {
    Plain(Guarded<M, T>),
    Affine { dz: Guarded<M, T>, x: Guarded<M, T>, coef: Guarded<M, T::Wide> },
}

impl<M: Memory, T: Element> DeviceGrad<M, T> {
    pub(crate) fn view(&self) -> Grad<'_, M, T> {
        match self {
            Self::Plain(dy) => Grad::Plain(dy.view()),
            Self::Affine { dz, x, coef } => Grad::Affine(Affine { dz: dz.view(), x: x.view(), coef: coef.view() }),
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- bounds

/// A value of an `f64` oracle, and the sum of the magnitudes of the terms that it is the sum of.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Exact {
    pub(crate) value: f64,
    pub(crate) magnitude: f64,
}

impl Exact {
    /// A single term.
    pub(crate) fn new(value: f64) -> Self {
        Self { value, magnitude: value.abs() }
    }

    /// One more term.
    pub(crate) fn add(&mut self, term: f64) {
        self.value += term;
        self.magnitude += term.abs();
    }

    /// All terms times `factor`.
    pub(crate) fn times(self, factor: f64) -> Self {
        Self { value: self.value * factor, magnitude: self.magnitude * factor.abs() }
    }
}

impl std::ops::AddAssign for Exact {
    fn add_assign(&mut self, other: Self) {
        self.value += other.value;
        self.magnitude += other.magnitude;
    }
}

impl std::iter::Sum for Exact {
    fn sum<I: Iterator<Item = Self>>(terms: I) -> Self {
        let mut sum = Self::default();
        terms.for_each(|term| sum += term);
        sum
    }
}

impl std::iter::Sum<f64> for Exact {
    fn sum<I: Iterator<Item = f64>>(terms: I) -> Self {
        let mut sum = Self::default();
        terms.for_each(|term| sum.add(term));
        sum
    }
}

/// Asserts that each value is as near to the oracle as arithmetic in `A`, rounded to `S` at the end, must come, when
/// no term goes through more than `roundings` roundings (each moves it by half an epsilon at most).
///
/// The oracle's own roundings in `f64` are allowed for; a NaN is near to nothing.
pub(crate) fn assert_close<A: Wide, S: Element>(what: &str, got: &[S], want: &[Exact], roundings: usize) {
    assert_close_products::<A, S>(what, got, want, roundings, 0.0);
}

/// As [`assert_close`], where every term is a product whose operands are rounded before: `operands` is the sum of the
/// epsilons that they are rounded to.
pub(crate) fn assert_close_products<A: Wide, S: Element>(
    what: &str,
    got: &[S],
    want: &[Exact],
    roundings: usize,
    operands: f64,
) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    // Both factors may be rounded: (1 + u)(1 + v) - 1 <= u + v + (u + v)^2 / 4.
    let operands = operands / 2.0 + (operands / 2.0).powi(2) / 4.0;
    let half = |epsilon: f64| epsilon / 2.0;
    // (1 + u)^n - 1 <= n u / (1 - n u), Higham, Accuracy and Stability of Numerical Algorithms, lemma 3.1.
    let gamma = |u: f64| roundings as f64 * u / (1.0 - roundings as f64 * u);
    let underflow = S::Wide::min_positive_value().to_f64();
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let sums = gamma(half(A::EPSILON)) + gamma(half(f64::EPSILON));
        let computed = want.magnitude * (sums + operands + sums * operands);
        let bound = computed + half(S::EPSILON) * (want.value.abs() + computed) + underflow;
        let error = (got.widen().to_f64() - want.value).abs();
        assert!(
            error <= bound,
            "{} {what}[{i}]: got {got}, want {:e}; error {error:e} > {bound:e}",
            S::NAME,
            want.value
        );
    }
}

/// Asserts that the partial sums of a stored map `y`, `[rows, c]`, merge to its mean and sum of squared deviations.
///
/// A tile's own mean is off by d at most: as many roundings as it has rows, of deviations from one of them (which are summed; what is far
/// from zero, the mean itself, is rounded a time or two). The sum of squares S of `n` rows is off by its own roundings
/// and, as tiles are merged about their means, by `n d^2 + 2 d sqrt(n S)` (Cauchy and Schwarz).
pub(crate) fn assert_stats<M: Memory, T: Element>(device: &M, y: &[T], c: usize, stats: &Partials<M, T::Wide>) {
    let merged = merge_stats(device, stats);
    let (y, rows) = (exact(y), y.len() / c);
    assert_eq!((merged.rows, merged.mean.len()), (rows, c), "rows and channels of the statistics");
    let unit = T::Wide::EPSILON / 2.0;
    let gamma = |roundings: usize| roundings as f64 * unit / (1.0 - roundings as f64 * unit) + 4.0 * f64::EPSILON;
    for k in 0..c {
        let channel = || y[k..].iter().step_by(c).copied();
        let n = rows as f64;
        let mean = y[k] + channel().map(|x| x - y[k]).sum::<f64>() / n;
        let squares: f64 = channel().map(|x| (x - mean).powi(2)).sum();
        let spread = channel().map(|x| (x - mean).abs()).fold(0.0, f64::max);
        let d = gamma(merged.tile + 2) * 2.0 * spread + gamma(2) * mean.abs() + T::Wide::min_positive_value().to_f64();
        let error = (merged.mean[k] - mean).abs();
        assert!(error <= d, "mean[{k}]: got {:e}, want {mean:e}; error {error:e} > {d:e}", merged.mean[k]);
        let bound = gamma(merged.tile + 4) * squares + n * d * d + 2.0 * d * (n * squares).sqrt();
        let error = (merged.squares[k] - squares).abs();
        assert!(
            error <= bound,
            "squares[{k}]: got {:e}, want {squares:e}; error {error:e} > {bound:e}",
            merged.squares[k]
        );
    }
}

/// Statistics of a map, of all of its tiles.
pub(crate) struct MergedStats {
    pub(crate) rows: usize,
    /// Rows of the longest tile.
    pub(crate) tile: usize,
    pub(crate) mean: Vec<f64>,
    pub(crate) squares: Vec<f64>,
}

/// As [`crate::bn_finalize`] merges them.
pub(crate) fn merge_stats<M: Memory, W: Wide>(device: &M, stats: &Partials<M, W>) -> MergedStats {
    let (cut, tiles) = read_partials(device, stats);
    let c = tiles.len() / cut.tiles() / 2;
    let (mut mean, mut squares, mut before) = (vec![0.0; c], vec![0.0; c], 0.0);
    for (tile, rows) in exact(&tiles).chunks(2 * c).zip(cut.lens()) {
        let added = rows as f64;
        for k in 0..c {
            let delta = tile[k] - mean[k];
            mean[k] += delta * added / (before + added);
            squares[k] += tile[c + k] + delta * delta * before * added / (before + added);
        }
        before += added;
    }
    MergedStats { rows: cut.rows(), tile: cut.lens().max().unwrap_or(0), mean, squares }
}

/// Sums of `dz` and of `dz * xhat`, `[2, c]`, of all tiles; and the rows of the longest one.
pub(crate) fn merge_sums<M: Memory, W: Wide>(device: &M, sums: &Partials<M, W>) -> (Vec<f64>, usize) {
    let (cut, tiles) = read_partials(device, sums);
    let mut merged = vec![0.0; tiles.len() / cut.tiles()];
    for tile in exact(&tiles).chunks(merged.len()) {
        merged.iter_mut().zip(tile).for_each(|(merged, tile)| *merged += tile);
    }
    (merged, cut.lens().max().unwrap_or(0))
}

/// Asserts that the partial sums merge to those of `dz` and of `dz * (x - mean) * rstd` over `[rows, c]`.
pub(crate) fn assert_grad_sums<M: Memory, T: Element>(
    device: &M,
    (dz, x, norm): (&[T], &[T], &[T::Wide]),
    sums: &Partials<M, T::Wide>,
) {
    let (merged, tile) = merge_sums(device, sums);
    let (dz, x, norm, c) = (exact(dz), exact(x), exact(norm), norm.len() / 4);
    let channel = |k: usize| (k..dz.len()).step_by(c);
    let unit = (T::Wide::EPSILON + f64::EPSILON) / 2.0;
    let assert_sum = |what: &str, k: usize, got: f64, want: Exact, roundings: usize| {
        let bound = roundings as f64 * unit / (1.0 - roundings as f64 * unit) * want.magnitude;
        let bound = bound + T::Wide::min_positive_value().to_f64();
        let error = (got - want.value).abs();
        assert!(error <= bound, "{what}[{k}]: got {got:e}, want {:e}; error {error:e} > {bound:e}", want.value);
    };
    for k in 0..c {
        assert_sum("sum of dz", k, merged[k], channel(k).map(|i| dz[i]).sum(), tile);
        let product = channel(k).map(|i| dz[i] * (x[i] - norm[k]) * norm[c + k]).sum();
        assert_sum("sum of dz * xhat", k, merged[c + k], product, tile + 4);
    }
}

/// Asserts that `gradient` is the derivative of `f` at `x`, by central differences in `f64`.
///
/// Two steps, h and h / 2, are extrapolated; their distance bounds what truncation is left, and `roundings` of a term
/// of `f` bound the rest.
pub(crate) fn assert_gradient(what: &str, gradient: &[f64], x: &[f64], roundings: usize, f: impl Fn(&[f64]) -> Exact) {
    assert_eq!(gradient.len(), x.len(), "{what}: length");
    let h = 1.0 / 1024.0;
    let mut point = x.to_vec();
    for (i, &got) in gradient.iter().enumerate() {
        let mut at = |offset: f64| {
            point[i] = x[i] + offset;
            let f = f(&point);
            point[i] = x[i];
            f
        };
        let magnitude = at(0.0).magnitude;
        let mut slope = |h: f64| (at(h).value - at(-h).value) / (2.0 * h);
        let (coarse, fine) = (slope(h), slope(h / 2.0));
        let want = (4.0 * fine - coarse) / 3.0;
        let error = (got - want).abs();
        let bound = (fine - coarse).abs() + 3.0 * roundings as f64 * f64::EPSILON * magnitude / h;
        assert!(error <= bound, "{what}[{i}]: got {got:e}, differences say {want:e}; error {error:e} > {bound:e}");
    }
}

mod tests {
    use super::*;

    fn panics(check: impl Fn()) -> bool {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(check)).is_err()
    }

    #[test]
    fn a_bound_lets_rounding_pass_and_nothing_else() {
        let want = [Exact::new(1.0)];
        let above = |ulps: u32| [f32::from_bits(1f32.to_bits() + ulps)];
        assert_close::<f32, f32>("one", &above(1), &want, 2);
        assert!(panics(|| assert_close::<f32, f32>("one", &above(3), &want, 2)));
        assert!(panics(|| assert_close::<f32, f32>("one", &[f32::NAN], &want, 2)));
    }

    #[test]
    fn a_write_beside_the_buffer_is_seen() {
        let mut output = Guarded::<Cpu, u8>::poisoned(cpu(), 3);
        output.buffer[GUARD + 2] = 1;
        assert_eq!(output.read(cpu()), [255, 255, 1]);
        output.buffer[GUARD + 3] = 1;
        assert!(panics(|| drop(output.read(cpu()))));
    }

    #[test]
    fn a_wrong_gradient_is_seen() {
        let f = |x: &[f64]| Exact::new(x[0].sin() * x[1]);
        let x = [0.5f64, 2.0];
        let gradient = [x[0].cos() * x[1], x[0].sin()];
        assert_gradient("sin", &gradient, &x, 4, f);
        assert!(panics(|| assert_gradient("sin", &[gradient[0] + 1e-5, gradient[1]], &x, 4, f)));
    }
}

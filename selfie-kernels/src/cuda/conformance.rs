//! Every function of `cuda/device.h` alone against plain arithmetic, by the kernels of `cuda/conformance.cu`, which say what
//! each must give. On a GPU this shows that the wrappers mean what the emulator takes them to mean, so that a kernel which
//! is right there is right here.

use super::{Address, Cuda, Grid};
use crate::testing::{Draws, Guarded, TestDevice, bits};
use crate::{Philox, Scalar};
use half::bf16;

const MODULE: &str = "conformance";

/// A buffer of the device under test.
pub(super) type Buffer<S> = Guarded<Cuda, S>;

/// Must live until its kernel has ended: an [`Address`] keeps nothing alive.
pub(super) fn input<S: Scalar>(values: &[S]) -> Buffer<S> {
    Guarded::new(Cuda::get(), values)
}

pub(super) fn output<S: Scalar>(len: usize) -> Buffer<S> {
    Guarded::poisoned(Cuda::get(), len)
}

pub(super) fn read<S: Scalar>(buffer: &Buffer<S>) -> Vec<S> {
    buffer.read(Cuda::get())
}

pub(super) fn at<S: Scalar>(buffer: &Buffer<S>) -> Address {
    buffer.view().into()
}

pub(super) fn to<S: Scalar>(buffer: &mut Buffer<S>) -> Address {
    buffer.view_mut().into()
}

pub(super) fn run(module: &'static str, kernel: &str, grid: Grid, args: &impl bytemuck::NoUninit) {
    let device = Cuda::get();
    device.launch_plain(module, kernel, grid, args).expect("the kernel is launched");
    crate::Memory::sync(device).expect("the kernel ends well");
}

/// The arguments of a kernel that takes addresses only.
#[repr(transparent)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Arguments<const N: usize>(pub(super) [Address; N]);

// SAFETY: an array of addresses, which are plain numbers without gaps.
unsafe impl<const N: usize> bytemuck::NoUninit for Arguments<N> {}

/// A kernel's structure of arguments.
macro_rules! arguments {
    ($($name:ident { $($field:ident: $kind:ty),* $(,)? })*) => {
        $(#[repr(C)]
        #[derive(Debug, Clone, Copy, bytemuck::NoUninit)]
        struct $name { $($field: $kind),* })*
    };
}

arguments! {
    MmaArgs { a: Address, b: Address, d: Address }
    LdmatrixArgs { x: Address, plain: Address, transposed: Address }
    CpAsyncArgs { x: Address, y: Address, rounds: u64 }
    RoundingArgs {
        x: Address, plain: Address, relus: Address, single: Address, relu: Address, larger: Address, back: Address,
        finite: Address,
    }
    ShuffleArgs {
        x: Address, from: Address, exchanged: Address, up: Address, down: Address, votes: Address, wide: Address,
    }
    ReductionArgs {
        x: Address, warp_sum: Address, warp_max: Address, block_sum: Address, block_max: Address, warp_sum_f64: Address,
        block_sum_f64: Address,
    }
    VectorArgs {
        single: Address, single_out: Address, half: Address, half_out: Address, raw: Address, raw_out: Address,
    }
    DropoutArgs { rng: Address, purpose: u32, rate: f32, factor: f32, unused: u32 }
    RandomArgs {
        seed: u64, sample: u64, words: Address, units: Address, multipliers: Address, one: Address, none: Address,
        dropout: DropoutArgs, purpose: u64,
    }
    MathArgs {
        x: Address, y: Address, exp: Address, log: Address, erf: Address, sqrt: Address, quotient: Address, fma: Address,
        n: u64,
    }
    LastBlockArgs { x: Address, parts: Address, sum: Address, ticket: Address }
    DynamicSharedArgs { x: Address, y: Address, n: u64 }
}

/// Runs a kernel that gives the product of two matrices, stored as it wants them, and compares.
fn check_product(kernel: &str, seed: u64, left: impl Fn(usize, usize) -> usize, right: impl Fn(usize, usize) -> usize) {
    let mut draws = Draws::new(seed);
    let (a, b) = (draws.values::<bf16>(256), draws.values::<bf16>(128));
    let mut d = output::<f32>(128);
    run(MODULE, kernel, Grid::line(1, 32), &MmaArgs { a: at(&input(&a)), b: at(&input(&b)), d: to(&mut d) });
    for (i, d) in read(&d).into_iter().enumerate() {
        let (row, column) = (i / 8, i % 8);
        let terms = (0..16).map(|k| a[left(row, k)].to_f64() * b[right(k, column)].to_f64());
        let (exact, magnitude) = terms.fold((0.0, 0.0), |(sum, all), term| (sum + term, all + term.abs()));
        let bound = 32.0 * f64::from(f32::EPSILON) * magnitude;
        assert!((f64::from(d) - exact).abs() <= bound, "{kernel}, row {row}, column {column}: {d}, expected {exact}");
    }
}

#[test]
#[ignore = "takes a CUDA device, or the emulator"]
fn product_of_tiles() {
    check_product("conformance_mma", 1, |row, k| row * 16 + k, |k, column| k * 8 + column);
    check_product("conformance_mma_transposed", 2, |row, k| k * 16 + row, |k, column| column * 16 + k);
}

#[test]
#[ignore = "takes a CUDA device, or the emulator"]
fn matrices_from_shared_memory() {
    let x: Vec<u16> = (0..256).map(|i| i * 251).collect();
    let [mut plain, mut transposed] = [(); 2].map(|()| output::<u32>(128));
    let x_in = input(&x);
    let args = LdmatrixArgs { x: at(&x_in), plain: to(&mut plain), transposed: to(&mut transposed) };
    run(MODULE, "conformance_ldmatrix", Grid::line(1, 32), &args);
    let element = |matrix: usize, row: usize, column: usize| u32::from(x[(matrix * 8 + row) * 8 + column]);
    let expect = |pair: fn(usize, usize) -> [(usize, usize); 2]| -> Vec<u32> {
        let one = |i: usize| {
            let (lane, matrix) = (i / 4, i % 4);
            let [first, second] = pair(lane / 4, lane % 4 * 2);
            element(matrix, first.0, first.1) | element(matrix, second.0, second.1) << 16
        };
        (0..128).map(one).collect()
    };
    assert_eq!(read(&plain), expect(|major, minor| [(major, minor), (major, minor + 1)]));
    assert_eq!(read(&transposed), expect(|major, minor| [(minor, major), (minor + 1, major)]));
}

#[test]
#[ignore = "takes a CUDA device, or the emulator"]
fn copies_behind_the_back() {
    for rounds in [1, 2, 3, 7] {
        let x: Vec<bf16> = Draws::new(3).values(rounds * 128 * 8);
        let mut y = output::<bf16>(x.len());
        let x_in = input(&x);
        let args = CpAsyncArgs { x: at(&x_in), y: to(&mut y), rounds: rounds as u64 };
        run(MODULE, "conformance_cp_async", Grid::line(1, 128), &args);
        let expected: Vec<bf16> = (0..x.len())
            .map(|i| {
                let (round, thread, element) = (i / 1024, 127 - i / 8 % 128, i % 8);
                if (round + thread) % 3 == 0 { bf16::ZERO } else { x[round * 1024 + thread * 8 + element] }
            })
            .collect();
        assert!(bits(&read(&y)) == bits(&expected), "{rounds} rounds");
    }
}

/// Values at the edges of rounding, and usual ones.
fn edges() -> Vec<f32> {
    let mut x = vec![
        f32::NAN,
        -f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        0.0,
        -0.0,
        f32::MAX,
        f32::MIN,
        f32::MIN_POSITIVE,
        -f32::MIN_POSITIVE / 4.0,
        // Ties, to the even neighbour below and above.
        257.0 / 256.0,
        259.0 / 256.0,
        -257.0 / 256.0,
        -259.0 / 256.0,
        // One beside a tie.
        f32::from_bits(0x3f80_8001),
        f32::from_bits(0x3f80_7fff),
    ];
    x.extend(Draws::new(4).normal::<f32>(64 - x.len(), 0.0, 3.0));
    x
}

fn rounded(x: f32) -> u16 {
    if x.is_nan() { 0x7fff } else { bf16::from_f32(x).to_bits() }
}

/// The larger one; NaN if either is; of two zeros the positive one.
fn larger(a: f32, b: f32) -> f32 {
    match a.partial_cmp(&b) {
        None => f32::NAN,
        Some(std::cmp::Ordering::Less) => b,
        Some(std::cmp::Ordering::Equal) if a.is_sign_negative() => b,
        Some(_) => a,
    }
}

/// The same bits, or NaN both: which one is the device's choice.
fn assert_same(got: &[f32], expected: impl Iterator<Item = f32>, what: &str) {
    for (i, (&got, expected)) in got.iter().zip(expected).enumerate() {
        let same = got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan());
        assert!(same, "{what}, {i}: {got}, expected {expected}");
    }
}

#[test]
#[ignore = "takes a CUDA device, or the emulator"]
fn rounding_and_nan() {
    let x = edges();
    let [mut plain, mut relus] = [(); 2].map(|()| output::<u32>(32));
    let [mut relu, mut most, mut back] = [(); 3].map(|()| output::<f32>(64));
    let (mut single, mut finite) = (output::<u16>(64), output::<u32>(64));
    let x_in = input(&x);
    let args = RoundingArgs {
        x: at(&x_in),
        plain: to(&mut plain),
        relus: to(&mut relus),
        single: to(&mut single),
        relu: to(&mut relu),
        larger: to(&mut most),
        back: to(&mut back),
        finite: to(&mut finite),
    };
    run(MODULE, "conformance_rounding", Grid::line(1, 64), &args);
    let halves =
        |pairs: &[u32]| -> Vec<u16> { pairs.iter().flat_map(|pair| [*pair as u16, (pair >> 16) as u16]).collect() };
    let expected: Vec<u16> = x.iter().map(|&x| rounded(x)).collect();
    assert_eq!(halves(&read(&plain)), expected);
    assert_eq!(read(&single), expected);
    let wide = |bits: u16| f32::from_bits(u32::from(bits) << 16);
    assert_same(&read(&back), expected.iter().map(|&bits| wide(bits)), "back");
    for (i, &got) in halves(&read(&relus)).iter().enumerate() {
        // Of a zero the sign is free.
        let expected = rounded(larger(x[i], 0.0));
        assert!(got == expected || wide(got) == wide(expected), "relu of {} in bf16: {got:#x}", x[i]);
    }
    assert_same(&read(&relu), x.iter().map(|&x| larger(x, 0.0)), "relu");
    assert_same(&read(&most), (0..64).map(|i| larger(x[i], x[63 - i])), "the larger one");
    assert_eq!(read(&finite), x.iter().map(|x| u32::from(x.is_finite())).collect::<Vec<_>>());
}

#[test]
#[ignore = "takes a CUDA device, or the emulator"]
fn exchanges_within_a_warp() {
    let x: Vec<u32> = (0..32).map(|_| 0).scan(Draws::new(5), |draws, _: u32| Some(draws.word())).collect();
    let [mut from, mut exchanged, mut up, mut down, mut votes] = [(); 5].map(|()| output::<u32>(32));
    let mut wide = output::<f64>(32);
    let x_in = input(&x);
    let args = ShuffleArgs {
        x: at(&x_in),
        from: to(&mut from),
        exchanged: to(&mut exchanged),
        up: to(&mut up),
        down: to(&mut down),
        votes: to(&mut votes),
        wide: to(&mut wide),
    };
    run(MODULE, "conformance_shuffle", Grid::line(1, 32), &args);
    let of = |lane: fn(usize) -> usize| -> Vec<u32> { (0..32).map(|l| x[lane(l)]).collect() };
    assert_eq!(read(&from), of(|l| l * 5 % 32));
    assert_eq!(read(&exchanged), of(|l| l ^ 6));
    assert_eq!(read(&up), of(|l| if l < 3 { l } else { l - 3 }));
    assert_eq!(read(&down), of(|l| if l > 28 { l } else { l + 3 }));
    assert_eq!(read(&wide), of(|l| l ^ 1).into_iter().map(|x| 1.5 * f64::from(x)).collect::<Vec<_>>());
    let odd = x.iter().enumerate().fold(0, |votes, (l, x)| votes | (x % 2) << l);
    assert_eq!(read(&votes), vec![odd; 32]);
}

/// Five rounds in which lane l adds the value of lane l ^ 16, 8, 4, 2, 1: all lanes have the same in the end.
fn butterfly<W: Copy>(lanes: &[W], add: impl Fn(W, W) -> W) -> W {
    let mut lanes = lanes.to_vec();
    for step in [16, 8, 4, 2, 1] {
        lanes = (0..32).map(|l| add(lanes[l], lanes[l ^ step])).collect();
    }
    lanes[0]
}

fn check_reductions(x: &[f32]) {
    let [mut warp_sum, mut warp_max, mut block_sum, mut block_max] = [(); 4].map(|()| output::<f32>(256));
    let [mut warp_sum_f64, mut block_sum_f64] = [(); 2].map(|()| output::<f64>(256));
    let x_in = input(x);
    let args = ReductionArgs {
        x: at(&x_in),
        warp_sum: to(&mut warp_sum),
        warp_max: to(&mut warp_max),
        block_sum: to(&mut block_sum),
        block_max: to(&mut block_max),
        warp_sum_f64: to(&mut warp_sum_f64),
        block_sum_f64: to(&mut block_sum_f64),
    };
    run(MODULE, "conformance_reduction", Grid::line(1, 256), &args);
    let wide: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    let sums: Vec<f32> = x.chunks(32).map(|warp| butterfly(warp, |a, b| a + b)).collect();
    let maxima: Vec<f32> = x.chunks(32).map(|warp| butterfly(warp, larger)).collect();
    let sums_f64: Vec<f64> = wide.chunks(32).map(|warp| butterfly(warp, |a, b| a + b)).collect();
    let in_order = |sums: &[f32]| sums[1..].iter().fold(sums[0], |sum, x| sum + x);
    assert_same(&read(&warp_sum), (0..256).map(|t| sums[t / 32]), "sum of a warp");
    assert_same(&read(&warp_max), (0..256).map(|t| maxima[t / 32]), "maximum of a warp");
    assert_same(&read(&block_sum), (0..256).map(|_| in_order(&sums)), "sum of the block");
    let most = maxima[1..].iter().fold(maxima[0], |most, &x| larger(most, x));
    assert_same(&read(&block_max), (0..256).map(|_| most), "maximum of the block");
    let same = |got: f64, expected: f64| got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan());
    for (t, got) in read(&warp_sum_f64).into_iter().enumerate() {
        assert!(same(got, sums_f64[t / 32]), "sum of a warp in f64, thread {t}: {got}");
    }
    let sum = sums_f64[1..].iter().fold(sums_f64[0], |sum, x| sum + x);
    assert!(read(&block_sum_f64).into_iter().all(|got| same(got, sum)), "sum of the block in f64");
}

#[test]
#[ignore = "takes a CUDA device, or the emulator"]
fn reductions_in_their_order() {
    let mut x: Vec<f32> = Draws::new(6).normal(256, 100.0, 50.0);
    check_reductions(&x);
    x[77] = f32::NAN;
    check_reductions(&x);
}

#[test]
#[ignore = "takes a CUDA device, or the emulator"]
fn sixteen_bytes_at_once() {
    let mut draws = Draws::new(7);
    let (single, half) = (draws.values::<f32>(128), draws.values::<bf16>(256));
    let raw: Vec<u32> = (0..128).map(|_| draws.word()).collect();
    let (mut single_out, mut half_out, mut raw_out) = (output::<f32>(128), output::<bf16>(256), output::<u32>(128));
    let (single_in, half_in, raw_in) = (input(&single), input(&half), input(&raw));
    let args = VectorArgs {
        single: at(&single_in),
        single_out: to(&mut single_out),
        half: at(&half_in),
        half_out: to(&mut half_out),
        raw: at(&raw_in),
        raw_out: to(&mut raw_out),
    };
    run(MODULE, "conformance_vector", Grid::line(1, 32), &args);
    assert!(bits(&read(&single_out)) == bits(&single), "f32");
    assert!(bits(&read(&half_out)) == bits(&half), "bf16");
    assert!(read(&raw_out) == raw, "any bits");
}

#[test]
#[ignore = "takes a CUDA device, or the emulator"]
fn random_numbers() {
    let (philox, purpose, first) = (Philox { seed: 0x1234_5678_9abc_def0 }, 71, 0xffff_fff0_u64);
    let rate = 0.3_f32;
    let factor = (1.0 / (1.0 - f64::from(rate))) as f32;
    let rng = input(&[philox.seed, first]);
    let mut words = output::<u32>(256);
    let mut multipliers = output::<f32>(256);
    let [mut units, mut one, mut none] = [(); 3].map(|()| output::<f32>(64));
    let args = RandomArgs {
        seed: philox.seed,
        sample: first,
        words: to(&mut words),
        units: to(&mut units),
        multipliers: to(&mut multipliers),
        one: to(&mut one),
        none: to(&mut none),
        dropout: DropoutArgs { rng: at(&rng), purpose, rate, factor, unused: 0 },
        purpose: u64::from(purpose),
    };
    run(MODULE, "conformance_random", Grid::line(1, 64), &args);
    // Samples pass 2^32 on the way.
    let expected: Vec<[u32; 4]> = (0..64).map(|t| philox.words(purpose, first + u64::from(t), t)).collect();
    assert_eq!(read(&words), expected.concat());
    assert_same(&read(&units), expected.iter().map(|words| Philox::unit(words[0])), "unit");
    let kept: Vec<f32> = (0..64)
        .flat_map(|block| philox.words(purpose, first + 5, block))
        .map(|word| if Philox::unit(word) >= rate { factor } else { 0.0 })
        .collect();
    assert_same(&read(&multipliers), kept.iter().copied(), "multipliers");
    assert_same(&read(&one), (0..64).map(|t| kept[4 * t + 2]), "one multiplier");
    assert_same(&read(&none), (0..64).map(|_| 1.0), "no dropout");
}

/// At most `ulps` units in the last place away; what is not finite is the same.
fn assert_within(got: &[f32], ulps: f64, exact: impl Fn(usize) -> f64, what: &str) {
    for (i, &got) in got.iter().enumerate() {
        let exact = exact(i);
        let near = exact as f32;
        if !near.is_finite() {
            assert!(got.to_bits() == near.to_bits() || (got.is_nan() && near.is_nan()), "{what}, {i}: {got}");
            continue;
        }
        let unit = (exact.abs().log2().floor() - 23.0).max(-149.0).exp2();
        assert!((f64::from(got) - exact).abs() <= ulps * unit, "{what}, {i}: {got}, expected {exact}");
    }
}

#[test]
#[ignore = "takes a CUDA device, or the emulator"]
fn accurate_functions() {
    let mut draws = Draws::new(8);
    let mut x = edges();
    x.extend(draws.normal::<f32>(2000, 0.0, 20.0));
    x.extend(draws.normal::<f32>(1000, 0.0, 0.5));
    let y: Vec<f32> = draws.normal(x.len(), 0.0, 2.0);
    let [mut exp, mut log, mut erf, mut sqrt, mut quotient, mut fma] = [(); 6].map(|()| output::<f32>(x.len()));
    let (x_in, y_in) = (input(&x), input(&y));
    let args = MathArgs {
        x: at(&x_in),
        y: at(&y_in),
        exp: to(&mut exp),
        log: to(&mut log),
        erf: to(&mut erf),
        sqrt: to(&mut sqrt),
        quotient: to(&mut quotient),
        fma: to(&mut fma),
        n: x.len() as u64,
    };
    run(MODULE, "conformance_math", Grid::line(super::blocks(x.len(), 128), 128), &args);
    assert_within(&read(&exp), 2.0, |i| f64::from(x[i]).exp(), "expf");
    assert_within(&read(&log), 1.0, |i| f64::from(x[i]).abs().ln(), "logf");
    assert_within(&read(&erf), 2.0, |i| libm::erf(f64::from(x[i])), "erff");
    assert_same(&read(&sqrt), x.iter().map(|x| x.abs().sqrt()), "sqrtf");
    assert_same(&read(&quotient), x.iter().zip(&y).map(|(x, y)| x / y), "division");
    assert_same(&read(&fma), x.iter().zip(&y).map(|(x, y)| x.mul_add(*y, 1.0)), "fmaf");
}

#[test]
#[ignore = "takes a CUDA device, or the emulator"]
fn last_block_sums() {
    let mut draws = Draws::new(9);
    let mut ticket = input(&[0_u32]);
    for blocks in [1, 2, 70] {
        let x: Vec<u32> = (0..blocks * 64).map(|_| draws.word() >> 16).collect();
        let (mut parts, mut sum) = (output::<u32>(blocks), output::<u32>(1));
        let x_in = input(&x);
        let args = LastBlockArgs { x: at(&x_in), parts: to(&mut parts), sum: to(&mut sum), ticket: to(&mut ticket) };
        run(MODULE, "conformance_last_block", Grid::line(blocks, 64), &args);
        let expected: Vec<u32> = x.chunks(64).map(|block| block.iter().sum()).collect();
        assert_eq!(read(&parts), expected);
        assert_eq!(read(&sum), [expected.iter().sum()]);
        assert_eq!(read(&ticket), [0]);
    }
}

#[test]
#[ignore = "takes a CUDA device, or the emulator"]
fn shared_memory_sized_at_the_launch() {
    let n = 1003;
    let x: Vec<f32> = Draws::new(10).values(12 * n);
    let mut y = output::<f32>(x.len());
    let x_in = input(&x);
    let args = DynamicSharedArgs { x: at(&x_in), y: to(&mut y), n: n as u64 };
    run(MODULE, "conformance_dynamic_shared", Grid { blocks: [3, 2, 2], threads: 64, shared_bytes: n * 4 }, &args);
    let expected: Vec<f32> = x.chunks(n).flat_map(|row| row.iter().rev().copied()).collect();
    assert!(bits(&read(&y)) == bits(&expected), "not backwards");
}

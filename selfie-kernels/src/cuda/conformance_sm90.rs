//! The same as [`super::conformance`] for `cuda/hopper.h`, by the kernels of `cuda/conformance_sm90.cu`. On a GPU they take
//! one of compute capability 9.0.

use super::conformance::{Arguments, at, input, output, read, run, to};
use super::{Address, Boxes, Cuda, Grid, TensorMap, Windows};
use crate::ConvDims;
use crate::testing::{Draws, TestDevice};
use half::bf16;

const MODULE: &str = "conformance_sm90";

/// One block with memory that the kernel sizes.
fn block(threads: usize, shared_bytes: usize) -> Grid {
    Grid { blocks: [1, 1, 1], threads, shared_bytes }
}

fn words(len: usize, seed: u64) -> Vec<u32> {
    let mut draws = Draws::new(seed);
    (0..len).map(|_| draws.word()).collect()
}

#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::NoUninit)]
struct CopyArgs {
    x: Address,
    y: Address,
    n: u64,
}

#[test]
#[ignore = "takes a CUDA device, or the emulator"]
fn bulk_copies_and_phases() {
    for n in [4, 1000, 2048] {
        let x = words(2 * n, 1);
        let (x_in, mut y) = (input(&x), output::<u32>(2 * n));
        let args = CopyArgs { x: at(&x_in), y: to(&mut y), n: n as u64 };
        run(MODULE, "conformance_bulk", block(128, 8192 + 8), &args);
        assert!(read(&y) == x, "{n} words");
    }
}

#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::NoUninit)]
struct LoadsArgs {
    half: Address,
    single: Address,
    bits: Address,
    pairs: Address,
    n: u64,
}

#[test]
#[ignore = "takes a CUDA device, or the emulator"]
fn loads_that_stand_where_they_are_written() {
    let n = 1000;
    let half: Vec<u16> = words(n, 3).into_iter().map(|word| word as u16).collect();
    let single = words(2 * n, 4);
    let (half_in, single_in) = (input(&half), input(&single));
    let [mut bits, mut pairs] = [n, 2 * n].map(output::<u32>);
    let args = LoadsArgs {
        half: at(&half_in),
        single: at(&single_in),
        bits: to(&mut bits),
        pairs: to(&mut pairs),
        n: n as u64,
    };
    run(MODULE, "conformance_loads", block(128, 0), &args);
    let expected = |i: usize| if i.is_multiple_of(3) { u32::from(half[i]) } else { 0 };
    assert_eq!(read(&bits), (0..n).map(expected).collect::<Vec<_>>());
    assert_eq!(read(&pairs), single);
}

#[test]
#[ignore = "takes a CUDA device, or the emulator"]
fn matrices_to_shared_memory() {
    let [mut raw, mut turned] = [(); 2].map(|()| output::<u16>(256));
    let [mut plain, mut transposed] = [(); 2].map(|()| output::<u32>(128));
    let args = Arguments([to(&mut raw), to(&mut turned), to(&mut plain), to(&mut transposed)]);
    run(MODULE, "conformance_stmatrix", block(32, 512), &args);
    assert_eq!(read(&raw), (0..256).collect::<Vec<u16>>());
    assert_eq!(read(&turned), (0..256).map(|i| i / 64 * 64 + i % 8 * 8 + i / 8 % 8).collect::<Vec<u16>>());
    let pairs = |next: u32, first: fn(u32, u32) -> u32| -> Vec<u32> {
        (0..128)
            .map(|i| {
                let (lane, matrix) = (i / 4, i % 4);
                let first = matrix * 64 + first(lane / 4, lane % 4 * 2);
                first | (first + next) << 16
            })
            .collect()
    };
    assert_eq!(read(&plain), pairs(1, |major, minor| major * 8 + minor));
    assert_eq!(read(&transposed), pairs(8, |major, minor| minor * 8 + major));
}

#[test]
#[ignore = "takes a CUDA device, or the emulator"]
fn barriers_of_half_a_block() {
    let mut y = output::<u32>(256);
    run(MODULE, "conformance_named_barrier", block(256, 1024), &Arguments([to(&mut y)]));
    let after = |rounds: usize| {
        let next = |v: Vec<u32>| (0..128).map(|t| v[(5 * t + 1) % 128] + 1).collect();
        (0..rounds).fold((0..128).collect::<Vec<u32>>(), |v, _| next(v))
    };
    assert_eq!(read(&y), [after(3), after(5)].concat());
}

#[test]
#[ignore = "takes a CUDA device, or the emulator"]
fn producer_and_consumers() {
    for tiles in [1, 2, 3, 12] {
        let x = words(tiles * 256, 2);
        let (x_in, mut y) = (input(&x), output::<u32>(256));
        let args = CopyArgs { x: at(&x_in), y: to(&mut y), n: tiles as u64 };
        run(MODULE, "conformance_ring", block(384, 3 * 1024 + 48), &args);
        let sum = |t: usize| (0..tiles).fold(0_u32, |sum, tile| sum.wrapping_add(x[tile * 256 + t]));
        assert_eq!(read(&y), (0..256).map(sum).collect::<Vec<_>>(), "{tiles} tiles");
    }
}

/// Where byte `byte` of row `row` of 128 bytes lies once swizzled.
fn swizzled(row: usize, byte: usize) -> usize {
    row * 128 + (byte ^ ((row & 7) << 4))
}

/// Which index of an operand is contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Major {
    K,
    Other,
}

impl Major {
    /// Where element (i, k) of an operand lies.
    fn place(self, i: usize, k: usize) -> usize {
        match self {
            Major::K => swizzled(i, 2 * k),
            Major::Other => i / 64 * 8192 + swizzled(k, i % 64 * 2),
        }
    }
}

fn check_products(n: usize, name: &str, a_major: Major, b_major: Major) {
    let mut draws = Draws::new(n as u64);
    let (a, b) = (draws.values::<bf16>(64 * 64), draws.values::<bf16>(64 * n));
    let mut image = vec![0_u16; (8192 + n * 128) / 2];
    for k in 0..64 {
        (0..64).for_each(|row| image[a_major.place(row, k) / 2] = a[row * 64 + k].to_bits());
        (0..n).for_each(|column| image[(8192 + b_major.place(column, k)) / 2] = b[k * n + column].to_bits());
    }
    let (image_in, a_in, mut d) = (input(&image), input(&a), output::<f32>(64 * n));
    let kernel = format!("conformance_wgmma_{n}_{name}");
    let args = Arguments([at(&image_in), at(&a_in), to(&mut d)]);
    run(MODULE, &kernel, block(128, 8192 + n * 128), &args);
    assert_products(&kernel, n, &read(&d), |row, k| a[row * 64 + k].to_f64(), |k, column| b[k * n + column].to_f64());
}

/// That `d` is the product of 64 x 64 and 64 x `n`.
fn assert_products(
    kernel: &str,
    n: usize,
    d: &[f32],
    a: impl Fn(usize, usize) -> f64,
    b: impl Fn(usize, usize) -> f64,
) {
    for (i, &d) in d.iter().enumerate() {
        let terms = (0..64).map(|k| a(i / n, k) * b(k, i % n));
        let (exact, magnitude) = terms.fold((0.0, 0.0), |(sum, all), term| (sum + term, all + term.abs()));
        let bound = 128.0 * f64::from(f32::EPSILON) * magnitude;
        assert!((f64::from(d) - exact).abs() <= bound, "{kernel}, element {i}: {d}, expected {exact}");
    }
}

#[test]
#[ignore = "takes a CUDA device, or the emulator"]
fn products_of_a_warpgroup() {
    for n in [64, 128, 256] {
        check_products(n, "k_k", Major::K, Major::K);
        check_products(n, "k_other", Major::K, Major::Other);
        check_products(n, "other_k", Major::Other, Major::K);
        check_products(n, "other_other", Major::Other, Major::Other);
        check_products(n, "registers_k", Major::K, Major::K);
        check_products(n, "registers_other", Major::K, Major::Other);
    }
}

#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::NoUninit)]
struct PlainProductArgs {
    image: Address,
    a: Address,
    d: Address,
    bytes: u32,
    a_run: u32,
    a_group: u32,
    b_at: u32,
    b_run: u32,
    b_group: u32,
}

/// Where element (i, k) of an operand that is not swizzled lies, from its start.
fn plain_place(major: Major, [run, group]: [usize; 2], i: usize, k: usize) -> usize {
    let [row, column] = if major == Major::K { [i % 8, k % 8] } else { [k % 8, i % 8] };
    k / 8 * run + i / 8 * group + row * 16 + column * 2
}

#[test]
#[ignore = "takes a CUDA device, or the emulator"]
fn products_of_operands_without_swizzle() {
    const A: [usize; 2] = [1024, 128];
    const B_AT: usize = 8192 + 48;
    // Block by block; and blocks that overlap, as windows of a line of pixels do.
    let cases = [
        (112, Major::K, [14 * 128, 128]),
        (112, Major::K, [16, 176]),
        (112, Major::K, [144, 304]),
        (56, Major::Other, [128, 1024]),
        (56, Major::Other, [176, 2464]),
    ];
    for (n, major, b_steps) in cases {
        let kernel = format!("conformance_wgmma_{n}_plain");
        let bytes = (B_AT + plain_place(major, b_steps, n - 1, 63) + 128).next_multiple_of(4);
        let mut draws = Draws::new(n as u64);
        let (image, rows) = (draws.values::<bf16>(bytes / 2), draws.values::<bf16>(64 * 64));
        let (image_in, a_in, mut d) = (input(&image), input(&rows), output::<f32>(64 * n));
        let [a_run, a_group, b_at, b_run, b_group] = [A[0], A[1], B_AT, b_steps[0], b_steps[1]].map(|x| x as u32);
        let args = PlainProductArgs {
            image: at(&image_in),
            a: at(&a_in),
            d: to(&mut d),
            bytes: bytes as u32,
            a_run,
            a_group,
            b_at,
            b_run,
            b_group,
        };
        run(MODULE, &kernel, block(128, bytes), &args);
        let a = |row: usize, k: usize| match n {
            112 => image[plain_place(Major::K, A, row, k) / 2].to_f64(),
            _ => rows[row * 64 + k].to_f64(),
        };
        let b = |k: usize, column: usize| image[(B_AT + plain_place(major, b_steps, column, k)) / 2].to_f64();
        assert_products(&format!("{kernel}, steps {b_steps:?}"), n, &read(&d), a, b);
    }
}

#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::NoUninit)]
struct PairsArgs {
    x: Address,
    y: Address,
    sum: Address,
    larger: Address,
    smaller: Address,
    signs: Address,
    n: u64,
}

fn number_of(bits: u16) -> f64 {
    bf16::from_bits(bits).to_f64()
}

/// As bf16 is stored by what knows one NaN.
fn canonical(value: f64) -> u16 {
    if value.is_nan() { 0x7fff } else { bf16::from_f64(value).to_bits() }
}

#[test]
#[ignore = "takes a CUDA device, or the emulator"]
fn pairs_of_numbers() {
    // Zeros, infinities, the least numbers and NaN of both signs; ordinary ones; sums that round to even.
    const HALVES: [u16; 16] = [
        0x0000, 0x8000, 0x7f80, 0xff80, 0x7fff, 0xffc1, 0x0001, 0x8001, 0x3f80, 0xbf80, 0x3b80, 0x3b81, 0x4049, 0xc2f7,
        0x7f7f, 0x00ff,
    ];
    let pairs = || HALVES.into_iter().flat_map(|x| HALVES.map(|y| (x, y)));
    let of_halves =
        |halves: Vec<u16>| halves.chunks(2).map(|pair| u32::from(pair[0]) | u32::from(pair[1]) << 16).collect();
    let x: Vec<u32> = of_halves(pairs().map(|pair| pair.0).collect());
    let y: Vec<u32> = of_halves(pairs().map(|pair| pair.1).collect());
    let (x_in, y_in, n) = (input(&x), input(&y), x.len());
    let [mut sum, mut larger, mut smaller, mut signs] = [(); 4].map(|()| output::<u32>(n));
    let args = PairsArgs {
        x: at(&x_in),
        y: at(&y_in),
        sum: to(&mut sum),
        larger: to(&mut larger),
        smaller: to(&mut smaller),
        signs: to(&mut signs),
        n: n as u64,
    };
    run(MODULE, "conformance_pairs", block(128, 0), &args);
    let expect = |what: &str, got: Vec<u32>, of_pair: fn(u16, u16) -> u16| {
        let want: Vec<u32> = of_halves(pairs().map(|(x, y)| of_pair(x, y)).collect());
        for (i, (got, want)) in got.into_iter().zip(want).enumerate() {
            assert_eq!(got, want, "{what} of {:08x} and {:08x}: {got:08x}, expected {want:08x}", x[i], y[i]);
        }
    };
    expect("the sum", read(&sum), |x, y| canonical(number_of(x) + number_of(y)));
    expect("the larger one", read(&larger), |x, y| {
        let (a, b) = (number_of(x), number_of(y));
        if a.is_nan() || b.is_nan() {
            0x7fff
        } else if a > b || (a == b && a.is_sign_positive()) {
            x
        } else {
            y
        }
    });
    expect("the smaller one", read(&smaller), std::cmp::min);
    expect("the signs", read(&signs), |x, _| if x >> 15 == 1 { 0xffff } else { 0 });
}

/// Of a tensor without gaps.
fn map(address: Address, dims: &[usize], sides: &[usize]) -> TensorMap {
    let strides: Vec<_> = (1..dims.len()).map(|i| 2 * dims[..i].iter().product::<usize>()).collect();
    Cuda::get().map_boxes(&Boxes { address, dims, strides: &strides, sides }).expect("TMA copies such boxes")
}

#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::NoUninit)]
struct LoadArgs {
    map: TensorMap,
    at: [i32; 4],
    to: u32,
    box_bytes: u32,
    total: u32,
    rank: u32,
    y: Address,
    dx: i32,
    dy: i32,
    unused: [u64; 2],
}

fn check_load(size: &[usize], box_size: &[usize], at_place: &[i32], offset: usize) {
    let elements = box_size.iter().product::<usize>();
    let total = (offset + elements * 2).next_multiple_of(1024);
    let x: Vec<u16> = (0..size.iter().product()).map(|i: usize| (i % 60_000) as u16 + 1).collect();
    let (x_in, mut y) = (input(&x), output::<u32>(total / 4));
    let mut place = [0; 4];
    place[..at_place.len()].copy_from_slice(at_place);
    let args = LoadArgs {
        map: map(at(&x_in), size, box_size),
        at: place,
        to: offset as u32,
        box_bytes: elements as u32 * 2,
        total: total as u32,
        rank: size.len() as u32,
        y: to(&mut y),
        dx: 0,
        dy: 0,
        unused: [0; 2],
    };
    run(MODULE, "conformance_tma_load", block(128, total + 8), &args);
    let mut expected = vec![0xeeee_u16; total / 2];
    for e in 0..elements {
        let (mut rest, mut stride, mut from) = (e, 1, Some(0));
        for i in 0..size.len() {
            let p = i64::from(at_place[i]) + (rest % box_size[i]) as i64;
            rest /= box_size[i];
            let inside = usize::try_from(p).ok().filter(|p| *p < size[i]);
            from = from.zip(inside).map(|(from, p)| from + p * stride);
            stride *= size[i];
        }
        let byte = offset + e * 2;
        expected[swizzled(byte / 128, byte % 128) / 2] = from.map_or(0, |from: usize| x[from]);
    }
    let got: Vec<u16> = read(&y).into_iter().flat_map(|pair| [pair as u16, (pair >> 16) as u16]).collect();
    assert!(got == expected, "size {size:?}, box {box_size:?} at {at_place:?}, offset {offset}");
}

#[test]
#[ignore = "takes a CUDA device, or the emulator"]
fn boxes_from_global_memory() {
    check_load(&[128, 100], &[64, 32], &[64, 16], 0);
    // Past the end; in front of the beginning; where the swizzle starts in the middle of its pattern.
    check_load(&[128, 100], &[64, 32], &[0, 90], 1024);
    check_load(&[72, 40], &[64, 16], &[64, -3], 0);
    check_load(&[128, 100], &[64, 9], &[0, 5], 1024 + 9 * 128);
    check_load(&[64, 12, 20], &[64, 5, 3], &[0, 9, 18], 0);
    // A row of an image with its padding; two images with theirs, the second past the end.
    check_load(&[128, 7, 7, 3], &[64, 9, 1, 1], &[64, -1, 6, 2], 1152);
    check_load(&[64, 5, 5, 4], &[64, 7, 7, 2], &[0, -1, -1, 3], 0);
}

/// `count` windows from number `first` on, of each the tap at (`dx`, `dy`), 64 channels of them from `channel` on.
fn check_windows(dims: ConvDims, count: usize, first: usize, [dx, dy]: [usize; 2], channel: usize) {
    let ConvDims { n, h, w, c, stride, pad, .. } = dims;
    let corner = |window: usize| {
        let (line, column) = (window / dims.q(), window % dims.q());
        let place = |index: usize| (index * stride) as i32 - pad as i32;
        [place(column), place(line % dims.p()), (line / dims.p()) as i32]
    };
    let x: Vec<u16> = (0..dims.len_in()).map(|i: usize| (i % 60_000) as u16 + 1).collect();
    let total = (count * 128).next_multiple_of(1024);
    let (x_in, mut y) = (input(&x), output::<u32>(total / 4));
    let [at_x, at_y, image] = corner(first);
    let windows = Windows { address: at(&x_in), dims, count };
    let args = LoadArgs {
        map: Cuda::get().map_windows(&windows).expect("TMA copies such windows"),
        at: [channel as i32, at_x, at_y, image],
        to: 0,
        box_bytes: count as u32 * 128,
        total: total as u32,
        rank: 0,
        y: to(&mut y),
        dx: dx as i32,
        dy: dy as i32,
        unused: [0; 2],
    };
    run(MODULE, "conformance_tma_load", block(128, total + 8), &args);
    let mut expected = vec![0xeeee_u16; total / 2];
    for row in 0..count {
        let [at_x, at_y, image] = corner(first + row);
        let inside = |at: i32, by: usize, end: usize| usize::try_from(at + by as i32).ok().filter(|&at| at < end);
        let pixel = inside(at_x, dx, w).zip(inside(at_y, dy, h)).filter(|_| (image as usize) < n);
        for e in 0..64 {
            let value = pixel
                .filter(|_| channel + e < c)
                .map_or(0, |(px, py)| x[((image as usize * h + py) * w + px) * c + channel + e]);
            expected[swizzled(row, 2 * e) / 2] = value;
        }
    }
    let got: Vec<u16> = read(&y).into_iter().flat_map(|pair| [pair as u16, (pair >> 16) as u16]).collect();
    assert!(got == expected, "{dims:?}, {count} windows from {first}, tap ({dx}, {dy}), channel {channel}");
}

#[test]
#[ignore = "takes a CUDA device, or the emulator"]
fn windows_from_global_memory() {
    let maps = ConvDims { n: 3, h: 9, w: 7, c: 72, k: 1, r: 3, s: 3, stride: 1, pad: 1 };
    for stride in [1, 2, 3] {
        for (tap, channel) in [([0, 0], 0), ([1, 1], 0), ([2, 0], 64), ([0, 2], 64), ([2, 2], 0)] {
            let dims = ConvDims { stride, ..maps };
            // From the middle of a line over the end of an image, and past the last one.
            check_windows(dims, 32, 5, tap, channel);
            check_windows(dims, 64, dims.rows_out() - 9, tap, channel);
        }
        let pointwise = ConvDims { r: 1, s: 1, pad: 0, stride, ..maps };
        check_windows(pointwise, 40, 3, [0, 0], 0);
        check_windows(ConvDims { h: 8, w: 8, ..pointwise }, 40, 1, [0, 0], 64);
    }
}

#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::NoUninit)]
struct StoreArgs {
    map: TensorMap,
    x: i32,
    y: i32,
    from: u32,
    unused: [u32; 13],
}

#[test]
#[ignore = "takes a CUDA device, or the emulator"]
fn boxes_to_global_memory() {
    let (rows, columns, row, column) = (50, 136, 4, 128);
    for from in [0, 1024 + 384] {
        let mut y = output::<u16>(rows * columns);
        let map = map(to(&mut y), &[columns, rows], &[64, 16]);
        let args = StoreArgs { map, x: column as i32, y: row as i32, from: from as u32, unused: [0; 13] };
        run(MODULE, "conformance_tma_store", block(128, from + 2048), &args);
        let expected = |i: usize| {
            let (r, c) = (i / columns, i % columns);
            if r < row || r >= row + 48 || c < column {
                return u16::MAX;
            }
            let (tile, r) = ((r - row) / 16, (r - row) % 16);
            (tile * 10_000 + r * 64 + (c - column) + 1) as u16
        };
        assert!(read(&y) == (0..rows * columns).map(expected).collect::<Vec<_>>(), "from {from}");
    }
}

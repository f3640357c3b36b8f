use super::*;
use crate::testing::*;
use ndarray::{Array4, ArrayView4};
use proptest::prelude::any;

const fn conv([n, h, w]: [usize; 3], [c, k]: [usize; 2], [r, s]: [usize; 2], stride: usize, pad: usize) -> ConvDims {
    ConvDims { n, h, w, c, k, r, s, stride, pad }
}

/// The large stem of images of `h` by `w` pixels.
const fn stem([n, h, w]: [usize; 3], k: usize) -> ConvDims {
    conv([n, h, w], [3, k], [7, 7], 2, 3)
}

const CASES: &[(&str, ConvDims)] = &[
    ("one number", conv([1, 1, 1], [1, 1], [1, 1], 1, 0)),
    ("one row of a map", conv([2, 1, 7], [2, 3], [1, 1], 1, 0)),
    ("one column of a map", conv([2, 6, 1], [1, 5], [1, 1], 1, 0)),
    ("a map of odd sides", conv([3, 5, 7], [2, 17], [1, 1], 1, 0)),
    ("more than one tile of sums, the last one short", conv([2, 22, 26], [1, 9], [1, 1], 1, 0)),
    ("more channels than a block of the sums", conv([1, 9, 24], [2, 130], [1, 1], 1, 0)),
    ("5x3 of 17 channels", conv([2, 6, 7], [17, 9], [5, 3], 1, 2)),
    ("7x7 without padding", conv([1, 12, 10], [3, 8], [7, 7], 2, 0)),
    ("two pixels", stem([3, 1, 2], 8)),
    ("filters that are no chunks", stem([2, 11, 14], 17)),
    ("odd width", stem([2, 12, 13], 8)),
    ("even sides of the map", stem([2, 16, 16], 64)),
    ("odd sides of the map", stem([3, 17, 18], 40)),
    ("more filters than a block", stem([2, 10, 14], 72)),
    ("images side by side, one in the last group", stem([9, 32, 32], 8)),
    ("one column more than a tile", stem([3, 9, 34], 16)),
    ("three images of two tiles", stem([3, 20, 36], 8)),
    ("two images of four tiles", stem([3, 6, 100], 8)),
    ("as wide as a photograph", stem([1, 7, 224], 8)),
    ("a row longer than a segment", stem([2, 5, 262], 8)),
    ("a row of three segments", stem([1, 4, 512], 8)),
    // Hopper's kernels take multiples of 16 pixels, up to 224, and of 16 filters; a product has 112 columns.
    ("a product's columns, an odd number of rows", stem([2, 9, 224], 64)),
    ("fewer columns than a product's", stem([1, 12, 208], 16)),
    ("fourteen images side by side, two in the last group", stem([16, 5, 16], 16)),
    ("seven side by side, more filters than a block", stem([9, 10, 32], 80)),
    ("four side by side, some columns without an image", stem([3, 7, 48], 32)),
    ("statistics of three tiles for each consumer, the last one short", stem([99, 1, 128], 16)),
];

on_every_device! {
    elements: cases, any_shape, any_stem, the_first_of_equal_values_wins, a_nan_reaches_what_reads_it;
    once: refuses_what_does_not_fit;
}

struct Pooled<B: Memory, T: Element> {
    y: Vec<T>,
    argmax: Vec<u8>,
    stats: Partials<B, T::Wide>,
}

/// With its statistics, which change nothing.
fn forward<T: Element, B: StemPool<T>>(device: &B, dims: ConvDims, x: &[T], w: &[T]) -> Pooled<B, T> {
    let pool = PoolDims::behind(&dims);
    let mut stats = room(device, pool.rows_out(), pool.c);
    let (y, argmax) = run_forward(device, dims, x, w, Some(&mut stats));
    let without = run_forward(device, dims, x, w, None);
    assert!((bits(&y), &argmax) == (bits(&without.0), &without.1), "statistics change the output");
    Pooled { y, argmax, stats }
}

fn run_forward<T: Element, B: StemPool<T>>(
    device: &B,
    dims: ConvDims,
    x: &[T],
    w: &[T],
    stats: Option<&mut Partials<B, T::Wide>>,
) -> (Vec<T>, Vec<u8>) {
    let len = PoolDims::behind(&dims).len_out();
    let (x, w) = (Guarded::new(device, x), Guarded::new(device, w));
    let mut map = Guarded::poisoned(device, dims.len_out());
    let (mut y, mut argmax) = (Guarded::poisoned(device, len), Guarded::poisoned(device, len));
    let (x, w, room) = (x.view(), w.view(), map.view_mut());
    let args = Forward { dims, x, w, map: room, y: y.view_mut(), argmax: argmax.view_mut(), stats };
    device.stem_pool_forward(args).expect("dims and lengths fit");
    map.read(device);
    (y.read(device), argmax.read(device))
}

fn backward_filter<T: Element, B: StemPool<T>>(
    device: &B,
    dims: ConvDims,
    x: &[T],
    dy: &HostGrad<T>,
    argmax: &[u8],
) -> Vec<T::Wide> {
    let (x, dy, argmax) = (Guarded::new(device, x), dy.upload(device), Guarded::new(device, argmax));
    let mut map = Guarded::poisoned(device, dims.len_out());
    let mut dw = Guarded::poisoned(device, dims.len_filter());
    let (x, argmax, room) = (x.view(), argmax.view(), map.view_mut());
    let args = BackwardFilter { dims, x, dy: dy.view(), argmax, map: room, dw: dw.view_mut() };
    device.stem_pool_backward_filter(args).expect("dims and lengths fit");
    map.read(device);
    dw.read(device)
}

/// The nine taps of an output pixel that lie inside the map: (tap, row, column).
fn taps(pool: PoolDims, i: usize, j: usize) -> impl Iterator<Item = (u8, usize, usize)> {
    (0..9u8).filter_map(move |tap| {
        let (row, column) = (2 * i + usize::from(tap / 3), 2 * j + usize::from(tap % 3));
        let inside = (1..=pool.h).contains(&row) && (1..=pool.w).contains(&column);
        inside.then(|| (tap, row - 1, column - 1))
    })
}

/// The windows, in the order of `y`: of each the taps inside, and what the map has there.
fn windows<S: Copy>(pool: PoolDims, map: &[S]) -> impl Iterator<Item = Vec<(u8, S)>> {
    let map = ArrayView4::from_shape((pool.n, pool.h, pool.w, pool.c), map).expect("length of the map");
    let outputs = ndarray::indices((pool.n, pool.p(), pool.q(), pool.c)).into_iter();
    outputs
        .map(move |(n, i, j, k)| taps(pool, i, j).map(|(tap, row, column)| (tap, map[[n, row, column, k]])).collect())
}

/// Maximum and winner of every window.
fn oracle_forward(pool: PoolDims, map: &[f64]) -> (Vec<f64>, Vec<u8>) {
    let first_of_largest = |window: Vec<(u8, f64)>| {
        let (tap, value) = window.into_iter().reduce(|best, new| if new.1 > best.1 { new } else { best })?;
        Some((value, tap))
    };
    windows(pool, map).map(|window| first_of_largest(window).expect("the middle is inside")).unzip()
}

/// Scatters each window's gradient to its winner.
fn oracle_unpool(pool: PoolDims, dy: &[Exact], argmax: &[u8]) -> Vec<Exact> {
    let mut dm = Array4::from_elem((pool.n, pool.h, pool.w, pool.c), Exact::default());
    let outputs = ndarray::indices((pool.n, pool.p(), pool.q(), pool.c));
    for ((n, i, j, k), (&dy, &winner)) in outputs.into_iter().zip(dy.iter().zip(argmax)) {
        let (_, row, column) = taps(pool, i, j).find(|&(tap, ..)| tap == winner).expect("the winner is inside");
        dm[[n, row, column, k]] += dy;
    }
    dm.into_raw_vec_and_offset().0
}

/// With sums that are exact in any order, so that the map and what comes of it are known to the bit; many are equal.
fn check_ties<T: Element, B: StemPool<T>>(device: &B, dims: ConvDims, draws: &mut Draws) {
    let (pool, x, w) = (PoolDims::behind(&dims), draws.ties::<T>(dims.len_in()), draws.ties::<T>(dims.len_filter()));
    let map: Vec<T> = convolve(dims, &exact(&x), &exact(&w)).into_iter().map(|y| stored(y.value)).collect();
    let (y, argmax) = oracle_forward(pool, &exact(&map));
    let pooled = forward(device, dims, &x, &w);
    assert_eq!(exact(&pooled.y), y, "{} y, {dims:?}", T::NAME);
    assert_eq!(pooled.argmax, argmax, "{} argmax, {dims:?}", T::NAME);
    assert_stats(device, &pooled.y, pool.c, &pooled.stats);
}

/// `y` is what its winner is near to, and no other tap is larger by more than rounding makes it: a sum of n products is n
/// roundings deep in whatever order it is formed, n + 1 where the products are rounded too.
fn check_forward<T: Element, B: StemPool<T>>(device: &B, dims: ConvDims, x: &[T], w: &[T]) -> Pooled<B, T> {
    let (pool, roundings) = (PoolDims::behind(&dims), dims.r * dims.s * dims.c + 1);
    let pooled = forward(device, dims, x, w);
    let (mut winners, mut passed, mut above) = (Vec::new(), Vec::new(), Vec::new());
    let map = convolve(dims, &exact(x), &exact(w));
    for (window, (&y, &winner)) in windows(pool, &map).zip(pooled.y.iter().zip(&pooled.argmax)) {
        let of_winner = window.iter().find(|&&(tap, _)| tap == winner);
        winners.push(of_winner.expect("the winner is inside").1);
        for (_, value) in window.into_iter().filter(|(_, value)| value.value > exact(&[y])[0]) {
            passed.push(y);
            above.push(value);
        }
    }
    assert_close::<T::Wide, _>("y", &pooled.y, &winners, roundings);
    assert_close::<T::Wide, _>("y beside a larger value", &passed, &above, roundings);
    assert_stats(device, &pooled.y, pool.c, &pooled.stats);
    pooled
}

/// Forward, and both kinds of backward. Gradients of the map are sums of up to four, rounded to `T` where they are stored or
/// multiplied.
fn check<D: Tested<T>, T: Element>(device: &D, dims: ConvDims, seed: u64) {
    let mut draws = Draws::new(seed);
    check_ties(device, dims, &mut draws);
    let (x, w) = (draws.values::<T>(dims.len_in()), draws.values(dims.len_filter()));
    let Pooled { y, argmax, .. } = check_forward(device, dims, &x, &w);

    let rounded = if T::EPSILON > <T::Wide as Element>::EPSILON { T::EPSILON } else { 0.0 };
    let plain = HostGrad::Plain(draws.values(y.len()));
    let affine = HostGrad::Affine { dz: draws.values(y.len()), x: y, coef: draws.values(3 * dims.k) };
    for dy in [plain, affine] {
        let dw = backward_filter(device, dims, &x, &dy, &argmax);
        let dm = oracle_unpool(PoolDims::behind(&dims), &dy.oracle(dims.k), &argmax);
        let want = filter_gradient(dims, &dm, &exact(&x));
        let roundings = dims.rows_out() + 1 + HostGrad::<T>::ROUNDINGS + 4;
        let operands = rounded + dy.operand_epsilon(D::operand_epsilon::<T>());
        assert_close_products::<T::Wide, _>("dw", &dw, &want, roundings, operands);
    }
}

fn cases<D: Tested<T>, T: Element>() {
    for &(name, dims) in CASES {
        eprintln!("{}: {name}", T::NAME);
        check::<D, T>(D::get(), dims, 1);
    }
}

fn any_shape<D: Tested<T>, T: Element>() {
    let shapes = ([1..3usize, 1..10, 1..10], [1..4usize, 1..40], [1..5usize, 1..5], 1..3usize, any::<u64>());
    for_any::<D, _>(64, shapes, |(image, channels, filter, stride, seed)| {
        let pad = (filter[0].min(filter[1]) - 1) / 2;
        let filter = [filter[0].min(image[1] + 2 * pad), filter[1].min(image[2] + 2 * pad)];
        check::<D, T>(D::get(), conv(image, channels, filter, stride, pad), seed);
    });
}

fn any_stem<D: Tested<T>, T: Element>() {
    let shapes = ([1..7usize, 1..24, 1..20], 1..10usize, any::<bool>(), any::<u64>());
    for_any::<D, _>(64, shapes, |([n, h, w], k, even, seed)| {
        check::<D, T>(D::get(), stem([n, h, if even { 2 * w } else { w }], 8 * k), seed);
    });
}

/// A filter whose only weight that is not zero stands in the middle, so that the map is every second pixel.
fn middle<T: Element>(k: usize, weight: f64) -> Vec<T> {
    (0..k * 49 * 3).map(|i| stored(if i % (49 * 3) == 24 * 3 { weight } else { 0.0 })).collect()
}

fn the_first_of_equal_values_wins<D: Tested<T>, T: Element>() {
    // The first tap inside: 4, 3, 3, .. in the first row of windows, 1, 0, 0, .. in the others.
    let assert_first = |argmax: &[u8], dims: ConvDims| {
        let pool = PoolDims::behind(&dims);
        for (i, taps) in argmax.chunks(dims.k).enumerate() {
            let (row, column) = (i / pool.q() % pool.p(), i % pool.q());
            let tap = 3 * u8::from(row == 0) + u8::from(column == 0);
            assert_eq!(taps, vec![tap; dims.k], "{dims:?}, window {i}");
        }
    };
    for dims in [stem([1, 8, 8], 8), stem([1, 8, 16], 16), stem([2, 8, 32], 16)] {
        let ones = middle(dims.k, 1.0);
        assert_first(&forward::<T, _>(D::get(), dims, &vec![stored(-2.0); dims.len_in()], &ones).argmax, dims);

        // Half of the map rounds to the negative zero, which is no less than the other: of a quarter of the least number.
        let mut least = T::default();
        let bytes = bytemuck::bytes_of_mut(&mut least);
        (bytes[0], bytes[size_of::<T>() - 1]) = (0x01, 0x80);
        assert!(exact(&[least])[0] < 0.0, "a negative number");
        let x: Vec<T> = (0..dims.len_in()).map(|i| if i / 3 / 2 % 2 == 0 { least } else { T::default() }).collect();
        let pooled = forward(D::get(), dims, &x, &middle(dims.k, 0.25));
        assert!(exact(&pooled.y).iter().all(|&y| y == 0.0), "{dims:?}");
        assert_first(&pooled.argmax, dims);

        let (least, ones) = (vec![stored::<T>(f64::NEG_INFINITY); dims.len_in()], vec![stored(1.0); dims.len_filter()]);
        let pooled = forward(D::get(), dims, &least, &ones);
        assert!(exact(&pooled.y).iter().all(|&y| y == f64::NEG_INFINITY), "{dims:?}");
        assert_first(&pooled.argmax, dims);
    }

    let dims = conv([1, 4, 4], [1, 1], [1, 1], 1, 0);
    let pooled = forward(D::get(), dims, &[stored::<T>(f64::NEG_INFINITY); 16], &[stored(1.0)]);
    assert_first(&pooled.argmax, dims);
    assert_eq!(exact(&pooled.y), [f64::NEG_INFINITY; 4]);
}

#[test]
fn gradient() {
    let (dims, mut draws) = (stem([2, 10, 9], 2), Draws::new(2));
    let (pool, x, w) = (PoolDims::behind(&dims), draws.values::<f64>(dims.len_in()), draws.values(dims.len_filter()));
    let Pooled { y, argmax, .. } = forward(cpu(), dims, &x, &w);
    let dy = draws.values::<f64>(y.len());
    let dw = backward_filter(cpu(), dims, &x, &HostGrad::Plain(dy.clone()), &argmax);
    assert_gradient("dw", &dw, &w, y.len() + dims.r * dims.s * dims.c + 2, |w| {
        let map = convolve(dims, &x, w);
        let winners = windows(pool, &map).zip(&argmax).map(|(window, &winner)| {
            window.into_iter().find(|&(tap, _)| tap == winner).expect("the winner is inside").1
        });
        winners.zip(&dy).map(|(y, &dy)| y.times(dy)).sum()
    });
}

fn a_nan_reaches_what_reads_it<D: Tested<T>, T: Element>() {
    for dims in [stem([1, 22, 22], 24), stem([1, 22, 32], 16), stem([2, 22, 32], 16)] {
        a_nan_reaches_what_reads_it_in::<D, T>(dims);
    }
    // Of one channel and one tap nothing spreads: the middle of 3 x 3 pixels lies in all four windows, which it wins.
    let dims = conv([1, 3, 3], [1, 1], [1, 1], 1, 0);
    let mut x = Draws::new(4).values::<T>(9);
    x[4] = stored(f64::NAN);
    let pooled = forward(D::get(), dims, &x, &[stored::<T>(1.0)]);
    assert_nan_where("y", &pooled.y, |_| true);
    assert_eq!(pooled.argmax, [8, 6, 2, 0]);
}

fn a_nan_reaches_what_reads_it_in<D: Tested<T>, T: Element>(dims: ConvDims) {
    // Pixel (6, 6) of the first image is read by rows and columns 2 to 4 of the map, which lie in windows 1 and 2.
    let mut draws = Draws::new(3);
    let (k, q) = (dims.k, PoolDims::behind(&dims).q());
    let (x, w) = (draws.values::<T>(dims.len_in()), draws.values::<T>(dims.len_filter()));
    let poisoned = |values: &[T], i: usize| {
        let mut values = values.to_vec();
        values[i] = stored(f64::NAN);
        values
    };
    let nan_x = poisoned(&x, (6 * dims.w + 6) * 3 + 1);
    let pooled = forward(D::get(), dims, &nan_x, &w);
    let near = |i: usize| (1..3).contains(&(i / k / q)) && (1..3).contains(&(i / k % q));
    assert_nan_where("y", &pooled.y, near);
    for (i, &tap) in pooled.argmax.iter().enumerate().filter(|&(i, _)| near(i)) {
        let (row, column) = (2 * (i / k / q) + usize::from(tap / 3) - 1, 2 * (i / k % q) + usize::from(tap % 3) - 1);
        assert!((2..5).contains(&row) && (2..5).contains(&column), "argmax[{i}] = {tap}");
    }
    let stats = merge_stats(D::get(), &pooled.stats);
    assert!(stats.mean.iter().chain(&stats.squares).all(|x| x.is_nan()));
    // The middle tap is inside the map everywhere.
    let nan_w = poisoned(&w, (11 * 49 + 24) * 3 + 1);
    assert_nan_where("y", &forward(D::get(), dims, &x, &nan_w).y, |i| i % k == 11);

    // Of stride 2, pixel (6, 6) is read by odd taps.
    let Pooled { y, argmax, .. } = forward(D::get(), dims, &x, &w);
    let dy = draws.values::<T>(y.len());
    let dw = backward_filter(D::get(), dims, &nan_x, &HostGrad::Plain(dy.clone()), &argmax);
    assert_nan_where("dw", &dw, |i| i % 3 == 1 && i / 3 % 7 % 2 == 1 && i / 21 % 7 % 2 == 1);
    let nan_dy = HostGrad::Plain(poisoned(&dy, (3 * q + 3) * k + 11));
    assert_nan_where("dw", &backward_filter(D::get(), dims, &x, &nan_dy, &argmax), |i| i / (49 * 3) == 11);
}

fn assert_nan_where<S: Element>(what: &str, values: &[S], expected: impl Fn(usize) -> bool) {
    for (i, value) in exact(values).into_iter().enumerate() {
        assert_eq!(value.is_nan(), expected(i), "{} {what}[{i}] = {value}", S::NAME);
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    for dims in [stem([5, 38, 42], 24), stem([33, 16, 16], 8)] {
        let mut draws = Draws::new(4);
        let (x, w) = (draws.values::<f32>(dims.len_in()), draws.values::<f32>(dims.len_filter()));
        let dy = HostGrad::Plain(draws.values::<f32>(PoolDims::behind(&dims).len_out()));
        assert_same_on_any_threads(|cpu| {
            let Pooled { y, argmax, stats } = forward(cpu, dims, &x, &w);
            let dw = backward_filter(cpu, dims, &x, &dy, &argmax);
            [bits(&y), argmax, bits(&read_partials(cpu, &stats).1), bits(&dw)].concat()
        });
    }
}

fn refuses_what_does_not_fit<D: Tested<f32>>() {
    // A map of 2 x 2 pixels, pooled to one.
    let dims = stem([2, 4, 4], 5);
    let run = |dims, lens, argmax, k| {
        let [x, w, mut map, mut y] = buffers::<D, f32, 4>(lens);
        let [mut argmax] = buffers::<D, u8, 1>([argmax]);
        let mut stats = bare_room(D::get(), 2, k);
        let (x, w, map, y, stats) = (x.view(), w.view(), map.view_mut(), y.view_mut(), Some(&mut stats));
        D::get().stem_pool_forward(Forward { dims, x, w, map, y, argmax: argmax.view_mut(), stats })
    };
    assert_eq!(run(dims, [96, 735, 40, 10], 10, 5), Ok(()));
    assert_refuses_length(run(dims, [32, 735, 40, 10], 10, 5), "x");
    assert_refuses_length(run(dims, [96, 245, 40, 10], 10, 5), "w");
    assert_refuses_length(run(dims, [96, 735, 10, 10], 10, 5), "map");
    assert_refuses_length(run(dims, [96, 735, 40, 40], 10, 5), "y");
    assert_refuses_length(run(dims, [96, 735, 40, 10], 40, 5), "argmax");
    assert_refuses_dims(run(dims, [96, 735, 40, 10], 10, 4));
    assert_refuses_dims(run(ConvDims { pad: 0, ..dims }, [96, 735, 40, 10], 10, 5));
    let run = |dims, lens, argmax| {
        let [x, dy, mut map, mut dw] = buffers::<D, f32, 4>(lens);
        let [argmax] = buffers::<D, u8, 1>([argmax]);
        let (x, dy, map, dw) = (x.view(), Grad::Plain(dy.view()), map.view_mut(), dw.view_mut());
        D::get().stem_pool_backward_filter(BackwardFilter { dims, x, dy, argmax: argmax.view(), map, dw })
    };
    assert_eq!(run(dims, [96, 10, 40, 735], 10), Ok(()));
    assert_refuses_length(run(dims, [95, 10, 40, 735], 10), "x");
    assert_refuses_length(run(dims, [96, 40, 40, 735], 10), "dy");
    assert_refuses_length(run(dims, [96, 10, 39, 735], 10), "map");
    assert_refuses_length(run(dims, [96, 10, 40, 245], 10), "dw");
    assert_refuses_length(run(dims, [96, 10, 40, 735], 9), "argmax");
    assert_refuses_dims(run(ConvDims { stride: 0, ..dims }, [96, 10, 40, 735], 10));
}

use super::*;
use crate::testing::*;
use ndarray::ArrayView4;
use proptest::prelude::any;

const CASES: &[(&str, [usize; 4])] = &[
    ("one pixel", [1, 1, 1, 1]),
    ("one row", [2, 1, 7, 3]),
    ("one column", [2, 6, 1, 5]),
    ("two by two", [1, 2, 2, 16]),
    ("odd sides", [3, 5, 7, 17]),
    ("even sides", [2, 6, 8, 32]),
    ("more than one tile, the last one short", [2, 22, 26, 9]),
    ("more channels than a block of the sums", [1, 9, 24, 130]),
];

on_every_device! {
    elements: cases, any_shape;
    once: the_first_of_equal_values_wins, a_nan_wins_and_comes_back, refuses_lengths_that_do_not_fit;
}

fn dims([n, h, w, c]: [usize; 4]) -> PoolDims {
    PoolDims { n, h, w, c }
}

struct Pooled<B: Memory, T: Element> {
    y: Vec<T>,
    argmax: Vec<u8>,
    stats: Partials<B, T::Wide>,
}

fn forward<T: Element, B: MaxPool<T>>(device: &B, dims: PoolDims, x: &[T]) -> Pooled<B, T> {
    let x = Guarded::new(device, x);
    let mut y = Guarded::poisoned(device, dims.rows_out() * dims.c);
    let mut argmax = Guarded::poisoned(device, dims.rows_out() * dims.c);
    let mut stats = room(device, dims.rows_out(), dims.c);
    let args = Forward { dims, x: x.view(), y: y.view_mut(), argmax: argmax.view_mut(), stats: &mut stats };
    device.max_pool_forward(args).expect("dims and lengths fit");
    Pooled { y: y.read(device), argmax: argmax.read(device), stats }
}

fn backward<T: Element, B: MaxPool<T>>(device: &B, dims: PoolDims, dy: &HostGrad<T>, argmax: &[u8]) -> Vec<T> {
    let (dy, argmax) = (dy.upload(device), Guarded::new(device, argmax));
    let mut dx = Guarded::poisoned(device, dims.len_in());
    let args = Backward { dims, dy: dy.view(), argmax: argmax.view(), dx: dx.view_mut() };
    device.max_pool_backward(args).expect("dims and lengths fit");
    dx.read(device)
}

/// The nine taps of an output pixel that lie inside the map: (tap, row, column).
fn taps(dims: PoolDims, i: usize, j: usize) -> impl Iterator<Item = (u8, usize, usize)> {
    (0..9u8).filter_map(move |tap| {
        let (row, column) = (2 * i + usize::from(tap / 3), 2 * j + usize::from(tap % 3));
        let inside = (1..=dims.h).contains(&row) && (1..=dims.w).contains(&column);
        inside.then(|| (tap, row - 1, column - 1))
    })
}

/// Maximum and winner of every window, in the order of `y`.
fn oracle_forward(dims: PoolDims, x: &[f64]) -> Vec<(f64, u8)> {
    let x = ArrayView4::from_shape((dims.n, dims.h, dims.w, dims.c), x).expect("length of x");
    let outputs = ndarray::indices((dims.n, dims.p(), dims.q(), dims.c));
    let maximum = |(n, i, j, k)| {
        let taps = taps(dims, i, j).map(|(tap, row, column)| (x[[n, row, column, k]], tap));
        taps.reduce(|best, new| if new.0 > best.0 || new.0.is_nan() { new } else { best })
            .expect("the middle is inside")
    };
    outputs.into_iter().map(maximum).collect()
}

/// Scatters each window's gradient to its winner.
fn oracle_backward(dims: PoolDims, dy: &[Exact], argmax: &[u8]) -> Vec<Exact> {
    let mut dx = ndarray::Array4::from_elem((dims.n, dims.h, dims.w, dims.c), Exact::default());
    let outputs = ndarray::indices((dims.n, dims.p(), dims.q(), dims.c));
    for ((n, i, j, k), (dy, &winner)) in outputs.into_iter().zip(dy.iter().zip(argmax)) {
        let (_, row, column) = taps(dims, i, j).find(|&(tap, ..)| tap == winner).expect("the winner is inside");
        let dx = &mut dx[[n, row, column, k]];
        dx.value += dy.value;
        dx.magnitude += dy.magnitude;
    }
    dx.into_raw_vec_and_offset().0
}

fn check_forward<T: Element, B: MaxPool<T>>(device: &B, dims: PoolDims, x: &[T]) -> Pooled<B, T> {
    let pooled = forward(device, dims, x);
    let (y, argmax): (Vec<f64>, Vec<u8>) = oracle_forward(dims, &exact(x)).into_iter().unzip();
    assert_eq!(exact(&pooled.y), y, "{dims:?}");
    assert_eq!(pooled.argmax, argmax, "{dims:?}");
    assert_stats(device, &pooled.y, dims.c, &pooled.stats);
    pooled
}

/// Forward and both kinds of backward.
fn check<T: Element>(device: &impl MaxPool<T>, dims: PoolDims, seed: u64) {
    let mut draws = Draws::new(seed);
    check_forward(device, dims, &draws.ties::<T>(dims.len_in()));
    check_forward(device, dims, &draws.normal::<T>(dims.len_in(), 1000.0, 1.0));
    let pooled = check_forward(device, dims, &draws.values::<T>(dims.len_in()));

    let dz = draws.values::<T>(pooled.y.len());
    let plain = HostGrad::Plain(dz.clone());
    let affine = HostGrad::Affine { dz, x: pooled.y, coef: draws.values(3 * dims.c) };
    for dy in [plain, affine] {
        let dx = backward(device, dims, &dy, &pooled.argmax);
        let want = oracle_backward(dims, &dy.oracle(dims.c), &pooled.argmax);
        assert_close::<T::Wide, _>("dx", &dx, &want, HostGrad::<T>::ROUNDINGS + 4);
    }
}

fn cases<D: Tested<T>, T: Element>() {
    for &(name, extents) in CASES {
        eprintln!("{}: {name}", T::NAME);
        check::<T>(D::get(), dims(extents), 1);
    }
}

fn any_shape<D: Tested<T>, T: Element>() {
    for_any::<D, _>(256, ([1..3usize, 1..10, 1..10, 1..40], any::<u64>()), |(extents, seed)| {
        check::<T>(D::get(), dims(extents), seed);
    });
}

#[test]
fn gradient() {
    let (dims, mut draws) = (dims([2, 5, 6, 3]), Draws::new(2));
    let x = draws.distinct::<f64>(dims.len_in());
    let pooled = forward(cpu(), dims, &x);
    let dy = draws.values::<f64>(pooled.y.len());
    let dx = backward(cpu(), dims, &HostGrad::Plain(dy.clone()), &pooled.argmax);
    assert_gradient("dx", &dx, &x, dy.len(), |x| {
        oracle_forward(dims, x).into_iter().zip(&dy).map(|((y, _), dy)| y * dy).sum()
    });
}

fn the_first_of_equal_values_wins<D: Tested<f32>>() {
    // Windows (0, 0) to (1, 1) of a 4 x 4 map of equal values: their first taps inside are 4, 3, 1, 0.
    let pooled = forward(D::get(), dims([1, 4, 4, 1]), &[-2.0f32; 16]);
    assert_eq!(pooled.argmax, [4, 3, 1, 0]);
    let pooled = forward(D::get(), dims([1, 4, 4, 1]), &[f32::NEG_INFINITY; 16]);
    assert_eq!(pooled.argmax, [4, 3, 1, 0]);
    assert_eq!(pooled.y, [f32::NEG_INFINITY; 4]);
}

fn a_nan_wins_and_comes_back<D: Tested<f32>>() {
    let dims = dims([1, 3, 3, 2]);
    let mut x = Draws::new(3).values::<f32>(dims.len_in());
    x[4 * 2] = f32::NAN; // The middle, which all four windows share; first channel.
    let pooled = forward(D::get(), dims, &x);
    for (i, y) in pooled.y.iter().enumerate() {
        assert_eq!(y.is_nan(), i % 2 == 0, "{i}");
    }
    assert_eq!(pooled.argmax.iter().step_by(2).copied().collect::<Vec<_>>(), [8, 6, 2, 0]);
    let stats = merge_stats(D::get(), &pooled.stats);
    assert!(stats.mean[0].is_nan() && stats.squares[0].is_nan());
    assert!(!stats.mean[1].is_nan() && !stats.squares[1].is_nan());

    let dy = HostGrad::Plain(vec![f32::NAN, 1.0, 2.0, 1.0, 3.0, 1.0, 4.0, 1.0]);
    let dx = backward(D::get(), dims, &dy, &pooled.argmax);
    assert!(dx[4 * 2].is_nan());
    assert_eq!(dx.iter().filter(|x| x.is_nan()).count(), 1, "only the winner sees the gradient");
}

#[test]
fn bits_do_not_depend_on_threads() {
    let (dims, mut draws) = (dims([5, 19, 21, 24]), Draws::new(4));
    let x = draws.values::<f32>(dims.len_in());
    let dy = HostGrad::Plain(draws.values::<f32>(dims.rows_out() * dims.c));
    assert_same_on_any_threads(|cpu| {
        let pooled = forward(cpu, dims, &x);
        let dx = backward(cpu, dims, &dy, &pooled.argmax);
        [bits(&pooled.y), bits(&pooled.argmax), bits(&read_partials(cpu, &pooled.stats).1), bits(&dx)].concat()
    });
}

fn refuses_lengths_that_do_not_fit<D: Tested<f32>>() {
    let dims = dims([1, 4, 4, 2]);
    let run = |argmax, lens, c| {
        let ([mut argmax], [x, mut y]) = (buffers::<D, _, _>([argmax]), buffers::<D, f32, 2>(lens));
        let mut stats = bare_room(D::get(), 4, c);
        let (x, y, argmax, stats) = (x.view(), y.view_mut(), argmax.view_mut(), &mut stats);
        D::get().max_pool_forward(Forward { dims, x, y, argmax, stats })
    };
    assert_eq!(run(8, [32, 8], 2), Ok(()));
    assert_refuses_length(run(8, [31, 8], 2), "x");
    assert_refuses_length(run(8, [32, 9], 2), "y");
    assert_refuses_length(run(7, [32, 8], 2), "argmax");
    assert_refuses_dims(run(8, [32, 8], 1));
    let run = |dims, argmax, lens| {
        let ([argmax], [dy, mut dx]) = (buffers::<D, _, _>([argmax]), buffers::<D, f32, 2>(lens));
        let (dy, argmax, dx) = (Grad::Plain(dy.view()), argmax.view(), dx.view_mut());
        D::get().max_pool_backward(Backward { dims, dy, argmax, dx })
    };
    assert_eq!(run(dims, 8, [8, 32]), Ok(()));
    assert_refuses_length(run(dims, 8, [9, 32]), "dy");
    assert_refuses_length(run(dims, 9, [8, 32]), "argmax");
    assert_refuses_length(run(dims, 8, [8, 33]), "dx");
    assert_refuses_dims(run(PoolDims { h: 0, ..dims }, 0, [0, 0]));
}

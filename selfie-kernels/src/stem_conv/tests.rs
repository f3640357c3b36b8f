use super::*;
use crate::testing::*;
use proptest::prelude::any;

const fn conv([n, h, w]: [usize; 3], [c, k]: [usize; 2], [r, s]: [usize; 2], stride: usize, pad: usize) -> ConvDims {
    ConvDims { n, h, w, c, k, r, s, stride, pad }
}

/// `conv(images, channels in and out, filter, stride, padding)`
const CASES: &[(&str, ConvDims)] = &[
    ("one number", conv([1, 1, 1], [1, 1], [1, 1], 1, 0)),
    ("7x7, even sides", conv([2, 16, 14], [3, 64], [7, 7], 2, 3)),
    ("7x7, odd sides", conv([2, 11, 13], [3, 17], [7, 7], 2, 3)),
    ("7x7 on two pixels", conv([3, 1, 2], [3, 33], [7, 7], 2, 3)),
    ("3x3, one full tile of sums", conv([2, 8, 8], [3, 64], [3, 3], 1, 1)),
    ("3x3, columns shared out among few tiles, the last one short", conv([3, 9, 10], [3, 72], [3, 3], 1, 1)),
    ("3x3, many tiles", conv([33, 8, 8], [3, 16], [3, 3], 1, 1)),
    ("5x3 of 17 channels", conv([2, 6, 7], [17, 9], [5, 3], 1, 2)),
    ("3x3, more filters than a tile, one pixel a row", conv([2, 66, 1], [3, 72], [3, 3], 1, 1)),
    ("3x3, rows longer than a tile", conv([1, 3, 131], [3, 8], [3, 3], 1, 1)),
    ("3x3, rows that end with a tile", conv([3, 3, 64], [3, 16], [3, 3], 1, 1)),
    ("3x3, many odd tiles without padding", conv([7, 15, 18], [3, 24], [3, 3], 1, 0)),
    ("7x7, rows longer than a tile, wide padding", conv([1, 5, 262], [3, 8], [7, 7], 2, 6)),
    ("7x7, many odd tiles", conv([9, 25, 21], [3, 40], [7, 7], 2, 3)),
    ("7x7, many images in a tile", conv([140, 2, 2], [3, 8], [7, 7], 2, 3)),
];

on_every_device! {
    elements: cases, any_shape, any_usual_filter, a_nan_reaches_what_reads_it;
    once: statistics_of_equal_values, refuses_what_does_not_fit;
}

/// `y` and its statistics.
fn forward<T: Element, B: StemConv<T>>(device: &B, dims: ConvDims, x: &[T], w: &[T]) -> (Vec<T>, Partials<B, T::Wide>) {
    let mut stats = room(device, dims.rows_out(), dims.k);
    let y = run_forward(device, dims, x, w, Some(&mut stats));
    let without = run_forward(device, dims, x, w, None);
    assert!(bits(&y) == bits(&without), "statistics change the output");
    (y, stats)
}

fn run_forward<T: Element, B: StemConv<T>>(
    device: &B,
    dims: ConvDims,
    x: &[T],
    w: &[T],
    stats: Option<&mut Partials<B, T::Wide>>,
) -> Vec<T> {
    let (x, w) = (Guarded::new(device, x), Guarded::new(device, w));
    let mut y = Guarded::poisoned(device, dims.len_out());
    let args = Forward { dims, x: x.view(), w: w.view(), y: y.view_mut(), stats };
    device.stem_conv_forward(args).expect("dims and lengths fit");
    y.read(device)
}

fn backward_filter<T: Element, B: StemConv<T>>(device: &B, dims: ConvDims, x: &[T], dy: &HostGrad<T>) -> Vec<T::Wide> {
    let (x, dy) = (Guarded::new(device, x), dy.upload(device));
    let mut dw = Guarded::poisoned(device, dims.len_filter());
    let args = BackwardFilter { dims, x: x.view(), dy: dy.view(), dw: dw.view_mut() };
    device.stem_conv_backward_filter(args).expect("dims and lengths fit");
    dw.read(device)
}

/// Both passes. A sum of n products is n roundings deep in whatever order it is formed, n + 1 where the products are
/// rounded too.
fn check<D: Tested<T>, T: Element>(device: &D, dims: ConvDims, seed: u64) {
    let mut draws = Draws::new(seed);
    let (x, w) = (draws.values::<T>(dims.len_in()), draws.values(dims.len_filter()));
    let (y, stats) = forward(device, dims, &x, &w);
    assert_close::<T::Wide, _>("y", &y, &convolve(dims, &exact(&x), &exact(&w)), dims.r * dims.s * dims.c + 1);
    assert_stats(device, &y, dims.k, &stats);

    let plain = HostGrad::Plain(draws.values(y.len()));
    let affine = HostGrad::Affine { dz: draws.values(y.len()), x: y, coef: draws.values(3 * dims.k) };
    for dy in [plain, affine] {
        let dw = backward_filter(device, dims, &x, &dy);
        let want = filter_gradient(dims, &dy.oracle(dims.k), &exact(&x));
        let roundings = dims.rows_out() + 1 + HostGrad::<T>::ROUNDINGS;
        let operands = dy.operand_epsilon(D::operand_epsilon::<T>());
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
    let images = [1..4usize, 1..9, 1..9];
    let (channels, filters) = ([1..5usize, 1..40], [1..6usize, 1..6]);
    let shapes = (images, channels, filters, 1..4usize, 0..4usize, any::<u64>());
    for_any::<D, _>(128, shapes, |(image, channels, filter, stride, pad, seed)| {
        let pad = pad.min(filter[0] - 1).min(filter[1] - 1);
        let filter = [filter[0].min(image[1] + 2 * pad), filter[1].min(image[2] + 2 * pad)];
        check::<D, T>(D::get(), conv(image, channels, filter, stride, pad), seed);
    });
}

/// The stems of networks: three channels, filters in chunks of 8.
fn any_usual_filter<D: Tested<T>, T: Element>() {
    let shapes = ([1..5usize, 1..20, 1..20], 1..10usize, any::<bool>(), 0..7usize, any::<u64>());
    for_any::<D, _>(64, shapes, |([n, h, w], k, large, pad, seed)| {
        let (side, stride) = if large { (7, 2) } else { (3, 1) };
        let pad = pad.min(side - 1).max((side - side.min(h.min(w))).div_ceil(2));
        check::<D, T>(D::get(), conv([n, h, w], [3, 8 * k], [side, side], stride, pad), seed);
    });
}

#[test]
fn gradient() {
    let (dims, mut draws) = (conv([2, 6, 5], [3, 2], [3, 3], 2, 1), Draws::new(2));
    let (x, w) = (draws.values::<f64>(dims.len_in()), draws.values::<f64>(dims.len_filter()));
    let dy = draws.values::<f64>(dims.len_out());
    let dw = backward_filter(cpu(), dims, &x, &HostGrad::Plain(dy.clone()));
    assert_gradient("dw", &dw, &w, dims.len_out() + dims.r * dims.s * dims.c + 2, |w| {
        convolve(dims, &x, w).into_iter().zip(&dy).map(|(y, dy)| y.times(*dy)).sum()
    });
}

fn a_nan_reaches_what_reads_it<D: Tested<T>, T: Element>() {
    // Output (i, j) reads pixels 2i - 3..2i + 4: of 9x9 pixels the middle one, (4, 4), is read by rows and columns 1 to 3
    // of 5.
    let (dims, mut draws) = (conv([1, 9, 9], [3, 24], [7, 7], 2, 3), Draws::new(3));
    let (k, x, w) = (dims.k, draws.values::<T>(dims.len_in()), draws.values::<T>(dims.len_filter()));
    let dy = draws.values::<T>(dims.len_out());
    let poisoned = |values: &[T], i: usize| {
        let mut values = values.to_vec();
        values[i] = stored(f64::NAN);
        values
    };
    let near = |i: usize| (1..4).contains(&(i / k / 5)) && (1..4).contains(&(i / k % 5));
    let nan_x = poisoned(&x, (4 * 9 + 4) * 3 + 1);
    assert_nan_where("y", &forward(D::get(), dims, &nan_x, &w).0, near);
    // The middle tap is inside the map everywhere.
    let nan_w = poisoned(&w, (11 * 49 + 24) * 3 + 1);
    assert_nan_where("y", &forward(D::get(), dims, &x, &nan_w).0, |i| i % k == 11);
    // Of stride 2, pixel (4, 4) is read by odd taps.
    let dw = backward_filter(D::get(), dims, &nan_x, &HostGrad::Plain(dy.clone()));
    assert_nan_where("dw", &dw, |i| i % 3 == 1 && i / 3 % 7 % 2 == 1 && i / 21 % 7 % 2 == 1);
    let nan_dy = HostGrad::Plain(poisoned(&dy, (2 * 5 + 2) * k + 11));
    assert_nan_where("dw", &backward_filter(D::get(), dims, &x, &nan_dy), |i| i / (49 * 3) == 11);

    // The last of 5x5 pixels is read by four taps of nine, by four pixels of the output.
    let dims = conv([1, 5, 5], [3, 16], [3, 3], 1, 1);
    let x = poisoned(&draws.values::<T>(dims.len_in()), dims.len_in() - 1);
    let (w, dy) = (draws.values::<T>(dims.len_filter()), draws.values::<T>(dims.len_out()));
    let pixels = [18, 19, 23, 24];
    assert_nan_where("y", &forward(D::get(), dims, &x, &w).0, |i| pixels.contains(&(i / dims.k)));
    let dw = backward_filter(D::get(), dims, &x, &HostGrad::Plain(dy));
    assert_nan_where("dw", &dw, |i| i % 3 == 2 && [4, 5, 7, 8].contains(&(i / 3 % 9)));
}

/// Of ones each output of a filter is the same number, which is then the mean, but for a rounding or two: a sum of so many of
/// them is not as near.
fn statistics_of_equal_values<D: Tested<f32>>() {
    let (dims, mut draws) = (conv([3, 9, 11], [2, 70], [3, 3], 1, 0), Draws::new(5));
    let (x, w) = (vec![1.0; dims.len_in()], draws.values::<f32>(dims.len_filter()));
    let (y, stats) = forward(D::get(), dims, &x, &w);
    assert_stats(D::get(), &y, dims.k, &stats);
}

fn assert_nan_where<S: Element>(what: &str, values: &[S], expected: impl Fn(usize) -> bool) {
    for (i, value) in exact(values).into_iter().enumerate() {
        assert_eq!(value.is_nan(), expected(i), "{} {what}[{i}] = {value}", S::NAME);
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    for dims in [conv([3, 9, 10], [3, 72], [3, 3], 1, 1), conv([33, 8, 8], [3, 16], [3, 3], 1, 1)] {
        let mut draws = Draws::new(4);
        let (x, w) = (draws.values::<f32>(dims.len_in()), draws.values::<f32>(dims.len_filter()));
        let dy = HostGrad::Plain(draws.values::<f32>(dims.len_out()));
        assert_same_on_any_threads(|cpu| {
            let (y, stats) = forward(cpu, dims, &x, &w);
            [y, read_partials(cpu, &stats).1, backward_filter(cpu, dims, &x, &dy)].map(|values| bits(&values)).concat()
        });
    }
}

fn refuses_what_does_not_fit<D: Tested<f32>>() {
    let dims = conv([2, 4, 4], [3, 5], [7, 7], 2, 3);
    let run = |dims, lens, k| {
        let [x, w, mut y] = buffers::<D, f32, 3>(lens);
        let mut stats = bare_room(D::get(), 8, k);
        let (x, w, y, stats) = (x.view(), w.view(), y.view_mut(), Some(&mut stats));
        D::get().stem_conv_forward(Forward { dims, x, w, y, stats })
    };
    assert_eq!(run(dims, [96, 735, 40], 5), Ok(()));
    assert_refuses_length(run(dims, [32, 735, 40], 5), "x");
    assert_refuses_length(run(dims, [96, 245, 40], 5), "w");
    assert_refuses_length(run(dims, [96, 735, 160], 5), "y");
    assert_refuses_dims(run(dims, [96, 735, 40], 4));
    assert_refuses_dims(run(ConvDims { pad: 0, ..dims }, [96, 735, 40], 5));
    assert_refuses_dims(run(ConvDims { k: 0, ..dims }, [96, 0, 0], 5));
    let run = |dims, lens| {
        let [x, dy, mut dw] = buffers::<D, f32, 3>(lens);
        let (x, dy, dw) = (x.view(), Grad::Plain(dy.view()), dw.view_mut());
        D::get().stem_conv_backward_filter(BackwardFilter { dims, x, dy, dw })
    };
    assert_eq!(run(dims, [96, 40, 735]), Ok(()));
    assert_refuses_length(run(dims, [95, 40, 735]), "x");
    assert_refuses_length(run(dims, [96, 96, 735]), "dy");
    assert_refuses_length(run(dims, [96, 40, 245]), "dw");
    assert_refuses_dims(run(ConvDims { stride: 0, ..dims }, [96, 40, 735]));
}

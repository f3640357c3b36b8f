use super::*;
use crate::testing::*;
use ndarray::ArrayView4;
use proptest::prelude::any;

const CASES: &[(&str, AvgDims)] = &[
    ("one pixel", dims(1, [1, 1], 1, [1, 1])),
    ("whole map", dims(3, [4, 4], 70, [4, 4])),
    ("whole map, oblong", dims(2, [3, 5], 17, [3, 5])),
    ("cells of two by two", dims(2, [4, 6], 16, [2, 2])),
    ("whole map, more pixels than are on their way at once", dims(2, [5, 5], 24, [5, 5])),
    ("windows of one pixel", dims(2, [3, 2], 5, [1, 1])),
    ("oblong windows, a short last tile", dims(3, [6, 12], 9, [3, 2])),
    ("several blocks of channels", dims(1, [2, 2], 130, [1, 2])),
];

on_every_device! {
    elements: cases, any_shape;
    once: nan_comes_through, refuses_what_does_not_fit;
}

const fn dims(n: usize, [h, w]: [usize; 2], c: usize, [window_h, window_w]: [usize; 2]) -> AvgDims {
    AvgDims { n, h, w, c, window_h, window_w }
}

fn forward<T: Element, B: NormReluPool<T>>(device: &B, dims: AvgDims, x: &[T], norm: &[T::Wide]) -> Vec<T> {
    let (x, norm) = (Guarded::new(device, x), Guarded::new(device, norm));
    let mut y = Guarded::poisoned(device, dims.len_out());
    let args = Forward { dims, x: x.view(), norm: norm.view(), y: y.view_mut() };
    device.norm_relu_pool_forward(args).expect("dims and lengths fit");
    y.read(device)
}

/// `dz` and its sums.
fn backward<T: Element, B: NormReluPool<T>>(
    device: &B,
    dims: AvgDims,
    dy: &[T],
    x: &[T],
    norm: &[T::Wide],
) -> (Vec<T>, Partials<B, T::Wide>) {
    let (dy, x, norm) = (Guarded::new(device, dy), Guarded::new(device, x), Guarded::new(device, norm));
    let mut dz = Guarded::poisoned(device, dims.rows_in() * dims.c);
    let mut sums = room(device, dims.rows_in(), dims.c);
    let args = Backward { dims, dy: dy.view(), x: x.view(), norm: norm.view(), dz: dz.view_mut(), sums: &mut sums };
    device.norm_relu_pool_backward(args).expect("dims and lengths fit");
    (dz.read(device), sums)
}

/// `scale * x + shift`, with the sign that one rounding leaves it.
fn normalized(dims: AvgDims, x: &[f64], norm: &[f64]) -> Vec<f64> {
    let c = dims.c;
    x.iter().enumerate().map(|(i, x)| norm[2 * c + i % c].mul_add(*x, norm[3 * c + i % c])).collect()
}

fn oracle_forward(dims: AvgDims, x: &[f64], norm: &[f64]) -> Vec<Exact> {
    let z = normalized(dims, x, norm);
    let z = ArrayView4::from_shape((dims.n, dims.h, dims.w, dims.c), &z).expect("length of x");
    let (window_h, window_w) = (dims.window_h, dims.window_w);
    let outputs = ndarray::indices((dims.n, dims.h / window_h, dims.w / window_w, dims.c));
    let average = |(n, i, j, k)| {
        let window = z.slice(ndarray::s![n, i * window_h..(i + 1) * window_h, j * window_w..(j + 1) * window_w, k]);
        window.iter().map(|z| z.max(0.0)).sum::<Exact>().times(1.0 / (window_h * window_w) as f64)
    };
    outputs.into_iter().map(average).collect()
}

fn oracle_backward(dims: AvgDims, dy: &[f64], x: &[f64], norm: &[f64]) -> Vec<Exact> {
    let z = normalized(dims, x, norm);
    let (p, q) = (dims.h / dims.window_h, dims.w / dims.window_w);
    let dy = ArrayView4::from_shape((dims.n, p, q, dims.c), dy).expect("length of dy");
    let inputs = ndarray::indices((dims.n, dims.h, dims.w, dims.c)).into_iter().zip(z);
    let share = |((n, i, j, k), z): (_, f64)| {
        let dy = dy[[n, i / dims.window_h, j / dims.window_w, k]];
        Exact::new(if z > 0.0 { dy / (dims.window_h * dims.window_w) as f64 } else { 0.0 })
    };
    inputs.map(share).collect()
}

fn check<T: Element>(device: &impl NormReluPool<T>, dims: AvgDims, seed: u64) {
    let mut draws = Draws::new(seed);
    let norm = draws.values::<T::Wide>(4 * dims.c);
    // Ties and the zeros of the norm make `scale * x + shift` zero now and then.
    for x in [draws.ties::<T>(dims.rows_in() * dims.c), draws.values(dims.rows_in() * dims.c)] {
        let y = forward(device, dims, &x, &norm);
        let want = oracle_forward(dims, &exact(&x), &exact(&norm));
        assert_close::<T::Wide, _>("y", &y, &want, 1 + dims.window_h * dims.window_w + 1);

        let dy = draws.values::<T>(dims.len_out());
        let (dz, sums) = backward(device, dims, &dy, &x, &norm);
        let want = oracle_backward(dims, &exact(&dy), &exact(&x), &exact(&norm));
        // One over the area, and the product.
        assert_close::<T::Wide, _>("dz", &dz, &want, 2);
        assert_grad_sums(device, (&dz, &x, &norm), &sums);
    }
}

fn cases<D: Tested<T>, T: Element>() {
    for &(name, dims) in CASES {
        eprintln!("{}: {name}", T::NAME);
        check::<T>(D::get(), dims, 1);
    }
}

fn any_shape<D: Tested<T>, T: Element>() {
    let shapes = ([1..3usize, 1..5, 1..5, 1..40], [1..4usize, 1..4], any::<u64>());
    for_any::<D, _>(256, shapes, |([n, p, q, c], window, seed)| {
        check::<T>(D::get(), dims(n, [p * window[0], q * window[1]], c, window), seed);
    });
}

/// By x, which `dz` gives times scale, and by gamma and beta, which are the sums.
#[test]
fn gradient() {
    let (dims, mut draws) = (dims(2, [4, 6], 3, [2, 3]), Draws::new(2));
    // Odd multiples of 1/64 at least after normalisation: the differences meet no kink.
    let x = draws.distinct::<f64>(dims.rows_in() * dims.c);
    let (mean, rstd, affine) = ([0.0, 0.5, -1.0], [0.5, 1.0, 0.5], [1.0, -2.0, 1.0, 0.0, 0.25, -0.5]);
    let norm = |affine: &[f64]| {
        let scale: Vec<f64> = (0..3).map(|k| affine[k] * rstd[k]).collect();
        let shift: Vec<f64> = (0..3).map(|k| affine[3 + k] - mean[k] * scale[k]).collect();
        [&mean[..], &rstd[..], &scale[..], &shift[..]].concat()
    };
    let dy = draws.values::<f64>(dims.len_out());
    let (dz, sums) = backward(cpu(), dims, &dy, &x, &norm(&affine));

    let f = |x: &[f64], norm: &[f64]| -> Exact {
        let y = oracle_forward(dims, x, norm);
        y.iter().zip(&dy).flat_map(|(y, dy)| [y.value * dy, y.magnitude * dy - y.value * dy]).sum()
    };
    let scale = &norm(&affine)[6..9];
    let dx: Vec<f64> = dz.iter().enumerate().map(|(i, dz)| dz * scale[i % 3]).collect();
    let roundings = dims.rows_in() * dims.c;
    assert_gradient("dx", &dx, &x, roundings, |x| f(x, &norm(&affine)));
    let (sums, _) = merge_sums(cpu(), &sums);
    let daffine: Vec<f64> = [3, 4, 5, 0, 1, 2].map(|k| sums[k]).to_vec();
    assert_gradient("daffine", &daffine, &affine, roundings, |affine| f(&x, &norm(affine)));
}

fn nan_comes_through<D: Tested<f32>>() {
    let (dims, norm) = (dims(1, [2, 2], 2, [1, 2]), [0.0f32, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]);
    let x = [f32::NAN, 1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
    let nan = |values: &[f32]| values.iter().map(|x| x.is_nan()).collect::<Vec<_>>();
    let nan_sums = |sums| merge_sums(D::get(), sums).0.into_iter().map(f64::is_nan).collect::<Vec<_>>();
    assert_eq!(nan(&forward(D::get(), dims, &x, &norm)), [true, false, false, false]);
    let (dz, sums) = backward(D::get(), dims, &[1.0, 1.0, f32::NAN, 1.0], &[1.0; 8], &norm);
    assert_eq!(nan(&dz), [false, false, false, false, true, false, true, false]);
    assert_eq!(nan_sums(&sums), [true, false, true, false]);
    let (dz, sums) = backward(D::get(), dims, &[6.0; 4], &x, &norm);
    assert_eq!(dz, [3.0, 3.0, 0.0, 3.0, 3.0, 3.0, 3.0, 3.0], "the gradient passes a NaN, as in PyTorch");
    assert_eq!(nan_sums(&sums), [false, false, true, false]);
    // A masked pixel passes nothing on, not even a NaN.
    let (dz, _) = backward(D::get(), dims, &[f32::NAN; 4], &[-1.0; 8], &norm);
    assert_eq!(dz, [0.0; 8]);
}

#[test]
fn bits_do_not_depend_on_threads() {
    let (dims, mut draws) = (dims(5, [12, 14], 24, [2, 7]), Draws::new(3));
    let (x, norm) = (draws.values::<f32>(dims.rows_in() * dims.c), draws.values::<f32>(4 * dims.c));
    let dy = draws.values::<f32>(dims.len_out());
    assert_same_on_any_threads(|cpu| {
        let (dz, sums) = backward(cpu, dims, &dy, &x, &norm);
        [bits(&forward(cpu, dims, &x, &norm)), bits(&dz), bits(&read_partials(cpu, &sums).1)].concat()
    });
}

fn refuses_what_does_not_fit<D: Tested<f32>>() {
    let good = dims(1, [2, 4], 3, [2, 2]);
    let run = |dims, lens| {
        let [x, norm, mut y] = buffers::<D, f32, 3>(lens);
        D::get().norm_relu_pool_forward(Forward { dims, x: x.view(), norm: norm.view(), y: y.view_mut() })
    };
    assert_eq!(run(good, [24, 12, 6]), Ok(()));
    assert_refuses_length(run(good, [23, 12, 6]), "x");
    assert_refuses_length(run(good, [24, 6, 6]), "norm");
    assert_refuses_length(run(good, [24, 12, 24]), "y");
    assert_refuses_dims(run(dims(1, [2, 4], 3, [2, 3]), [24, 12, 6]));
    assert_refuses_dims(run(dims(1, [2, 4], 3, [2, 0]), [24, 12, 6]));
    let run = |lens, c| {
        let [dy, x, norm, mut dz] = buffers::<D, f32, 4>(lens);
        let mut sums = bare_room(D::get(), 8, c);
        let (dy, x, norm, dz, sums) = (dy.view(), x.view(), norm.view(), dz.view_mut(), &mut sums);
        D::get().norm_relu_pool_backward(Backward { dims: good, dy, x, norm, dz, sums })
    };
    assert_eq!(run([6, 24, 12, 24], 3), Ok(()));
    assert_refuses_length(run([24, 24, 12, 24], 3), "dy");
    assert_refuses_length(run([6, 6, 12, 24], 3), "x");
    assert_refuses_length(run([6, 24, 3, 24], 3), "norm");
    assert_refuses_length(run([6, 24, 12, 6], 3), "dz");
    assert_refuses_dims(run([6, 24, 12, 24], 2));
}

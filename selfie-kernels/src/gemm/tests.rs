use super::*;
use crate::testing::*;
use ndarray::{Array1, Array2, ArrayView2, Axis};
use num_traits::Float;
use proptest::prelude::any;
use std::f64::consts::{FRAC_1_SQRT_2, TAU};

const fn dims([m, n, k]: [usize; 3], gap: usize) -> GemmDims {
    GemmDims { m, n, k, x_stride: k + gap }
}

/// `dims(m, n and k, elements between two rows of x)`
const CASES: &[(&str, GemmDims)] = &[
    ("one number", dims([1, 1, 1], 0)),
    ("one row", dims([1, 70, 33], 0)),
    ("one row with a stride", dims([1, 17, 16], 3)),
    ("one full tile", dims([128, 16, 17], 0)),
    ("the first token of each image", dims([21, 33, 16], 48)),
    ("columns shared out among few tiles, the last one short", dims([300, 70, 72], 0)),
    ("few tiles with a stride", dims([129, 3, 70], 5)),
    ("many tiles", dims([2100, 33, 3], 0)),
    ("many tiles with a stride", dims([2100, 3, 33], 2)),
    ("rows in whole chunks of 16 bytes, a tile of 128 and a bit more", dims([129, 136, 40], 8)),
    ("sums over more slices than are in flight at once", dims([20, 200, 168], 0)),
    ("sums over rows in parts, the last one short", dims([1100, 16, 24], 8)),
    ("a partly filled chunk of outputs", dims([70, 67, 64], 0)),
    ("several tiles of 128 by 256, and more slices than stages", dims([300, 272, 328], 8)),
    ("several tiles of 256 by 128, backwards", dims([520, 136, 72], 0)),
    ("several tiles of 256 by 128, forwards", dims([700, 128, 64], 0)),
];

/// What all passes share.
#[derive(Debug, Clone)]
struct Layer<T: Element> {
    dims: GemmDims,
    /// Dense.
    x: Vec<T>,
    w: Vec<T>,
    bias: Vec<T::Wide>,
}

impl<T: Element> Layer<T> {
    fn draw(dims: GemmDims, draws: &mut Draws) -> Self {
        let GemmDims { m, n, k, .. } = dims;
        Self { dims, x: draws.values(m * k), w: draws.values(n * k), bias: draws.values(n) }
    }
}

/// Rows `[m, k]` with `dims`' stride; NaN in between.
fn strided<T: Element>(dims: GemmDims, dense: &[T]) -> Vec<T> {
    let mut rows = vec![stored(f64::NAN); dims.len_x()];
    for (to, from) in rows.chunks_mut(dims.x_stride).zip(dense.chunks(dims.k)) {
        to[..dims.k].copy_from_slice(from);
    }
    rows
}

fn forward<T: Element, B: Gemm<T>>(device: &B, layer: &Layer<T>) -> Vec<T> {
    run_forward(device, layer, None)
}

/// `z` and `y`.
fn forward_gelu<T: Element, B: Gemm<T>>(device: &B, layer: &Layer<T>) -> (Vec<T>, Vec<T>) {
    let mut z = Guarded::poisoned(device, layer.dims.m * layer.dims.n);
    let y = run_forward(device, layer, Some(&mut z));
    (z.read(device), y)
}

fn run_forward<T: Element, B: Gemm<T>>(device: &B, layer: &Layer<T>, z: Option<&mut Guarded<B, T>>) -> Vec<T> {
    let Layer { dims, x, w, bias } = layer;
    let x = Guarded::new(device, &strided(*dims, x));
    let (w, bias) = (Guarded::new(device, w), Guarded::new(device, bias));
    let mut y = Guarded::poisoned(device, dims.m * dims.n);
    let args = Forward {
        dims: *dims,
        x: x.view(),
        w: w.view(),
        bias: bias.view(),
        activation: z.map_or(Activation::Identity, |z| Activation::Gelu { z: z.view_mut() }),
        y: y.view_mut(),
    };
    device.gemm_forward(args).expect("dims and lengths fit");
    y.read(device)
}

/// What the backward pass of the data can take besides `dy`.
#[derive(Debug, Clone, Default)]
struct Extra<T> {
    gelu: Option<Vec<T>>,
    addend: Option<Vec<T>>,
    /// What `dx` is added to.
    before: Option<Vec<T>>,
}

/// `dx`, dense; asserts that what lies between its rows stays as it was.
fn backward_data<T: Element, B: Gemm<T>>(device: &B, layer: &Layer<T>, dy: &[T], extra: &Extra<T>) -> Vec<T> {
    let Layer { dims, w, .. } = layer;
    let (dy, w) = (Guarded::new(device, dy), Guarded::new(device, w));
    let [gelu, addend] = [&extra.gelu, &extra.addend].map(|v| v.as_ref().map(|v| Guarded::new(device, v)));
    let nan = vec![stored(f64::NAN); dims.m * dims.k];
    let before = strided(*dims, extra.before.as_ref().unwrap_or(&nan));
    let mut dx = Guarded::new(device, &before);
    let args = BackwardData {
        dims: *dims,
        dy: dy.view(),
        w: w.view(),
        gelu: gelu.as_ref().map(Guarded::view),
        addend: addend.as_ref().map(Guarded::view),
        write: if extra.before.is_some() { Write::Accumulate } else { Write::Overwrite },
        dx: dx.view_mut(),
    };
    device.gemm_backward_data(args).expect("dims and lengths fit");
    let dx = dx.read(device);
    let rows = || dx.chunks(dims.x_stride).zip(before.chunks(dims.x_stride));
    assert!(rows().all(|(dx, before)| bits(&dx[dims.k..]) == bits(&before[dims.k..])), "written between the rows");
    rows().flat_map(|(dx, _)| dx[..dims.k].to_vec()).collect()
}

/// `dw` and `dbias`.
fn backward_weight<T: Element, B: Gemm<T>>(device: &B, layer: &Layer<T>, dy: &[T]) -> (Vec<T::Wide>, Vec<T::Wide>) {
    let dims = layer.dims;
    let (x, dy) = (Guarded::new(device, &strided(dims, &layer.x)), Guarded::new(device, dy));
    let (mut dw, mut dbias) = (Guarded::poisoned(device, dims.n * dims.k), Guarded::poisoned(device, dims.n));
    let args = BackwardWeight { dims, x: x.view(), dy: dy.view(), dw: dw.view_mut(), dbias: dbias.view_mut() };
    device.gemm_backward_weight(args).expect("dims and lengths fit");
    (dw.read(device), dbias.read(device))
}

/// `a` is `[rows, terms]`, `b` `[terms, columns]`.
fn product(a: ArrayView2<'_, f64>, b: ArrayView2<'_, f64>) -> Array2<Exact> {
    // Both along memory: indexing them took half of the time of these tests.
    let (a, b) = (a.as_standard_layout(), b.t().as_standard_layout().into_owned());
    Array2::from_shape_fn((a.nrows(), b.nrows()), |(i, j)| a.row(i).iter().zip(b.row(j)).map(|(a, b)| a * b).sum())
}

fn matrix(shape: (usize, usize), values: &[f64]) -> ArrayView2<'_, f64> {
    ArrayView2::from_shape(shape, values).expect("length of the matrix")
}

fn oracle_forward<T: Element>(layer: &Layer<T>) -> Vec<Exact> {
    let GemmDims { m, n, k, .. } = layer.dims;
    let (x, w, bias) = (exact(&layer.x), exact(&layer.w), exact(&layer.bias));
    let mut z = product(matrix((m, k), &x), matrix((n, k), &w).t());
    z.indexed_iter_mut().for_each(|((_, j), z)| z.add(bias[j]));
    z.into_raw_vec_and_offset().0
}

fn oracle_backward_data<T: Element>(layer: &Layer<T>, dy: &[T], extra: &Extra<T>) -> Vec<Exact> {
    let GemmDims { m, n, k, .. } = layer.dims;
    let mut dx = product(matrix((m, n), &exact(dy)), matrix((n, k), &exact(&layer.w))).into_raw_vec_and_offset().0;
    for (dx, z) in dx.iter_mut().zip(exact(extra.gelu.as_deref().unwrap_or_default())) {
        let slope = gelu_derivative(z);
        *dx = Exact { value: dx.value * slope.value, magnitude: dx.magnitude * slope.magnitude };
    }
    for term in [&extra.addend, &extra.before].into_iter().flatten() {
        dx.iter_mut().zip(exact(term)).for_each(|(dx, term)| dx.add(term));
    }
    dx
}

fn oracle_backward_weight<T: Element>(layer: &Layer<T>, dy: &[T]) -> (Vec<Exact>, Vec<Exact>) {
    let GemmDims { m, n, k, .. } = layer.dims;
    let (x, dy) = (exact(&layer.x), exact(dy));
    let (x, dy) = (matrix((m, k), &x), matrix((m, n), &dy));
    let dbias: Array1<Exact> = dy.map_axis(Axis(0), |column| column.iter().copied().sum());
    (product(dy.t(), x).into_raw_vec_and_offset().0, dbias.to_vec())
}

/// Roundings of an exponential or error function that is right to two units in the last place, as those of glibc,
/// of Rust's libm and of CUDA are.
const FUNCTION: usize = 4;

fn gelu(z: f64) -> Exact {
    [0.5 * z, 0.5 * z * libm::erf(z * FRAC_1_SQRT_2)].into_iter().sum()
}

/// Of a term of [`gelu`]: two of erf's argument (which moves erf no more, relatively, than itself), erf, the sum with 1,
/// the product.
const GELU: usize = 2 + FUNCTION + 1 + 1;

fn gelu_derivative(z: f64) -> Exact {
    let mut slope: Exact = [0.5, 0.5 * libm::erf(z * FRAC_1_SQRT_2)].into_iter().sum();
    let density = z * (-0.5 * z * z).exp() / TAU.sqrt();
    // A rounding of exp's argument moves exp by the argument times as much.
    slope += Exact { value: density, magnitude: density.abs() * (1.0 + 0.5 * z * z) };
    slope
}

/// Of a term of [`gelu_derivative`]: erf's argument, erf, the sum with 1, the last sum; for the density the argument,
/// exp, the constant, the product and the last sum are no more.
const GELU_DERIVATIVE: usize = 2 + FUNCTION + 1 + 1;

/// Every pass, with and without what is optional. A sum of n products is n roundings deep in whatever order it is
/// formed, n + 1 where the products are rounded too.
fn check<T: Element>(device: &impl Gemm<T>, dims: GemmDims, seed: u64) {
    let mut draws = Draws::new(seed);
    let layer = Layer::<T>::draw(dims, &mut draws);
    let y = forward(device, &layer);
    let add = 1;
    assert_close::<T::Wide, _>("y", &y, &oracle_forward(&layer), dims.k + 1 + add);
    let (z, y_gelu) = forward_gelu(device, &layer);
    assert!(bits(&z) == bits(&y), "z is what y would be without the GELU");
    let want: Vec<_> = exact(&z).into_iter().map(gelu).collect();
    assert_close::<T::Wide, _>("gelu(z)", &y_gelu, &want, GELU);

    let dy = draws.values(dims.m * dims.n);
    let mut values = || Some(draws.values::<T>(dims.m * dims.k));
    for extra in [
        Extra::default(),
        Extra { gelu: values(), ..Extra::default() },
        Extra { addend: values(), ..Extra::default() },
        Extra { before: values(), ..Extra::default() },
        Extra { gelu: values(), addend: values(), before: values() },
    ] {
        let dx = backward_data(device, &layer, &dy, &extra);
        let want = oracle_backward_data(&layer, &dy, &extra);
        assert_close::<T::Wide, _>("dx", &dx, &want, dims.n + 1 + GELU_DERIVATIVE + 1 + 2 * add);
    }

    let (dw, dbias) = backward_weight(device, &layer, &dy);
    let (want_dw, want_dbias) = oracle_backward_weight(&layer, &dy);
    assert_close::<T::Wide, _>("dw", &dw, &want_dw, dims.m + 1);
    assert_close::<T::Wide, _>("dbias", &dbias, &want_dbias, dims.m);
}

on_every_device! {
    elements: cases, any_shape, a_nan_reaches_what_reads_it, any_place_in_memory;
    once: forward_refuses_what_does_not_fit, backward_refuses_what_does_not_fit;
}

fn cases<D: Tested<T>, T: Element>() {
    for &(name, dims) in CASES {
        eprintln!("{}: {name}", T::NAME);
        check::<T>(D::get(), dims, 1);
    }
}

fn any_shape<D: Tested<T>, T: Element>() {
    for_any::<D, _>(128, ([1..150usize, 1..40, 1..40], 0..20usize, any::<u64>()), |(shape, gap, seed)| {
        check::<T>(D::get(), dims(shape, gap), seed);
    });
}

/// Views may begin at any element, so in the middle of what a device reads at once.
fn any_place_in_memory<D: Tested<T>, T: Element>() {
    let (device, dims, mut draws) = (D::get(), dims([20, 16, 24], 0), Draws::new(5));
    let layer = Layer::<T>::draw(dims, &mut draws);
    let shifted = |values: &[T]| Guarded::new(device, &[&[stored(f64::NAN)], values].concat());
    let (x, w, mut y) = (shifted(&layer.x), shifted(&layer.w), Guarded::poisoned(device, dims.m * dims.n + 1));
    let bias = Guarded::new(device, &layer.bias);
    let args = Forward {
        dims,
        x: x.view_from(1),
        w: w.view_from(1),
        bias: bias.view(),
        activation: Activation::Identity,
        y: y.view_mut_from(1),
    };
    device.gemm_forward(args).expect("dims and lengths fit");
    assert_close::<T::Wide, _>("y", &y.read(device)[1..], &oracle_forward(&layer), dims.k + 2);
}

#[test]
fn gradient() {
    let (dims, mut draws) = (dims([4, 5, 3], 2), Draws::new(2));
    let layer = Layer::<f64>::draw(dims, &mut draws);
    let dy = draws.values::<f64>(dims.m * dims.n);
    let loss =
        |layer: &Layer<f64>| oracle_forward(layer).into_iter().zip(&dy).map(|(y, dy)| y.times(*dy)).sum::<Exact>();
    let roundings = dims.m * dims.n + dims.k + 2;
    let dx = backward_data(cpu(), &layer, &dy, &Extra::default());
    assert_gradient("dx", &dx, &layer.x, roundings, |x| loss(&Layer { x: x.to_vec(), ..layer.clone() }));
    let (dw, dbias) = backward_weight(cpu(), &layer, &dy);
    assert_gradient("dw", &dw, &layer.w, roundings, |w| loss(&Layer { w: w.to_vec(), ..layer.clone() }));
    assert_gradient("dbias", &dbias, &layer.bias, roundings, |bias| {
        loss(&Layer { bias: bias.to_vec(), ..layer.clone() })
    });

    // Through the GELU, with an addend that is the gradient of a second use of z.
    let (z, addend) = (draws.normal::<f64>(dims.m * dims.k, 0.0, 2.0), draws.values::<f64>(dims.m * dims.k));
    let extra = Extra { gelu: Some(z.clone()), addend: Some(addend.clone()), before: None };
    let dz = backward_data(cpu(), &layer, &dy, &extra);
    assert_gradient("dz", &dz, &z, roundings + dims.m * dims.k + GELU, |z| {
        let x = z.iter().map(|&z| gelu(z).value).collect();
        let mut sum = loss(&Layer { x, ..layer.clone() });
        z.iter().zip(&addend).for_each(|(z, addend)| sum.add(z * addend));
        sum
    });
}

#[test]
fn gelu_has_its_known_values() {
    // A layer of weight 1. The values are z * erfc(-z / sqrt(2)) / 2, which cancels nothing, by another library's erfc.
    let x = [-10.0, -3.0, -1.0, -0.0, 0.5, 1.0, 3.0, 10.0];
    let want = [
        -7.619_853_024_160_593e-23,
        -0.004_049_694_094_890_287,
        -0.158_655_253_931_457_07,
        -0.0,
        0.345_731_230_637_006_56,
        0.841_344_746_068_542_9,
        2.995_950_305_905_11,
        10.0,
    ];
    let layer = Layer { dims: dims([8, 1, 1], 0), x: x.to_vec(), w: vec![1.0f64], bias: vec![0.0] };
    let (_, y) = forward_gelu(cpu(), &layer);
    let want: Vec<_> = want.into_iter().zip(x).map(|(value, z)| Exact { value, magnitude: z.abs() }).collect();
    assert_close::<f64, _>("gelu", &y, &want, GELU);
}

fn a_nan_reaches_what_reads_it<D: Tested<T>, T: Element>() {
    // With rows of odd lengths, and of whole chunks.
    for dims in [dims([9, 35, 17], 1), dims([9, 40, 24], 8)] {
        check_nan::<T>(D::get(), dims);
    }
}

fn check_nan<T: Element>(device: &impl Gemm<T>, dims: GemmDims) {
    let (GemmDims { m, n, k, .. }, mut draws) = (dims, Draws::new(3));
    let layer = Layer::<T>::draw(dims, &mut draws);
    let dy = draws.values::<T>(m * n);
    let nan_at = |values: &[T], i: usize| {
        let mut values = values.to_vec();
        values[i] = stored(f64::NAN);
        values
    };
    fn assert_nan_where<S: Element>(what: &str, values: &[S], expected: impl Fn(usize) -> bool) {
        for (i, value) in values.iter().enumerate() {
            assert_eq!(value.widen().is_nan(), expected(i), "{what}[{i}] = {value}");
        }
    }
    let nan_x = Layer { x: nan_at(&layer.x, 4 * k + 5), ..layer.clone() };
    let (z, y) = forward_gelu(device, &nan_x);
    assert_nan_where("z", &z, |i| i / n == 4);
    assert_nan_where("y", &y, |i| i / n == 4);
    assert_nan_where("dw", &backward_weight(device, &nan_x, &dy).0, |i| i % k == 5);
    let nan_w = Layer { w: nan_at(&layer.w, 20 * k + 5), ..layer.clone() };
    assert_nan_where("y", &forward(device, &nan_w), |i| i % n == 20);
    assert_nan_where("dx", &backward_data(device, &nan_w, &dy, &Extra::default()), |i| i % k == 5);
    let mut nan_bias = layer.clone();
    nan_bias.bias[20] = T::Wide::nan();
    assert_nan_where("y", &forward(device, &nan_bias), |i| i % n == 20);
    let nan_dy = nan_at(&dy, 4 * n + 20);
    let (dw, dbias) = backward_weight(device, &layer, &nan_dy);
    assert_nan_where("dw", &dw, |i| i / k == 20);
    assert_nan_where("dbias", &dbias, |i| i == 20);
    let z = nan_at(&layer.x, 7 * k + 5);
    let dx = backward_data(device, &layer, &nan_dy, &Extra { gelu: Some(z), ..Extra::default() });
    assert_nan_where("dx", &dx, |i| i / k == 4 || i == 7 * k + 5);
}

#[test]
fn bits_do_not_depend_on_threads() {
    for dims in [dims([300, 70, 72], 3), dims([2100, 16, 17], 0)] {
        let mut draws = Draws::new(4);
        let layer = Layer::<f32>::draw(dims, &mut draws);
        let dy = draws.values::<f32>(dims.m * dims.n);
        let z = Some(draws.values(dims.m * dims.k));
        let extra = Extra { gelu: z.clone(), addend: z.clone(), before: z };
        assert_same_on_any_threads(|cpu| {
            let (z, y) = forward_gelu(cpu, &layer);
            let (dw, dbias) = backward_weight(cpu, &layer, &dy);
            [z, y, backward_data(cpu, &layer, &dy, &extra), dw, dbias].map(|values| bits(&values)).concat()
        });
    }
}

fn forward_refuses_what_does_not_fit<D: Tested<f32>>() {
    let dims = dims([3, 5, 4], 2);
    let run = |dims, lens| {
        let [x, w, bias, mut z, mut y] = buffers::<D, f32, 5>(lens);
        let (x, w, bias, y) = (x.view(), w.view(), bias.view(), y.view_mut());
        let activation = Activation::Gelu { z: z.view_mut() };
        D::get().gemm_forward(Forward { dims, x, w, bias, activation, y })
    };
    assert_eq!(run(dims, [16, 20, 5, 15, 15]), Ok(()));
    assert_eq!(run(dims, [100, 20, 5, 15, 15]), Ok(()), "more rows than are read");
    assert_refuses_dims(run(dims, [15, 20, 5, 15, 15]));
    assert_refuses_length(run(dims, [16, 21, 5, 15, 15]), "w");
    assert_refuses_length(run(dims, [16, 20, 4, 15, 15]), "bias");
    assert_refuses_length(run(dims, [16, 20, 5, 14, 15]), "z");
    assert_refuses_length(run(dims, [16, 20, 5, 15, 18]), "y");
    assert_refuses_dims(run(GemmDims { x_stride: 3, ..dims }, [16, 20, 5, 15, 15]));
    assert_refuses_dims(run(GemmDims { m: 0, ..dims }, [16, 20, 5, 0, 0]));
}

fn backward_refuses_what_does_not_fit<D: Tested<f32>>() {
    let dims = dims([3, 5, 4], 2);
    let run = |dims, lens| {
        let [dy, w, gelu, addend, mut dx] = buffers::<D, f32, 5>(lens);
        let (gelu, addend) = (Some(gelu.view()), Some(addend.view()));
        let (dy, w, dx) = (dy.view(), w.view(), dx.view_mut());
        D::get().gemm_backward_data(BackwardData { dims, dy, w, gelu, addend, write: Write::Overwrite, dx })
    };
    assert_eq!(run(dims, [15, 20, 12, 12, 16]), Ok(()));
    assert_refuses_length(run(dims, [12, 20, 12, 12, 16]), "dy");
    assert_refuses_length(run(dims, [15, 15, 12, 12, 16]), "w");
    assert_refuses_length(run(dims, [15, 20, 16, 12, 16]), "gelu");
    assert_refuses_length(run(dims, [15, 20, 12, 16, 16]), "addend");
    assert_refuses_dims(run(dims, [15, 20, 12, 12, 15]));
    assert_refuses_dims(run(GemmDims { x_stride: 3, ..dims }, [15, 20, 12, 12, 16]));
    let run = |lens| {
        let [x, dy, mut dw, mut dbias] = buffers::<D, f32, 4>(lens);
        let (x, dy, dw, dbias) = (x.view(), dy.view(), dw.view_mut(), dbias.view_mut());
        D::get().gemm_backward_weight(BackwardWeight { dims, x, dy, dw, dbias })
    };
    assert_eq!(run([16, 15, 20, 5]), Ok(()));
    assert_refuses_dims(run([15, 15, 20, 5]));
    assert_refuses_length(run([16, 12, 20, 5]), "dy");
    assert_refuses_length(run([16, 15, 15, 5]), "dw");
    assert_refuses_length(run([16, 15, 20, 4]), "dbias");
}

//! Oracles of convolutions: for each tap the pixels that it reads as one matrix, the filters' numbers of that tap as another,
//! and their product in `f64`. What lies outside of the map is in neither.

use super::Exact;
use crate::ConvDims;
use ndarray::{Array2, Array3, ArrayView2, ArrayView3, Axis, s};

/// Every (output pixel, tap, input pixel) of a convolution where the tap lies inside the map.
pub(crate) fn conv_taps(d: ConvDims) -> impl Iterator<Item = (usize, usize, usize)> {
    ndarray::indices((d.n, d.p(), d.q(), d.r, d.s)).into_iter().filter_map(move |(n, p, q, r, s)| {
        let (y, x) = (p * d.stride + r, q * d.stride + s);
        let inside = (d.pad..d.pad + d.h).contains(&y) && (d.pad..d.pad + d.w).contains(&x);
        inside.then(|| ((n * d.p() + p) * d.q() + q, r * d.s + s, (n * d.h + y - d.pad) * d.w + x - d.pad))
    })
}

/// The output pixels that a tap contributes to, and the input pixels that it reads for them.
#[derive(Debug, Clone, Default)]
struct Tap {
    outputs: Vec<usize>,
    inputs: Vec<usize>,
}

/// All of them, as filters have them.
fn taps(d: ConvDims) -> Vec<Tap> {
    let mut taps = vec![Tap::default(); d.r * d.s];
    for (output, tap, input) in conv_taps(d) {
        taps[tap].outputs.push(output);
        taps[tap].inputs.push(input);
    }
    taps
}

/// [`Exact`] numbers: their values, and the magnitudes of their terms.
struct Matrix {
    value: Array2<f64>,
    magnitude: Array2<f64>,
}

impl Matrix {
    fn zeros(shape: (usize, usize)) -> Self {
        Self { value: Array2::zeros(shape), magnitude: Array2::zeros(shape) }
    }

    /// Of numbers that are a term each.
    fn of_terms(values: ArrayView2<'_, f64>) -> Self {
        Self { value: values.to_owned(), magnitude: values.abs() }
    }

    fn of(shape: (usize, usize), values: &[Exact]) -> Self {
        let part = |part: fn(&Exact) -> f64| {
            Array2::from_shape_vec(shape, values.iter().map(part).collect()).expect("length of the numbers")
        };
        Self { value: part(|exact| exact.value), magnitude: part(|exact| exact.magnitude) }
    }

    fn rows(&self, rows: &[usize]) -> Self {
        let [value, magnitude] = [&self.value, &self.magnitude].map(|part| part.select(Axis(0), rows));
        Self { value, magnitude }
    }

    fn transposed(self) -> Self {
        Self { value: self.value.reversed_axes(), magnitude: self.magnitude.reversed_axes() }
    }

    fn dot(&self, other: ArrayView2<'_, f64>) -> Self {
        Self { value: self.value.dot(&other), magnitude: self.magnitude.dot(&other.abs()) }
    }

    /// Adds the rows of another matrix to these of this one.
    fn add_rows(&mut self, rows: &[usize], other: &Self) {
        for (i, &row) in rows.iter().enumerate() {
            self.value.row_mut(row).scaled_add(1.0, &other.value.row(i));
            self.magnitude.row_mut(row).scaled_add(1.0, &other.magnitude.row(i));
        }
    }

    fn numbers(&self) -> Vec<Exact> {
        self.value.iter().zip(&self.magnitude).map(|(&value, &magnitude)| Exact { value, magnitude }).collect()
    }
}

/// The convolution of `x` with `w`, `[n, p, q, k]`.
pub(crate) fn convolve(d: ConvDims, x: &[f64], w: &[f64]) -> Vec<Exact> {
    let x = Matrix::of_terms(ArrayView2::from_shape((d.rows_in(), d.c), x).expect("length of x"));
    let w = ArrayView3::from_shape((d.k, d.r * d.s, d.c), w).expect("length of w");
    let mut y = Matrix::zeros((d.rows_out(), d.k));
    for (tap, w) in taps(d).iter().zip(w.axis_iter(Axis(1))) {
        y.add_rows(&tap.outputs, &x.rows(&tap.inputs).dot(w.t()));
    }
    y.numbers()
}

/// The gradient of its input, `[n, h, w, c]`.
pub(crate) fn input_gradient(d: ConvDims, dy: &[Exact], w: &[f64]) -> Vec<Exact> {
    let dy = Matrix::of((d.rows_out(), d.k), dy);
    let w = ArrayView3::from_shape((d.k, d.r * d.s, d.c), w).expect("length of w");
    let mut dx = Matrix::zeros((d.rows_in(), d.c));
    for (tap, w) in taps(d).iter().zip(w.axis_iter(Axis(1))) {
        dx.add_rows(&tap.inputs, &dy.rows(&tap.outputs).dot(w));
    }
    dx.numbers()
}

/// The gradient of its filter, `[k, r, s, c]`.
pub(crate) fn filter_gradient(d: ConvDims, dy: &[Exact], x: &[f64]) -> Vec<Exact> {
    let dy = Matrix::of((d.rows_out(), d.k), dy);
    let x = ArrayView2::from_shape((d.rows_in(), d.c), x).expect("length of x");
    let mut dw = Array3::from_elem((d.k, d.r * d.s, d.c), Exact::default());
    for (tap, mut dw) in taps(d).iter().zip(dw.axis_iter_mut(Axis(1))) {
        let product = dy.rows(&tap.outputs).transposed().dot(x.select(Axis(0), &tap.inputs).view());
        dw.iter_mut().zip(product.numbers()).for_each(|(dw, number)| *dw = number);
    }
    dw.into_raw_vec_and_offset().0
}

/// The magnitudes of the terms where a convolution is done by minimal filtering, F(2x2, 3x3): differences of pixels cancel
/// there that the plain way never forms. With the matrices of absolute values, of which `cpu::winograd` says more.
pub(crate) mod minimal {
    use super::*;

    const INPUT: [[f64; 4]; 4] = [[1., 0., 1., 0.], [0., 1., 1., 0.], [0., 1., 1., 0.], [0., 1., 0., 1.]];
    const FILTER: [[f64; 3]; 4] = [[1., 0., 0.], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0., 0., 1.]];
    const OUTPUT: [[f64; 4]; 2] = [[1., 1., 1., 0.], [0., 1., 1., 1.]];

    /// `m x m^T`.
    fn transform<const R: usize, const C: usize>(m: &[[f64; C]; R], x: &[[f64; C]; C]) -> [[f64; R]; R] {
        let half: [[f64; C]; R] =
            std::array::from_fn(|i| std::array::from_fn(|b| (0..C).map(|a| m[i][a] * x[a][b]).sum()));
        std::array::from_fn(|i| std::array::from_fn(|j| (0..C).map(|b| half[i][b] * m[j][b]).sum()))
    }

    fn transpose<const R: usize, const C: usize>(m: &[[f64; C]; R]) -> [[f64; R]; C] {
        std::array::from_fn(|i| std::array::from_fn(|j| m[j][i]))
    }

    /// Magnitudes in the `N` by `N` pixels from `halo` before a square, of one channel; zero outside the image.
    fn square<const N: usize>(
        d: ConvDims,
        x: &[f64],
        channel: usize,
        [image, y, z]: [usize; 3],
        halo: usize,
    ) -> [[f64; N]; N] {
        let channels = x.len() / d.rows_in();
        std::array::from_fn(|i| {
            std::array::from_fn(|j| {
                let (y, z) = ((2 * y + i).wrapping_sub(halo), (2 * z + j).wrapping_sub(halo));
                if y < d.h && z < d.w { x[((image * d.h + y) * d.w + z) * channels + channel].abs() } else { 0.0 }
            })
        })
    }

    fn squares(d: ConvDims) -> Vec<[usize; 3]> {
        ndarray::indices((d.n, d.h.div_ceil(2), d.w.div_ceil(2))).into_iter().map(|(n, y, x)| [n, y, x]).collect()
    }

    /// `[16, rows, columns]` of 4x4 numbers for each row and column: what is multiplied lies side by side.
    fn sixteen(rows: usize, columns: usize, at: impl Fn(usize, usize) -> [[f64; 4]; 4]) -> Array3<f64> {
        let mut all = Array3::zeros((16, rows, columns));
        for (row, column) in ndarray::indices((rows, columns)) {
            let numbers = at(row, column);
            (0..16).for_each(|i| all[[i, row, column]] = numbers[i / 4][i % 4]);
        }
        all
    }

    /// A product of matrices for each of the sixteen.
    fn products(left: &Array3<f64>, right: &Array3<f64>) -> Array3<f64> {
        let mut all = Array3::zeros((16, left.dim().1, right.dim().2));
        for ((mut out, left), right) in all.outer_iter_mut().zip(left.outer_iter()).zip(right.outer_iter()) {
            out.assign(&left.dot(&right));
        }
        all
    }

    /// One of each of the sixteen.
    fn numbers(all: &Array3<f64>, row: usize, column: usize) -> [[f64; 4]; 4] {
        let one = all.slice(s![.., row, column]);
        std::array::from_fn(|i| std::array::from_fn(|j| one[4 * i + j]))
    }

    /// Of `y[n, h, w, outputs]` from `x[n, h, w, inputs]`; `w(output, tap, input)` are the filters.
    pub(crate) fn convolution(
        d: ConvDims,
        x: &[f64],
        outputs: usize,
        w: impl Fn(usize, usize, usize) -> f64,
    ) -> Vec<f64> {
        let (inputs, squares) = (x.len() / d.rows_in(), squares(d));
        let filter = |c: usize, k: usize| -> [[f64; 3]; 3] {
            std::array::from_fn(|i| std::array::from_fn(|j| w(k, 3 * i + j, c).abs()))
        };
        let filters = sixteen(inputs, outputs, |c, k| transform(&FILTER, &filter(c, k)));
        let pixels = sixteen(squares.len(), inputs, |i, c| transform(&INPUT, &square::<4>(d, x, c, squares[i], 1)));
        let products = products(&pixels, &filters);
        let mut y = vec![0.0; d.rows_in() * outputs];
        for (i, at) in squares.iter().enumerate() {
            for k in 0..outputs {
                for (i, row) in transform(&OUTPUT, &numbers(&products, i, k)).into_iter().enumerate() {
                    for (j, magnitude) in row.into_iter().enumerate() {
                        let [image, p, q] = [at[0], 2 * at[1] + i, 2 * at[2] + j];
                        if p < d.h && q < d.w {
                            y[((image * d.h + p) * d.w + q) * outputs + k] = magnitude;
                        }
                    }
                }
            }
        }
        y
    }

    /// Of `dw[k, 3, 3, c]`.
    pub(crate) fn filter_gradient(d: ConvDims, dy: &[f64], x: &[f64]) -> Vec<f64> {
        let squares = squares(d);
        let of_dy = |k: usize, i: usize| transform(&transpose(&OUTPUT), &square::<2>(d, dy, k, squares[i], 0));
        let of_x = |i: usize, c: usize| transform(&INPUT, &square::<4>(d, x, c, squares[i], 1));
        let sums = products(&sixteen(d.k, squares.len(), of_dy), &sixteen(squares.len(), d.c, of_x));
        let taps = |(k, c): (usize, usize)| transform(&transpose(&FILTER), &numbers(&sums, k, c));
        let taps = Array2::from_shape_fn((d.k, d.c), taps);
        ndarray::indices((d.k, 9, d.c)).into_iter().map(|(k, tap, c)| taps[[k, c]][tap / 3][tap % 3]).collect()
    }
}

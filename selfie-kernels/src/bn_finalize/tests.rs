use super::*;
use crate::Affine;
use crate::Wide;
use crate::cpu::sums::tile_stats;
use crate::grad_join::{GradJoin, Join};
use crate::partials::{Cut, SUM_ROWS};
use crate::testing::*;
use proptest::prelude::any;

/// (name, rows, channels)
const CASES: &[(&str, usize, usize)] = &[
    ("two rows of one channel", 2, 1),
    ("one full tile", 128, 16),
    ("one row in the last tile", 129, 17),
    ("more channels than a task takes", 300, 130),
    ("many tiles", 5000, 5),
    ("more tiles than are on their way at once", 66_000, 9),
];
const EPS: f64 = 1e-5;

on_every_device! {
    elements: cases, any_shape;
    once: runs_of_rows_end_in_shorter_tiles, nan_comes_through_in_its_channel, refuses_what_does_not_fit;
}

fn sum_tiles(rows: usize) -> usize {
    Cut::plain(rows).tiles()
}

/// Partial sums as an operation leaves them that cuts rows plainly.
fn partials<M: Memory, W: Wide>(device: &M, rows: usize, c: usize, tiles: &[W]) -> Partials<M, W> {
    let mut partials = room(device, rows, c);
    device.upload(tiles, partials.make(Cut::plain(rows), c)).expect("as many tiles as the cut has");
    partials
}

/// What the forward pass and inference write.
struct Folded<W> {
    /// mean, rstd, scale, shift.
    norm: Vec<W>,
    /// Mean and unbiased variance.
    batch: Vec<W>,
}

fn forward<T: Element, B: BnFinalize<T>>(
    device: &B,
    rows: usize,
    eps: f64,
    stats: &[T::Wide],
    affine: &[T::Wide],
) -> Folded<T::Wide> {
    let c = affine.len() / 2;
    let (stats, affine) = (partials(device, rows, c, stats), Guarded::new(device, affine));
    let (mut norm, mut batch) = (Guarded::poisoned(device, 4 * c), Guarded::poisoned(device, 2 * c));
    let args =
        Forward { rows, c, eps, stats: &stats, affine: affine.view(), norm: norm.view_mut(), batch: batch.view_mut() };
    device.bn_finalize_forward(args).expect("lengths fit");
    Folded { norm: norm.read(device), batch: batch.read(device) }
}

fn inference<T: Element, B: BnFinalize<T>>(
    device: &B,
    eps: f64,
    running: &[T::Wide],
    affine: &[T::Wide],
) -> Vec<T::Wide> {
    let c = affine.len() / 2;
    let (running, affine) = (Guarded::new(device, running), Guarded::new(device, affine));
    let mut norm = Guarded::poisoned(device, 4 * c);
    let args = Inference { c, eps, running: running.view(), affine: affine.view(), norm: norm.view_mut() };
    device.bn_finalize_inference(args).expect("lengths fit");
    norm.read(device)
}

/// `[2, c]` gradients of gamma and beta, `[3, c]` coefficients.
fn backward<T: Element, B: BnFinalize<T>>(
    device: &B,
    rows: usize,
    sums: &[T::Wide],
    affine: &[T::Wide],
    norm: &[T::Wide],
) -> (Vec<T::Wide>, Vec<T::Wide>) {
    let c = affine.len() / 2;
    let (affine, norm) = (Guarded::new(device, affine), Guarded::new(device, norm));
    let sums = partials(device, rows, c, sums);
    let (mut daffine, mut coef) = (Guarded::poisoned(device, 2 * c), Guarded::poisoned(device, 3 * c));
    let args = Backward {
        rows,
        c,
        sums: &sums,
        affine: affine.view(),
        norm: norm.view(),
        daffine: daffine.view_mut(),
        coef: coef.view_mut(),
    };
    device.bn_finalize_backward(args).expect("lengths fit");
    (daffine.read(device), coef.read(device))
}

/// Mean and sum of squared deviations of a channel, straight from their definition over the tiles.
fn moments(rows: usize, tiles: &[(f64, f64)]) -> [Exact; 2] {
    let count = |tile: usize| SUM_ROWS.min(rows - tile * SUM_ROWS) as f64;
    let weighted = tiles.iter().enumerate().map(|(tile, &(mean, _))| count(tile) * mean / rows as f64);
    let mean = weighted.sum::<Exact>();
    let squares =
        tiles.iter().enumerate().map(|(tile, &(m, squares))| squares + count(tile) * (m - mean.value).powi(2));
    let mut squares = squares.sum::<Exact>();
    // Merging moves by roundings of the means, times their distances, times two.
    let largest = tiles.iter().fold(0.0f64, |largest, tile| largest.max(tile.0.abs()));
    let spread = tiles.iter().fold(0.0f64, |spread, tile| spread.max((tile.0 - mean.value).abs()));
    squares.magnitude += rows as f64 * 2.0 * spread * 2.0 * (largest + spread);
    [mean, squares]
}

/// Checks rows `rstd`, `scale`, `shift` of `norm` against mean and variance; everything is computed in f64.
fn assert_folded<W: Wide>(norm: &[W], affine: &[W], mean: &[Exact], variance: &[Exact], eps: f64, roundings: usize) {
    let c = mean.len();
    let stored_scale = exact(&norm[2 * c..3 * c]);
    let affine = exact(affine);
    let rstd: Vec<_> = variance
        .iter()
        .map(|v| {
            let value = 1.0 / (v.value + eps).sqrt();
            Exact { value, magnitude: value * (1.0 + v.magnitude / (v.value + eps)) }
        })
        .collect();
    let scale: Vec<_> = rstd.iter().zip(&affine).map(|(rstd, gamma)| rstd.times(*gamma)).collect();
    let shift: Vec<_> = (0..c)
        .map(|k| {
            let mut shift = mean[k].times(-stored_scale[k]);
            shift.add(affine[c + k]);
            shift
        })
        .collect();
    assert_close::<f64, _>("mean", &norm[..c], mean, roundings);
    assert_close::<f64, _>("rstd", &norm[c..2 * c], &rstd, roundings + 4);
    assert_close::<f64, _>("scale", &norm[2 * c..3 * c], &scale, roundings + 5);
    assert_close::<f64, _>("shift", &norm[3 * c..], &shift, roundings + 2);
}

fn check_forward<T: Element>(device: &impl BnFinalize<T>, rows: usize, c: usize, mean: f64, seed: u64) {
    let (tiles, mut draws) = (sum_tiles(rows), Draws::new(seed));
    let affine = draws.values::<T::Wide>(2 * c);
    let stats: Vec<T::Wide> = (0..tiles)
        .flat_map(|_| {
            let (means, squares) = (draws.normal(c, mean, 0.1), draws.uniform(c, 0.0, 2.0 * SUM_ROWS as f64));
            [means, squares].concat()
        })
        .collect();
    let Folded { norm, batch } = forward::<T, _>(device, rows, EPS, &stats, &affine);

    let stats = exact(&stats);
    let channel = |k: usize| stats.chunks(2 * c).map(|tile| (tile[k], tile[c + k])).collect::<Vec<_>>();
    let (mean, squares): (Vec<_>, Vec<_>) = (0..c).map(|k| moments(rows, &channel(k)).into()).unzip();
    let divided = |by: usize| squares.iter().map(|s: &Exact| s.times(1.0 / by as f64)).collect::<Vec<_>>();
    // A tile's merge rounds difference, share, product and sum.
    let roundings = 6 * tiles;
    assert_folded(&norm, &affine, &mean, &divided(rows), EPS, roundings + 1);
    assert_eq!(batch[..c], norm[..c]);
    assert_close::<f64, _>("unbiased variance", &batch[c..], &divided(rows - 1), roundings + 1);
}

fn check_inference<T: Element>(device: &impl BnFinalize<T>, c: usize, seed: u64) {
    let mut draws = Draws::new(seed);
    let affine = draws.values::<T::Wide>(2 * c);
    let running = [draws.values::<T::Wide>(c), draws.uniform(c, 0.0, 2.0)].concat();
    let norm = inference::<T, _>(device, EPS, &running, &affine);
    let (mean, variance): (Vec<_>, Vec<_>) =
        (0..c).map(|k| [k, c + k].map(|i| Exact::new(running[i].to_f64())).into()).unzip();
    assert_folded(&norm, &affine, &mean, &variance, EPS, 1);
}

fn check_backward<T: Element>(device: &impl BnFinalize<T>, rows: usize, c: usize, mean: f64, seed: u64) {
    let mut draws = Draws::new(seed);
    let affine = draws.values::<T::Wide>(2 * c);
    let (means, rstd) = (draws.normal::<T::Wide>(c, mean, 1.0), draws.uniform::<T::Wide>(c, 0.5, 2.0));
    let unused = draws.values::<T::Wide>(2 * c);
    let norm = [means, rstd, unused].concat();
    let sums = draws.values::<T::Wide>(sum_tiles(rows) * 2 * c);
    let (daffine, coef) = backward::<T, _>(device, rows, &sums, &affine, &norm);

    let (affine, norm, sums) = (exact(&affine), exact(&norm), exact(&sums));
    let total = |k: usize| sums.chunks(2 * c).map(|tile| tile[k]).sum::<Exact>();
    let channels = |f: &dyn Fn(usize) -> Exact| (0..c).map(f).collect::<Vec<_>>();
    let n = sum_tiles(rows);
    assert_close::<f64, _>("dgamma", &daffine[..c], &channels(&|k| total(c + k)), n);
    assert_close::<f64, _>("dbeta", &daffine[c..], &channels(&|k| total(k)), n);
    let a = |k: usize| affine[k] * norm[c + k];
    assert_close::<f64, _>("a", &coef[..c], &channels(&|k| Exact::new(a(k))), 1);
    let b = channels(&|k| total(c + k).times(-a(k) * norm[c + k] / rows as f64));
    assert_close::<f64, _>("b", &coef[c..2 * c], &b, n + 4);
    let constant = channels(&|k| {
        let mut sum = total(k).times(-a(k) / rows as f64);
        sum.add(-coef[c + k].to_f64() * norm[k]);
        sum
    });
    assert_close::<f64, _>("c", &coef[2 * c..], &constant, n + 4);
}

fn check<T: Element>(device: &impl BnFinalize<T>, rows: usize, c: usize, seed: u64) {
    for mean in [0.0, 1000.0] {
        check_forward::<T>(device, rows, c, mean, seed);
        check_backward::<T>(device, rows, c, mean, seed);
    }
    check_inference::<T>(device, c, seed);
}

fn cases<D: Tested<T>, T: Element>() {
    for &(name, rows, c) in CASES {
        eprintln!("{}: {name}", T::NAME);
        check::<T>(D::get(), rows, c, 1);
    }
}

fn any_shape<D: Tested<T>, T: Element>() {
    for_any::<D, _>(256, (2..600usize, 1..40usize, any::<u64>()), |(rows, c, seed)| {
        check::<T>(D::get(), rows, c, seed);
    });
}

/// Two rows, 0 and 2: PyTorch normalises by the biased variance, 1, and hands on the unbiased one, 2.
#[test]
fn two_values() {
    let folded = forward::<f64, _>(cpu(), 2, 0.0, &[1.0, 2.0], &[3.0, 5.0]);
    assert_eq!(folded.norm, [1.0, 1.0, 3.0, 2.0]);
    assert_eq!(folded.batch, [1.0, 2.0]);
    assert_eq!(inference::<f64, _>(cpu(), 1.0, &[1.0, 3.0], &[4.0, 5.0]), [1.0, 0.5, 2.0, 3.0]);
}

/// The whole way from a map in f32 whose mean is a thousand times its spread.
#[test]
fn a_large_mean_costs_no_digits_of_the_variance() {
    let rows = 20 * SUM_ROWS;
    let x = Draws::new(5).normal::<f32>(rows, 1000.0, 1.0);
    let stats: Vec<f32> = x
        .chunks(SUM_ROWS)
        .flat_map(|tile| {
            let mut stats = [f32::NAN; 2];
            tile_stats(tile, 1, &mut stats);
            stats
        })
        .collect();
    let got = f64::from(forward::<f32, _>(cpu(), rows, EPS, &stats, &[1.0, 0.0]).batch[1]);
    let x = exact(&x);
    let mean = x.iter().sum::<f64>() / rows as f64;
    let want = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (rows - 1) as f64;
    // Each tile's mean is off by its summed deviations' roundings and its own; the first-order terms of that vanish
    // within a tile and are `2 d |tile mean - mean|` between tiles. The rest is squares summed in f32.
    let unit = f64::from(f32::EPSILON) / 2.0;
    let d = (SUM_ROWS + 2) as f64 * unit + 2.0 * unit * 1000.0;
    let apart = x.chunks(SUM_ROWS).map(|tile| (tile.iter().sum::<f64>() / SUM_ROWS as f64 - mean).abs());
    let between = apart.sum::<f64>() / 20.0;
    let bound = 4.0 * d * between + 5.0 * d * d + want * (SUM_ROWS + 4) as f64 * unit;
    assert!((got - want).abs() <= bound, "{got} for {want}, bound {bound:e}");
}

/// Of `sum(u * z) + sum(skip * x)` with `z = gamma * (x - mean(x)) / sqrt(var(x) + eps) + beta`: the input of a block
/// with an identity shortcut. Derivatives by x (with [`crate::grad_join`]), gamma and beta.
#[test]
fn gradient() {
    let (rows, c, mut draws) = (9, 3, Draws::new(6));
    let x = draws.normal::<f64>(rows * c, 2.0, 1.0);
    let affine = draws.normal::<f64>(2 * c, 0.0, 1.0);
    let [u, skip] = [0; 2].map(|_| draws.values::<f64>(rows * c));

    let mut stats = vec![0.0; 2 * c];
    tile_stats(&x, c, &mut stats);
    let norm = forward::<f64, _>(cpu(), rows, EPS, &stats, &affine).norm;
    let mut sums = vec![0.0; 2 * c];
    for (i, u) in u.iter().enumerate() {
        let k = i % c;
        sums[k] += u;
        sums[c + k] += u * (x[i] - norm[k]) * norm[c + k];
    }
    let (daffine, coef) = backward::<f64, _>(cpu(), rows, &sums, &affine, &norm);
    let device = cpu();
    let [dz, raw, coef, shortcut] = [&u, &x, &coef, &skip].map(|values| Guarded::new(device, values));
    let mut dx = Guarded::poisoned(device, rows * c);
    let grad = Affine { dz: dz.view(), x: raw.view(), coef: coef.view() };
    let join = Join { rows, c, affine: grad, skip: Some(shortcut.view()), dx: dx.view_mut() };
    device.grad_join(join).expect("lengths fit");

    let f = |x: &[f64], affine: &[f64]| -> Exact {
        let channel = |k: usize| x[k..].iter().step_by(c);
        let mean: Vec<f64> = (0..c).map(|k| channel(k).sum::<f64>() / rows as f64).collect();
        let variance = |k: usize| channel(k).map(|x| (x - mean[k]).powi(2)).sum::<f64>() / rows as f64;
        let rstd: Vec<f64> = (0..c).map(|k| 1.0 / (variance(k) + EPS).sqrt()).collect();
        let z = |i: usize| affine[i % c] * (x[i] - mean[i % c]) * rstd[i % c] + affine[c + i % c];
        (0..rows * c).flat_map(|i| [u[i] * z(i), skip[i] * x[i]]).sum()
    };
    let roundings = 2 * rows * c + 3 * rows;
    assert_gradient("dx", &dx.read(device), &x, roundings, |x| f(x, &affine));
    assert_gradient("daffine", &daffine, &affine, roundings, |affine| f(&x, affine));
}

/// Tiles of 128, 2, 128 and 1 rows, each of which has one value of the channel, beside one that has some spread.
fn runs_of_rows_end_in_shorter_tiles<D: Tested<f32>>() {
    let (rows, device) = (259, D::get());
    let tiles = [(128.0, [1.0, 0.0]), (2.0, [-40.0, 3.0]), (128.0, [2.0, 0.5]), (1.0, [30.0, 0.0])];
    let mut stats = room(device, rows, 1);
    let values = tiles.map(|tile| tile.1).concat();
    device
        .upload(&values, stats.make(Cut { runs: [130, 0, 128, 1], tile: 128 }, 1))
        .expect("as many tiles as runs have");
    let affine = Guarded::new(device, &[1.0, 0.0]);
    let (mut norm, mut batch) = (Guarded::poisoned(device, 4), Guarded::poisoned(device, 2));
    let (affine, norm_out, batch_out) = (affine.view(), norm.view_mut(), batch.view_mut());
    let args = Forward { rows, c: 1, eps: EPS, stats: &stats, affine, norm: norm_out, batch: batch_out };
    BnFinalize::<f32>::bn_finalize_forward(device, args).expect("lengths fit");
    let mean: Exact = tiles.iter().map(|(n, [mean, _])| n * f64::from(*mean) / rows as f64).sum();
    let apart = |tile: &f32| f64::from(*tile) - mean.value;
    let squares: Exact = tiles.iter().map(|(n, [m, squares])| f64::from(*squares) + n * apart(m).powi(2)).sum();
    let roundings = 6 * tiles.len();
    assert_close::<f32, _>("mean and variance", &batch.read(device), &[mean, squares.times(1.0 / 258.0)], roundings);
}

fn nan_comes_through_in_its_channel<D: Tested<f32>>() {
    let stats = [0.0, f32::NAN, 0.0, 1.0, 1.0, 1.0];
    let affine = [1.0f32; 6];
    let Folded { norm, batch } = forward::<f32, _>(D::get(), 100, EPS, &stats, &affine);
    let norm_again = inference::<f32, _>(D::get(), EPS, &[0.0, 1.0, 0.0, 1.0, f32::NAN, 1.0], &affine);
    let (daffine, coef) = backward::<f32, _>(D::get(), 100, &stats, &affine, &[1.0; 12]);
    for k in 0..3 {
        assert!((0..4).all(|row| norm[3 * row + k].is_nan() == (k == 1)));
        assert!((0..2).all(|row| batch[3 * row + k].is_nan() == (k == 1)));
        assert!((1..4).all(|row| norm_again[3 * row + k].is_nan() == (k == 1)));
        assert_eq!([daffine[k].is_nan(), daffine[3 + k].is_nan()], [false, k == 1]);
        assert_eq!([coef[k].is_nan(), coef[3 + k].is_nan(), coef[6 + k].is_nan()], [false, false, k == 1]);
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let (rows, c, mut draws) = (1000, 300, Draws::new(7));
    let affine = draws.values::<f32>(2 * c);
    let stats = draws.uniform::<f32>(sum_tiles(rows) * 2 * c, 0.0, 1.0);
    assert_same_on_any_threads(|cpu| {
        let Folded { norm, batch } = forward::<f32, _>(cpu, rows, EPS, &stats, &affine);
        let (daffine, coef) = backward::<f32, _>(cpu, rows, &stats, &affine, &norm);
        [norm, batch, daffine, coef].iter().flat_map(|values| bits(values)).collect()
    });
}

fn refuses_what_does_not_fit<D: Tested<f32>>() {
    let made = |rows| partials(D::get(), rows, 3, &vec![0.0f32; 6 * sum_tiles(rows)]);
    let run = |rows, made_rows, lens| {
        let [affine, mut norm, mut batch] = buffers::<D, f32, 3>(lens);
        let (stats, affine, norm, batch) = (&made(made_rows), affine.view(), norm.view_mut(), batch.view_mut());
        let args = Forward { rows, c: 3, eps: EPS, stats, affine, norm, batch };
        BnFinalize::<f32>::bn_finalize_forward(D::get(), args)
    };
    assert_eq!(run(129, 129, [6, 12, 6]), Ok(()));
    assert_refuses_dims(run(1, 1, [6, 12, 6]));
    assert_refuses_dims(run(128, 129, [6, 12, 6]));
    assert_refuses_length(run(129, 129, [3, 12, 6]), "affine");
    assert_refuses_length(run(129, 129, [6, 6, 6]), "norm");
    assert_refuses_length(run(129, 129, [6, 12, 3]), "batch");
    let unmade = room(D::get(), 129, 3);
    let [affine, mut norm, mut batch] = buffers::<D, f32, 3>([6, 12, 6]);
    let (affine, norm, batch) = (affine.view(), norm.view_mut(), batch.view_mut());
    let args = Forward { rows: 129, c: 3, eps: EPS, stats: &unmade, affine, norm, batch };
    assert_refuses_dims(BnFinalize::<f32>::bn_finalize_forward(D::get(), args));

    let run = |lens| {
        let [running, affine, mut norm] = buffers::<D, f32, 3>(lens);
        let (running, affine, norm) = (running.view(), affine.view(), norm.view_mut());
        let args = Inference { c: 3, eps: EPS, running, affine, norm };
        BnFinalize::<f32>::bn_finalize_inference(D::get(), args)
    };
    assert_eq!(run([6, 6, 12]), Ok(()));
    assert_refuses_length(run([3, 6, 12]), "running");
    assert_refuses_length(run([6, 5, 12]), "affine");
    assert_refuses_length(run([6, 6, 13]), "norm");

    let run = |made_rows, lens| {
        let [affine, norm, mut daffine, mut coef] = buffers::<D, f32, 4>(lens);
        let (sums, affine, norm) = (&made(made_rows), affine.view(), norm.view());
        let (daffine, coef) = (daffine.view_mut(), coef.view_mut());
        let args = Backward { rows: 129, c: 3, sums, affine, norm, daffine, coef };
        BnFinalize::<f32>::bn_finalize_backward(D::get(), args)
    };
    assert_eq!(run(129, [6, 12, 6, 9]), Ok(()));
    assert_refuses_dims(run(128, [6, 12, 6, 9]));
    assert_refuses_length(run(129, [4, 12, 6, 9]), "affine");
    assert_refuses_length(run(129, [6, 9, 6, 9]), "norm");
    assert_refuses_length(run(129, [6, 12, 9, 9]), "daffine");
    assert_refuses_length(run(129, [6, 12, 6, 6]), "coef");
}

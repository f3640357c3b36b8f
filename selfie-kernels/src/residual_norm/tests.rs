use super::*;
use crate::Wide;
use crate::testing::*;
use proptest::prelude::any;

const EPS: f64 = 1e-5;

/// b, t, d, and how many elements more a row of x takes.
const CASES: &[(&str, [usize; 4])] = &[
    ("one feature, so no variance", [2, 3, 1, 0]),
    ("two features", [1, 1, 2, 0]),
    ("one token of each image, the rest skipped", [3, 1, 64, 128]),
    ("a vector of sums and one more", [2, 3, 33, 0]),
    ("features of several tasks, rows of several tasks", [3, 13, 130, 5]),
    ("more rows than one partial sum", [19, 7, 5, 0]),
    ("full width", [1, 2, 1024, 0]),
    ("more than a warp's registers hold", [1, 2, 1032, 0]),
    ("whole chunks that end within a warp, rows in several parts", [70, 3, 40, 8]),
];

fn dims([b, t, d, skipped]: [usize; 4]) -> NormDims {
    NormDims { b, t, d, x_stride: d + skipped }
}

struct Normed<T: Element> {
    sum: Vec<T>,
    stats: Vec<T::Wide>,
    y: Vec<T>,
}

struct Gradients<T: Element> {
    dx: Vec<T>,
    dbranch: Vec<T>,
    daffine: Vec<T::Wide>,
}

/// `x` is dense here; on the device its rows lie apart, with NaN between them.
fn forward<T: Element, B: ResidualNorm<T>>(
    device: &B,
    dims: NormDims,
    [x, branch]: [&[T]; 2],
    affine: &[T::Wide],
    dropout: Option<HostDropout>,
) -> Normed<T> {
    let mut apart = vec![stored::<T>(f64::NAN); dims.len_x()];
    for (to, from) in apart.chunks_mut(dims.x_stride).zip(x.chunks(dims.d)) {
        to[..dims.d].copy_from_slice(from);
    }
    let (x, branch, affine) =
        (Guarded::new(device, &apart), Guarded::new(device, branch), Guarded::new(device, affine));
    let dropout = dropout.map(|dropout| DeviceDropout::new(device, dropout));
    let (mut sum, mut y) = (Guarded::poisoned(device, dims.len()), Guarded::poisoned(device, dims.len()));
    let mut stats = Guarded::poisoned(device, 2 * dims.rows());
    let args = Forward {
        dims,
        eps: EPS,
        x: x.view(),
        branch: branch.view(),
        dropout: dropout.as_ref().map(DeviceDropout::view),
        affine: affine.view(),
        sum: sum.view_mut(),
        stats: stats.view_mut(),
        y: y.view_mut(),
    };
    device.residual_norm_forward(args).expect("dims and lengths fit");
    Normed { sum: sum.read(device), stats: stats.read(device), y: y.read(device) }
}

fn backward<T: Element, B: ResidualNorm<T>>(
    device: &B,
    dims: NormDims,
    dy: &[T],
    normed: &Normed<T>,
    affine: &[T::Wide],
    dropout: Option<HostDropout>,
) -> Gradients<T> {
    let (dy, sum) = (Guarded::new(device, dy), Guarded::new(device, &normed.sum));
    let (stats, affine) = (Guarded::new(device, &normed.stats), Guarded::new(device, affine));
    let dropout = dropout.map(|dropout| DeviceDropout::new(device, dropout));
    let (mut dx, mut dbranch) = (Guarded::poisoned(device, dims.len()), Guarded::poisoned(device, dims.len()));
    let mut daffine = Guarded::poisoned(device, 2 * dims.d);
    let args = Backward {
        dims,
        dy: dy.view(),
        sum: sum.view(),
        stats: stats.view(),
        dropout: dropout.as_ref().map(DeviceDropout::view),
        affine: affine.view(),
        dx: dx.view_mut(),
        dbranch: dbranch.view_mut(),
        daffine: daffine.view_mut(),
    };
    device.residual_norm_backward(args).expect("dims and lengths fit");
    Gradients { dx: dx.read(device), dbranch: dbranch.read(device), daffine: daffine.read(device) }
}

fn oracle_sum(x: &[Bounded], branch: &[Bounded], multipliers: &[Bounded]) -> Vec<Bounded> {
    x.iter().zip(branch).zip(multipliers).map(|((&x, &branch), &multiplier)| x + multiplier * branch).collect()
}

/// Mean over a row.
fn mean<W: Wide>(terms: impl ExactSizeIterator<Item = Bounded>) -> Bounded {
    let share = Bounded::constant::<W>(1.0 / terms.len() as f64);
    Bounded::sum(terms) * share
}

/// Mean and rstd of each row, and `y`.
fn oracle_norm<W: Wide>(sum: &[Bounded], affine: &[Bounded]) -> (Vec<Bounded>, Vec<Bounded>) {
    let (gamma, beta) = affine.split_at(affine.len() / 2);
    let (mut stats, mut y) = (Vec::new(), Vec::new());
    for row in sum.chunks(gamma.len()) {
        let average = mean::<W>(row.iter().copied());
        let centred: Vec<_> = row.iter().map(|&x| x - average).collect();
        let variance = mean::<W>(centred.iter().map(|&c| c * c));
        let rstd = (variance + Bounded::constant::<W>(EPS)).sqrt().recip();
        stats.extend([average, rstd]);
        y.extend((0..row.len()).map(|j| centred[j] * rstd * gamma[j] + beta[j]));
    }
    (stats, y)
}

/// Gradients of residual, branch, (gamma, beta).
fn oracle_backward<W: Wide>(
    [dy, sum, stats, affine, multipliers]: [&[Bounded]; 5],
) -> (Vec<Bounded>, Vec<Bounded>, Vec<Bounded>) {
    let d = affine.len() / 2;
    let xhat: Vec<_> = (0..sum.len()).map(|i| (sum[i] - stats[i / d * 2]) * stats[i / d * 2 + 1]).collect();
    let g: Vec<_> = (0..dy.len()).map(|i| dy[i] * affine[i % d]).collect();
    let mut dx = Vec::new();
    for (row, (g, xhat)) in g.chunks(d).zip(xhat.chunks(d)).enumerate() {
        let mean_g = mean::<W>(g.iter().copied());
        let mean_g_xhat = mean::<W>((0..d).map(|j| g[j] * xhat[j]));
        dx.extend((0..d).map(|j| stats[2 * row + 1] * (g[j] - mean_g - xhat[j] * mean_g_xhat)));
    }
    let dbranch = dx.iter().zip(multipliers).map(|(&dx, &multiplier)| dx * multiplier).collect();
    let column = |j: usize| (j..dy.len()).step_by(d);
    let dgamma = (0..d).map(|j| Bounded::sum(column(j).map(|i| dy[i] * xhat[i])));
    let dbeta = (0..d).map(|j| Bounded::sum(column(j).map(|i| dy[i])));
    let daffine = dgamma.chain(dbeta).collect();
    (dx, dbranch, daffine)
}

/// Each stage from what the one before it stored, with and without dropout.
fn check_inputs<T: Element>(device: &impl ResidualNorm<T>, dims: NormDims, x: &[T], draws: &mut Draws) {
    let (branch, dy) = (draws.values::<T>(dims.len()), draws.values::<T>(dims.len()));
    let affine = draws.values::<T::Wide>(2 * dims.d);
    let affine_exact = bounded(&affine);
    for dropout in [None, Some(HostDropout::new(0.3))] {
        let multipliers = HostDropout::multipliers::<T::Wide>(dropout, dims.b, dims.t * dims.d);
        let normed = forward(device, dims, [x, &branch], &affine, dropout);
        assert_bounded("sum", &normed.sum, &oracle_sum(&bounded(x), &bounded(&branch), &multipliers));
        let (stats, y) = oracle_norm::<T::Wide>(&bounded(&normed.sum), &affine_exact);
        assert_bounded("stats", &normed.stats, &stats);
        assert_bounded("y", &normed.y, &y);

        let got = backward(device, dims, &dy, &normed, &affine, dropout);
        let [dy, sum, stats] = [bounded(&dy), bounded(&normed.sum), bounded(&normed.stats)];
        let (dx, dbranch, daffine) = oracle_backward::<T::Wide>([&dy, &sum, &stats, &affine_exact, &multipliers]);
        assert_bounded("dx", &got.dx, &dx);
        assert_bounded("dbranch", &got.dbranch, &dbranch);
        assert_bounded("daffine", &got.daffine, &daffine);
    }
}

fn check<T: Element>(device: &impl ResidualNorm<T>, dims: NormDims, seed: u64) {
    let mut draws = Draws::new(seed);
    let x = draws.values(dims.len());
    check_inputs(device, dims, &x, &mut draws);
    let x = draws.normal(dims.len(), 100.0, 1.0);
    check_inputs(device, dims, &x, &mut draws);
}

on_every_device! {
    elements: cases, any_shape;
    once: dropout_keeps_the_stated_share_and_backward_the_same_elements, a_rate_of_zero_is_no_dropout,
        a_nan_fills_its_row_and_no_other, refuses_what_does_not_fit;
}

fn cases<D: Tested<T>, T: Element>() {
    for &(name, extents) in CASES {
        eprintln!("{}: {name}", T::NAME);
        check::<T>(D::get(), dims(extents), 1);
    }
}

fn any_shape<D: Tested<T>, T: Element>() {
    for_any::<D, _>(64, ([1..6usize, 1..8, 1..80, 0..3], any::<u64>()), |(extents, seed)| {
        check::<T>(D::get(), dims(extents), seed);
    });
}

#[test]
fn gradient() {
    let (dims, mut draws) = (dims([2, 2, 5, 0]), Draws::new(2));
    let [x, branch, dy] = [0; 3].map(|_| draws.values::<f64>(dims.len()));
    let affine = draws.values::<f64>(2 * dims.d);
    for dropout in [None, Some(HostDropout::new(0.3))] {
        let multipliers = HostDropout::multipliers::<f64>(dropout, dims.b, dims.t * dims.d);
        let normed = forward(cpu(), dims, [&x, &branch], &affine, dropout);
        let got = backward(cpu(), dims, &dy, &normed, &affine, dropout);
        let y = |x: &[Bounded], branch: &[Bounded], affine: &[Bounded]| {
            oracle_norm::<f64>(&oracle_sum(x, branch, &multipliers), affine).1
        };
        let [fixed_x, fixed_branch, fixed_affine] = [&x, &branch, &affine].map(|values| bounded(values));
        assert_bounded_gradient("dx", &got.dx, &x, &dy, |x| y(x, &fixed_branch, &fixed_affine));
        assert_bounded_gradient("dbranch", &got.dbranch, &branch, &dy, |branch| y(&fixed_x, branch, &fixed_affine));
        assert_bounded_gradient("daffine", &got.daffine, &affine, &dy, |affine| y(&fixed_x, &fixed_branch, affine));
    }
}

fn dropout_keeps_the_stated_share_and_backward_the_same_elements<D: Tested<f32>>() {
    let (dims, rate) = (dims([64, 5, 301, 0]), 0.1f32);
    let (x, branch) = (vec![0f32; dims.len()], vec![1f32; dims.len()]);
    let affine = [vec![1f32; dims.d], vec![0f32; dims.d]].concat();
    let dropout = Some(HostDropout::new(rate));
    let normed = forward(D::get(), dims, [&x, &branch], &affine, dropout);
    let kept = normed.sum.iter().filter(|&&sum| sum != 0.0).count() as f64;
    // Six standard deviations of a binomial count: missed once in 5e8 seeds.
    let (share, draws) = (f64::from(1.0 - rate), dims.len() as f64);
    assert!((kept - share * draws).abs() <= 6.0 * (draws * share * (1.0 - share)).sqrt(), "{kept} of {draws}");

    let dy = Draws::new(3).normal::<f32>(dims.len(), 0.0, 1.0);
    let got = backward(D::get(), dims, &dy, &normed, &affine, dropout);
    assert!(normed.sum.iter().zip(&got.dbranch).all(|(sum, dbranch)| (*sum == 0.0) == (*dbranch == 0.0)));
    assert!(got.dx.iter().all(|&dx| dx != 0.0), "the residual is never dropped");
}

fn a_rate_of_zero_is_no_dropout<D: Tested<f32>>() {
    let (dims, mut draws) = (dims([2, 3, 10, 0]), Draws::new(4));
    let [x, branch] = [0; 2].map(|_| draws.values::<f32>(dims.len()));
    let affine = draws.values::<f32>(2 * dims.d);
    let run = |dropout| forward(D::get(), dims, [&x, &branch], &affine, dropout).y;
    assert_eq!(run(Some(HostDropout::new(0.0))), run(None));
    assert_ne!(run(Some(HostDropout::new(0.5))), run(None));
}

fn a_nan_fills_its_row_and_no_other<D: Tested<f32>>() {
    let (dims, mut draws) = (dims([2, 3, 40, 0]), Draws::new(5));
    let [x, mut branch, mut dy] = [0; 3].map(|_| draws.values::<f32>(dims.len()));
    let affine = draws.normal::<f32>(2 * dims.d, 1.0, 0.1);
    // A branch that dropout zeroes is still seen: zero times NaN.
    branch[4 * dims.d..][..dims.d].fill(f32::NAN);
    let dropout = Some(HostDropout::new(0.5));
    let normed = forward(D::get(), dims, [&x, &branch], &affine, dropout);
    for row in 0..6 {
        let is_nan = row == 4;
        assert!(normed.y[row * dims.d..][..dims.d].iter().all(|y| y.is_nan() == is_nan), "row {row}");
        assert!(normed.stats[row * 2..][..2].iter().all(|stat| stat.is_nan() == is_nan), "row {row}");
    }
    branch.fill(1.0);
    let normed = forward(D::get(), dims, [&x, &branch], &affine, dropout);
    dy[dims.d + 7] = f32::NAN;
    let got = backward(D::get(), dims, &dy, &normed, &affine, dropout);
    for (i, (dx, dbranch)) in got.dx.iter().zip(&got.dbranch).enumerate() {
        assert_eq!((dx.is_nan(), dbranch.is_nan()), (i / dims.d == 1, i / dims.d == 1), "{i}");
    }
    let nans: Vec<usize> = (0..2 * dims.d).filter(|&j| got.daffine[j].is_nan()).collect();
    assert_eq!(nans, [7, dims.d + 7]);
}

#[test]
fn bits_do_not_depend_on_threads() {
    let (dims, mut draws) = (dims([21, 13, 130, 0]), Draws::new(6));
    let [x, branch, dy] = [0; 3].map(|_| draws.values::<f32>(dims.len()));
    let affine = draws.values::<f32>(2 * dims.d);
    let dropout = Some(HostDropout::new(0.1));
    assert_same_on_any_threads(|cpu| {
        let normed = forward(cpu, dims, [&x, &branch], &affine, dropout);
        let got = backward(cpu, dims, &dy, &normed, &affine, dropout);
        let forward = [bits(&normed.sum), bits(&normed.stats), bits(&normed.y)].concat();
        [forward, bits(&got.dx), bits(&got.dbranch), bits(&got.daffine)].concat()
    });
}

fn refuses_what_does_not_fit<D: Tested<f32>>() {
    let dims = NormDims { b: 2, t: 1, d: 4, x_stride: 6 };
    let run = |dims, lens: [usize; 6], draws: usize| {
        let [x, branch, affine, mut sum, mut stats, mut y] = buffers::<D, f32, 6>(lens);
        let rng = Guarded::new(D::get(), &vec![0u64; draws]);
        let args = Forward {
            dims,
            eps: EPS,
            x: x.view(),
            branch: branch.view(),
            dropout: Some(Dropout { rate: 0.1, site: 0, rng: rng.view() }),
            affine: affine.view(),
            sum: sum.view_mut(),
            stats: stats.view_mut(),
            y: y.view_mut(),
        };
        D::get().residual_norm_forward(args)
    };
    assert_eq!(run(dims, [10, 8, 8, 8, 4, 8], 2), Ok(()));
    assert_refuses_dims(run(dims, [9, 8, 8, 8, 4, 8], 2));
    assert_refuses_length(run(dims, [10, 9, 8, 8, 4, 8], 2), "branch");
    assert_refuses_length(run(dims, [10, 8, 4, 8, 4, 8], 2), "affine");
    assert_refuses_length(run(dims, [10, 8, 8, 7, 4, 8], 2), "sum");
    assert_refuses_length(run(dims, [10, 8, 8, 8, 2, 8], 2), "stats");
    assert_refuses_length(run(dims, [10, 8, 8, 8, 4, 9], 2), "y");
    assert_refuses_length(run(dims, [10, 8, 8, 8, 4, 8], 1), "rng");
    assert_refuses_dims(run(NormDims { x_stride: 3, ..dims }, [10, 8, 8, 8, 4, 8], 2));
    assert_refuses_dims(run(NormDims { t: 0, ..dims }, [0; 6], 2));
    let run = |lens: [usize; 7]| {
        let [dy, sum, stats, affine, mut dx, mut dbranch, mut daffine] = buffers::<D, f32, 7>(lens);
        let rng = Guarded::new(D::get(), &[0u64; 2]);
        let args = Backward {
            dims,
            dy: dy.view(),
            sum: sum.view(),
            stats: stats.view(),
            dropout: Some(Dropout { rate: 0.1, site: 0, rng: rng.view() }),
            affine: affine.view(),
            dx: dx.view_mut(),
            dbranch: dbranch.view_mut(),
            daffine: daffine.view_mut(),
        };
        D::get().residual_norm_backward(args)
    };
    let fitting = [8, 8, 4, 8, 8, 8, 8];
    assert_eq!(run(fitting), Ok(()));
    for (i, name) in ["dy", "sum", "stats", "affine", "dx", "dbranch", "daffine"].into_iter().enumerate() {
        let mut wrong = fitting;
        wrong[i] += 1;
        assert_refuses_length(run(wrong), name);
    }
}

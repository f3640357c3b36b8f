use super::*;
use crate::testing::*;
use crate::{Cpu, Wide};
use ndarray::{ArrayView4, ArrayView5};
use proptest::prelude::any;

const CASES: &[(&str, [usize; 5])] = &[
    ("one of everything", [1, 1, 1, 1, 1]),
    ("one token, several heads", [2, 1, 1, 3, 4]),
    ("one query of two keys", [1, 1, 2, 1, 3]),
    ("the last block at 32px", [2, 1, 13, 4, 32]),
    ("a block at 32px", [2, 13, 13, 4, 32]),
    ("a block at 224px", [1, 38, 38, 2, 32]),
    ("a whole vector of keys", [1, 4, 16, 2, 16]),
    ("one key more than a vector", [1, 5, 17, 2, 17]),
    ("more queries than keys", [1, 9, 3, 2, 6]),
    ("many images", [7, 2, 3, 1, 5]),
    ("one query of several tiles of keys", [1, 1, 33, 2, 16]),
    ("full tiles of small heads", [1, 64, 64, 1, 16]),
    ("one more than two tiles, large heads", [1, 33, 33, 3, 64]),
    ("heads that do not fill a block", [3, 20, 20, 1, 32]),
    ("more queries than keys, in tiles", [1, 40, 7, 1, 32]),
    ("one more than the tiles take", [1, 65, 65, 1, 16]),
];

fn dims([b, t_query, t, heads, d]: [usize; 5]) -> AttentionDims {
    AttentionDims { b, t_query, t, heads, d }
}

fn forward<T: Element, B: Attention<T>>(
    device: &B,
    dims: AttentionDims,
    [q, kv]: [&[T]; 2],
    dropout: Option<HostDropout>,
) -> Vec<T> {
    let (q, kv) = (Guarded::new(device, q), Guarded::new(device, kv));
    let dropout = dropout.map(|dropout| DeviceDropout::new(device, dropout));
    let mut out = Guarded::poisoned(device, dims.len_query());
    let args = Forward {
        dims,
        q: q.view(),
        kv: kv.view(),
        dropout: dropout.as_ref().map(DeviceDropout::view),
        out: out.view_mut(),
    };
    device.attention_forward(args).expect("dims and lengths fit");
    out.read(device)
}

fn backward<T: Element, B: Attention<T>>(
    device: &B,
    dims: AttentionDims,
    [q, kv, dout]: [&[T]; 3],
    dropout: Option<HostDropout>,
) -> [Vec<T>; 2] {
    let [q, kv, dout] = [q, kv, dout].map(|values| Guarded::new(device, values));
    let dropout = dropout.map(|dropout| DeviceDropout::new(device, dropout));
    let mut dq = Guarded::poisoned(device, dims.len_query());
    let mut dkv = Guarded::poisoned(device, dims.len_kv());
    let args = Backward {
        dims,
        q: q.view(),
        kv: kv.view(),
        dropout: dropout.as_ref().map(DeviceDropout::view),
        dout: dout.view(),
        dq: dq.view_mut(),
        dkv: dkv.view_mut(),
    };
    device.attention_backward(args).expect("dims and lengths fit");
    [dq.read(device), dkv.read(device)]
}

/// The operands as arrays, and what one (image, head) makes of them.
struct Oracle<'a> {
    dims: AttentionDims,
    q: ArrayView4<'a, Bounded>,
    kv: ArrayView5<'a, Bounded>,
    multipliers: ArrayView4<'a, Bounded>,
    scale: Bounded,
}

impl<'a> Oracle<'a> {
    fn new<W: Wide>(dims: AttentionDims, q: &'a [Bounded], kv: &'a [Bounded], multipliers: &'a [Bounded]) -> Self {
        let AttentionDims { b, t_query, t, heads, d } = dims;
        Self {
            dims,
            q: ArrayView4::from_shape((b, t_query, heads, d), q).expect("length of q"),
            kv: ArrayView5::from_shape((b, t, 2, heads, d), kv).expect("length of kv"),
            multipliers: ArrayView4::from_shape((b, heads, t_query, t), multipliers).expect("elements"),
            scale: Bounded::constant::<W>(1.0 / (d as f64).sqrt()),
        }
    }

    /// Softmax of the scores of a query.
    fn weights(&self, n: usize, head: usize, i: usize) -> Vec<Bounded> {
        let AttentionDims { t, d, .. } = self.dims;
        let score = |j| Bounded::sum((0..d).map(|c| self.q[[n, i, head, c]] * self.kv[[n, j, 0, head, c]]));
        Bounded::softmax(&(0..t).map(|j| score(j) * self.scale).collect::<Vec<_>>())
    }

    /// The weights, and in the backward pass the gradients of the scores, are operands of products: a device may round them.
    fn forward<D: TestDevice, T: Element>(&self) -> Vec<Bounded> {
        let AttentionDims { b, t_query, t, heads, d } = self.dims;
        let mut out = ndarray::Array4::default((b, t_query, heads, d));
        for (n, head, i) in ndarray::indices((b, heads, t_query)) {
            let weights = self.weights(n, head, i);
            for c in 0..d {
                let dropped = |j: usize| weights[j] * self.multipliers[[n, head, i, j]];
                let term = |j| dropped(j).operand::<D, T>() * self.kv[[n, j, 1, head, c]];
                out[[n, i, head, c]] = Bounded::sum((0..t).map(term));
            }
        }
        out.into_raw_vec_and_offset().0
    }

    fn backward<D: TestDevice, T: Element>(&self, dout: &[Bounded]) -> [Vec<Bounded>; 2] {
        let AttentionDims { b, t_query, t, heads, d } = self.dims;
        let dout = ArrayView4::from_shape((b, t_query, heads, d), dout).expect("length of dout");
        let mut dq = ndarray::Array4::default((b, t_query, heads, d));
        let mut dkv = ndarray::Array5::default((b, t, 2, heads, d));
        for (n, head) in ndarray::indices((b, heads)) {
            let weights: Vec<_> = (0..t_query).map(|i| self.weights(n, head, i)).collect();
            let dropped = |i: usize, j: usize| weights[i][j] * self.multipliers[[n, head, i, j]];
            let ddropped = |i, j| Bounded::sum((0..d).map(|c| dout[[n, i, head, c]] * self.kv[[n, j, 1, head, c]]));
            let dscores: Vec<Vec<Bounded>> = (0..t_query)
                .map(|i| {
                    let mean = Bounded::sum((0..t).map(|j| dropped(i, j) * ddropped(i, j)));
                    let dweight = |j| ddropped(i, j) * self.multipliers[[n, head, i, j]];
                    (0..t).map(|j| weights[i][j] * (dweight(j) - mean) * self.scale).collect()
                })
                .collect();
            let dscores: Vec<Vec<_>> =
                dscores.into_iter().map(|row| row.into_iter().map(Bounded::operand::<D, T>).collect()).collect();
            for c in 0..d {
                for i in 0..t_query {
                    dq[[n, i, head, c]] = Bounded::sum((0..t).map(|j| dscores[i][j] * self.kv[[n, j, 0, head, c]]));
                }
                for j in 0..t {
                    dkv[[n, j, 0, head, c]] =
                        Bounded::sum((0..t_query).map(|i| dscores[i][j] * self.q[[n, i, head, c]]));
                    let term = |i| dropped(i, j).operand::<D, T>() * dout[[n, i, head, c]];
                    dkv[[n, j, 1, head, c]] = Bounded::sum((0..t_query).map(term));
                }
            }
        }
        [dq.into_raw_vec_and_offset().0, dkv.into_raw_vec_and_offset().0]
    }
}

fn multipliers<W: Wide>(dims: AttentionDims, dropout: Option<HostDropout>) -> Vec<Bounded> {
    HostDropout::multipliers::<W>(dropout, dims.b, dims.heads * dims.t_query * dims.t)
}

/// Both passes, with and without dropout.
fn check<D: Tested<T>, T: Element>(dims: AttentionDims, seed: u64) {
    let (device, mut draws) = (D::get(), Draws::new(seed));
    let (q, kv) = (draws.values::<T>(dims.len_query()), draws.values::<T>(dims.len_kv()));
    let dout = draws.values::<T>(dims.len_query());
    let [q_exact, kv_exact, dout_exact] = [&q, &kv, &dout].map(|values| bounded(values));
    for dropout in [None, Some(HostDropout::new(0.3))] {
        let multipliers = multipliers::<T::Wide>(dims, dropout);
        let oracle = Oracle::new::<T::Wide>(dims, &q_exact, &kv_exact, &multipliers);
        assert_bounded("out", &forward(device, dims, [&q, &kv], dropout), &oracle.forward::<D, T>());
        let [dq, dkv] = backward(device, dims, [&q, &kv, &dout], dropout);
        let [want_dq, want_dkv] = oracle.backward::<D, T>(&dout_exact);
        assert_bounded("dq", &dq, &want_dq);
        assert_bounded("dkv", &dkv, &want_dkv);
    }
}

on_every_device! {
    elements: cases, any_shape, any_tiles;
    once: large_scores_are_stable, dropout_keeps_the_stated_share, a_rate_of_zero_is_no_dropout,
        a_nan_reaches_its_head_and_no_other, refuses_what_does_not_fit;
}

fn cases<D: Tested<T>, T: Element>() {
    for &(name, extents) in CASES {
        eprintln!("{}: {name}", T::NAME);
        check::<D, T>(dims(extents), 1);
    }
}

fn any_shape<D: Tested<T>, T: Element>() {
    for_any::<D, _>(64, ([1..4usize, 1..8, 1..20, 1..4, 1..20], any::<u64>()), |(extents, seed)| {
        check::<D, T>(dims(extents), seed);
    });
}

/// Heads of the sizes that tensor cores take.
fn any_tiles<D: Tested<T>, T: Element>() {
    let extents = ([1..3usize, 1..66, 1..66, 1..4], 0..3usize);
    for_any::<D, _>(8, (extents, any::<u64>()), |(([b, t_query, t, heads], size), seed)| {
        check::<D, T>(dims([b, t_query, t, heads, [16, 32, 64][size]]), seed);
    });
}

#[test]
fn gradient() {
    let (dims, mut draws) = (dims([2, 3, 4, 2, 3]), Draws::new(2));
    let (q, kv) = (draws.values::<f64>(dims.len_query()), draws.values::<f64>(dims.len_kv()));
    let dout = draws.values::<f64>(dims.len_query());
    for dropout in [None, Some(HostDropout::new(0.3))] {
        let multipliers = multipliers::<f64>(dims, dropout);
        let [dq, dkv] = backward(cpu(), dims, [&q, &kv, &dout], dropout);
        assert_bounded_gradient("dq", &dq, &q, &dout, |q| {
            Oracle::new::<f64>(dims, q, &bounded(&kv), &multipliers).forward::<Cpu, f64>()
        });
        assert_bounded_gradient("dkv", &dkv, &kv, &dout, |kv| {
            Oracle::new::<f64>(dims, &bounded(&q), kv, &multipliers).forward::<Cpu, f64>()
        });
    }
}

/// Scores far beyond where exp overflows: what is left is the value of the best key.
fn large_scores_are_stable<D: Tested<f32>>() {
    let dims = dims([1, 1, 3, 1, 1]);
    let kv = [-1000.0f32, 5.0, 1000.0, 7.0, 0.0, 9.0];
    assert_eq!(forward(D::get(), dims, [&[1000.0], &kv], None), [7.0]);
    assert_eq!(forward(D::get(), dims, [&[-1000.0], &kv], None), [5.0]);
    let [dq, dkv] = backward(D::get(), dims, [&[1000.0], &kv, &[2.0]], None);
    assert_eq!((dq, dkv), (vec![0.0], vec![0.0, 0.0, 0.0, 2.0, 0.0, 0.0]));
}

/// All weights are 1 / t and all values 1, so an output is the kept share, times `1 / (1 - rate)`.
fn dropout_keeps_the_stated_share<D: Tested<f32>>() {
    let (dims, rate) = (dims([4, 250, 1000, 1, 1]), 0.1f32);
    let q = vec![0f32; dims.len_query()];
    let kv = [0f32, 1.0].repeat(dims.b * dims.t);
    let out = forward(D::get(), dims, [&q, &kv], Some(HostDropout::new(rate)));
    let draws = (dims.len_query() * dims.t) as f64;
    let kept: f64 = out.iter().map(|&x| f64::from(x) * f64::from(1.0 - rate)).sum::<f64>() / out.len() as f64;
    // Six standard deviations of a binomial share: missed once in 5e8 seeds.
    let deviation = (f64::from(rate) * f64::from(1.0 - rate) / draws).sqrt();
    assert!((kept - f64::from(1.0 - rate)).abs() <= 6.0 * deviation, "{kept}");
    // No image, no query is like another.
    let mut shares: Vec<u32> = out.iter().map(|x| x.to_bits()).collect();
    shares.sort_unstable();
    shares.dedup();
    assert!(shares.len() > 50, "{} different shares", shares.len());
}

fn a_rate_of_zero_is_no_dropout<D: Tested<f32>>() {
    let (dims, mut draws) = (dims([2, 5, 5, 2, 8]), Draws::new(3));
    let (q, kv) = (draws.values::<f32>(dims.len_query()), draws.values::<f32>(dims.len_kv()));
    let none = forward(D::get(), dims, [&q, &kv], None);
    assert_eq!(forward(D::get(), dims, [&q, &kv], Some(HostDropout::new(0.0))), none);
    assert_ne!(forward(D::get(), dims, [&q, &kv], Some(HostDropout::new(0.5))), none);
}

fn a_nan_reaches_its_head_and_no_other<D: Tested<f32>>() {
    let (dims, mut draws) = (dims([2, 3, 3, 2, 2]), Draws::new(4));
    let (q, kv) = (draws.values::<f32>(dims.len_query()), draws.values::<f32>(dims.len_kv()));
    let place = |n: usize, token: usize, head: usize| ((n * 3 + token) * 2 + head) * 2;
    let dropout = Some(HostDropout::new(0.5));

    let mut bad_q = q.clone();
    bad_q[place(1, 2, 0)] = f32::NAN;
    let out = forward(D::get(), dims, [&bad_q, &kv], dropout);
    let nans: Vec<usize> = (0..out.len()).filter(|&i| out[i].is_nan()).collect();
    assert_eq!(nans, [place(1, 2, 0), place(1, 2, 0) + 1]);

    // A value that dropout zeroes is still seen: zero times NaN.
    let mut bad_kv = kv.clone();
    bad_kv[(((3 + 1) * 2 + 1) * 2 + 1) * 2] = f32::NAN; // image 1, token 1, value, head 1, first element
    let out = forward(D::get(), dims, [&q, &bad_kv], dropout);
    let nans: Vec<usize> = (0..out.len()).filter(|&i| out[i].is_nan()).collect();
    assert_eq!(nans, [0, 1, 2].map(|i| place(1, i, 1)));

    let mut dout = draws.values::<f32>(dims.len_query());
    dout[place(0, 0, 1)] = f32::NAN;
    let [dq, dkv] = backward(D::get(), dims, [&q, &kv, &dout], dropout);
    let nans: Vec<usize> = (0..dq.len()).filter(|&i| dq[i].is_nan()).collect();
    assert_eq!(nans, [place(0, 0, 1), place(0, 0, 1) + 1]);
    assert!(dkv.iter().enumerate().all(|(i, x)| !x.is_nan() || (i < dkv.len() / 2 && i / 2 % 2 == 1)));
    assert!(dkv.iter().any(|x| x.is_nan()));
}

#[test]
fn bits_do_not_depend_on_threads() {
    let (dims, mut draws) = (dims([5, 13, 13, 3, 20]), Draws::new(5));
    let (q, kv) = (draws.values::<f32>(dims.len_query()), draws.values::<f32>(dims.len_kv()));
    let dout = draws.values::<f32>(dims.len_query());
    let dropout = Some(HostDropout::new(0.1));
    assert_same_on_any_threads(|cpu| {
        let [dq, dkv] = backward(cpu, dims, [&q, &kv, &dout], dropout);
        [bits(&forward(cpu, dims, [&q, &kv], dropout)), bits(&dq), bits(&dkv)].concat()
    });
}

fn refuses_what_does_not_fit<D: Tested<f32>>() {
    let dims = dims([1, 2, 3, 2, 4]);
    let run = |lens: [usize; 3], draws: usize| {
        let [q, kv, mut out] = buffers::<D, f32, 3>(lens);
        let rng = Guarded::new(D::get(), &vec![0u64; draws]);
        let dropout = Some(Dropout { rate: 0.1, site: 0, rng: rng.view() });
        D::get().attention_forward(Forward { dims, q: q.view(), kv: kv.view(), dropout, out: out.view_mut() })
    };
    assert_eq!(run([16, 48, 16], 2), Ok(()));
    assert_refuses_length(run([15, 48, 16], 2), "q");
    assert_refuses_length(run([16, 47, 16], 2), "kv");
    assert_refuses_length(run([16, 48, 17], 2), "out");
    assert_refuses_length(run([16, 48, 16], 3), "rng");
    let run = |dims, rate, lens: [usize; 5]| {
        let [q, kv, dout, mut dq, mut dkv] = buffers::<D, f32, 5>(lens);
        let rng = Guarded::new(D::get(), &[0u64; 2]);
        let dropout = Some(Dropout { rate, site: 0, rng: rng.view() });
        let (q, kv, dout, dq, dkv) = (q.view(), kv.view(), dout.view(), dq.view_mut(), dkv.view_mut());
        D::get().attention_backward(Backward { dims, q, kv, dropout, dout, dq, dkv })
    };
    assert_eq!(run(dims, 0.1, [16, 48, 16, 16, 48]), Ok(()));
    assert_refuses_length(run(dims, 0.1, [17, 48, 16, 16, 48]), "q");
    assert_refuses_length(run(dims, 0.1, [16, 49, 16, 16, 48]), "kv");
    assert_refuses_length(run(dims, 0.1, [16, 48, 0, 16, 48]), "dout");
    assert_refuses_length(run(dims, 0.1, [16, 48, 16, 17, 48]), "dq");
    assert_refuses_length(run(dims, 0.1, [16, 48, 16, 16, 47]), "dkv");
    for rate in [1.0, -0.1, f32::NAN] {
        assert_refuses_dims(run(dims, rate, [16, 48, 16, 16, 48]));
    }
    assert_refuses_dims(run(AttentionDims { heads: 0, ..dims }, 0.1, [0; 5]));
    let long = MAX_TOKENS + 1;
    let dims = AttentionDims { b: 1, t_query: 1, t: long, heads: 1, d: 1 };
    assert_refuses_dims(run(dims, 0.1, [1, 2 * long, 1, 1, 2 * long]));
    let dims = AttentionDims { t_query: long, t: 1, ..dims };
    assert_refuses_dims(run(dims, 0.1, [long, 2, long, long, 2]));
}

use super::*;
use crate::Wide;
use crate::testing::*;
use crate::tokens::{PositionKind, QueryKind};
use proptest::prelude::any;

/// b, grid, hidden, d; images that count; elements between the rows of u.
const CASES: &[(&str, [usize; 4], usize, usize)] = &[
    ("one hidden patch, so nothing to choose", [2, 2, 1, 3], 2, 0),
    ("one visible patch", [2, 2, 3, 5], 2, 0),
    ("one feature", [1, 2, 2, 1], 1, 0),
    ("32px, u among other tokens", [3, 4, 4, 70], 3, 140),
    ("224px", [2, 7, 12, 33], 2, 0),
    ("a padded batch", [4, 2, 2, 6], 3, 1),
    ("more than one group of images", [130, 2, 2, 3], 130, 0),
    ("padding from the second group on", [130, 2, 2, 3], 65, 0),
    ("whole chunks, more hidden patches than warps", [2, 4, 9, 40], 2, 8),
    ("more hidden patches than a warp has lanes", [2, 6, 35, 9], 2, 0),
    ("more places than a block looks at at once", [67, 4, 2, 8], 67, 0),
];

const QUERIES: [QueryKind; 2] = [QueryKind::Summary, QueryKind::Places];

#[derive(Debug, Clone, Copy)]
struct Sizes {
    dims: PatchDims,
    valid: usize,
    skipped: usize,
    logit_scale: f64,
}

/// `u` is dense here; on the device its rows lie apart, with NaN between them.
#[derive(Debug, Clone)]
struct Inputs<T: Element> {
    u: Vec<T>,
    h: Vec<T>,
    order: Vec<u32>,
    positions: Vec<T::Wide>,
}

#[derive(Debug)]
struct Outputs<T: Element> {
    loss: Vec<T::Wide>,
    /// Where the batch is whole.
    gradients: Option<HostGradients<T>>,
}

#[derive(Debug)]
struct HostGradients<T: Element> {
    du: Vec<T>,
    dh: Vec<T>,
    dpositions: Vec<T::Wide>,
}

fn draw<T: Element>(dims: PatchDims, draws: &mut Draws) -> Inputs<T> {
    Inputs {
        u: draws.values(dims.b * dims.q() * dims.d),
        h: draws.values(dims.len_h()),
        order: draws.orders(dims.b, dims.n()),
        positions: draws.values(dims.len_positions()),
    }
}

/// `u` as it lies on the device.
fn apart<T: Element>(Sizes { dims, skipped, .. }: Sizes, u: &[T]) -> Vec<T> {
    let width = dims.q() * dims.d;
    let u_stride = width + skipped;
    let mut apart = vec![stored::<T>(f64::NAN); (dims.b - 1) * u_stride + width];
    for (to, from) in apart.chunks_mut(u_stride).zip(u.chunks(width)) {
        to[..width].copy_from_slice(from);
    }
    apart
}

fn run<T: Element, B: Contrast<T>>(device: &B, sizes: Sizes, inputs: &Inputs<T>) -> Outputs<T> {
    let Sizes { dims, valid, skipped, logit_scale } = sizes;
    let width = dims.q() * dims.d;
    let u_stride = width + skipped;
    let apart = apart(sizes, &inputs.u);
    let (u, h) = (Guarded::new(device, &apart), Guarded::new(device, &inputs.h));
    let (order, positions) = (Guarded::new(device, &inputs.order), Guarded::new(device, &inputs.positions));
    let mut loss = Guarded::poisoned(device, 2);
    let (mut du, mut dh) = (Guarded::poisoned(device, dims.b * u_stride), Guarded::poisoned(device, dims.len_h()));
    let mut dpositions = Guarded::poisoned(device, dims.len_positions());
    let whole = valid == dims.b;
    let gradients = Gradients { du: du.view_mut(), dh: dh.view_mut(), dpositions: dpositions.view_mut() };
    let args = Args {
        dims,
        valid,
        logit_scale,
        u_stride,
        u: u.view(),
        h: h.view(),
        order: order.view(),
        positions: positions.view(),
        loss: loss.view_mut(),
        gradients: whole.then_some(gradients),
    };
    device.contrast(args).expect("dims and lengths fit");
    let loss = loss.read(device);
    let gradients = || {
        let du = du.read(device);
        let between = du.chunks(u_stride).flat_map(|image| &image[width..]);
        assert!(between.copied().all(|x| x == stored(0.0)), "zero where no u lies");
        let du = du.chunks(u_stride).flat_map(|image| image[..width].to_vec()).collect();
        HostGradients { du, dh: dh.read(device), dpositions: dpositions.read(device) }
    };
    Outputs { loss, gradients: whole.then(gradients) }
}

/// The formula of the module, image by image.
struct Oracle<'a> {
    sizes: Sizes,
    u: &'a [Bounded],
    h: &'a [Bounded],
    order: &'a [u32],
    positions: &'a [Bounded],
}

impl Oracle<'_> {
    fn hidden(&self, image: usize) -> Vec<usize> {
        let dims = self.sizes.dims;
        self.order[image * dims.n()..][..dims.hidden].iter().map(|&place| place as usize).collect()
    }

    /// Rows of the position parameters that the embedding of a place is the sum of.
    fn rows(&self, place: usize) -> Vec<usize> {
        let dims = self.sizes.dims;
        match dims.positions {
            PositionKind::Table => vec![place],
            PositionKind::RowCol => vec![place / dims.grid, dims.grid + place % dims.grid],
        }
    }

    fn key(&self, image: usize, place: usize) -> &[Bounded] {
        let dims = self.sizes.dims;
        &self.h[(image * dims.n() + place) * dims.d..][..dims.d]
    }

    /// First element of the u that the l-th hidden place of an image asks with.
    fn asking(&self, image: usize, l: usize) -> usize {
        let PatchDims { hidden, d, queries, .. } = self.sizes.dims;
        match queries {
            QueryKind::Summary => image * d,
            QueryKind::Places => (image * hidden + l) * d,
        }
    }

    fn query(&self, image: usize, l: usize, place: usize) -> Vec<Bounded> {
        let d = self.sizes.dims.d;
        let position = |j: usize| Bounded::sum(self.rows(place).iter().map(|row| self.positions[row * d + j]));
        (0..d).map(|j| self.u[self.asking(image, l) + j] + position(j)).collect()
    }

    /// Logits of an image, a row for each hidden place.
    fn logits<W: Wide>(&self, image: usize) -> Vec<Vec<Bounded>> {
        let scale = Bounded::constant::<W>(self.sizes.logit_scale);
        let places = self.hidden(image);
        let row = |(l, &place): (usize, &usize)| {
            let query = self.query(image, l, place);
            let product = |&other: &usize| Bounded::sum(query.iter().zip(self.key(image, other)).map(|(&q, &k)| q * k));
            places.iter().map(|other| product(other) * scale).collect()
        };
        places.iter().enumerate().map(row).collect()
    }

    fn loss<W: Wide>(&self) -> Bounded {
        let rows = (0..self.sizes.valid).flat_map(|image| self.logits::<W>(image).into_iter().enumerate());
        let losses = rows.map(|(l, row)| Bounded::cross_entropy(&row, l));
        Bounded::sum_in_f64(losses) * Bounded::constant::<W>(1.0 / (self.sizes.valid * self.sizes.dims.hidden) as f64)
    }

    /// The least and the greatest accuracy that rounding allows: a maximum within the bounds of another may be either.
    fn accuracy<W: Wide>(&self) -> [f64; 2] {
        let rows = (0..self.sizes.valid).flat_map(|image| self.logits::<W>(image).into_iter().enumerate());
        let mut right = [0.0; 2];
        for (l, row) in rows {
            // Where the bounds are zero, two equal logits are equal on the device too, and the first one counts.
            let beats = |j: usize, sign: f64| {
                let slack = if j == l { 0.0 } else { sign * (row[l].error + row[j].error) };
                let lead = row[l].value - row[j].value + slack;
                if j < l { lead > 0.0 } else { lead >= 0.0 }
            };
            right[0] += f64::from(u8::from((0..row.len()).all(|j| beats(j, -1.0))));
            right[1] += f64::from(u8::from((0..row.len()).all(|j| beats(j, 1.0))));
        }
        right.map(|right| right / (self.sizes.valid * self.sizes.dims.hidden) as f64)
    }

    /// Gradients of u, h (none for visible patches) and the positions.
    fn gradients<W: Wide>(&self) -> (Vec<Bounded>, Vec<Option<Bounded>>, Vec<Bounded>) {
        let PatchDims { b, hidden, d, .. } = self.sizes.dims;
        let n = self.sizes.dims.n();
        let factor = Bounded::constant::<W>(self.sizes.logit_scale / (b * hidden) as f64);
        let (mut du, mut dh) = (vec![Vec::new(); self.u.len()], vec![None; b * n * d]);
        let mut dpositions = vec![Vec::new(); self.positions.len()];
        for image in 0..b {
            let places = self.hidden(image);
            let mut dlogits: Vec<_> = self.logits::<W>(image).iter().map(|row| Bounded::softmax(row)).collect();
            for (l, row) in dlogits.iter_mut().enumerate() {
                row[l] = row[l] - Bounded::new(1.0);
                row.iter_mut().for_each(|x| *x = *x * factor);
            }
            let queries: Vec<_> = (0..hidden).map(|l| self.query(image, l, places[l])).collect();
            for (j, &place) in places.iter().enumerate() {
                for c in 0..d {
                    let terms = (0..hidden).map(|l| dlogits[l][j] * queries[l][c]);
                    dh[(image * n + place) * d + c] = Some(Bounded::sum(terms));
                    for (l, &query_place) in places.iter().enumerate() {
                        let term = dlogits[l][j] * self.key(image, place)[c];
                        du[self.asking(image, l) + c].push(term);
                        self.rows(query_place).iter().for_each(|row| dpositions[row * d + c].push(term));
                    }
                }
            }
        }
        let sums = |terms: Vec<Vec<Bounded>>| terms.into_iter().map(Bounded::sum).collect();
        (sums(du), dh, sums(dpositions))
    }
}

fn check<T: Element>(device: &impl Contrast<T>, sizes: Sizes, seed: u64) {
    let inputs = draw::<T>(sizes.dims, &mut Draws::new(seed));
    let Outputs { loss, gradients } = run(device, sizes, &inputs);
    let (u, h, positions) = (bounded(&inputs.u), bounded(&inputs.h), bounded(&inputs.positions));
    let oracle = Oracle { sizes, u: &u, h: &h, order: &inputs.order, positions: &positions };
    assert_bounded("loss", &loss[..1], &[oracle.loss::<T::Wide>()]);
    let [least, most] = oracle.accuracy::<T::Wide>().map(T::Wide::from_f64);
    assert!((least..=most).contains(&loss[1]), "accuracy {} is not in {least} ..= {most}", loss[1]);

    let Some(HostGradients { du, dh, dpositions }) = gradients else { return };
    let (want_du, want_dh, want_dpositions) = oracle.gradients::<T::Wide>();
    assert_bounded("du", &du, &want_du);
    assert_bounded("dpositions", &dpositions, &want_dpositions);
    let hidden = |i: &usize| want_dh[*i].is_some();
    assert!(
        (0..dh.len()).all(|i| hidden(&i) || dh[i].widen().to_f64().is_nan()),
        "dh of visible patches is left alone"
    );
    let got: Vec<T> = (0..dh.len()).filter(hidden).map(|i| dh[i]).collect();
    assert_bounded("dh", &got, &want_dh.into_iter().flatten().collect::<Vec<_>>());
}

on_every_device! {
    elements: cases, any_shape, units_of_cases, units_of_any_shape;
    once:
        the_first_of_equal_maxima_counts, a_nan_reaches_the_loss_and_its_image, refuses_what_does_not_fit,
        zeros_have_no_direction, a_nan_stays_in_its_unit, units_refuse_what_does_not_fit;
}

fn cases<D: Tested<T>, T: Element>() {
    for &(name, [b, grid, hidden, d], valid, skipped) in CASES {
        for (positions, logit_scale) in [(PositionKind::Table, 1.0), (PositionKind::RowCol, 1.0 / (d as f64).sqrt())] {
            for queries in QUERIES {
                eprintln!("{}: {name}, {positions:?}, {queries:?}", T::NAME);
                let dims = PatchDims { b, grid, hidden, d, positions, queries };
                check::<T>(D::get(), Sizes { dims, valid, skipped, logit_scale }, 1);
            }
        }
    }
}

fn any_shape<D: Tested<T>, T: Element>() {
    // valid, padding, grid, hidden, d, skipped
    let extents = [1..5usize, 0..2, 2..5, 1..16, 1..40, 0..2];
    for_any::<D, _>(64, (extents, any::<u64>()), |([valid, padding, grid, hidden, d, skipped], seed)| {
        for (positions, queries) in [PositionKind::Table, PositionKind::RowCol].into_iter().zip(QUERIES) {
            let hidden = 1 + hidden % (grid * grid - 1);
            let dims = PatchDims { b: valid + padding, grid, hidden, d, positions, queries };
            check::<T>(D::get(), Sizes { dims, valid, skipped, logit_scale: 0.5 }, seed);
        }
    });
}

#[test]
fn gradient() {
    for (positions, queries) in [PositionKind::Table, PositionKind::RowCol].into_iter().zip(QUERIES) {
        let dims = PatchDims { b: 2, grid: 2, hidden: 3, d: 3, positions, queries };
        let sizes = Sizes { dims, valid: 2, skipped: 0, logit_scale: 0.5 };
        let inputs = draw::<f64>(dims, &mut Draws::new(2));
        let HostGradients { du, mut dh, dpositions } = run(cpu(), sizes, &inputs).gradients.expect("a whole batch");
        dh.iter_mut().filter(|dh| dh.is_nan()).for_each(|dh| *dh = 0.0);
        let loss = |u: &[Bounded], h: &[Bounded], positions: &[Bounded]| {
            vec![Oracle { sizes, u, h, order: &inputs.order, positions }.loss::<f64>()]
        };
        let (u, h, positions) = (bounded(&inputs.u), bounded(&inputs.h), bounded(&inputs.positions));
        assert_bounded_gradient("du", &du, &inputs.u, &[1.0], |u| loss(u, &h, &positions));
        assert_bounded_gradient("dh", &dh, &inputs.h, &[1.0], |h| loss(&u, h, &positions));
        assert_bounded_gradient("dpositions", &dpositions, &inputs.positions, &[1.0], |p| loss(&u, &h, p));
    }
}

/// Two hidden patches with the same features: whichever place asks, the first one is the answer.
fn the_first_of_equal_maxima_counts<D: Tested<f32>>() {
    let dims =
        PatchDims { b: 1, grid: 2, hidden: 2, d: 1, positions: PositionKind::Table, queries: QueryKind::Summary };
    let sizes = Sizes { dims, valid: 1, skipped: 0, logit_scale: 1.0 };
    let inputs = Inputs { u: vec![1f32], h: vec![2.0; 4], order: vec![3, 1, 0, 2], positions: vec![0.0; 4] };
    let loss = run(D::get(), sizes, &inputs).loss;
    assert_eq!(loss, [std::f32::consts::LN_2, 0.5]);
}

fn a_nan_reaches_the_loss_and_its_image<D: Tested<f32>>() {
    let dims =
        PatchDims { b: 2, grid: 2, hidden: 2, d: 3, positions: PositionKind::Table, queries: QueryKind::Summary };
    let sizes = Sizes { dims, valid: 2, skipped: 0, logit_scale: 1.0 };
    let mut inputs = draw::<f32>(dims, &mut Draws::new(3));
    inputs.order = vec![0, 1, 2, 3, 2, 3, 0, 1];
    inputs.h[2 * 3] = f32::NAN; // image 0, patch 2: visible, not looked at
    assert!(run(D::get(), sizes, &inputs).loss[0].is_finite());
    inputs.h[(4 + 2) * 3] = f32::NAN; // image 1, patch 2: hidden
    let Outputs { loss, gradients } = run(D::get(), sizes, &inputs);
    let HostGradients { du, dh, dpositions } = gradients.expect("a whole batch");
    assert!(loss[0].is_nan());
    assert!(loss[1] <= 0.5, "rows with a NaN are wrong");
    for i in 0..3 {
        assert!(!du[i].is_nan() && du[3 + i].is_nan());
        assert!(!dh[i].is_nan() && dh[(4 + 3) * 3 + i].is_nan());
        assert!(!dpositions[i].is_nan() && dpositions[3 * 3 + i].is_nan());
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    for (positions, queries) in [PositionKind::Table, PositionKind::RowCol].into_iter().zip(QUERIES) {
        let dims = PatchDims { b: 70, grid: 4, hidden: 4, d: 40, positions, queries };
        let sizes = Sizes { dims, valid: 70, skipped: 0, logit_scale: 1.0 };
        let inputs = draw::<f32>(dims, &mut Draws::new(4));
        assert_same_on_any_threads(|cpu| {
            let Outputs { loss, gradients } = run(cpu, sizes, &inputs);
            let HostGradients { du, dh, dpositions } = gradients.expect("a whole batch");
            [bits(&loss), bits(&du), bits(&dh), bits(&dpositions)].concat()
        });
    }
}

fn refuses_what_does_not_fit<D: Tested<f32>>() {
    let dims =
        PatchDims { b: 2, grid: 2, hidden: 1, d: 3, positions: PositionKind::RowCol, queries: QueryKind::Summary };
    let order = [0u32, 1, 2, 3].repeat(2);
    let run = |dims, valid, u_stride, order: &[u32], lens: [usize; 7]| {
        let [u, h, positions, mut loss, mut du, mut dh, mut dpositions] = buffers::<D, f32, 7>(lens);
        let order = Guarded::new(D::get(), order);
        let gradients = Gradients { du: du.view_mut(), dh: dh.view_mut(), dpositions: dpositions.view_mut() };
        D::get().contrast(Args {
            dims,
            valid,
            logit_scale: 1.0,
            u_stride,
            u: u.view(),
            h: h.view(),
            order: order.view(),
            positions: positions.view(),
            loss: loss.view_mut(),
            gradients: Some(gradients),
        })
    };
    let fitting = [8, 24, 12, 2, 10, 24, 12];
    assert_eq!(run(dims, 2, 5, &order, fitting), Ok(()));
    assert_refuses_length(run(dims, 2, 5, &order[1..], fitting), "order");
    for (i, name) in ["h", "positions", "loss", "du", "dh", "dpositions"].into_iter().enumerate() {
        let mut wrong = fitting;
        wrong[1 + i] += 1;
        assert_refuses_length(run(dims, 2, 5, &order, wrong), name);
    }
    assert_refuses_dims(run(dims, 2, 6, &order, fitting));
    assert_refuses_dims(run(dims, 2, 2, &order, fitting));
    for valid in [0, 1, 3] {
        assert_refuses_dims(run(dims, valid, 5, &order, fitting));
    }
    for hidden in [0, 4] {
        assert_refuses_dims(run(PatchDims { hidden, ..dims }, 2, 5, &order, fitting));
    }
}

/// What [`Contrast::contrast_units`] makes.
#[derive(Debug, Clone)]
struct HostUnits<T: Element> {
    queries: Vec<T>,
    keys: Vec<T>,
    norms: Vec<T::Wide>,
}

/// At the temperature 1 / `logit_scale`.
fn units<T: Element, B: Contrast<T>>(device: &B, sizes: Sizes, inputs: &Inputs<T>) -> HostUnits<T> {
    let Sizes { dims, skipped, logit_scale, .. } = sizes;
    let (u, h) = (Guarded::new(device, &apart(sizes, &inputs.u)), Guarded::new(device, &inputs.h));
    let (order, positions) = (Guarded::new(device, &inputs.order), Guarded::new(device, &inputs.positions));
    let rows = dims.b * dims.hidden;
    let [mut queries, mut keys] = [(); 2].map(|()| Guarded::poisoned(device, rows * dims.d));
    let mut norms = Guarded::poisoned(device, 2 * rows);
    let args = Units {
        dims,
        temperature: 1.0 / logit_scale,
        u_stride: dims.q() * dims.d + skipped,
        u: u.view(),
        h: h.view(),
        order: order.view(),
        positions: positions.view(),
        queries: queries.view_mut(),
        keys: keys.view_mut(),
        norms: norms.view_mut(),
    };
    device.contrast_units(args).expect("dims and lengths fit");
    HostUnits { queries: queries.read(device), keys: keys.read(device), norms: norms.read(device) }
}

fn units_backward<T: Element, B: Contrast<T>>(
    device: &B,
    sizes: Sizes,
    order: &[u32],
    units: &HostUnits<T>,
    (dqueries, dkeys): (&[T], &[T::Wide]),
) -> HostGradients<T> {
    let Sizes { dims, skipped, logit_scale, .. } = sizes;
    let width = dims.q() * dims.d;
    let u_stride = width + skipped;
    let order = Guarded::new(device, order);
    let (queries, keys) = (Guarded::new(device, &units.queries), Guarded::new(device, &units.keys));
    let (norms, dqueries) = (Guarded::new(device, &units.norms), Guarded::new(device, dqueries));
    let dkeys = Guarded::new(device, dkeys);
    let mut along = Guarded::poisoned(device, dims.b * dims.hidden);
    let (mut du, mut dh) = (Guarded::poisoned(device, dims.b * u_stride), Guarded::poisoned(device, dims.len_h()));
    let mut dpositions = Guarded::poisoned(device, dims.len_positions());
    let args = UnitsBackward {
        dims,
        temperature: 1.0 / logit_scale,
        u_stride,
        order: order.view(),
        queries: queries.view(),
        keys: keys.view(),
        norms: norms.view(),
        dqueries: dqueries.view(),
        dkeys: dkeys.view(),
        along: along.view_mut(),
        gradients: Gradients { du: du.view_mut(), dh: dh.view_mut(), dpositions: dpositions.view_mut() },
    };
    device.contrast_units_backward(args).expect("dims and lengths fit");
    let du = du.read(device);
    let between = du.chunks(u_stride).flat_map(|image| &image[width..]);
    assert!(between.copied().all(|x| x == stored(0.0)), "zero where no u lies");
    let du = du.chunks(u_stride).flat_map(|image| image[..width].to_vec()).collect();
    HostGradients { du, dh: dh.read(device), dpositions: dpositions.read(device) }
}

impl Oracle<'_> {
    /// Queries, keys and norms, by the contract.
    fn units<W: Wide>(&self) -> [Vec<Bounded>; 3] {
        let length = Bounded::constant::<W>(self.sizes.logit_scale);
        let inverse = |vector: &[Bounded]| match Bounded::sum(vector.iter().map(|&x| x * x)) {
            // Sums of multiples of a power of two: zero here is zero there.
            squares if squares.value == 0.0 => Bounded::new(0.0),
            squares => squares.sqrt().recip(),
        };
        let [mut queries, mut keys, mut norms] = [(); 3].map(|()| Vec::new());
        for image in 0..self.sizes.dims.b {
            for (l, place) in self.hidden(image).into_iter().enumerate() {
                let (query, key) = (self.query(image, l, place), self.key(image, place));
                norms.extend([inverse(&query), inverse(key)]);
                queries.extend(query.iter().map(|&x| x * (inverse(&query) * length)));
                keys.extend(key.iter().map(|&x| x * inverse(key)));
            }
        }
        [queries, keys, norms]
    }

    /// Gradients of u, h (none for visible patches) and the positions, from units and their gradients.
    fn units_backward<W: Wide>(
        &self,
        [queries, keys, norms]: [&[Bounded]; 3],
        [dqueries, dkeys]: [&[Bounded]; 2],
    ) -> (Vec<Bounded>, Vec<Option<Bounded>>, Vec<Bounded>) {
        let PatchDims { b, hidden, d, .. } = self.sizes.dims;
        let temperature = 1.0 / self.sizes.logit_scale;
        let [length, squared] = [1.0 / temperature, temperature * temperature].map(Bounded::constant::<W>);
        let n = self.sizes.dims.n();
        let dot = |a: &[Bounded], b: &[Bounded]| Bounded::sum(a.iter().zip(b).map(|(&a, &b)| a * b));
        let (mut du, mut dh) = (vec![Vec::new(); b * self.sizes.dims.q() * d], vec![None; b * n * d]);
        let mut dpositions = vec![Vec::new(); self.sizes.dims.len_positions()];
        for image in 0..b {
            for (l, place) in self.hidden(image).into_iter().enumerate() {
                let row = image * hidden + l;
                let of = row * d..(row + 1) * d;
                let scale = norms[2 * row] * length;
                let along = dot(&dqueries[of.clone()], &queries[of.clone()]) * squared * scale;
                let inner = dot(&dkeys[of.clone()], &keys[of.clone()]);
                for (j, at) in of.enumerate() {
                    let terms = [scale * dqueries[at], Bounded::new(0.0) - along * queries[at]];
                    du[self.asking(image, l) + j].extend(terms);
                    self.rows(place).iter().for_each(|parameter| dpositions[parameter * d + j].extend(terms));
                    dh[(image * n + place) * d + j] = Some((dkeys[at] - inner * keys[at]) * norms[2 * row + 1]);
                }
            }
        }
        let sums = |terms: Vec<Vec<Bounded>>| terms.into_iter().map(Bounded::sum).collect();
        (sums(du), dh, sums(dpositions))
    }
}

/// Of numbers that are no unit vectors, too: the contract says what becomes of any.
fn check_units<T: Element>(device: &impl Contrast<T>, sizes: Sizes, seed: u64) {
    let mut draws = Draws::new(seed);
    let inputs = draw::<T>(sizes.dims, &mut draws);
    let (u, h, positions) = (bounded(&inputs.u), bounded(&inputs.h), bounded(&inputs.positions));
    let oracle = Oracle { sizes, u: &u, h: &h, order: &inputs.order, positions: &positions };
    let got = units(device, sizes, &inputs);
    let [queries, keys, norms] = oracle.units::<T::Wide>();
    assert_bounded("queries", &got.queries, &queries);
    assert_bounded("keys", &got.keys, &keys);
    assert_bounded("norms", &got.norms, &norms);

    let len = got.queries.len();
    let given = HostUnits { queries: draws.values(len), keys: draws.values(len), norms: draws.values(got.norms.len()) };
    let (dqueries, dkeys) = (draws.values::<T>(len), draws.values::<T::Wide>(len));
    let got = units_backward(device, sizes, &inputs.order, &given, (&dqueries, &dkeys));
    let [queries, keys] = [&given.queries, &given.keys].map(|values| bounded(values));
    let (norms, dqueries, dkeys) = (bounded(&given.norms), bounded(&dqueries), bounded(&dkeys));
    let (du, dh, dpositions) = oracle.units_backward::<T::Wide>([&queries, &keys, &norms], [&dqueries, &dkeys]);
    assert_bounded("du", &got.du, &du);
    assert_bounded("dpositions", &got.dpositions, &dpositions);
    for (i, want) in dh.into_iter().enumerate() {
        match want {
            Some(want) => assert_bounded("dh", &got.dh[i..=i], &[want]),
            None => assert!(got.dh[i].widen().to_f64().is_nan(), "dh[{i}] is of a visible patch"),
        }
    }
}

fn units_of_cases<D: Tested<T>, T: Element>() {
    for &(name, [b, grid, hidden, d], _, skipped) in CASES {
        for (positions, queries) in [PositionKind::Table, PositionKind::RowCol].into_iter().zip(QUERIES) {
            eprintln!("{}: {name}, {positions:?}, {queries:?}", T::NAME);
            let dims = PatchDims { b, grid, hidden, d, positions, queries };
            check_units::<T>(D::get(), Sizes { dims, valid: b, skipped, logit_scale: 5.0 }, 1);
        }
    }
}

fn units_of_any_shape<D: Tested<T>, T: Element>() {
    // b, grid, hidden, d, skipped
    let extents = [1..6usize, 2..5, 1..16, 1..40, 0..2];
    for_any::<D, _>(64, (extents, any::<u64>()), |([b, grid, hidden, d, skipped], seed)| {
        for (positions, queries) in [PositionKind::RowCol, PositionKind::Table].into_iter().zip(QUERIES) {
            let dims = PatchDims { b, grid, hidden: 1 + hidden % (grid * grid - 1), d, positions, queries };
            check_units::<T>(D::get(), Sizes { dims, valid: b, skipped, logit_scale: 2.0 }, seed);
        }
    });
}

/// Of all queries and keys, in random proportions, by u, h and the positions.
#[test]
fn gradient_of_units() {
    for (positions, queries) in [PositionKind::Table, PositionKind::RowCol].into_iter().zip(QUERIES) {
        let dims = PatchDims { b: 2, grid: 2, hidden: 3, d: 3, positions, queries };
        let (sizes, mut draws) = (Sizes { dims, valid: 2, skipped: 0, logit_scale: 2.0 }, Draws::new(2));
        let inputs = draw::<f64>(dims, &mut draws);
        let made = units(cpu(), sizes, &inputs);
        let (dqueries, dkeys) = (draws.values::<f64>(made.queries.len()), draws.values::<f64>(made.keys.len()));
        let got = units_backward(cpu(), sizes, &inputs.order, &made, (&dqueries, &dkeys));
        let HostGradients { du, mut dh, dpositions } = got;
        dh.iter_mut().filter(|dh| dh.is_nan()).for_each(|dh| *dh = 0.0);
        let units = |u: &[Bounded], h: &[Bounded], positions: &[Bounded]| {
            let [queries, keys, _] = Oracle { sizes, u, h, order: &inputs.order, positions }.units::<f64>();
            [queries, keys].concat()
        };
        let weights = [dqueries, dkeys].concat();
        let (u, h, positions) = (bounded(&inputs.u), bounded(&inputs.h), bounded(&inputs.positions));
        assert_bounded_gradient("du", &du, &inputs.u, &weights, |u| units(u, &h, &positions));
        assert_bounded_gradient("dh", &dh, &inputs.h, &weights, |h| units(&u, h, &positions));
        assert_bounded_gradient("dpositions", &dpositions, &inputs.positions, &weights, |p| units(&u, &h, p));
    }
}

/// Two images, the second of zeros.
fn zeros_have_no_direction<D: Tested<f32>>() {
    let dims = PatchDims { b: 2, grid: 2, hidden: 2, d: 3, positions: PositionKind::Table, queries: QueryKind::Places };
    let sizes = Sizes { dims, valid: 2, skipped: 0, logit_scale: 4.0 };
    let mut inputs = draw::<f32>(dims, &mut Draws::new(5));
    inputs.positions.fill(0.0);
    inputs.u[6..].fill(0.0);
    inputs.h[12..].fill(0.0);
    let made = units(D::get(), sizes, &inputs);
    assert!(made.norms[..4].iter().all(|&norm| norm > 0.0 && norm.is_finite()));
    assert_eq!(made.norms[4..], [0.0; 4]);
    assert_eq!([&made.queries[6..], &made.keys[6..]].concat(), [0.0; 12]);
    let got = units_backward(D::get(), sizes, &inputs.order, &made, (&[1e30; 12], &[1e30; 12]));
    assert_eq!(got.du[6..], [0.0; 6]);
    assert!(got.dh[12..].iter().all(|&dh| dh == 0.0 || dh.is_nan()), "zero, and NaN where it was left alone");
    assert_eq!(got.dh[12..].iter().filter(|dh| dh.is_nan()).count(), 6);
}

fn a_nan_stays_in_its_unit<D: Tested<f32>>() {
    let dims =
        PatchDims { b: 2, grid: 2, hidden: 1, d: 3, positions: PositionKind::Table, queries: QueryKind::Summary };
    let sizes = Sizes { dims, valid: 2, skipped: 0, logit_scale: 1.0 };
    let mut inputs = draw::<f32>(dims, &mut Draws::new(6));
    inputs.order = vec![0, 1, 2, 3, 2, 3, 0, 1];
    inputs.u[3] = f32::NAN; // image 1
    inputs.h[1] = f32::NAN; // image 0, patch 0: hidden
    let made = units(D::get(), sizes, &inputs);
    let nan = |values: &[f32]| values.iter().map(|x| x.is_nan()).collect::<Vec<_>>();
    assert_eq!(nan(&made.queries), [false, false, false, true, true, true]);
    assert_eq!(nan(&made.keys), [true, true, true, false, false, false]);
    assert_eq!(nan(&made.norms), [false, true, true, false]);
}

#[test]
fn bits_of_units_do_not_depend_on_threads() {
    for (positions, queries) in [PositionKind::Table, PositionKind::RowCol].into_iter().zip(QUERIES) {
        let dims = PatchDims { b: 70, grid: 4, hidden: 4, d: 40, positions, queries };
        let (sizes, mut draws) = (Sizes { dims, valid: 70, skipped: 0, logit_scale: 10.0 }, Draws::new(4));
        let inputs = draw::<f32>(dims, &mut draws);
        let (dqueries, dkeys) = (draws.values::<f32>(280 * 40), draws.values::<f32>(280 * 40));
        assert_same_on_any_threads(|cpu| {
            let made = units(cpu, sizes, &inputs);
            let HostGradients { du, dh, dpositions } =
                units_backward(cpu, sizes, &inputs.order, &made, (&dqueries, &dkeys));
            [made.queries, made.keys, made.norms, du, dh, dpositions].iter().flat_map(|values| bits(values)).collect()
        });
    }
}

fn units_refuse_what_does_not_fit<D: Tested<f32>>() {
    let dims =
        PatchDims { b: 2, grid: 2, hidden: 1, d: 3, positions: PositionKind::RowCol, queries: QueryKind::Summary };
    let order = [0u32, 1, 2, 3].repeat(2);
    let run = |dims, temperature, u_stride, order: &[u32], lens: [usize; 6]| {
        let [u, h, positions, mut queries, mut keys, mut norms] = buffers::<D, f32, 6>(lens);
        let order = Guarded::new(D::get(), order);
        D::get().contrast_units(Units {
            dims,
            temperature,
            u_stride,
            u: u.view(),
            h: h.view(),
            order: order.view(),
            positions: positions.view(),
            queries: queries.view_mut(),
            keys: keys.view_mut(),
            norms: norms.view_mut(),
        })
    };
    let fitting = [8, 24, 12, 6, 6, 4];
    assert_eq!(run(dims, 0.1, 5, &order, fitting), Ok(()));
    assert_refuses_length(run(dims, 0.1, 5, &order[1..], fitting), "order");
    for (i, name) in ["h", "positions", "queries", "keys", "norms"].into_iter().enumerate() {
        let mut wrong = fitting;
        wrong[1 + i] += 1;
        assert_refuses_length(run(dims, 0.1, 5, &order, wrong), name);
    }
    for (temperature, u_stride) in [(0.1, 6), (0.1, 2), (0.0, 5), (f64::NAN, 5)] {
        assert_refuses_dims(run(dims, temperature, u_stride, &order, fitting));
    }
    for hidden in [0, 4] {
        assert_refuses_dims(run(PatchDims { hidden, ..dims }, 0.1, 5, &order, fitting));
    }

    let run = |dims, temperature, order: &[u32], lens: [usize; 9]| {
        let [queries, keys, norms, dqueries, dkeys, mut along, mut du, mut dh, mut dpositions] =
            buffers::<D, f32, 9>(lens);
        let order = Guarded::new(D::get(), order);
        D::get().contrast_units_backward(UnitsBackward {
            dims,
            temperature,
            u_stride: 5,
            order: order.view(),
            queries: queries.view(),
            keys: keys.view(),
            norms: norms.view(),
            dqueries: dqueries.view(),
            dkeys: dkeys.view(),
            along: along.view_mut(),
            gradients: Gradients { du: du.view_mut(), dh: dh.view_mut(), dpositions: dpositions.view_mut() },
        })
    };
    let fitting = [6, 6, 4, 6, 6, 2, 10, 24, 12];
    assert_eq!(run(dims, 0.1, &order, fitting), Ok(()));
    assert_refuses_length(run(dims, 0.1, &order[1..], fitting), "order");
    let names = ["queries", "keys", "norms", "dqueries", "dkeys", "along", "du", "dh", "dpositions"];
    for (i, name) in names.into_iter().enumerate() {
        let mut wrong = fitting;
        wrong[i] += 1;
        assert_refuses_length(run(dims, 0.1, &order, wrong), name);
    }
    assert_refuses_dims(run(dims, -1.0, &order, fitting));
    assert_refuses_dims(run(PatchDims { hidden: 0, ..dims }, 0.1, &order, fitting));
}

use super::*;
use crate::Wide;
use crate::testing::*;
use proptest::prelude::any;

const CASES: &[(&str, [usize; 4])] = &[
    ("one visible patch", [1, 2, 3, 1]),
    ("one hidden patch", [3, 2, 1, 5]),
    ("nothing hidden", [3, 4, 0, 8]),
    ("the whole image is one patch", [2, 1, 0, 3]),
    ("32px", [3, 4, 4, 70]),
    ("224px", [2, 7, 12, 33]),
    ("whole chunks, more sums than a block takes at once", [67, 4, 4, 40]),
];

/// The positions and queries of a test: how positions are made, whether they are added, and who asks.
const KINDS: [(PositionKind, Positions, QueryKind); 5] = [
    (PositionKind::Table, Positions::Added, QueryKind::Summary),
    (PositionKind::RowCol, Positions::Added, QueryKind::Summary),
    (PositionKind::Table, Positions::Left, QueryKind::Summary),
    (PositionKind::Table, Positions::Added, QueryKind::Places),
    (PositionKind::RowCol, Positions::Added, QueryKind::Places),
];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Positions {
    Added,
    Left,
}

fn dims([b, grid, hidden, d]: [usize; 4], positions: PositionKind) -> PatchDims {
    PatchDims { b, grid, hidden, d, positions, queries: QueryKind::Summary }
}

fn forward<T: Element, B: Tokens<T>>(
    device: &B,
    dims: PatchDims,
    h: &[T],
    order: &[u32],
    [u0, positions]: [&[T::Wide]; 2],
    added: Positions,
) -> Vec<T> {
    let (h, order) = (Guarded::new(device, h), Guarded::new(device, order));
    let (u0, positions) = (Guarded::new(device, u0), Guarded::new(device, positions));
    let mut x = Guarded::poisoned(device, dims.b * dims.t() * dims.d);
    let args = Forward {
        dims,
        h: h.view(),
        order: order.view(),
        u0: u0.view(),
        positions: (added == Positions::Added).then(|| positions.view()),
        x: x.view_mut(),
    };
    device.tokens_forward(args).expect("dims and lengths fit");
    x.read(device)
}

struct Gradients<T: Element> {
    dh: Vec<T>,
    du0: Vec<T::Wide>,
    dpositions: Vec<T::Wide>,
}

fn backward<T: Element, B: Tokens<T>>(
    device: &B,
    dims: PatchDims,
    order: &[u32],
    dx: &[T],
    dpositions: &[T::Wide],
    added: Positions,
) -> Gradients<T> {
    let (order, dx) = (Guarded::new(device, order), Guarded::new(device, dx));
    let (mut dh, mut du0) = (Guarded::poisoned(device, dims.len_h()), Guarded::poisoned(device, dims.d));
    let mut dpositions_acc = Guarded::new(device, dpositions);
    let args = Backward {
        dims,
        order: order.view(),
        dx: dx.view(),
        dh: dh.view_mut(),
        du0: du0.view_mut(),
        dpositions_acc: (added == Positions::Added).then(|| dpositions_acc.view_mut()),
    };
    device.tokens_backward(args).expect("dims and lengths fit");
    Gradients { dh: dh.read(device), du0: du0.read(device), dpositions: dpositions_acc.read(device) }
}

/// Rows of the position parameters that the embedding of a place is the sum of.
fn rows(dims: PatchDims, place: usize) -> Vec<usize> {
    match dims.positions {
        PositionKind::Table => vec![place],
        PositionKind::RowCol => vec![place / dims.grid, dims.grid + place % dims.grid],
    }
}

/// What a token is of.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Token {
    /// All hidden places.
    Summary,
    /// This hidden place.
    Query(usize),
    /// This visible patch.
    Visible(usize),
}

/// For each token of an image: what it is of.
fn tokens(dims: PatchDims, order: &[u32]) -> Vec<Token> {
    let places = |of: &[u32], token: fn(usize) -> Token| of.iter().map(|&place| token(place as usize)).collect();
    let (hidden, visible) = order.split_at(dims.hidden);
    let queries: Vec<_> = match dims.queries {
        QueryKind::Summary => vec![Token::Summary],
        QueryKind::Places => places(hidden, Token::Query),
    };
    [queries, places(visible, Token::Visible)].concat()
}

/// Image, index in `x` of the token's first element, and what the token is of.
fn all_tokens(dims: PatchDims, order: &[u32]) -> Vec<(usize, usize, Token)> {
    let images = order.chunks(dims.n()).enumerate();
    let of = |(image, order)| tokens(dims, order).into_iter().map(move |token| (image, token));
    images.flat_map(of).enumerate().map(|(i, (image, token))| (image, i * dims.d, token)).collect()
}

fn oracle_forward(
    dims: PatchDims,
    h: &[Bounded],
    order: &[u32],
    [u0, positions]: [&[Bounded]; 2],
    added: Positions,
) -> Vec<Bounded> {
    let position =
        |place: usize, j: usize| Bounded::sum(rows(dims, place).iter().map(|row| positions[row * dims.d + j]));
    let element = |image: usize, token: Token, j: usize| match token {
        Token::Summary => u0[j],
        Token::Query(place) => u0[j] + position(place, j),
        Token::Visible(place) => {
            let h = h[(image * dims.n() + place) * dims.d + j];
            if added == Positions::Added { h + position(place, j) } else { h }
        }
    };
    let tokens = all_tokens(dims, order).into_iter();
    tokens
        .flat_map(|(image, _, token)| (0..dims.d).map(move |j| (image, token, j)))
        .map(|(image, token, j)| element(image, token, j))
        .collect()
}

/// Both passes, with each of [`KINDS`].
fn check<T: Element>(device: &impl Tokens<T>, extents: [usize; 4], seed: u64) {
    for (kind, added, queries) in KINDS {
        let (dims, mut draws) = (PatchDims { queries, ..dims(extents, kind) }, Draws::new(seed));
        if dims.q() == 0 {
            continue;
        }
        let order = draws.orders(dims.b, dims.n());
        let (h, u0) = (draws.values::<T>(dims.len_h()), draws.values::<T::Wide>(dims.d));
        let positions = draws.values::<T::Wide>(dims.len_positions());
        let x = forward(device, dims, &h, &order, [&u0, &positions], added);
        let want = oracle_forward(dims, &bounded(&h), &order, [&bounded(&u0), &bounded(&positions)], added);
        assert_bounded("x", &x, &want);

        let (dx, before) = (draws.values::<T>(x.len()), draws.values::<T::Wide>(positions.len()));
        let got = backward(device, dims, &order, &dx, &before, added);
        let dx_exact = bounded(&dx);
        let mut dh = vec![None; dims.len_h()];
        let mut dpositions: Vec<Vec<Bounded>> = bounded(&before).into_iter().map(|before| vec![before]).collect();
        let mut du0 = vec![Vec::new(); dims.d];
        for (image, first, token) in all_tokens(dims, &order) {
            for j in 0..dims.d {
                let (i, of_token) = (first + j, dx_exact[first + j]);
                let place = match token {
                    Token::Summary | Token::Query(_) => {
                        du0[j].push(of_token);
                        if let Token::Query(place) = token { place } else { continue }
                    }
                    Token::Visible(place) => {
                        dh[(image * dims.n() + place) * dims.d + j] = Some(dx[i]);
                        place
                    }
                };
                for row in rows(dims, place).into_iter().filter(|_| added == Positions::Added) {
                    dpositions[row * dims.d + j].push(of_token);
                }
            }
        }
        for (i, (got, want)) in got.dh.iter().zip(dh).enumerate() {
            match want {
                Some(want) => assert_eq!(*got, want, "dh[{i}]"),
                None => assert!(got.widen().to_f64().is_nan(), "dh[{i}] is of a hidden patch"),
            }
        }
        assert_bounded("du0", &got.du0, &du0.into_iter().map(Bounded::sum).collect::<Vec<_>>());
        assert_bounded("dpositions", &got.dpositions, &dpositions.into_iter().map(Bounded::sum).collect::<Vec<_>>());
    }
}

on_every_device! {
    elements: cases, any_shape;
    once: a_nan_stays_in_its_token, refuses_what_does_not_fit;
}

fn cases<D: Tested<T>, T: Element>() {
    for &(name, extents) in CASES {
        eprintln!("{}: {name}", T::NAME);
        check::<T>(D::get(), extents, 1);
    }
}

fn any_shape<D: Tested<T>, T: Element>() {
    for_any::<D, _>(64, ([1..5usize, 2..5, 1..16, 1..20], any::<u64>()), |([b, grid, hidden, d], seed)| {
        check::<T>(D::get(), [b, grid, hidden % (grid * grid), d], seed);
    });
}

#[test]
fn gradient() {
    for (kind, added, queries) in KINDS {
        let (dims, mut draws) = (PatchDims { queries, ..dims([2, 2, 2, 3], kind) }, Draws::new(2));
        let order = draws.orders(dims.b, dims.n());
        let (h, u0) = (draws.values::<f64>(dims.len_h()), draws.values::<f64>(dims.d));
        let positions = draws.values::<f64>(dims.len_positions());
        let dx = draws.values::<f64>(dims.b * dims.t() * dims.d);
        let mut got = backward(cpu(), dims, &order, &dx, &vec![0.0; positions.len()], added);
        got.dh.iter_mut().filter(|dh| dh.is_nan()).for_each(|dh| *dh = 0.0);
        let x = |h: &[Bounded], u0: &[Bounded], positions: &[Bounded]| {
            oracle_forward(dims, h, &order, [u0, positions], added)
        };
        let [fixed_h, fixed_u0, fixed_positions] = [&h, &u0, &positions].map(|values| bounded(values));
        assert_bounded_gradient("dh", &got.dh, &h, &dx, |h| x(h, &fixed_u0, &fixed_positions));
        assert_bounded_gradient("du0", &got.du0, &u0, &dx, |u0| x(&fixed_h, u0, &fixed_positions));
        assert_bounded_gradient("dpositions", &got.dpositions, &positions, &dx, |p| x(&fixed_h, &fixed_u0, p));
    }
}

fn a_nan_stays_in_its_token<D: Tested<f32>>() {
    let (dims, mut draws) = (dims([2, 2, 1, 3], PositionKind::RowCol), Draws::new(3));
    let order = [0, 1, 2, 3, 3, 2, 1, 0];
    let (mut h, u0) = (draws.values::<f32>(dims.len_h()), draws.values::<f32>(dims.d));
    let positions = draws.values::<f32>(dims.len_positions());
    h[(4 + 1) * 3] = f32::NAN; // image 1, patch 1: its second visible one, token 2
    h[0] = f32::NAN; // hidden
    let x = forward(D::get(), dims, &h, &order, [&u0, &positions], Positions::Added);
    assert_eq!((0..x.len()).filter(|&i| x[i].is_nan()).collect::<Vec<_>>(), [(4 + 2) * 3]);

    let mut dx = draws.values::<f32>(x.len());
    dx[(4 + 2) * 3] = f32::NAN;
    dx[4 * 3 + 1] = f32::NAN; // u0 of image 1
    let got = backward(D::get(), dims, &order, &dx, &vec![0.0; positions.len()], Positions::Added);
    assert!(got.dh[(4 + 1) * 3].is_nan());
    assert_eq!(got.du0.iter().map(|x| x.is_nan()).collect::<Vec<_>>(), [false, true, false]);
    // Patch 1 of a 2 x 2 grid: row 0, column 1.
    let nans: Vec<usize> = (0..got.dpositions.len()).filter(|&i| got.dpositions[i].is_nan()).collect();
    assert_eq!(nans, [0, (2 + 1) * 3]);
}

#[test]
fn bits_do_not_depend_on_threads() {
    for queries in [QueryKind::Summary, QueryKind::Places] {
        let dims = PatchDims { queries, ..dims([9, 4, 4, 130], PositionKind::RowCol) };
        let mut draws = Draws::new(4);
        let order = draws.orders(dims.b, dims.n());
        let (h, u0) = (draws.values::<f32>(dims.len_h()), draws.values::<f32>(dims.d));
        let positions = draws.values::<f32>(dims.len_positions());
        let dx = draws.values::<f32>(dims.b * dims.t() * dims.d);
        assert_same_on_any_threads(|cpu| {
            let x = forward(cpu, dims, &h, &order, [&u0, &positions], Positions::Added);
            let got = backward(cpu, dims, &order, &dx, &positions, Positions::Added);
            [bits(&x), bits(&got.dh), bits(&got.du0), bits(&got.dpositions)].concat()
        });
    }
}

fn refuses_what_does_not_fit<D: Tested<f32>>() {
    let table = dims([2, 2, 1, 3], PositionKind::Table);
    let order = [0u32, 1, 2, 3].repeat(2);
    let run = |dims, order: &[u32], lens: [usize; 4], added: Positions| {
        let [h, u0, positions, mut x] = buffers::<D, f32, 4>(lens);
        let order = Guarded::new(D::get(), order);
        let args = Forward {
            dims,
            h: h.view(),
            order: order.view(),
            u0: u0.view(),
            positions: (added == Positions::Added).then(|| positions.view()),
            x: x.view_mut(),
        };
        D::get().tokens_forward(args)
    };
    let forward = |dims, order: &[u32], lens| run(dims, order, lens, Positions::Added);
    assert_eq!(forward(table, &order, [24, 3, 12, 24]), Ok(()));
    assert_refuses_length(forward(table, &order, [23, 3, 12, 24]), "h");
    assert_refuses_length(forward(table, &order[1..], [24, 3, 12, 24]), "order");
    assert_refuses_length(forward(table, &order, [24, 4, 12, 24]), "u0");
    assert_refuses_length(forward(table, &order, [24, 3, 13, 24]), "positions");
    assert_refuses_length(forward(table, &order, [24, 3, 12, 30]), "x");
    for hidden in [4, 5] {
        assert_refuses_dims(forward(PatchDims { hidden, ..table }, &order, [24, 3, 12, 24]));
    }
    let none_asks = PatchDims { hidden: 0, queries: QueryKind::Places, ..table };
    assert_refuses_dims(forward(none_asks, &order, [24, 3, 12, 24]));
    assert_refuses_dims(forward(PatchDims { d: 0, ..table }, &order, [0, 0, 0, 0]));
    let places = PatchDims { queries: QueryKind::Places, ..table };
    assert_refuses_dims(run(places, &order, [24, 3, 12, 24], Positions::Left));

    let run = |dims, order: &[u32], lens: [usize; 4], added: Positions| {
        let [dx, mut dh, mut du0, mut dpositions] = buffers::<D, f32, 4>(lens);
        let order = Guarded::new(D::get(), order);
        let args = Backward {
            dims,
            order: order.view(),
            dx: dx.view(),
            dh: dh.view_mut(),
            du0: du0.view_mut(),
            dpositions_acc: (added == Positions::Added).then(|| dpositions.view_mut()),
        };
        D::get().tokens_backward(args)
    };
    let backward = |order: &[u32], lens| run(table, order, lens, Positions::Added);
    assert_eq!(backward(&order, [24, 24, 3, 12]), Ok(()));
    assert_refuses_length(backward(&order[..7], [24, 24, 3, 12]), "order");
    assert_refuses_length(backward(&order, [25, 24, 3, 12]), "dx");
    assert_refuses_length(backward(&order, [24, 25, 3, 12]), "dh");
    assert_refuses_length(backward(&order, [24, 24, 2, 12]), "du0");
    assert_refuses_length(backward(&order, [24, 24, 3, 11]), "dpositions_acc");
    assert_refuses_dims(run(places, &order, [24, 24, 3, 12], Positions::Left));
}

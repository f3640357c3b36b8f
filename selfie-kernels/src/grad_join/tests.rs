//! The gradient check is in [`crate::bn_finalize`]'s tests: it takes both to have something to differentiate.

use super::*;
use crate::Grad;
use crate::testing::*;
use proptest::prelude::any;

const CASES: &[(&str, [usize; 2])] = &[
    ("one element", [1, 1]),
    ("one channel", [130, 1]),
    ("a full tile", [128, 16]),
    ("odd channels, a short last tile", [259, 17]),
    ("wide", [5, 1030]),
    ("several turns, of rows of an odd number of chunks", [700, 72]),
    ("rows of more chunks than threads, and a prime number of them", [3, 8 * 1031]),
];

fn join<T: Element, B: GradJoin<T>>(device: &B, c: usize, grad: &HostGrad<T>, skip: Option<&[T]>) -> Vec<T> {
    let skip = skip.map(|skip| Guarded::new(device, skip));
    let grad = grad.upload(device);
    let Grad::Affine(affine) = grad.view() else { panic!("grad_join takes the affine kind") };
    let mut dx = Guarded::poisoned(device, affine.dz.len());
    let rows = affine.dz.len() / c;
    let args = Join { rows, c, affine, skip: skip.as_ref().map(Guarded::view), dx: dx.view_mut() };
    device.grad_join(args).expect("lengths fit");
    dx.read(device)
}

fn draw<T: Element>(draws: &mut Draws, [rows, c]: [usize; 2]) -> HostGrad<T> {
    HostGrad::Affine { dz: draws.values(rows * c), x: draws.values(rows * c), coef: draws.values(3 * c) }
}

fn check<T: Element>(device: &impl GradJoin<T>, [rows, c]: [usize; 2], seed: u64) {
    let mut draws = Draws::new(seed);
    let grad = draw(&mut draws, [rows, c]);
    let mut want = grad.oracle(c);
    let dx = join(device, c, &grad, None);
    assert_close::<T::Wide, _>("dx", &dx, &want, HostGrad::<T>::ROUNDINGS);

    let skip = draws.values::<T>(rows * c);
    want.iter_mut().zip(exact(&skip)).for_each(|(want, skip)| want.add(skip));
    let dx = join(device, c, &grad, Some(&skip));
    assert_close::<T::Wide, _>("dx with skip", &dx, &want, HostGrad::<T>::ROUNDINGS + 1);
}

on_every_device! {
    elements: cases, any_shape;
    once: nan_comes_through, refuses_lengths_that_do_not_fit;
}

fn cases<D: Tested<T>, T: Element>() {
    for &(name, extents) in CASES {
        eprintln!("{}: {name}", T::NAME);
        check::<T>(D::get(), extents, 1);
    }
}

fn any_shape<D: Tested<T>, T: Element>() {
    for_any::<D, _>(256, (1..300usize, 1..40usize, any::<u64>()), |(rows, c, seed)| {
        check::<T>(D::get(), [rows, c], seed);
    });
}

fn nan_comes_through<D: Tested<f32>>() {
    let (c, skip) = (3, [0.0, 0.0, 0.0, f32::NAN, 0.0, 0.0]);
    let grad = HostGrad::Affine { dz: vec![0.0, f32::NAN, 0.0, 0.0, 0.0, 0.0], x: vec![1.0; 6], coef: vec![1.0; 9] };
    let nan = |dx: Vec<f32>| dx.into_iter().map(f32::is_nan).collect::<Vec<_>>();
    assert_eq!(nan(join(D::get(), c, &grad, None)), [false, true, false, false, false, false]);
    assert_eq!(nan(join(D::get(), c, &grad, Some(&skip))), [false, true, false, true, false, false]);
}

#[test]
fn bits_do_not_depend_on_threads() {
    let mut draws = Draws::new(2);
    let (grad, skip) = (draw(&mut draws, [1000, 24]), draws.values::<f32>(24_000));
    assert_same_on_any_threads(|cpu| bits(&join(cpu, 24, &grad, Some(&skip))));
}

fn refuses_lengths_that_do_not_fit<D: Tested<f32>>() {
    let run = |lens| {
        let [dz, x, coef, skip, mut dx] = buffers::<D, f32, 5>(lens);
        let affine = Affine { dz: dz.view(), x: x.view(), coef: coef.view() };
        D::get().grad_join(Join { rows: 4, c: 3, affine, skip: Some(skip.view()), dx: dx.view_mut() })
    };
    assert_eq!(run([12, 12, 9, 12, 12]), Ok(()));
    assert_refuses_length(run([11, 12, 9, 12, 12]), "dz");
    assert_refuses_length(run([12, 13, 9, 12, 12]), "x (of the affine gradient)");
    assert_refuses_length(run([12, 12, 6, 12, 12]), "coef");
    assert_refuses_length(run([12, 12, 9, 4, 12]), "skip");
    assert_refuses_length(run([12, 12, 9, 12, 24]), "dx");
}

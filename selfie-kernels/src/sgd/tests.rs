use super::*;
use crate::Wide;
use crate::testing::*;
use proptest::prelude::any;

on_every_device! {
    elements: cases, any_settings;
    once: a_bad_step_leaves_every_bit, whatever_is_not_finite_is_flagged, nan_comes_through, refuses_lengths_that_do_not_fit;
}

const LENGTHS: [usize; 6] = [0, 1, 63, 4096, 4097, 40_001];

/// Norm and flag, for a loss and an accuracy.
fn norm<T: Element, B: Sgd<T>>(device: &B, gradient: &[T::Wide], measured: [T::Wide; 2]) -> (T::Wide, u32) {
    let gradient = Guarded::new(device, gradient);
    let unwritten = T::Wide::from_f64(f64::NAN);
    let mut metrics = Guarded::new(device, &[measured[0], measured[1], unwritten, unwritten]);
    let mut finite = Guarded::poisoned(device, 1);
    let args = Norm { gradient: gradient.view(), metrics: metrics.view_mut(), finite: finite.view_mut() };
    device.gradient_norm(args).expect("lengths fit");
    let (metrics, finite) = (metrics.read(device), finite.read(device)[0]);
    assert_eq!(bits(&metrics[..2]), bits(&measured), "loss and accuracy are only read");
    assert_eq!(metrics[3].to_f64(), f64::from(finite), "the flag is there twice");
    (metrics[2], finite)
}

fn accumulate<T: Element, B: Sgd<T>>(device: &B, scale: f64, gradient: &[T::Wide], total: &[T::Wide]) -> Vec<T::Wide> {
    let (gradient, mut total) = (Guarded::new(device, gradient), Guarded::new(device, total));
    let args = Accumulate { scale, gradient: gradient.view(), total: total.view_mut() };
    device.gradient_accumulate(args).expect("lengths fit");
    total.read(device)
}

/// What an update changes.
#[derive(Clone)]
struct State<T: Element> {
    velocity: Vec<T::Wide>,
    master: Vec<T::Wide>,
    copy: Vec<T>,
}

#[derive(Clone, Copy)]
struct Settings {
    rate: f64,
    momentum: f64,
    weight_decay: f64,
}

fn update<T: Element, B: Sgd<T>>(
    device: &B,
    settings: Settings,
    finite: u32,
    gradient: &[T::Wide],
    state: &State<T>,
) -> State<T> {
    let (rate, finite) = (Guarded::new(device, &[settings.rate.to_bits()]), Guarded::new(device, &[finite]));
    let gradient = Guarded::new(device, gradient);
    let (mut velocity, mut master) = (Guarded::new(device, &state.velocity), Guarded::new(device, &state.master));
    let mut copy = Guarded::new(device, &state.copy);
    let args = Update {
        rate: rate.view(),
        momentum: settings.momentum,
        weight_decay: settings.weight_decay,
        finite: finite.view(),
        gradient: gradient.view(),
        velocity: velocity.view_mut(),
        master: master.view_mut(),
        copy: copy.view_mut(),
    };
    device.sgd_update(args).expect("lengths fit");
    State { velocity: velocity.read(device), master: master.read(device), copy: copy.read(device) }
}

fn check_norm<T: Element>(device: &impl Sgd<T>, len: usize, seed: u64) {
    let gradient = Draws::new(seed).values::<T::Wide>(len);
    let (got, finite) = norm(device, &gradient, [1.0, 0.5].map(T::Wide::from_f64));
    let squares: f64 = exact(&gradient).iter().map(|g| g * g).sum();
    // A partial sum's roundings, those of the sums over them, and the root's.
    assert_close::<T::Wide, _>("norm", &[got], &[Exact::new(squares.sqrt())], SUM_ELEMENTS + 2 + len / SUM_ELEMENTS);
    assert_eq!(finite, 1);
}

fn check_accumulate<T: Element>(device: &impl Sgd<T>, len: usize, scale: f64, seed: u64) {
    let mut draws = Draws::new(seed);
    let (gradient, total) = (draws.values(len), draws.values(len));
    let got = accumulate(device, scale, &gradient, &total);
    let pairs = exact(&gradient).into_iter().zip(exact(&total));
    let want: Vec<Exact> = pairs.map(|(gradient, total)| [total, scale * gradient].into_iter().sum()).collect();
    assert_close::<T::Wide, _>("total", &got, &want, 3);
}

fn check_update<T: Element>(device: &impl Sgd<T>, len: usize, settings: Settings, seed: u64) {
    let mut draws = Draws::new(seed);
    let gradient = draws.values::<T::Wide>(len);
    let before = State { velocity: draws.values(len), master: draws.values(len), copy: draws.values(len) };
    let after = update(device, settings, 1, &gradient, &before);

    let Settings { rate, momentum, weight_decay } = settings;
    let terms: Vec<[f64; 3]> =
        (0..len).map(|i| [gradient[i], before.master[i], before.velocity[i]].map(Wide::to_f64)).collect();
    let velocity: Vec<Exact> =
        terms.iter().map(|[g, p, v]| [momentum * v, *g, weight_decay * p].into_iter().sum()).collect();
    let master: Vec<Exact> = terms
        .iter()
        .zip(&velocity)
        .map(|([g, p, _], v)| {
            let [g, decay, p] = [-rate * g, -rate * weight_decay * p, *p].map(Exact::new);
            let v = v.times(-rate * momentum);
            let parts = [g, decay, p, v];
            Exact { value: parts.iter().map(|x| x.value).sum(), magnitude: parts.iter().map(|x| x.magnitude).sum() }
        })
        .collect();
    // Constants, products and sums are rounded once each along the longest path, which is the decay's.
    assert_close::<T::Wide, _>("velocity", &after.velocity, &velocity, 5);
    assert_close::<T::Wide, _>("master", &after.master, &master, 10);
    let rounded: Vec<T> = after.master.iter().map(|&p| T::narrow(p)).collect();
    assert_eq!(after.copy, rounded, "the copy is the master, rounded");
}

const USUAL: Settings = Settings { rate: 0.1, momentum: 0.9, weight_decay: 1e-4 };

fn cases<D: Tested<T>, T: Element>() {
    for len in LENGTHS {
        check_norm::<T>(D::get(), len, 1);
        check_accumulate::<T>(D::get(), len, 0.25, 1);
        check_update::<T>(D::get(), len, USUAL, 1);
    }
}

fn any_settings<D: Tested<T>, T: Element>() {
    let settings = (0..200usize, 0.0..1.0f64, 0.0..1.0f64, 0.0..0.1f64, any::<u64>());
    for_any::<D, _>(256, settings, |(len, rate, momentum, weight_decay, seed)| {
        check_norm::<T>(D::get(), len, seed);
        check_accumulate::<T>(D::get(), len, rate, seed);
        check_update::<T>(D::get(), len, Settings { rate, momentum, weight_decay }, seed);
    });
}

/// `torch.optim.SGD(lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)` on one parameter, worked by hand.
#[test]
fn three_steps() {
    let settings = Settings { rate: 0.1, momentum: 0.9, weight_decay: 0.1 };
    let mut state = State::<f64> { velocity: vec![0.0], master: vec![1.0], copy: vec![f64::NAN] };
    for (velocity, master) in [(0.6, 0.886), (1.1286, 0.725566), (1.5882966, 0.525363646)] {
        state = update(cpu(), settings, 1, &[0.5], &state);
        assert_close::<f64, _>("velocity", &state.velocity, &[Exact::new(velocity)], 3 * 10);
        assert_close::<f64, _>("master", &state.master, &[Exact { value: master, magnitude: 2.0 }], 3 * 10);
        assert_eq!(state.copy, state.master);
    }
}

fn a_bad_step_leaves_every_bit<D: Tested<f32>>() {
    let before = State::<f32> { velocity: vec![1.5, f32::NAN], master: vec![-0.0, 2.5], copy: vec![7.0, 8.0] };
    let after = update(D::get(), USUAL, 0, &[f32::NAN, 1.0], &before);
    assert_eq!(bits(&after.velocity), bits(&before.velocity));
    assert_eq!(bits(&after.master), bits(&before.master));
    assert_eq!(bits(&after.copy), bits(&before.copy));
}

fn whatever_is_not_finite_is_flagged<D: Tested<f32>>() {
    let mut gradient = Draws::new(2).values::<f32>(10_000);
    let ok = [1.0f32, f32::NAN];
    assert_eq!(norm::<f32, _>(D::get(), &gradient, ok).1, 1, "the accuracy does not count");
    assert_eq!(norm::<f32, _>(D::get(), &gradient, [f32::NAN, 0.5]).1, 0);
    assert_eq!(norm::<f32, _>(D::get(), &gradient, [f32::INFINITY, 0.5]).1, 0);
    for at in [0, 4095, 9_999] {
        // The square of 1e30 is beyond f32.
        for bad in [f32::NAN, f32::NEG_INFINITY, 1e30] {
            let good = std::mem::replace(&mut gradient[at], bad);
            let (norm, finite) = norm::<f32, _>(D::get(), &gradient, ok);
            assert!(!norm.is_finite(), "{bad} at {at}");
            assert_eq!(finite, 0, "{bad} at {at}");
            gradient[at] = good;
        }
    }
}

fn nan_comes_through<D: Tested<f32>>() {
    let total = accumulate::<f32, _>(D::get(), 0.5, &[f32::NAN, 1.0], &[1.0, f32::NAN]);
    assert!(total.iter().all(|x| x.is_nan()));
    let before = State::<f32> { velocity: vec![0.0; 3], master: vec![0.0, f32::NAN, 1.0], copy: vec![0.0; 3] };
    let after = update(D::get(), USUAL, 1, &[f32::NAN, 1.0, 1.0], &before);
    assert_eq!(after.copy.iter().map(|x| x.is_nan()).collect::<Vec<_>>(), [true, true, false]);
}

#[test]
fn bits_do_not_depend_on_threads() {
    let (len, mut draws) = (100_000, Draws::new(3));
    let gradient = draws.values::<f32>(len);
    let before = State::<f32> { velocity: draws.values(len), master: draws.values(len), copy: draws.values(len) };
    assert_same_on_any_threads(|cpu| {
        let after = update(cpu, USUAL, 1, &gradient, &before);
        let total = accumulate::<f32, _>(cpu, 0.3, &gradient, &before.master);
        let (norm, _) = norm::<f32, _>(cpu, &gradient, [0.0; 2]);
        [after.velocity, after.master, after.copy, total, vec![norm]].iter().flat_map(|values| bits(values)).collect()
    });
}

fn refuses_lengths_that_do_not_fit<D: Tested<f32>>() {
    let run = |finite, lens| {
        let ([mut finite], [gradient, mut metrics]) = (buffers::<D, _, _>([finite]), buffers::<D, _, _>(lens));
        let (gradient, metrics, finite) = (gradient.view(), metrics.view_mut(), finite.view_mut());
        Sgd::<f32>::gradient_norm(D::get(), Norm { gradient, metrics, finite })
    };
    assert_eq!(run(1, [5, 4]), Ok(()));
    assert_refuses_length(run(1, [5, 3]), "metrics");
    assert_refuses_length(run(2, [5, 4]), "finite");
    let run = |lens| {
        let [gradient, mut total] = buffers::<D, _, _>(lens);
        let (gradient, total) = (gradient.view(), total.view_mut());
        Sgd::<f32>::gradient_accumulate(D::get(), Accumulate { scale: 1.0, gradient, total })
    };
    assert_eq!(run([5, 5]), Ok(()));
    assert_refuses_length(run([5, 4]), "total");
    let run = |finite, [rate, rest @ ..]: [usize; 5]| {
        let ([finite], [rate]) = (buffers::<D, _, _>([finite]), buffers::<D, _, _>([rate]));
        let [gradient, mut velocity, mut master, mut copy] = buffers::<D, _, _>(rest);
        let (rate, finite, gradient) = (rate.view(), finite.view(), gradient.view());
        let (velocity, master, copy) = (velocity.view_mut(), master.view_mut(), copy.view_mut());
        let (momentum, weight_decay) = (0.9, 0.0);
        let args = Update { rate, momentum, weight_decay, finite, gradient, velocity, master, copy };
        Sgd::<f32>::sgd_update(D::get(), args)
    };
    assert_eq!(run(1, [1, 5, 5, 5, 5]), Ok(()));
    assert_refuses_length(run(1, [2, 5, 5, 5, 5]), "rate");
    assert_refuses_length(run(0, [1, 5, 5, 5, 5]), "finite");
    assert_refuses_length(run(1, [1, 5, 6, 5, 5]), "velocity");
    assert_refuses_length(run(1, [1, 5, 5, 6, 5]), "master");
    assert_refuses_length(run(1, [1, 5, 5, 5, 4]), "copy");
}

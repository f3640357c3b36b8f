use super::*;
use crate::Wide;
use crate::testing::*;
use proptest::prelude::any;

on_every_device! {
    elements: cases, any_shape;
    once:
        the_first_of_equal_maxima_counts, the_sum_is_taken_in_f64, large_logits_are_stable, a_label_that_is_no_class_gives_nan,
        a_nan_fills_its_row_and_the_loss, refuses_what_does_not_fit;
}

/// n, valid, classes, rivals.
const CASES: &[(&str, [usize; 4])] = &[
    ("one class", [2, 2, 1, 1]),
    ("one image", [1, 1, 10, 10]),
    ("a padded batch", [5, 3, 10, 10]),
    ("rows of three tasks, the last one short", [130, 130, 7, 7]),
    ("padding from the second task on", [130, 65, 3, 3]),
    ("many classes", [3, 3, 1000, 1000]),
    ("groups of rivals", [40, 40, 12, 4]),
    ("groups wider than a warp", [20, 17, 120, 40]),
    ("no rivals", [5, 5, 6, 1]),
];

#[derive(Debug, Clone, Copy)]
struct Sizes {
    n: usize,
    valid: usize,
    classes: usize,
    rivals: usize,
}

impl From<[usize; 4]> for Sizes {
    fn from([n, valid, classes, rivals]: [usize; 4]) -> Self {
        Self { n, valid, classes, rivals }
    }
}

/// With all classes rivals.
impl From<[usize; 3]> for Sizes {
    fn from([n, valid, classes]: [usize; 3]) -> Self {
        Self { n, valid, classes, rivals: classes }
    }
}

/// Loss and accuracy, and the gradient where the batch is whole.
fn run<T: Element, B: SoftmaxCrossEntropy<T>>(
    device: &B,
    sizes: Sizes,
    logits: &[T],
    labels: &[u32],
) -> (Vec<T::Wide>, Option<Vec<T>>) {
    let Sizes { n, valid, classes, rivals } = sizes;
    let (logits, labels) = (Guarded::new(device, logits), Guarded::new(device, labels));
    let mut loss = Guarded::poisoned(device, 2);
    let mut dlogits = (valid == n).then(|| Guarded::poisoned(device, n * classes));
    let args = Args {
        n,
        valid,
        classes,
        rivals,
        logits: logits.view(),
        labels: labels.view(),
        loss: loss.view_mut(),
        dlogits: dlogits.as_mut().map(Guarded::view_mut),
    };
    device.softmax_cross_entropy(args).expect("dims and lengths fit");
    (loss.read(device), dlogits.map(|dlogits| dlogits.read(device)))
}

fn oracle_loss<W: Wide>(sizes: Sizes, logits: &[Bounded], labels: &[u32]) -> Bounded {
    let rows = logits.chunks(sizes.classes).zip(labels).take(sizes.valid);
    let losses = rows.map(|(row, &label)| Bounded::cross_entropy(row, label as usize));
    Bounded::sum_in_f64(losses) * Bounded::constant::<W>(1.0 / sizes.valid as f64)
}

fn oracle_gradient<W: Wide>(sizes: Sizes, logits: &[Bounded], labels: &[u32]) -> Vec<Bounded> {
    let share = Bounded::constant::<W>(1.0 / sizes.n as f64);
    let rows = logits.chunks(sizes.classes).zip(labels);
    let gradients = rows.flat_map(|(row, &label)| {
        let mut gradient = Bounded::softmax(row);
        gradient[label as usize] = gradient[label as usize] - Bounded::new(1.0);
        gradient
    });
    gradients.map(|gradient| gradient * share).collect()
}

/// Rows whose label is the first of the greatest logits of its group.
fn right(sizes: Sizes, logits: &[f64], labels: &[u32]) -> usize {
    let first_greatest =
        |row: &[f64]| (0..row.len()).rev().fold(0, |best, i| if row[i] >= row[best] { i } else { best });
    let rows = logits.chunks(sizes.classes).zip(labels).take(sizes.valid);
    let is_right = |row: &[f64], label: usize| {
        let group = label / sizes.rivals * sizes.rivals;
        group + first_greatest(&row[group..][..sizes.rivals]) == label
    };
    rows.filter(|(row, label)| is_right(row, **label as usize)).count()
}

fn check<T: Element>(device: &impl SoftmaxCrossEntropy<T>, sizes: Sizes, seed: u64) {
    let mut draws = Draws::new(seed);
    let labels: Vec<u32> = (0..sizes.n).map(|_| draws.below(sizes.classes) as u32).collect();
    let len = sizes.n * sizes.classes;
    for mut logits in [draws.values::<T>(len), draws.ties::<T>(len), draws.normal::<T>(len, -300.0, 30.0)] {
        logits[sizes.valid * sizes.classes..].fill(stored(f64::NAN)); // Padding is not looked at.
        let (loss, gradient) = run(device, sizes, &logits, &labels);
        assert_bounded("loss", &loss[..1], &[oracle_loss::<T::Wide>(sizes, &bounded(&logits), &labels)]);
        let accuracy = right(sizes, &exact(&logits), &labels) as f64 / sizes.valid as f64;
        assert_eq!(loss[1], T::Wide::from_f64(accuracy), "accuracy");
        if let Some(gradient) = gradient {
            assert_bounded("dlogits", &gradient, &oracle_gradient::<T::Wide>(sizes, &bounded(&logits), &labels));
        }
    }
}

fn cases<D: Tested<T>, T: Element>() {
    for &(name, sizes) in CASES {
        eprintln!("{}: {name}", T::NAME);
        check::<T>(D::get(), sizes.into(), 1);
    }
}

fn any_shape<D: Tested<T>, T: Element>() {
    for_any::<D, _>(256, ([1..100usize, 0..3, 1..20, 1..4], any::<u64>()), |([n, padding, rivals, groups], seed)| {
        check::<T>(D::get(), [n + padding, n, rivals * groups, rivals].into(), seed);
    });
}

#[test]
fn gradient() {
    let (sizes, mut draws) = (Sizes::from([3, 3, 4]), Draws::new(2));
    let (logits, labels) = (draws.values::<f64>(12), [3, 0, 1]);
    let (_, gradient) = run(cpu(), sizes, &logits, &labels);
    assert_bounded_gradient("dlogits", &gradient.expect("a whole batch"), &logits, &[1.0], |logits| {
        vec![oracle_loss::<f64>(sizes, logits, &labels)]
    });
}

fn the_first_of_equal_maxima_counts<D: Tested<f32>>() {
    let logits = [1.0f32, 2.0, 2.0, 2.0, 2.0, 1.0];
    let accuracy = |labels: [u32; 2]| run(D::get(), [2, 2, 3].into(), &logits, &labels).0[1];
    assert_eq!(accuracy([1, 0]), 1.0);
    assert_eq!(accuracy([2, 0]), 0.5);
    assert_eq!(accuracy([2, 1]), 0.0);
}

/// A large loss among small ones: in `f32`, 2^27 + 17 is 2^27 + 16.
fn the_sum_is_taken_in_f64<D: Tested<f32>>() {
    let n = 1024;
    let mut logits = [0f32, -17.0].repeat(n);
    logits[1] = -134_217_728.0;
    let mean = (134_217_728.0 + 17.0 * 1023.0) / 1024.0;
    assert_eq!(run(D::get(), [n, n, 2].into(), &logits, &vec![1; n]).0, [mean, 0.0]);
}

/// Overflow of exp would show as NaN or infinity.
fn large_logits_are_stable<D: Tested<f32>>() {
    let (loss, gradient) = run(D::get(), [1, 1, 3].into(), &[1e30f32, -1e30, 0.0], &[1]);
    assert_eq!(loss, [2e30, 0.0]);
    assert_eq!(gradient.expect("a whole batch"), [1.0, -1.0, 0.0]);
}

fn a_label_that_is_no_class_gives_nan<D: Tested<f32>>() {
    for label in [3, u32::MAX] {
        let (loss, gradient) = run(D::get(), [2, 2, 3].into(), &[0.0f32, 1.0, 2.0, 0.0, 1.0, 2.0], &[label, 2]);
        assert!(loss[0].is_nan());
        assert_eq!(loss[1], 0.5, "it counts as wrong");
        let nans: Vec<bool> = gradient.expect("a whole batch").iter().map(|x| x.is_nan()).collect();
        assert_eq!(nans, [true, true, true, false, false, false]);
    }
}

fn a_nan_fills_its_row_and_the_loss<D: Tested<f32>>() {
    let (loss, gradient) = run(D::get(), [2, 2, 2].into(), &[0.0f32, f32::NAN, 1.0, 0.0], &[0, 0]);
    assert!(loss[0].is_nan());
    assert_eq!(loss[1], 0.5);
    let nans: Vec<bool> = gradient.expect("a whole batch").iter().map(|x| x.is_nan()).collect();
    assert_eq!(nans, [true, true, false, false]);
}

#[test]
fn bits_do_not_depend_on_threads() {
    let (sizes, mut draws) = (Sizes::from([300, 300, 10]), Draws::new(3));
    let logits = draws.values::<f32>(3000);
    let labels: Vec<u32> = (0..300).map(|_| draws.below(10) as u32).collect();
    assert_same_on_any_threads(|cpu| {
        let (loss, gradient) = run(cpu, sizes, &logits, &labels);
        [bits(&loss), bits(&gradient.expect("a whole batch"))].concat()
    });
}

fn refuses_what_does_not_fit<D: Tested<f32>>() {
    let grouped =
        |[n, valid, classes, rivals]: [usize; 4], labels: usize, [logits, loss]: [usize; 2], dlogits: Option<usize>| {
            let device = D::get();
            let (logits, labels) = (Guarded::new(device, &vec![0f32; logits]), Guarded::new(device, &vec![0; labels]));
            let mut loss = Guarded::poisoned(device, loss);
            let mut dlogits = dlogits.map(|len| Guarded::<D, f32>::poisoned(device, len));
            let (logits, labels, loss) = (logits.view(), labels.view(), loss.view_mut());
            let dlogits = dlogits.as_mut().map(Guarded::view_mut);
            SoftmaxCrossEntropy::<f32>::softmax_cross_entropy(
                device,
                Args { n, valid, classes, rivals, logits, labels, loss, dlogits },
            )
        };
    let run = |sizes: [usize; 3], labels, lens, dlogits| {
        grouped([sizes[0], sizes[1], sizes[2], sizes[2]], labels, lens, dlogits)
    };
    assert_eq!(run([2, 2, 3], 2, [6, 2], Some(6)), Ok(()));
    assert_eq!(run([2, 1, 3], 2, [6, 2], None), Ok(()));
    assert_refuses_length(run([2, 2, 3], 1, [6, 2], Some(6)), "labels");
    assert_refuses_length(run([2, 2, 3], 2, [5, 2], Some(6)), "logits");
    assert_refuses_length(run([2, 2, 3], 2, [6, 1], Some(6)), "loss");
    assert_refuses_length(run([2, 2, 3], 2, [6, 2], Some(7)), "dlogits");
    assert_refuses_dims(run([2, 1, 3], 2, [6, 2], Some(6)));
    assert_refuses_dims(run([2, 3, 3], 2, [6, 2], None));
    assert_refuses_dims(run([2, 0, 3], 2, [6, 2], None));
    assert_refuses_dims(run([2, 2, 0], 2, [0, 2], None));
    assert_eq!(grouped([2, 2, 6, 3], 2, [12, 2], Some(12)), Ok(()));
    assert_refuses_dims(grouped([2, 2, 6, 4], 2, [12, 2], Some(12)));
    assert_refuses_dims(grouped([2, 2, 6, 0], 2, [12, 2], Some(12)));
}

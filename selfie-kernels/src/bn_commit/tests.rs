use super::*;
use crate::testing::*;
use proptest::prelude::any;

on_every_device! {
    elements: cases, any_length;
    once: a_bad_step_leaves_every_bit, nan_comes_through, refuses_lengths_that_do_not_fit;
}

fn commit<T: Element, B: BnCommit<T>>(
    device: &B,
    finite: u32,
    momentum: f64,
    batch: &[T::Wide],
    running: &[T::Wide],
) -> Vec<T::Wide> {
    let (finite, batch) = (Guarded::new(device, &[finite]), Guarded::new(device, batch));
    let mut running = Guarded::new(device, running);
    let args = Commit { momentum, finite: finite.view(), batch: batch.view(), running: running.view_mut() };
    device.bn_commit(args).expect("lengths fit");
    running.read(device)
}

fn check<T: Element>(device: &impl BnCommit<T>, len: usize, momentum: f64, seed: u64) {
    let mut draws = Draws::new(seed);
    let (batch, running) = (draws.values(len), draws.values(len));
    let got = commit(device, 1, momentum, &batch, &running);
    let terms = exact(&batch).into_iter().zip(exact(&running));
    // Formed as `running + momentum * (batch - running)`: that `running` comes in twice belongs to the magnitude.
    let want: Vec<Exact> =
        terms.map(|(batch, running)| [running, momentum * batch, -momentum * running].into_iter().sum()).collect();
    // The rounding of the momentum, the difference, the product, the sum.
    assert_close::<T::Wide, _>("running", &got, &want, 4);
}

fn cases<D: Tested<T>, T: Element>() {
    for len in [0, 1, 15, 4099] {
        check::<T>(D::get(), len, 0.1, 1);
    }
}

fn any_length<D: Tested<T>, T: Element>() {
    for_any::<D, _>(256, (0..100usize, 0.0..=1.0f64, any::<u64>()), |(len, momentum, seed)| {
        check::<T>(D::get(), len, momentum, seed);
    });
}

/// PyTorch: after k steps with the same statistics, `1 - 0.9^k` of them.
#[test]
fn three_steps() {
    let mut running = vec![0.0, 1.0];
    for _ in 0..3 {
        running = commit::<f64, _>(cpu(), 1, 0.1, &[1.0, 11.0], &running);
    }
    let want = [Exact::new(0.271), Exact { value: 1.0 + 2.71, magnitude: 12.0 }];
    assert_close::<f64, _>("running", &running, &want, 3 * 4);
}

fn a_bad_step_leaves_every_bit<D: Tested<f32>>() {
    let running = [1.5f32, -0.0, f32::INFINITY];
    let got = commit::<f32, _>(D::get(), 0, 0.1, &[f32::NAN, 2.0, 3.0], &running);
    assert_eq!(bits(&got), bits(&running));
}

fn nan_comes_through<D: Tested<f32>>() {
    let got = commit::<f32, _>(D::get(), 1, 0.1, &[f32::NAN, 2.0], &[1.0, f32::NAN]);
    assert!(got.iter().all(|x| x.is_nan()));
}

fn refuses_lengths_that_do_not_fit<D: Tested<f32>>() {
    let run = |finite: usize, batch: usize, running: usize| {
        let ([finite], [batch, mut running]) = (buffers::<D, _, _>([finite]), buffers::<D, _, _>([batch, running]));
        let (finite, batch, running) = (finite.view(), batch.view(), running.view_mut());
        BnCommit::<f32>::bn_commit(D::get(), Commit { momentum: 0.1, finite, batch, running })
    };
    assert_eq!(run(1, 4, 4), Ok(()));
    assert_refuses_length(run(0, 4, 4), "finite");
    assert_refuses_length(run(1, 3, 4), "batch");
}

//! What the operations on rows share. The compiler may not reorder a float sum, so sums are written as [`LANES`] sums
//! side by side, added up in a fixed order at the end: it vectorises, and the bits are the same on every machine.

use crate::{Element, Wide};
use num_traits::Float;

/// Sums side by side: two AVX-512 registers of `f32`, which hides the latency of an addition.
pub(crate) const LANES: usize = 32;

/// Sum of the elements.
#[inline(always)]
pub(crate) fn sum<W: Wide>(a: &[W]) -> W {
    let mut sums = [W::zero(); LANES];
    let (whole, rest) = a.as_chunks::<LANES>();
    for a in whole {
        for i in 0..LANES {
            sums[i] += a[i];
        }
    }
    for (sum, &a) in sums.iter_mut().zip(rest) {
        *sum += a;
    }
    total(sums)
}

/// Sum of the products; the slices are of one length.
#[inline(always)]
pub(crate) fn dot<W: Wide>(a: &[W], b: &[W]) -> W {
    let mut sums = [W::zero(); LANES];
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            sums[i] = a[i].mul_add(b[i], sums[i]);
        }
    }
    for (sum, (&a, &b)) in sums.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *sum = a.mul_add(b, *sum);
    }
    total(sums)
}

#[inline(always)]
fn total<W: Wide>(mut sums: [W; LANES]) -> W {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            let above = sums[i + half];
            sums[i] += above;
        }
        half /= 2;
    }
    sums[0]
}

/// `to = from`, exactly.
#[inline(always)]
pub(crate) fn widen<T: Element>(from: &[T], to: &mut [T::Wide]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.widen();
    }
}

/// `to = from`, rounded.
#[inline(always)]
pub(crate) fn narrow<T: Element>(from: &[T::Wide], to: &mut [T]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = T::narrow(from);
    }
}

/// `sum += terms`.
#[inline(always)]
pub(crate) fn add<T: Element>(sum: &mut [T::Wide], terms: &[T]) {
    for (sum, term) in sum.iter_mut().zip(terms) {
        *sum += term.widen();
    }
}

/// `sum += factor * terms`.
#[inline(always)]
pub(crate) fn add_scaled<T: Element>(sum: &mut [T::Wide], factor: T::Wide, terms: &[T]) {
    for (sum, term) in sum.iter_mut().zip(terms) {
        *sum = factor.mul_add(term.widen(), *sum);
    }
}

/// The greatest element and the sum of `exp(x - greatest)`, of which softmax and its logarithm are made. `row` becomes
/// these exponentials.
#[inline(always)]
pub(crate) fn exponentials<W: Wide>(row: &mut [W]) -> (W, W) {
    // A NaN is never the greatest, but its exponential is NaN, and so is the sum.
    let max = row.iter().fold(W::neg_infinity(), |max, &x| if x > max { x } else { max });
    for x in row.iter_mut() {
        *x = (*x - max).exp();
    }
    (max, sum(row))
}

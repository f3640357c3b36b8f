//! Running error analysis (Higham, Accuracy and Stability of Numerical Algorithms, section 3.3): an oracle written with
//! these numbers says at once what the exact result is and how far from it rounding can lead.

use super::exact;
use crate::{Dropout, Element, Memory, Philox, Purpose, Wide};
use num_traits::Float;
use std::ops::{Add, Mul, Sub};

/// A value in `f64`, and the greatest distance between it and what arithmetic in another precision makes of it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Bounded {
    pub(crate) value: f64,
    pub(crate) error: f64,
    /// Half an epsilon of that precision, and half of one of `f64`, as the oracle rounds too; 0 for constants.
    unit: f64,
}

/// Stored numbers, free of error, to be computed with in `T::Wide`.
pub(crate) fn bounded<T: Element>(values: &[T]) -> Vec<Bounded> {
    let unit = (T::Wide::EPSILON + f64::EPSILON) / 2.0;
    exact(values).into_iter().map(|value| Bounded { value, error: 0.0, unit }).collect()
}

impl Bounded {
    /// A constant, free of error.
    pub(crate) fn new(value: f64) -> Self {
        Self { value, error: 0.0, unit: 0.0 }
    }

    /// A constant rounded to `W`.
    pub(crate) fn constant<W: Wide>(value: f64) -> Self {
        Self { value, error: 0.0, unit: (W::EPSILON + f64::EPSILON) / 2.0 }.rounded(1)
    }

    /// After some roundings of the value itself.
    fn rounded(self, times: usize) -> Self {
        let unit = times as f64 * self.unit;
        Self { error: self.error + unit / (1.0 - unit) * (self.value.abs() + self.error), ..self }
    }

    /// As an operand of a product on device `D`, which may round it.
    pub(crate) fn operand<D: super::TestDevice, T: Element>(self) -> Self {
        let unit = D::operand_epsilon::<T>() / 2.0;
        Self { error: self.error + unit * (self.value.abs() + self.error), ..self }
    }

    /// exp and ln may be off by two units in the last place, four half epsilons: what CUDA promises at most.
    pub(crate) fn exp(self) -> Self {
        let value = self.value.exp();
        Self { value, error: value * self.error.exp_m1(), ..self }.rounded(4)
    }

    pub(crate) fn ln(self) -> Self {
        Self { value: self.value.ln(), error: self.error / (self.value - self.error), ..self }.rounded(4)
    }

    pub(crate) fn recip(self) -> Self {
        let (value, size) = (self.value.recip(), self.value.abs());
        Self { value, error: self.error / (size * (size - self.error)), ..self }.rounded(1)
    }

    pub(crate) fn sqrt(self) -> Self {
        let value = self.value.sqrt();
        Self { value, error: value - (self.value - self.error).sqrt(), ..self }.rounded(1)
    }

    /// A sum in any order.
    pub(crate) fn sum(terms: impl IntoIterator<Item = Self>) -> Self {
        let (mut sum, mut magnitude, mut count) = (Self::default(), 0.0, 0usize);
        for term in terms {
            sum.value += term.value;
            sum.error += term.error;
            sum.unit = sum.unit.max(term.unit);
            magnitude += term.value.abs() + term.error;
            count += 1;
        }
        let unit = count.saturating_sub(1) as f64 * sum.unit;
        Self { error: sum.error + unit / (1.0 - unit) * magnitude, ..sum }
    }

    /// A sum that is taken in `f64` and then rounded.
    pub(crate) fn sum_in_f64(terms: impl IntoIterator<Item = Self>) -> Self {
        let mut unit = 0.0f64;
        let terms = terms.into_iter().map(|term| {
            unit = unit.max(term.unit);
            Self { unit: f64::EPSILON, ..term }
        });
        let sum = Self::sum(terms.collect::<Vec<_>>());
        Self { unit, ..sum }.rounded(1)
    }

    /// Softmax by its usual way, shifted by the maximum.
    pub(crate) fn softmax(logits: &[Self]) -> Vec<Self> {
        let shifted = Self::shifted_exp(logits);
        let normalizer = Self::sum(shifted.iter().copied()).recip();
        shifted.into_iter().map(|x| x * normalizer).collect()
    }

    /// `-log softmax(logits)[target]`.
    pub(crate) fn cross_entropy(logits: &[Self], target: usize) -> Self {
        (Self::max(logits) - logits[target]) + Self::sum(Self::shifted_exp(logits)).ln()
    }

    fn shifted_exp(logits: &[Self]) -> Vec<Self> {
        let max = Self::max(logits);
        logits.iter().map(|&x| (x - max).exp()).collect()
    }

    fn max(values: &[Self]) -> Self {
        values.iter().fold(Self::new(f64::NEG_INFINITY), |max, x| Self {
            value: max.value.max(x.value),
            error: max.error.max(x.error),
            unit: x.unit,
        })
    }
}

impl Add for Bounded {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        let unit = self.unit.max(other.unit);
        Self { value: self.value + other.value, error: self.error + other.error, unit }.rounded(1)
    }
}

impl Sub for Bounded {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        self + Self { value: -other.value, ..other }
    }
}

impl Mul for Bounded {
    type Output = Self;
    fn mul(self, other: Self) -> Self {
        let error = self.value.abs() * other.error + other.value.abs() * self.error + self.error * other.error;
        Self { value: self.value * other.value, error, unit: self.unit.max(other.unit) }.rounded(1)
    }
}

/// Asserts that each value, rounded to `S` at the end, is within its bound; a NaN is within none.
pub(crate) fn assert_bounded<S: Element>(what: &str, got: &[S], want: &[Bounded]) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let underflow = S::Wide::min_positive_value().to_f64();
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let bound = want.error + S::EPSILON / 2.0 * (want.value.abs() + want.error) + underflow;
        let error = (got.widen().to_f64() - want.value).abs();
        assert!(
            error <= bound,
            "{} {what}[{i}]: got {got}, want {:e}; error {error:e} > {bound:e}",
            S::NAME,
            want.value
        );
    }
}

/// Asserts that `gradient` is the derivative at `x` of an oracle's sum of `outputs * weights`.
pub(crate) fn assert_bounded_gradient(
    what: &str,
    gradient: &[f64],
    x: &[f64],
    weights: &[f64],
    outputs: impl Fn(&[Bounded]) -> Vec<Bounded>,
) {
    super::assert_gradient(what, gradient, x, 1, |x| {
        let terms = outputs(&bounded(x)).into_iter().zip(bounded(weights)).map(|(y, weight)| y * weight);
        let sum = Bounded::sum(terms);
        super::Exact { value: sum.value, magnitude: sum.error / f64::EPSILON }
    });
}

/// Dropout of a test.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostDropout {
    pub(crate) rate: f32,
    pub(crate) site: u32,
    pub(crate) rng: [u64; 2],
}

impl HostDropout {
    /// A rate's dropout at some site of some batch.
    pub(crate) fn new(rate: f32) -> Self {
        Self { rate, site: 3, rng: [0x0123_4567_89AB_CDEF, (1 << 40) - 1] }
    }

    /// What element `element` of image `image` is multiplied by.
    pub(crate) fn multiplier<W: Wide>(self, image: usize, element: usize) -> Bounded {
        let (purpose, sample) = (Purpose::Dropout as u32 + self.site, self.rng[1] + image as u64);
        let words = Philox { seed: self.rng[0] }.words(purpose, sample, (element / 4) as u32);
        if Philox::unit(words[element % 4]) < self.rate {
            return Bounded::new(0.0);
        }
        Bounded::constant::<W>(1.0 / (1.0 - f64::from(self.rate)))
    }

    /// What an oracle multiplies by: one where there is no dropout.
    pub(crate) fn multipliers<W: Wide>(dropout: Option<Self>, images: usize, elements: usize) -> Vec<Bounded> {
        let all = (0..images).flat_map(|image| (0..elements).map(move |element| (image, element)));
        all.map(|(image, element)| dropout.map_or(Bounded::new(1.0), |dropout| dropout.multiplier::<W>(image, element)))
            .collect()
    }
}

/// [`HostDropout`] on a device.
pub(crate) struct DeviceDropout<M: Memory> {
    host: HostDropout,
    rng: super::Guarded<M, u64>,
}

impl<M: Memory> DeviceDropout<M> {
    pub(crate) fn new(device: &M, host: HostDropout) -> Self {
        Self { host, rng: super::Guarded::new(device, &host.rng) }
    }

    pub(crate) fn view(&self) -> Dropout<'_, M> {
        Dropout { rate: self.host.rate, site: self.host.site, rng: self.rng.view() }
    }
}

mod tests {
    use super::*;

    /// Every operation once, by an arithmetic in `f32` whose errors are known.
    #[test]
    fn rounding_stays_within_the_bound() {
        for seed in 0..200u16 {
            let x: Vec<f32> = (0..9).map(|i| (f32::from(seed) * 0.37 + i as f32).sin() * 3.0).collect();
            let max = x.iter().copied().fold(f32::MIN, f32::max);
            let exponentials: Vec<f32> = x.iter().map(|x| (x - max).exp()).collect();
            let sum: f32 = exponentials.iter().sum();
            let softmax: Vec<f32> = exponentials.iter().map(|x| x * sum.recip()).collect();
            let logits = bounded(&x);
            assert_bounded("softmax", &softmax, &Bounded::softmax(&logits));
            assert_bounded("loss", &[(max - x[2]) + sum.ln()], &[Bounded::cross_entropy(&logits, 2)]);
            let root = Bounded::sum(logits.iter().map(|&x| x * x)).sqrt();
            assert_bounded("root", &[x.iter().map(|x| x * x).sum::<f32>().sqrt()], &[root]);
            assert!(root.error < 20.0 * f64::from(f32::EPSILON) * root.value, "the bound is no dead letter");
        }
    }
}

//! Minimising a smooth convex function of many numbers.

use std::collections::VecDeque;

/// Steps that the curvature is estimated from.
const MEMORY: usize = 10;

/// Share of the decrease that the slope promises, which a step must bring (Armijo).
const DECREASE: f64 = 1e-4;

/// Where the search ended.
#[derive(Debug, Clone)]
pub(super) struct Minimum {
    pub(super) at: Vec<f64>,
    pub(super) value: f64,
    /// Greatest element of the gradient, without sign.
    pub(super) gradient: f64,
    pub(super) iterations: usize,
}

/// A step and how the gradient changed over it.
struct Pair {
    step: Vec<f64>,
    change: Vec<f64>,
    /// 1 / (step . change)
    scale: f64,
}

/// Goes down from `at` until no element of the gradient is above `tolerance`, for at most so many iterations, or until
/// rounding allows no lower value. `function` writes its gradient and returns its value.
///
/// Source: Nocedal and Wright 2006, Numerical Optimization, algorithm 7.5.
pub(super) fn minimise(
    mut at: Vec<f64>,
    tolerance: f64,
    most: usize,
    mut function: impl FnMut(&[f64], &mut [f64]) -> f64,
) -> Minimum {
    let mut gradient = vec![0.0; at.len()];
    let mut value = function(&at, &mut gradient);
    let mut pairs: VecDeque<Pair> = VecDeque::with_capacity(MEMORY);
    let mut iterations = 0;
    while largest(&gradient) > tolerance && iterations < most {
        let mut direction = descent(&gradient, &pairs);
        let mut slope = dot(&direction, &gradient);
        if slope >= 0.0 || !slope.is_finite() {
            // Rounding spoilt the estimate.
            pairs.clear();
            direction = descent(&gradient, &pairs);
            slope = dot(&direction, &gradient);
        }
        // Without an estimate of the curvature, a first step of length 1 at most.
        let mut length = if pairs.is_empty() { 1f64.min(1.0 / slope.abs().sqrt()) } else { 1.0 };
        let mut next_gradient = vec![0.0; at.len()];
        let found = loop {
            let next: Vec<f64> = at.iter().zip(&direction).map(|(x, d)| x + length * d).collect();
            let next_value = function(&next, &mut next_gradient);
            if next_value <= value + DECREASE * length * slope && next_value < value {
                break Some((next, next_value));
            }
            length /= 2.0;
            if length < 1e-15 {
                break None;
            }
        };
        let Some((next, next_value)) = found else { break };
        let step: Vec<f64> = next.iter().zip(&at).map(|(next, at)| next - at).collect();
        let change: Vec<f64> = next_gradient.iter().zip(&gradient).map(|(next, before)| next - before).collect();
        let curvature = dot(&step, &change);
        if curvature > f64::EPSILON * dot(&change, &change) {
            if pairs.len() == MEMORY {
                pairs.pop_front();
            }
            pairs.push_back(Pair { step, change, scale: 1.0 / curvature });
        }
        (at, value, gradient) = (next, next_value, next_gradient);
        iterations += 1;
    }
    Minimum { at, value, gradient: largest(&gradient), iterations }
}

/// Minus the gradient times the estimate of the inverse of the curvature.
fn descent(gradient: &[f64], pairs: &VecDeque<Pair>) -> Vec<f64> {
    let mut direction: Vec<f64> = gradient.iter().map(|g| -g).collect();
    let mut shares = Vec::with_capacity(pairs.len());
    for pair in pairs.iter().rev() {
        let share = pair.scale * dot(&pair.step, &direction);
        add(&mut direction, -share, &pair.change);
        shares.push(share);
    }
    if let Some(last) = pairs.back() {
        let scale = 1.0 / (last.scale * dot(&last.change, &last.change));
        direction.iter_mut().for_each(|d| *d *= scale);
    }
    for (pair, share) in pairs.iter().zip(shares.into_iter().rev()) {
        let correction = share - pair.scale * dot(&pair.change, &direction);
        add(&mut direction, correction, &pair.step);
    }
    direction
}

fn add(to: &mut [f64], factor: f64, from: &[f64]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += factor * from);
}

fn dot(one: &[f64], other: &[f64]) -> f64 {
    one.iter().zip(other).map(|(one, other)| one * other).sum()
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |largest, value| value.abs().max(largest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stretched_bowl_is_solved() {
        // Curvatures from 1 to 100, the minimum at (1, 2, .. 30). Conjugate gradients divide the error by 11 / 9 in each
        // iteration at least, which makes 143 from a gradient of 3000 to 1e-9; this may take twice as many.
        let curvature = |i: usize| 100f64.powf(i as f64 / 29.0);
        let found = minimise(vec![0.0; 30], 1e-9, 1000, |x, gradient| {
            let mut value = 0.0;
            for i in 0..30 {
                let away = x[i] - (i + 1) as f64;
                gradient[i] = curvature(i) * away;
                value += 0.5 * curvature(i) * away * away;
            }
            value
        });
        assert!(found.gradient <= 1e-9 && found.iterations < 286, "{} after {}", found.gradient, found.iterations);
        // A gradient of g leaves x off by g / curvature, and the least is 1.
        found.at.iter().enumerate().for_each(|(i, x)| assert!((x - (i + 1) as f64).abs() <= 1e-9, "{i}: {x}"));
    }

    #[test]
    fn it_stops_when_it_is_told() {
        let found = minimise(vec![5.0, 5.0], 0.0, 3, |x, gradient| {
            gradient.copy_from_slice(&[4.0 * x[0].powi(3), 2.0 * x[1]]);
            x[0].powi(4) + x[1] * x[1]
        });
        assert_eq!(found.iterations, 3);
        assert!(found.gradient > 0.0);
    }
}

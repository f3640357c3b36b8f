//! Means, spreads, and what of a difference is more than chance.

use statrs::distribution::{ContinuousCDF, FisherSnedecor, StudentsT};

/// Upper quantile of what is two-sided with 95%.
const UPPER: f64 = 0.975;

/// Values of a kind: accuracies of runs that differ by their seed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// How many.
    pub n: usize,
    /// Their mean.
    pub mean: f64,
    /// Their standard deviation, with n - 1; none of a single value.
    pub std: Option<f64>,
}

/// Where a value lies, with 95% confidence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// That quantile of the normal distribution.
const NORMAL: f64 = 1.959_963_984_540_054;

impl Interval {
    /// Of a share of which `right` of `n` were seen, by Wilson (1927): it stays within 0 and 1, and is no point at either end.
    pub fn of_share(right: f64, n: f64) -> Self {
        let (share, square) = (right / n, NORMAL * NORMAL);
        let centre = (share + square / (2.0 * n)) / (1.0 + square / n);
        let half = NORMAL / (1.0 + square / n) * (share * (1.0 - share) / n + square / (4.0 * n * n)).sqrt();
        Self { low: (centre - half).max(0.0), high: (centre + half).min(1.0) }
    }

    /// Whether it has the value in it.
    pub fn contains(self, value: f64) -> bool {
        (self.low..=self.high).contains(&value)
    }
}

impl Sample {
    /// Of these values; none where there are none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let (&first, n) = (values.first()?, values.len());
        if values.iter().all(|&value| value == first) {
            // Without roundings, which would make a spread where there is none.
            return Some(Self { n, mean: first, std: (n > 1).then_some(0.0) });
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        Some(Self { n, mean, std: Some((squares / (n - 1) as f64).sqrt()) })
    }

    /// Variance of the mean, and its degrees of freedom.
    fn of_mean(&self) -> Option<(f64, f64)> {
        Some((self.std?.powi(2) / self.n as f64, (self.n - 1) as f64))
    }

    /// The interval of `self.mean - other.mean` by Welch (1947), which does not take the two spreads for equal. None for a
    /// single value, and where neither spreads at all: such an interval would be a point, and tell of a certainty that isn't.
    pub fn minus(&self, other: &Self) -> Option<Interval> {
        let ((a, a_free), (b, b_free)) = (self.of_mean()?, other.of_mean()?);
        let free = (a + b).powi(2) / (a.powi(2) / a_free + b.powi(2) / b_free);
        // The distribution refuses 0 / 0.
        let half = StudentsT::new(0.0, 1.0, free).ok()?.inverse_cdf(UPPER) * (a + b).sqrt();
        let difference = self.mean - other.mean;
        Some(Interval { low: difference - half, high: difference + half })
    }

    /// Standard deviation over that of `other`, and its interval by the F distribution, which takes the values for normally
    /// distributed. None where either does not spread.
    pub fn spread_over(&self, other: &Self) -> Option<(f64, Interval)> {
        let ratio = self.std? / other.std?;
        let free = |sample: &Self| (sample.n - 1) as f64;
        let upper = |a: f64, b: f64| Some(FisherSnedecor::new(a, b).ok()?.inverse_cdf(UPPER).sqrt());
        let (low, high) = (ratio / upper(free(self), free(other))?, ratio * upper(free(other), free(self))?);
        (ratio > 0.0 && ratio.is_finite()).then_some((ratio, Interval { low, high }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_of_shares() {
        // Newcombe (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
        for (right, n, low, high) in [
            (81.0, 263.0, 0.2553, 0.3662),
            (15.0, 148.0, 0.0624, 0.1605),
            (0.0, 20.0, 0.0, 0.1611),
            (1.0, 29.0, 0.0061, 0.1718),
        ] {
            let found = Interval::of_share(right, n);
            // Printed with four digits.
            assert!((found.low - low).abs() <= 5e-5 && (found.high - high).abs() <= 5e-5, "{right} of {n}: {found:?}");
        }
        let all = Interval::of_share(20.0, 20.0);
        assert!(all.high == 1.0 && all.low < 0.85);
    }

    fn sample(values: &[f64]) -> Sample {
        Sample::of(values).expect("some")
    }

    #[track_caller]
    fn close(found: f64, expected: f64) {
        // What four places of a table need many times over; quantiles are iterated to about 1e-13.
        assert!((found - expected).abs() <= 1e-11 * expected.abs().max(1.0), "{found} instead of {expected}");
    }

    /// Against scipy 1.x: `stats.t.ppf(.975, df)` and `stats.f.ppf(.975, a, b)`.
    #[test]
    fn quantiles_are_scipys() {
        for (free, expected) in [
            (1.0, 12.706204736174694),
            (2.0, 4.302652729749462),
            (4.0, 2.7764451051977934),
            (6.5, 2.4020020079102764),
            (8.0, 2.306004135204166),
            (30.0, 2.0422724563012378),
            (998.0, 1.9623438462163343),
        ] {
            close(StudentsT::new(0.0, 1.0, free).expect("valid").inverse_cdf(UPPER), expected);
        }
        for (a, b, expected) in [
            (1.0, 1.0, 647.7890114778442),
            (2.0, 4.0, 10.649110640673513),
            (4.0, 4.0, 9.604529884722858),
            (9.0, 3.0, 14.473080651773733),
        ] {
            close(FisherSnedecor::new(a, b).expect("valid").inverse_cdf(UPPER), expected);
        }
    }

    /// Against `stats.ttest_ind(a, b, equal_var=False).confidence_interval(.95)`.
    #[test]
    fn welchs_intervals_are_scipys() {
        let (a, b) = (sample(&[0.543, 0.551, 0.548, 0.539, 0.556]), sample(&[0.531, 0.528, 0.540, 0.522, 0.535]));
        let gain = a.minus(&b).expect("both spread");
        close(gain.low, 0.006361058927348909);
        close(gain.high, 0.026038941072650854);
        assert!(!gain.contains(0.0));
        let (a, b) = (sample(&[0.6, 0.61, 0.55]), sample(&[0.5, 0.52, 0.58, 0.49]));
        let gain = a.minus(&b).expect("both spread");
        close(gain.low, -0.006570833974192947);
        close(gain.high, 0.13490416730752636);
        assert!(gain.contains(0.0));
    }

    #[test]
    fn spreads_are_compared() {
        let (a, b) = (sample(&[1.0, 2.0, 3.0, 4.0, 5.0]), sample(&[2.0, 4.0, 6.0, 8.0, 10.0]));
        let (ratio, interval) = a.spread_over(&b).expect("both spread");
        close(ratio, 0.5);
        close(interval.low, 0.5 / 9.604529884722858f64.sqrt());
        close(interval.high, 0.5 * 9.604529884722858f64.sqrt());
    }

    #[test]
    fn nothing_is_claimed_of_too_little() {
        assert_eq!(Sample::of(&[]), None);
        let (one, two, still) = (sample(&[0.5]), sample(&[0.5, 0.6]), sample(&[0.1, 0.1, 0.1]));
        assert_eq!((one.std, still.std, still.mean), (None, Some(0.0), 0.1));
        assert_eq!(one.minus(&two), None);
        assert_eq!(still.minus(&still), None);
        assert_eq!((still.spread_over(&two), two.spread_over(&still)), (None, None));
        // One of the two may be still.
        assert!(two.minus(&still).is_some_and(|interval| interval.contains(0.45)));
    }
}

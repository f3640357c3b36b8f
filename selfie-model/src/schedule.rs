//! The learning rate: linear warm-up, then half a cosine.

use std::f64::consts::PI;
use std::time::Duration;

/// How long training lasts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Length {
    /// So many steps.
    Steps(u64),
    /// So much time on the clock. The learning rate then depends on the speed of the machine, so the bits of a run
    /// are not reproducible.
    Time(Duration),
}

/// `max * min(1, (t + 1) / warmup) * (1 + cos(pi * t / T)) / 2` at step t of T.
///
/// The warm-up is shortened to a tenth of a short run. By the clock, the fraction of the time that has passed takes the
/// place of t / T, and the warm-up ends after `warmup` steps or a tenth of the time, whichever comes first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Highest learning rate.
    pub max: f64,
    /// Steps of the warm-up.
    pub warmup: u64,
    /// When the learning rate reaches zero.
    pub length: Length,
}

impl Schedule {
    /// Learning rate of step `step`, counted from 0, `trained` after the start.
    pub fn rate(&self, step: u64, trained: Duration) -> f64 {
        let fraction = self.fraction(step, trained);
        let steps_done = (step + 1) as f64;
        let warm = match self.length {
            Length::Steps(steps) => steps_done / self.warmup.min(steps / 10).max(1) as f64,
            Length::Time(_) => (steps_done / self.warmup.max(1) as f64).max(10.0 * fraction),
        };
        // libm and not the platform's cosine: the same bits on every machine.
        self.max * warm.min(1.0) * (1.0 + libm::cos(PI * fraction)) / 2.0
    }

    /// The part of training that is over before step `step`, between 0 and 1.
    pub fn fraction(&self, step: u64, trained: Duration) -> f64 {
        let fraction = match self.length {
            Length::Steps(0) | Length::Time(Duration::ZERO) => 1.0,
            Length::Steps(steps) => step as f64 / steps as f64,
            Length::Time(time) => trained.as_secs_f64() / time.as_secs_f64(),
        };
        fraction.min(1.0)
    }

    /// Whether no step is left.
    pub fn is_over(&self, step: u64, trained: Duration) -> bool {
        match self.length {
            Length::Steps(steps) => step >= steps,
            Length::Time(time) => trained >= time,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_steps(steps: u64) -> Schedule {
        Schedule { max: 0.4, warmup: 100, length: Length::Steps(steps) }
    }

    fn rate(schedule: &Schedule, step: u64) -> f64 {
        schedule.rate(step, Duration::ZERO)
    }

    /// Values of the formula at its special angles; 1e-15 is a few roundings of numbers below 1.
    #[test]
    fn known_values() {
        let long = by_steps(120_000);
        // cos(pi * 0 / T) = 1: only the warm-up counts.
        assert!((rate(&long, 0) - 0.4 / 100.0).abs() <= 1e-15);
        // A third, half and two thirds of the way: cos = 1/2, 0, -1/2.
        assert!((rate(&long, 40_000) - 0.4 * 0.75).abs() <= 1e-15);
        assert!((rate(&long, 60_000) - 0.4 * 0.5).abs() <= 1e-15);
        assert!((rate(&long, 80_000) - 0.4 * 0.25).abs() <= 1e-15);
        assert_eq!(rate(&long, 120_000), 0.0);
        assert_eq!(rate(&long, 130_000), 0.0);
        // In the middle of the warm-up both factors count.
        let cosine = (1.0 + (PI * 49.0 / 120_000.0).cos()) / 2.0;
        assert!((rate(&long, 49) - 0.4 * 0.5 * cosine).abs() <= 1e-15);
    }

    #[test]
    fn warmup_of_a_short_run_is_a_tenth_of_it() {
        let short = by_steps(200);
        assert!((rate(&short, 0) - 0.4 / 20.0).abs() <= 1e-15);
        let cosine = |step: f64| (1.0 + (PI * step / 200.0).cos()) / 2.0;
        assert!((rate(&short, 19) - 0.4 * cosine(19.0)).abs() <= 1e-15);
        assert!((rate(&short, 20) - 0.4 * cosine(20.0)).abs() <= 1e-15);
        // Runs too short for a warm-up, and none at all.
        assert_eq!(rate(&by_steps(5), 0), 0.4);
        assert_eq!(rate(&Schedule { warmup: 0, ..by_steps(1000) }, 0), 0.4);
        assert!(rate(&by_steps(1), 0).is_finite() && rate(&by_steps(0), 0) == 0.0);
    }

    #[test]
    fn the_clock_drives_it() {
        let schedule = Schedule { max: 1.0, warmup: 100, length: Length::Time(Duration::from_secs(60)) };
        let seconds = Duration::from_secs_f64;
        assert_eq!(schedule.rate(0, Duration::ZERO), 0.01);
        // Few slow steps: the warm-up is over after a tenth of the time.
        assert!((schedule.rate(2, seconds(6.0)) - (1.0 + (PI * 0.1).cos()) / 2.0).abs() <= 1e-15);
        // Many fast steps: it is over after a hundred.
        assert!((schedule.rate(99, seconds(0.6)) - (1.0 + (PI * 0.01).cos()) / 2.0).abs() <= 1e-15);
        assert!((schedule.rate(5000, seconds(30.0)) - 0.5).abs() <= 1e-15);
        assert!(!schedule.is_over(1_000_000, seconds(59.9)) && schedule.is_over(1, seconds(60.0)));
    }

    #[test]
    fn steps_end_it() {
        assert!(!by_steps(10).is_over(9, Duration::MAX));
        assert!(by_steps(10).is_over(10, Duration::ZERO));
    }
}

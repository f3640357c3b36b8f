//! The configuration of training: the section `train` of `config.toml`.

use crate::error::{Error, Result};
use crate::schedule::{Length, Schedule};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Steps of training when neither steps nor epochs nor minutes are given: the paper's.
pub const DEFAULT_STEPS: u64 = 120_000;

/// More than any training has; products with a batch stay far below 2^64.
pub(crate) const MAX_STEPS: u64 = 1 << 40;
/// Images of a step, at most.
pub(crate) const MAX_BATCH: usize = 1 << 20;
/// Two decades.
const MAX_MINUTES: f64 = 1e7;

/// How to train. The defaults are the paper's for CIFAR-10, with a middling learning rate (it tunes it in 0.01 to 0.4).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Optimizer steps. Of `steps`, `epochs` and `minutes` at most one is given; without any it is [`DEFAULT_STEPS`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Passes over the training images, rounded up to whole steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<f64>,
    /// Minutes on the clock, evaluation included. The learning rate follows the clock, so two such runs differ in
    /// their bits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minutes: Option<f64>,
    /// Images of a step, over all micro-batches.
    pub batch: usize,
    /// Micro-batches of a step. Their gradients are averaged; batch normalisation sees only the images of one, and its
    /// running statistics take those of the last.
    pub accumulate: usize,
    /// Highest learning rate.
    pub lr: f64,
    /// Steps of the warm-up, at most a tenth of all.
    pub warmup: u64,
    /// Nesterov momentum.
    pub momentum: f64,
    /// Factor of the L2 penalty, on every parameter.
    pub weight_decay: f64,
    /// Random crop and flip of the training images (pretraining shifts none: see [`selfie_data::Augment::Unpadded`]).
    pub augment: bool,
    /// Seed of everything random in training: initial parameters, order, masks, crops, flips, dropout.
    pub seed: u64,
    /// Steps between two lines of metrics.
    pub log_every: u64,
    /// Steps between two checkpoints; 0 saves at the end only.
    pub save_every: u64,
    /// Steps between two evaluations; 0 evaluates at the end only.
    pub eval_every: u64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: None,
            epochs: None,
            minutes: None,
            batch: 512,
            accumulate: 1,
            lr: 0.1,
            warmup: 100,
            momentum: 0.9,
            weight_decay: 1e-4,
            augment: true,
            seed: 0,
            log_every: 10,
            save_every: 1000,
            eval_every: 1000,
        }
    }
}

impl TrainConfig {
    /// Keys below `train` that may differ when a run is continued; for the others a difference is an error.
    pub const MAY_CHANGE: [&str; 6] = ["steps", "epochs", "minutes", "log_every", "save_every", "eval_every"];

    /// Checks every value.
    ///
    /// # Errors
    /// [`Error::Usage`] with the key, the value and what is allowed.
    pub fn check(&self) -> Result<()> {
        let lengths = [self.steps.is_some(), self.epochs.is_some(), self.minutes.is_some()];
        if lengths.iter().filter(|&&given| given).count() > 1 {
            let given = format!("{:?}, {:?}, {:?}", self.steps, self.epochs, self.minutes);
            return Err(Error::usage("train.steps, train.epochs, train.minutes", given, "only one of the three"));
        }
        let positive = |key, value: f64| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => Err(Error::usage(key, value, "a number above 0")),
        };
        let from_one = |key, value: u64, most: u64| match (1..=most).contains(&value) {
            true => Ok(()),
            false => Err(Error::usage(key, value, format!("1 to {most}"))),
        };
        from_one("train.steps", self.steps.unwrap_or(1), MAX_STEPS)?;
        positive("train.epochs", self.epochs.unwrap_or(1.0))?;
        positive("train.minutes", self.minutes.unwrap_or(1.0))?;
        if let Some(minutes) = self.minutes.filter(|&minutes| minutes > MAX_MINUTES) {
            return Err(Error::usage("train.minutes", minutes, format!("at most {MAX_MINUTES}")));
        }
        from_one("train.batch", self.batch as u64, MAX_BATCH as u64)?;
        from_one("train.accumulate", self.accumulate as u64, MAX_BATCH as u64)?;
        from_one("train.log_every", self.log_every, u64::MAX)?;
        positive("train.lr", self.lr)?;
        if !(0.0..1.0).contains(&self.momentum) {
            return Err(Error::usage("train.momentum", self.momentum, "0 or more, and less than 1"));
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            return Err(Error::usage("train.weight_decay", self.weight_decay, "0 or more"));
        }
        if !self.batch.is_multiple_of(self.accumulate) {
            let expected = format!("a divisor of train.batch = {}", self.batch);
            return Err(Error::usage("train.accumulate", self.accumulate, expected));
        }
        Ok(())
    }

    /// Images of a micro-batch: the batch that the network is built for.
    pub fn micro_batch(&self) -> usize {
        self.batch / self.accumulate.max(1)
    }

    /// How long training on `images` images lasts.
    pub fn length(&self, images: usize) -> Length {
        match (self.minutes, self.epochs) {
            (Some(minutes), _) => Length::Time(Duration::from_secs_f64(60.0 * minutes)),
            (_, Some(epochs)) => Length::Steps((epochs * images as f64 / self.batch as f64).ceil() as u64),
            _ => Length::Steps(self.steps.unwrap_or(DEFAULT_STEPS)),
        }
    }

    /// The learning rate over training on `images` images.
    pub fn schedule(&self, images: usize) -> Schedule {
        Schedule { max: self.lr, warmup: self.warmup, length: self.length(images) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_the_papers() {
        let config = TrainConfig::default();
        config.check().expect("the defaults are right");
        assert_eq!(config.length(50_000), Length::Steps(120_000));
        assert_eq!((config.batch, config.momentum, config.weight_decay, config.warmup), (512, 0.9, 1e-4, 100));
    }

    #[test]
    fn epochs_and_minutes_give_the_length() {
        let epochs = TrainConfig { epochs: Some(1.0), batch: 512, ..Default::default() };
        assert_eq!(epochs.length(50_000), Length::Steps(98));
        let minutes = TrainConfig { minutes: Some(0.5), ..Default::default() };
        assert_eq!(minutes.length(50_000), Length::Time(Duration::from_secs(30)));
    }

    #[test]
    fn unknown_keys_are_refused_and_missing_ones_have_defaults() {
        let config: TrainConfig = serde_json::from_str(r#"{"batch": 8}"#).expect("valid");
        assert_eq!(config, TrainConfig { batch: 8, ..Default::default() });
        let error = serde_json::from_str::<TrainConfig>(r#"{"bacth": 8}"#).expect_err("misspelt");
        assert!(error.to_string().contains("bacth"), "{error}");
    }

    #[test]
    fn wrong_values_are_named() {
        let wrong = |config: TrainConfig| config.check().expect_err("wrong").to_string();
        let config = TrainConfig::default;
        assert!(wrong(TrainConfig { batch: 0, ..config() }).contains("train.batch"));
        assert!(wrong(TrainConfig { lr: f64::NAN, ..config() }).contains("train.lr"));
        assert!(wrong(TrainConfig { momentum: 1.0, ..config() }).contains("train.momentum"));
        assert!(wrong(TrainConfig { weight_decay: -1.0, ..config() }).contains("train.weight_decay"));
        assert!(wrong(TrainConfig { steps: Some(1), minutes: Some(1.0), ..config() }).contains("only one"));
        assert!(wrong(TrainConfig { minutes: Some(0.0), ..config() }).contains("train.minutes"));
        assert!(wrong(TrainConfig { minutes: Some(1e300), ..config() }).contains("train.minutes"));
        assert!(wrong(TrainConfig { steps: Some(1 << 63), ..config() }).contains("train.steps"));
        assert!(wrong(TrainConfig { batch: usize::MAX, ..config() }).contains("train.batch"));
        let accumulate = wrong(TrainConfig { batch: 100, accumulate: 3, ..config() });
        assert!(accumulate.contains("a divisor of train.batch = 100"), "{accumulate}");
    }

    #[test]
    fn what_may_change_are_keys() {
        let all = TrainConfig { steps: Some(1), epochs: Some(1.0), minutes: Some(1.0), ..Default::default() };
        let json = serde_json::to_value(all).expect("plain numbers");
        for key in TrainConfig::MAY_CHANGE {
            assert!(json.get(key).is_some(), "{key}");
        }
    }
}

//! What a person sees while it runs: a bar on a terminal, plain lines elsewhere, everything in the log as well.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use selfie_model::StepMetrics;

use crate::exit::printable;
use crate::screen::{self, PARTS};

/// Plain lines are at least this far apart.
const PLAIN_EVERY: Duration = Duration::from_secs(5);

/// The bar's numbers change at most this often: they are to be read.
const REDRAW_EVERY: Duration = Duration::from_millis(200);

/// To whom a reporter speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Voice {
    /// To the person and the log.
    Full,
    /// To the log; the person sees warnings and, on a terminal, the bar.
    Log,
}

/// Speaks to the person.
#[derive(Debug)]
pub struct Reporter {
    voice: Voice,
    terminal: bool,
    training: Option<Training>,
}

/// The bar of one training.
#[derive(Debug)]
struct Training {
    chance: f64,
    began: Instant,
    began_at: f64,
    last_line: Option<Instant>,
    /// Since the last line or redraw.
    recent: Recent,
}

/// Sums over a few steps, so that the numbers on the screen are calm.
#[derive(Debug, Default)]
struct Recent {
    steps: f64,
    images: f64,
    seconds: f64,
    loss: f64,
    accuracy: f64,
}

impl Reporter {
    /// Speaks on standard error.
    pub fn new(voice: Voice) -> Self {
        let terminal = std::io::stderr().is_terminal() && std::io::stdout().is_terminal();
        Self { voice, terminal, training: None }
    }

    /// Whether a person looks on.
    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// A line for the person and the log.
    pub fn say(&self, text: impl AsRef<str>) {
        tracing::info!("{}", text.as_ref().trim());
        if self.voice == Voice::Full {
            self.show(printable(text.as_ref()));
        }
    }

    /// A line that deserves attention.
    pub fn warn(&self, text: impl AsRef<str>) {
        tracing::warn!("{}", text.as_ref());
        self.show(format!("note: {}", printable(text.as_ref())));
    }

    /// A line for the person alone.
    pub fn show(&self, text: impl AsRef<str>) {
        screen::line(text.as_ref());
    }

    /// Begins a training that stands at `fraction`; `chance` is the accuracy of guessing.
    pub fn begin(&mut self, name: &str, fraction: f64, chance: f64) {
        if self.terminal {
            screen::begin_bar(name);
            screen::move_bar(position(fraction), String::new());
        }
        self.training = Some(Training {
            chance,
            began: Instant::now(),
            began_at: fraction,
            last_line: None,
            recent: Recent::default(),
        });
    }

    /// A step was done, and training now stands at `fraction`.
    pub fn step(&mut self, step: &StepMetrics, fraction: f64) {
        let terminal = self.terminal;
        let Some(training) = &mut self.training else { return };
        let recent = &mut training.recent;
        recent.steps += 1.0;
        recent.images += step.images as f64;
        recent.seconds += step.seconds;
        recent.loss += step.loss;
        recent.accuracy += step.accuracy;
        let due = |since: Duration| training.last_line.is_none_or(|last| last.elapsed() >= since);
        if !due(if terminal { REDRAW_EVERY } else { PLAIN_EVERY }) && fraction < 1.0 {
            return;
        }
        training.last_line = Some(Instant::now());
        let (left, numbers) = training.describe(fraction);
        training.recent = Recent::default();
        let StepMetrics { step, epoch, .. } = *step;
        if terminal {
            screen::move_bar(position(fraction), format!("{left} left  {numbers}  step {step}  epoch {epoch:.1}"));
        } else if self.voice == Voice::Full {
            screen::line(format!("step {step}  epoch {epoch:.1}  {numbers}  {left} left"));
        }
    }

    /// The training ended.
    pub fn end(&mut self) {
        if self.training.take().is_some() {
            screen::end_bar();
        }
    }
}

impl Training {
    /// The time that is left, and the means over the last few steps.
    fn describe(&self, fraction: f64) -> (String, String) {
        let Recent { steps, images, seconds, loss, accuracy } = self.recent;
        let accuracy = accuracy / steps;
        let done = fraction - self.began_at;
        let elapsed = self.began.elapsed().as_secs_f64();
        let left = if done > 0.0 { duration(elapsed * (1.0 - fraction) / done) } else { "?".into() };
        let numbers = format!(
            "loss {:.3}  accuracy {:.1}% ({:.1} x chance)  {:.0} images/s",
            loss / steps,
            100.0 * accuracy,
            accuracy / self.chance,
            images / seconds
        );
        (left, numbers)
    }
}

/// One pass over images: a bar on a terminal, plain lines elsewhere if it takes long.
#[derive(Debug)]
pub struct Pass {
    terminal: bool,
    began: Instant,
    last_line: Instant,
}

impl Pass {
    /// Begins a pass, to be told of where `reporter` speaks.
    pub fn begin(reporter: &Reporter, name: &str) -> Self {
        if reporter.terminal {
            screen::begin_bar(name);
        }
        let now = Instant::now();
        Self { terminal: reporter.terminal, began: now, last_line: now }
    }

    /// The pass stands at `done` of `total` images.
    pub fn at(&mut self, done: usize, total: usize) {
        let every = if self.terminal { REDRAW_EVERY } else { PLAIN_EVERY };
        if self.last_line.elapsed() < every || done == 0 {
            return;
        }
        self.last_line = Instant::now();
        let elapsed = self.began.elapsed().as_secs_f64();
        let left = duration(elapsed * (total - done) as f64 / done as f64);
        let rate = done as f64 / elapsed;
        let message = format!("{left} left  {} of {} images  {rate:.0} images/s", grouped(done), grouped(total));
        if self.terminal {
            screen::move_bar(position(done as f64 / total as f64), message);
        } else {
            screen::line(message);
        }
    }

    /// The pass ended; gives the seconds it took.
    pub fn end(self) -> f64 {
        if self.terminal {
            screen::end_bar();
        }
        self.began.elapsed().as_secs_f64()
    }
}

/// The place of a bar: training may be measured by the clock.
fn position(fraction: f64) -> u64 {
    (fraction * PARTS as f64) as u64
}

/// Seconds as `1h02m`, `2m05s` or `7s`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round().max(0.0) as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s:02}s"),
        (h, m, _) => format!("{h}h{m:02}m"),
    }
}

/// 1234567 as `1,234,567`.
pub fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        let texts = [0.4, 59.6, 125.0, 3720.0].map(duration);
        assert_eq!(texts, ["0s", "1m00s", "2m05s", "1h02m"]);
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!([7, 1234, 25_549_352].map(grouped), ["7", "1,234", "25,549,352"]);
    }
}

//! What a device did, pass by pass, and how long each took.
//!
//! A device that is [`Profile::profiled`] marks the time before and behind every pass. On a GPU the marks are events of its
//! queue: they stand in a recorded step, too, so that what is timed is the step as it is trained, without the host; but
//! that no pass begins beside the end of the one before, as an event waits for whole kernels.

use crate::{Cost, Memory, Result};
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A device that can say what it did.
pub trait Profile: Memory {
    /// The same device, with the same memory and the same queue, that notes each pass from here on. What was recorded
    /// before by [`Memory::repeat`] has no marks.
    #[must_use]
    fn profiled(&self) -> Self;
    /// The passes of the last work that [`Memory::repeat`] did or did again, and those called since, in their order; waits
    /// for them. None on a device that is not profiled.
    ///
    /// # Errors
    /// Those of the device.
    fn calls(&self) -> Result<Vec<Call>>;
}

/// A call of a pass.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// The pass, by its name in the contract, as `norm_relu_conv_forward`.
    pub pass: &'static str,
    /// What it must do at least.
    pub cost: Cost,
    /// The kernel that was taken, where there was more than one.
    pub choice: Option<Choice>,
    /// When it began, in seconds since the first of the calls did.
    pub begin: f64,
    /// When it ended.
    pub end: f64,
}

/// What there was to choose from, for a call of a pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// What the choice depends on, as `bf16 3x3 64->64 at 56x56, 256 images`.
    pub shape: String,
    /// The names of all variants that take it, at least two, the rule's first.
    pub variants: Vec<String>,
    /// Which one was taken.
    pub taken: usize,
}

impl Call {
    /// How long it took.
    pub fn seconds(&self) -> f64 {
        self.end - self.begin
    }
}

/// Points of a device's queue, and when the device passed them.
pub(crate) trait Timeline: fmt::Debug + Send + Sync {
    /// Sets the next point, behind what was queued before. Of a point inside of a recording the last replay counts.
    fn mark(&self) -> Result<()>;
    /// Begins anew.
    fn clear(&self);
    /// Seconds from the first point to each, after everything queued.
    fn seconds(&self) -> Result<Vec<f64>>;
}

/// The passes of a device, between two points each.
#[derive(Debug)]
pub(crate) struct Log {
    timeline: Box<dyn Timeline>,
    passes: Mutex<Vec<Noted>>,
}

#[derive(Debug, Clone)]
struct Noted {
    pass: &'static str,
    cost: Cost,
    choice: Option<Choice>,
}

impl Log {
    pub(crate) fn new(timeline: Box<dyn Timeline>) -> Self {
        Self { timeline, passes: Mutex::default() }
    }

    fn passes(&self) -> MutexGuard<'_, Vec<Noted>> {
        self.passes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Other work begins.
    pub(crate) fn clear(&self) {
        self.timeline.clear();
        self.passes().clear();
    }

    /// Does a pass between two marks.
    pub(crate) fn note(&self, pass: &'static str, cost: Cost, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.passes().push(Noted { pass, cost, choice: None });
        self.timeline.mark()?;
        let worked = work();
        self.timeline.mark()?;
        worked
    }

    /// What the pass that is under way chose.
    pub(crate) fn chosen(&self, choice: Choice) {
        if let Some(pass) = self.passes().last_mut() {
            pass.choice = Some(choice);
        }
    }

    pub(crate) fn calls(&self) -> Result<Vec<Call>> {
        let seconds = self.timeline.seconds()?;
        let passes = self.passes().clone();
        let calls = passes.into_iter().zip(seconds.chunks_exact(2));
        let call = |(Noted { pass, cost, choice }, points): (Noted, &[f64])| {
            let [begin, end] = [points[0], points[1]];
            Call { pass, cost, choice, begin, end }
        };
        Ok(calls.map(call).collect())
    }
}

#[cfg(test)]
mod tests {
    use crate::sgd::{Accumulate, Sgd};
    use crate::testing::*;

    on_every_device! {
        once: the_last_work_is_noted;
    }

    /// `total += gradient`, so many calls, four times: plainly, recorded, and again.
    fn work<D: Tested<f32>>(device: &D, gradient: &Guarded<D, f32>, total: &mut Guarded<D, f32>, calls: usize) {
        let mut recording = None;
        for _ in 0..4 {
            let work = || {
                (0..calls).try_for_each(|_| {
                    let (gradient, total) = (gradient.view(), total.view_mut());
                    Sgd::<f32>::gradient_accumulate(device, Accumulate { scale: 1.0, gradient, total })
                })
            };
            device.repeat(&mut recording, work).expect("lengths agree");
        }
    }

    fn the_last_work_is_noted<D: Tested<f32>>() {
        let plain = &D::own();
        let device = plain.profiled();
        let gradient = Guarded::new(&device, &[1.0; 100]);
        let mut total = Guarded::new(&device, &[0.0; 100]);
        // Two works, one after the other: the second is what is asked for, done the fourth time. The plain device notes none.
        for (calls, sum) in [(3, 12.0), (2, 20.0)] {
            work(&device, &gradient, &mut total, calls);
            work(plain, &gradient, &mut total, 0);
            assert_eq!(total.read(plain), [sum; 100]);
            let noted = device.calls().expect("it is done");
            assert_eq!(noted.len(), calls);
            let points: Vec<f64> = noted.iter().flat_map(|call| [call.begin, call.end]).collect();
            assert!(points[0] == 0.0 && points.is_sorted() && points[1] > 0.0, "{points:?}");
            for call in noted {
                assert_eq!((call.pass, call.cost.flops, call.cost.bytes), ("gradient_accumulate", 0, 4 * 300));
            }
            assert_eq!(plain.calls(), Ok(Vec::new()));
        }
    }
}

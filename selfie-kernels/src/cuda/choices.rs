//! Which of several kernels does a pass of a shape: a rule of the launcher decides, unless a table names the one that was
//! measured to be the fastest.
//!
//! Kernels that may stand for each other take the same arguments, cut partial sums alike and need no more than the workspace.
//! Each gives the same bits every time, but not those of another: so a run keeps its table.

use super::Cuda;
use crate::Choice;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// How a device chooses kernels where its rules are not to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choices {
    /// By the names of pass and shape, as [`Choice`] has them, the name of the variant to take; rules decide over the rest.
    Table(BTreeMap<String, BTreeMap<String, String>>),
    /// Of every pass and shape the variant of this number, counted around: to try them all.
    Number(usize),
}

/// An entry of a table that names no variant of its shape: the rule's was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misfit {
    /// Of the contract, as `norm_relu_conv_forward`.
    pub pass: &'static str,
    /// As [`Choice::shape`].
    pub shape: String,
    /// What the table says.
    pub named: String,
}

/// The choices of a device, and whom it tells of the first misfit.
pub(super) struct Chooser {
    choices: Choices,
    on_misfit: Box<dyn Fn(Misfit) + Send + Sync>,
    told: AtomicBool,
}

impl fmt::Debug for Chooser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.choices.fmt(f)
    }
}

impl Chooser {
    /// The number of the variant to take; 0 is the rule's.
    fn pick(&self, pass: &'static str, shape: &str, variants: &[String]) -> usize {
        let table = match &self.choices {
            Choices::Number(number) => return number % variants.len(),
            Choices::Table(table) => table,
        };
        let Some(named) = table.get(pass).and_then(|shapes| shapes.get(shape)) else { return 0 };
        variants.iter().position(|variant| variant == named).unwrap_or_else(|| {
            if !self.told.swap(true, Ordering::Relaxed) {
                (self.on_misfit)(Misfit { pass, shape: shape.into(), named: named.clone() });
            }
            0
        })
    }
}

impl Cuda {
    /// The same device, with the same memory and the same queue, that chooses so from here on, but for what is recorded
    /// already. The first misfit of a table is told.
    #[must_use]
    pub fn with_choices(&self, choices: Choices, on_misfit: impl Fn(Misfit) + Send + Sync + 'static) -> Self {
        let chooser = Chooser { choices, on_misfit: Box::new(on_misfit), told: AtomicBool::new(false) };
        Self { chooser: Some(Arc::new(chooser)), ..self.clone() }
    }

    /// What does a pass of a shape: the rule's variant, or another of all those that would do it, too. They are known by
    /// their names, so the rule's may be among them.
    pub(crate) fn choose<V>(
        &self,
        pass: &'static str,
        shape: impl FnOnce() -> String,
        rule: V,
        all: impl IntoIterator<Item = V>,
        name: impl Fn(&V) -> String,
    ) -> V {
        if self.chooser.is_none() && self.log.is_none() {
            return rule;
        }
        let (mut kernels, mut variants) = (Vec::new(), Vec::new());
        for kernel in std::iter::once(rule).chain(all) {
            let name = name(&kernel);
            if !variants.contains(&name) {
                kernels.push(kernel);
                variants.push(name);
            }
        }
        let shape = shape();
        let taken = self.chooser.as_ref().map_or(0, |chooser| chooser.pick(pass, &shape, &variants));
        if let Some(log) = &self.log
            && variants.len() > 1
        {
            log.chosen(Choice { shape, variants, taken });
        }
        kernels.swap_remove(taken)
    }
}

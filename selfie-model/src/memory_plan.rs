//! The memory of a network as a table, known before the first byte is asked for.
//!
//! Every buffer is allocated through a [`Ledger`]. The plan is the ledger of a construction on a device that holds
//! nothing ([`Dry`]), so plan and allocation are the same code.

use selfie_kernels::{Memory, Result, Scalar};
use std::convert::Infallible;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Buffers of a network, in the order of their allocation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MemoryPlan {
    rows: Vec<(String, usize)>,
    /// Bytes of the largest parameter in the master copy.
    largest_parameter: usize,
}

impl MemoryPlan {
    /// Name and bytes of every buffer; names are dotted paths.
    pub fn rows(&self) -> &[(String, usize)] {
        &self.rows
    }

    /// With a row for what the device itself takes, see [`Memory::workspace_bytes`].
    #[must_use]
    pub fn with_workspace(mut self, device: &impl Memory) -> Self {
        self.rows.push(("workspace".into(), device.workspace_bytes(self.largest_parameter)));
        self
    }

    /// With the rows of another network that is there at the same time, under this name.
    #[must_use]
    pub fn beside(mut self, name: &str, other: &MemoryPlan) -> Self {
        self.rows.extend(other.rows.iter().map(|(row, bytes)| (format!("{name}.{row}"), *bytes)));
        self
    }

    /// Sum of all rows, or the largest number if it is more.
    pub fn total_bytes(&self) -> usize {
        self.rows.iter().fold(0, |sum, (_, bytes)| sum.saturating_add(*bytes))
    }

    /// The rows summed by the first component of their names, in order of first appearance.
    pub fn summary(&self) -> Vec<(&str, usize)> {
        let mut groups: Vec<(&str, usize)> = Vec::new();
        for (name, bytes) in &self.rows {
            let group = name.split('.').next().unwrap_or(name);
            match groups.iter_mut().find(|(known, _)| *known == group) {
                Some((_, sum)) => *sum = sum.saturating_add(*bytes),
                None => groups.push((group, *bytes)),
            }
        }
        groups
    }
}

/// The summary as a table in MiB, the total last.
impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, bytes) in self.summary().into_iter().chain([("total", self.total_bytes())]) {
            writeln!(f, "{name:<16} {:>12.1} MiB", bytes as f64 / (1 << 20) as f64)?;
        }
        Ok(())
    }
}

/// Allocates and writes down.
pub(crate) struct Ledger<M: Memory> {
    device: Arc<M>,
    scope: String,
    plan: MemoryPlan,
}

impl<M: Memory> Ledger<M> {
    pub(crate) fn new(device: impl Into<Arc<M>>) -> Self {
        Self { device: device.into(), scope: String::new(), plan: MemoryPlan::default() }
    }

    /// Where the buffers are.
    pub(crate) fn device(&self) -> Arc<M> {
        self.device.clone()
    }

    /// What is allocated from here on belongs to `scope`.
    pub(crate) fn scope(&mut self, scope: impl Into<String>) {
        self.scope = scope.into();
    }

    /// `len` zeroed elements.
    pub(crate) fn alloc<S: Scalar>(&mut self, name: &str, len: usize) -> Result<M::Buffer<S>> {
        if len > 0 {
            self.plan.rows.push((format!("{}.{name}", self.scope), len.saturating_mul(size_of::<S>())));
        }
        self.device.alloc(len)
    }

    /// Says how large the largest parameter is.
    pub(crate) fn largest_parameter(&mut self, bytes: usize) {
        self.plan.largest_parameter = bytes;
    }

    pub(crate) fn into_plan(self) -> MemoryPlan {
        self.plan
    }
}

/// A device without memory: every buffer is empty.
#[derive(Debug)]
pub(crate) struct Dry;

impl Memory for Dry {
    type Buffer<S: Scalar> = Vec<S>;
    type View<'a, S: Scalar> = &'a [S];
    type ViewMut<'a, S: Scalar> = &'a mut [S];
    type Recording = Infallible;

    fn describe(&self) -> String {
        "nothing".into()
    }
    fn capacity(&self) -> Option<usize> {
        None
    }
    fn workspace_bytes(&self, _largest: usize) -> usize {
        0
    }
    fn alloc<S: Scalar>(&self, _len: usize) -> Result<Vec<S>> {
        Ok(Vec::new())
    }
    fn len<S: Scalar>(buffer: &Vec<S>) -> usize {
        buffer.len()
    }
    fn view<S: Scalar>(buffer: &Vec<S>, range: Range<usize>) -> &[S] {
        &buffer[range]
    }
    fn view_mut<S: Scalar>(buffer: &mut Vec<S>, range: Range<usize>) -> &mut [S] {
        &mut buffer[range]
    }
    fn split_at<'a, S: Scalar>(view: Self::ViewMut<'a, S>, at: usize) -> (Self::ViewMut<'a, S>, Self::ViewMut<'a, S>) {
        view.split_at_mut(at)
    }
    fn upload<S: Scalar>(&self, _host: &[S], _device: &mut [S]) -> Result<()> {
        Ok(())
    }
    fn stage<S: Scalar>(&self, _host: &[S], _device: &mut [S]) -> Result<()> {
        Ok(())
    }
    fn copy<S: Scalar>(&self, _from: &[S], _to: &mut [S]) -> Result<()> {
        Ok(())
    }
    fn download<S: Scalar>(&self, _device: &[S], _host: &mut [S]) -> Result<()> {
        Ok(())
    }
    fn zero<S: Scalar>(&self, _device: &mut [S]) -> Result<()> {
        Ok(())
    }
    fn sync(&self) -> Result<()> {
        Ok(())
    }
    fn repeat(&self, _recording: &mut Option<Infallible>, work: impl FnOnce() -> Result<()>) -> Result<()> {
        work()
    }
}

//! Flat storage: one buffer each for parameters, their copy in `T`, gradients and momenta, and a table of names.

use crate::Purpose;
use crate::memory_plan::Ledger;
use selfie_kernels::{Element, Memory, Result};
use std::ops::Range;

/// How a tensor lies in the flat buffer, against the shape it has in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// As in the file, row-major.
    Plain,
    /// A filter: `[k, r, s, c]` here, `[k, c, r, s]` (PyTorch's) in the file.
    Filter,
}

/// One named tensor of a flat buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Name in the checkpoint: timm's for the backbone, `pool.*` for what timm has no place for.
    pub name: String,
    /// Shape in the file.
    pub shape: Vec<usize>,
    /// How it lies here.
    pub layout: Layout,
    /// Where it lies here.
    pub range: Range<usize>,
}

/// Tensors begin at multiples of so many elements: 256 bytes, what a GPU's widest copies ask for, in the narrowest of the
/// types that they are kept in.
pub(crate) const ALIGNMENT: usize = 256 / size_of::<half::bf16>();

/// Names and places of the tensors of a flat buffer, in order, each at a multiple of 256 bytes or directly behind the one
/// before. What lies between is zero and stays so: no gradient is ever written there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table {
    entries: Vec<Entry>,
}

impl Table {
    /// Appends a tensor and returns its place.
    pub fn push(&mut self, name: impl Into<String>, shape: &[usize], layout: Layout) -> Range<usize> {
        self.push_at(self.len(), name.into(), shape, layout)
    }

    /// The same, directly behind the tensor before: operations read both as one.
    pub fn push_behind(&mut self, name: impl Into<String>, shape: &[usize], layout: Layout) -> Range<usize> {
        self.push_at(self.end(), name.into(), shape, layout)
    }

    fn push_at(&mut self, start: usize, name: String, shape: &[usize], layout: Layout) -> Range<usize> {
        let range = start..start + shape.iter().product::<usize>();
        self.entries.push(Entry { name, shape: shape.to_vec(), layout, range: range.clone() });
        range
    }

    /// The tensors in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Elements of the flat buffer, whole multiples of 256 bytes.
    pub fn len(&self) -> usize {
        self.end().next_multiple_of(ALIGNMENT)
    }

    fn end(&self) -> usize {
        self.entries.last().map_or(0, |entry| entry.range.end)
    }

    /// Elements of the tensors themselves.
    pub fn elements(&self) -> usize {
        self.entries.iter().map(Entry::len).sum()
    }

    /// Whether there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name == name)
    }
}

/// The parameters of a network and what training keeps of each.
#[derive(Debug)]
pub struct Parameters<B: Memory, T: Element> {
    /// Names and places.
    pub table: Table,
    /// The parameters.
    pub master: B::Buffer<T::Wide>,
    /// The same, rounded to `T`: what convolutions and linear layers read.
    pub copy: B::Buffer<T>,
    /// Gradient of the last step; empty where the network was built for evaluation.
    pub gradient: B::Buffer<T::Wide>,
    /// Momenta; empty where the network was built for evaluation.
    pub velocity: B::Buffer<T::Wide>,
}

/// Running statistics of all batch normalisations: for each `running_mean`, then `running_var`.
#[derive(Debug)]
pub struct Statistics<B: Memory, W: Element> {
    /// Names and places.
    pub table: Table,
    /// What evaluation normalises with.
    pub running: B::Buffer<W>,
    /// Of the last batch, same layout.
    pub batch: B::Buffer<W>,
}

impl Entry {
    /// Elements of the tensor.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The tensor in the order of the file, from its part of the flat buffer.
    pub fn to_file<S: Copy>(&self, flat: &[S]) -> Vec<S> {
        self.file_order().map(|i| flat[i]).collect()
    }

    /// The tensor's part of the flat buffer, from the order of the file.
    pub fn from_file<S: Copy + Default>(&self, file: &[S]) -> Vec<S> {
        let mut flat = vec![S::default(); self.len()];
        for (&value, i) in file.iter().zip(self.file_order()) {
            flat[i] = value;
        }
        flat
    }

    /// For each element in the order of the file, its place in the flat buffer relative to the tensor's start.
    fn file_order(&self) -> impl Iterator<Item = usize> + use<> {
        let (channels, taps) = match self.layout {
            Layout::Plain => (1, 1),
            Layout::Filter => (self.shape[1], self.shape[2] * self.shape[3]),
        };
        let filter = channels * taps;
        (0..self.len()).map(move |i| {
            let (k, c, tap) = (i / filter, i % filter / taps, i % taps);
            k * filter + tap * channels + c
        })
    }
}

impl<B: Memory, T: Element> Parameters<B, T> {
    /// Zeroed storage for a table.
    pub(crate) fn new(ledger: &mut Ledger<B>, table: Table, purpose: Purpose) -> Result<Self> {
        let len = table.len();
        let trained = purpose.trained(len);
        let largest = table.entries().iter().map(Entry::len).max().unwrap_or(0);
        ledger.largest_parameter(largest.saturating_mul(size_of::<T::Wide>()));
        ledger.scope("parameters");
        Ok(Self {
            table,
            master: ledger.alloc("master", len)?,
            copy: ledger.alloc("copy", len)?,
            gradient: ledger.alloc("gradient", trained)?,
            velocity: ledger.alloc("velocity", trained)?,
        })
    }
}

impl<B: Memory, W: Element> Statistics<B, W> {
    /// Zeroed storage for a table.
    pub(crate) fn new(ledger: &mut Ledger<B>, table: Table) -> Result<Self> {
        let len = table.len();
        ledger.scope("statistics");
        Ok(Self { table, running: ledger.alloc("running", len)?, batch: ledger.alloc("batch", len)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_travels_both_ways() {
        let mut table = Table::default();
        table.push("before", &[5], Layout::Plain);
        table.push_behind("beside", &[3], Layout::Plain);
        table.push("filter", &[2, 3, 1, 2], Layout::Filter);
        let entry = table.get("filter").expect("pushed above");
        // [k, s, c] here: 10 * s + c, and 100 for k = 1.
        let flat = [0, 1, 2, 10, 11, 12, 100, 101, 102, 110, 111, 112];
        let file = entry.to_file(&flat);
        assert_eq!(file, [0, 10, 1, 11, 2, 12, 100, 110, 101, 111, 102, 112]);
        assert_eq!(entry.from_file(&file), flat);
        assert_eq!(entry.range, 128..140);
        assert_eq!(table.get("beside").expect("pushed above").range, 5..8);
        assert_eq!((table.len(), table.elements()), (256, 20));
    }
}

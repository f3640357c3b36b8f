//! Small square images, whole in memory: what CIFAR and the downsampled ImageNet share.

use std::path::{Path, PathBuf};

use crate::dataset::{Dataset, Geometry, Split};
use crate::error::{Error, Result};
use crate::pickle::Pickle;
use crate::picture::Image;

/// What the records of a data set look like.
pub(crate) struct Layout {
    /// Name of the labels where they have one.
    pub(crate) labels: &'static str,
    /// Label of the first class.
    pub(crate) first_label: i64,
    pub(crate) classes: usize,
    /// Sides that images may have; all have the same.
    pub(crate) sides: &'static [usize],
}

impl Layout {
    /// Class of a label, counted from 0.
    pub(crate) fn class(&self, label: i64) -> Option<u16> {
        let class = label.checked_sub(self.first_label)?;
        u16::try_from(class).ok().filter(|class| usize::from(*class) < self.classes)
    }

    /// Side of images of so many bytes, or what was expected.
    pub(crate) fn side(&self, row_bytes: usize) -> std::result::Result<usize, String> {
        self.sides.iter().copied().find(|side| 3 * side * side == row_bytes).ok_or_else(|| {
            let bytes: Vec<_> = self.sides.iter().map(|side| (3 * side * side).to_string()).collect();
            format!("images of {} bytes", bytes.join(" or "))
        })
    }

    pub(crate) fn label_range(&self) -> String {
        format!("a label from {} to {}", self.first_label, self.first_label + self.classes as i64 - 1)
    }
}

/// The records of one file.
#[derive(Debug, PartialEq)]
pub(crate) struct Batch {
    name: String,
    side: usize,
    /// Classes, counted from 0.
    labels: Vec<u16>,
    /// [n, side, side, 3]
    pixels: Vec<u8>,
}

impl Batch {
    pub(crate) fn new(name: &str, side: usize) -> Self {
        Self { name: name.into(), side, labels: Vec::new(), pixels: Vec::new() }
    }

    /// Makes room for records, which must be known to be there.
    pub(crate) fn reserve(&mut self, records: usize) {
        self.labels.reserve_exact(records);
        self.pixels.reserve_exact(records * 3 * self.side * self.side);
    }

    pub(crate) fn len(&self) -> usize {
        self.labels.len()
    }

    pub(crate) fn side(&self) -> usize {
        self.side
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Adds a record: planes R, G, B, row-major, [3, side, side].
    pub(crate) fn push(&mut self, class: u16, planes: &[u8]) {
        self.labels.push(class);
        let (red, rest) = planes.split_at(self.side * self.side);
        let (green, blue) = rest.split_at(self.side * self.side);
        self.pixels.extend(red.iter().zip(green).zip(blue).flat_map(|((&r, &g), &b)| [r, g, b]));
    }

    /// The records of a pickled dict of `data`, u8 [n, 3 * side * side], and labels.
    ///
    /// # Errors
    /// [`Error::Malformed`] that names `origin` and the batch.
    pub(crate) fn from_pickle(origin: &Path, name: &str, bytes: &[u8], layout: &Layout) -> Result<Self> {
        let malformed = |expected: String, found: String| {
            Error::malformed(origin, expected, found, "take the data as they were published")
        };
        let pickle = Pickle::read(bytes)
            .map_err(|found| malformed(format!("a pickle of plain values and numpy arrays in {name}"), found))?;
        let missing = |key: &str| {
            let expected =
                format!("a dict with `data` (bytes, [n, 3 * side * side]) and `{}` (n numbers)", layout.labels);
            malformed(format!("{expected} in {name}"), format!("none such as `{key}` in {}", pickle.keys()))
        };
        let data = pickle.get("data").and_then(|data| pickle.byte_array(&data));
        let data = data.filter(|data| data.shape.len() == 2).ok_or_else(|| missing("data"))?;
        let labels = pickle.get(layout.labels).and_then(|labels| pickle.integers(&labels));
        let labels = labels.ok_or_else(|| missing(layout.labels))?;
        let (rows, row_bytes) = (data.shape[0], data.shape[1]);
        let side = layout
            .side(row_bytes)
            .map_err(|expected| malformed(format!("{expected} in {name}"), format!("{row_bytes} bytes each")))?;
        if rows != labels.len() || rows == 0 {
            let found = format!("{rows} images and {} labels", labels.len());
            return Err(malformed(format!("a label for each image in {name}"), found));
        }
        let mut batch = Self::new(name, side);
        batch.reserve(rows);
        for (record, (label, planes)) in labels.iter().zip(data.data.chunks_exact(row_bytes)).enumerate() {
            let class = layout.class(*label).ok_or_else(|| {
                malformed(format!("{} in record {record} of {name}", layout.label_range()), label.to_string())
            })?;
            batch.push(class, planes);
        }
        Ok(batch)
    }
}

/// A split, whole in memory. Files stay apart, so that none is ever copied to make room.
#[derive(Debug)]
pub(crate) struct Records {
    name: String,
    split: Split,
    origin: PathBuf,
    classes: Vec<String>,
    batches: Vec<Batch>,
    /// Index of the first image of every batch.
    starts: Vec<usize>,
    len: usize,
}

impl Records {
    /// `batches` are not empty, and images of all have one size.
    pub(crate) fn new(name: String, split: Split, origin: PathBuf, classes: Vec<String>, batches: Vec<Batch>) -> Self {
        let mut len = 0;
        let mut starts = Vec::with_capacity(batches.len());
        for batch in &batches {
            starts.push(len);
            len += batch.len();
        }
        Self { name, split, origin, classes, batches, starts, len }
    }

    /// The batch of an image, and its place in there.
    fn place(&self, index: usize) -> (&Batch, usize) {
        let batch = self.starts.partition_point(|start| *start <= index) - 1;
        (&self.batches[batch], index - self.starts[batch])
    }

    fn side(&self) -> usize {
        self.batches[0].side
    }

    fn pixels(&self, index: usize) -> &[u8] {
        let (batch, record) = self.place(index);
        let bytes = 3 * batch.side * batch.side;
        &batch.pixels[record * bytes..][..bytes]
    }
}

impl Dataset for Records {
    fn len(&self) -> usize {
        self.len
    }

    fn describe(&self) -> String {
        let split = match self.split {
            Split::Train => "training",
            Split::Test => "test",
        };
        let side = self.side();
        let classes = self.classes.len();
        format!(
            "{}, {} {split} images, {side} x {side}, {classes} classes ({})",
            self.name,
            self.len,
            self.origin.display()
        )
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> Option<u32> {
        let (batch, record) = self.place(index);
        Some(u32::from(batch.labels[record]))
    }

    fn geometry(&self) -> Geometry {
        Geometry::Fixed { height: self.side(), width: self.side() }
    }

    fn key(&self, index: usize) -> String {
        let (batch, record) = self.place(index);
        format!("{}:{record}", batch.name)
    }

    fn read(&self, index: usize) -> Result<Image> {
        Ok(Image { height: self.side(), width: self.side(), pixels: self.pixels(index).to_vec() })
    }

    fn read_into(&self, index: usize, pixels: &mut [u8]) -> Result<()> {
        pixels.copy_from_slice(self.pixels(index));
        Ok(())
    }
}

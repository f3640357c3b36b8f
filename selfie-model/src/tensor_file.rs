//! Named tensors in safetensors files, and how they lie in flat buffers.
//!
//! In a file every tensor has PyTorch's name, shape and order of elements; [`Layout`] says what it takes to get there.

use crate::error::{Error, Result, reading};
use crate::parameters::{Entry, Layout, Table};
use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors, TensorView, View};
use selfie_data::Foreign;
use selfie_kernels::Wide;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

#[cfg(target_endian = "big")]
compile_error!("safetensors files are little-endian, and tensors are written as they lie in memory");

/// The tensors of a file, in a type of computation.
#[derive(Debug, Clone)]
pub struct TensorFile<W> {
    path: PathBuf,
    tensors: BTreeMap<String, Tensor<W>>,
    others: BTreeMap<String, Other>,
}

/// A tensor that is no numbers to compute with, such as a counter: known by name, in case someone needs it.
#[derive(Debug, Clone)]
struct Other {
    shape: Vec<usize>,
    dtype: Dtype,
}

#[derive(Debug, Clone)]
struct Tensor<W> {
    shape: Vec<usize>,
    data: Vec<W>,
}

impl<W: Wide> TensorFile<W> {
    /// Reads the tensors of a file that are f16, bf16, f32 or f64; of those of another type the names, as a network may
    /// have no use for them. PyTorch's integer counters of batches are left out.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::Malformed`] for anything but such a file.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(reading(path))?;
        Self::parse(path, &bytes)
    }

    /// The same from the contents of `path`.
    pub(crate) fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let file = SafeTensors::deserialize(bytes).map_err(|error| not_safetensors(path, bytes, &error))?;
        Ok(Self::from_safetensors(path, &file, |name| !name.ends_with("num_batches_tracked")))
    }

    /// The tensors of a file whose names are to be kept.
    pub(crate) fn from_safetensors(path: &Path, file: &SafeTensors<'_>, keep: impl Fn(&str) -> bool) -> Self {
        let (mut tensors, mut others) = (BTreeMap::new(), BTreeMap::new());
        for (name, view) in file.iter().filter(|(name, _)| keep(name)) {
            let shape = view.shape().to_vec();
            match numbers(&view) {
                Some(data) => drop(tensors.insert(name.to_string(), Tensor { shape, data })),
                None => drop(others.insert(name.to_string(), Other { shape, dtype: view.dtype() })),
            }
        }
        Self { path: path.into(), tensors, others }
    }

    /// Where it was read.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names and shapes, sorted by name.
    pub fn shapes(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.shape.as_slice()))
    }

    /// Names, shapes and types of the tensors of another type, which are passed over, sorted by name.
    pub fn others(&self) -> impl Iterator<Item = (&str, &[usize], String)> {
        self.others.iter().map(|(name, other)| (name.as_str(), other.shape.as_slice(), format!("{:?}", other.dtype)))
    }

    /// Shape of a tensor, if the file has it.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|tensor| tensor.shape.as_slice())
    }

    /// Copies the tensor `name` to the place of `entry` in `flat`.
    ///
    /// # Errors
    /// [`Error::OtherNetwork`] when there is none, or its shape is not `entry`'s; [`Error::Malformed`] when its type is
    /// none of those that are read.
    pub(crate) fn place(&self, name: &str, entry: &Entry, flat: &mut [W]) -> Result<()> {
        if let Some(Other { dtype, .. }) = self.others.get(name) {
            let (expected, found) = (format!("F16, BF16, F32 or F64 in `{name}`"), format!("{dtype:?}"));
            return Err(Error::malformed(&self.path, expected, found, "convert it to F32"));
        }
        let tensor = self.tensors.get(name);
        let Some(tensor) = tensor.filter(|tensor| tensor.shape == entry.shape) else {
            return Err(Error::OtherNetwork {
                path: self.path.clone(),
                tensor: name.into(),
                expected: format!("{:?}", entry.shape),
                found: tensor.map_or("no such tensor".into(), |tensor| format!("{:?}", tensor.shape)),
                advice: ADVICE.into(),
            });
        };
        flat[entry.range.clone()].copy_from_slice(&entry.from_file(&tensor.data));
        Ok(())
    }

    /// The tensors of `table`, each in its place.
    ///
    /// # Errors
    /// As [`TensorFile::place`].
    pub(crate) fn flat(&self, table: &Table) -> Result<Vec<W>> {
        let mut flat = vec![W::default(); table.len()];
        table.entries().iter().try_for_each(|entry| self.place(&entry.name, entry, &mut flat))?;
        Ok(flat)
    }

    /// Refuses tensors that none of `tables` names, among those that `matter`. Those of another type never do.
    ///
    /// # Errors
    /// [`Error::OtherNetwork`] with the first of them.
    pub(crate) fn expect_only(&self, tables: &[&Table], matter: impl Fn(&str) -> bool) -> Result<()> {
        let known = |name: &str| tables.iter().any(|table| table.get(name).is_some());
        match self.shapes().find(|(name, _)| matter(name) && !known(name)) {
            None => Ok(()),
            Some((name, shape)) => Err(Error::OtherNetwork {
                path: self.path.clone(),
                tensor: name.into(),
                expected: "no such tensor".into(),
                found: format!("{shape:?}"),
                advice: ADVICE.into(),
            }),
        }
    }
}

impl<W> TensorFile<W> {
    /// Refuses tensors of another type.
    ///
    /// # Errors
    /// [`Error::Malformed`] with the first of them.
    pub(crate) fn expect_no_others(&self) -> Result<()> {
        match self.others.iter().next() {
            None => Ok(()),
            Some((name, other)) => {
                let found = format!("{:?} in `{name}`", other.dtype);
                Err(Error::malformed(&self.path, "nothing but F32 or F64", found, "another program changed it"))
            }
        }
    }
}

const ADVICE: &str = "give a file of the same preset, stem and image size, or set model.* to what the file has";

fn not_safetensors(path: &Path, bytes: &[u8], error: &SafeTensorError) -> Error {
    let (found, advice) = match Foreign::recognise(bytes) {
        Some(foreign) if foreign != Foreign::Safetensors => (foreign.name().into(), foreign.weights_advice(path)),
        _ => (
            format!("{} bytes that are none ({error})", bytes.len()),
            "it may be truncated, or of another format: copy or convert it again".into(),
        ),
    };
    Error::malformed(path, "a safetensors file", found, advice)
}

/// The elements of a tensor, converted; `None` for a type that is not a floating-point one.
fn numbers<W: Wide>(view: &TensorView<'_>) -> Option<Vec<W>> {
    fn each<S: bytemuck::AnyBitPattern, W: Wide>(bytes: &[u8], wide: impl Fn(S) -> W) -> Vec<W> {
        bytes.chunks_exact(size_of::<S>()).map(|bytes| wide(bytemuck::pod_read_unaligned(bytes))).collect()
    }
    let bytes = view.data();
    match view.dtype() {
        Dtype::F16 => Some(each(bytes, |x: half::f16| W::from_f64(x.to_f64()))),
        Dtype::BF16 => Some(each(bytes, |x: half::bf16| W::from_f64(x.to_f64()))),
        Dtype::F32 => Some(each(bytes, |x: f32| W::from_f64(f64::from(x)))),
        Dtype::F64 => Some(each(bytes, W::from_f64)),
        _ => None,
    }
}

/// The bytes of a file with the tensors of some flat buffers, each under the name in its table.
pub(crate) fn serialize<W: Wide>(flats: &[(&Table, &[W])], keep: impl Fn(&Entry) -> bool) -> Vec<u8> {
    let kept = |item: &Item<'_, W>| matches!(item, Item::Stored { entry, .. } if keep(entry));
    let items = flats.iter().flat_map(|&(table, flat)| stored(table, flat)).filter(|(_, item)| kept(item));
    // The key that PyTorch's readers look for.
    serialize_items(items, [("format", "pt".to_string())])
}

/// The tensors of a flat buffer, under the names in its table.
pub(crate) fn stored<'a, W: Wide>(table: &'a Table, flat: &'a [W]) -> impl Iterator<Item = (&'a str, Item<'a, W>)> {
    let entries = table.entries().iter();
    entries.map(|entry| (entry.name.as_str(), Item::Stored { entry, data: &flat[entry.range.clone()] }))
}

/// The bytes of a file with some tensors and metadata.
pub(crate) fn serialize_items<'a, W: Wide, S: AsRef<str> + Ord + std::fmt::Display>(
    items: impl Iterator<Item = (S, Item<'a, W>)>,
    metadata: impl IntoIterator<Item = (&'static str, String)>,
) -> Vec<u8> {
    let metadata: BTreeMap<_, _> = metadata.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
    let mut file = safetensors::serialize(items, Some(metadata.clone().into_iter().collect()))
        .expect("names are unique, and lengths come from the shapes");
    // They come first, in any order, as the library keeps them in a `HashMap`: sorted they are as many bytes.
    let sorted = serde_json::to_vec(&metadata).expect("strings");
    let behind = size_of::<u64>() + br#"{"__metadata__":"#.len();
    file[behind..][..sorted.len()].copy_from_slice(&sorted);
    file
}

/// A tensor on its way into a file.
#[derive(Debug)]
pub(crate) enum Item<'a, W> {
    /// Part of a flat buffer.
    Stored {
        /// Its name and place.
        entry: &'a Entry,
        /// Its elements.
        data: &'a [W],
    },
    /// Any other.
    View(TensorView<'a>),
}

impl<W: Wide> View for Item<'_, W> {
    fn dtype(&self) -> Dtype {
        match self {
            Item::Stored { .. } if size_of::<W>() == 8 => Dtype::F64,
            Item::Stored { .. } => Dtype::F32,
            Item::View(view) => view.dtype(),
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Item::Stored { entry, .. } => &entry.shape,
            Item::View(view) => view.shape(),
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Item::Stored { entry, data } => match entry.layout {
                Layout::Plain => Cow::Borrowed(bytemuck::cast_slice(data)),
                Layout::Filter => Cow::Owned(bytemuck::cast_slice(&entry.to_file(data)).to_vec()),
            },
            Item::View(view) => Cow::Borrowed(view.data()),
        }
    }

    fn data_len(&self) -> usize {
        match self {
            Item::Stored { data, .. } => size_of_val(*data),
            Item::View(view) => view.data().len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::default();
        table.push("a.bias", &[3], Layout::Plain);
        table.push_behind("a.conv.weight", &[2, 3, 1, 2], Layout::Filter);
        table
    }

    /// The table's buffer.
    fn flat<W: Wide>(value: W) -> Vec<W> {
        vec![value; table().len()]
    }

    #[test]
    fn filters_are_kcrs_in_the_file() {
        let table = table();
        // Flat: bias 0 1 2, then [k, r, s, c] counted up from 3, then nothing.
        let mut flat = flat(0f32);
        (0..15).for_each(|i| flat[i] = i as f32);
        let bytes = serialize(&[(&table, &flat[..])], |_| true);
        let file = SafeTensors::deserialize(&bytes).expect("our own");
        let weight = file.tensor("a.conv.weight").expect("written");
        assert_eq!(weight.shape(), [2, 3, 1, 2]);
        let weight: Vec<f32> = numbers(&weight).expect("f32");
        assert_eq!(weight, [3., 6., 4., 7., 5., 8., 9., 12., 10., 13., 11., 14.]);

        let file = TensorFile::<f32>::parse(Path::new("x.safetensors"), &bytes).expect("our own");
        assert_eq!(file.flat(&table).expect("same table"), flat);
    }

    #[test]
    fn the_same_tensors_are_the_same_bytes() {
        let (table, flat) = (table(), flat(0.5f64));
        let bytes = || serialize(&[(&table, &flat[..])], |_| true);
        assert_eq!(bytes(), bytes());
    }

    #[test]
    fn metadata_come_in_the_order_of_their_keys() {
        let (table, flat) = (table(), flat(0.5f64));
        let about = ["a", "b", "c", "d", "e", "f"].map(|key| (key, format!("\"{key}\"")));
        let bytes = serialize_items(stored(&table, &flat), about.clone());
        let (_, header) = SafeTensors::read_metadata(&bytes).expect("our own");
        let read = header.metadata().clone().expect("written");
        assert_eq!(read, about.clone().map(|(key, value)| (key.to_string(), value)).into());
        let places = about.map(|(key, _)| {
            let entry = format!("\"{key}\":\"\\\"");
            bytes.windows(entry.len()).position(|at| at == entry.as_bytes()).expect("in the header")
        });
        assert!(places.is_sorted(), "{places:?}");
    }

    #[test]
    fn narrow_types_widen() {
        let [half, brain] = [half::f16::from_f32(1.5).to_bits(), half::bf16::from_f32(-2.5).to_bits()];
        fn read(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
            numbers(&TensorView::new(dtype, vec![1], bytes).expect("one element"))
        }
        assert_eq!(read(Dtype::F16, &half.to_le_bytes()), Some(vec![1.5]));
        assert_eq!(read(Dtype::BF16, &brain.to_le_bytes()), Some(vec![-2.5]));
        assert_eq!(read(Dtype::F64, &0.1f64.to_le_bytes()), Some(vec![0.1f32]));
        assert_eq!(read(Dtype::I32, &[0; 4]), None);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let (table, flat) = (table(), flat(0f32));
        let bytes = serialize(&[(&table, &flat[..])], |entry| entry.name == "a.bias");
        let file = TensorFile::<f32>::parse(Path::new("x.safetensors"), &bytes).expect("our own");
        let missing = file.flat(&table).expect_err("one is missing").to_string();
        assert!(missing.contains("a.conv.weight") && missing.contains("no such tensor"), "{missing}");

        let mut other = Table::default();
        other.push("a.bias", &[4], Layout::Plain);
        let shape = file.flat(&other).expect_err("3 is not 4").to_string();
        assert!(shape.contains("[4]") && shape.contains("[3]"), "{shape}");

        let unexpected = file.expect_only(&[&Table::default()], |_| true).expect_err("one too many").to_string();
        assert!(unexpected.contains("a.bias"), "{unexpected}");
    }

    #[test]
    fn other_files_are_refused() {
        let path = Path::new("x.safetensors");
        let bytes = serialize(&[(&table(), &flat(0f32)[..])], |_| true);
        for wrong in [&b""[..], b"PK\x03\x04 a zip archive", &bytes[..bytes.len() - 1], &bytes[..20]] {
            let error = TensorFile::<f32>::parse(path, wrong).expect_err("not safetensors").to_string();
            assert!(error.contains("x.safetensors: expected a safetensors file"), "{error}");
        }
        for (foreign, kind, way_out) in [
            (&b"version https://git-lfs.github.com/spec/v1\n"[..], "found a Git LFS pointer", "git lfs pull"),
            (b"<!DOCTYPE html><html>", "found an HTML page", "download"),
            (
                b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.",
                "found a pickle, as PyTorch",
                "safetensors.torch.save_file",
            ),
        ] {
            let error = TensorFile::<f32>::parse(path, foreign).expect_err("not safetensors").to_string();
            assert!(error.contains(kind) && error.contains(way_out), "{error}");
        }
    }

    /// A file of this header, and of as many zeros.
    fn forged(header: &str, zeros: usize) -> Result<TensorFile<f32>> {
        let len = (header.len() as u64).to_le_bytes();
        let bytes = [&len[..], header.as_bytes(), &vec![0; zeros]].concat();
        TensorFile::parse(Path::new("x.safetensors"), &bytes)
    }

    fn header(dtype: &str, shape: &str, offsets: &str) -> String {
        format!(r#""a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
    }

    #[test]
    fn headers_that_lie_are_refused() {
        let one = |dtype, shape, offsets| forged(&format!("{{{}}}", header(dtype, shape, offsets)), 8);
        assert!(one("F32", "[2]", "[0,8]").is_ok());
        for (dtype, shape, offsets) in [
            ("F32", "[2]", "[0,4]"),
            ("F32", "[2]", "[4,12]"),
            ("F32", "[2]", "[8,0]"),
            ("F32", "[1152921504606846976]", "[0,4611686018427387904]"),
            ("F32", "[4294967296,4294967296]", "[0,8]"),
            ("F32", "[18446744073709551615,2]", "[0,8]"),
            ("F32", "[-2]", "[0,8]"),
            ("F33", "[2]", "[0,8]"),
        ] {
            let error = one(dtype, shape, offsets).expect_err(shape);
            assert_eq!(error.kind(), crate::ErrorKind::Input, "{dtype} {shape} {offsets}: {error}");
        }
        // Sound, but not to compute with.
        for (dtype, shape) in [("I64", "[1]"), ("BOOL", "[8]"), ("F8_E4M3", "[2,4]"), ("C64", "[1]"), ("F4", "[16]")] {
            let file = one(dtype, shape, "[0,8]").expect("a sound header");
            assert_eq!(file.shapes().count(), 0, "{dtype}");
            assert_eq!(
                file.others().map(|(name, _, kind)| format!("{name} {kind}")).collect::<Vec<_>>(),
                [format!("a {dtype}")]
            );
            let mut wanted = Table::default();
            wanted.push("a", &[1], Layout::Plain);
            let error = file.flat(&wanted).expect_err("no numbers").to_string();
            assert!(error.contains("expected F16, BF16, F32 or F64 in `a`") && error.contains(dtype), "{error}");
            assert!(file.expect_only(&[&Table::default()], |_| true).is_ok() && file.expect_no_others().is_err());
        }
        // Two of one name, two in one place, a header of 2^60 bytes.
        let (whole, half) = (header("F32", "[2]", "[0,8]"), header("F32", "[1]", "[0,4]"));
        assert!(forged(&format!("{{{half},{}}}", half.replace("[0,4]", "[4,8]")), 8).is_err());
        assert!(forged(&format!("{{{whole},{}}}", whole.replace("\"a\"", "\"b\"")), 8).is_err());
        let long = [&(1u64 << 60).to_le_bytes()[..], b"{}"].concat();
        assert!(TensorFile::<f32>::parse(Path::new("x.safetensors"), &long).is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_change_of_a_file_is_read_or_refused(at: proptest::sample::Index, byte: u8, cut: proptest::sample::Index) {
            let mut bytes = serialize(&[(&table(), &flat(0.5f32)[..])], |_| true);
            let (at, cut) = (at.index(bytes.len()), cut.index(bytes.len() + 1));
            bytes[at] = byte;
            for bytes in [&bytes[..], &bytes[..cut]] {
                if let Err(error) = TensorFile::<f32>::parse(Path::new("x.safetensors"), bytes) {
                    proptest::prop_assert_eq!(error.kind(), crate::ErrorKind::Input);
                }
            }
        }
    }

    #[test]
    fn dtypes_are_those_of_the_elements() {
        assert_eq!((<f32 as selfie_kernels::Element>::NAME, <f64 as selfie_kernels::Element>::NAME), ("F32", "F64"));
    }
}

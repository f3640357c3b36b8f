//! Arrays of numpy's .npz files: zip archives of .npy members, stored or deflated.
//!
//! The header is read here and not by a library: it is one line that numpy writes in one form, and
//! a parser of Python literals would recurse over hostile ones.
//! <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>

use std::fs::File;
use std::io::{BufReader, Read};

use zip::ZipArchive;
use zip::read::ZipFile;

use crate::pickle::{dtype_parts, little_endian};

/// Photographs deflate to a half at best, labels to a tenth; more than this is a bomb.
const MAX_RATIO: u64 = 100;

/// A header line, with numpy's padding, has 80 to 128 bytes.
const MAX_HEADER: usize = 4096;

/// An open .npz file.
pub(crate) struct Npz {
    archive: ZipArchive<BufReader<File>>,
    file_bytes: u64,
}

/// An array of an .npz file, of which the header was read.
pub(crate) struct Npy<'z> {
    kind: u8,
    /// Bytes per element.
    bytes: usize,
    pub(crate) shape: Vec<usize>,
    reader: ZipFile<'z, BufReader<File>>,
}

impl Npz {
    pub(crate) fn open(file: File) -> Result<Self, String> {
        let file_bytes = file.metadata().map_err(|error| error.to_string())?.len();
        let archive = ZipArchive::new(BufReader::with_capacity(1 << 18, file)).map_err(|error| error.to_string())?;
        Ok(Self { archive, file_bytes })
    }

    /// The array called `name`. Its shape is exactly what its member holds, and that is no more
    /// than [`MAX_RATIO`] times the file.
    pub(crate) fn array(&mut self, name: &str) -> Result<Npy<'_>, String> {
        let names: Vec<_> = self.archive.file_names().flatten().take(8).map(String::from).collect();
        let missing = |error: zip::result::ZipError| format!("no `{name}` ({error}) in {}", names.join(", "));
        let mut reader = self.archive.by_name(&format!("{name}.npy")).map_err(missing)?;
        let packed = reader.compressed_size().min(self.file_bytes);
        let size = reader.size();
        if size > packed.saturating_mul(MAX_RATIO).saturating_add(MAX_HEADER as u64) {
            return Err(format!("`{name}` of {size} bytes in {packed} packed ones, a decompression bomb"));
        }
        let header = Header::read(&mut reader).map_err(|error| format!("`{name}`: {error}"))?;
        let data = header.shape.iter().try_fold(header.bytes, |product, dim| product.checked_mul(*dim));
        let expected = data.and_then(|data| data.checked_add(header.header_bytes));
        if expected.is_none_or(|expected| expected as u64 != size) {
            let shape = &header.shape;
            return Err(format!("`{name}` of {size} bytes for the shape {shape:?}, {} bytes each", header.bytes));
        }
        Ok(Npy { kind: header.kind, bytes: header.bytes, shape: header.shape, reader })
    }
}

impl Npy<'_> {
    /// Whether the elements are u8.
    pub(crate) fn is_bytes(&self) -> bool {
        (self.kind, self.bytes) == (b'u', 1)
    }

    /// Reads the next bytes of the data.
    pub(crate) fn fill(&mut self, bytes: &mut [u8]) -> Result<(), String> {
        self.reader.read_exact(bytes).map_err(|error| error.to_string())
    }

    /// Checks that nothing follows the data, and their checksum.
    pub(crate) fn finish(mut self) -> Result<(), String> {
        match self.reader.read(&mut [0]) {
            Ok(0) => Ok(()),
            Ok(_) => Err("more bytes than the shape says".into()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// All elements of an array of whole numbers.
    pub(crate) fn integers(mut self) -> Result<Vec<i64>, String> {
        let [len] = self.shape[..] else {
            return Err(format!("the shape {:?} where one dimension belongs", self.shape));
        };
        let mut numbers = Vec::new();
        let mut element = vec![0; self.bytes];
        for _ in 0..len {
            self.fill(&mut element)?;
            numbers.push(little_endian(self.kind, &element).ok_or("an array of other than whole numbers")?);
        }
        self.finish()?;
        Ok(numbers)
    }
}

/// The head of an .npy file.
#[derive(Debug, PartialEq)]
struct Header {
    kind: u8,
    bytes: usize,
    shape: Vec<usize>,
    /// Bytes of the head itself.
    header_bytes: usize,
}

impl Header {
    fn read(from: &mut impl Read) -> Result<Self, String> {
        let mut start = [0; 8];
        from.read_exact(&mut start).map_err(|error| error.to_string())?;
        let length_bytes = match start {
            [0x93, b'N', b'U', b'M', b'P', b'Y', 1, _] => 2,
            [0x93, b'N', b'U', b'M', b'P', b'Y', 2 | 3, _] => 4,
            _ => return Err("no .npy header".into()),
        };
        let mut length = [0; 4];
        from.read_exact(&mut length[..length_bytes]).map_err(|error| error.to_string())?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_HEADER {
            return Err(format!("an .npy header of {length} bytes"));
        }
        let mut line = vec![0; length];
        from.read_exact(&mut line).map_err(|error| error.to_string())?;
        let line = String::from_utf8(line).map_err(|error| error.to_string())?;
        let wrong = || format!("the .npy header {}", line.trim_end());
        let field = |key: &str| line.split_once(key).map(|(_, rest)| rest.trim_start());
        let descr = field("'descr':").and_then(|rest| rest.strip_prefix('\'')?.split('\'').next());
        let (kind, bytes) = descr.and_then(|descr| dtype_parts(descr.as_bytes())).ok_or_else(wrong)?;
        let order = field("'fortran_order':").ok_or_else(wrong)?;
        let shape = field("'shape':").and_then(|rest| rest.strip_prefix('(')?.split(')').next()).ok_or_else(wrong)?;
        let dims = shape.split(',').map(str::trim).filter(|dim| !dim.is_empty());
        // numpy under Python 2 wrote long numbers with an L.
        let shape: Option<Vec<usize>> = dims.map(|dim| dim.trim_end_matches('L').parse().ok()).collect();
        let shape = shape.filter(|shape| shape.len() <= 4).ok_or_else(wrong)?;
        if !order.starts_with("False") && shape.len() > 1 {
            return Err("an array in Fortran order".into());
        }
        Ok(Self { kind, bytes, shape, header_bytes: 8 + length_bytes + length })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn npy(line: &str) -> Vec<u8> {
        let start = [b"\x93NUMPY\x01\0".as_slice(), &(line.len() as u16).to_le_bytes()].concat();
        [start.as_slice(), line.as_bytes()].concat()
    }

    #[test]
    fn headers_as_numpy_writes_them() {
        let read = |line: &str| Header::read(&mut npy(line).as_slice());
        let header =
            read("{'descr': '|u1', 'fortran_order': False, 'shape': (3, 192), }      \n").expect("well formed");
        assert_eq!((header.kind, header.bytes, header.shape, header.header_bytes), (b'u', 1, vec![3, 192], 78));
        let header =
            read("{'shape': (7L,), 'fortran_order': True, 'descr': '<i8'}").expect("one dimension has no order");
        assert_eq!((header.kind, header.bytes, header.shape), (b'i', 8, vec![7]));
        for (line, part) in [
            ("{'descr': '|u1', 'fortran_order': True, 'shape': (3, 192), }", "Fortran"),
            ("{'descr': '|O', 'fortran_order': False, 'shape': (3,), }", "header"),
            ("{'descr': '>i4', 'fortran_order': False, 'shape': (3,), }", "header"),
            ("{'descr': '|u1', 'fortran_order': False, 'shape': (-3,), }", "header"),
            ("{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999999999,), }", "header"),
            ("{'descr': '|u1', 'fortran_order': False, 'shape': (1,1,1,1,1), }", "header"),
            ("{'descr': '|u1', 'fortran_order': False", "header"),
        ] {
            let message = read(line).expect_err("must be refused");
            assert!(message.contains(part), "{line}: {message}");
        }
        let mut long = b"\x93NUMPY\x02\0\xff\xff\xff\xff".as_slice();
        assert!(Header::read(&mut long).expect_err("4 GB").contains("4294967295 bytes"));
    }

    /// What reading the labels of an archive with this member gives.
    fn labels(member: &[u8]) -> Result<Vec<i64>, String> {
        let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        zip.start_file("labels.npy", zip::write::SimpleFileOptions::default()).expect("in memory");
        zip.write_all(member).expect("in memory");
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(zip.finish().expect("in memory").get_ref()).expect("writable");
        Npz::open(file)?.array("labels")?.integers()
    }

    #[test]
    fn shapes_must_match_their_members() {
        let with = |shape: &str| {
            let line = format!("{{'descr': '|i1', 'fortran_order': False, 'shape': {shape}, }}");
            labels(&[npy(&line), b"\x01\x02\xff".to_vec()].concat())
        };
        assert_eq!(with("(3,)"), Ok(vec![1, 2, -1]));
        for shape in ["(2,)", "(4,)", "(1152921504606846976,)", "(18446744073709551615,)", "(4294967296, 4294967296)"] {
            let message = with(shape).expect_err("must be refused");
            assert!(message.contains("for the shape"), "{message}");
        }
        assert!(with("(1, 3)").expect_err("two dimensions").contains("one dimension"));
    }

    proptest! {
        #[test]
        fn any_member_gives_numbers_or_an_error(
            line in "[{]('descr': |'[|<]?[uif][148]'|'shape': |[(][0-9,]{0,9}[)]|'fortran_order': |True|False|, ){0,8}[}]",
            data in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            if let Ok(numbers) = labels(&[npy(&line), data.clone()].concat()) {
                prop_assert!(numbers.len() <= data.len());
            }
        }
    }
}

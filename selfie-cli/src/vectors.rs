//! Vectors of images as files that others read.

mod parquet;

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use selfie_model::durable;
use serde_json::{Value, json};

use crate::destination::{self, Existing};
use crate::exit::Problem;

/// What every writer to a `String` is.
const INFALLIBLE: &str = "writing to a string cannot fail";

/// Readers of safetensors files refuse longer headers.
const MAX_HEADER: usize = 100_000_000;

/// A kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// NumPy's; names and labels are in a CSV file beside it.
    Npy,
    /// A line for each image.
    Csv,
    /// A row for each image: `name`, `label`, `class`, `embedding`.
    Parquet,
    /// Tensors `embedding` and `label`; names and classes in the metadata.
    Safetensors,
}

/// Where vectors go.
#[derive(Clone, Debug)]
pub struct Destination {
    path: PathBuf,
    format: Format,
}

/// Vectors, with what is known of their images.
#[derive(Clone, Debug, Default)]
pub struct Vectors {
    /// `[n]`: stable names.
    pub names: Vec<String>,
    /// `[n]`: places in `classes`, where known.
    pub labels: Vec<Option<u32>>,
    /// Names of the classes.
    pub classes: Vec<String>,
    /// Numbers of a vector.
    pub width: usize,
    /// `[n, width]`
    pub values: Vec<f32>,
}

impl Destination {
    /// The format follows from the file's extension.
    ///
    /// # Errors
    /// Usage: an unknown extension, a folder that is not there, a file that is, unless it is to be replaced.
    pub fn new(path: &Path, existing: Existing) -> anyhow::Result<Self> {
        let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        let format = match extension.as_str() {
            "npy" => Format::Npy,
            "csv" => Format::Csv,
            "parquet" => Format::Parquet,
            "safetensors" => Format::Safetensors,
            _ => {
                return Err(Problem::usage(format!(
                    "--out {}: expected a file name that ends with .npy, .csv, .parquet or .safetensors",
                    path.display()
                )));
            }
        };
        let destination = Self { path: path.into(), format };
        destination::check("--out", path, &destination.files(), existing)?;
        Ok(destination)
    }

    /// All files that are written, that of the vectors last.
    pub fn files(&self) -> Vec<PathBuf> {
        match self.format {
            Format::Npy => {
                let mut beside = OsString::from(self.path.file_stem().unwrap_or_default());
                beside.push(".images.csv");
                vec![self.path.with_file_name(beside), self.path.clone()]
            }
            Format::Csv | Format::Parquet | Format::Safetensors => vec![self.path.clone()],
        }
    }

    /// Writes the files, each as a whole. `about` goes into the metadata, where the format has some.
    ///
    /// # Errors
    /// What the system refuses; more names than the format takes.
    pub fn write(&self, vectors: &Vectors, about: &Value) -> anyhow::Result<()> {
        let contents = match self.format {
            Format::Npy => vec![csv(vectors, Columns::Images), npy(vectors)],
            Format::Csv => vec![csv(vectors, Columns::ImagesAndVectors)],
            Format::Parquet => vec![parquet::bytes(vectors, about)?],
            Format::Safetensors => vec![safetensors(vectors, about)?],
        };
        for (path, bytes) in self.files().iter().zip(&contents) {
            durable::write_file(path, bytes)?;
        }
        Ok(())
    }
}

/// NumPy's format, version 1.0: a header padded to 64 bytes, then the numbers.
fn npy(vectors: &Vectors) -> Vec<u8> {
    let shape = format!("({}, {})", vectors.names.len(), vectors.width);
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}");
    // Magic, version and length take 10 bytes, the end of the line one.
    let padded = (10 + header.len() + 1).next_multiple_of(64) - 11;
    header.extend(std::iter::repeat_n(' ', padded - header.len()));
    header.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(vectors.values.iter().flat_map(|value| value.to_le_bytes()));
    bytes
}

/// A length of eight bytes, a header of JSON that ends at a multiple of eight, then the tensors.
fn safetensors(vectors: &Vectors, about: &Value) -> anyhow::Result<Vec<u8>> {
    let n = vectors.names.len();
    let labels = 8 * n;
    let embedding = labels + 4 * vectors.values.len();
    // All values of the metadata are texts.
    let header = json!({
        "__metadata__": {
            "names": json!(vectors.names).to_string(),
            "classes": json!(vectors.classes).to_string(),
            "about": about.to_string(),
        },
        "label": { "dtype": "I64", "shape": [n], "data_offsets": [0, labels] },
        "embedding": { "dtype": "F32", "shape": [n, vectors.width], "data_offsets": [labels, embedding] },
    });
    let mut header = header.to_string();
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    if header.len() > MAX_HEADER {
        return Err(Problem::usage(format!(
            "the names of {n} images are more than the {} MB that readers of safetensors take: give --out FILE.npy",
            MAX_HEADER / 1_000_000
        )));
    }
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(vectors.labels.iter().flat_map(|label| label.map_or(-1, i64::from).to_le_bytes()));
    bytes.extend(vectors.values.iter().flat_map(|value| value.to_le_bytes()));
    Ok(bytes)
}

/// What a table has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Columns {
    Images,
    ImagesAndVectors,
}

fn csv(vectors: &Vectors, columns: Columns) -> Vec<u8> {
    let mut text = String::from("name,label,class");
    let width = if columns == Columns::Images { 0 } else { vectors.width };
    (0..width).for_each(|i| write!(text, ",f{i}").expect(INFALLIBLE));
    text.push('\n');
    for (i, (name, label)) in vectors.names.iter().zip(&vectors.labels).enumerate() {
        let (number, class) = match label {
            Some(label) => (label.to_string(), field(&vectors.classes[*label as usize])),
            None => (String::new(), String::new()),
        };
        write!(text, "{},{number},{class}", field(name)).expect(INFALLIBLE);
        // Digits enough to read the same number again.
        vectors.values[i * vectors.width..][..width]
            .iter()
            .for_each(|value| write!(text, ",{value}").expect(INFALLIBLE));
        text.push('\n');
    }
    text.into_bytes()
}

/// A field of a CSV file (RFC 4180).
pub fn field(text: &str) -> String {
    let special = |c: char| matches!(c, ',' | '"' | '\n' | '\r');
    if text.contains(special) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_quoted_where_they_must_be() {
        assert_eq!(field("a b/c.png"), "a b/c.png");
        assert_eq!(field("a,b"), "\"a,b\"");
        assert_eq!(field("a \"b\""), "\"a \"\"b\"\"\"");
    }

    #[test]
    fn a_table_of_two_images() {
        let vectors = Vectors {
            names: vec!["a,1.png".into(), "2.png".into()],
            labels: vec![Some(1), None],
            classes: vec!["cat".into(), "dog".into()],
            width: 2,
            values: vec![0.1, -2.0, 1e-7, 0.0],
        };
        let text = |columns| String::from_utf8(csv(&vectors, columns)).expect("text");
        assert_eq!(text(Columns::Images), "name,label,class\n\"a,1.png\",1,dog\n2.png,,\n");
        let all = "name,label,class,f0,f1\n\"a,1.png\",1,dog,0.1,-2\n2.png,,,0.0000001,0\n";
        assert_eq!(text(Columns::ImagesAndVectors), all);
    }
}

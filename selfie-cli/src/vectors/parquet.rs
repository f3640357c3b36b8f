//! Vectors as a Parquet file, for pandas, DuckDB, Spark and the like.

use std::sync::Arc;

use anyhow::Context;
use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType, FloatType, Int64Type};
use parquet::errors::Result;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use parquet::schema::types::ColumnPath;
use serde_json::Value;

use super::Vectors;

/// Columns by name, and a list as the format's `LogicalTypes.md` has it.
const SCHEMA: &str = "message images {
  required binary name (STRING);
  optional int64 label;
  optional binary class (STRING);
  required group embedding (LIST) { repeated group list { required float element; } }
}";

/// Rows that are written, and read, at a time.
const ROWS: usize = 1 << 14;

/// The bytes of the file. `about` is in its metadata.
pub(super) fn bytes(vectors: &Vectors, about: &Value) -> anyhow::Result<Vec<u8>> {
    write(vectors, about).context("the vectors do not fit into a Parquet file: give --out FILE.npy")
}

fn write(vectors: &Vectors, about: &Value) -> Result<Vec<u8>> {
    let embedding = ColumnPath::from(["embedding", "list", "element"].map(String::from).to_vec());
    let properties = WriterProperties::builder()
        // Numbers without a pattern: neither a dictionary nor a code makes them shorter, and no one asks for their range.
        .set_compression(Compression::UNCOMPRESSED)
        .set_column_dictionary_enabled(embedding.clone(), false)
        .set_column_statistics_enabled(embedding, EnabledStatistics::None)
        .set_key_value_metadata(Some(vec![KeyValue::new("about".to_string(), about.to_string())]));
    let schema = Arc::new(parse_message_type(SCHEMA)?);
    let mut file = SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties.build()))?;
    for first in (0..vectors.names.len()).step_by(ROWS) {
        let rows = first..vectors.names.len().min(first + ROWS);
        let labels = &vectors.labels[rows.clone()];
        let mut group = file.next_row_group()?;
        let names: Vec<ByteArray> = vectors.names[rows.clone()].iter().map(|name| name.as_str().into()).collect();
        column::<ByteArrayType>(&mut group, &names, None, None)?;

        let known: Vec<i16> = labels.iter().map(|label| i16::from(label.is_some())).collect();
        let numbers: Vec<i64> = labels.iter().flatten().map(|&label| label.into()).collect();
        column::<Int64Type>(&mut group, &numbers, Some(&known), None)?;
        let class = |&label: &u32| ByteArray::from(vectors.classes[label as usize].as_str());
        let classes: Vec<ByteArray> = labels.iter().flatten().map(class).collect();
        column::<ByteArrayType>(&mut group, &classes, Some(&known), None)?;

        // Of a list the first element begins a row, the others repeat it.
        let values = &vectors.values[rows.start * vectors.width..rows.end * vectors.width];
        let repeats: Vec<i16> = (0..values.len()).map(|i| i16::from(!i.is_multiple_of(vectors.width))).collect();
        column::<FloatType>(&mut group, values, Some(&vec![1; values.len()]), Some(&repeats))?;
        group.close()?;
    }
    file.into_inner()
}

/// Writes the next column of a group of rows.
fn column<T: parquet::data_type::DataType>(
    group: &mut SerializedRowGroupWriter<'_, Vec<u8>>,
    values: &[T::T],
    defined: Option<&[i16]>,
    repeats: Option<&[i16]>,
) -> Result<()> {
    let Some(mut column) = group.next_column()? else {
        return Err(parquet::errors::ParquetError::General("more columns than the schema has".into()));
    };
    column.typed::<T>().write_batch(values, defined, repeats)?;
    column.close()
}

#[cfg(test)]
mod tests {
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::record::Row;

    use super::*;

    #[test]
    fn rows_are_read_back_across_groups() {
        let n = ROWS + 2;
        let vectors = Vectors {
            names: (0..n).map(|i| format!("{i}.png")).collect(),
            labels: (0..n).map(|i| (i % 3 > 0).then(|| i as u32 % 3 - 1)).collect(),
            classes: vec!["cat".into(), "dog".into()],
            width: 3,
            values: (1..=3 * n).map(|i| i as f32 / 8.0).collect(),
        };
        let bytes = bytes(&vectors, &serde_json::json!({ "layer": "last" })).expect("written");
        let file = SerializedFileReader::new(bytes::Bytes::from(bytes)).expect("a Parquet file");
        assert_eq!(file.metadata().num_row_groups(), 2);
        let about = file.metadata().file_metadata().key_value_metadata().expect("metadata");
        assert_eq!((about[0].key.as_str(), about[0].value.as_deref()), ("about", Some("{\"layer\":\"last\"}")));
        let rows: Vec<Row> = file.get_row_iter(None).expect("rows").map(|row| row.expect("a row")).collect();
        assert_eq!(rows.len(), n);
        for (i, row) in rows.iter().enumerate() {
            let class = |label: usize| ["cat", "dog"][label];
            let (label, name) = match i % 3 {
                0 => ("null".to_string(), "null".to_string()),
                label => ((label - 1).to_string(), format!("\"{}\"", class(label - 1))),
            };
            let values: Vec<String> = (0..3).map(|j| format!("{:?}", (3 * i + j + 1) as f32 / 8.0)).collect();
            let expected =
                format!("{{name: \"{i}.png\", label: {label}, class: {name}, embedding: [{}]}}", values.join(", "));
            assert_eq!(row.to_string(), expected);
        }
    }
}

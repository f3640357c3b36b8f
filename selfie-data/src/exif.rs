//! The orientation that Exif names: how the camera was held.

use image::metadata::Orientation;

/// Tag of the orientation in the first directory.
const ORIENTATION: u16 = 0x0112;

/// The orientation of a JPEG, whose Exif segments follow each other. The first that has one counts, as in browsers; a
/// directory that lies beyond its segment is looked for in those that follow, as Pillow does.
pub(crate) fn of_segments(segments: &[&[u8]]) -> Orientation {
    let found = (0..segments.len()).find_map(|at| read(segments[at]).or_else(|| read(&segments[at..].concat())));
    found.and_then(Orientation::from_exif).unwrap_or(Orientation::NoTransforms)
}

/// The orientation of a PNG: of its `eXIf` chunk, which may lie on either side of the pixels.
pub(crate) fn of_png(png: &[u8]) -> Orientation {
    let mut rest = png.get(8..).unwrap_or_default();
    while let Some((&[a, b, c, d, ref kind @ ..], content)) = rest.split_first_chunk::<8>() {
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        let Some(content) = content.get(..length) else { break };
        if kind == b"eXIf" {
            return of_chunk(content);
        }
        // A checksum follows.
        rest = rest.get(8 + length + 4..).unwrap_or_default();
    }
    Orientation::NoTransforms
}

/// The orientation of a WebP's chunk. Some writers leave a JPEG's beginning of the segment in it.
pub(crate) fn of_chunk(chunk: &[u8]) -> Orientation {
    of_segments(&[chunk.strip_prefix(b"Exif\0\0").unwrap_or(chunk)])
}

/// The orientation of the first directory of a TIFF, in any integer type; a number that means none is given as it is.
fn read(tiff: &[u8]) -> Option<u8> {
    let order: Order = match tiff.first_chunk()? {
        b"II*\0" => Order::Little,
        b"MM\0*" => Order::Big,
        _ => return None,
    };
    let directory = order.number(tiff.get(4..8)?) as usize;
    let mut entries = tiff.get(directory..)?;
    let count = order.number(entries.split_off(..2)?);
    for _ in 0..count {
        let entry = entries.split_off(..12)?;
        if order.number(&entry[..2]) != u32::from(ORIENTATION) {
            continue;
        }
        let bytes = match order.number(&entry[2..4]) {
            // BYTE and SBYTE, SHORT and SSHORT, LONG, SLONG and IFD.
            1 | 6 => 1,
            3 | 8 => 2,
            4 | 9 | 13 => 4,
            _ => return None,
        };
        // The first of several values, as long as they lie in the entry.
        let is_inline = (1..=4 / bytes as u32).contains(&order.number(&entry[4..8]));
        return is_inline.then(|| u8::try_from(order.number(&entry[8..8 + bytes])).unwrap_or(0));
    }
    None
}

/// Order of bytes.
enum Order {
    Little,
    Big,
}

impl Order {
    /// A number of at most four bytes.
    fn number(&self, bytes: &[u8]) -> u32 {
        let add = |number, &byte: &u8| number << 8 | u32::from(byte);
        match self {
            Order::Little => bytes.iter().rev().fold(0, add),
            Order::Big => bytes.iter().fold(0, add),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A little-endian directory of one entry: the orientation as `count` SHORTs, of which the first is `value`.
    fn directory(count: u32, value: u16) -> Vec<u8> {
        let mut bytes = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0".to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        bytes.extend([0; 6]);
        bytes
    }

    #[test]
    fn values_that_lie_elsewhere_are_none() {
        assert_eq!(read(&directory(1, 6)), Some(6));
        assert_eq!(read(&directory(2, 6)), Some(6), "two of two bytes fit");
        assert_eq!([read(&directory(0, 6)), read(&directory(3, 6))], [None, None]);
    }

    #[test]
    fn a_chunk_may_begin_as_a_segment_does() {
        let chunk = directory(1, 8);
        assert_eq!(of_chunk(&chunk), Orientation::Rotate270);
        assert_eq!(of_chunk(&[b"Exif\0\0", &chunk[..]].concat()), Orientation::Rotate270);
        assert_eq!(of_chunk(b"Exif\0"), Orientation::NoTransforms);
    }
}

//! What a file is that is no image, or no weights, whatever its name says.
//!
//! Downloads that failed leave a web page under the name of an image, a clone without Git LFS leaves pointers, and
//! phones and other programs have formats of their own. Each is called by its name, with the way out.

use std::fmt;
use std::path::Path;

/// A kind of file that is often taken for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Foreign {
    /// A web page: mostly what a server sent in place of the file.
    Html,
    /// XML of another kind than SVG.
    Xml,
    /// An answer of a server, as JSON.
    Json,
    /// A pointer that stands for a file in Git's large file storage.
    LfsPointer,
    /// A git-annex pointer.
    AnnexPointer,
    /// An HEIC or HEIF: what iPhones write.
    Heic,
    /// An AVIF.
    Avif,
    /// A JPEG XL.
    JpegXl,
    /// A JPEG 2000.
    Jpeg2000,
    /// A JPEG XR.
    JpegXr,
    /// A Photoshop document.
    Photoshop,
    /// A vector graphic.
    Svg,
    /// A PDF.
    Pdf,
    /// A video or an audio file.
    Video,
    /// A DICOM file: medical images.
    Dicom,
    /// What PyTorch's `torch.save` writes, since version 1.6 in a zip archive.
    TorchZip,
    /// What PyTorch's `torch.save` wrote before, or a pickle of other software.
    Pickle,
    /// An HDF5 file, as Keras and others write.
    Hdf5,
    /// An array of NumPy.
    Npy,
    /// Several arrays of NumPy.
    Npz,
    /// An ONNX network.
    Onnx,
    /// A GGUF file.
    Gguf,
    /// A safetensors file.
    Safetensors,
    /// A zip archive of anything else.
    Zip,
    /// A file compressed with gzip.
    Gzip,
    /// Another compressed file or archive.
    Compressed,
    /// A tar archive.
    Tar,
    /// Nothing but bytes that are zero: a copy or download that was never filled.
    Zeros,
}

impl Foreign {
    /// What `bytes` are, the first of a file, or all of it; more than 64 KiB are not looked at. `None` for images and
    /// weights that are read, and for what is not known.
    pub fn recognise(bytes: &[u8]) -> Option<Self> {
        let bytes = &bytes[..bytes.len().min(64 << 10)];
        signature(bytes).or_else(|| text(bytes)).or_else(|| empty(bytes))
    }

    /// Its name, with an article.
    pub fn name(self) -> &'static str {
        match self {
            Self::Html => "an HTML page",
            Self::Xml => "an XML document",
            Self::Json => "JSON",
            Self::LfsPointer => "a Git LFS pointer",
            Self::AnnexPointer => "a git-annex pointer",
            Self::Heic => "an HEIC",
            Self::Avif => "an AVIF",
            Self::JpegXl => "a JPEG XL",
            Self::Jpeg2000 => "a JPEG 2000",
            Self::JpegXr => "a JPEG XR",
            Self::Photoshop => "a Photoshop document",
            Self::Svg => "an SVG",
            Self::Pdf => "a PDF",
            Self::Video => "a video",
            Self::Dicom => "a DICOM file",
            Self::TorchZip => "a PyTorch file",
            Self::Pickle => "a pickle, as PyTorch wrote before 1.6",
            Self::Hdf5 => "an HDF5 file",
            Self::Npy => "a NumPy array",
            Self::Npz => "an .npz of NumPy arrays",
            Self::Onnx => "an ONNX network",
            Self::Gguf => "a GGUF file",
            Self::Safetensors => "a safetensors file",
            Self::Zip => "a zip archive",
            Self::Gzip => "a gzip file",
            Self::Compressed => "a compressed archive",
            Self::Tar => "a tar archive",
            Self::Zeros => "nothing but zero bytes",
        }
    }

    /// What to do where an image was expected.
    pub fn advice(self) -> &'static str {
        match self {
            Self::Html | Self::Xml | Self::Json | Self::Zeros => "download or copy it again",
            Self::LfsPointer => "fetch the file itself with `git lfs pull`",
            Self::AnnexPointer => "fetch the file itself with `git annex get`",
            Self::Heic
            | Self::Avif
            | Self::JpegXl
            | Self::Jpeg2000
            | Self::JpegXr
            | Self::Photoshop
            | Self::Svg
            | Self::Pdf
            | Self::Dicom => "convert it to PNG or JPEG",
            Self::Video => "take PNG or JPEG images from it",
            Self::TorchZip
            | Self::Pickle
            | Self::Hdf5
            | Self::Npy
            | Self::Npz
            | Self::Onnx
            | Self::Gguf
            | Self::Safetensors => "save its images as PNG or JPEG, one a file",
            Self::Zip | Self::Gzip | Self::Compressed | Self::Tar => "unpack it",
        }
    }

    /// What to do where weights were expected, in a safetensors file, and `path` is this: for what PyTorch saved two lines of
    /// Python that convert it.
    pub fn weights_advice(self, path: &Path) -> String {
        match self {
            Self::Html
            | Self::Xml
            | Self::Json
            | Self::LfsPointer
            | Self::AnnexPointer
            | Self::Zip
            | Self::Gzip
            | Self::Compressed
            | Self::Tar
            | Self::Zeros => self.advice().into(),
            Self::TorchZip | Self::Pickle => {
                let [from, to] =
                    [path, &path.with_extension("safetensors")].map(|path| format!("{:?}", path.display().to_string()));
                format!(
                    "convert it in Python:\n\
                     import torch, safetensors.torch; state = torch.load({from}, map_location=\"cpu\", weights_only=True)\n\
                     safetensors.torch.save_file({{k: v.contiguous() for k, v in state.get(\"state_dict\", state).items()}}, {to})"
                )
            }
            _ => "give weights in a safetensors file".into(),
        }
    }
}

impl fmt::Display for Foreign {
    /// What it is and the way out, where an image was expected.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, not an image that is read: {}", self.name(), self.advice())
    }
}

/// Kinds by their first bytes.
fn signature(bytes: &[u8]) -> Option<Foreign> {
    const STARTS: [(&[u8], Foreign); 27] = [
        (b"\0\0\0\x0cJXL \r\n\x87\n", Foreign::JpegXl),
        (b"\xff\x0a", Foreign::JpegXl),
        (b"\0\0\0\x0cjP  \r\n\x87\n", Foreign::Jpeg2000),
        (b"\xff\x4f\xff\x51", Foreign::Jpeg2000),
        (b"II\xbc", Foreign::JpegXr),
        (b"8BPS", Foreign::Photoshop),
        (b"%PDF-", Foreign::Pdf),
        (b"\x1a\x45\xdf\xa3", Foreign::Video),
        (b"OggS", Foreign::Video),
        (b"ID3", Foreign::Video),
        (b"FLV\x01", Foreign::Video),
        (b"\0\0\x01\xba", Foreign::Video),
        (b"\0\0\x01\xb3", Foreign::Video),
        (b"\x89HDF\r\n\x1a\n", Foreign::Hdf5),
        (b"\x93NUMPY", Foreign::Npy),
        (b"GGUF", Foreign::Gguf),
        (b"\x1f\x8b", Foreign::Gzip),
        (b"BZh", Foreign::Compressed),
        (b"\xfd7zXZ\0", Foreign::Compressed),
        (b"\x28\xb5\x2f\xfd", Foreign::Compressed),
        (b"7z\xbc\xaf\x27\x1c", Foreign::Compressed),
        (b"Rar!\x1a\x07", Foreign::Compressed),
        (b"version https://git-lfs", Foreign::LfsPointer),
        (b"version https://hawser", Foreign::LfsPointer),
        (b"/annex/objects/", Foreign::AnnexPointer),
        (b"PK\x05\x06", Foreign::Zip),
        // The magic number of PyTorch's old files, as a pickle of protocol 2.
        (b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", Foreign::Pickle),
    ];
    if let Some((_, foreign)) = STARTS.iter().find(|(start, _)| bytes.starts_with(start)) {
        return Some(*foreign);
    }
    let at = |place: usize, what: &[u8]| bytes.get(place..place + what.len()) == Some(what);
    match bytes {
        [b'P', b'K', 3, 4, ..] => Some(zip(bytes)),
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => Some(brand(bytes)),
        [b'R', b'I', b'F', b'F', ..] if at(8, b"AVI ") || at(8, b"WAVE") => Some(Foreign::Video),
        [0x80, 2..=5, ..] => Some(Foreign::Pickle),
        // ONNX: a protobuf that begins with the version of its representation and, mostly, who made it.
        [8, 1..=20, 0x12, length, name, ..] if *length < 64 && name.is_ascii_alphanumeric() => Some(Foreign::Onnx),
        // A length, and JSON.
        [_, _, _, _, 0, 0, 0, 0, b'{', b'"', ..] => Some(Foreign::Safetensors),
        _ if at(128, b"DICM") => Some(Foreign::Dicom),
        _ if at(257, b"ustar") => Some(Foreign::Tar),
        _ => None,
    }
}

/// A zip archive, by the name of its first member.
fn zip(bytes: &[u8]) -> Foreign {
    let length =
        |at: usize| bytes.get(at..at + 2).map_or(0, |pair| usize::from(u16::from_le_bytes([pair[0], pair[1]])));
    let name = bytes.get(30..30 + length(26)).unwrap_or_default();
    let is_torch = [&b"/data.pkl"[..], b"/version", b"/byteorder", b"/.format_version", b"/.storage_alignment"];
    if is_torch.iter().any(|end| name.ends_with(end)) {
        Foreign::TorchZip
    } else if name.ends_with(b".npy") {
        Foreign::Npz
    } else {
        Foreign::Zip
    }
}

/// Files of boxes (ISO 14496-12), by their brands: the major one, and those they say to be compatible with.
fn brand(bytes: &[u8]) -> Foreign {
    let length = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
    let brands = bytes.get(8..length.clamp(12, 256)).or(bytes.get(8..12)).unwrap_or_default();
    let (major, others) = brands.split_at(brands.len().min(4));
    let mut all = [major].into_iter().chain(others.get(4..).unwrap_or_default().chunks_exact(4));
    all.find_map(|brand| match brand {
        b"avif" | b"avis" => Some(Foreign::Avif),
        b"heic" | b"heix" | b"hevc" | b"hevx" | b"heim" | b"heis" => Some(Foreign::Heic),
        _ => None,
    })
    .unwrap_or(match major {
        b"mif1" | b"msf1" => Foreign::Heic,
        b"jp2 " => Foreign::Jpeg2000,
        _ => Foreign::Video,
    })
}

/// Texts: what begins as one, behind a byte order mark, white space and XML's own beginnings.
fn text(bytes: &[u8]) -> Option<Foreign> {
    let begins = |text: &[u8], word: &str| {
        text.get(..word.len()).is_some_and(|start| start.eq_ignore_ascii_case(word.as_bytes()))
    };
    let mut text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes).trim_ascii_start();
    let mut is_xml = false;
    loop {
        let close: &[u8] = match text {
            [b'<', b'?', ..] => b"?>",
            [b'<', b'!', b'-', b'-', ..] => b"-->",
            _ if begins(text, "<!doctype") && !begins(text, "<!doctype html") && !begins(text, "<!doctype svg") => b">",
            _ => break,
        };
        is_xml = true;
        let Some(end) = text.windows(close.len()).position(|part| part == close) else { break };
        text = text[end + close.len()..].trim_ascii_start();
    }
    const HTML: [&str; 8] = ["<!doctype html", "<html", "<head", "<body", "<title", "<script", "<meta", "<center"];
    if HTML.iter().any(|word| begins(text, word)) {
        Some(Foreign::Html)
    } else if begins(text, "<svg") || begins(text, "<!doctype svg") {
        Some(Foreign::Svg)
    } else if is_xml || begins(text, "<error") {
        Some(Foreign::Xml)
    } else if matches!(text, [b'{' | b'[', ..]) && std::str::from_utf8(text).is_ok_and(|text| text.contains('"')) {
        Some(Foreign::Json)
    } else {
        None
    }
}

fn empty(bytes: &[u8]) -> Option<Foreign> {
    (bytes.len() >= 16 && bytes.iter().all(|&byte| byte == 0)).then_some(Foreign::Zeros)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ftyp(brands: &[&[u8; 4]]) -> Vec<u8> {
        let mut bytes = (12 + 4 * brands.len() as u32).to_be_bytes().to_vec();
        bytes.extend(b"ftyp");
        bytes.extend(brands[0]);
        bytes.extend([0; 4]);
        bytes.extend(brands[1..].iter().copied().flatten());
        bytes
    }

    fn zip_of(name: &[u8]) -> Vec<u8> {
        let mut bytes = b"PK\x03\x04".to_vec();
        bytes.extend([0; 22]);
        bytes.extend((name.len() as u16).to_le_bytes());
        bytes.extend([0; 2]);
        [&bytes, name].concat()
    }

    #[test]
    fn kinds_are_known_by_their_beginnings() {
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
        let mut tar = vec![0; 512];
        tar[257..262].copy_from_slice(b"ustar");
        let mut dicom = vec![0; 132];
        dicom[128..].copy_from_slice(b"DICM");
        for (bytes, kind) in [
            (b"<!DOCTYPE html><p>404".to_vec(), Foreign::Html),
            (b"<!doctype HTML PUBLIC \"-//W3C//DTD HTML 4.01//EN\">".to_vec(), Foreign::Html),
            (b"\xef\xbb\xbf\r\n  <HTML><HEAD>".to_vec(), Foreign::Html),
            (b"<!-- a cache --><html lang=en>".to_vec(), Foreign::Html),
            (b"<?xml version=\"1.0\"?><!DOCTYPE html PUBLIC \"\"><html/>".to_vec(), Foreign::Html),
            (b"<?xml version=\"1.0\"?>\n<Error><Code>AccessDenied</Code></Error>".to_vec(), Foreign::Xml),
            (b"<Error><Code>NoSuchKey".to_vec(), Foreign::Xml),
            (b"<?xml version=\"1.0\"?>\n<!-- Inkscape -->\n<svg width=\"3\"/>".to_vec(), Foreign::Svg),
            (b"<svg xmlns=\"http://www.w3.org/2000/svg\"/>".to_vec(), Foreign::Svg),
            (b"{\"message\": \"Not Found\"}".to_vec(), Foreign::Json),
            (pointer.to_vec(), Foreign::LfsPointer),
            (b"/annex/objects/SHA256E-s31--abc.jpg\n".to_vec(), Foreign::AnnexPointer),
            (ftyp(&[b"heic", b"mif1", b"heic"]), Foreign::Heic),
            (ftyp(&[b"mif1", b"heic", b"miaf"]), Foreign::Heic),
            (ftyp(&[b"mif1"]), Foreign::Heic),
            (ftyp(&[b"mif1", b"avif", b"miaf"]), Foreign::Avif),
            (ftyp(&[b"avif", b"mif1", b"miaf"]), Foreign::Avif),
            (ftyp(&[b"isom", b"mp42"]), Foreign::Video),
            (ftyp(&[b"qt  "]), Foreign::Video),
            (b"RIFF\x10\0\0\0AVI LIST".to_vec(), Foreign::Video),
            (zip_of(b"archive/data.pkl"), Foreign::TorchZip),
            (zip_of(b"resnet50/version"), Foreign::TorchZip),
            (zip_of(b"arr_0.npy"), Foreign::Npz),
            (zip_of(b"photos/1.jpg"), Foreign::Zip),
            (b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.".to_vec(), Foreign::Pickle),
            (b"\x80\x04\x95\x10".to_vec(), Foreign::Pickle),
            (b"\x89HDF\r\n\x1a\n\0".to_vec(), Foreign::Hdf5),
            (b"\x93NUMPY\x01\0".to_vec(), Foreign::Npy),
            (b"\x08\x08\x12\x07pytorch".to_vec(), Foreign::Onnx),
            (b"GGUF\x03\0\0\0".to_vec(), Foreign::Gguf),
            (b"\x40\0\0\0\0\0\0\0{\"a\":".to_vec(), Foreign::Safetensors),
            (b"\xff\x0a\xfa\x1f".to_vec(), Foreign::JpegXl),
            (b"8BPS\0\x01".to_vec(), Foreign::Photoshop),
            (b"%PDF-1.7".to_vec(), Foreign::Pdf),
            (b"\x1f\x8b\x08".to_vec(), Foreign::Gzip),
            (tar, Foreign::Tar),
            (dicom, Foreign::Dicom),
            (vec![0; 64], Foreign::Zeros),
        ] {
            assert_eq!(Foreign::recognise(&bytes), Some(kind), "{}", bytes.escape_ascii());
            for advice in [kind.advice(), &kind.weights_advice(Path::new("model.pth"))] {
                assert!(!advice.is_empty() && !advice.ends_with('.'), "{advice}");
            }
        }
    }

    #[test]
    fn what_is_read_is_not_foreign() {
        for bytes in [
            &b"\xff\xd8\xff\xe0"[..],
            b"\x89PNG\r\n\x1a\n",
            b"BM\x42\0\0\0",
            b"P5\n3 5\n255\n",
            b"II*\0\x08\0\0\0",
            b"MM\0*\0\0\0\x08",
            b"RIFF\x10\0\0\0WEBPVP8 ",
            b"GIF89a",
            b"",
            b"<",
            b"PK",
            b"\0\0\0",
            b"plain text",
        ] {
            assert_eq!(Foreign::recognise(bytes), None, "{}", bytes.escape_ascii());
        }
    }
}

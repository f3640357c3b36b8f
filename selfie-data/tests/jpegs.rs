//! JPEGs in every layout: the pixels of Pillow, or a refusal. Files and expected pixels are `fixtures/make.py`'s.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use selfie_data::{Draws, Image, Need, Purpose, Split, open};

struct Zero;

impl Draws for Zero {
    fn words(&self, _: Purpose, _: u64, _: u32) -> [u32; 4] {
        [0; 4]
    }
}

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/jpeg");

fn fixture(name: &str) -> Vec<u8> {
    let path: PathBuf = Path::new(FIXTURES).join(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// What the program makes of files, each alone in a folder, or why it does not.
fn read(bytes: &[u8]) -> Result<Image, String> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::write(folder.path().join("image.jpg"), bytes).expect("writable");
    let data = open(folder.path(), Split::Train, Need::Images, &|_| Arc::new(Zero)).expect("a file");
    data.read(0).map_err(|error| error.to_string())
}

fn whole(bytes: &[u8]) -> Image {
    read(bytes).expect("well formed")
}

#[test]
fn every_layout_has_the_pixels_of_pillow() {
    let expected = String::from_utf8(fixture("expected.txt")).expect("text");
    let mut firsts = BTreeMap::new();
    let mut wrong = Vec::new();
    for line in expected.lines() {
        let [name, base, numbers @ ..] = &*line.split(' ').collect::<Vec<_>>() else { panic!("{line}") };
        let numbers: Vec<usize> = numbers.iter().map(|word| word.parse().expect("a number")).collect();
        let [height, width, tolerance] = numbers.try_into().expect("three numbers");
        let pixels = fixture(&format!("{base}.rgb"));
        match read(&fixture(&format!("{name}.jpg"))) {
            Ok(image) => {
                assert_eq!([image.height, image.width, image.pixels.len()], [height, width, pixels.len()], "{name}");
                let off = image.pixels.iter().zip(&pixels).map(|(a, b)| a.abs_diff(*b)).max().expect("pixels");
                if usize::from(off) > tolerance {
                    wrong.push(format!("{name}: off by {off}, not {tolerance}"));
                }
                // The same coefficients are the same pixels, in whatever scans they come.
                let (first, of_first) = firsts.entry(base.to_string()).or_insert((name.to_string(), image.clone()));
                if *of_first != image {
                    wrong.push(format!("{name}: not the pixels of {first}"));
                }
            }
            Err(error) => wrong.push(format!("{name}: {error}")),
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), expected.lines().count(), wrong.join("\n"));
    assert_eq!((firsts.len(), expected.lines().count()), (34, 142));
}

#[test]
fn what_is_not_decoded_rightly_is_refused_by_name() {
    for (file, part) in [
        ("arithmetic", "a JPEG with arithmetic coding"),
        ("arithmetic_progressive", "a JPEG with arithmetic coding"),
        ("factors", "sampling factors 2 x 1 in a scan of one component"),
        ("12_bits", "a JPEG of 12 bits per sample"),
        ("lossless", "a lossless JPEG"),
        ("hierarchical", "a hierarchical JPEG"),
        ("no_height", "whose height follows its first scan"),
    ] {
        let message = read(&fixture(&format!("refused/{file}.jpg"))).expect_err(file);
        assert!(message.contains(part) && message.contains("save it as a baseline JPEG or a PNG"), "{file}: {message}");
    }
}

/// Layouts whose data end in different ways.
const ENDINGS: [&str; 6] =
    ["444.jpg", "420_apart.jpg", "420_progressive.jpg", "420_refined.jpg", "420_restart.jpg", "grey.jpg"];

#[test]
fn all_pixels_are_there_whatever_follows_them() {
    let thumbnail = fixture("grey.jpg");
    for name in ENDINGS {
        let bytes = fixture(name);
        let image = whole(&bytes);
        let (data, end) = bytes.split_at(bytes.len() - 2);
        assert_eq!(end, [0xff, 0xd9], "{name}");
        // Samsung's trailer follows panoramas without an end marker.
        let samsung = b"\0\0\x01\x0a\x0e\0\0\0Image_UTC_Data1500000000000SEFH\x6a\0\0\0SEFT";
        let trailers = [&b""[..], b"\0", &[0; 100], b"\xff", &[0xff; 9], b"any text", samsung, &thumbnail, b"\xff\xd0"];
        for trailer in trailers {
            for end in [&b""[..], end] {
                let bytes = [data, end, trailer].concat();
                assert_eq!(read(&bytes), Ok(image.clone()), "{name}, {} after {}", trailer.escape_ascii(), end.len());
            }
        }
    }
}

#[test]
fn what_is_cut_is_refused_at_every_byte() {
    for name in ENDINGS {
        let bytes = fixture(name);
        for cut in 3..bytes.len() - 2 {
            let message = read(&bytes[..cut]).expect_err(name);
            assert!(message.contains("a truncated JPEG"), "{name}, {cut}: {message}");
        }
    }
}

#[test]
fn what_is_cut_is_refused_whatever_was_put_behind_it() {
    let thumbnail = fixture("grey.jpg");
    for name in ENDINGS {
        let bytes = fixture(name);
        let image = whole(&bytes);
        let start = bytes.windows(2).position(|pair| pair == [0xff, 0xda]).expect("a scan") + 14;
        for cut in (start..bytes.len() - 2).step_by(3) {
            // Progressive data that end with a scan are a picture: encoders may leave the rest out.
            let is_between = [0, 1].iter().any(|back| matches!(bytes[cut - back..], [0xff, 0xc4 | 0xda | 0xd9, ..]));
            for end in [&b"\xff\xd9"[..], &thumbnail, &[0; 4096], &[0xff; 64]] {
                match read(&[&bytes[..cut], end].concat()) {
                    Ok(found) => assert!(found == image || is_between, "{name}, {cut}, {} bytes", end.len()),
                    Err(message) => assert!(message.contains("JPEG"), "{name}, {cut}: {message}"),
                }
            }
        }
    }
}

#[test]
fn a_lost_part_between_restart_markers_is_refused() {
    let bytes = fixture("444_restart.jpg");
    let markers: Vec<_> =
        (0..bytes.len() - 1).filter(|&at| bytes[at] == 0xff && (0xd0..=0xd7).contains(&bytes[at + 1])).collect();
    assert!(markers.len() > 8);
    for pair in markers.windows(2) {
        // With its marker, and without.
        let lost = [&bytes[..pair[0]], &bytes[pair[1]..]].concat();
        let emptied = [&bytes[..pair[0] + 2], &bytes[pair[1]..]].concat();
        for bytes in [lost, emptied] {
            let message = read(&bytes).expect_err("a part is missing");
            assert!(message.contains("JPEG"), "{message}");
        }
    }
}

#[test]
fn bytes_between_segments_and_before_markers_are_skipped() {
    for name in ["420_apart.jpg", "420_progressive.jpg", "444_restart.jpg"] {
        let bytes = fixture(name);
        let image = whole(&bytes);
        let scans: Vec<_> = (1..bytes.len() - 1).filter(|&at| bytes[at..].starts_with(&[0xff, 0xda])).collect();
        for at in scans.into_iter().chain([bytes.len() - 2]) {
            for filling in [&b"\0"[..], b"\xff\xff\xff", b"some bytes between", &[0; 40]] {
                let filled = [&bytes[..at], filling, &bytes[at..]].concat();
                assert_eq!(read(&filled), Ok(image.clone()), "{name}, {} at {at}", filling.escape_ascii());
            }
        }
    }
}

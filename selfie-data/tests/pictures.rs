//! Pictures look as a viewer shows them: files and expected pixels by Pillow, see `fixtures/make.py`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use selfie_data::{Draws, Error, Need, Purpose, Split, open};

struct Zero;

impl Draws for Zero {
    fn words(&self, _: Purpose, _: u64, _: u32) -> [u32; 4] {
        [0; 4]
    }
}

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/pictures");

#[test]
fn every_kind_of_picture_has_its_colours() {
    let data = open(Path::new(FIXTURES), Split::Train, Need::Images, &|_| Arc::new(Zero)).expect("images");
    let places: BTreeMap<_, _> = (0..data.len()).map(|index| (data.key(index), index)).collect();
    let expected = fs::read_to_string(Path::new(FIXTURES).join("expected.txt")).expect("there");
    let mut wrong = Vec::new();
    for line in expected.lines() {
        let mut words = line.split(' ');
        let name = words.next().expect("a name");
        let numbers: Vec<usize> = words.map(|word| word.parse().expect("a number")).collect();
        let pixels = fs::read(Path::new(FIXTURES).join(format!("{name}.rgb"))).expect("there");
        match data.read(places[name]) {
            Ok(image) if [image.height, image.width] != numbers[..2] => {
                wrong.push(format!("{name}: {} x {}, not {numbers:?}", image.height, image.width));
            }
            Ok(image) => {
                let off = image.pixels.iter().zip(&pixels).map(|(a, b)| a.abs_diff(*b)).max().unwrap_or(0);
                if usize::from(off) > numbers[2] || image.pixels.len() != pixels.len() {
                    wrong.push(format!("{name}: off by {off}, not {}", numbers[2]));
                }
            }
            Err(error) => wrong.push(error.to_string()),
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), expected.lines().count(), wrong.join("\n"));
    assert_eq!(expected.lines().count(), 64);
}

#[test]
fn pictures_that_cannot_be_shown_are_refused_by_name() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (file, part) in [
        ("truncated.jpg", "a truncated JPEG"),
        ("animated.gif", "a GIF"),
        ("page.html", "an HTML page"),
        ("huge.jpg", "65535 x 65535 pixels"),
    ] {
        // Whatever it is called.
        fs::copy(Path::new(FIXTURES).join("refused").join(file), folder.path().join("image.JPEG")).expect("writable");
        let data = open(folder.path(), Split::Train, Need::Images, &|_| Arc::new(Zero)).expect("a file");
        let error = data.read(0).expect_err("must be refused");
        assert!(matches!(&error, Error::BadImage { key, .. } if key == "image.JPEG"), "{error:?}");
        assert!(error.to_string().contains(part), "{file}: {error}");
    }
}

#[test]
fn the_content_decides_and_not_the_name() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for file in ["rgb.png", "cmyk_adobe.jpg", "rgb.webp", "rgb.tiff"] {
        fs::copy(Path::new(FIXTURES).join(file), folder.path().join("image.JPEG")).expect("writable");
        let data = open(folder.path(), Split::Train, Need::Images, &|_| Arc::new(Zero)).expect("a file");
        assert_eq!(data.read(0).map(|image| (image.height, image.width)).expect("an image"), (16, 24), "{file}");
    }
}

//! A decoded image, and decoding.

use std::io::{self, Cursor};
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use crate::foreign::Foreign;
use crate::loader::panic_message;
use crate::{exif, jpeg};

/// An image in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// [height, width, 3], RGB.
    pub pixels: Vec<u8>,
}

/// What one image may be, decoded: 170 megapixels of RGB. A larger one is taken for a decompression bomb. A JPEG's
/// decoder takes up to four times as much on the way, for a file that has data for each of these pixels.
const MAX_BYTES: u64 = 512 << 20;

/// Refuses a file of more bytes than an image may have decoded.
pub(crate) fn check_size(bytes: u64) -> io::Result<()> {
    match bytes {
        0..=MAX_BYTES => Ok(()),
        _ => Err(io::Error::other(format!("{bytes} bytes, more than the {} MiB of any image", MAX_BYTES >> 20))),
    }
}

impl Image {
    /// Decodes a file's bytes as a viewer shows them: the format by content, EXIF orientation
    /// applied, grey, palette, CMYK and 16-bit images to RGB, alpha dropped, the first frame of an
    /// animation. `tests/pictures.rs` compares with Pillow.
    ///
    /// # Errors
    /// A sentence. A decoder that panics is an error like any other: one file must not end a run.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        catch_unwind(AssertUnwindSafe(|| decode(bytes)))
            .unwrap_or_else(|panic| Err(format!("the decoder failed: {}", panic_message(&*panic))))
    }
}

fn decode(bytes: &[u8]) -> Result<Image, String> {
    if bytes.is_empty() {
        return Err("an empty file".into());
    }
    if bytes.starts_with(&[0xff, 0xd8, 0xff]) {
        let (picture, orientation) = jpeg::decode(bytes, check_pixels)?;
        return Ok(turned(picture.into(), orientation));
    }
    if let Some(foreign) = Foreign::recognise(bytes) {
        return Err(foreign.to_string());
    }
    let format =
        image::guess_format(bytes).map_err(|_| format!("no known image format, begins with {}", start(bytes)))?;
    if !format.reading_enabled() {
        let name = format!("{format:?}").to_uppercase();
        return Err(format!("a {name}, which is not read: convert it to PNG or JPEG"));
    }
    let say = |error: image::ImageError| error.to_string();
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_BYTES);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(say)?;
    let (columns, rows) = decoder.dimensions();
    check_pixels(rows as usize, columns as usize)?;
    if decoder.total_bytes() > MAX_BYTES {
        return Err(format!("{rows} x {columns} pixels: more than {} MiB decoded", MAX_BYTES >> 20));
    }
    // An unreadable orientation is no reason to lose the image.
    let orientation = match decoder.exif_metadata() {
        _ if format == ImageFormat::Png => exif::of_png(bytes),
        Ok(Some(chunk)) => exif::of_chunk(&chunk),
        _ => decoder.orientation().unwrap_or(Orientation::NoTransforms),
    };
    Ok(turned(DynamicImage::from_decoder(decoder).map_err(say)?, orientation))
}

/// Refuses sizes that are no image's.
fn check_pixels(rows: usize, columns: usize) -> Result<(), String> {
    match rows as u64 * columns as u64 * 3 {
        1..=MAX_BYTES => Ok(()),
        _ => Err(format!("{rows} x {columns} pixels: empty, or more than {} MiB decoded", MAX_BYTES >> 20)),
    }
}

fn turned(mut picture: DynamicImage, orientation: Orientation) -> Image {
    picture.apply_orientation(orientation);
    let rgb = picture.into_rgb8();
    Image { height: rgb.height() as usize, width: rgb.width() as usize, pixels: rgb.into_raw() }
}

fn start(bytes: &[u8]) -> String {
    let start: Vec<_> = bytes.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    start.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{GrayImage, ImageBuffer, Luma, LumaA, Rgb, RgbImage, Rgba};

    fn encode(picture: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        picture.into().write_to(&mut bytes, format).expect("an in-memory image");
        bytes.into_inner()
    }

    /// 3 rows, 5 columns, all pixels different.
    fn sample() -> RgbImage {
        RgbImage::from_fn(5, 3, |x, y| Rgb([x as u8 * 50, y as u8 * 100, 7]))
    }

    #[test]
    fn lossless_formats_come_back_exactly() {
        for format in [ImageFormat::Png, ImageFormat::Bmp, ImageFormat::Pnm, ImageFormat::Tiff, ImageFormat::WebP] {
            let image = Image::decode(&encode(sample(), format)).expect("well formed");
            assert_eq!((image.height, image.width), (3, 5));
            assert_eq!(image.pixels, sample().into_raw(), "{format:?}");
        }
    }

    #[test]
    fn other_colours_become_rgb() {
        let one = |bytes: Vec<u8>| Image::decode(&bytes).expect("well formed").pixels;
        let png = ImageFormat::Png;
        assert_eq!(one(encode(GrayImage::from_pixel(1, 1, Luma([9])), png)), [9, 9, 9]);
        assert_eq!(one(encode(ImageBuffer::from_pixel(1, 1, Luma([0x8080u16])), png)), [0x80; 3]);
        assert_eq!(one(encode(ImageBuffer::from_pixel(1, 1, LumaA([9u8, 0])), png)), [9, 9, 9]);
        assert_eq!(one(encode(ImageBuffer::from_pixel(1, 1, Rgba([1u8, 2, 3, 0])), png)), [1, 2, 3]);
        assert_eq!(one(encode(ImageBuffer::from_pixel(1, 1, Rgb([0xffffu16, 0, 0x0101])), png)), [255, 0, 1]);
        assert_eq!(one(encode(GrayImage::from_pixel(8, 8, Luma([77])), ImageFormat::Jpeg)), [77; 192]);
        // A BMP of one pixel with a palette of two colours (blue, green, red, 0); the pixel is the second.
        let mut bmp = b"BM".to_vec();
        for field in [66u32, 0, 62, 40, 1, 1, 1 | 8 << 16, 0, 4, 0, 0, 2, 0] {
            bmp.extend(field.to_le_bytes());
        }
        bmp.extend([1, 1, 1, 0, 30, 20, 10, 0, 1, 0, 0, 0]);
        assert_eq!(one(bmp), [10, 20, 30]);
    }

    /// Puts an application segment 1 behind the start marker of a JPEG.
    fn with_segment(jpeg: &[u8], content: &[u8]) -> Vec<u8> {
        let length = (content.len() as u16 + 2).to_be_bytes();
        [&[0xff, 0xd8, 0xff, 0xe1], &length[..], content, &jpeg[2..]].concat()
    }

    fn oriented(jpeg: &[u8], orientation: u8) -> Vec<u8> {
        let mut exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0".to_vec();
        exif.extend([orientation, 0, 0, 0, 0, 0, 0, 0]);
        with_segment(jpeg, &exif)
    }

    #[test]
    fn exif_orientation_is_applied() {
        // Left half black, right half white; 6 means: to be turned by 90 degrees clockwise.
        let jpeg = encode(GrayImage::from_fn(32, 16, |x, _| Luma([if x < 16 { 0 } else { 255 }])), ImageFormat::Jpeg);
        let image = Image::decode(&oriented(&jpeg, 6)).expect("well formed");
        assert_eq!((image.height, image.width), (32, 16));
        assert!(image.pixels[..16 * 3].iter().all(|&value| value < 8));
        assert!(image.pixels[31 * 16 * 3..].iter().all(|&value| value > 247));
        let image = Image::decode(&oriented(&jpeg, 3)).expect("well formed");
        assert!(image.pixels[0] > 247 && image.pixels[31 * 3] < 8);
        assert_eq!(Image::decode(&oriented(&jpeg, 200)), Image::decode(&jpeg));
    }

    /// As in browsers.
    #[test]
    fn an_orientation_that_xmp_alone_has_is_not_looked_for() {
        let jpeg = encode(sample(), ImageFormat::Jpeg);
        let xmp = b"http://ns.adobe.com/xap/1.0/\0<rdf:Description tiff:Orientation=\"6\"/>";
        assert_eq!(Image::decode(&with_segment(&jpeg, xmp)), Image::decode(&jpeg));
        assert_ne!(Image::decode(&oriented(&jpeg, 6)), Image::decode(&jpeg));
    }

    #[test]
    fn every_truncation_is_an_error_or_the_whole_image() {
        let picture = RgbImage::from_fn(40, 24, |x, y| Rgb([x as u8 * 6, y as u8 * 10, (x * y) as u8]));
        for format in [
            ImageFormat::Jpeg,
            ImageFormat::Png,
            ImageFormat::WebP,
            ImageFormat::Tiff,
            ImageFormat::Bmp,
            ImageFormat::Pnm,
        ] {
            let bytes = encode(picture.clone(), format);
            let whole = Image::decode(&bytes).expect("well formed");
            for cut in 0..bytes.len() {
                if let Ok(image) = Image::decode(&bytes[..cut]) {
                    assert_eq!(image, whole, "{format:?}, {cut} of {} bytes", bytes.len());
                }
            }
            assert!(Image::decode(&bytes[..bytes.len() / 2]).is_err(), "{format:?}");
        }
    }

    #[test]
    fn a_truncated_jpeg_is_not_saved_by_its_thumbnail() {
        let jpeg = encode(GrayImage::from_fn(64, 64, |x, y| Luma([(x * y) as u8])), ImageFormat::Jpeg);
        let mut bytes = vec![0xff, 0xd8, 0xff, 0xe2];
        bytes.extend((jpeg.len() as u16 + 2).to_be_bytes());
        let with_thumbnail = [bytes.as_slice(), &jpeg, &jpeg[2..]].concat();
        assert!(Image::decode(&with_thumbnail).is_ok());
        let message = Image::decode(&with_thumbnail[..with_thumbnail.len() - 40]).expect_err("cut off");
        assert!(message.contains("truncated"), "{message}");
        // What follows the end is nobody's business.
        assert!(Image::decode(&[with_thumbnail.as_slice(), b"trailing bytes"].concat()).is_ok());
    }

    #[test]
    fn rubbish_is_an_error() {
        assert_eq!(Image::decode(b""), Err("an empty file".into()));
        let message = Image::decode(b"anything").expect_err("not an image");
        assert!(message.contains("61 6e 79 74"), "{message}");
        let message = Image::decode(b"<!DOCTYPE html>").expect_err("not an image");
        assert!(message.contains("an HTML page") && message.contains("download"), "{message}");
        assert!(Image::decode(&[0xff, 0xd8, 0xff]).is_err());
    }

    #[test]
    fn decompression_bombs_are_refused() {
        // A PNG that claims 60,000 x 60,000 pixels.
        let mut bytes = encode(sample(), ImageFormat::Png);
        bytes[16..20].copy_from_slice(&60_000u32.to_be_bytes());
        bytes[20..24].copy_from_slice(&60_000u32.to_be_bytes());
        let mut checksum = flate2::Crc::new();
        checksum.update(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&checksum.sum().to_be_bytes());
        let message = Image::decode(&bytes).expect_err("11 GB of pixels");
        assert!(message.contains("60000") || message.to_lowercase().contains("limit"), "{message}");
    }
}

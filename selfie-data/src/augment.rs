//! From a decoded image to the square the network sees.
//!
//! Two ways, by the geometry of the data:
//! - images that already have the right size are passed on as they are; for training the *draws*
//!   of a padded crop and a flip go with them, and the kernels apply them;
//! - all others are cropped and resized here, in the loader's threads, with the antialiased
//!   bilinear filter of torchvision: a random resized crop for training, for evaluation the
//!   shorter side to 256/224 of the size and the centre of that. Of the draws only the flip is left.

use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};

use crate::dataset::{Dataset, Geometry};
use crate::draws::{Draws, Purpose, Words};
use crate::error::{Error, Result};
use crate::picture::Image;

/// Zero padding, in pixels, of the random crop of images that already have the right size.
pub const CROP_PADDING: u32 = 4;

/// What happens to images on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Augment {
    /// Random crop (padded, or resized) and horizontal flip.
    Train,
    /// As `Train`, but images of the right size are only flipped, never shifted: the black rows and columns that a shift
    /// brings in tell where in the image a patch lies. A pretext network takes that hint and learns little else (CIFAR-10:
    /// 64% right in training, 40% on test images, which have no such border).
    Unpadded,
    /// Nothing random.
    Eval,
}

/// What the kernels still have to do to an image: output pixel (y, x) is input pixel
/// (y + `dy`, x' + `dx`), where x' is x, or width - 1 - x if `flip`; outside the image it is black,
/// pixel value 0, *before* mean and scale. (Crop of the image padded by [`CROP_PADDING`] at offset
/// (`dy` + 4, `dx` + 4), then flip.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Draw {
    /// Rows down, -4 to 4.
    pub dy: i8,
    /// Columns right, -4 to 4.
    pub dx: i8,
    /// Mirror left and right.
    pub flip: bool,
}

/// The shorter side before the centre crop, over the crop's side.
const EVAL_RESIZE: f64 = 256.0 / 224.0;

/// Brings images of one dataset to `size` x `size`.
pub(crate) struct Framing {
    pub(crate) size: usize,
    pub(crate) augment: Augment,
}

impl Framing {
    /// Writes image `index` to `pixels`, [size, size, 3]. `sample` is the global sample number.
    pub(crate) fn write(
        &self,
        dataset: &dyn Dataset,
        index: usize,
        draws: &dyn Draws,
        sample: u64,
        resizer: &mut Resizer,
        pixels: &mut [u8],
    ) -> Result<Draw> {
        let exact = Geometry::Fixed { height: self.size, width: self.size };
        let mut draw = Draw::default();
        if self.augment != Augment::Eval {
            draw.flip = draws.words(Purpose::Flip, sample, 0)[0] >> 31 == 1;
        }
        if dataset.geometry() == exact {
            dataset.read_into(index, pixels)?;
            if self.augment == Augment::Train {
                let mut words = Words::new(draws, Purpose::Crop, sample);
                let mut shift = || (words.below(2 * CROP_PADDING + 1) as i32 - CROP_PADDING as i32) as i8;
                draw.dy = shift();
                draw.dx = shift();
            }
            return Ok(draw);
        }
        let image = dataset.read(index)?;
        let area = match self.augment {
            Augment::Train | Augment::Unpadded => {
                random_area(image.height, image.width, &mut Words::new(draws, Purpose::ResizedCrop, sample))
            }
            Augment::Eval => centre_area(image.height, image.width),
        };
        resize(&image, area, self.size, resizer, pixels)
            .map_err(|reason| Error::BadImage { key: dataset.key(index), reason })?;
        Ok(draw)
    }
}

/// A part of an image, in pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Area {
    top: f64,
    left: f64,
    height: f64,
    width: f64,
}

/// The area of torchvision's `RandomResizedCrop`: 8 to 100 % of the image, aspect 3:4 to 4:3, ten
/// tries, then the largest centred area of an allowed aspect.
fn random_area(height: usize, width: usize, words: &mut Words<'_>) -> Area {
    const LN_4_3: f64 = 0.287_682_072_451_780_9;
    let (rows, columns) = (height as f64, width as f64);
    for _ in 0..10 {
        let target = rows * columns * words.uniform(0.08, 1.0);
        let aspect = exp_small(words.uniform(-LN_4_3, LN_4_3));
        let w = (target * aspect).sqrt().round_ties_even();
        let h = (target / aspect).sqrt().round_ties_even();
        if (1.0..=columns).contains(&w) && (1.0..=rows).contains(&h) {
            let top = f64::from(words.below((rows - h) as u32 + 1));
            let left = f64::from(words.below((columns - w) as u32 + 1));
            return Area { top, left, height: h, width: w };
        }
    }
    let (h, w) = if columns / rows < 0.75 {
        ((columns / 0.75).round_ties_even(), columns)
    } else if columns / rows > 4.0 / 3.0 {
        (rows, (rows * (4.0 / 3.0)).round_ties_even())
    } else {
        (rows, columns)
    };
    Area { top: ((rows - h) / 2.0).floor(), left: ((columns - w) / 2.0).floor(), height: h, width: w }
}

/// exp of |x| < 0.3 by its series, error below 1e-15: the platform's `exp` may differ in the last
/// bit from machine to machine, and a crop with it.
fn exp_small(x: f64) -> f64 {
    (1..=14).rev().fold(1.0, |sum, n| 1.0 + sum * x / f64::from(n))
}

/// The centred square that resizing the shorter side to 256/224 of the size and cropping the
/// centre would keep. Resizing just that square is the same, without the rounding between.
fn centre_area(height: usize, width: usize) -> Area {
    let side = height.min(width) as f64 / EVAL_RESIZE;
    Area { top: (height as f64 - side) / 2.0, left: (width as f64 - side) / 2.0, height: side, width: side }
}

/// Resizes `area` of `image` to `pixels`, [size, size, 3].
fn resize(
    image: &Image,
    area: Area,
    size: usize,
    resizer: &mut Resizer,
    pixels: &mut [u8],
) -> std::result::Result<(), String> {
    let say = |error: &dyn std::fmt::Display| format!("{} x {} pixels: {error}", image.height, image.width);
    let side = u32::try_from(size).map_err(|error| say(&error))?;
    let (width, height) = (image.width as u32, image.height as u32);
    let source = TypedImageRef::<U8x3>::from_buffer(width, height, &image.pixels).map_err(|error| say(&error))?;
    let mut target = TypedImage::<U8x3>::from_buffer(side, side, pixels).map_err(|error| say(&error))?;
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear)).crop(
        area.left,
        area.top,
        area.width,
        area.height,
    );
    resizer.resize_typed(&source, &mut target, &options).map_err(|error| say(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{HashDraws, Plain};
    use proptest::prelude::*;

    fn resized(image: &Image, area: Area, size: usize) -> Vec<u8> {
        let mut pixels = vec![0; size * size * 3];
        resize(image, area, size, &mut Resizer::new(), &mut pixels).expect("the area lies inside");
        pixels
    }

    #[test]
    fn evaluation_keeps_the_centre() {
        // Shorter side 256: the scale is 1 and the crop is exact.
        let (height, width) = (256, 400);
        let pixels =
            (0..height * width).flat_map(|at| [(at / width) as u8, (at % width) as u8, (at % width / 256) as u8]);
        let image = Image { height, width, pixels: pixels.collect() };
        let out = resized(&image, centre_area(height, width), 224);
        for (at, pixel) in out.chunks(3).enumerate() {
            let (y, x) = (at / 224 + 16, at % 224 + 88);
            assert_eq!(pixel, [y as u8, x as u8, (x / 256) as u8]);
        }
    }

    #[test]
    fn halving_averages() {
        // The triangle filter at scale 2 weighs 1/8, 3/8, 3/8, 1/8; on a ramp that is the mean of the middle two.
        let image =
            Image { height: 64, width: 64, pixels: (0..64 * 64).flat_map(|at| [(at % 64 * 4) as u8; 3]).collect() };
        let out = resized(&image, Area { top: 0.0, left: 0.0, height: 64.0, width: 64.0 }, 32);
        for x in 1..31 {
            assert_eq!(out[(5 * 32 + x) * 3], (x * 8 + 2) as u8);
        }
    }

    proptest! {
        #[test]
        fn areas_lie_inside_and_keep_their_limits(height in 1usize..700, width in 1usize..700, seed: u64, sample: u64) {
            let draws = HashDraws(seed);
            let area = random_area(height, width, &mut Words::new(&draws, Purpose::ResizedCrop, sample));
            let (rows, columns) = (height as f64, width as f64);
            prop_assert!(area.top >= 0.0 && area.left >= 0.0 && area.height >= 1.0 && area.width >= 1.0);
            prop_assert!(area.top + area.height <= rows && area.left + area.width <= columns);
            // Rounding moves each side by up to half a pixel.
            prop_assert!(area.width - 0.5 <= (area.height + 0.5) * 4.0 / 3.0 + 1e-9);
            prop_assert!(area.height - 0.5 <= (area.width + 0.5) * 4.0 / 3.0 + 1e-9);
            prop_assert!((area.height + 0.5) * (area.width + 0.5) >= 0.08 * rows * columns || columns / rows > 4.0 / 3.0 || rows / columns > 4.0 / 3.0);
        }
    }

    #[test]
    fn areas_have_the_distribution_of_torchvision() {
        let draws = HashDraws(3);
        let areas: Vec<_> = (0..4_000)
            .map(|sample| random_area(1_000, 1_000, &mut Words::new(&draws, Purpose::ResizedCrop, sample)))
            .collect();
        let shares: Vec<_> = areas.iter().map(|area| area.height * area.width / 1e6).collect();
        assert!(shares.iter().all(|share| (0.079..=1.0).contains(share)));
        // Shares up to 3/4 fit at every aspect, so they stay uniform: below and above the middle of
        // 0.08..0.75 lie as many, within 4 standard deviations.
        let low = shares.iter().filter(|share| **share < 0.415).count() as f64;
        let high = shares.iter().filter(|share| (0.415..0.75).contains(*share)).count() as f64;
        assert!((low - high).abs() < 4.0 * (low + high).sqrt(), "{low} {high}");
        // The logarithm of the aspect is symmetric.
        let wide = areas.iter().filter(|area| area.width > area.height).count() as f64;
        assert!((wide - 2_000.0).abs() < 4.0 * 1_000f64.sqrt(), "{wide}");
        assert!(areas.iter().any(|area| area.width / area.height > 1.3));
        assert!(areas.iter().any(|area| area.height / area.width > 1.3));
    }

    #[test]
    fn narrow_images_fall_back_to_the_centre() {
        let draws = HashDraws(0);
        let area = |height, width| random_area(height, width, &mut Words::new(&draws, Purpose::ResizedCrop, 0));
        assert_eq!(area(10, 1_000), Area { top: 0.0, left: 493.0, height: 10.0, width: 13.0 });
        assert_eq!(area(1_000, 10), Area { top: 493.0, left: 0.0, height: 13.0, width: 10.0 });
    }

    #[test]
    fn the_small_exponential_is_exact() {
        for step in -30..=30 {
            let x = f64::from(step) / 100.0;
            assert!((exp_small(x) / x.exp() - 1.0).abs() < 4.0 * f64::EPSILON, "{x}");
        }
    }

    #[test]
    fn the_right_size_is_left_alone_and_others_are_resized() {
        let dataset = Plain { size: 8, ..Plain::new(20) };
        let write = |size: usize, augment, sample| {
            let mut pixels = vec![0; size * size * 3];
            let framing = Framing { size, augment };
            let draw = framing.write(&dataset, 9, &HashDraws(0), sample, &mut Resizer::new(), &mut pixels);
            assert!(pixels.iter().all(|&value| value == 9));
            draw.expect("readable")
        };
        for sample in 0..50 {
            assert_eq!(write(8, Augment::Eval, sample), Draw::default());
            assert_eq!(write(5, Augment::Eval, sample), Draw::default());
            let (padded, resized) = (write(8, Augment::Train, sample), write(12, Augment::Train, sample));
            // A resized crop needs no second crop; the flip does not depend on the kind of crop.
            assert_eq!(resized, Draw { flip: padded.flip, ..Draw::default() });
        }
    }
}

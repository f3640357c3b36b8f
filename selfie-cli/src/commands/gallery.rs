//! What `embed`, `neighbors` and `map` share: the images of some data with their features, and their pictures.

use selfie_data::{BadFile, Image};
use serde_json::{Value, json};

use super::begin::where_they_were;
use super::encoding::{Parameters, Trained};
use crate::data::{self, Collected, Which};
use crate::exit::Problem;
use crate::vectors::Vectors;

/// Images with their features.
pub struct Gallery {
    /// Features, names and labels, those of images that could be read.
    pub vectors: Vectors,
    /// Images that could not be.
    pub skipped: Vec<BadFile>,
    /// Where the images are.
    data: Collected,
    /// `[n]`: part of the data and place in it.
    places: Vec<(usize, usize)>,
}

impl Gallery {
    /// Encodes the images of a run's data, or of those that were given in their place. What is left out is said.
    ///
    /// # Errors
    /// Those of the data; input: no image that can be read.
    pub fn of(trained: &Trained, which: Which) -> anyhow::Result<Self> {
        let reporter = &trained.reporter;
        let found = data::for_embedding(&trained.settings.data, which);
        let mut data = found.map_err(|error| where_they_were(error, &trained.resolved))?;
        data.notes.iter().for_each(|note| reporter.say(note));
        trained.introduce();

        let mut vectors = Vectors { classes: std::mem::take(&mut data.classes), ..Vectors::default() };
        let mut places = Vec::new();
        let images: Vec<_> = data.parts.iter().map(|part| &part.images).collect();
        let skipped = trained.encode(Parameters::Trained, &images, &mut |number, image| {
            let part = &data.parts[number];
            vectors.width = image.features.len();
            vectors.names.push(part.images.dataset.key(image.index));
            vectors.labels.push(part.images.dataset.label(image.index).map(|label| part.labels[label as usize]));
            vectors.values.extend(image.features);
            places.push((number, image.index));
        })?;
        let skipped: Vec<_> = skipped.into_iter().flatten().collect();
        skipped.iter().for_each(|file| reporter.warn(format!("skipped {}: {}", file.key, file.reason)));
        if places.is_empty() {
            return Err(Problem::input(format!(
                "{}: expected images, found none that can be read",
                trained.settings.data.path.display()
            )));
        }
        Ok(Self { vectors, skipped, data, places })
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Features of image `i`.
    pub fn features(&self, i: usize) -> &[f32] {
        &self.vectors.values[i * self.vectors.width..][..self.vectors.width]
    }

    /// Class of image `i`, if it is known.
    pub fn class(&self, i: usize) -> Option<&str> {
        self.vectors.labels[i].map(|label| self.vectors.classes[label as usize].as_str())
    }

    /// Image `i` as a small square, `[side, side, 3]`.
    ///
    /// # Errors
    /// An image that cannot be read any more.
    pub fn thumbnail(&self, i: usize, side: usize) -> anyhow::Result<Vec<u8>> {
        let (part, index) = self.places[i];
        Ok(thumbnail(&self.data.parts[part].images.dataset.read(index)?, side))
    }

    /// What could not be read, as JSON.
    pub fn skipped_as_json(&self) -> Vec<Value> {
        self.skipped.iter().map(|file| json!({ "name": file.key, "reason": file.reason })).collect()
    }
}

/// The central square of an image at `side` pixels a side, `[side, side, 3]`: each is the mean of the pixels that it covers,
/// or the one that it lies in.
pub fn thumbnail(image: &Image, side: usize) -> Vec<u8> {
    let square = image.height.min(image.width);
    let (top, left) = ((image.height - square) / 2, (image.width - square) / 2);
    let range = |at: usize| {
        let first = at * square / side;
        first..((at + 1) * square / side).max(first + 1)
    };
    let mut pixels = Vec::with_capacity(3 * side * side);
    for (y, x) in (0..side * side).map(|i| (i / side, i % side)) {
        let (rows, columns) = (range(y), range(x));
        let count = rows.len() * columns.len();
        let mut sums = [0; 3];
        for (row, column) in rows.flat_map(|row| columns.clone().map(move |column| (row, column))) {
            let at = 3 * ((top + row) * image.width + left + column);
            sums.iter_mut().zip(&image.pixels[at..at + 3]).for_each(|(sum, &value)| *sum += usize::from(value));
        }
        pixels.extend(sums.map(|sum| ((sum + count / 2) / count) as u8));
    }
    pixels
}

/// Pixels that pictures are put on.
pub struct Sheet {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl Sheet {
    /// Of one grey.
    pub fn new(width: usize, height: usize, grey: u8) -> Self {
        Self { width, height, pixels: vec![grey; 3 * width * height] }
    }

    /// Puts a square of `side` pixels at (`left`, `top`).
    pub fn put(&mut self, left: usize, top: usize, side: usize, square: &[u8]) {
        for (row, line) in square.chunks_exact(3 * side).enumerate() {
            let at = 3 * ((top + row) * self.width + left);
            self.pixels[at..at + 3 * side].copy_from_slice(line);
        }
    }

    /// Fills a square with a colour.
    pub fn fill(&mut self, left: usize, top: usize, side: usize, colour: [u8; 3]) {
        self.put(left, top, side, &colour.repeat(side * side));
    }

    /// The bytes of a PNG file.
    ///
    /// # Errors
    /// Sides that no PNG has.
    pub fn png(&self) -> anyhow::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, u32::try_from(self.width)?, u32::try_from(self.height)?);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.pixels)?;
        writer.finish()?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thumbnail_is_the_middle_averaged_or_repeated() {
        // 2 rows of 4: the middle two columns count.
        let pixels: Vec<u8> = [9, 10, 20, 9, 9, 30, 41, 9].iter().flat_map(|&grey| [grey, grey, 2 * grey]).collect();
        let image = Image { height: 2, width: 4, pixels };
        assert_eq!(thumbnail(&image, 1), [25, 25, 51]);
        let small = [[10, 10, 20], [20, 20, 40], [30, 30, 60], [41, 41, 82]];
        assert_eq!(thumbnail(&image, 2), small.concat());
        let large = thumbnail(&image, 4);
        assert_eq!((&large[..3], &large[3..6], &large[6..9]), (&small[0][..], &small[0][..], &small[1][..]));
        assert_eq!(large[45..], small[3]);
    }

    #[test]
    fn a_sheet_is_a_png_with_its_squares() {
        let mut sheet = Sheet::new(5, 4, 7);
        sheet.fill(0, 0, 1, [1, 2, 3]);
        sheet.put(3, 2, 2, &[200; 12]);
        let bytes = sheet.png().expect("a PNG");
        let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().expect("ours");
        let mut pixels = vec![0; reader.output_buffer_size().expect("small")];
        let about = reader.next_frame(&mut pixels).expect("an image");
        assert_eq!((about.width, about.height, pixels.len()), (5, 4, 60));
        assert_eq!((&pixels[..6], &pixels[57..]), (&[1, 2, 3, 7, 7, 7][..], &[200; 3][..]));
        assert_eq!(pixels.iter().filter(|&&value| value == 200).count(), 12);
    }
}

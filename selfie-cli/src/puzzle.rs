//! The puzzle as a picture for terminals: an image with holes, the candidates, and what the model made of them.

use std::fmt::Write;

use crate::halfblocks::{Canvas, Colours, Rgb};

/// One image's puzzle. Places and patches are numbered by rows over the grid.
#[derive(Debug)]
pub struct Puzzle<'a> {
    /// `[side, side, 3]`.
    pub pixels: &'a [u8],
    /// Pixels along a side of the image.
    pub side: usize,
    /// Pixels along a side of a patch.
    pub patch: usize,
    /// The hidden places.
    pub hidden: &'a [usize],
    /// For each of them, which of `hidden` the model put there.
    pub picks: &'a [usize],
}

/// Columns between the parts of the picture.
const GAP: usize = 3;
const HOLE: Rgb = [40, 40, 40];
const RIGHT: Rgb = [60, 200, 80];
const WRONG: Rgb = [230, 60, 50];

impl Puzzle<'_> {
    /// How many places got their own patch.
    pub fn right(&self) -> usize {
        self.picks.iter().enumerate().filter(|&(place, &pick)| place == pick).count()
    }

    /// In words: `1 ← B  2 ← A  …`, for terminals without colours.
    pub fn words(&self) -> String {
        let mut text = String::new();
        for (place, &pick) in self.picks.iter().enumerate() {
            let verdict = if place == pick { "right" } else { "wrong" };
            // Nothing but a string is written to.
            let _ = write!(text, "place {} <- patch {} ({verdict})  ", place + 1, letter(pick));
        }
        text.trim_end().to_string()
    }

    /// The picture: the image with holes, the candidates below one another, the image as the model fills it, framed
    /// green where right and red where wrong.
    pub fn picture(&self, colours: Colours) -> Vec<String> {
        let rows = self.side / self.patch;
        // Candidates stand one below the other, in as many columns as it takes.
        let pitch = self.patch + 2;
        let in_column = (self.side + self.patch) / pitch;
        let columns = self.hidden.len().div_ceil(in_column);
        let second = self.side + GAP;
        let third = second + columns * pitch - 2 + GAP;
        // Two rows of pixels are a line.
        let height = self.side.max(in_column.min(self.hidden.len()) * pitch - 2).next_multiple_of(2);
        let mut canvas = Canvas::new(third + self.side, height);
        for y in 0..self.side {
            for x in 0..self.side {
                let colour = self.pixel(y, x);
                let hole = self.hidden.contains(&(y / self.patch * rows + x / self.patch));
                canvas.set(y, x, if hole { HOLE } else { colour });
                canvas.set(y, third + x, colour);
            }
        }
        for (number, &place) in self.hidden.iter().enumerate() {
            let (row, column) = (number % in_column, number / in_column);
            self.draw(&mut canvas, row * pitch, second + column * pitch, place, None);
            let frame = if self.picks[number] == number { RIGHT } else { WRONG };
            let (y, x) = (place / rows * self.patch, place % rows * self.patch);
            self.draw(&mut canvas, y, third + x, self.hidden[self.picks[number]], Some(frame));
        }
        let title =
            format!("{:<1$}{2:<3$}where it puts them (red: wrong)", "what it sees", second, "patches", third - second);
        std::iter::once(title).chain((0..height / 2).map(|line| canvas.line(line, colours))).collect()
    }

    fn pixel(&self, y: usize, x: usize) -> Rgb {
        let at = (y * self.side + x) * 3;
        [self.pixels[at], self.pixels[at + 1], self.pixels[at + 2]]
    }

    /// Draws the patch of `place` at (y, x).
    fn draw(&self, canvas: &mut Canvas, y: usize, x: usize, place: usize, frame: Option<Rgb>) {
        let rows = self.side / self.patch;
        let (top, left) = (place / rows * self.patch, place % rows * self.patch);
        for dy in 0..self.patch {
            for dx in 0..self.patch {
                let edge = [0, self.patch - 1].contains(&dy) || [0, self.patch - 1].contains(&dx);
                let colour = frame.filter(|_| edge).unwrap_or_else(|| self.pixel(top + dy, left + dx));
                canvas.set(y + dy, x + dx, colour);
            }
        }
    }
}

fn letter(number: usize) -> char {
    char::from(b'A' + (number % 26) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 4 x 4 pixels, patches of 2: patch p has the grey value 10 p.
    fn pixels() -> Vec<u8> {
        (0..16).flat_map(|i| [10 * (i / 8 * 2 + i % 4 / 2) as u8; 3]).collect()
    }

    #[test]
    fn holes_candidates_and_picks_are_where_they_belong() {
        let pixels = pixels();
        let puzzle = Puzzle { pixels: &pixels, side: 4, patch: 2, hidden: &[3, 0], picks: &[0, 0] };
        assert_eq!(puzzle.right(), 1);
        assert_eq!(puzzle.words(), "place 1 <- patch A (right)  place 2 <- patch A (wrong)");
        let picture = puzzle.picture(Colours::True);
        // A title, then 4 rows of pixels; the candidates stand side by side.
        assert_eq!(picture.len(), 3);
        let colour = |[r, g, b]: Rgb| format!("38;2;{r};{g};{b}m");
        // First line: the hole at place 0, patch 1, then candidate A, which is patch 3; then the wrong pick's red frame.
        let places: Vec<_> = [HOLE, [10; 3], [30; 3], WRONG].map(|c| picture[1].find(&colour(c))).into();
        assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{places:?}");
        assert!(picture[2].contains(&colour(RIGHT)));
    }
}

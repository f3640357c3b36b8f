//! Pictures in a terminal: a character is two pixels, one above the other.

/// What a terminal can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colours {
    /// Any colour.
    True,
    /// The 6 x 6 x 6 cube of 256 colours.
    Cube,
    /// None: words.
    None,
}

impl Colours {
    /// Of the terminal that the environment describes.
    pub fn of_terminal() -> Self {
        let variable = |name: &str| std::env::var(name).unwrap_or_default();
        if !variable("NO_COLOR").is_empty() || variable("TERM") == "dumb" {
            Self::None
        } else if ["truecolor", "24bit"].contains(&variable("COLORTERM").as_str()) {
            Self::True
        } else if variable("TERM").contains("256color") {
            Self::Cube
        } else {
            Self::None
        }
    }
}

/// Red, green, blue.
pub type Rgb = [u8; 3];

/// A canvas of pixels; two rows make one line of text.
#[derive(Debug)]
pub struct Canvas {
    width: usize,
    pixels: Vec<Option<Rgb>>,
}

impl Canvas {
    /// Of nothing; `height` is even.
    pub fn new(width: usize, height: usize) -> Self {
        Self { width, pixels: vec![None; width * height] }
    }

    /// Colours a pixel.
    pub fn set(&mut self, y: usize, x: usize, colour: Rgb) {
        self.pixels[y * self.width + x] = Some(colour);
    }

    /// A line of text: two rows of pixels.
    pub fn line(&self, line: usize, colours: Colours) -> String {
        let mut text = String::new();
        let row = |y: usize| &self.pixels[y * self.width..][..self.width];
        for (upper, lower) in row(2 * line).iter().zip(row(2 * line + 1)) {
            match (upper, lower) {
                (Some(upper), Some(lower)) => {
                    text += &code(38, *upper, colours);
                    text += &code(48, *lower, colours);
                    text.push('▀');
                }
                // What is not drawn has no lower half either: patches and gaps are even.
                _ => text += "\x1b[0m ",
            }
        }
        text + "\x1b[0m"
    }
}

/// The escape sequence of a colour; `layer` 38 is the foreground, 48 the background.
fn code(layer: u8, [r, g, b]: Rgb, colours: Colours) -> String {
    match colours {
        Colours::Cube => {
            let level = |value: u8| (u32::from(value) * 5 + 127) / 255;
            format!("\x1b[{layer};5;{}m", 16 + 36 * level(r) + 6 * level(g) + level(b))
        }
        Colours::True | Colours::None => format!("\x1b[{layer};2;{r};{g};{b}m"),
    }
}

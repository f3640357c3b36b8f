//! The confusion matrix as a file: a picture or a table.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use selfie_model::durable;

use crate::destination::{self, Existing};
use crate::exit::Problem;
use crate::svg::escaped;
use crate::vectors::field;

/// What every writer to a `String` is.
const INFALLIBLE: &str = "writing to a string cannot fail";

/// Counts are written into the cells of so many classes, names beside rows and columns of so many.
const NUMBERS_UP_TO: usize = 20;
const NAMES_UP_TO: usize = 250;

/// Characters of a name.
const NAME: usize = 20;

/// Right answers, and wrong ones.
const RIGHT: [f64; 3] = [8.0, 81.0, 156.0];
const WRONG: [f64; 3] = [203.0, 24.0, 29.0];

/// A file that is to be written.
#[derive(Debug)]
pub(super) struct Matrix {
    path: PathBuf,
    format: Format,
}

#[derive(Clone, Copy, Debug)]
enum Format {
    Svg,
    Csv,
}

impl Matrix {
    /// The format follows from the file's extension.
    ///
    /// # Errors
    /// Usage: an unknown extension, a file that is there.
    pub(super) fn new(path: &Path, existing: Existing) -> anyhow::Result<Self> {
        let format = match path.extension().unwrap_or_default().to_string_lossy().to_lowercase().as_str() {
            "svg" => Format::Svg,
            "csv" => Format::Csv,
            _ => {
                return Err(Problem::usage(format!(
                    "--matrix {}: expected a file name that ends with .svg or .csv",
                    path.display()
                )));
            }
        };
        destination::check("--matrix", path, &[path.into()], existing)?;
        Ok(Self { path: path.into(), format })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes it, whole.
    ///
    /// # Errors
    /// What the system refuses.
    pub(super) fn write(&self, classes: &[String], confusion: &[Vec<u64>]) -> anyhow::Result<()> {
        let text = match self.format {
            Format::Svg => svg(classes, confusion),
            Format::Csv => csv(classes, confusion),
        };
        Ok(durable::write_file(&self.path, text.as_bytes())?)
    }
}

/// A row for each class, a column for each prediction.
fn csv(classes: &[String], confusion: &[Vec<u64>]) -> String {
    let names: Vec<String> = classes.iter().map(|name| field(name)).collect();
    let mut text = format!("class,{}\n", names.join(","));
    for (name, row) in names.iter().zip(confusion) {
        let counts: Vec<String> = row.iter().map(u64::to_string).collect();
        writeln!(text, "{name},{}", counts.join(",")).expect(INFALLIBLE);
    }
    text
}

/// A square for each pair of classes, the darker the larger its share of the row.
fn svg(classes: &[String], confusion: &[Vec<u64>]) -> String {
    let count = classes.len();
    let cell = match count {
        0..=NUMBERS_UP_TO => 36.0,
        21..=60 => 16.0,
        61..=NAMES_UP_TO => 11.0,
        _ => (2500.0 / count as f64).max(1.0),
    };
    let has_names = count <= NAMES_UP_TO;
    let font = (cell - 2.0).min(12.0);
    let longest = classes.iter().map(|name| name.chars().count().min(NAME)).max().unwrap_or(0);
    let margin = if has_names { 0.62 * font * longest as f64 + 16.0 } else { 16.0 };
    let (left, top, side) = (margin + 22.0, margin + 56.0, cell * count as f64);
    let (width, height) = ((left + side + 24.0).max(560.0), top + side + 24.0);
    let mut svg = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0} {height:.0}" width="{width:.0}" height="{height:.0}" font-family="sans-serif" font-size="12" fill="#222222">
<title>Confusion matrix</title>
<rect width="100%" height="100%" fill="#ffffff"/>
<text x="8" y="20" font-weight="bold" font-size="14">Confusion matrix of {count} classes, {} images</text>
<text x="8" y="38">rows: the class; columns: what was predicted; shade: share of the row, <tspan fill="{}">right</tspan> and <tspan fill="{}">wrong</tspan></text>
"##,
        confusion.iter().flatten().sum::<u64>(),
        colour(RIGHT, 1.0),
        colour(WRONG, 1.0),
    );
    // A line under every tenth row guides the eye where there are many.
    let lines = if count <= NUMBERS_UP_TO { 1 } else { 10 };
    let mut grid = String::new();
    for line in (0..=count).filter(|line| line % lines == 0 || *line == count) {
        let at = line as f64 * cell;
        write!(grid, "M{left:.1} {:.1}h{side:.1}M{:.1} {top:.1}v{side:.1}", top + at, left + at).expect(INFALLIBLE);
    }
    for (class, row) in confusion.iter().enumerate() {
        let all: u64 = row.iter().sum();
        for (predicted, &images) in row.iter().enumerate().filter(|&(_, &images)| images > 0) {
            let share = images as f64 / all as f64;
            let base = if class == predicted { RIGHT } else { WRONG };
            // Few errors are to be seen as well: by the root.
            let shade = share.sqrt();
            let (x, y) = (left + predicted as f64 * cell, top + class as f64 * cell);
            write!(
                svg,
                r##"<rect x="{x:.1}" y="{y:.1}" width="{cell:.1}" height="{cell:.1}" fill="{}"><title>{} → {}: {images} ({:.1}%)</title></rect>"##,
                colour(base, shade),
                escaped(&classes[class]),
                escaped(&classes[predicted]),
                100.0 * share
            )
            .expect(INFALLIBLE);
            if count <= NUMBERS_UP_TO {
                let ink = if shade > 0.6 { "#ffffff" } else { "#222222" };
                write!(
                    svg,
                    r##"<text x="{:.1}" y="{:.1}" text-anchor="middle" font-size="11" fill="{ink}" pointer-events="none">{images}</text>"##,
                    x + cell / 2.0,
                    y + cell / 2.0 + 4.0
                )
                .expect(INFALLIBLE);
            }
            svg.push('\n');
        }
    }
    writeln!(svg, r##"<path d="{grid}" stroke="#d0d0d0" stroke-width="0.5" fill="none"/>"##).expect(INFALLIBLE);
    if has_names {
        for (class, name) in classes.iter().enumerate() {
            let (middle, name) = ((class as f64 + 0.5) * cell, escaped(&short(name)));
            let (x, y) = (left + middle + font * 0.36, top - 6.0);
            writeln!(
                svg,
                r##"<text x="{:.1}" y="{:.1}" text-anchor="end" font-size="{font:.1}">{name}</text><text transform="translate({x:.1} {y:.1}) rotate(-90)" font-size="{font:.1}">{name}</text>"##,
                left - 6.0,
                top + middle + font * 0.36
            )
            .expect(INFALLIBLE);
        }
    }
    svg + "</svg>\n"
}

/// Between white (0) and a colour (1).
fn colour(base: [f64; 3], shade: f64) -> String {
    let [r, g, b] = base.map(|value| (255.0 + (value - 255.0) * shade).round() as u8);
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// A long name's beginning.
fn short(name: &str) -> String {
    if name.chars().count() <= NAME { name.into() } else { name.chars().take(NAME - 1).chain(['…']).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_two_classes() {
        let classes = ["a,b", "c"].map(String::from);
        assert_eq!(csv(&classes, &[vec![3, 1], vec![0, 12]]), "class,\"a,b\",c\n\"a,b\",3,1\nc,0,12\n");
    }

    #[test]
    fn a_picture_has_a_square_for_each_pair_that_was_seen() {
        for count in [1, 2, 20, 21, 100, 1000] {
            let classes: Vec<String> = (0..count).map(|class| format!("<class {class}> of a very long name")).collect();
            let mut confusion = vec![vec![0; count]; count];
            (0..count).for_each(|class| confusion[class][class * 7 % count] += 2);
            confusion[0][count - 1] += 1;
            let text = svg(&classes, &confusion);
            let seen = confusion.iter().flatten().filter(|&&images| images > 0).count();
            assert_eq!(text.matches("<rect").count(), 1 + seen, "{count} classes");
            assert!(!text.contains("<class") && text.contains("&lt;class 0&gt; of a very…") == (count <= NAMES_UP_TO));
            assert!(!text.contains("NaN") && !text.contains("inf"));
            let names = text.matches("rotate(-90)").count();
            assert_eq!(names, if count <= NAMES_UP_TO { count } else { 0 });
        }
    }
}

//! Labels of a validation folder without class folders, as ImageNet's is unpacked: from a file
//! inside it or beside it.
//!
//! - `val.txt`, `val_labels.txt`: `file class` on a line; the class is the name of a folder of
//!   train/, or, all through the file, its place among the sorted names, from 0. A tab may part them;
//! - `LOC_val_solution.csv` (Kaggle): `ILSVRC2012_val_00000001,n01751748 111 108 244 300`;
//! - `imagenet_2012_validation_synset_labels.txt` (TensorFlow): a class on a line, in the order of
//!   the sorted file names.
//!
//! `ILSVRC2012_validation_ground_truth.txt` is refused: its numbers are the devkit's own.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

const LISTS: [&str; 2] = ["val.txt", "val_labels.txt"];
const KAGGLE: &str = "LOC_val_solution.csv";
const TENSORFLOW: &str = "imagenet_2012_validation_synset_labels.txt";
const DEVKIT: &str = "ILSVRC2012_validation_ground_truth.txt";

/// What is known about the data around a flat folder.
pub(crate) struct Flat<'a> {
    /// The folder or tar of the data.
    pub(crate) root: &'a Path,
    /// The flat folder's name in there.
    pub(crate) part: &'a Path,
    /// Sorted names of the class folders of train/.
    pub(crate) classes: &'a [String],
    /// Names of the images, sorted.
    pub(crate) images: &'a [String],
    /// The bytes of a file, by its path inside the root, if it is there.
    pub(crate) read: &'a dyn Fn(&Path) -> Result<Option<Vec<u8>>>,
}

/// A line of a label file: its number from 1, the image it names, if it does, and the class.
struct Line<'t> {
    number: usize,
    image: Option<&'t str>,
    class: &'t str,
}

impl Flat<'_> {
    /// The class of every image; `None` if there is no file of labels.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a file that does not say it for all images, or says it of others.
    pub(crate) fn labels(&self) -> Result<Option<Vec<u32>>> {
        for name in LISTS.into_iter().chain([KAGGLE, TENSORFLOW]) {
            if let Some((path, text)) = self.find(name)? {
                return self.read_labels(name, &path, &text).map(Some);
            }
        }
        match self.find(DEVKIT)? {
            Some((path, _)) => Err(Error::malformed(
                path,
                format!("{KAGGLE}, {TENSORFLOW} or val.txt"),
                "the ground truth of the devkit, whose numbers are in an order of its own",
                "put one of the others beside it",
            )),
            None => Ok(None),
        }
    }

    /// What to do where there are none.
    pub(crate) fn advice() -> String {
        format!(
            "put the images into class folders, or their labels beside them: val.txt (`file class` on a line), {KAGGLE} or \
             {TENSORFLOW}"
        )
    }

    fn find(&self, name: &str) -> Result<Option<(PathBuf, String)>> {
        for inside in [self.part.join(name), PathBuf::from(name)] {
            let Some(bytes) = (self.read)(&inside)? else { continue };
            let path = self.root.join(inside);
            return match String::from_utf8(bytes) {
                Ok(text) => Ok(Some((path, text.trim_start_matches('\u{feff}').to_string()))),
                Err(error) => Err(Error::malformed(path, "text (UTF-8)", error.to_string(), "restore the file")),
            };
        }
        Ok(None)
    }

    fn read_labels(&self, name: &str, path: &Path, text: &str) -> Result<Vec<u32>> {
        let lines = (1..).zip(text.lines()).map(|(number, line)| (number, line.trim()));
        let is_head = |number: usize| name == KAGGLE && number == 1;
        let lines = lines.filter(|(number, line)| !line.is_empty() && !is_head(*number));
        let parsed: std::result::Result<Vec<Line<'_>>, usize> =
            lines.map(|(number, text)| line(name, number, text).ok_or(number)).collect();
        let lines = parsed.map_err(|number| {
            let form = if name == KAGGLE { "`image,class ...`" } else { "`file class`" };
            let found = format!("`{}`", text.lines().nth(number - 1).unwrap_or_default());
            Error::malformed(path, format!("{form} on line {number}"), found, "restore the file")
        })?;
        let classes = self.classes_of(path, &lines)?;
        if name == TENSORFLOW {
            if lines.len() != self.images.len() {
                return Err(Error::malformed(
                    path,
                    format!("a line for each of the {} images of {}/", self.images.len(), self.part.display()),
                    lines.len().to_string(),
                    "all images are needed, in the order of their names",
                ));
            }
            return Ok(classes);
        }
        // Kaggle's names have no extension.
        let stem = |image: &str| image.rsplit_once('.').map_or(image, |(stem, _)| stem).to_string();
        let known = |image: &String| if name == KAGGLE { stem(image) } else { image.clone() };
        let places: HashMap<String, usize> = self.images.iter().map(known).zip(0..).collect();
        let mut labels = vec![None; self.images.len()];
        for (line, class) in lines.iter().zip(classes) {
            let image = line.image.unwrap_or_default();
            let last = image.rsplit('/').next().unwrap_or(image);
            let wrong = |expected: String, found: String| {
                let advice = "the file and the folder must be of one data set";
                Error::malformed(path, format!("{expected} on line {}", line.number), found, advice)
            };
            let Some(&place) = places.get(last) else {
                return Err(wrong(
                    format!("an image of {}/", self.part.display()),
                    format!("`{image}`, which is not there"),
                ));
            };
            if labels[place].replace(class).is_some() {
                return Err(wrong("every image once".into(), format!("`{image}` again")));
            }
        }
        let missing = labels.iter().position(Option::is_none);
        labels.into_iter().collect::<Option<Vec<u32>>>().ok_or_else(|| {
            let image = missing.map_or("", |place| &self.images[place]);
            let expected = format!("a line for each of the {} images of {}/", self.images.len(), self.part.display());
            Error::malformed(path, expected, format!("none for {image}"), "add it, or remove the image")
        })
    }

    /// Classes by name if one of them is a name, else by number.
    fn classes_of(&self, path: &Path, lines: &[Line<'_>]) -> Result<Vec<u32>> {
        let places: HashMap<&str, u32> = self.classes.iter().map(String::as_str).zip(0..).collect();
        let named = lines.iter().any(|line| places.contains_key(line.class));
        let class = |line: &Line<'_>| {
            let by_number = || line.class.parse().ok().filter(|class| (*class as usize) < self.classes.len());
            let class = if named { places.get(line.class).copied() } else { by_number() };
            class.ok_or_else(|| {
                let expected = match (named, self.classes.len()) {
                    (_, 0) => "train/ with class folders".to_string(),
                    (true, _) => "the name of a class folder of train/".into(),
                    (false, count) => {
                        format!("the name of a class folder of train/, or a number from 0 to {}", count - 1)
                    }
                };
                let found = format!("`{}`", line.class);
                let advice = "the file and train/ must be of one data set";
                Error::malformed(path, format!("{expected} on line {}", line.number), found, advice)
            })
        };
        lines.iter().map(class).collect()
    }
}

fn line<'t>(name: &str, number: usize, text: &'t str) -> Option<Line<'t>> {
    let (image, class) = match name {
        TENSORFLOW => return Some(Line { number, image: None, class: text }),
        KAGGLE => {
            let (image, boxes) = text.split_once(',')?;
            (image, boxes.trim_matches('"').split_whitespace().next()?)
        }
        _ => text.split_once('\t').or_else(|| text.rsplit_once(char::is_whitespace))?,
    };
    Some(Line { number, image: Some(image.trim()), class: class.trim() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_file_gives_all_labels_or_an_error(
            text in "([ab1][.]jpg|a|b|[ \t,\n\r0-9]|ImageId,x\n|\u{feff}|é){0,12}",
            name in prop::sample::select([LISTS.as_slice(), &[KAGGLE, TENSORFLOW, DEVKIT]].concat()),
        ) {
            let (classes, images) = (["a".to_string(), "b".to_string()], ["a.jpg".to_string(), "b.jpg".to_string()]);
            let read = |path: &Path| Ok((path == Path::new(name)).then(|| text.clone().into_bytes()));
            let flat = Flat { root: Path::new("data"), part: Path::new("val"), classes: &classes, images: &images, read: &read };
            match flat.labels() {
                Ok(labels) => {
                    let labels = labels.expect("the file is there");
                    prop_assert!(labels.len() == 2 && labels.iter().all(|label| *label < 2), "{labels:?}");
                }
                Err(error) => prop_assert!(error.to_string().contains(name), "{error}"),
            }
        }
    }
}

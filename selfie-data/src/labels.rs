//! Few labels: which images keep theirs.
//!
//! Subsets are drawn class by class from one seeded permutation of each class, of which a subset
//! takes the beginning: so they are balanced, and nested for one seed (5 % is inside 10 %).

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::dataset::Dataset;
use crate::draws::{Draws, Purpose, Seeded, Words};
use crate::error::{Error, Result, reading};
use crate::names;

/// Offsets of `sample` under [`Purpose::Labels`], beside the class.
const VALIDATION: u64 = 1 << 32;
const PLAIN: u64 = 2 << 32;

/// How many labels are used, and which: `all`, `5%`, `5%@3` (seed 3), `40` or `40@3` (per class),
/// or a file of names (anything with a slash or ending in `.txt`).
#[derive(Clone, Debug, PartialEq)]
pub enum LabelBudget {
    /// Every label.
    All,
    /// A percentage of every class, rounded, at least one image of each.
    Percent {
        /// More than 0, at most 100.
        percent: f64,
        /// Seed of the choice.
        seed: u64,
    },
    /// The same number from every class.
    PerClass {
        /// At least 1.
        count: usize,
        /// Seed of the choice.
        seed: u64,
    },
    /// The images named in a file, one a line: a key, or the last part of one if no other image
    /// has it; what follows a tab is ignored. Both `labels.txt` and the lists of SimCLR are such files.
    Named(PathBuf),
}

const FORMS: &str = "all, a percentage such as 5% or 5%@3 (with seed 3), a number of images per class such as 40, \
                     or the path of a file of names";

impl FromStr for LabelBudget {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || Error::usage("labels", text, FORMS);
        if text == "all" {
            return Ok(LabelBudget::All);
        }
        if text.contains(['/', '\\']) || text.ends_with(".txt") {
            return Ok(LabelBudget::Named(text.into()));
        }
        let (amount, seed) = match text.split_once('@') {
            Some((amount, seed)) => (amount, seed.parse().map_err(|_| wrong())?),
            None => (text, 0),
        };
        if let Some(percent) = amount.strip_suffix('%') {
            let percent: f64 = percent.parse().map_err(|_| wrong())?;
            return match percent {
                _ if percent > 0.0 && percent <= 100.0 => Ok(LabelBudget::Percent { percent, seed }),
                _ => Err(Error::usage("labels", text, "a percentage above 0 and up to 100")),
            };
        }
        match amount.parse() {
            Ok(count) if count > 0 => Ok(LabelBudget::PerClass { count, seed }),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for LabelBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LabelBudget::All => write!(f, "all"),
            LabelBudget::Percent { percent, seed } => write!(f, "{percent}%@{seed}"),
            LabelBudget::PerClass { count, seed } => write!(f, "{count}@{seed}"),
            LabelBudget::Named(path) => write!(f, "{}", path.display()),
        }
    }
}

impl LabelBudget {
    /// The indices of the images whose labels are used, sorted. They depend on the dataset and on
    /// the budget's own seed alone.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a dataset without labels and for names that are not in it,
    /// [`Error::Usage`] when a class is smaller than asked.
    pub fn select(&self, dataset: &dyn Dataset, seeded: Seeded<'_>) -> Result<Vec<usize>> {
        let classes = by_class(dataset, 0..dataset.len())?;
        let mut chosen = Vec::new();
        match self {
            LabelBudget::All => chosen = classes.concat(),
            LabelBudget::Percent { percent, seed } => {
                let draws = seeded(*seed);
                for (class, members) in (0..).zip(&classes) {
                    let count = share(members.len(), percent / 100.0).max(1).min(members.len());
                    chosen.extend(draw(members, count, &*draws, class));
                }
            }
            LabelBudget::PerClass { count, seed } => {
                let draws = seeded(*seed);
                for (class, members) in (0..).zip(&classes) {
                    if members.len() < *count {
                        let name = &dataset.classes()[class as usize];
                        let most = format!("at most {}, all there are of class {name}", members.len());
                        return Err(Error::usage("labels", self, most));
                    }
                    chosen.extend(draw(members, *count, &*draws, class));
                }
            }
            LabelBudget::Named(path) => chosen = named(dataset, path, list(path)?)?,
        }
        chosen.sort_unstable();
        Ok(chosen)
    }
}

/// Splits a validation part off labelled images: (training, validation), both sorted. Every class
/// gives `fraction` of its images, rounded, but keeps at least one.
///
/// # Errors
/// [`Error::Malformed`] for images without labels, [`Error::Usage`] for a fraction outside [0, 1).
pub fn split_validation(
    dataset: &dyn Dataset,
    labelled: &[usize],
    fraction: f64,
    draws: &dyn Draws,
) -> Result<(Vec<usize>, Vec<usize>)> {
    if !(0.0..1.0).contains(&fraction) {
        return Err(Error::usage("validation fraction", fraction, "0 or more, and less than 1"));
    }
    let (mut training, mut validation) = (Vec::new(), Vec::new());
    for (class, members) in (0..).zip(by_class(dataset, labelled.iter().copied())?) {
        let count = share(members.len(), fraction).min(members.len().saturating_sub(1));
        let mut part = draw(&members, count, draws, VALIDATION + class);
        part.sort_unstable();
        training.extend(members.iter().filter(|index| part.binary_search(index).is_err()));
        validation.append(&mut part);
    }
    training.sort_unstable();
    validation.sort_unstable();
    Ok((training, validation))
}

/// `count` of `len` indices, sorted, without regard to labels (all of them if there are fewer).
pub fn sample_indices(len: usize, count: usize, draws: &dyn Draws) -> Vec<usize> {
    let all: Vec<usize> = (0..len).collect();
    let mut chosen = draw(&all, count.min(len), draws, PLAIN);
    chosen.sort_unstable();
    chosen
}

/// Writes `labels.txt`: a line of key, tab and class name for each of `indices`.
///
/// # Errors
/// Those of `out`.
pub fn write_labels(dataset: &dyn Dataset, indices: &[usize], mut out: impl Write) -> io::Result<()> {
    for &index in indices {
        let class = dataset.label(index).map_or("", |label| &dataset.classes()[label as usize]);
        writeln!(out, "{}\t{class}", dataset.key(index))?;
    }
    out.flush()
}

/// Part of `count`, rounded to the nearest.
fn share(count: usize, fraction: f64) -> usize {
    (count as f64 * fraction).round() as usize
}

/// The first `count` of the seeded permutation `sample` of `members`.
fn draw(members: &[usize], count: usize, draws: &dyn Draws, sample: u64) -> Vec<usize> {
    let mut order: Vec<u32> = (0..members.len() as u32).collect();
    Words::new(draws, Purpose::Labels, sample).shuffle(&mut order);
    order[..count].iter().map(|&place| members[place as usize]).collect()
}

/// The indices of every class, in order.
fn by_class(dataset: &dyn Dataset, indices: impl Iterator<Item = usize>) -> Result<Vec<Vec<usize>>> {
    let mut classes = vec![Vec::new(); dataset.classes().len()];
    for index in indices {
        match dataset.label(index) {
            Some(label) => classes[label as usize].push(index),
            None => {
                return Err(Error::malformed(
                    dataset.describe(),
                    "a class for every image",
                    format!("{} without one", dataset.key(index)),
                    "put the images into one folder per class",
                ));
            }
        }
    }
    Ok(classes)
}

/// The images that `list`, the contents of `path`, names: as the data have them, or in the bytes of the file system.
pub(crate) fn named(dataset: &dyn Dataset, path: &Path, list: Vec<u8>) -> Result<Vec<usize>> {
    let keys: Vec<String> = (0..dataset.len()).map(|index| dataset.key(index)).collect();
    // Where a whole key and the last part of another could be meant, the key is.
    let wholes: HashMap<&str, usize> = keys.iter().map(String::as_str).zip(0..).collect();
    let mut lasts: HashMap<&str, (usize, Option<usize>)> = HashMap::new();
    for (index, key) in keys.iter().enumerate() {
        let last = key.rsplit('/').next().unwrap_or(key);
        lasts.entry(last).and_modify(|(_, second)| *second = second.or(Some(index))).or_insert((index, None));
    }
    let known = |name: &str| wholes.contains_key(name) || lasts.contains_key(name);
    let mut chosen = Vec::new();
    let text = list.strip_prefix("\u{feff}".as_bytes()).unwrap_or(&list);
    for (line, name) in (1..).zip(text.split(|byte| *byte == b'\n')) {
        let name = name.split(|byte| *byte == b'\t').next().unwrap_or(name);
        // As it is written, then without the spaces around it; escaped as we write it, or in bytes that are no text.
        let trimmed = name.trim_ascii();
        if trimmed.is_empty() {
            continue;
        }
        let plain = [name, trimmed].into_iter().filter_map(|name| std::str::from_utf8(name).ok().map(String::from));
        let escaped = [name, trimmed].into_iter().map(names::text);
        let found = plain.chain(escaped).find(|name| known(name));
        let name = found.unwrap_or_else(|| names::text(trimmed));
        match (wholes.get(name.as_str()), lasts.get(name.as_str())) {
            (Some(&index), _) | (None, Some(&(index, None))) => chosen.push(index),
            (None, Some(&(first, Some(second)))) => {
                return Err(Error::malformed(
                    path,
                    "names that only one image has",
                    format!("`{name}` on line {line}, which is {} and {}", keys[first], keys[second]),
                    "give whole names, as the data have them",
                ));
            }
            (None, None) => return Err(unknown(dataset, path, &keys, line, &name, Encoding::of(&list))),
        }
    }
    chosen.sort_unstable();
    chosen.dedup();
    if chosen.is_empty() {
        return Err(Error::malformed(path, "names of images, one a line", "none", "give at least one per class"));
    }
    by_class(dataset, chosen.iter().copied())?;
    Ok(chosen)
}

/// What a list is written in.
#[derive(Clone, Copy)]
enum Encoding {
    Utf8,
    Other,
}

impl Encoding {
    fn of(list: &[u8]) -> Self {
        if std::str::from_utf8(list).is_ok() { Encoding::Utf8 } else { Encoding::Other }
    }
}

/// In what a name differs from a key, or from its last part, that it is like.
fn difference(key: &str, name: &str) -> &'static str {
    let last = key.rsplit('/').next().unwrap_or(key);
    names::difference(if name.contains('/') { key } else { last }, name)
}

/// The error of a name that no image has.
fn unknown(dataset: &dyn Dataset, path: &Path, keys: &[String], line: usize, name: &str, list: Encoding) -> Error {
    let alike = names::alike(name);
    let last = |key: &String| key.rsplit('/').next().is_some_and(|last| names::alike(last) == alike);
    let spelled = keys.iter().find(|key| names::alike(key) == alike || last(key));
    let found = match (spelled, list) {
        (Some(key), _) => {
            let (ours, theirs) = (names::spelled(key), names::spelled(name));
            format!(
                "`{theirs}` on line {line}, which is none of them, but like {ours} with other {}",
                difference(key, name)
            )
        }
        (None, Encoding::Utf8) => format!("`{name}` on line {line}, which is none of them"),
        (None, Encoding::Other) => {
            format!("`{name}` on line {line}, which is none of them, in a list that is not UTF-8")
        }
    };
    let expected = format!("names of images of {}, such as {}", dataset.describe(), keys[0]);
    Error::malformed(path, expected, found, "give the names as the data have them")
}

/// Bytes of the longest list of names: 20 million of 50 letters.
const MAX_LIST: u64 = 1 << 30;

/// A list of names. It is never a device, which has no end.
fn list(path: &Path) -> Result<Vec<u8>> {
    let about = std::fs::metadata(path).map_err(reading(path))?;
    if !about.is_file() || about.len() > MAX_LIST {
        let found = format!("something of {} bytes that is none", about.len());
        return Err(Error::malformed(path, "a file of names", found, "give names of images, one a line"));
    }
    std::fs::read(path).map_err(reading(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{HashDraws, Plain, seeded};
    use proptest::prelude::*;

    fn counts(dataset: &Plain, indices: &[usize]) -> Vec<usize> {
        let mut counts = vec![0; dataset.classes.len()];
        for &index in indices {
            counts[dataset.labels[index].expect("all have labels") as usize] += 1;
        }
        counts
    }

    fn select(text: &str, dataset: &dyn Dataset) -> Result<Vec<usize>> {
        text.parse::<LabelBudget>()?.select(dataset, &seeded)
    }

    fn sorted_and_unique(indices: &[usize]) -> bool {
        indices.windows(2).all(|pair| pair[0] < pair[1])
    }

    proptest! {
        #[test]
        fn subsets_are_balanced_and_nested(sizes in prop::collection::vec(1usize..300, 1..6), seed in 0u64..100) {
            let dataset = Plain::of_classes(&sizes);
            let mut inner: Vec<usize> = Vec::new();
            for percent in [1.0, 5.0, 8.0, 10.0, 20.0, 37.5, 100.0] {
                let chosen = LabelBudget::Percent { percent, seed }.select(&dataset, &seeded).expect("has labels");
                prop_assert!(sorted_and_unique(&chosen));
                for (count, size) in counts(&dataset, &chosen).into_iter().zip(&sizes) {
                    let exact = *size as f64 * percent / 100.0;
                    prop_assert!(count >= 1 && (count as f64 - exact.max(1.0)).abs() <= 0.5, "{count} of {size} at {percent} %");
                }
                prop_assert!(inner.iter().all(|index| chosen.binary_search(index).is_ok()));
                inner = chosen;
            }
            prop_assert_eq!(inner, (0..dataset.len()).collect::<Vec<_>>());
        }

        #[test]
        fn validation_is_a_balanced_part(sizes in prop::collection::vec(1usize..60, 1..5), fraction in 0.0f64..0.99, seed: u64) {
            let dataset = Plain::of_classes(&sizes);
            let all: Vec<usize> = (0..dataset.len()).collect();
            let (training, validation) = split_validation(&dataset, &all, fraction, &HashDraws(seed)).expect("has labels");
            prop_assert!(sorted_and_unique(&training) && sorted_and_unique(&validation));
            let mut both = [training.clone(), validation.clone()].concat();
            both.sort_unstable();
            prop_assert_eq!(both, all);
            let kept = counts(&dataset, &training);
            let given = counts(&dataset, &validation);
            for ((kept, given), size) in kept.into_iter().zip(given).zip(sizes) {
                prop_assert!(kept >= 1);
                prop_assert!(kept == 1 || (given as f64 - size as f64 * fraction).abs() <= 0.5);
            }
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_budget_or_wrong(text in "(all|[0-9]{0,25}[.%@-]?[0-9]{0,25}[%@]?-?[0-9]{0,25}|\\PC{0,20})") {
            match text.parse::<LabelBudget>() {
                Ok(LabelBudget::Named(path)) => prop_assert_eq!(path, PathBuf::from(text)),
                Ok(budget) => {
                    prop_assert_eq!(budget.to_string().parse::<LabelBudget>().expect("prints what it reads"), budget.clone());
                    if let Err(error) = budget.select(&Plain::of_classes(&[3, 5]), &seeded) {
                        prop_assert!(matches!(error, Error::Usage { .. }), "{error}");
                    }
                }
                Err(error) => prop_assert!(matches!(error, Error::Usage { .. }), "{error}"),
            }
        }

        #[test]
        fn any_list_is_of_images_or_wrong(list in "((folder/)?[0-9]{1,2}\\.png[\t\n\r]|\\PC{0,3}){0,8}") {
            match named(&Plain::new(100), Path::new("list.txt"), list.into_bytes()) {
                Ok(chosen) => prop_assert!(sorted_and_unique(&chosen) && !chosen.is_empty()),
                Err(error) => prop_assert!(error.to_string().starts_with("list.txt: expected"), "{error}"),
            }
        }
    }

    #[test]
    fn a_number_per_class_is_exact_and_inside_a_larger_one() {
        let dataset = Plain::of_classes(&[50, 80]);
        let (few, more) = (select("7@4", &dataset).expect("enough"), select("20@4", &dataset).expect("enough"));
        assert_eq!((counts(&dataset, &few), counts(&dataset, &more)), (vec![7, 7], vec![20, 20]));
        assert!(few.iter().all(|index| more.contains(index)));
        assert_ne!(few, select("7@5", &dataset).expect("enough"));
        let error = select("51", &dataset).expect_err("a class has 50");
        assert!(error.to_string().contains("at most 50, all there are of class class 0"), "{error}");
    }

    #[test]
    fn budgets_are_parsed_and_printed() {
        for (text, printed) in [
            ("all", "all"),
            ("5%", "5%@0"),
            ("2.5%@3", "2.5%@3"),
            ("40", "40@0"),
            ("a/list", "a/list"),
            ("l.txt", "l.txt"),
        ] {
            let budget: LabelBudget = text.parse().expect("well formed");
            assert_eq!(budget.to_string(), printed);
            assert_eq!(printed.parse::<LabelBudget>().expect("prints what it reads"), budget);
        }
        for text in ["", "5%@", "5 %", "0%", "101%", "-3%", "NaN%", "inf%", "0", "-1", "1.5", "some", "5%@x", "@3"] {
            assert!(matches!(text.parse::<LabelBudget>(), Err(Error::Usage { .. })), "{text}");
        }
    }

    #[test]
    fn names_come_back_from_a_written_list() {
        let dataset = Plain::new(30);
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("labels.txt");
        let write = |text: &str| std::fs::write(&path, text).expect("written");
        let budget = LabelBudget::Named(path.clone());

        let mut list = Vec::new();
        write_labels(&dataset, &[3, 8, 21], &mut list).expect("memory does not fail");
        let list = String::from_utf8(list).expect("text");
        assert_eq!(list, "folder/3.png\todd\nfolder/8.png\teven\nfolder/21.png\todd\n");
        write(&list);
        assert_eq!(budget.select(&dataset, &seeded).expect("all known"), [3, 8, 21]);
        write("8.png\r\n3.png\n\n8.png");
        assert_eq!(budget.select(&dataset, &seeded).expect("all known"), [3, 8]);
        write("3.png\n99.png\n");
        let error = budget.select(&dataset, &seeded).expect_err("99 is not there").to_string();
        assert!(error.contains("`99.png` on line 2"), "{error}");
        write("\n");
        assert!(budget.select(&dataset, &seeded).is_err());
        let folder = LabelBudget::Named(folder.path().to_path_buf());
        let error = folder.select(&dataset, &seeded).expect_err("no file").to_string();
        assert!(error.contains("a file of names"), "{error}");
    }

    #[test]
    fn an_image_without_class_is_named() {
        let mut dataset = Plain::new(4);
        dataset.labels[2] = None;
        let error = select("all", &dataset).expect_err("one has no label").to_string();
        assert!(error.contains("folder/2.png"), "{error}");
    }

    #[test]
    fn plain_subsets_are_seeded() {
        let (a, b) = (sample_indices(100, 10, &HashDraws(0)), sample_indices(100, 10, &HashDraws(1)));
        assert!(sorted_and_unique(&a) && a.len() == 10 && a != b);
        assert_eq!(sample_indices(3, 10, &HashDraws(0)), [0, 1, 2]);
    }
}

//! `data check`: what is wrong with the images, before anyone trains on them.

use std::collections::BTreeSet;
use std::fmt::{Display, Write as _};
use std::sync::Arc;

use selfie_data::{
    Audit, AuditConfig, DEFAULT_MAX_BAD, Dataset, Leak, Matched, PartAudit, Spread, allowed_bad, audit, match_classes,
};
use serde_json::{Value, json};

use crate::args::{Data, DataCheck};
use crate::data::{self, Whole};
use crate::exit::{Exit, Problem};
use crate::progress::{Pass, Reporter, Voice, duration, grouped};
use crate::screen;
use crate::system::System;

/// What every writer to a `String` is.
const INFALLIBLE: &str = "writing to a string cannot fail";

/// Examples of each finding that are printed.
const EXAMPLES: usize = 10;

/// Images of one group that are named in a line.
const GROUP_NAMES: usize = 3;

/// Runs a command of `data`.
///
/// # Errors
/// Input: data that cannot be opened; with `--strict`, unreadable and leaking images.
pub fn run(command: &Data) -> anyhow::Result<Exit> {
    match command {
        Data::Check(arguments) => check(arguments),
    }
}

fn check(arguments: &DataCheck) -> anyhow::Result<Exit> {
    let Whole { train, test } = data::for_audit(&arguments.data)?;
    let threads = if arguments.threads == 0 { System::here().threads.most } else { arguments.threads };
    let config = AuditConfig { threads, min_side: arguments.min_side };
    let mut pass = Pass::begin(&Reporter::new(Voice::Full), "checking");
    let found = audit(&*train, test.as_deref(), config, |done, total| pass.at(done, total))?;
    let seconds = pass.end();
    let classes = Classes::of(arguments, &*train, test.clone());
    let report = Report { arguments, train: &*train, test: test.as_deref(), classes, found, seconds };
    let text = if arguments.json { format!("{:#}\n", report.as_json()) } else { report.as_text() };
    screen::print(&text)?;
    if arguments.strict { report.refuse() } else { Ok(Exit::Done) }
}

/// An audit with what it is about.
struct Report<'a> {
    arguments: &'a DataCheck,
    train: &'a dyn Dataset,
    test: Option<&'a dyn Dataset>,
    classes: Classes,
    found: Audit,
    seconds: f64,
}

/// What finetuning makes of the classes of both parts.
#[derive(Default)]
struct Classes {
    /// Why it refuses them.
    refusal: Option<String>,
    /// Classes that the test part has no image of, and that in words.
    missing: Vec<String>,
    missing_text: Option<String>,
}

impl Classes {
    fn of(arguments: &DataCheck, train: &dyn Dataset, test: Option<Arc<dyn Dataset>>) -> Self {
        if train.classes().is_empty() {
            // They can be pretrained on, and no more.
            return Self::default();
        }
        let refusal = data::refusal_of_labels(&arguments.data, train);
        match test.map(|test| match_classes(test, train.classes(), "the training images")) {
            None => Self { refusal, ..Self::default() },
            Some(Err(error)) => Self { refusal: Some(error.to_string()), ..Self::default() },
            Some(Ok(matched)) => {
                let missing_text = matched.missing_text();
                let Matched { missing, .. } = matched;
                Self { refusal, missing, missing_text }
            }
        }
    }
}

/// One part of the data, and what was found in it.
#[derive(Clone, Copy)]
struct Part<'a> {
    name: &'static str,
    dataset: &'a dyn Dataset,
    found: &'a PartAudit,
}

/// One kind of finding, as it is printed.
struct Finding {
    name: String,
    /// What training does with such images.
    effect: &'static str,
    /// Images of each part.
    counts: Vec<usize>,
    /// The first lines of the list.
    examples: Vec<String>,
    /// All lines of the list.
    lines: usize,
}

impl Report<'_> {
    fn parts(&self) -> Vec<Part<'_>> {
        let train = Part { name: "train", dataset: self.train, found: &self.found.train };
        let test = self.test.zip(self.found.test.as_ref());
        let test = test.map(|(dataset, found)| Part { name: "test", dataset, found });
        std::iter::once(train).chain(test).collect()
    }

    /// The error that `--strict` asks for.
    fn refuse(&self) -> anyhow::Result<Exit> {
        let unreadable: usize = self.parts().iter().map(|part| part.found.unreadable.len()).sum();
        let leaks = self.found.leaks.len();
        if unreadable + leaks == 0 {
            return Ok(Exit::Done);
        }
        Err(Problem::input(format!(
            "{}: expected only readable images, none of them in both train and test (--strict), found {unreadable} \
             unreadable and {leaks} in both; remove or replace them",
            self.arguments.data.display()
        )))
    }

    /// All kinds of findings, the worst first.
    fn findings(&self) -> Vec<Finding> {
        let parts = self.parts();
        let mut findings = Vec::new();
        let mut each = |name: &str, effect, list: &dyn Fn(&Part<'_>) -> Listing| {
            let lists: Vec<_> = parts.iter().map(list).collect();
            findings.push(Finding {
                name: name.into(),
                effect,
                counts: lists.iter().map(|list| list.images).collect(),
                lines: lists.iter().map(|list| list.lines).sum(),
                examples: lists.into_iter().flat_map(|list| list.examples).take(EXAMPLES).collect(),
            });
        };
        each("unreadable", "skipped; more than 1% are an error (--max-bad)", &|part| {
            Listing::of(&part.found.unreadable, |bad| format!("{}: {}", bad.key, bad.reason))
        });
        each("same pixels, other class", "used: the labels contradict each other", &|part| {
            let differ = |group: &&Vec<usize>| classes(part.dataset, group).len() > 1;
            part.groups(part.found.duplicates.iter().filter(differ))
        });
        each("duplicate", "used: seen more often than others", &|part| {
            let mut list = part.groups(part.found.duplicates.iter());
            // The first of a group is no duplicate.
            list.images -= list.lines;
            list
        });
        each("constant", "used: the puzzle has no answer in them", &|part| {
            Listing::of(&part.found.constant, |index| part.dataset.key(*index))
        });
        let tiny = format!("a side below {} pixels", self.arguments.min_side);
        each(&tiny, "used: enlarged where the network takes larger ones", &|part| {
            Listing::of(&part.found.tiny, |tiny| {
                format!("{}: {} x {}", part.dataset.key(tiny.index), tiny.height, tiny.width)
            })
        });
        each("misnamed", "used: the content decides, not the extension", &|part| {
            Listing::of(&part.found.misnamed, |(index, misnamed)| {
                format!("{}: {}", part.dataset.key(*index), misnamed.content)
            })
        });
        if let Some(leaks) = self.leaks() {
            findings.insert(1, leaks);
        }
        findings
    }

    /// Images in both parts, if there are two.
    fn leaks(&self) -> Option<Finding> {
        let test = self.test?;
        let leaks = &self.found.leaks;
        let line = |leak: &Leak| {
            let equal = format!("{} = {}", names(self.train, &leak.train), names(test, &leak.test));
            equal + &contradiction(&self.leak_classes(leak))
        };
        Some(Finding {
            name: "in train and test".into(),
            effect: "used: test accuracy flatters",
            counts: vec![
                leaks.iter().map(|leak| leak.train.len()).sum(),
                leaks.iter().map(|leak| leak.test.len()).sum(),
            ],
            examples: leaks.iter().take(EXAMPLES).map(line).collect(),
            lines: leaks.len(),
        })
    }

    /// Names of the classes that the images of a leak have.
    fn leak_classes(&self, leak: &Leak) -> BTreeSet<String> {
        let mut all = classes(self.train, &leak.train);
        all.extend(self.test.into_iter().flat_map(|test| classes(test, &leak.test)));
        all
    }

    fn as_json(&self) -> Value {
        let leak = |leak: &Leak| {
            let test = self.test.map(|test| keys(test, &leak.test));
            json!({ "train": keys(self.train, &leak.train), "test": test, "classes": self.leak_classes(leak) })
        };
        let parts = self.parts();
        json!({
            "path": self.arguments.data,
            "seconds": self.seconds,
            "min_side": self.arguments.min_side,
            "leaks": self.found.leaks.iter().map(leak).collect::<Vec<_>>(),
            "class_mismatch": self.classes.refusal,
            "missing_in_test": self.classes.missing,
            "train": parts[0].as_json(),
            "test": parts.get(1).map(Part::as_json),
        })
    }

    fn as_text(&self) -> String {
        let parts = self.parts();
        let mut text = String::new();
        for part in &parts {
            writeln!(text, "{:<5}  {}", part.name, part.dataset.describe()).expect(INFALLIBLE);
        }
        if self.test.is_none() {
            writeln!(text, "test   none: leaks into it cannot be looked for").expect(INFALLIBLE);
        }
        let images = parts.iter().map(|part| part.found.images).sum();
        writeln!(text, "{} images looked at in {}\n", grouped(images), took(self.seconds)).expect(INFALLIBLE);
        let findings = self.findings();
        write_table(&mut text, &parts, &findings);
        write_examples(&mut text, &findings);
        write_sizes(&mut text, &parts);
        write_classes(&mut text, &parts);
        if let Some(refusal) = &self.classes.refusal {
            writeln!(text, "\nfinetuning will refuse these parts: {refusal}").expect(INFALLIBLE);
        }
        if let Some(missing) = &self.classes.missing_text {
            writeln!(text, "\nthe test part has {missing}: it says nothing of these").expect(INFALLIBLE);
        }
        for part in &parts {
            let (bad, allowed) = (part.found.unreadable.len(), part.allowed_bad());
            if bad > allowed {
                writeln!(
                    text,
                    "\ntraining will stop at the unreadable images of {}: {} of {}, where --max-bad 0.01 allows {}",
                    part.name,
                    grouped(bad),
                    grouped(part.found.images),
                    grouped(allowed)
                )
                .expect(INFALLIBLE);
            }
        }
        text
    }
}

/// The lines of one kind of finding in one part.
struct Listing {
    images: usize,
    lines: usize,
    examples: Vec<String>,
}

impl Listing {
    /// One line for each image.
    fn of<T>(items: &[T], line: impl Fn(&T) -> String) -> Self {
        Self { images: items.len(), lines: items.len(), examples: items.iter().take(EXAMPLES).map(line).collect() }
    }
}

impl Part<'_> {
    /// Unreadable images that training skips, unless asked otherwise.
    fn allowed_bad(&self) -> usize {
        allowed_bad(self.found.images, DEFAULT_MAX_BAD)
    }

    /// One line for each group of equal images.
    fn groups<'g>(&self, groups: impl Iterator<Item = &'g Vec<usize>> + Clone) -> Listing {
        let line = |group: &Vec<usize>| names(self.dataset, group) + &contradiction(&classes(self.dataset, group));
        Listing {
            images: groups.clone().map(Vec::len).sum(),
            lines: groups.clone().count(),
            examples: groups.take(EXAMPLES).map(line).collect(),
        }
    }

    fn as_json(&self) -> Value {
        let Part { dataset, found, .. } = self;
        let duplicate = |group: &Vec<usize>| {
            let classes = classes(*dataset, group);
            json!({ "keys": keys(*dataset, group), "classes": classes })
        };
        let class_counts = dataset.classes().iter().cloned().zip(found.class_counts.iter().map(|count| json!(count)));
        let misnamed = found.misnamed.iter().map(|(index, misnamed)| {
            json!({ "key": dataset.key(*index), "extension": misnamed.extension, "content": misnamed.content })
        });
        let tiny = found
            .tiny
            .iter()
            .map(|tiny| json!({ "key": dataset.key(tiny.index), "height": tiny.height, "width": tiny.width }));
        let unreadable = found.unreadable.iter().map(|bad| json!({ "key": bad.key, "reason": bad.reason }));
        let sizes = found.sizes.map(|sizes| {
            json!({
                "short_side": spread_as_json(sizes.short_side),
                "long_side": spread_as_json(sizes.long_side),
                "aspect": spread_as_json(sizes.aspect),
            })
        });
        json!({
            "description": dataset.describe(),
            "images": found.images,
            "unlabelled": found.unlabelled,
            "allowed_bad": self.allowed_bad(),
            "unreadable": unreadable.collect::<Vec<_>>(),
            "misnamed": misnamed.collect::<Vec<_>>(),
            "duplicates": found.duplicates.iter().map(duplicate).collect::<Vec<_>>(),
            "constant": keys(*dataset, &found.constant),
            "tiny": tiny.collect::<Vec<_>>(),
            "classes": class_counts.collect::<serde_json::Map<_, _>>(),
            "sizes": sizes,
        })
    }
}

fn spread_as_json(spread: Spread<impl Into<Value>>) -> Value {
    json!({ "min": spread.min.into(), "median": spread.median.into(), "max": spread.max.into() })
}

fn keys(dataset: &dyn Dataset, images: &[usize]) -> Vec<String> {
    images.iter().map(|index| dataset.key(*index)).collect()
}

/// The first few of equal images, in a line.
fn names(dataset: &dyn Dataset, images: &[usize]) -> String {
    let mut line = keys(dataset, &images[..images.len().min(GROUP_NAMES)]).join(" = ");
    if images.len() > GROUP_NAMES {
        write!(line, " and {} more", grouped(images.len() - GROUP_NAMES)).expect(INFALLIBLE);
    }
    line
}

/// Names of the classes that some images have.
fn classes(dataset: &dyn Dataset, images: &[usize]) -> BTreeSet<String> {
    let labels = images.iter().filter_map(|index| dataset.label(*index));
    labels.map(|label| dataset.classes()[label as usize].clone()).collect()
}

/// Seconds, with a tenth where few.
fn took(seconds: f64) -> String {
    if seconds < 10.0 { format!("{seconds:.1}s") } else { duration(seconds) }
}

/// What to add to a line about equal images whose classes differ.
fn contradiction(classes: &BTreeSet<String>) -> String {
    let names: Vec<_> = classes.iter().map(String::as_str).collect();
    if names.len() > 1 { format!(" ({})", names.join(", ")) } else { String::new() }
}

fn write_table(text: &mut String, parts: &[Part<'_>], findings: &[Finding]) {
    let width = findings.iter().map(|finding| finding.name.len()).max().unwrap_or(0);
    let mut row = |name: &str, cells: Vec<String>, last: &str| {
        write!(text, "{name:<width$}").expect(INFALLIBLE);
        cells.iter().for_each(|cell| write!(text, " {cell:>9}").expect(INFALLIBLE));
        writeln!(text, "  {last}").expect(INFALLIBLE);
    };
    row("images", parts.iter().map(|part| part.name.to_string()).collect(), "in training");
    for finding in findings {
        let count = |count: &usize| if *count == 0 { "-".into() } else { grouped(*count) };
        row(&finding.name, finding.counts.iter().map(count).collect(), finding.effect);
    }
}

fn write_examples(text: &mut String, findings: &[Finding]) {
    if findings.iter().all(|finding| finding.lines == 0) {
        writeln!(text, "\nnothing is wrong with these images").expect(INFALLIBLE);
    }
    for finding in findings.iter().filter(|finding| finding.lines > 0) {
        writeln!(text, "\n{}", finding.name).expect(INFALLIBLE);
        finding.examples.iter().for_each(|line| writeln!(text, "  {line}").expect(INFALLIBLE));
        if finding.lines > finding.examples.len() {
            writeln!(text, "  and {} more", grouped(finding.lines - finding.examples.len())).expect(INFALLIBLE);
        }
    }
}

fn write_sizes(text: &mut String, parts: &[Part<'_>]) {
    fn row<T: Copy + Display>(text: &mut String, name: &str, what: &str, spread: Spread<T>, digits: usize) {
        let Spread { min, median, max } = spread;
        writeln!(text, "{name:<5}  {what:<12} {min:>9.digits$} {median:>9.digits$} {max:>9.digits$}")
            .expect(INFALLIBLE);
    }
    writeln!(text, "\n{:<5}  {:<12} {:>9} {:>9} {:>9}", "", "size", "smallest", "median", "largest").expect(INFALLIBLE);
    for part in parts {
        let Some(sizes) = part.found.sizes else { continue };
        row(text, part.name, "shorter side", sizes.short_side, 0);
        row(text, part.name, "longer side", sizes.long_side, 0);
        row(text, part.name, "width/height", sizes.aspect, 2);
    }
}

fn write_classes(text: &mut String, parts: &[Part<'_>]) {
    writeln!(text).expect(INFALLIBLE);
    for part in parts {
        writeln!(text, "{:<5}  {}", part.name, balance(part)).expect(INFALLIBLE);
    }
}

/// How many images the classes of a part have.
fn balance(part: &Part<'_>) -> String {
    let names = part.dataset.classes();
    let counts = &part.found.class_counts;
    let places = || counts.iter().enumerate();
    let (Some((low, least)), Some((high, most))) =
        (places().min_by_key(|(_, count)| **count), places().rev().max_by_key(|(_, count)| **count))
    else {
        return "no classes: not every image lies in a folder of its class".into();
    };
    let mut line = format!("{} classes", names.len());
    if least == most {
        write!(line, " of {} images each", grouped(*least)).expect(INFALLIBLE);
    } else {
        write!(line, " of {} ({}) to {} ({}) images", grouped(*least), names[low], grouped(*most), names[high])
            .expect(INFALLIBLE);
    }
    let empty: Vec<_> = places().filter(|(_, count)| **count == 0).map(|(class, _)| names[class].as_str()).collect();
    if !empty.is_empty() {
        let more = if empty.len() > EXAMPLES { ", .." } else { "" };
        let shown = empty[..empty.len().min(EXAMPLES)].join(", ");
        write!(line, "; {} empty: {shown}{more}", empty.len()).expect(INFALLIBLE);
    }
    if part.found.unlabelled > 0 {
        write!(line, "; {} images without class", grouped(part.found.unlabelled)).expect(INFALLIBLE);
    }
    line
}

//! What is not used of the data, counted by kind, so that nobody misses it late.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use crate::names;

/// Kinds that are named; the rest is counted together.
const NAMED: usize = 4;

/// Letters of the longest ending that is taken for one; what follows the last dot of a title is none.
const MAX_ENDING: usize = 10;

/// Pictures that are not read.
const UNREAD: [&str; 17] = [
    "heic", "heif", "avif", "gif", "jp2", "j2k", "jxl", "svg", "ico", "psd", "cr2", "nef", "arw", "dng", "exr", "tga",
    "jfif",
];

/// Numbers of files left out, by kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LeftOut {
    kinds: BTreeMap<String, usize>,
}

impl LeftOut {
    /// Counts a file by its extension.
    pub(crate) fn add_file(&mut self, path: &Path) {
        let ending = path.extension().map(|ending| names::text(ending.as_encoded_bytes()).to_lowercase());
        self.add(match ending {
            Some(ending) if ending.chars().count() <= MAX_ENDING => format!(".{ending}"),
            Some(_) | None => "without extension".into(),
        });
    }

    /// Counts something by the name of its kind.
    pub(crate) fn add(&mut self, kind: impl Into<String>) {
        *self.kinds.entry(kind.into()).or_default() += 1;
    }

    /// Adds what another part of the data has.
    pub(crate) fn append(&mut self, other: Self) {
        other.kinds.into_iter().for_each(|(kind, count)| *self.kinds.entry(kind).or_default() += count);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }

    pub(crate) fn count(&self) -> usize {
        self.kinds.values().sum()
    }

    /// The kinds, the most frequent first: `8 .heic`.
    pub(crate) fn kinds(&self) -> Vec<String> {
        let mut kinds: Vec<_> = self.kinds.iter().collect();
        kinds.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        let rest: usize = kinds.iter().skip(NAMED).map(|(_, count)| **count).sum();
        let mut said: Vec<_> = kinds.iter().take(NAMED).map(|(kind, count)| format!("{count} {kind}")).collect();
        if rest > 0 {
            said.push(format!("{rest} of other kinds"));
        }
        said
    }

    /// Whether pictures of a kind that is not read are among them.
    pub(crate) fn has_unread_pictures(&self) -> bool {
        self.kinds.keys().any(|kind| kind.strip_prefix('.').is_some_and(|ending| UNREAD.contains(&ending)))
    }
}

impl fmt::Display for LeftOut {
    /// `12 files left out: 8 .heic, 4 .gif`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.count();
        let files = if count == 1 { "file" } else { "files" };
        write!(f, "{count} {files} left out: {}", self.kinds().join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_counted_and_named() {
        let mut left_out = LeftOut::default();
        assert!(left_out.is_empty() && !left_out.has_unread_pictures());
        left_out.add_file(Path::new("a/README"));
        assert_eq!(left_out.to_string(), "1 file left out: 1 without extension");
        (0..4).for_each(|i| left_out.add_file(Path::new(&format!("{i}.gif"))));
        (0..8).for_each(|i| left_out.add_file(Path::new(&format!("{i}.HEIC"))));
        assert_eq!(left_out.to_string(), "13 files left out: 8 .heic, 4 .gif, 1 without extension");
        assert!(left_out.has_unread_pictures());
        for name in ["a.b", "a.c", "a.what a long title of a picture"] {
            left_out.add_file(Path::new(name));
        }
        left_out.add("link that leads nowhere");
        let expected = "17 files left out: 8 .heic, 4 .gif, 2 without extension, 1 .b, 2 of other kinds";
        assert_eq!(left_out.to_string(), expected);
    }
}

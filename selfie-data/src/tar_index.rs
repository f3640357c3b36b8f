//! Where the members of a plain tar lie, so that any thread can read any of them.
//!
//! Only headers are read. Names serve as keys and are never written to: what leads out of the
//! archive (`..`, a root) is left out of them. Links and devices are skipped.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use crate::bounded::Bounded;
use crate::error::{Error, Result, reading};

/// What a tar may say about one member beside its data: long names and extended headers are kept in memory.
const MAX_HEADER_BYTES: u64 = 1 << 20;

/// A file or folder in a tar.
pub(crate) struct Member {
    pub(crate) path: PathBuf,
    pub(crate) is_folder: bool,
    /// Place of its bytes, which lie inside the file.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

impl Member {
    /// Whether this is a file called `name`, at the top or in a folder there.
    pub(crate) fn is_shallow_file(&self, name: &str) -> bool {
        !self.is_folder && self.path.components().count() <= 2 && self.path.file_name().is_some_and(|own| own == name)
    }

    /// Reads the member from its tar.
    pub(crate) fn reader<'f>(&self, file: &'f File) -> MemberReader<'f> {
        MemberReader { file, at: self.offset, end: self.offset + self.bytes }
    }
}

/// The bytes of a member, in order.
pub(crate) struct MemberReader<'f> {
    file: &'f File,
    at: u64,
    end: u64,
}

impl Read for MemberReader<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = (bytes.len() as u64).min(self.end - self.at) as usize;
        read_exact_at(self.file, &mut bytes[..count], self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

/// The files and folders of the tar at `path`, in its order.
///
/// # Errors
/// [`Error::Malformed`] for a tar that is damaged or not complete.
pub(crate) fn index(path: &Path, file: &File) -> Result<Vec<Member>> {
    let file_bytes = file.metadata().map_err(reading(path))?.len();
    let damaged = |found: String| {
        Error::malformed(path, "a complete tar archive", found, "copy or download it again, and compare its size")
    };
    let mut archive = tar::Archive::new(Bounded::new(file, MAX_HEADER_BYTES, "headers of one member"));
    let mut members = Vec::new();
    let mut end = 0;
    for entry in archive.entries_with_seek().map_err(|error| damaged(error.to_string()))? {
        let entry =
            entry.map_err(|error| damaged(format!("{file_bytes} bytes that break off or are damaged ({error})")))?;
        let name = entry.path().map_err(|error| damaged(error.to_string()))?;
        let name: PathBuf = name.components().filter(|part| matches!(part, Component::Normal(_))).collect();
        let kind = entry.header().entry_type();
        let (offset, bytes) = (entry.raw_file_position(), entry.size());
        if kind.is_file() && offset.checked_add(bytes).is_none_or(|end| end > file_bytes) {
            return Err(damaged(format!("{file_bytes} bytes, which end inside {}", name.display())));
        }
        end = end.max(offset + if kind.is_file() { bytes } else { 0 });
        if kind.is_file() || kind.is_dir() {
            members.push(Member { path: name, is_folder: kind.is_dir(), offset, bytes });
        }
    }
    // The end is a block of zeros; without it, members may be missing.
    if file_bytes < end.next_multiple_of(512) + 512 {
        return Err(damaged(format!("{file_bytes} bytes without the end of an archive")));
    }
    Ok(members)
}

/// Fills `bytes` from `offset` on, without moving the place at which others read.
#[cfg(unix)]
pub(crate) fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

/// Fills `bytes` from `offset` on.
#[cfg(windows)]
pub(crate) fn read_exact_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => {
                bytes = &mut bytes[read..];
                offset += read as u64;
            }
        }
    }
    Ok(())
}

//! A file without a disk, for the parsers that want one.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::LazyLock;

use tempfile::NamedTempFile;

static FILE: LazyLock<NamedTempFile> =
    LazyLock::new(|| NamedTempFile::new_in("/dev/shm").expect("Linux has a file system in memory"));

/// Calls `parser` with a file that holds `bytes`.
pub fn with(bytes: &[u8], parser: impl FnOnce(&Path)) {
    let path = FILE.path();
    File::create(path).and_then(|mut file| file.write_all(bytes)).expect("there is memory");
    parser(path);
}

//! Runs the binary as a user would.
#![allow(dead_code, reason = "each test file uses a part of it")]

pub(crate) mod moments;
pub(crate) mod traces;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

/// The binary with a line of arguments, none of which may hold a space, and an environment of its own.
pub(crate) fn selfie(line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_selfie"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SELFIE_")) {
        command.env_remove(name);
    }
    // Where no tables of kernels are.
    command.env("XDG_CACHE_HOME", concat!(env!("CARGO_BIN_EXE_selfie"), "-caches"));
    command.args(line.split_whitespace());
    command
}

/// A shell's `script`, to which the command is `"$0" "$@"`, in the command's environment.
#[cfg(unix)]
pub(crate) fn behind(script: &str, command: &Command) -> Command {
    let mut shell = Command::new("sh");
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    shell.args(["-c", script]).arg(command.get_program()).args(command.get_args());
    shell
}

/// What a run of the binary left.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    fn new(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).expect("the binary prints UTF-8");
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }

    /// Asserts that standard error has all of `words`.
    #[track_caller]
    pub(crate) fn says(&self, words: &[&str]) {
        for word in words {
            assert!(self.err.contains(word), "no `{word}` in: {}", self.err);
        }
    }

    /// Standard output as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}", self.out))
    }
}

/// Runs to the end.
pub(crate) fn ran(command: &mut Command) -> Ran {
    Ran::new(command.output().expect("the binary starts"))
}

/// Runs, expecting success.
#[track_caller]
pub(crate) fn works(line: &str) -> Ran {
    let ran = ran(&mut selfie(line));
    assert_eq!(ran.code, Some(0), "{line}: {}{}", ran.out, ran.err);
    ran
}

/// Runs, expecting an error with this exit code whose text has all of `words`.
#[track_caller]
pub(crate) fn fails(line: &str, code: i32, words: &[&str]) {
    let ran = ran(&mut selfie(line));
    assert_eq!(ran.code, Some(code), "{line}: {}{}", ran.out, ran.err);
    ran.says(words);
    assert!(!ran.err.contains("panicked") && !ran.err.contains("a bug"), "{}", ran.err);
    assert_eq!(ran.err.matches("error:").count(), 1, "said once: {}", ran.err);
}

/// A path as text.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("temporary folders have plain names")
}

/// A file, with the folders above it.
pub(crate) fn write(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().expect("inside a folder")).expect("a folder");
    fs::write(path, bytes).expect("written");
}

/// `count` images in the class folders `a` and `b`.
pub(crate) fn write_images(folder: &Path, count: u8) {
    for i in 0..count {
        write(&folder.join(["a", "b"][usize::from(i % 2)]).join(format!("{i}.bmp")), &bitmap(i.wrapping_mul(20)));
    }
}

/// A bitmap of 8 x 8 pixels of one grey.
fn bitmap(shade: u8) -> Vec<u8> {
    bitmap_of(8, |_| shade)
}

/// A bitmap of `side` x `side` grey pixels in 24 bits; `side` is a multiple of 4, so that rows need no padding.
pub(crate) fn bitmap_of(side: u32, shade: impl Fn(u32) -> u8) -> Vec<u8> {
    let mut bytes = b"BM".to_vec();
    bytes.extend((54 + 3 * side * side).to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(54u32.to_le_bytes());
    bytes.extend(40u32.to_le_bytes());
    bytes.extend(side.to_le_bytes());
    bytes.extend(side.to_le_bytes());
    bytes.extend(1u16.to_le_bytes());
    bytes.extend(24u16.to_le_bytes());
    bytes.extend([0; 24]);
    (0..side * side).for_each(|at| bytes.extend([shade(at); 3]));
    bytes
}

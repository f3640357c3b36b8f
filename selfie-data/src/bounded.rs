//! A reader that gives up: what a damaged or hostile file can make us read is bounded.

use std::io::{self, Read, Seek, SeekFrom};

/// Reads at most so many bytes without a seek in between, and fails at the next.
pub(crate) struct Bounded<R> {
    inner: R,
    most: u64,
    left: u64,
    /// What the bytes are, for the message.
    what: &'static str,
}

impl<R> Bounded<R> {
    pub(crate) fn new(inner: R, most: u64, what: &'static str) -> Self {
        Self { inner, most, left: most, what }
    }
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(into)?;
        match self.left.checked_sub(read as u64) {
            Some(left) => self.left = left,
            None => return Err(io::Error::other(format!("{} of more than {} bytes", self.what, self.most))),
        }
        Ok(read)
    }
}

impl<R: Seek> Seek for Bounded<R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.left = self.most;
        self.inner.seek(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_read_and_no_more() {
        let mut reader = Bounded::new(io::Cursor::new([7; 30]), 10, "sevens");
        let mut ten = [0; 10];
        reader.read_exact(&mut ten).expect("its share");
        reader.seek(SeekFrom::Current(5)).expect("inside");
        reader.read_exact(&mut ten).expect("a new share");
        let error = reader.read_exact(&mut ten[..1]).expect_err("one more").to_string();
        assert_eq!(error, "sevens of more than 10 bytes");
    }
}

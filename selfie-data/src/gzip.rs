//! A gzip stream of any number of members, one after the other, as parallel packers and bgzip write them.

use std::io::{self, BufRead, Read};

use flate2::bufread::GzDecoder;

/// Unpacks all members as one stream, as gunzip does. What follows the last one, and is none, ends it.
pub(crate) struct Gunzip<R> {
    state: State<R>,
}

enum State<R> {
    Inside(Box<GzDecoder<R>>),
    Done,
}

impl<R: BufRead> Gunzip<R> {
    pub(crate) fn new(packed: R) -> Self {
        Self { state: State::Inside(Box::new(GzDecoder::new(packed))) }
    }
}

impl<R: BufRead> Read for Gunzip<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        loop {
            let State::Inside(member) = &mut self.state else { return Ok(0) };
            let read = member.read(into)?;
            if read > 0 {
                return Ok(read);
            }
            let State::Inside(member) = std::mem::replace(&mut self.state, State::Done) else { return Ok(0) };
            let mut packed = member.into_inner();
            if begins_member(&mut packed)? {
                self.state = State::Inside(Box::new(GzDecoder::new(packed)));
            }
        }
    }
}

/// Whether another member follows; zeros before it are the padding of tapes.
fn begins_member(packed: &mut impl BufRead) -> io::Result<bool> {
    loop {
        let bytes = packed.fill_buf()?;
        let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
        match bytes.get(zeros) {
            Some(first) => {
                let begins = *first == 0x1f;
                packed.consume(zeros);
                return Ok(begins);
            }
            None if bytes.is_empty() => return Ok(false),
            None => packed.consume(zeros),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufReader, Write};

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use proptest::prelude::*;

    fn packed(bytes: &[u8]) -> Vec<u8> {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
        gzip.write_all(bytes).expect("in memory");
        gzip.finish().expect("in memory")
    }

    fn unpacked(bytes: &[u8], buffer: usize) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Gunzip::new(BufReader::with_capacity(buffer, bytes)).read_to_end(&mut out)?;
        Ok(out)
    }

    proptest! {
        #[test]
        fn any_members_are_one_stream(
            members in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..200), 0usize..600), 1..6),
            buffer in 1usize..64,
        ) {
            let whole: Vec<u8> = members.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
            let file: Vec<u8> =
                members.iter().flat_map(|(bytes, zeros)| [packed(bytes), vec![0; *zeros]].concat()).collect();
            prop_assert_eq!(unpacked(&file, buffer).expect("whole"), whole.clone());
            let with_more = [file.clone(), b"signed by me".to_vec()].concat();
            prop_assert_eq!(unpacked(&with_more, buffer).expect("gunzip ignores it"), whole);
            let last = members.last().map_or(0, |(_, zeros)| zeros + 1);
            prop_assert!(unpacked(&file[..file.len() - last], buffer).is_err(), "a cut member");
        }
    }
}

//! JPEG files: whether all of their data are there, and their pixels.
//!
//! Decoders fill with grey what is missing, take a trailer for scans and hold on to what they understand of a damaged
//! file, all without a word. So every scan is walked here first, code by code: a file is read if each block of each
//! component is there, whatever follows or does not follow it, and refused otherwise. The decoder then gets exactly what
//! was walked, and no other byte.
//!
//! Section numbers are those of ITU-T T.81.

use std::io;
use std::thread;
use std::time::Duration;

use image::RgbImage;
use image::metadata::Orientation;
use jpeg_decoder::{ColorTransform, Decoder};

use crate::exif;

/// Scans of a file. Encoders write about ten; each may cost a pass over all blocks, whatever its length.
const MAX_SCANS: usize = 100;

/// Components of a picture; more are for print alone.
const MAX_COMPONENTS: usize = 4;

/// Coefficients of a block.
const BLOCK: usize = 64;

/// Decodes a JPEG, and says how it is to be turned.
///
/// # Errors
/// A sentence: what is missing or not understood. `check` has the last word on the size, [height, width].
pub(crate) fn decode(
    bytes: &[u8],
    check: impl Fn(usize, usize) -> Result<(), String>,
) -> Result<(RgbImage, Orientation), String> {
    let walked = Walk::new(bytes).run(&check)?;
    let pixels = pixels(&walked)?;
    let picture = RgbImage::from_raw(walked.width as u32, walked.height as u32, pixels)
        .ok_or_else(|| format!("decoded to another size than {} x {} pixels", walked.height, walked.width))?;
    Ok((picture, exif::of_segments(&walked.exif)))
}

/// All that comes before the decoder, whose panics are caught elsewhere.
#[cfg(any(test, fuzzing))]
pub(crate) fn walk(bytes: &[u8], check: impl Fn(usize, usize) -> Result<(), String>) -> Result<(), String> {
    let walked = Walk::new(bytes).run(&check)?;
    let _: Orientation = exif::of_segments(&walked.exif);
    Ok(())
}

/// The RGB pixels of what was walked.
fn pixels(walked: &Walked<'_>) -> Result<Vec<u8>, String> {
    // A decoder's threads are its own; what the system refuses once it may give a moment later.
    const TRIES: u32 = 5;
    for attempt in 0.. {
        let mut decoder = Decoder::new(walked.stream.as_slice());
        decoder.set_color_transform(walked.colours);
        match decoder.decode() {
            Ok(samples) => return Ok(to_rgb(samples, walked.components)),
            Err(jpeg_decoder::Error::Io(error))
                if error.kind() != io::ErrorKind::UnexpectedEof && attempt + 1 < TRIES =>
            {
                thread::sleep(Duration::from_millis(20 << attempt));
            }
            Err(error) => return Err(format!("a JPEG that cannot be decoded: {error}")),
        }
    }
    unreachable!("the last try returns")
}

fn to_rgb(samples: Vec<u8>, components: usize) -> Vec<u8> {
    match components {
        1 => samples.into_iter().flat_map(|grey| [grey; 3]).collect(),
        3 => samples,
        // Ink by Adobe's convention, which all follow: 255 is none. The decoder turned it over.
        _ => {
            let light = |ink: u8, black: u8| {
                (u32::from(255 - ink) * u32::from(255 - black) + 127).checked_div(255).map_or(0, |light| light as u8)
            };
            let pixels = samples.chunks_exact(4);
            pixels.flat_map(|pixel| [pixel[0], pixel[1], pixel[2]].map(|ink| light(ink, pixel[3]))).collect()
        }
    }
}

/// What a decoder needs, and what it must not decide for itself.
struct Walked<'a> {
    height: usize,
    width: usize,
    components: usize,
    colours: ColorTransform,
    /// What follows `Exif\0` and a byte in each segment that begins so.
    exif: Vec<&'a [u8]>,
    /// The file less its application segments and all that is not the image's.
    stream: Vec<u8>,
}

/// A component of the frame header (B.2.2), and what has been seen of it.
struct Component {
    identifier: u8,
    /// Sampling factors, horizontal and vertical.
    factors: [usize; 2],
    /// Blocks across and down in a scan of its own (A.2.2).
    blocks: [usize; 2],
    /// Blocks across and down in whole MCUs (A.2.4).
    padded: [usize; 2],
    /// The bits of each coefficient, in the order of the file, that are still to come (G.1.1.1): none known, if `None`.
    missing_bits: [Option<u8>; BLOCK],
    /// Which coefficients of each padded block are not zero so far: what refinements depend on. Empty if sequential.
    nonzero: Vec<u64>,
}

impl Component {
    fn is_complete(&self) -> bool {
        self.missing_bits.iter().all(|&bits| bits == Some(0))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Process {
    Sequential,
    Progressive,
}

struct Frame {
    process: Process,
    height: usize,
    width: usize,
    /// MCUs across and down of a scan of several components.
    mcus: [usize; 2],
    components: Vec<Component>,
}

/// A scan header (B.2.3).
struct Scan {
    /// Places in the frame's list, with the numbers of their DC and AC tables.
    components: Vec<(usize, usize, usize)>,
    /// First and last coefficient.
    band: [usize; 2],
    /// Bits that were missing before, 0 if none was known, and bits that will be missing after.
    bits: [u8; 2],
}

/// Reads marker segments (B.1.1) one after the other.
struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
    frame: Option<Frame>,
    /// DC and AC tables by number.
    tables: [[Option<Table>; 4]; 2],
    restart_interval: usize,
    scans: usize,
    has_jfif: bool,
    /// The transform that an Adobe segment names.
    adobe: Option<u8>,
    exif: Vec<&'a [u8]>,
    stream: Vec<u8>,
}

impl<'a> Walk<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            at: 2,
            frame: None,
            tables: [const { [const { None }; 4] }; 2],
            restart_interval: 0,
            scans: 0,
            has_jfif: false,
            adobe: None,
            exif: Vec::new(),
            stream: vec![0xff, 0xd8],
        }
    }

    fn run(mut self, check: &impl Fn(usize, usize) -> Result<(), String>) -> Result<Walked<'a>, String> {
        // Frames of motion JPEG leave the usual tables out (K.3.3).
        self.segment(0xc4, &STANDARD_TABLES)?;
        loop {
            let marker = self.marker()?;
            match marker {
                // A restart marker behind the last MCU, and markers without a meaning.
                0x01 | 0xd0..=0xd7 => continue,
                0xd8 => return Err("a damaged JPEG: a second one begins inside".into()),
                0xd9 => break,
                _ => {}
            }
            let content = self.content()?;
            self.segment(marker, content)?;
            match &self.frame {
                Some(frame) if marker == 0xda && frame.components.iter().all(Component::is_complete) => break,
                // Before anything is allocated for its pixels.
                Some(frame) if (0xc0..=0xcf).contains(&marker) => check(frame.height, frame.width)?,
                _ => {}
            }
        }
        self.finish()
    }

    /// The next marker. What lies before it is none of ours: cameras leave bytes between segments.
    fn marker(&mut self) -> Result<u8, String> {
        let found = next_marker(self.bytes, self.at).ok_or_else(|| self.cut())?;
        self.at = found + 2;
        Ok(self.bytes[found + 1])
    }

    /// The content of the segment that begins here.
    fn content(&mut self) -> Result<&'a [u8], String> {
        let length = match self.bytes.get(self.at..self.at + 2) {
            Some(&[high, low]) => usize::from(u16::from_be_bytes([high, low])),
            _ => return Err(self.cut()),
        };
        if length < 2 {
            return Err(format!("a damaged JPEG: a segment of {length} bytes, expected at least 2"));
        }
        let content = self.bytes.get(self.at + 2..self.at + length).ok_or_else(|| self.cut())?;
        self.at += length;
        Ok(content)
    }

    fn cut(&self) -> String {
        let left = match &self.frame {
            Some(_) if self.scans > 0 => format!("after {} scans, before its last", self.scans),
            _ => "before its first scan".into(),
        };
        format!("a truncated JPEG: {} bytes, which end {left}", self.bytes.len())
    }

    fn segment(&mut self, marker: u8, content: &'a [u8]) -> Result<(), String> {
        match marker {
            0xc4 => {
                self.huffman_tables(content)?;
                self.keep(marker, content);
            }
            // Baseline, extended and progressive. Baseline as extended, which may have more tables: files have them.
            0xc0..=0xc2 if self.frame.is_none() => {
                let process = if marker == 0xc2 { Process::Progressive } else { Process::Sequential };
                self.frame = Some(Frame::parse(process, content)?);
                self.keep(marker.max(0xc1), content);
            }
            0xc0..=0xc2 | 0xc5..=0xc7 | 0xcd..=0xcf | 0xde | 0xdf => {
                return Err(not_read("a hierarchical JPEG"));
            }
            0xc3 => return Err(not_read("a lossless JPEG")),
            0xc9..=0xcb => return Err(not_read("a JPEG with arithmetic coding")),
            0xda => self.scan(content)?,
            0xdb => {
                if self.scans > 0 && matches!(&self.frame, Some(Frame { process: Process::Progressive, .. })) {
                    return Err(not_read("a progressive JPEG whose quantization changes between scans"));
                }
                self.keep(marker, content);
            }
            0xdd => {
                let &[high, low] = content else { return Err(wrong_length("restart interval")) };
                self.restart_interval = usize::from(u16::from_be_bytes([high, low]));
                self.keep(marker, content);
            }
            0xe0 => self.has_jfif |= content.starts_with(b"JFIF\0") && content.len() >= 12,
            // The sixth byte is padding, of any value.
            0xe1 if content.starts_with(b"Exif\0") => self.exif.extend(content.get(6..)),
            0xee if content.starts_with(b"Adobe") => self.adobe = content.get(11).copied().or(self.adobe),
            _ => {}
        }
        Ok(())
    }

    fn keep(&mut self, marker: u8, content: &[u8]) {
        self.stream.extend([0xff, marker]);
        self.stream.extend((content.len() as u16 + 2).to_be_bytes());
        self.stream.extend(content);
    }

    /// Tables of codes (B.2.4.2).
    fn huffman_tables(&mut self, mut content: &[u8]) -> Result<(), String> {
        while let Some((&about, rest)) = content.split_first() {
            let (counts, rest) = rest.split_at_checked(16).ok_or_else(|| wrong_length("Huffman table"))?;
            let values: usize = counts.iter().map(|&count| usize::from(count)).sum();
            let (values, rest) = rest.split_at_checked(values).ok_or_else(|| wrong_length("Huffman table"))?;
            let place = self.tables.get_mut(usize::from(about >> 4)).and_then(|of| of.get_mut(usize::from(about & 15)));
            *place.ok_or_else(|| format!("a damaged JPEG: a Huffman table of number {about:#04x}"))? =
                Some(Table::new(counts, values)?);
            content = rest;
        }
        Ok(())
    }

    /// A scan: its header, then each of its blocks.
    fn scan(&mut self, header: &'a [u8]) -> Result<(), String> {
        let frame = self.frame.as_mut().ok_or("a damaged JPEG: a scan before the frame header")?;
        let scan = Scan::parse(header, frame)?;
        self.scans += 1;
        if self.scans > MAX_SCANS {
            return Err(format!("a JPEG of more than {MAX_SCANS} scans"));
        }
        let mut tables = [[None; 2]; MAX_COMPONENTS];
        for (tables, &(_, dc, ac)) in tables.iter_mut().zip(&scan.components) {
            *tables = [self.tables[0][dc].as_ref(), self.tables[1][ac].as_ref()];
        }
        if frame.process == Process::Progressive {
            for &(component, ..) in &scan.components {
                let component = &mut frame.components[component];
                component.nonzero.resize(component.padded[0] * component.padded[1], 0);
            }
        }
        let (listed, _) = header.split_at(header.len() - 3);
        let last = [scan.band[0] as u8, scan.band[1] as u8, scan.bits[0] << 4 | scan.bits[1]];
        self.stream.extend([0xff, 0xda]);
        self.stream.extend((header.len() as u16 + 2).to_be_bytes());
        self.stream.extend(listed.iter().chain(&last));
        let mut codes = Codes { bits: Bits::new(self.bytes, self.at), scan: &scan, tables: &tables, skip: 0 };
        let blocks = Order::new(frame, &scan);
        let mut start = self.at;
        let mut restarts = 0;
        for mcu in 0..blocks.mcus() {
            if self.restart_interval > 0 && mcu > 0 && mcu % self.restart_interval == 0 {
                let end = codes.bits.position();
                let marker = 0xd0 + restarts % 8;
                let found = match next_marker(self.bytes, end) {
                    Some(found) if self.bytes[found + 1] == marker => found,
                    Some(_) => return Err(Fault::Damaged(NO_RESTART).sentence(self.scans, mcu, blocks.mcus())),
                    None => return Err(Fault::Ends.sentence(self.scans, mcu, blocks.mcus())),
                };
                self.stream.extend(&self.bytes[start..end]);
                self.stream.extend([0xff, marker]);
                start = found + 2;
                codes.bits = Bits::new(self.bytes, start);
                codes.skip = 0;
                restarts += 1;
            }
            blocks
                .each_of(mcu, |which, block| {
                    let component = &mut frame.components[scan.components[which].0];
                    match component.nonzero.get_mut(block) {
                        Some(nonzero) => codes.progressive(which, nonzero),
                        None => codes.sequential(which),
                    }
                })
                .map_err(|fault| fault.sentence(self.scans, mcu, blocks.mcus()))?;
        }
        self.at = codes.bits.position();
        self.stream.extend(&self.bytes[start..self.at]);
        for &(component, ..) in &scan.components {
            frame.components[component].missing_bits[scan.band[0]..=scan.band[1]].fill(Some(scan.bits[1]));
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Walked<'a>, String> {
        let colours = self.colours();
        let Some(frame) = self.frame else { return Err("a damaged JPEG: it ends without a frame header".into()) };
        // A progressive file may leave out what it likes of the rest, and is shown without it.
        if let Some(at) = frame.components.iter().position(|component| component.missing_bits[0].is_none()) {
            return Err(format!("a truncated JPEG: no scan of component {} of {}", at + 1, frame.components.len()));
        }
        if is_filled(self.bytes, self.at) {
            return Err(format!("a truncated JPEG: {} bytes, of which the last are all zero", self.bytes.len()));
        }
        self.stream.extend([0xff, 0xd9]);
        Ok(Walked {
            height: frame.height,
            width: frame.width,
            components: frame.components.len(),
            colours,
            exif: self.exif,
            stream: self.stream,
        })
    }

    /// What the components mean, by the rules of libjpeg, which all others follow.
    fn colours(&self) -> ColorTransform {
        let identifiers: Vec<_> = self.frame.iter().flat_map(|frame| &frame.components).map(|c| c.identifier).collect();
        match (identifiers.as_slice(), self.adobe) {
            (&[_], _) => ColorTransform::Grayscale,
            (&[_, _, _], _) if self.has_jfif => ColorTransform::YCbCr,
            (&[_, _, _], Some(0)) => ColorTransform::RGB,
            (b"RGB", None) => ColorTransform::RGB,
            (&[_, _, _], _) => ColorTransform::YCbCr,
            (_, None | Some(0)) => ColorTransform::CMYK,
            _ => ColorTransform::YCCK,
        }
    }
}

fn not_read(what: &str) -> String {
    format!("{what}, which is not read: save it as a baseline JPEG or a PNG")
}

fn wrong_length(what: &str) -> String {
    format!("a damaged JPEG: a {what} of another length than it says")
}

/// Whether the file is zero from before `end`, where its data end, to its own end: downloads are given their size before
/// their bytes. Zeros are codes, too, but encoders end with a marker, and fill the last byte with ones.
fn is_filled(bytes: &[u8], end: usize) -> bool {
    let is_zero = match bytes[..end] {
        [.., 0xff, 0] => false,
        [.., last] => last == 0,
        [] => false,
    };
    is_zero && end < bytes.len() && bytes[end..].iter().all(|&byte| byte == 0)
}

/// Where the next marker begins, at `from` or after it.
fn next_marker(bytes: &[u8], from: usize) -> Option<usize> {
    let pairs = bytes.get(from..)?.windows(2);
    pairs.into_iter().position(|pair| pair[0] == 0xff && !matches!(pair[1], 0 | 0xff)).map(|found| from + found)
}

impl Frame {
    fn parse(process: Process, content: &[u8]) -> Result<Self, String> {
        let Some((&[precision, h1, h0, w1, w0, count], listed)) = content.split_first_chunk() else {
            return Err(wrong_length("frame header"));
        };
        let [height, width] = [[h1, h0], [w1, w0]].map(|side| usize::from(u16::from_be_bytes(side)));
        if precision != 8 {
            return Err(not_read(&format!("a JPEG of {precision} bits per sample")));
        }
        if height == 0 {
            return Err(not_read("a JPEG whose height follows its first scan"));
        }
        if width == 0 {
            return Err("a damaged JPEG: 0 pixels wide".into());
        }
        if !matches!(count, 1 | 3 | 4) {
            return Err(format!("a JPEG of {count} components: expected 1 (grey), 3 (colour) or 4 (CMYK)"));
        }
        if listed.len() != 3 * usize::from(count) {
            return Err(wrong_length("frame header"));
        }
        let factors = |listed: &[u8]| [usize::from(listed[1] >> 4), usize::from(listed[1] & 15)];
        let all = || listed.chunks_exact(3).map(factors);
        if all().flatten().any(|factor| !(1..=4).contains(&factor)) {
            return Err("a damaged JPEG: a sampling factor that is not 1 to 4".into());
        }
        let most = [0, 1].map(|axis| all().map(|factors| factors[axis]).max().unwrap_or(1));
        let sides = [width, height];
        let mcus = [0, 1].map(|axis| sides[axis].div_ceil(8 * most[axis]));
        let component = |listed: &[u8]| {
            let factors = factors(listed);
            let padded = [0, 1].map(|axis| mcus[axis] * factors[axis]);
            Component {
                identifier: listed[0],
                factors,
                blocks: [0, 1].map(|axis| (sides[axis] * factors[axis]).div_ceil(most[axis]).div_ceil(8)),
                padded,
                missing_bits: [None; BLOCK],
                nonzero: Vec::new(),
            }
        };
        Ok(Self { process, height, width, mcus, components: listed.chunks_exact(3).map(component).collect() })
    }
}

impl Scan {
    fn parse(content: &[u8], frame: &Frame) -> Result<Self, String> {
        let wrong = || wrong_length("scan header");
        let (&count, rest) = content.split_first().ok_or_else(wrong)?;
        let (listed, last) = rest.split_at_checked(2 * usize::from(count)).ok_or_else(wrong)?;
        let &[first, end, bits] = last else { return Err(wrong()) };
        let mut components: Vec<(usize, usize, usize)> = Vec::new();
        for pair in listed.chunks_exact(2) {
            let place = frame.components.iter().position(|component| component.identifier == pair[0]);
            let place = place.filter(|&place| components.iter().all(|&(other, ..)| other != place));
            let place = place.ok_or("a damaged JPEG: a scan of a component that is not there, or twice")?;
            let tables = [pair[1] >> 4, pair[1] & 15].map(usize::from);
            if tables.iter().any(|&table| table > 3) {
                return Err(format!("a damaged JPEG: a scan with Huffman tables {} and {}", tables[0], tables[1]));
            }
            components.push((place, tables[0], tables[1]));
        }
        let of = |at: usize| &frame.components[components[at].0];
        match components.len() {
            0 => return Err("a damaged JPEG: a scan of no component".into()),
            // The decoder counts the blocks of such a scan wrongly where a sampling factor is neither 1 nor the largest.
            1 => {
                let counted = [frame.width, frame.height].map(|side| side.div_ceil(8));
                if (0..2).any(|axis| counted[axis].min(of(0).padded[axis]) != of(0).blocks[axis]) {
                    let [h, v] = of(0).factors;
                    return Err(not_read(&format!(
                        "a JPEG with sampling factors {h} x {v} in a scan of one component"
                    )));
                }
            }
            // B.2.3
            count => {
                let blocks: usize = (0..count).map(|at| of(at).factors[0] * of(at).factors[1]).sum();
                if blocks > 10 {
                    return Err(format!("a damaged JPEG: {blocks} blocks in an MCU, expected at most 10"));
                }
            }
        }
        let (band, bits) = match frame.process {
            // What the header says of them is not used, and some write nonsense.
            Process::Sequential => ([0, BLOCK - 1], [0, 0]),
            Process::Progressive => ([first, end].map(usize::from), [bits >> 4, bits & 15]),
        };
        let before = if bits[0] == 0 { None } else { Some(bits[0]) };
        let is_in_turn = band[0] <= band[1]
            && band[1] < BLOCK
            && bits[1] < 14
            && before.is_none_or(|before| before == bits[1] + 1)
            && (frame.process == Process::Sequential || (band == [0, 0] || (band[0] > 0 && components.len() == 1)))
            && (0..components.len())
                .all(|at| of(at).missing_bits[band[0]..=band[1]].iter().all(|&bits| bits == before));
        if !is_in_turn {
            let [first, last] = band;
            return Err(format!(
                "a damaged JPEG: a scan of coefficients {first} to {last}, bits {} to {}, that is not their next",
                bits[0], bits[1]
            ));
        }
        Ok(Self { components, band, bits })
    }
}

/// In which order a scan has the blocks (A.2.2, A.2.3).
struct Order {
    /// MCUs across and down.
    mcus: [usize; 2],
    /// Of each component: blocks across and down in an MCU, and in a row of the padded component.
    components: Vec<([usize; 2], usize)>,
}

impl Order {
    fn new(frame: &Frame, scan: &Scan) -> Self {
        let components = scan.components.iter().map(|&(component, ..)| &frame.components[component]);
        match scan.components.len() {
            1 => {
                let component = &frame.components[scan.components[0].0];
                Self { mcus: component.blocks, components: vec![([1, 1], component.padded[0])] }
            }
            _ => Self { mcus: frame.mcus, components: components.map(|c| (c.factors, c.padded[0])).collect() },
        }
    }

    fn mcus(&self) -> usize {
        self.mcus[0] * self.mcus[1]
    }

    /// Calls `visit` with the place of the component in the scan and the block's in the component.
    #[inline]
    fn each_of<E>(&self, mcu: usize, mut visit: impl FnMut(usize, usize) -> Result<(), E>) -> Result<(), E> {
        let [x, y] = [mcu % self.mcus[0], mcu / self.mcus[0]];
        for (which, &([across, down], row)) in self.components.iter().enumerate() {
            for v in 0..down {
                for h in 0..across {
                    visit(which, (y * down + v) * row + x * across + h)?;
                }
            }
        }
        Ok(())
    }
}

/// Why a scan cannot be walked to its end.
enum Fault {
    /// The file, or what lies before the next marker, ends.
    Ends,
    /// Something no encoder writes.
    Damaged(&'static str),
}

impl Fault {
    fn sentence(self, scan: usize, done: usize, mcus: usize) -> String {
        match self {
            Fault::Ends => format!("a truncated JPEG: the data of scan {scan} end after {done} of {mcus} MCUs"),
            Fault::Damaged(what) => format!("a damaged JPEG: {what}, after {done} of {mcus} MCUs of scan {scan}"),
        }
    }
}

/// The codes of a scan.
struct Codes<'a> {
    bits: Bits<'a>,
    scan: &'a Scan,
    /// DC and AC table of each component.
    tables: &'a [[Option<&'a Table>; 2]; MAX_COMPONENTS],
    /// Blocks to come that add no coefficient (`EOBRUN` of G.1.2.2).
    skip: u32,
}

impl Codes<'_> {
    /// A block of a sequential scan (F.2.2).
    #[inline]
    fn sequential(&mut self, which: usize) -> Result<(), Fault> {
        self.difference(which)?;
        let tables = self.tables;
        let table = tables[which][1].ok_or(NO_TABLE)?;
        // A copy lives in registers.
        let mut bits = self.bits;
        let mut at = 1;
        while at < BLOCK {
            let code = bits.decode(table)?;
            match (code >> 4, code & 15) {
                (15, 0) => at += 16,
                (_, 0) => break,
                (zeros, _) => {
                    at += usize::from(zeros) + 1;
                    if at > BLOCK {
                        return Err(BEYOND);
                    }
                }
            }
        }
        self.bits = bits;
        Ok(())
    }

    /// A difference of DC coefficients (F.2.2.1).
    #[inline]
    fn difference(&mut self, which: usize) -> Result<(), Fault> {
        let tables = self.tables;
        match self.bits.decode(tables[which][0].ok_or(NO_TABLE)?)? {
            0..=11 => Ok(()),
            _ => Err(Fault::Damaged("a DC difference of more than 11 bits")),
        }
    }

    /// A block of a progressive scan (G.1.2), with its coefficients that are not zero.
    fn progressive(&mut self, which: usize, nonzero: &mut u64) -> Result<(), Fault> {
        match (self.scan.band, self.scan.bits[0]) {
            ([0, _], 0) => self.difference(which),
            ([0, _], _) => self.bits.skip(1),
            (band, 0) => self.first(which, band, nonzero),
            (band, _) => self.refine(which, band, nonzero),
        }
    }

    /// The first bits of AC coefficients (G.1.2.2).
    fn first(&mut self, which: usize, [first, last]: [usize; 2], nonzero: &mut u64) -> Result<(), Fault> {
        if self.skip > 0 {
            self.skip -= 1;
            return Ok(());
        }
        let tables = self.tables;
        let table = tables[which][1].ok_or(NO_TABLE)?;
        let mut at = first;
        while at <= last {
            let code = self.bits.decode(table)?;
            match (code >> 4, code & 15) {
                (15, 0) => at += 16,
                (run, 0) => {
                    self.skip = (1 << run) + self.bits.take(run)? - 1;
                    break;
                }
                (zeros, _) => {
                    at += usize::from(zeros);
                    if at > last {
                        return Err(BEYOND);
                    }
                    *nonzero |= 1 << at;
                    at += 1;
                }
            }
        }
        Ok(())
    }

    /// One more bit of AC coefficients (G.1.2.3).
    fn refine(&mut self, which: usize, [first, last]: [usize; 2], nonzero: &mut u64) -> Result<(), Fault> {
        let tables = self.tables;
        let table = tables[which][1].ok_or(NO_TABLE)?;
        let mut at = first;
        while self.skip == 0 && at <= last {
            let code = self.bits.decode(table)?;
            let mut zeros = code >> 4;
            match code & 15 {
                0 if zeros < 15 => {
                    self.skip = (1 << zeros) + self.bits.take(zeros)?;
                    break;
                }
                0 | 1 => {}
                _ => return Err(Fault::Damaged("a refinement by more than a bit")),
            }
            while at <= last {
                if *nonzero >> at & 1 == 1 {
                    self.bits.skip(1)?;
                } else if zeros == 0 {
                    break;
                } else {
                    zeros -= 1;
                }
                at += 1;
            }
            if code & 15 == 1 {
                if at > last {
                    return Err(BEYOND);
                }
                *nonzero |= 1 << at;
            }
            at += 1;
        }
        if self.skip > 0 {
            self.skip -= 1;
            let rest = (at..=last).filter(|&at| *nonzero >> at & 1 == 1).count();
            (0..rest).try_for_each(|_| self.bits.skip(1))?;
        }
        Ok(())
    }
}

const NO_TABLE: Fault = Fault::Damaged("a Huffman table that the file does not have");
const NO_RESTART: &str = "another marker than the next restart's";
const BEYOND: Fault = Fault::Damaged("a coefficient beyond the last of its block");

/// The bits between two markers (F.2.2.5).
#[derive(Clone, Copy)]
struct Bits<'a> {
    bytes: &'a [u8],
    /// The first byte that is not in `buffer`.
    at: usize,
    /// The next bits, from the highest on; after them zeros, or the beginning of the byte at `at`.
    buffer: u64,
    /// Bits in `buffer`.
    count: u32,
}

impl<'a> Bits<'a> {
    fn new(bytes: &'a [u8], at: usize) -> Self {
        Self { bytes, at, buffer: 0, count: 0 }
    }

    /// At least 56 bits, if there are so many.
    #[inline(always)]
    fn fill(&mut self) {
        // Most of the time no byte is stuffed or a marker's: as many as there is room for, at once.
        if let Some(&next) = self.bytes.get(self.at..).and_then(|rest| rest.first_chunk()) {
            let next = u64::from_be_bytes(next);
            let [ones, highest] = [0x01, 0x80].map(|byte| u64::from_ne_bytes([byte; 8]));
            // A byte of zero in the complement would borrow.
            if (!next).wrapping_sub(ones) & next & highest == 0 {
                self.buffer |= next >> self.count;
                let taken = (63 - self.count) / 8;
                self.at += taken as usize;
                self.count += 8 * taken;
                return;
            }
        }
        *self = self.filled_by_bytes();
    }

    #[cold]
    fn filled_by_bytes(mut self) -> Self {
        while self.count < 56 {
            let (byte, length) = match self.bytes.get(self.at..) {
                Some([0xff, 0, ..]) => (0xff, 2),
                Some([0xff, ..] | []) | None => break,
                Some([byte, ..]) => (*byte, 1),
            };
            self.buffer |= u64::from(byte) << (56 - self.count);
            self.count += 8;
            self.at += length;
        }
        self
    }

    /// Goes past at most 32 bits.
    #[inline]
    fn skip(&mut self, bits: u8) -> Result<(), Fault> {
        let bits = u32::from(bits);
        if self.count < bits {
            self.fill();
            if self.count < bits {
                return Err(Fault::Ends);
            }
        }
        self.buffer <<= bits;
        self.count -= bits;
        Ok(())
    }

    /// The next bits, 16 at most.
    #[inline]
    fn take(&mut self, bits: u8) -> Result<u32, Fault> {
        if self.count < 16 {
            self.fill();
        }
        let value = (self.buffer >> 32 >> (32 - bits)) as u32;
        self.skip(bits)?;
        Ok(value)
    }

    /// The value of the next code. Goes past it and as many bits as its lower half says: they are of the coefficient.
    #[inline(always)]
    fn decode(&mut self, table: &Table) -> Result<u8, Fault> {
        if self.count < 32 {
            self.fill();
        }
        let (mut value, mut length) = table.short[(self.buffer >> (64 - SHORT)) as usize];
        if length == 0 {
            (value, length) = table.long((self.buffer >> 48) as u16);
        }
        if u32::from(length) > self.count {
            return Err(match self.count {
                16.. if length == NO_CODE => Fault::Damaged("a code that its Huffman table does not have"),
                _ => Fault::Ends,
            });
        }
        self.buffer <<= length;
        self.count -= u32::from(length);
        Ok(value)
    }

    /// The first byte of which no bit was taken.
    fn position(&self) -> usize {
        (0..self.count / 8).fold(self.at, |at, _| match self.bytes[..at] {
            [.., 0xff, 0] => at - 2,
            _ => at - 1,
        })
    }
}

/// Bits of the codes that are looked up at once: nearly all.
const SHORT: usize = 9;

/// A length of more bits than are ever there.
const NO_CODE: u8 = u8::MAX;

/// Codes and their values (C.2, F.2.2.3).
struct Table {
    /// The code that begins with these bits: its value, and its length with that of the bits that follow it; length 0
    /// if it is longer.
    short: [(u8, u8); 1 << SHORT],
    /// Of each length: what is beyond its last code, with 16 bits, and where its values would begin were its codes to
    /// begin with 0.
    ends: [(u32, i32); 17],
    values: Vec<u8>,
}

impl Table {
    fn new(counts: &[u8], values: &[u8]) -> Result<Self, String> {
        let mut table = Self { short: [(0, 0); 1 << SHORT], ends: [(0, 0); 17], values: values.to_vec() };
        let (mut code, mut at) = (0u32, 0usize);
        for (length, &count) in (1..17usize).zip(counts) {
            code <<= 1;
            let first = code;
            for _ in 0..count {
                if code >> length != 0 {
                    return Err("a damaged JPEG: a Huffman table of more codes than there are".into());
                }
                if length <= SHORT {
                    let start = (code << (SHORT - length)) as usize;
                    table.short[start..start + (1 << (SHORT - length))].fill(with_bits(values[at], length));
                }
                code += 1;
                at += 1;
            }
            table.ends[length] = (code << (16 - length), at as i32 - count as i32 - first as i32);
        }
        Ok(table)
    }

    /// The same of a longer code, which these bits begin with: [`NO_CODE`] if there is none.
    #[cold]
    fn long(&self, bits: u16) -> (u8, u8) {
        let length = (SHORT + 1..17).find(|&length| u32::from(bits) < self.ends[length].0);
        let value = length.and_then(|length| {
            let place = self.ends[length].1 + i32::from(bits >> (16 - length));
            Some(with_bits(*self.values.get(usize::try_from(place).ok()?)?, length))
        });
        value.unwrap_or((0, NO_CODE))
    }
}

/// A code's value, and its length with that of the bits that follow it (F.1.2.1, F.1.2.2).
fn with_bits(value: u8, length: usize) -> (u8, u8) {
    (value, length as u8 + (value & 15))
}

/// The tables of K.3.3, as the content of a segment.
#[rustfmt::skip]
const STANDARD_TABLES: [u8; 416] = [
    0, 0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 16, 0, 2, 1, 3, 3, 2, 4,
    3, 5, 5, 4, 4, 0, 0, 1, 125, 1, 2, 3, 0, 4, 17, 5, 18, 33, 49, 65, 6, 19, 81, 97, 7, 34, 113, 20, 50, 129, 145,
    161, 8, 35, 66, 177, 193, 21, 82, 209, 240, 36, 51, 98, 114, 130, 9, 10, 22, 23, 24, 25, 26, 37, 38, 39, 40, 41,
    42, 52, 53, 54, 55, 56, 57, 58, 67, 68, 69, 70, 71, 72, 73, 74, 83, 84, 85, 86, 87, 88, 89, 90, 99, 100, 101,
    102, 103, 104, 105, 106, 115, 116, 117, 118, 119, 120, 121, 122, 131, 132, 133, 134, 135, 136, 137, 138, 146,
    147, 148, 149, 150, 151, 152, 153, 154, 162, 163, 164, 165, 166, 167, 168, 169, 170, 178, 179, 180, 181, 182,
    183, 184, 185, 186, 194, 195, 196, 197, 198, 199, 200, 201, 202, 210, 211, 212, 213, 214, 215, 216, 217, 218,
    225, 226, 227, 228, 229, 230, 231, 232, 233, 234, 241, 242, 243, 244, 245, 246, 247, 248, 249, 250, 1, 0, 3, 1,
    1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 17, 0, 2, 1, 2, 4, 4, 3, 4, 7, 5, 4,
    4, 0, 1, 2, 119, 0, 1, 2, 3, 17, 4, 5, 33, 49, 6, 18, 65, 81, 7, 97, 113, 19, 34, 50, 129, 8, 20, 66, 145, 161,
    177, 193, 9, 35, 51, 82, 240, 21, 98, 114, 209, 10, 22, 36, 52, 225, 37, 241, 23, 24, 25, 26, 38, 39, 40, 41, 42,
    53, 54, 55, 56, 57, 58, 67, 68, 69, 70, 71, 72, 73, 74, 83, 84, 85, 86, 87, 88, 89, 90, 99, 100, 101, 102, 103,
    104, 105, 106, 115, 116, 117, 118, 119, 120, 121, 122, 130, 131, 132, 133, 134, 135, 136, 137, 138, 146, 147,
    148, 149, 150, 151, 152, 153, 154, 162, 163, 164, 165, 166, 167, 168, 169, 170, 178, 179, 180, 181, 182, 183,
    184, 185, 186, 194, 195, 196, 197, 198, 199, 200, 201, 202, 210, 211, 212, 213, 214, 215, 216, 217, 218, 226,
    227, 228, 229, 230, 231, 232, 233, 234, 242, 243, 244, 245, 246, 247, 248, 249, 250,
];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FILES: [&[u8]; 5] = [
        include_bytes!("../tests/fixtures/jpeg/420.jpg"),
        include_bytes!("../tests/fixtures/jpeg/420_refined.jpg"),
        include_bytes!("../tests/fixtures/jpeg/444_restart_in_two.jpg"),
        include_bytes!("../tests/fixtures/jpeg/420_restart_progressive.jpg"),
        include_bytes!("../tests/fixtures/pictures/orientation_split.jpg"),
    ];

    fn any_size(_: usize, _: usize) -> Result<(), String> {
        Ok(())
    }

    #[test]
    fn the_decoder_gets_what_was_walked_and_no_other_byte() {
        for bytes in FILES {
            let walked = Walk::new(bytes).run(&any_size).expect("well formed");
            let again = Walk::new(&walked.stream).run(&any_size).expect("well formed");
            // The usual tables come first, once more.
            let usual = 4 + STANDARD_TABLES.len();
            assert_eq!(again.stream[2 + usual..], walked.stream[2..]);
            assert!(walked.stream.len() < bytes.len() + usual, "no application segment is left");
        }
    }

    #[test]
    fn codes_of_every_length_are_found() {
        // Lengths 1, 2, .. 16, one code each: 0, 10, 110, ..
        let counts = [1; 16];
        // No bits follow.
        let values: Vec<u8> = (0..16).map(|value| value << 4).collect();
        let table = Table::new(&counts, &values).expect("well formed");
        for length in 1..17u32 {
            let code = ((1u32 << length) - 2) << (16 - length);
            let bytes = [(code >> 8) as u8, code as u8].iter().flat_map(|&byte| [byte, 0]).collect::<Vec<_>>();
            let stuffed: Vec<u8> = match (bytes[0], bytes[2]) {
                (0xff, low) => vec![0xff, 0, low],
                (high, low) => vec![high, low],
            };
            let mut bits = Bits::new(&stuffed, 0);
            assert!(bits.decode(&table).is_ok_and(|value| u32::from(value) == (length - 1) << 4), "{length}");
            assert_eq!(bits.count, 16 - length, "{length}");
        }
        assert!(matches!(Bits::new(&[0xff, 0, 0xff, 0], 0).decode(&table), Err(Fault::Damaged(_))));
        assert!(matches!(Bits::new(&[0xff, 0], 0).decode(&table), Err(Fault::Ends)));
        assert!(Table::new(&[3], &[0, 1, 2]).is_err());
    }

    /// Two blocks of grey, each in a restart interval of its own, the coefficients of the second as given.
    #[test]
    fn a_run_of_empty_blocks_ends_with_its_restart_interval() {
        let file = |second: &[u8]| {
            let frame = b"\xff\xd8\xff\xc2\0\x0b\x08\0\x08\0\x10\x01\x01\x11\0\xff\xdd\0\x04\0\x01";
            let first = b"\xff\xda\0\x08\x01\x01\0\0\0\0\x3f\xff\xd0\x3f";
            // The code 0 is a run of two or three blocks (`EOB1`): it and a bit of the run are all that a block has.
            let table = b"\xff\xc4\0\x14\x10\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x10";
            let rest = b"\xff\xda\0\x08\x01\x01\0\x01\x3f\0\x3f\xff\xd0";
            [frame, &first[..], table, rest, second, b"\xff\xd9"].concat()
        };
        assert_eq!(walk(&file(b"\x3f"), any_size), Ok(()));
        let message = walk(&file(b""), any_size).expect_err("the second is not there");
        assert!(message.contains("after 1 of 2 MCUs"), "{message}");
    }

    /// A marker segment.
    fn segment(marker: u8, content: &[u8]) -> Vec<u8> {
        [&[0xff, marker, 0, content.len() as u8 + 2], content].concat()
    }

    /// The header of a frame of 8 x 8 pixels, of components numbered from 1 with these sampling factors.
    fn frame(marker: u8, factors: &[u8]) -> Vec<u8> {
        let components = (1..).zip(factors).flat_map(|(number, &factors)| [number, factors, 0]);
        let sizes = [8, 0, 8, 0, 8, factors.len() as u8];
        segment(marker, &sizes.into_iter().chain(components).collect::<Vec<_>>())
    }

    /// A scan of components, with the table of that number for all, and its last three bytes; then its data.
    fn scan(components: &[u8], table: u8, last: [u8; 3], data: &[u8]) -> Vec<u8> {
        let listed = components.iter().flat_map(|&component| [component, table << 4 | table]);
        let content: Vec<u8> = std::iter::once(components.len() as u8).chain(listed).chain(last).collect();
        [segment(0xda, &content), data.to_vec()].concat()
    }

    /// A Huffman table: its number and class, and values of the codes 0, 10, 110, ..
    fn table(about: u8, values: &[u8]) -> Vec<u8> {
        let counts = (0..16).map(|length| u8::from(length < values.len()));
        segment(0xc4, &std::iter::once(about).chain(counts).chain(values.iter().copied()).collect::<Vec<_>>())
    }

    fn file(segments: &[&[u8]]) -> Vec<u8> {
        [&[0xff, 0xd8], &segments.concat()[..], &[0xff, 0xd9]].concat()
    }

    const SEQUENTIAL: [u8; 3] = [0, 63, 0];
    const QUANTIZATION: [u8; 65] = {
        let mut ones = [1; 65];
        ones[0] = 0;
        ones
    };

    /// By the usual tables: no difference, no other coefficient, ones to the end of the byte.
    const EMPTY: &[u8] = &[0b0010_1011];

    #[test]
    fn what_no_encoder_writes_is_refused() {
        let grey = frame(0xc0, &[0x11]);
        assert_eq!(walk(&file(&[&grey, &scan(&[1], 0, SEQUENTIAL, EMPTY)]), any_size), Ok(()));
        let beyond = scan(&[1], 0, SEQUENTIAL, &[0b00_000_101]);
        let progressive =
            [frame(0xc2, &[0x11]), table(0x10, &[0x00, 0x02]), scan(&[1], 0, [0, 0, 0], &[0x3f])].concat();
        let bands: Vec<u8> = [0x01, 0x10]
            .iter()
            .flat_map(|&bits| (1..64).flat_map(move |at| scan(&[1], 0, [at, at, bits], &[0x7f])))
            .collect();
        for (segments, expected) in [
            (vec![&[0xff, 0xd8][..], &grey], "a second one begins inside"),
            (vec![&frame(0xc0, &[0x11; 3]), &scan(&[1], 0, SEQUENTIAL, EMPTY)], "no scan of component 2 of 3"),
            (vec![&grey, &table(0x10, &[0xf0, 0xf1]), &beyond], "a coefficient beyond the last of its block"),
            (
                vec![&grey, &table(0, &[12]), &scan(&[1], 0, SEQUENTIAL, &[0; 3])],
                "a DC difference of more than 11 bits",
            ),
            (vec![&frame(0xc0, &[0x42, 0x21, 0x11]), &scan(&[1, 2, 3], 0, SEQUENTIAL, EMPTY)], "11 blocks in an MCU"),
            (vec![&progressive, &segment(0xdb, &QUANTIZATION)], "quantization changes between scans"),
            (vec![&progressive, &bands], "more than 100 scans"),
            (
                vec![&progressive, &scan(&[1], 0, [1, 63, 0x01], &[0x7f]), &scan(&[1], 0, [1, 63, 0x10], &[0xbf])],
                "a refinement by more than a bit",
            ),
        ] {
            let message = walk(&file(&segments), any_size).expect_err(expected);
            assert!(message.contains(expected), "{message}, not {expected}");
        }
        let too_large = |_, _| Err("too large".to_string());
        assert_eq!(walk(&[&[0xff, 0xd8], &grey[..]].concat(), too_large), Err("too large".into()), "before its pixels");
    }

    /// Baseline has tables 0 and 1; files have more, and are shown.
    #[test]
    fn baseline_may_have_more_tables() {
        let tables = [table(0x02, &[0]), table(0x12, &[0]), segment(0xdb, &QUANTIZATION)].concat();
        let bytes = file(&[&tables, &frame(0xc0, &[0x11]), &scan(&[1], 2, SEQUENTIAL, &[0x3f])]);
        let (picture, _) = decode(&bytes, any_size).expect("a grey square");
        assert!(picture.pixels().all(|pixel| pixel.0 == [128; 3]));
    }

    #[test]
    fn jfif_decides_over_colours() {
        let colours = |segments: &[Vec<u8>]| {
            let picture =
                [frame(0xc0, &[0x11; 3]), scan(&[1, 2, 3], 0, SEQUENTIAL, &[0b0010_1000, 0b1010_0010, 0b1011_1111])];
            let bytes = file(&segments.iter().chain(&picture).map(Vec::as_slice).collect::<Vec<_>>());
            Walk::new(&bytes).run(&any_size).expect("well formed").colours
        };
        let jfif = segment(0xe0, b"JFIF\0\x01\x01\0\0\x01\0\x01\0\0");
        let adobe = segment(0xee, b"Adobe\0\x64\0\0\0\0\0");
        assert!(matches!(colours(&[]), ColorTransform::YCbCr));
        assert!(matches!(colours(std::slice::from_ref(&adobe)), ColorTransform::RGB));
        assert!(matches!(colours(&[jfif, adobe]), ColorTransform::YCbCr));
    }

    #[test]
    fn the_place_of_the_next_bit_counts_stuffed_bytes() {
        let bytes = [0x12, 0xff, 0, 0, 0xff, 0, 0x34, 0xff, 0xd9];
        for (taken, place) in [(1, 1), (8, 1), (9, 3), (16, 3), (17, 4), (25, 6), (32, 6), (33, 7)] {
            let mut bits = Bits::new(&bytes, 0);
            (0..taken).for_each(|_| assert!(bits.skip(1).is_ok()));
            assert_eq!(bits.position(), place, "after {taken} bits");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        /// A refusal or an answer, but no panic: this is before the decoder's are caught.
        #[test]
        fn damaged_files_are_walked_without_a_panic(
            file in 0..FILES.len(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
            cut in any::<prop::sample::Index>(),
            is_cut in any::<bool>(),
        ) {
            let mut bytes = FILES[file].to_vec();
            for (at, value) in changes {
                *at.get_mut(&mut bytes) = value;
            }
            if is_cut {
                bytes.truncate(2.max(cut.index(bytes.len())));
            }
            let few = |height: usize, width: usize| if height * width < 1 << 20 { Ok(()) } else { Err(String::new()) };
            let _ = walk(&bytes, few);
        }
    }
}

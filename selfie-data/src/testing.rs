//! A small source of randomness for the tests of this crate.

use std::sync::Arc;

use crate::{Dataset, Draws, Error, Geometry, Image, Purpose, Result};

/// Words by the finaliser of SplitMix64 over all arguments.
pub(crate) struct HashDraws(pub(crate) u64);

impl Draws for HashDraws {
    fn words(&self, purpose: Purpose, sample: u64, block: u32) -> [u32; 4] {
        let mut state = self.0;
        for part in [purpose as u64, sample, u64::from(block)] {
            state = mix(state ^ part);
        }
        let (a, b) = (mix(state ^ 1), mix(state ^ 2));
        [a as u32, (a >> 32) as u32, b as u32, (b >> 32) as u32]
    }

    /// Of two patches: the halves of the sample's number.
    fn append_order(&self, sample: u64, orders: &mut Vec<u32>) {
        orders.extend([sample as u32, (sample >> 32) as u32]);
    }
}

fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

pub(crate) fn seeded(seed: u64) -> Arc<dyn Draws> {
    Arc::new(HashDraws(seed))
}

/// A dataset whose image `index` is filled with the byte `index`, with labels as given.
pub(crate) struct Plain {
    pub(crate) labels: Vec<Option<u32>>,
    pub(crate) classes: Vec<String>,
    pub(crate) size: usize,
    /// Images that cannot be read.
    pub(crate) bad: Vec<usize>,
    /// Whether the data went away after they were opened.
    pub(crate) gone: bool,
    /// An image whose reading panics.
    pub(crate) panics_at: Option<usize>,
}

impl Plain {
    /// `len` images of 2 x 2 pixels, in two classes by turns.
    pub(crate) fn new(len: usize) -> Self {
        let labels = (0..len).map(|index| Some(index as u32 % 2)).collect();
        Self {
            labels,
            classes: vec!["even".into(), "odd".into()],
            size: 2,
            bad: Vec::new(),
            gone: false,
            panics_at: None,
        }
    }

    /// Classes of the given sizes, one after the other.
    pub(crate) fn of_classes(sizes: &[usize]) -> Self {
        let labels = (0..).zip(sizes).flat_map(|(class, &size)| vec![Some(class); size]).collect();
        let classes = (0..sizes.len()).map(|class| format!("class {class}")).collect();
        Self { labels, classes, ..Self::new(0) }
    }
}

impl Dataset for Plain {
    fn check_there(&self) -> Result<()> {
        let source = std::io::ErrorKind::NotFound.into();
        if self.gone { Err(Error::Read { path: "data".into(), source }) } else { Ok(()) }
    }

    fn len(&self) -> usize {
        self.labels.len()
    }

    fn describe(&self) -> String {
        "plain images".into()
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> Option<u32> {
        self.labels[index]
    }

    fn geometry(&self) -> Geometry {
        Geometry::Fixed { height: self.size, width: self.size }
    }

    fn key(&self, index: usize) -> String {
        format!("folder/{index}.png")
    }

    fn read(&self, index: usize) -> Result<Image> {
        assert!(self.panics_at != Some(index), "image {index} is poisonous");
        if self.bad.contains(&index) {
            return Err(Error::BadImage { key: self.key(index), reason: "torn".into() });
        }
        Ok(Image { height: self.size, width: self.size, pixels: vec![index as u8; self.size * self.size * 3] })
    }
}

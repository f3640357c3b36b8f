//! Which source rows each target pixel of a tile reads, worked out once per shape and kept.
//!
//! Rows of a tile are sorted by the set of taps that reach inside the map. A micro tile walks the union of its rows'
//! live taps, so taps into the padding are skipped nearly everywhere, and so are the three quarters of taps that a
//! transposed convolution with stride 2 does not have: on Selfie's 8, 4 and 2 pixel wide maps 39% of all 3x3 taps.

use super::micro::{MAX_ROWS, Pair, Tap};
use crate::ConvDims;
use crate::partials::SUM_ROWS;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// From target pixels to source pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Reach {
    /// Target row i reads source row i: linear layers and 1x1 convolutions with stride 1.
    Row,
    /// A convolution: targets are its output pixels, sources its input pixels.
    Forward(ConvDims),
    /// Its transpose: targets are its input pixels, sources its output pixels.
    Transposed(ConvDims),
}

impl Reach {
    pub(crate) fn forward(dims: &ConvDims) -> Reach {
        if is_row(dims) { Reach::Row } else { Reach::Forward(ConvDims { n: 1, ..*dims }) }
    }

    pub(crate) fn transposed(dims: &ConvDims) -> Reach {
        if is_row(dims) { Reach::Row } else { Reach::Transposed(ConvDims { n: 1, ..*dims }) }
    }

    pub(crate) fn taps(&self) -> usize {
        match self {
            Reach::Row => 1,
            Reach::Forward(d) | Reach::Transposed(d) => d.r * d.s,
        }
    }

    /// Height and width of the target's map; a row is a map of one pixel.
    fn target(&self) -> (usize, usize) {
        match self {
            Reach::Row => (1, 1),
            Reach::Forward(d) => (d.p(), d.q()),
            Reach::Transposed(d) => (d.h, d.w),
        }
    }

    fn source(&self) -> (usize, usize) {
        match self {
            Reach::Row => (1, 1),
            Reach::Forward(d) => (d.h, d.w),
            Reach::Transposed(d) => (d.p(), d.q()),
        }
    }

    /// The source pixel that tap (r, s) of target pixel (y, x) reads, if it lies inside the map.
    fn source_of(&self, y: usize, x: usize, tap: usize) -> Option<(usize, usize)> {
        let along = |target: usize, tap: usize, extent: usize| match self {
            Reach::Row => Some(target),
            Reach::Forward(d) => (target * d.stride + tap).checked_sub(d.pad).filter(|&i| i < extent),
            Reach::Transposed(d) => {
                let i = (target + d.pad).checked_sub(tap)?;
                (i % d.stride == 0).then_some(i / d.stride).filter(|&i| i < extent)
            }
        };
        let width = match self {
            Reach::Row => 1,
            Reach::Forward(d) | Reach::Transposed(d) => d.s,
        };
        let (h, w) = self.source();
        Some((along(y, tap / width, h)?, along(x, tap % width, w)?))
    }
}

fn is_row(d: &ConvDims) -> bool {
    d.r == 1 && d.s == 1 && d.stride == 1 && d.pad == 0
}

/// Sizes of the operands' tiles that offsets are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Strides {
    /// Elements of a row of the source tile.
    pub(crate) source: usize,
    /// Elements of a row of the target tile of an outer product; 0 where there is none.
    pub(crate) target: usize,
    /// Rows of a micro tile.
    pub(crate) rows: usize,
}

/// How to compute one tile of [`SUM_ROWS`] target rows.
#[derive(Debug)]
pub(crate) struct TilePlan {
    /// Source rows to load, relative to the first source row of the tile's first image; they follow row 0 of the source
    /// tile, which is zero.
    pub(crate) sources: Vec<Range<usize>>,
    /// Target row of each row of the micro tiles.
    pub(crate) order: Vec<u32>,
    /// Live taps of all micro tiles.
    taps: Vec<Tap>,
    /// Where each micro tile's taps lie.
    micro: Vec<Range<usize>>,
    /// For each tap the (target, source) rows that it joins.
    pub(crate) pairs: Vec<Vec<Pair>>,
}

impl TilePlan {
    /// The micro tiles: their target rows and live taps.
    pub(crate) fn micro_tiles(&self, rows: usize) -> impl Iterator<Item = (&[u32], &[Tap])> {
        self.order.chunks(rows).zip(&self.micro).map(|(order, taps)| (order, &self.taps[taps.clone()]))
    }

    fn new(reach: &Reach, strides: &Strides, first: usize, rows: usize) -> TilePlan {
        let (height, width) = reach.target();
        let (source_height, source_width) = reach.source();
        let pixel = |row: usize| {
            let at = first + row;
            (at / (height * width), at / width % height, at % width)
        };
        let taps = reach.taps();
        // Source pixels of every row and tap, then their places in the tile.
        let reads: Vec<Option<usize>> = (0..rows)
            .flat_map(|row| {
                let (image, y, x) = pixel(row);
                (0..taps).map(move |tap| {
                    let (sy, sx) = reach.source_of(y, x, tap)?;
                    Some((image * source_height + sy) * source_width + sx)
                })
            })
            .collect();
        let mut wanted: Vec<usize> = reads.iter().flatten().copied().collect();
        wanted.sort_unstable();
        wanted.dedup();
        let mut sources: Vec<Range<usize>> = Vec::new();
        for &source in &wanted {
            match sources.last_mut() {
                Some(range) if range.end == source => range.end += 1,
                _ => sources.push(source..source + 1),
            }
        }
        let place = |source: usize| 1 + wanted.binary_search(&source).expect("every read source is wanted");
        let offsets: Vec<Option<u32>> =
            reads.iter().map(|read| read.map(|source| (place(source) * strides.source) as u32)).collect();

        let live = |row: u32| {
            offsets[row as usize * taps..][..taps]
                .iter()
                .enumerate()
                .fold(0u64, |mask, (tap, offset)| mask | u64::from(offset.is_some()) << tap)
        };
        let mut order: Vec<u32> = (0..rows as u32).collect();
        order.sort_by_key(|&row| (live(row), row));

        let mut plan = TilePlan { sources, order, taps: Vec::new(), micro: Vec::new(), pairs: Vec::new() };
        for micro in plan.order.chunks(strides.rows) {
            let begin = plan.taps.len();
            for tap in 0..taps {
                let mut reached = Tap { slice: tap as u32, rows: [0; MAX_ROWS] };
                let mut any = false;
                for (slot, &row) in micro.iter().enumerate() {
                    if let Some(offset) = offsets[row as usize * taps + tap] {
                        reached.rows[slot] = offset;
                        any = true;
                    }
                }
                if any {
                    plan.taps.push(reached);
                }
            }
            plan.micro.push(begin..plan.taps.len());
        }
        plan.pairs = (0..taps)
            .map(|tap| {
                (0..rows)
                    .filter_map(|row| {
                        let right = offsets[row * taps + tap]?;
                        Some(Pair { left: (row * strides.target) as u32, right })
                    })
                    .collect()
            })
            .collect();
        plan
    }
}

/// The plans of all tiles of one shape: tiles that begin at the same pixel of an image share theirs.
#[derive(Debug)]
pub(crate) struct Plans {
    reach: Reach,
    strides: Strides,
    by_first_pixel: Mutex<HashMap<(usize, usize), Arc<TilePlan>>>,
}

impl Plans {
    /// The plan of tile `tile` of `rows` target rows in all, and the source row that its ranges are relative to.
    pub(crate) fn tile(&self, tile: usize, rows: usize) -> (Arc<TilePlan>, usize) {
        let (height, width) = self.reach.target();
        let (source_height, source_width) = self.reach.source();
        let first = tile * SUM_ROWS;
        let (image, pixel) = (first / (height * width), first % (height * width));
        let key = (pixel, (rows - first).min(SUM_ROWS));
        let mut plans = self.by_first_pixel.lock().unwrap_or_else(PoisonError::into_inner);
        let plan =
            plans.entry(key).or_insert_with(|| Arc::new(TilePlan::new(&self.reach, &self.strides, key.0, key.1)));
        (plan.clone(), image * source_height * source_width)
    }
}

/// Plans of every shape seen so far.
#[derive(Debug, Default)]
pub(crate) struct PlanCache(Mutex<HashMap<(Reach, Strides), Arc<Plans>>>);

impl PlanCache {
    pub(crate) fn get(&self, reach: Reach, strides: Strides) -> Arc<Plans> {
        let mut plans = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        plans
            .entry((reach, strides))
            .or_insert_with(|| Arc::new(Plans { reach, strides, by_first_pixel: Mutex::default() }))
            .clone()
    }
}

//! Matrix products over tiles: load (and transform) a tile's source rows once, run the inner loops over it while it is
//! in cache, and hand the sums to an epilogue that stores them.

use super::Cpu;
use super::lanes::{Place, blocks};
use super::micro::{Pair, Tap};
use super::plan::{Reach, Strides, TilePlan};
use super::scratch::Scratch;
use super::simd::vectorize;
use crate::partials::SUM_ROWS;
use crate::{Element, Wide};
use rayon::prelude::*;
use std::ops::Range;

/// Elements of a tile's row that holds `len`: whole vectors, and one line more, so that rows a power of two long do not
/// all fall into the same set of the cache.
pub(crate) fn row_stride(len: usize) -> usize {
    len.next_multiple_of(16) + 16
}

/// The right operand of a product, packed: panels of one or two vectors of columns, each with all `depth` rows.
pub(crate) struct Panels<'a, W: Wide> {
    pub(crate) columns: usize,
    depth: usize,
    data: Scratch<'a, W>,
}

impl<'a, W: Wide> Panels<'a, W> {
    /// Packs a matrix, panel by panel: `fill(first, filled, width, panel)` writes columns `first..first + filled` into
    /// `panel`, `[depth, width]`; the columns behind them, if any, are zero.
    pub(crate) fn pack(
        cpu: &'a Cpu,
        depth: usize,
        columns: usize,
        fill: impl Fn(usize, usize, usize, &mut [W]) + Sync,
    ) -> Self {
        let lanes = W::shape().lanes;
        let mut data = cpu.scratch.take(depth * columns.next_multiple_of(lanes));
        data.par_chunks_mut(depth * 2 * lanes).with_max_len(1).enumerate().for_each(|(i, panel)| {
            let (first, width) = (i * 2 * lanes, panel.len() / depth);
            let filled = width.min(columns - first);
            vectorize(
                #[inline(always)]
                || {
                    if filled < width {
                        panel.fill(W::zero());
                    }
                    fill(first, filled, width, panel);
                },
            );
        });
        Self { columns, depth, data }
    }

    /// From a matrix `[columns, depth]`, as a linear layer's or a filter's for the forward pass.
    pub(crate) fn from_columns<T: Element<Wide = W>>(cpu: &'a Cpu, depth: usize, columns: usize, w: &[T]) -> Self {
        /// Rows at a time, a cache line: columns lie kilobytes apart, often in the same set of the cache, and may else be
        /// fetched again for each row (from 1.6% to 1.0% of the profile of finetuning at 224px).
        const ROWS: usize = 16;
        Self::pack(
            cpu,
            depth,
            columns,
            #[inline(always)]
            |first, filled, width, panel| {
                for (block, rows) in panel.chunks_mut(ROWS * width).enumerate() {
                    for j in 0..filled {
                        let column = &w[(first + j) * depth + block * ROWS..][..rows.len() / width];
                        for (row, &from) in rows.chunks_exact_mut(width).zip(column) {
                            row[j] = from.widen();
                        }
                    }
                }
            },
        )
    }

    /// From a filter `[k, taps, c]` for the transposed convolution: depth (tap, k), columns c.
    pub(crate) fn from_filter<T: Element<Wide = W>>(cpu: &'a Cpu, k: usize, taps: usize, c: usize, w: &[T]) -> Self {
        Self::pack(
            cpu,
            taps * k,
            c,
            #[inline(always)]
            |first, filled, width, panel| {
                for (row, to) in panel.chunks_exact_mut(width).enumerate() {
                    let from = &w[(row % k * taps + row / k) * c + first..][..filled];
                    blocks!(filled, |at| {
                        at.store(&mut to[..filled], &at.load(from));
                    });
                }
            },
        )
    }

    /// The panels: first column, width, elements.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, usize, &[W])> {
        let lanes = W::shape().lanes;
        self.data
            .chunks(self.depth * 2 * lanes)
            .enumerate()
            .map(move |(i, panel)| (i * 2 * lanes, panel.len() / self.depth, panel))
    }
}

/// Loads rows of an operand into a tile, transformed and widened.
pub(crate) trait Load<W>: Sync {
    /// Elements of a row.
    fn len(&self) -> usize;
    /// Loads row `row` of the operand, elements `column..column + to.len()`.
    fn row(&self, row: usize, column: usize, to: &mut [W]);
}

/// Sums of a few rows, a run of columns of each.
#[derive(Clone, Copy)]
pub(crate) struct Sums<'a, W> {
    data: &'a [W],
    stride: usize,
    /// Columns.
    pub(crate) len: usize,
}

impl<'a, W> Sums<'a, W> {
    /// Row by row.
    #[inline(always)]
    pub(crate) fn rows(self) -> impl Iterator<Item = &'a [W]> {
        self.data.chunks(self.stride).map(move |row| &row[..self.len])
    }
}

/// Takes the sums of a tile, a micro tile at a time.
pub(crate) trait Epilogue<W>: Send {
    /// The sums of elements `column..column + sums.len` of target rows `rows` of the tile.
    fn rows(&mut self, rows: &[u32], column: usize, sums: Sums<'_, W>);
    /// Asks for the memory that [`Epilogue::rows`] will touch; called a while ahead.
    fn prefetch(&self, row: usize, column: usize, len: usize);
    /// All rows have been given.
    fn finish(self);
}

/// `target[i] = sum over taps of source[reach(i, tap)] * panels[tap]` for `rows` target rows; `epilogues` yields one
/// epilogue for each tile of [`SUM_ROWS`] rows.
pub(crate) fn multiply<W: Wide, E: Epilogue<W>>(
    cpu: &Cpu,
    reach: Reach,
    rows: usize,
    source: &impl Load<W>,
    panels: &Panels<'_, W>,
    epilogues: impl IndexedParallelIterator<Item = E>,
) {
    let stride = row_stride(source.len());
    let plans = cpu.plans.get(reach, Strides { source: stride, target: 0, rows: W::shape().rows });
    let tiles = rows.div_ceil(SUM_ROWS);
    // Single tiles as tasks, here and below: of longer runs, the last ones leave threads idle (4% of finetuning at 224px on
    // two threads).
    if tiles >= FEW_TILES || panels.columns <= 4 * W::shape().lanes {
        epilogues.with_max_len(1).enumerate().for_each(|(tile, mut epilogue)| {
            let (plan, first) = plans.tile(tile, rows);
            let source_tile = load_rows(cpu, source, first, &plan.sources, 0..source.len());
            multiply_tile(&plan, &source_tile, source.len(), panels, 0..panels.columns, &mut epilogue);
            vectorize(
                #[inline(always)]
                || epilogue.finish(),
            );
        });
        return;
    }
    // Too few tiles to occupy the threads: columns are shared out too, and the epilogues run afterwards.
    let lens: Vec<usize> = (0..tiles).map(|tile| SUM_ROWS.min(rows - tile * SUM_ROWS)).collect();
    let mut kept = KeptSums::new(cpu, rows, panels.columns, tiles);
    kept.tasks(&lens).into_par_iter().with_max_len(1).for_each(|KeptTask { task: tile, columns, stride, sums }| {
        let (plan, first) = plans.tile(tile, rows);
        let source_tile = load_rows(cpu, source, first, &plan.sources, 0..source.len());
        multiply_tile(&plan, &source_tile, source.len(), panels, columns.clone(), &mut Keep { sums, stride, columns });
    });
    kept.finish(epilogues);
}

/// Below this many tasks, columns are shared out too.
const FEW_TILES: usize = 16;

/// The sums of all rows, kept for epilogues that run afterwards: groups of columns, in each of which lie all rows.
pub(crate) struct KeptSums<'a, W: Wide> {
    rows: usize,
    columns: usize,
    /// Columns of a group.
    group: usize,
    data: Scratch<'a, W>,
}

/// What a task computes: some rows of a group of columns.
pub(crate) struct KeptTask<'s, W> {
    /// Which rows: number of the task's length.
    pub(crate) task: usize,
    /// Which columns.
    pub(crate) columns: Range<usize>,
    /// Elements of a row of `sums`.
    pub(crate) stride: usize,
    /// The rows, of which the first elements are these columns.
    pub(crate) sums: &'s mut [W],
}

impl<'a, W: Wide> KeptSums<'a, W> {
    /// Of a product whose rows are cut into `tasks`. Not more groups than it takes, as each loads the rows again.
    pub(crate) fn new(cpu: &'a Cpu, rows: usize, columns: usize, tasks: usize) -> Self {
        let wanted = if tasks < FEW_TILES { (2 * FEW_TILES).div_ceil(tasks) } else { 1 };
        let group = columns.div_ceil(wanted).next_multiple_of(2 * W::shape().lanes);
        Self { rows, columns, group, data: cpu.scratch.take(columns.div_ceil(group) * rows * group) }
    }

    /// The tasks, whose numbers of rows are `lens`.
    pub(crate) fn tasks(&mut self, lens: &[usize]) -> Vec<KeptTask<'_, W>> {
        let (stride, end) = (self.group, self.columns);
        let mut tasks = Vec::new();
        for (group, mut rest) in self.data.chunks_exact_mut(self.rows * stride).enumerate() {
            let columns = group * stride..((group + 1) * stride).min(end);
            for (task, len) in lens.iter().enumerate() {
                let sums = rest.split_off_mut(..len * stride).expect("the lengths are those of all rows");
                tasks.push(KeptTask { task, columns: columns.clone(), stride, sums });
            }
        }
        tasks
    }

    /// Hands the sums to the epilogues, one for each tile.
    pub(crate) fn finish<E: Epilogue<W>>(self, epilogues: impl IndexedParallelIterator<Item = E>) {
        /// Rows at a time, few enough to stay in the first-level cache.
        const ROWS: usize = 8;
        let Self { rows, columns, group: stride, ref data } = self;
        epilogues.with_max_len(1).enumerate().for_each(|(tile, mut epilogue)| {
            let all: [u32; SUM_ROWS] = std::array::from_fn(|row| row as u32);
            let all = &all[..SUM_ROWS.min(rows - tile * SUM_ROWS)];
            vectorize(
                #[inline(always)]
                || {
                    for few in all.chunks(ROWS) {
                        let first = tile * SUM_ROWS + few[0] as usize;
                        for (group, data) in data.chunks_exact(rows * stride).enumerate() {
                            let data = &data[first * stride..][..few.len() * stride];
                            let len = stride.min(columns - group * stride);
                            epilogue.rows(few, group * stride, Sums { data, stride, len });
                        }
                    }
                    epilogue.finish();
                },
            );
        });
    }
}

/// Keeps a group of columns of a tile.
struct Keep<'a, W> {
    sums: &'a mut [W],
    stride: usize,
    columns: Range<usize>,
}

impl<W: Wide> Epilogue<W> for Keep<'_, W> {
    #[inline(always)]
    fn rows(&mut self, rows: &[u32], column: usize, sums: Sums<'_, W>) {
        for (&row, sums) in rows.iter().zip(sums.rows()) {
            let to = &mut self.sums[row as usize * self.stride + column - self.columns.start..][..sums.len()];
            blocks!(sums.len(), |at| {
                at.set_chunk(to, &at.chunk(sums));
            });
        }
    }
    #[inline(always)]
    fn prefetch(&self, _row: usize, _column: usize, _len: usize) {}
    fn finish(self) {}
}

/// Rows of an operand behind a row of zeros, `columns` of each, [`row_stride`] apart: rows `ranges`, counted from `first`.
pub(crate) fn load_rows<'a, W: Wide>(
    cpu: &'a Cpu,
    load: &impl Load<W>,
    first: usize,
    ranges: &[Range<usize>],
    columns: Range<usize>,
) -> Scratch<'a, W> {
    let stride = row_stride(columns.len());
    let rows: usize = ranges.iter().map(ExactSizeIterator::len).sum();
    let mut tile = cpu.scratch.take::<W>((1 + rows) * stride);
    vectorize(
        #[inline(always)]
        || {
            tile[..stride].fill(W::zero());
            let mut rows = tile[stride..].chunks_exact_mut(stride);
            for range in ranges {
                for (row, to) in range.clone().zip(&mut rows) {
                    load.row(first + row, columns.start, &mut to[..columns.len()]);
                }
            }
        },
    );
    tile
}

/// Panels up to this many bytes stay in the second-level cache beside a tile.
const RESIDENT_PANELS_BYTES: usize = 256 << 10;

fn multiply_tile<W: Wide>(
    plan: &TilePlan,
    source: &[W],
    depth: usize,
    panels: &Panels<'_, W>,
    columns: Range<usize>,
    epilogue: &mut impl Epilogue<W>,
) {
    let shape = W::shape();
    let mut sums = [W::zero(); 8 * 32];
    let mut multiply = |(order, taps): (&[u32], &[Tap]), (first, width, panel): (usize, usize, &[W]), ahead: &[u32]| {
        let filled = width.min(panels.columns - first);
        for &row in ahead {
            epilogue.prefetch(row as usize, first, filled);
        }
        debug_assert!(taps.iter().all(|tap| (tap.slice as usize + 1) * depth * width <= panel.len()));
        debug_assert!(taps.iter().all(|tap| tap.rows.iter().all(|&row| row as usize + depth <= source.len())));
        // SAFETY: `TilePlan` names only rows of the source tile, each at least `depth` long, and taps below
        // `reach.taps()`, for each of which the panel has `depth * width` elements; `sums` holds
        // `rows * width <= 8 * 32` elements.
        unsafe {
            W::rows(width / shape.lanes, taps, depth, source.as_ptr(), panel.as_ptr(), sums.as_mut_ptr());
        }
        vectorize(
            #[inline(always)]
            || {
                let data = &sums[..order.len() * width];
                epilogue.rows(order, first, Sums { data, stride: width, len: filled });
            },
        );
    };
    let panels = || panels.iter().filter(|(first, ..)| columns.contains(first));
    let bytes: usize = panels().map(|(.., panel)| size_of_val(panel)).sum();
    if bytes <= RESIDENT_PANELS_BYTES {
        // Whole rows at a time: the epilogue walks through memory in order.
        let ahead = plan.order.chunks(shape.rows).skip(1).chain([&[][..]]);
        for (micro, ahead) in plan.micro_tiles(shape.rows).zip(ahead) {
            panels().for_each(|panel| multiply(micro, panel, ahead));
        }
    } else {
        for panel in panels() {
            plan.micro_tiles(shape.rows).for_each(|micro| multiply(micro, panel, micro.0));
        }
    }
}

/// How a filter's gradient is cut into tasks, by shape alone: parts of the rows, each with sums of its own, by groups of
/// filters, by groups of source channels.
pub(crate) struct OuterTasks {
    /// Taps, or slices: matrices of sums.
    taps: usize,
    /// Filters and channels, all of them.
    all: [usize; 2],
    /// Those of a group.
    pub(crate) group: [usize; 2],
    units: usize,
    units_per_part: usize,
    /// Parts, whose sums are to be added.
    pub(crate) parts: usize,
}

impl OuterTasks {
    const TASKS: usize = 16;

    /// With groups of a given size: as few parts of the `units` of rows as make for enough tasks.
    pub(crate) fn new(taps: usize, units: usize, all: [usize; 2], group: [usize; 2]) -> Self {
        let groups = all[0].div_ceil(group[0]) * all[1].div_ceil(group[1]);
        let units_per_part = units.div_ceil(Self::TASKS.div_ceil(groups).min(units));
        Self { taps, all, group, units, units_per_part, parts: units.div_ceil(units_per_part) }
    }

    /// Not too many parts, as their sums are added; groups of filters or of channels, whichever are more.
    fn of_tiles(taps: usize, tiles: usize, [k, c]: [usize; 2]) -> Self {
        let tiles_per_part = tiles.div_ceil((tiles / 8).clamp(1, Self::TASKS));
        let parts = tiles.div_ceil(tiles_per_part);
        let groups = Self::TASKS.div_ceil(parts);
        let group = |len: usize| len.div_ceil(groups).next_multiple_of(32);
        let group = if c > k { [k, group(c)] } else { [group(k), c] };
        Self { taps, all: [k, c], group, units: tiles, units_per_part: tiles_per_part, parts }
    }

    fn groups(&self) -> [usize; 2] {
        [0, 1].map(|i| self.all[i].div_ceil(self.group[i]))
    }

    /// Filters and channels of a group as its sums hold them: whole micro tiles, whole vectors.
    fn padded<W: Wide>(&self) -> [usize; 2] {
        [self.group[0].next_multiple_of(W::shape().outer), self.group[1].next_multiple_of(W::shape().lanes)]
    }

    fn task_len<W: Wide>(&self) -> usize {
        self.taps * self.padded::<W>().iter().product::<usize>()
    }

    /// Runs the tasks: `work(units, filters, channels, sums)` adds to `sums`, `[taps, filters, channels]`, padded.
    pub(crate) fn run<'a, W: Wide>(
        &self,
        cpu: &'a Cpu,
        work: impl Fn(Range<usize>, Range<usize>, Range<usize>, &mut [W]) + Sync,
    ) -> Scratch<'a, W> {
        let [filter_groups, channel_groups] = self.groups();
        let task_len = self.task_len::<W>();
        let mut sums = cpu.scratch.take::<W>(self.parts * filter_groups * channel_groups * task_len);
        sums.par_chunks_mut(task_len).with_max_len(1).enumerate().for_each(|(task, sums)| {
            let range = |i: usize, len: usize, end: usize| i * len..((i + 1) * len).min(end);
            let (part, group) = (task / (filter_groups * channel_groups), task % (filter_groups * channel_groups));
            let filters = range(group / channel_groups, self.group[0], self.all[0]);
            let channels = range(group % channel_groups, self.group[1], self.all[1]);
            sums.fill(W::zero());
            work(range(part, self.units_per_part, self.units), filters, channels, sums);
        });
        sums
    }

    /// The groups of channels.
    pub(crate) fn channel_groups(&self) -> impl Iterator<Item = Range<usize>> {
        let [_, end] = self.all;
        (0..end).step_by(self.group[1]).map(move |first| first..(first + self.group[1]).min(end))
    }

    /// A part's sums of a filter and a tap, for a group of channels.
    #[inline(always)]
    pub(crate) fn row<'s, W: Wide>(
        &self,
        sums: &'s [W],
        part: usize,
        tap: usize,
        filter: usize,
        channels: &Range<usize>,
    ) -> &'s [W] {
        let ([filter_groups, channel_groups], [filters_padded, channels_padded]) = (self.groups(), self.padded::<W>());
        let (filter_group, filter) = (filter / self.group[0], filter % self.group[0]);
        let task = (part * filter_groups + filter_group) * channel_groups + channels.start / self.group[1];
        let place = task * self.task_len::<W>() + (tap * filters_padded + filter) * channels_padded;
        &sums[place..][..channels.len()]
    }
}

/// The gradient of a filter: `dw[k][tap][c] = sum over target rows of target[row][k] * source[reach(row, tap)][c]`.
pub(crate) fn outer_products<W: Wide>(
    cpu: &Cpu,
    reach: Reach,
    rows: usize,
    target: &impl Load<W>,
    source: &impl Load<W>,
    dw: &mut [W],
) {
    let (c, taps) = (source.len(), reach.taps());
    let tiles = rows.div_ceil(SUM_ROWS);
    let tasks = OuterTasks::of_tiles(taps, tiles, [target.len(), c]);
    let [filters_stride, channels_stride] = tasks.group.map(row_stride);
    let strides = Strides { source: channels_stride, target: filters_stride, rows: W::shape().rows };
    let plans = cpu.plans.get(reach, strides);
    let sums = tasks.run(cpu, |part, filters, channels, sums| {
        // A short last group keeps the strides that its plan was made for.
        let filters = filters.start..filters.start + tasks.group[0];
        let channels = channels.start..channels.start + tasks.group[1];
        let (target, source) = (Clipped::new(target), Clipped::new(source));
        for tile in part {
            let (plan, first) = plans.tile(tile, rows);
            let targets = tile * SUM_ROWS..rows.min((tile + 1) * SUM_ROWS);
            let targets = load_rows(cpu, &target, 0, &[targets], filters.clone());
            let sources = load_rows(cpu, &source, first, &plan.sources, channels.clone());
            outer_tile(&plan.pairs, &targets[filters_stride..], &sources, tasks.group, sums);
        }
    });
    dw.par_chunks_mut(taps * c).enumerate().for_each(|(filter, dw)| {
        vectorize(
            #[inline(always)]
            || {
                for (tap, dw) in dw.chunks_exact_mut(c).enumerate() {
                    for channels in tasks.channel_groups() {
                        let dw = &mut dw[channels.clone()];
                        dw.copy_from_slice(tasks.row(&sums, 0, tap, filter, &channels));
                        for part in 1..tasks.parts {
                            for (dw, sum) in dw.iter_mut().zip(tasks.row(&sums, part, tap, filter, &channels)) {
                                *dw += *sum;
                            }
                        }
                    }
                }
            },
        );
    });
}

/// Rows of an operand, continued with zeros behind their end.
struct Clipped<'a, L> {
    load: &'a L,
    len: usize,
}

impl<'a, L> Clipped<'a, L> {
    fn new<W>(load: &'a L) -> Self
    where
        L: Load<W>,
    {
        Self { load, len: load.len() }
    }
}

impl<W: Wide, L: Load<W>> Load<W> for Clipped<'_, L> {
    fn len(&self) -> usize {
        self.len
    }

    #[inline(always)]
    fn row(&self, row: usize, column: usize, to: &mut [W]) {
        let (inside, beyond) = to.split_at_mut(to.len().min(self.len - column));
        self.load.row(row, column, inside);
        beyond.fill(W::zero());
    }
}

/// Adds outer products of pairs of rows to `sums`, `[taps, filters, channels]`, padded to whole micro tiles and vectors.
pub(crate) fn outer_tile<W: Wide>(
    pairs: &[Vec<Pair>],
    targets: &[W],
    sources: &[W],
    [filters, channels]: [usize; 2],
    sums: &mut [W],
) {
    let shape = W::shape();
    let (filters, channels) = (filters.next_multiple_of(shape.outer), channels.next_multiple_of(shape.lanes));
    for (pairs, sums) in pairs.iter().zip(sums.chunks_exact_mut(filters * channels)) {
        debug_assert!(pairs.iter().all(|pair| pair.left as usize + filters <= targets.len()));
        debug_assert!(pairs.iter().all(|pair| pair.right as usize + channels <= sources.len()));
        for column in (0..channels).step_by(2 * shape.lanes) {
            let vectors = (channels - column).min(2 * shape.lanes) / shape.lanes;
            for filter in (0..filters).step_by(shape.outer) {
                // SAFETY: pairs name rows of the two tiles that are long enough for whole micro tiles of filters and whole
                // vectors of channels, as [`row_stride`] leaves room for both; so is `sums`.
                unsafe {
                    W::outer(
                        vectors,
                        pairs,
                        targets.as_ptr().add(filter),
                        sources.as_ptr().add(column),
                        sums.as_mut_ptr().add(filter * channels + column),
                        channels,
                    );
                }
            }
        }
    }
}

//! Matrix products over tiles: load (and transform) a tile's source rows once, run the inner loops over it while it is
//! in cache, and hand the sums to an epilogue that stores them.

use super::Cpu;
use super::lanes::{Place, blocks};
use super::micro::Tap;
use super::plan::{Reach, Strides, TilePlan};
use super::scratch::Scratch;
use super::simd::vectorize;
use crate::norm_relu_conv::SUM_ROWS;
use crate::{Element, Wide};
use rayon::prelude::*;
use std::ops::Range;

/// Elements of a tile's row that holds `len`: whole vectors, and one line more, so that rows a power of two long do not
/// all fall into the same set of the cache.
fn row_stride(len: usize) -> usize {
    len.next_multiple_of(16) + 16
}

/// The right operand of a product, packed: panels of one or two vectors of columns, each with all `depth` rows.
pub(crate) struct Panels<'a, W: Wide> {
    columns: usize,
    depth: usize,
    data: Scratch<'a, W>,
}

impl<'a, W: Wide> Panels<'a, W> {
    /// Packs a matrix, panel by panel: `fill(first, filled, width, panel)` writes columns `first..first + filled` into
    /// `panel`, `[depth, width]`; the columns behind them, if any, are zero.
    fn pack(cpu: &'a Cpu, depth: usize, columns: usize, fill: impl Fn(usize, usize, usize, &mut [W]) + Sync) -> Self {
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
    fn iter(&self) -> impl Iterator<Item = (usize, usize, &[W])> {
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
            let source_tile = load_tile(cpu, &plan, first, source, 0..source.len());
            multiply_tile(&plan, &source_tile, source.len(), panels, 0..panels.columns, &mut epilogue);
            vectorize(
                #[inline(always)]
                || epilogue.finish(),
            );
        });
        return;
    }
    // Too few tiles to occupy the threads: tasks are tiles by groups of columns, and the epilogues run afterwards.
    // Not more groups than it takes, as each loads the tile again.
    let wanted = (2 * FEW_TILES).div_ceil(tiles);
    let group = panels.columns.div_ceil(wanted).next_multiple_of(2 * W::shape().lanes);
    let groups = panels.columns.div_ceil(group);
    let mut sums = cpu.scratch.take::<W>(tiles * groups * SUM_ROWS * group);
    sums.par_chunks_mut(SUM_ROWS * group).with_max_len(1).enumerate().for_each(|(task, sums)| {
        let (tile, first_column) = (task / groups, task % groups * group);
        let (plan, first) = plans.tile(tile, rows);
        let source_tile = load_tile(cpu, &plan, first, source, 0..source.len());
        let columns = first_column..(first_column + group).min(panels.columns);
        multiply_tile(&plan, &source_tile, source.len(), panels, columns, &mut Keep { sums, group, first_column });
    });
    epilogues.with_max_len(1).enumerate().for_each(|(tile, mut epilogue)| {
        let count = (rows - tile * SUM_ROWS).min(SUM_ROWS);
        vectorize(
            #[inline(always)]
            || {
                let rows: [u32; SUM_ROWS] = std::array::from_fn(|row| row as u32);
                let rows = &rows[..count];
                for (i, column) in (0..panels.columns).step_by(group).enumerate() {
                    let data = &sums[(tile * groups + i) * SUM_ROWS * group..][..count * group];
                    let len = group.min(panels.columns - column);
                    epilogue.rows(rows, column, Sums { data, stride: group, len });
                }
                epilogue.finish();
            },
        );
    });
}

/// Below this many tiles, columns are shared out too.
const FEW_TILES: usize = 16;

/// Keeps a group of columns of a tile for an epilogue that runs later.
struct Keep<'a, W> {
    sums: &'a mut [W],
    group: usize,
    first_column: usize,
}

impl<W: Wide> Epilogue<W> for Keep<'_, W> {
    #[inline(always)]
    fn rows(&mut self, rows: &[u32], column: usize, sums: Sums<'_, W>) {
        for (&row, sums) in rows.iter().zip(sums.rows()) {
            let to = &mut self.sums[row as usize * self.group + column - self.first_column..][..sums.len()];
            blocks!(sums.len(), |at| {
                at.set_chunk(to, &at.chunk(sums));
            });
        }
    }
    #[inline(always)]
    fn prefetch(&self, _row: usize, _column: usize, _len: usize) {}
    fn finish(self) {}
}

/// A tile's source rows behind a row of zeros, `columns` of each, [`row_stride`] apart.
fn load_tile<'a, W: Wide>(
    cpu: &'a Cpu,
    plan: &TilePlan,
    first: usize,
    source: &impl Load<W>,
    columns: Range<usize>,
) -> Scratch<'a, W> {
    let stride = row_stride(columns.len());
    let mut tile = cpu.scratch.take::<W>(plan.source_rows() * stride);
    vectorize(
        #[inline(always)]
        || {
            tile[..stride].fill(W::zero());
            let mut rows = tile[stride..].chunks_exact_mut(stride);
            for range in &plan.sources {
                for (row, to) in range.clone().zip(&mut rows) {
                    source.row(first + row, columns.start, &mut to[..columns.len()]);
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
/// filters or of source channels, whichever are more.
struct OuterTasks {
    tiles_per_part: usize,
    parts: usize,
    filters_per_group: usize,
    channels_per_group: usize,
    filter_groups: usize,
    channel_groups: usize,
}

impl OuterTasks {
    fn new(tiles: usize, k: usize, c: usize) -> Self {
        const TASKS: usize = 16;
        let tiles_per_part = tiles.div_ceil((tiles / 8).clamp(1, TASKS));
        let parts = tiles.div_ceil(tiles_per_part);
        let groups = TASKS.div_ceil(parts);
        let group = |len: usize| len.div_ceil(groups).next_multiple_of(32);
        let (filters_per_group, channels_per_group) = if c > k { (k, group(c)) } else { (group(k), c) };
        let (filter_groups, channel_groups) = (k.div_ceil(filters_per_group), c.div_ceil(channels_per_group));
        Self { tiles_per_part, parts, filters_per_group, channels_per_group, filter_groups, channel_groups }
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
    let shape = W::shape();
    let (k, c, taps) = (target.len(), source.len(), reach.taps());
    let tiles = rows.div_ceil(SUM_ROWS);
    let tasks = OuterTasks::new(tiles, k, c);
    // Sums of a task: filters (whole micro tiles), taps, channels (whole vectors).
    let filters_padded = tasks.filters_per_group.next_multiple_of(shape.outer);
    let channels_padded = tasks.channels_per_group.next_multiple_of(shape.lanes);
    let target_stride = row_stride(tasks.filters_per_group);
    let source_stride = row_stride(tasks.channels_per_group);
    let plans = cpu.plans.get(reach, Strides { source: source_stride, target: target_stride, rows: shape.rows });

    let task_len = filters_padded * taps * channels_padded;
    let part_len = tasks.filter_groups * tasks.channel_groups * task_len;
    let mut sums = cpu.scratch.take::<W>(tasks.parts * part_len);
    sums.par_chunks_mut(task_len).with_max_len(1).enumerate().for_each(|(task, sums)| {
        let (part, group) =
            (task / (tasks.filter_groups * tasks.channel_groups), task % (tasks.filter_groups * tasks.channel_groups));
        let first_filter = group / tasks.channel_groups * tasks.filters_per_group;
        let first_channel = group % tasks.channel_groups * tasks.channels_per_group;
        let filters = first_filter..(first_filter + tasks.filters_per_group).min(k);
        // A short last group keeps the stride that its plan was made for.
        let channels = first_channel..first_channel + tasks.channels_per_group;
        sums.fill(W::zero());
        let mut targets = cpu.scratch.take::<W>(SUM_ROWS * target_stride);
        targets.fill(W::zero());
        let part_tiles = part * tasks.tiles_per_part..((part + 1) * tasks.tiles_per_part).min(tiles);
        for tile in part_tiles {
            let (plan, first) = plans.tile(tile, rows);
            let source_tile = load_tile(cpu, &plan, first, &Clipped { load: source, end: c }, channels.clone());
            vectorize(
                #[inline(always)]
                || {
                    let count = SUM_ROWS.min(rows - tile * SUM_ROWS);
                    for (row, to) in targets.chunks_exact_mut(target_stride).take(count).enumerate() {
                        target.row(tile * SUM_ROWS + row, filters.start, &mut to[..filters.len()]);
                    }
                },
            );
            outer_tile(&plan, &targets, &source_tile, filters.len(), channels_padded, sums);
        }
    });
    dw.par_chunks_mut(taps * c).enumerate().for_each(|(filter, dw)| {
        let (filter_group, filter) = (filter / tasks.filters_per_group, filter % tasks.filters_per_group);
        vectorize(
            #[inline(always)]
            || {
                for (tap, dw) in dw.chunks_exact_mut(c).enumerate() {
                    for (channel_group, dw) in dw.chunks_mut(tasks.channels_per_group).enumerate() {
                        let task = filter_group * tasks.channel_groups + channel_group;
                        let place = task * task_len + (filter * taps + tap) * channels_padded;
                        dw.copy_from_slice(&sums[place..][..dw.len()]);
                        for part in 1..tasks.parts {
                            for (dw, sum) in dw.iter_mut().zip(&sums[part * part_len + place..]) {
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
    end: usize,
}

impl<W: Wide, L: Load<W>> Load<W> for Clipped<'_, L> {
    fn len(&self) -> usize {
        self.load.len()
    }

    #[inline(always)]
    fn row(&self, row: usize, column: usize, to: &mut [W]) {
        let (inside, beyond) = to.split_at_mut(to.len().min(self.end - column));
        self.load.row(row, column, inside);
        beyond.fill(W::zero());
    }
}

/// Adds a tile's outer products to `sums`, `[filters, taps, channels]`.
fn outer_tile<W: Wide>(plan: &TilePlan, targets: &[W], source: &[W], filters: usize, channels: usize, sums: &mut [W]) {
    let shape = W::shape();
    let taps = plan.pairs.len();
    debug_assert!(filters.next_multiple_of(shape.outer) * taps * channels <= sums.len());
    for (tap, pairs) in plan.pairs.iter().enumerate() {
        debug_assert!(
            pairs.iter().all(|pair| pair.left as usize + filters.next_multiple_of(shape.outer) <= targets.len())
        );
        debug_assert!(pairs.iter().all(|pair| pair.right as usize + channels <= source.len()));
        for column in (0..channels).step_by(2 * shape.lanes) {
            let vectors = (channels - column).min(2 * shape.lanes) / shape.lanes;
            for filter in (0..filters).step_by(shape.outer) {
                let place = (filter * taps + tap) * channels + column;
                // SAFETY: pairs name rows of the two tiles, which are `row_stride` of their group long: enough for
                // whole micro tiles of filters and whole vectors of channels; `sums` holds `taps * channels` elements for
                // each filter of whole micro tiles.
                unsafe {
                    W::outer(
                        vectors,
                        pairs,
                        targets.as_ptr().add(filter),
                        source.as_ptr().add(column),
                        sums.as_mut_ptr().add(place),
                        taps * channels,
                    );
                }
            }
        }
    }
}

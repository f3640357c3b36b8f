//! 3x3 convolutions with stride 1 by minimal filtering, F(2x2, 3x3): 16 products for a square of 2x2 output pixels in place
//! of 36.
//!
//! `y = A^T [(G g G^T) * (B^T d B)] A` with the filter g, the 4x4 input pixels d around a square, and products element by
//! element: summed over channels, that is 16 matrix products, one for each element. The filter's gradient is the
//! transpose, `dg = G^T [(A dy A^T) * (B^T d B)] G`. The matrices hold 0, 1, -1 and 1/2, so little accuracy is lost: the sums
//! are of c terms where the plain way sums 9 c.
//!
//! A value that is not finite spreads over the squares that read it: to at most one pixel more than in the plain way.
//!
//! Source: Winograd 1980, Arithmetic Complexity of Computations; Lavin and Gray 2016 (arXiv 1509.09308).

use super::Cpu;
use super::engine::{Epilogue, KeptSums, KeptTask, Load, OuterTasks, Panels, load_rows, outer_tile, row_stride};
use super::lanes::{Block, LANES, Place, blocks, map};
use super::micro::{Lanes, MAX_ROWS, Pair, Tap};
use super::scratch::Scratch;
use super::simd::vectorize;
use crate::partials::SUM_ROWS;
use crate::{ConvDims, Element, Wide};
use num_traits::Zero;
use rayon::prelude::*;
use std::ops::Range;

/// Elements of a transformed square, and so matrix products.
const SLICES: usize = 16;

/// Squares that are transformed at a time, in whole strips if one is not longer.
const SQUARES: usize = 64;

/// Whether a convolution is done this way: it must save a third of the products that reach inside the map, and have
/// channels enough to make the transforms small beside them.
pub(crate) fn pays(d: &ConvDims) -> bool {
    let products = SLICES * d.h.div_ceil(2) * d.w.div_ceil(2);
    let live_taps = (3 * d.h - 2) * (3 * d.w - 2);
    (d.r, d.s, d.stride, d.pad) == (3, 3, 1, 1) && d.c.min(d.k) >= 32 && 3 * products <= 2 * live_taps
}

/// The maps of a square; each is applied to its columns, then to its rows.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Transform {
    /// `B^T d B`: 4x4 pixels to 16 slices.
    Input,
    /// `A^T m A`: 16 slices to 2x2 pixels.
    Output,
    /// `A dy A^T`: 2x2 pixels to 16 slices.
    OutputGradient,
}

impl Transform {
    /// The pixels that a map reads or writes: their square's side, and how far before the square's own first pixel it begins.
    fn pixels(self) -> (usize, usize) {
        match self {
            Transform::Input => (4, 1),
            Transform::Output | Transform::OutputGradient => (2, 0),
        }
    }
}

/// Where the rows of a square begin, before and after a map, as many as it reads and writes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Square {
    reads: [u32; SLICES],
    /// [`NOWHERE`] for a pixel outside the image.
    writes: [u32; SLICES],
}

const NOWHERE: u32 = u32::MAX;

/// # Safety
/// That of [`super::MicroKernel::squares`], and the instruction set of `V` must be there.
#[inline(always)]
pub(super) unsafe fn squares<V: Lanes>(
    transform: Transform,
    squares: &[Square],
    len: usize,
    from: *const V::S,
    to: *mut V::S,
) {
    // SAFETY: every access is one that the caller vouched for.
    unsafe {
        match transform {
            Transform::Input => each::<V, 4, 4>(squares, len, from, to, input),
            Transform::Output => each::<V, 4, 2>(squares, len, from, to, output),
            Transform::OutputGradient => each::<V, 2, 4>(squares, len, from, to, output_gradient),
        }
    }
}

/// # Safety
/// That of [`squares`].
#[inline(always)]
unsafe fn each<V: Lanes, const N: usize, const M: usize>(
    squares: &[Square],
    len: usize,
    from: *const V::S,
    to: *mut V::S,
    map: impl Fn([V; N]) -> [V; M],
) {
    // SAFETY: every access is one that the caller vouched for.
    unsafe {
        for square in squares {
            for at in (0..len).step_by(V::N) {
                let mut half = [[V::zero(); N]; M];
                for j in 0..N {
                    let mut column = [V::zero(); N];
                    for i in 0..N {
                        column[i] = V::load(from.add(square.reads[i * N + j] as usize + at));
                    }
                    let mapped = map(column);
                    for i in 0..M {
                        half[i][j] = mapped[i];
                    }
                }
                for i in 0..M {
                    let mapped = map(half[i]);
                    for j in 0..M {
                        let place = square.writes[i * M + j];
                        // Only pixels may lie outside.
                        if M == 4 || place != NOWHERE {
                            mapped[j].store(to.add(place as usize + at));
                        }
                    }
                }
            }
        }
    }
}

/// `B^T d`.
#[inline(always)]
fn input<V: Lanes>([a, b, c, d]: [V; 4]) -> [V; 4] {
    // SAFETY: whoever has a `V` has its instruction set, here and below.
    unsafe { [a.sub(c), b.add(c), c.sub(b), b.sub(d)] }
}

/// `A^T m`.
#[inline(always)]
fn output<V: Lanes>([a, b, c, d]: [V; 4]) -> [V; 2] {
    // SAFETY: as above.
    unsafe { [a.add(b.add(c)), b.sub(c).sub(d)] }
}

/// `A dy`.
#[inline(always)]
fn output_gradient<V: Lanes>([a, b]: [V; 2]) -> [V; 4] {
    // SAFETY: as above.
    unsafe { [a, a.add(b), a.sub(b), V::zero().sub(b)] }
}

/// `G g`.
#[inline(always)]
fn filter<W: Wide>([a, b, c]: [Block<W>; 3]) -> [Block<W>; 4] {
    let half = W::from_f64(0.5);
    [a, map!(|j| half * ((a[j] + c[j]) + b[j])), map!(|j| half * ((a[j] + c[j]) - b[j])), c]
}

/// `G^T s`.
#[inline(always)]
fn filter_gradient<W: Wide>([a, b, c, d]: [Block<W>; 4]) -> [Block<W>; 3] {
    let half = W::from_f64(0.5);
    let sum = map!(|j| half * (b[j] + c[j]));
    [map!(|j| a[j] + sum[j]), map!(|j| half * (b[j] - c[j])), map!(|j| sum[j] + d[j])]
}

/// Applies a map to the columns of a square, then to the rows.
macro_rules! both {
    ($square:expr, $map:ident, $n:literal, $m:literal) => {{
        let square = $square;
        let mut half = [[[W::zero(); LANES]; $n]; $m];
        for j in 0..$n {
            let mapped = $map(std::array::from_fn(
                #[inline(always)]
                |i| square[i][j],
            ));
            for i in 0..$m {
                half[i][j] = mapped[i];
            }
        }
        let mut whole = [[[W::zero(); LANES]; $m]; $m];
        for i in 0..$m {
            whole[i] = $map(half[i]);
        }
        whole
    }};
}

/// The taps of a filter, transformed: element i of slice (a, b) belongs to channel `at + i`.
#[inline(always)]
fn transform_filter<'a, W: Wide, T: Element<Wide = W>>(
    at: impl Place,
    tap: impl Fn(usize) -> &'a [T],
) -> [[Block<W>; 4]; 4] {
    let mut taps = [[[W::zero(); LANES]; 3]; 3];
    for i in 0..3 {
        for j in 0..3 {
            taps[i][j] = at.load(tap(3 * i + j));
        }
    }
    both!(taps, filter, 3, 4)
}

/// Filters `[k, 3, 3, c]`, transformed, for the forward pass: panels of output channels, depth (slice, c).
pub(crate) fn forward_panels<'a, T: Element>(cpu: &'a Cpu, d: &ConvDims, w: &[T]) -> Panels<'a, T::Wide> {
    /// Columns at a time: a panel's rows are then written in runs. The slices of a panel lie a power of two apart, where
    /// writing element by element fetches each line again.
    const COLUMNS: usize = 16;
    let c = d.c;
    Panels::pack(
        cpu,
        SLICES * c,
        d.k,
        #[inline(always)]
        |first, filled, width, panel| {
            let mut slices = [[[T::Wide::zero(); LANES]; COLUMNS]; SLICES];
            blocks!(c, |at| {
                for column in (0..filled).step_by(COLUMNS) {
                    let columns = COLUMNS.min(filled - column);
                    for j in 0..columns {
                        let transformed = transform_filter(
                            at,
                            #[inline(always)]
                            |tap| &w[((first + column + j) * 9 + tap) * c..][..c],
                        );
                        for (slice, &elements) in slices.iter_mut().zip(transformed.as_flattened()) {
                            slice[j] = elements;
                        }
                    }
                    for (i, slice) in slices.iter().enumerate() {
                        let rows = panel[(i * c + at.start()) * width..(i + 1) * c * width].chunks_exact_mut(width);
                        for (element, row) in (0..LANES).zip(rows) {
                            let row = &mut row[column..][..columns];
                            for (to, elements) in row.iter_mut().zip(slice) {
                                *to = elements[element];
                            }
                        }
                    }
                }
            });
        },
    )
}

/// The same for the transposed convolution: panels of input channels, depth (slice, k).
pub(crate) fn transposed_panels<'a, T: Element>(cpu: &'a Cpu, d: &ConvDims, w: &[T]) -> Panels<'a, T::Wide> {
    let ConvDims { c, k, .. } = *d;
    Panels::pack(
        cpu,
        SLICES * k,
        c,
        #[inline(always)]
        |first, filled, width, panel| {
            for row in 0..k {
                blocks!(filled, |at| {
                    let slices = transform_filter(
                        at,
                        #[inline(always)]
                        |tap| &w[(row * 9 + 8 - tap) * c + first..][..filled],
                    );
                    for (i, slice) in slices.as_flattened().iter().enumerate() {
                        at.store(&mut panel[(i * k + row) * width..][..filled], slice);
                    }
                });
            }
        },
    )
}

/// The squares of all images, row by row: a strip is a row of them, two pixels high.
#[derive(Clone, Copy)]
struct Squares {
    h: usize,
    w: usize,
    /// Strips of an image.
    strips: usize,
    /// Squares of a strip.
    columns: usize,
}

impl Squares {
    fn new(d: &ConvDims) -> Self {
        Self { h: d.h, w: d.w, strips: d.h.div_ceil(2), columns: d.w.div_ceil(2) }
    }

    /// Strips that make up about [`SQUARES`], such that most of the micro tiles' rows (`rows` each) are used.
    fn strips_at_a_time(&self, rows: usize) -> usize {
        let used = |strips: &usize| 1000 * strips * self.columns / (strips * self.columns).next_multiple_of(rows);
        (1..=SQUARES / self.columns).max_by_key(used).unwrap_or(1)
    }

    /// The squares of strips.
    fn of(&self, strips: &Range<usize>) -> Range<usize> {
        strips.start * self.columns..strips.end * self.columns
    }

    /// The first pixel of a strip.
    fn pixel(&self, strip: usize) -> usize {
        (strip / self.strips * self.h + strip % self.strips * 2) * self.w
    }

    /// The pixels that strips cover.
    fn pixels(&self, strips: &Range<usize>) -> Range<usize> {
        self.pixel(strips.start)..self.pixel(strips.end)
    }

    /// The pixels that strips read: theirs, and the rows above and below inside the image.
    fn reads(&self, strips: &Range<usize>) -> Range<usize> {
        let own = self.pixels(strips);
        let above = if strips.start.is_multiple_of(self.strips) { 0 } else { self.w };
        let below = if strips.end.is_multiple_of(self.strips) { 0 } else { self.w };
        own.start - above..own.end + below
    }

    /// Where the pixels that a map reads or writes for a square begin in rows `stride` apart, of which the first is pixel
    /// `first`; `outside` for those that the image does not have.
    #[inline(always)]
    fn places(&self, square: usize, transform: Transform, first: usize, stride: usize, outside: u32) -> [u32; SLICES] {
        let (side, halo) = transform.pixels();
        let (strip, column) = (square / self.columns, square % self.columns);
        let (image, strip) = (strip / self.strips, strip % self.strips);
        let mut places = [outside; SLICES];
        for i in 0..side {
            for j in 0..side {
                // What lies before the first row or column wraps around and is outside, too.
                let (y, x) = ((2 * strip + i).wrapping_sub(halo), (2 * column + j).wrapping_sub(halo));
                if y < self.h && x < self.w {
                    places[i * side + j] = (((image * self.h + y) * self.w + x - first) * stride) as u32;
                }
            }
        }
        places
    }
}

/// Transformed squares: [`SLICES`] matrices of rows, `stride` apart.
struct Transformed<'a, W: Wide> {
    data: Scratch<'a, W>,
    stride: usize,
    /// Rows of a slice.
    squares: usize,
}

impl<'a, W: Wide> Transformed<'a, W> {
    fn new(cpu: &'a Cpu, squares: usize, len: usize) -> Self {
        let stride = row_stride(len);
        Self { data: cpu.scratch.take(SLICES * squares * stride), stride, squares }
    }

    /// Where a square's row of a slice begins.
    fn place(&self, slice: usize, square: usize) -> u32 {
        ((slice * self.squares + square) * self.stride) as u32
    }

    /// Fills the first rows of each slice with the squares `range`, `len` elements of each, rounded up to whole vectors. `tile`
    /// is one of [`load_rows`], of pixels from `first` on.
    fn fill(
        &mut self,
        transform: Transform,
        squares: &Squares,
        range: Range<usize>,
        tile: &[W],
        first: usize,
        len: usize,
    ) {
        let stride = row_stride(len);
        // Pixels outside the image read the tile's row of zeros, which lies one row before its first pixel.
        let (row, zeros) = (stride as u32, (stride as u32).wrapping_neg());
        let reads = |square| squares.places(square, transform, first, stride, zeros).map(|at| at.wrapping_add(row));
        let writes = |row| std::array::from_fn(|slice| self.place(slice, row));
        let squares: Vec<Square> =
            range.enumerate().map(|(row, square)| Square { reads: reads(square), writes: writes(row) }).collect();
        let len = len.next_multiple_of(W::shape().lanes);
        assert!(squares.len() <= self.squares && len <= self.stride);
        assert!(squares.iter().flat_map(|square| square.reads).all(|place| place as usize + len <= tile.len()));
        // SAFETY: just checked; `place` is within the data by its length.
        unsafe { W::squares(transform, &squares, len, tile.as_ptr(), self.data.as_mut_ptr()) }
    }

    /// The products of a few squares, at most the rows of a micro tile, and a panel `[slice, depth, width]`: to
    /// `[slice, rows of a micro tile, width]`.
    fn multiply(&self, few: Range<usize>, depth: usize, panel: &[W], width: usize, products: &mut [W]) {
        let shape = W::shape();
        assert!(few.len() <= shape.rows && few.end <= self.squares && depth <= self.stride);
        assert!(panel.len() == SLICES * depth * width && products.len() >= SLICES * shape.rows * width);
        for (slice, products) in (0..SLICES).zip(products.chunks_exact_mut(shape.rows * width)) {
            // Rows that the micro tile lacks read the first one.
            let mut tap = Tap { slice: slice as u32, rows: [0; MAX_ROWS] };
            for (row, square) in tap.rows.iter_mut().zip(few.clone()) {
                *row = self.place(slice, square);
            }
            // SAFETY: each row of `data` has `depth` elements, the panel `depth * width` for each slice, `products`
            // `rows * width`.
            unsafe {
                let (a, b) = (self.data.as_ptr(), panel.as_ptr());
                W::rows(width / shape.lanes, &[tap], depth, a, b, products.as_mut_ptr());
            }
        }
    }
}

/// The pixels of a few squares from their products, `[slice, rows of a micro tile, width]`: each to its place in `sums`, whole
/// panels wide.
fn write_pixels<W: Wide>(products: &[W], width: usize, places: &[[u32; SLICES]], sums: &mut [W]) {
    let rows = W::shape().rows;
    let mut squares = [Square::default(); MAX_ROWS];
    for (i, (square, &writes)) in squares.iter_mut().zip(places).enumerate() {
        *square = Square { reads: std::array::from_fn(|slice| ((slice * rows + i) * width) as u32), writes };
    }
    assert!(places.len() <= rows && products.len() >= SLICES * rows * width);
    let fits = |&place: &u32| place == NOWHERE || place as usize + width <= sums.len();
    assert!(places.as_flattened().iter().all(fits));
    // SAFETY: asserted.
    unsafe { W::squares(Transform::Output, &squares[..places.len()], width, products.as_ptr(), sums.as_mut_ptr()) }
}

/// Bytes of transformed squares that stay in the second-level cache beside a panel.
const TRANSFORMED_BYTES: usize = 512 << 10;

/// Bytes of sums that wait for their epilogues, up to the images that fill whole tiles: enough for the tasks of many threads,
/// and no more for a larger batch.
pub(super) const KEPT_BYTES: usize = 32 << 20;

/// Images whose sums are kept at a time: equal shares of the batch that end where a tile ends.
fn images_at_a_time<W>(d: &ConvDims, columns: usize) -> usize {
    let pixels = d.h * d.w;
    let whole_tiles = SUM_ROWS >> pixels.trailing_zeros().min(SUM_ROWS.trailing_zeros());
    let shares = (d.n * pixels * columns * size_of::<W>()).div_ceil(KEPT_BYTES);
    let share = d.n.div_ceil(shares);
    // Whole tiles make a share larger; not so large that it is beyond the limit, if that can be.
    (share / whole_tiles).max(1) * whole_tiles
}

/// The convolution, or with [`transposed_panels`] its transpose, of the maps of `d`; otherwise as [`super::engine::multiply`].
pub(crate) fn multiply<W: Wide, E: Epilogue<W>>(
    cpu: &Cpu,
    d: &ConvDims,
    source: &impl Load<W>,
    panels: &Panels<'_, W>,
    epilogues: impl IndexedParallelIterator<Item = E>,
) {
    let at_a_time = images_at_a_time::<W>(d, panels.columns);
    let mut epilogues: Vec<E> = epilogues.collect();
    for first in (0..d.n).step_by(at_a_time) {
        let images = first..(first + at_a_time).min(d.n);
        let tiles = (images.len() * d.h * d.w).div_ceil(SUM_ROWS);
        let later = epilogues.split_off(tiles);
        multiply_images(cpu, d, images, source, panels, epilogues.into_par_iter());
        epilogues = later;
    }
}

/// The same for some of the images, whose first row is a tile's.
fn multiply_images<W: Wide, E: Epilogue<W>>(
    cpu: &Cpu,
    d: &ConvDims,
    images: Range<usize>,
    source: &impl Load<W>,
    panels: &Panels<'_, W>,
    epilogues: impl IndexedParallelIterator<Item = E>,
) {
    let (shape, depth) = (W::shape(), source.len());
    let squares = Squares::new(d);
    let strips = images.start * squares.strips..images.end * squares.strips;
    let at_a_time = squares.strips_at_a_time(shape.rows);
    let tasks: Vec<Range<usize>> =
        strips.clone().step_by(at_a_time).map(|first| first..(first + at_a_time).min(strips.end)).collect();
    let lens: Vec<usize> = tasks.iter().map(|strips| squares.pixels(strips).len()).collect();
    let mut sums = KeptSums::new(cpu, images.len() * d.h * d.w, panels.columns, lens.len());
    let block = TRANSFORMED_BYTES / (SLICES * row_stride(depth) * size_of::<W>());
    let block = (block / shape.rows).max(1) * shape.rows;

    sums.tasks(&lens).into_par_iter().with_max_len(1).for_each(|KeptTask { task, columns, stride, sums }| {
        let strips = &tasks[task];
        let reads = squares.reads(strips);
        let tile = load_rows(cpu, source, 0, std::slice::from_ref(&reads), 0..depth);
        let own = squares.pixels(strips);
        let all = squares.of(strips);
        let mut transformed = Transformed::new(cpu, block.min(all.len()).next_multiple_of(shape.rows), depth);
        let mut products = cpu.scratch.take::<W>(SLICES * shape.rows * 2 * shape.lanes);
        for first in all.clone().step_by(block) {
            let block = first..(first + block).min(all.end);
            transformed.fill(Transform::Input, &squares, block.clone(), &tile, reads.start, depth);
            let to: Vec<[u32; SLICES]> = block
                .clone()
                .map(|square| squares.places(square, Transform::Output, own.start, stride, NOWHERE))
                .collect();
            for (column, width, panel) in panels.iter().filter(|(column, ..)| columns.contains(column)) {
                let sums = &mut sums[column - columns.start..];
                for (micro, to) in (0..block.len()).step_by(shape.rows).zip(to.chunks(shape.rows)) {
                    transformed.multiply(micro..micro + to.len(), depth, panel, width, &mut products);
                    write_pixels(&products, width, to, sums);
                }
            }
        }
    });
    sums.finish(epilogues);
}

/// The gradient of the filters, `[k, 3, 3, c]`; otherwise as [`super::engine::outer_products`].
pub(crate) fn outer_products<W: Wide>(
    cpu: &Cpu,
    d: &ConvDims,
    target: &impl Load<W>,
    source: &impl Load<W>,
    dw: &mut [W],
) {
    /// Filters and channels of a task: its sums stay in the second-level cache.
    const GROUP: usize = 64;
    let (c, squares) = (source.len(), Squares::new(d));
    let strips = d.n * squares.strips;
    let at_a_time = squares.strips_at_a_time(W::shape().rows);
    let tasks = OuterTasks::new(SLICES, strips.div_ceil(at_a_time), [target.len(), c], [GROUP, GROUP]);
    let sums = tasks.run(cpu, |units, filters, channels, sums| {
        let [mut left, mut right] = tasks.group.map(|len| Transformed::new(cpu, at_a_time * squares.columns, len));
        for unit in units {
            let strips = unit * at_a_time..((unit + 1) * at_a_time).min(strips);
            let (own, reads) = (squares.pixels(&strips), squares.reads(&strips));
            let all = squares.of(&strips);
            let tile = load_rows(cpu, target, 0, std::slice::from_ref(&own), filters.clone());
            left.fill(Transform::OutputGradient, &squares, all.clone(), &tile, own.start, filters.len());
            let tile = load_rows(cpu, source, 0, std::slice::from_ref(&reads), channels.clone());
            right.fill(Transform::Input, &squares, all.clone(), &tile, reads.start, channels.len());
            let pairs = |slice: usize| -> Vec<Pair> {
                let pair = |square| Pair { left: left.place(slice, square), right: right.place(slice, square) };
                (0..all.len()).map(pair).collect()
            };
            let pairs: Vec<Vec<Pair>> = (0..SLICES).map(pairs).collect();
            outer_tile(&pairs, &left.data, &right.data, tasks.group, sums);
        }
    });
    dw.par_chunks_mut(9 * c).enumerate().for_each(|(filter, dw)| {
        vectorize(
            #[inline(always)]
            || {
                for channels in tasks.channel_groups() {
                    let len = channels.len();
                    blocks!(len, |at| {
                        let mut slices = [[[W::zero(); LANES]; 4]; 4];
                        for (slice, elements) in slices.as_flattened_mut().iter_mut().enumerate() {
                            for part in 0..tasks.parts {
                                let sum = at.load(tasks.row(&sums, part, slice, filter, &channels));
                                *elements = map!(|j| elements[j] + sum[j]);
                            }
                        }
                        let taps = both!(slices, filter_gradient, 4, 3);
                        for (tap, elements) in taps.as_flattened().iter().enumerate() {
                            at.store(&mut dw[tap * c + channels.start..][..len], elements);
                        }
                    });
                }
            },
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::norm_relu_conv::{Forward, NormReluConv};

    /// A batch of maps convolved this way, and the scratch that it took.
    fn convolved(d: ConvDims) -> (Vec<f32>, usize) {
        let cpu = Cpu::new(2).expect("threads");
        let numbers = |n: usize, step: usize| -> Vec<f32> { (0..n).map(|i| (i * step % 7) as f32 - 3.0).collect() };
        let norm: Vec<f32> = [0.0, 1.0, 0.7, 0.3].iter().flat_map(|&value| vec![value; d.c]).collect();
        let (x, w, mut y) = (numbers(d.len_in(), 5), numbers(d.k * 9 * d.c, 3), vec![f32::NAN; d.len_out()]);
        let args =
            Forward { dims: d, x: &x[..], norm: &norm[..], w: &w[..], residual: None, y: &mut y[..], stats: None };
        NormReluConv::<f32>::norm_relu_conv_forward(&cpu, args).expect("lengths fit");
        (y, cpu.scratch_bytes())
    }

    /// More images than the limit has room for: each is convolved as it is among few, in the scratch of a batch at the limit.
    #[test]
    fn scratch_does_not_grow_with_the_batch() {
        let image = ConvDims { n: 1, h: 6, w: 10, c: 32, k: 32, r: 3, s: 3, stride: 1, pad: 1 };
        assert!(pays(&image));
        // 32 images of 60 pixels fill whole tiles.
        let limit = KEPT_BYTES / (60 * 32 * size_of::<f32>()) / 32 * 32;
        let n = limit + limit / 2 + 1;
        let (y, bytes) = convolved(ConvDims { n, ..image });
        assert!(bytes <= KEPT_BYTES + 2 * (4 << 20), "{bytes} bytes");
        for first in [0, n / 2 - 1, n / 2 + 17, n - 3] {
            // The numbers of an image are those of the seventh after it.
            let (few, _) = convolved(ConvDims { n: first % 7 + 3, ..image });
            let some = &y[first * image.len_out()..][..3 * image.len_out()];
            assert!(some == &few[first % 7 * image.len_out()..], "images from {first} on");
        }
    }

    #[test]
    fn shares_end_with_tiles() {
        for (h, w, columns) in [(56, 56, 64), (7, 7, 512), (9, 5, 32), (16, 8, 32), (63, 63, 64)] {
            for n in [1, 5, 256, 10_000] {
                let d = ConvDims { n, h, w, c: 32, k: columns, r: 3, s: 3, stride: 1, pad: 1 };
                let images = images_at_a_time::<f32>(&d, columns);
                assert!(images >= n || (images * h * w).is_multiple_of(SUM_ROWS), "{d:?}: {images}");
                let most = KEPT_BYTES.max(SUM_ROWS * h * w * columns * size_of::<f32>());
                assert!(images.min(n) * h * w * columns * size_of::<f32>() <= most, "{d:?}: {images}");
            }
        }
    }
}

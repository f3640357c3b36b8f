//! The stem's own convolution into the map, and pooling out of it; backward the other way round.

use super::{BackwardFilter, Forward, PoolDims};
use crate::cpu::lanes::{LANES, Place, blocks, map};
use crate::cpu::sums::tile_stats;
use crate::cpu::transform::{AffineRows, GradRows, PlainRows};
use crate::cpu::vectorize;
use crate::partials::{Cut, SUM_ROWS};
use crate::{Cpu, Element, Grad, Result, stem_conv};
use num_traits::{Float, Zero};
use rayon::prelude::*;
use std::hint::select_unpredictable;

pub(crate) fn stem_pool_forward<T: Element>(cpu: &Cpu, args: Forward<'_, Cpu, T>) -> Result<()> {
    let Forward { dims, x, w, map, y, argmax, stats } = args;
    stem_conv::cpu::stem_conv_forward(cpu, stem_conv::Forward { dims, x, w, y: &mut *map, stats: None })?;
    let (map, dims) = (&*map, PoolDims::behind(&dims));
    let (c, p, q) = (dims.c, dims.p(), dims.q());
    let stats: Vec<Option<&mut [T::Wide]>> = match stats {
        Some(stats) => stats.make(Cut::plain(dims.rows_out()), c).chunks_mut(2 * c).map(Some).collect(),
        None => (0..dims.rows_out().div_ceil(SUM_ROWS)).map(|_| None).collect(),
    };
    cpu.install(|| {
        let outputs = y.par_chunks_mut(SUM_ROWS * c).zip(argmax.par_chunks_mut(SUM_ROWS * c));
        outputs.zip(stats).enumerate().for_each(|(tile, ((y, argmax), stats))| {
            vectorize(
                #[inline(always)]
                || {
                    let pixels = y.chunks_exact_mut(c).zip(argmax.chunks_exact_mut(c));
                    for (row, (y, argmax)) in pixels.enumerate() {
                        let row = tile * SUM_ROWS + row;
                        window_max(&dims, map, [row / (p * q), row / q % p, row % q], y, argmax);
                    }
                    if let Some(stats) = stats {
                        tile_stats(y, c, stats);
                    }
                },
            );
        });
    });
    Ok(())
}

pub(crate) fn stem_pool_backward_filter<T: Element>(cpu: &Cpu, args: BackwardFilter<'_, Cpu, T>) -> Result<()> {
    let BackwardFilter { dims, x, dy, argmax, map, dw } = args;
    let (pool, c) = (PoolDims::behind(&dims), dims.k);
    match dy {
        Grad::Plain(dy) => unpool(cpu, &pool, PlainRows { dy, c }, argmax, map),
        Grad::Affine(affine) => unpool(cpu, &pool, AffineRows::new(affine, c), argmax, map),
    }
    stem_conv::cpu::stem_conv_backward_filter(cpu, stem_conv::BackwardFilter { dims, x, dy: Grad::Plain(&*map), dw })
}

/// Maximum and winner of the window of output pixel `[image, row, column]`; `y` and `argmax` are `[c]`.
#[inline(always)]
fn window_max<T: Element>(dims: &PoolDims, x: &[T], [image, i, j]: [usize; 3], y: &mut [T], argmax: &mut [u8]) {
    let PoolDims { h, w, c, .. } = *dims;
    // The taps inside the map; those outside are minus infinity and never win.
    let (rows, columns) = (usize::from(i == 0)..3.min(h + 1 - 2 * i), usize::from(j == 0)..3.min(w + 1 - 2 * j));
    blocks!(c, |at| {
        let mut best = [T::Wide::neg_infinity(); LANES];
        let mut winners = [(3 * rows.start + columns.start) as u8; LANES];
        for r in rows.clone() {
            for s in columns.clone() {
                let pixel = (image * h + 2 * i + r - 1) * w + 2 * j + s - 1;
                let x = at.load(&x[pixel * c..][..c]);
                let tap = (3 * r + s) as u8;
                for k in 0..LANES {
                    let wins = (x[k] > best[k]) | x[k].is_nan();
                    best[k] = select_unpredictable(wins, x[k], best[k]);
                    winners[k] = select_unpredictable(wins, tap, winners[k]);
                }
            }
        }
        at.store(y, &best);
        at.set_chunk(argmax, &winners);
    });
}

/// The gradient of the map, from that of its maxima.
fn unpool<T: Element>(cpu: &Cpu, dims: &PoolDims, dy: impl GradRows<T>, argmax: &[u8], dx: &mut [T]) {
    let PoolDims { h, w, c, .. } = *dims;
    let q = dims.q();
    cpu.install(|| {
        dx.par_chunks_mut(w * c).enumerate().for_each(|(row, dx)| {
            let (image, i) = (row / h, row % h);
            vectorize(
                #[inline(always)]
                || {
                    for (j, dx) in dx.chunks_exact_mut(c).enumerate() {
                        // Along a side, an even position is the middle of a window; an odd one is the end of a window
                        // and, but for the map's last, the start of the next.
                        let window = (image * dims.p() + i / 2) * q + j / 2;
                        let (r, s) = (1 + i % 2, 1 + j % 2);
                        let (down, right) = (r == 2 && i + 1 < h, s == 2 && j + 1 < w);
                        // The windows that the pixel lies in, and which tap it is there.
                        let windows = [
                            (true, window, 3 * r + s),
                            (right, window + 1, 3 * r),
                            (down, window + q, s),
                            (down && right, window + q + 1, 0),
                        ];
                        blocks!(c, |at| {
                            let mut sum = [T::Wide::zero(); LANES];
                            for (_, window, tap) in windows.into_iter().filter(|&(inside, ..)| inside) {
                                let (dy, winners) = (dy.block(window, at), at.chunk(&argmax[window * c..][..c]));
                                let tap = tap as u8;
                                sum = map!(|k| sum[k] + if winners[k] == tap { dy[k] } else { T::Wide::zero() });
                            }
                            at.store(dx, &sum);
                        });
                    }
                },
            );
        });
    });
}

use super::{Backward, Forward, PoolDims};
use crate::cpu::lanes::{LANES, Place, blocks, map};
use crate::cpu::sums::tile_stats;
use crate::cpu::transform::{AffineRows, GradRows, PlainRows};
use crate::cpu::vectorize;
use crate::partials::{Cut, SUM_ROWS};
use crate::{Cpu, Element, Grad, Result};
use num_traits::{Float, Zero};
use rayon::prelude::*;
use std::hint::select_unpredictable;

pub(crate) fn max_pool_forward<T: Element>(cpu: &Cpu, args: Forward<'_, Cpu, T>) -> Result<()> {
    let Forward { dims, x, y, argmax, stats } = args;
    let (c, p, q) = (dims.c, dims.p(), dims.q());
    let stats = stats.make(Cut::plain(dims.rows_out()), c);
    cpu.install(|| {
        let outputs = y.par_chunks_mut(SUM_ROWS * c).zip(argmax.par_chunks_mut(SUM_ROWS * c));
        outputs.zip(stats.par_chunks_mut(2 * c)).enumerate().for_each(|(tile, ((y, argmax), stats))| {
            vectorize(
                #[inline(always)]
                || {
                    let pixels = y.chunks_exact_mut(c).zip(argmax.chunks_exact_mut(c));
                    for (row, (y, argmax)) in pixels.enumerate() {
                        let row = tile * SUM_ROWS + row;
                        window_max(&dims, x, [row / (p * q), row / q % p, row % q], y, argmax);
                    }
                    tile_stats(y, c, stats);
                },
            );
        });
    });
    Ok(())
}

pub(crate) fn max_pool_backward<T: Element>(cpu: &Cpu, args: Backward<'_, Cpu, T>) -> Result<()> {
    let Backward { dims, dy, argmax, dx } = args;
    let c = dims.c;
    match dy {
        Grad::Plain(dy) => backward(cpu, &dims, PlainRows { dy, c }, argmax, dx),
        Grad::Affine(affine) => backward(cpu, &dims, AffineRows::new(affine, c), argmax, dx),
    }
    Ok(())
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

fn backward<T: Element>(cpu: &Cpu, dims: &PoolDims, dy: impl GradRows<T>, argmax: &[u8], dx: &mut [T]) {
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

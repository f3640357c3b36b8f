use super::{Backward, Forward, Inference};
use crate::cpu::vectorize;
use crate::partials::Cut;
use crate::{Cpu, Element, Result, Wide};
use rayon::prelude::*;
use std::array;

/// Channels of one task.
const BLOCK: usize = 64;

pub(crate) fn bn_finalize_forward<T: Element>(cpu: &Cpu, args: Forward<'_, Cpu, T>) -> Result<()> {
    let Forward { rows, c, eps, stats, affine, norm, batch } = args;
    let (cut, stats) = stats.made();
    let tasks: Vec<_> = blocks::<4, _>(norm, c).zip(blocks::<2, _>(batch, c)).enumerate().collect();
    cpu.install(|| {
        tasks.into_par_iter().for_each(|(block, ([mean, rstd, scale, shift], [batch_mean, batch_var]))| {
            let start = block * BLOCK;
            let width = mean.len();
            vectorize(
                #[inline(always)]
                || {
                    let (means, squares) = merge(stats, cut, c, start, width);
                    for j in 0..width {
                        mean[j] = T::Wide::from_f64(means[j]);
                        batch_mean[j] = mean[j];
                        batch_var[j] = T::Wide::from_f64(squares[j] / (rows - 1) as f64);
                        let (gamma, beta) = (affine[start + j], affine[c + start + j]);
                        (rstd[j], scale[j], shift[j]) = fold(means[j], squares[j] / rows as f64 + eps, gamma, beta);
                    }
                },
            );
        });
    });
    Ok(())
}

pub(crate) fn bn_finalize_inference<T: Element>(_cpu: &Cpu, args: Inference<'_, Cpu, T>) -> Result<()> {
    let Inference { c, eps, running, affine, norm } = args;
    let (mean, rest) = norm.split_at_mut(c);
    mean.copy_from_slice(&running[..c]);
    let (rstd, rest) = rest.split_at_mut(c);
    let (scale, shift) = rest.split_at_mut(c);
    for j in 0..c {
        let variance = running[c + j].to_f64() + eps;
        (rstd[j], scale[j], shift[j]) = fold(mean[j].to_f64(), variance, affine[j], affine[c + j]);
    }
    Ok(())
}

pub(crate) fn bn_finalize_backward<T: Element>(cpu: &Cpu, args: Backward<'_, Cpu, T>) -> Result<()> {
    let Backward { rows, c, sums, affine, norm, daffine, coef } = args;
    let (_, sums) = sums.made();
    let tasks: Vec<_> = blocks::<2, _>(daffine, c).zip(blocks::<3, _>(coef, c)).enumerate().collect();
    cpu.install(|| {
        tasks.into_par_iter().for_each(|(block, ([dgamma, dbeta], [dz_factor, x_factor, constant]))| {
            let start = block * BLOCK;
            let width = dgamma.len();
            vectorize(
                #[inline(always)]
                || {
                    let (mut dz, mut dz_xhat) = ([0.0; BLOCK], [0.0; BLOCK]);
                    for tile in sums.chunks_exact(2 * c) {
                        let (sum, product) = (&tile[start..][..width], &tile[c + start..][..width]);
                        for j in 0..width {
                            dz[j] += sum[j].to_f64();
                            dz_xhat[j] += product[j].to_f64();
                        }
                    }
                    for j in 0..width {
                        dgamma[j] = T::Wide::from_f64(dz_xhat[j]);
                        dbeta[j] = T::Wide::from_f64(dz[j]);
                        let (mean, rstd) = (norm[start + j].to_f64(), norm[c + start + j].to_f64());
                        let a = affine[start + j].to_f64() * rstd;
                        dz_factor[j] = T::Wide::from_f64(a);
                        x_factor[j] = T::Wide::from_f64(-a * rstd * dz_xhat[j] / rows as f64);
                        // The rounded factor, so that `b * x + c` vanishes at the mean, however large that is.
                        let b = x_factor[j].to_f64();
                        constant[j] = T::Wide::from_f64(-a * dz[j] / rows as f64 - b * mean);
                    }
                },
            );
        });
    });
    Ok(())
}

/// The `R` rows of `[R, c]`, cut into blocks of channels.
fn blocks<const R: usize, W>(flat: &mut [W], c: usize) -> impl Iterator<Item = [&mut [W]; R]> {
    let mut rows = flat.chunks_exact_mut(c);
    let mut chunks: [_; R] = array::from_fn(|_| rows.next().expect("checked length").chunks_mut(BLOCK));
    (0..c.div_ceil(BLOCK)).map(move |_| array::from_fn(|i| chunks[i].next().expect("every row has c channels")))
}

/// Means and sums of squared deviations of `width` channels from `start` over all tiles, merged in their order.
#[inline(always)]
fn merge<W: Wide>(stats: &[W], cut: Cut, c: usize, start: usize, width: usize) -> ([f64; BLOCK], [f64; BLOCK]) {
    let (mut mean, mut squares) = ([0.0; BLOCK], [0.0; BLOCK]);
    let mut before = 0.0;
    for (stats, rows) in stats.chunks_exact(2 * c).zip(cut.lens()) {
        let added = rows as f64;
        let share = added / (before + added);
        let (tile_mean, tile_squares) = (&stats[start..][..width], &stats[c + start..][..width]);
        for j in 0..width {
            let delta = tile_mean[j].to_f64() - mean[j];
            mean[j] += delta * share;
            squares[j] += tile_squares[j].to_f64() + delta * delta * (before * share);
        }
        before += added;
    }
    (mean, squares)
}

/// rstd, scale and shift from the mean and the variance with eps added.
#[inline(always)]
fn fold<W: Wide>(mean: f64, variance: f64, gamma: W, beta: W) -> (W, W, W) {
    let rstd = 1.0 / variance.sqrt();
    let scale = W::from_f64(gamma.to_f64() * rstd);
    // The rounded scale, so that `scale * x + shift` is beta at the mean, however large that is.
    (W::from_f64(rstd), scale, W::from_f64(beta.to_f64() - mean * scale.to_f64()))
}

//! Rows are independent but for the parameters' gradients, which are summed in a second pass over columns: reading `dy`
//! and `sum` again needs no memory, where partial sums of rows would.

use super::{Backward, Forward, NormDims, SUM_ROWS};
use crate::cpu::dropout::dropout_multipliers;
use crate::cpu::{rows, vectorize};
use crate::{Cpu, Element, Result, Wide};
use num_traits::{Float, Zero};
use rayon::prelude::*;

/// Rows of a task.
const ROWS: usize = 16;
/// Features of a task that sums the parameters' gradients.
const FEATURES: usize = 64;

pub(crate) fn residual_norm_forward<T: Element>(cpu: &Cpu, args: Forward<'_, Cpu, T>) -> Result<()> {
    let Forward { dims, eps, x, branch, dropout, affine, sum, stats, y } = args;
    let NormDims { t, d, x_stride, .. } = dims;
    let (gamma, beta) = affine.split_at(d);
    let (eps, share) = (T::Wide::from_f64(eps), T::Wide::from_f64(1.0 / d as f64));
    let tile = || (vec![T::Wide::zero(); d], vec![T::Wide::zero(); d]);
    cpu.install(|| {
        let tasks = sum.par_chunks_mut(ROWS * d).zip(stats.par_chunks_mut(ROWS * 2)).zip(y.par_chunks_mut(ROWS * d));
        tasks.enumerate().for_each_init(tile, |(multipliers, centred), (task, ((sum, stats), y))| {
            vectorize(
                #[inline(always)]
                || {
                    let outs = sum.chunks_exact_mut(d).zip(stats.chunks_exact_mut(2)).zip(y.chunks_exact_mut(d));
                    for (i, ((sum, stats), y)) in outs.enumerate() {
                        let row = task * ROWS + i;
                        let (x, branch) = (&x[row * x_stride..][..d], &branch[row * d..][..d]);
                        dropout_multipliers(dropout, row / t, row % t * d, multipliers);
                        for j in 0..d {
                            sum[j] = T::narrow(multipliers[j].mul_add(branch[j].widen(), x[j].widen()));
                            centred[j] = sum[j].widen();
                        }
                        let mean = rows::sum(centred) * share;
                        for c in centred.iter_mut() {
                            *c = *c - mean;
                        }
                        let rstd = (rows::dot(centred, centred) * share + eps).sqrt().recip();
                        (stats[0], stats[1]) = (mean, rstd);
                        for j in 0..d {
                            y[j] = T::narrow((centred[j] * rstd).mul_add(gamma[j], beta[j]));
                        }
                    }
                },
            );
        });
    });
    Ok(())
}

pub(crate) fn residual_norm_backward<T: Element>(cpu: &Cpu, args: Backward<'_, Cpu, T>) -> Result<()> {
    let Backward { dims, dy, sum, stats, dropout, affine, dx, dbranch, daffine } = args;
    let NormDims { t, d, .. } = dims;
    let gamma = &affine[..d];
    let share = T::Wide::from_f64(1.0 / d as f64);
    let tile = || (vec![T::Wide::zero(); d], vec![T::Wide::zero(); d], vec![T::Wide::zero(); d]);
    cpu.install(|| {
        let tasks = dx.par_chunks_mut(ROWS * d).zip(dbranch.par_chunks_mut(ROWS * d)).enumerate();
        tasks.for_each_init(tile, |(multipliers, xhat, g), (task, (dx, dbranch))| {
            vectorize(
                #[inline(always)]
                || {
                    for (i, (dx, dbranch)) in dx.chunks_exact_mut(d).zip(dbranch.chunks_exact_mut(d)).enumerate() {
                        let row = task * ROWS + i;
                        let (dy, sum) = (&dy[row * d..][..d], &sum[row * d..][..d]);
                        let (mean, rstd) = (stats[row * 2], stats[row * 2 + 1]);
                        dropout_multipliers(dropout, row / t, row % t * d, multipliers);
                        for j in 0..d {
                            xhat[j] = (sum[j].widen() - mean) * rstd;
                            g[j] = dy[j].widen() * gamma[j];
                        }
                        let (mean_g, mean_g_xhat) = (rows::sum(g) * share, rows::dot(g, xhat) * share);
                        for j in 0..d {
                            let dsum = rstd * (g[j] - mean_g - xhat[j] * mean_g_xhat);
                            dx[j] = T::narrow(dsum);
                            dbranch[j] = T::narrow(dsum * multipliers[j]);
                        }
                    }
                },
            );
        });
        let (dgamma, dbeta) = daffine.split_at_mut(d);
        let tasks = dgamma.par_chunks_mut(FEATURES).zip(dbeta.par_chunks_mut(FEATURES)).enumerate();
        tasks.for_each(|(task, (dgamma, dbeta))| {
            vectorize(
                #[inline(always)]
                || {
                    let (first, width) = (task * FEATURES, dgamma.len());
                    let mut totals = [[0.0f64; FEATURES]; 2];
                    for block in (0..dims.rows()).step_by(SUM_ROWS) {
                        let mut sums = [[T::Wide::zero(); FEATURES]; 2];
                        for row in block..(block + SUM_ROWS).min(dims.rows()) {
                            let (dy, sum) = (&dy[row * d + first..][..width], &sum[row * d + first..][..width]);
                            let (mean, rstd) = (stats[row * 2], stats[row * 2 + 1]);
                            for j in 0..width {
                                let dy = dy[j].widen();
                                sums[0][j] = dy.mul_add((sum[j].widen() - mean) * rstd, sums[0][j]);
                                sums[1][j] += dy;
                            }
                        }
                        for j in 0..width {
                            totals[0][j] += sums[0][j].to_f64();
                            totals[1][j] += sums[1][j].to_f64();
                        }
                    }
                    for j in 0..width {
                        dgamma[j] = T::Wide::from_f64(totals[0][j]);
                        dbeta[j] = T::Wide::from_f64(totals[1][j]);
                    }
                },
            );
        });
    });
    Ok(())
}

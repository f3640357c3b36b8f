//! One image is one task. Its operands are widened in the order of memory, then each head's gathered into small dense
//! tiles, padded to whole vectors, over which its products run. (A head's tokens lie kilobytes apart: gathered straight
//! from memory, the forward pass at 32px took 7.0 ms in place of 4.5, 64 images, one thread.)

use super::{AttentionDims, Backward, Forward};
use crate::cpu::dropout::dropout_multipliers;
use crate::cpu::{rows, vectorize};
use crate::{Cpu, Dropout, Element, Result, Wide};
use num_traits::Zero;
use rayon::prelude::*;

/// Columns of a tile come in multiples of this.
const LANES: usize = 16;

/// `c = a b`: `a` is `[m, k]`, element (i, p) at `i * strides.0 + p * strides.1`; `b` is `[k, n]`, `c` `[m, n]`, both
/// dense, n a multiple of [`LANES`].
#[inline(always)]
fn product<W: Wide>([m, k, n]: [usize; 3], a: &[W], strides: (usize, usize), b: &[W], c: &mut [W]) {
    /// Rows of a register tile.
    const ROWS: usize = 4;
    for j in (0..n).step_by(LANES) {
        for i in (0..m).step_by(ROWS) {
            // Past the last row, the last one again.
            let at: [usize; ROWS] = std::array::from_fn(|r| (i + r).min(m - 1) * strides.0);
            let mut sums = [[W::zero(); LANES]; ROWS];
            for p in 0..k {
                let right = &b[p * n + j..][..LANES];
                for r in 0..ROWS {
                    let left = a[at[r] + p * strides.1];
                    for l in 0..LANES {
                        sums[r][l] = left.mul_add(right[l], sums[r][l]);
                    }
                }
            }
            for r in 0..ROWS.min(m - i) {
                c[(i + r) * n + j..][..LANES].copy_from_slice(&sums[r]);
            }
        }
    }
}

/// Tokens of one head: `[tokens, stride]`, the first `d` of each, into `[tokens, width]`.
#[inline(always)]
fn gather<W: Wide>(tokens: &[W], stride: usize, d: usize, tile: &mut [W], width: usize) {
    for (row, token) in tile.chunks_exact_mut(width).zip(tokens.chunks(stride)) {
        row[..d].copy_from_slice(&token[..d]);
    }
}

/// As [`gather`], transposed: `[d, width]`.
#[inline(always)]
fn gather_columns<W: Wide>(tokens: &[W], stride: usize, d: usize, tile: &mut [W], width: usize) {
    for (column, token) in tokens.chunks(stride).enumerate() {
        for (row, &from) in token[..d].iter().enumerate() {
            tile[row * width + column] = from;
        }
    }
}

/// The inverse of [`gather`].
#[inline(always)]
fn scatter<W: Wide>(tile: &[W], width: usize, tokens: &mut [W], stride: usize, d: usize) {
    for (row, token) in tile.chunks_exact(width).zip(tokens.chunks_mut(stride)) {
        token[..d].copy_from_slice(&row[..d]);
    }
}

/// Working memory of one head. Padding is never read into anything but padding.
struct Head<W> {
    dims: AttentionDims,
    /// Padded `d` and `t`.
    width: usize,
    keys_width: usize,
    /// `[t_query, width]`.
    q: Vec<W>,
    /// `[d, keys_width]`: keys in the forward pass, values in the backward.
    columns: Vec<W>,
    /// `[t_query, keys_width]`: softmax.
    weights: Vec<W>,
    /// `[t_query, t]`: dropout.
    multipliers: Vec<W>,
    /// `[t_query, keys_width]`: softmax after dropout.
    dropped: Vec<W>,
}

impl<W: Wide> Head<W> {
    fn new(dims: AttentionDims) -> Self {
        let AttentionDims { t_query, t, d, .. } = dims;
        let (width, keys_width) = (d.next_multiple_of(LANES), t.next_multiple_of(LANES));
        Self {
            dims,
            width,
            keys_width,
            q: vec![W::zero(); t_query * width],
            columns: vec![W::zero(); d * keys_width],
            weights: vec![W::zero(); t_query * keys_width],
            multipliers: vec![W::zero(); t_query * t],
            dropped: vec![W::zero(); t_query * keys_width],
        }
    }

    /// The same bits in both passes: `q`, `weights`, `multipliers`, `dropped` of a head.
    #[inline(always)]
    fn attend(&mut self, (image, head): (usize, usize), q: &[W], keys: &[W], dropout: Option<Dropout<'_, Cpu>>) {
        let AttentionDims { t_query, t, heads, d, .. } = self.dims;
        let scale = W::from_f64(1.0 / (d as f64).sqrt());
        gather(q, heads * d, d, &mut self.q, self.width);
        gather_columns(keys, 2 * heads * d, d, &mut self.columns, self.keys_width);
        product([t_query, d, self.keys_width], &self.q, (self.width, 1), &self.columns, &mut self.weights);
        dropout_multipliers(dropout, image, head * t_query * t, &mut self.multipliers);
        let rows = self.weights.chunks_exact_mut(self.keys_width).zip(self.dropped.chunks_exact_mut(self.keys_width));
        for ((weights, dropped), multipliers) in rows.zip(self.multipliers.chunks_exact(t)) {
            let weights = &mut weights[..t];
            for x in weights.iter_mut() {
                *x = *x * scale;
            }
            let (_, sum) = rows::exponentials(weights);
            let normalizer = sum.recip();
            for j in 0..t {
                weights[j] = weights[j] * normalizer;
                dropped[j] = weights[j] * multipliers[j];
            }
        }
    }
}

pub(crate) fn attention_forward<T: Element>(cpu: &Cpu, args: Forward<'_, Cpu, T>) -> Result<()> {
    let Forward { dims, q, kv, dropout, out } = args;
    let AttentionDims { t_query, t, heads, d, .. } = dims;
    let (q_image, kv_image) = (t_query * heads * d, t * 2 * heads * d);
    let zeros = |len| vec![T::Wide::zero(); len];
    let new = || {
        let tile = Head::<T::Wide>::new(dims);
        let (out, v) = (zeros(t_query * tile.width), zeros(t * tile.width));
        (tile, out, v, [zeros(q_image), zeros(q_image)], zeros(kv_image))
    };
    cpu.install(|| {
        let images = out.par_chunks_mut(q_image).zip(q.par_chunks(q_image)).zip(kv.par_chunks(kv_image));
        images.enumerate().for_each_init(new, |(tile, out_tile, v_tile, queries, pairs), (image, ((out, q), kv))| {
            vectorize(
                #[inline(always)]
                || {
                    let ([wide_q, wide_out], wide_kv) = (queries, pairs);
                    rows::widen(q, wide_q);
                    rows::widen(kv, wide_kv);
                    for head in 0..heads {
                        let (at, width, keys_width) = (head * d, tile.width, tile.keys_width);
                        tile.attend((image, head), &wide_q[at..], &wide_kv[at..], dropout);
                        gather(&wide_kv[heads * d + at..], 2 * heads * d, d, v_tile, width);
                        product([t_query, t, width], &tile.dropped, (keys_width, 1), v_tile, out_tile);
                        scatter(out_tile, width, &mut wide_out[at..], heads * d, d);
                    }
                    rows::narrow(wide_out, out);
                },
            );
        });
    });
    Ok(())
}

pub(crate) fn attention_backward<T: Element>(cpu: &Cpu, args: Backward<'_, Cpu, T>) -> Result<()> {
    let Backward { dims, q, kv, dropout, dout, dq, dkv } = args;
    let AttentionDims { t_query, t, heads, d, .. } = dims;
    let (q_image, kv_image) = (t_query * heads * d, t * 2 * heads * d);
    let scale = T::Wide::from_f64(1.0 / (d as f64).sqrt());
    let zeros = |len| vec![T::Wide::zero(); len];
    let new = || {
        let tile = Head::<T::Wide>::new(dims);
        let query_tiles = [0; 2].map(|_| zeros(t_query * tile.width));
        let key_tiles = [0; 2].map(|_| zeros(t * tile.width));
        let dweights = zeros(t_query * tile.keys_width);
        let queries = [0; 3].map(|_| zeros(q_image));
        let pairs = [0; 2].map(|_| zeros(kv_image));
        (tile, query_tiles, key_tiles, dweights, queries, pairs)
    };
    cpu.install(|| {
        let operands = q.par_chunks(q_image).zip(kv.par_chunks(kv_image)).zip(dout.par_chunks(q_image));
        let images = dq.par_chunks_mut(q_image).zip(dkv.par_chunks_mut(kv_image)).zip(operands).enumerate();
        images.for_each_init(new, |scratch, (image, ((dq, dkv), ((q, kv), dout)))| {
            vectorize(
                #[inline(always)]
                || {
                    let (tile, query_tiles, key_tiles, dweights, queries, pairs) = scratch;
                    let ([dout_tile, dq_tile], [k_tile, dkv_tile]) = (query_tiles, key_tiles);
                    let ([wide_q, wide_dout, wide_dq], [wide_kv, wide_dkv]) = (queries, pairs);
                    rows::widen(q, wide_q);
                    rows::widen(kv, wide_kv);
                    rows::widen(dout, wide_dout);
                    for head in 0..heads {
                        let (at, width, keys_width) = (head * d, tile.width, tile.keys_width);
                        let (key_stride, value_at) = (2 * heads * d, heads * d + at);
                        tile.attend((image, head), &wide_q[at..], &wide_kv[at..], dropout);
                        gather(&wide_dout[at..], heads * d, d, dout_tile, width);

                        // dv = dropped^T dout
                        product([t, t_query, width], &tile.dropped, (1, keys_width), dout_tile, dkv_tile);
                        scatter(dkv_tile, width, &mut wide_dkv[value_at..], key_stride, d);

                        // Gradient of the dropped weights, dout v^T; then, in place, of the scores.
                        gather_columns(&wide_kv[value_at..], key_stride, d, &mut tile.columns, keys_width);
                        product([t_query, d, keys_width], dout_tile, (width, 1), &tile.columns, dweights);
                        for (i, dscores) in dweights.chunks_exact_mut(keys_width).enumerate() {
                            let dscores = &mut dscores[..t];
                            let weights = &tile.weights[i * keys_width..][..t];
                            let mean = rows::dot(&tile.dropped[i * keys_width..][..t], dscores);
                            let multipliers = &tile.multipliers[i * t..][..t];
                            for j in 0..t {
                                dscores[j] = weights[j] * (dscores[j] * multipliers[j] - mean) * scale;
                            }
                        }

                        gather(&wide_kv[at..], key_stride, d, k_tile, width);
                        product([t_query, t, width], dweights, (keys_width, 1), k_tile, dq_tile);
                        scatter(dq_tile, width, &mut wide_dq[at..], heads * d, d);

                        product([t, t_query, width], dweights, (1, keys_width), &tile.q, dkv_tile);
                        scatter(dkv_tile, width, &mut wide_dkv[at..], key_stride, d);
                    }
                    rows::narrow(wide_dq, dq);
                    rows::narrow(wide_dkv, dkv);
                },
            );
        });
    });
    Ok(())
}

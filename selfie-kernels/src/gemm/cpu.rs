//! Linear layers on the CPU: the matrix engine with rows as they lie.

use super::{Activation, BackwardData, BackwardWeight, Forward, Write};
use crate::cpu::engine::{Epilogue, Load, Panels, Sums, multiply, outer_products};
use crate::cpu::{Cpu, Reach, prefetch, vectorize};
use crate::partials::SUM_ROWS;
use crate::{Element, Result, Wide};
use num_traits::Zero;
use rayon::prelude::*;

/// Rows with a stride.
struct Rows<'a, T> {
    x: &'a [T],
    len: usize,
    stride: usize,
}

impl<T: Element> Load<T::Wide> for Rows<'_, T> {
    fn len(&self) -> usize {
        self.len
    }

    #[inline(always)]
    fn row(&self, row: usize, column: usize, to: &mut [T::Wide]) {
        for (to, x) in to.iter_mut().zip(&self.x[row * self.stride + column..]) {
            *to = x.widen();
        }
    }
}

/// `z * (1 + erf(z / sqrt(2))) / 2`.
#[inline(always)]
fn gelu<W: Wide>(z: W) -> W {
    let half = W::from_f64(0.5);
    half * z * (W::one() + (z * W::from_f64(std::f64::consts::FRAC_1_SQRT_2)).erf())
}

/// Its derivative, `Phi(z) + z * phi(z)` with the normal distribution's function and density.
#[inline(always)]
fn gelu_derivative<W: Wide>(z: W) -> W {
    let half = W::from_f64(0.5);
    let phi = (-half * z * z).exp() * W::from_f64(0.398_942_280_401_432_7);
    z.mul_add(phi, half * (W::one() + (z * W::from_f64(std::f64::consts::FRAC_1_SQRT_2)).erf()))
}

struct AddBias<'a, T: Element> {
    n: usize,
    bias: &'a [T::Wide],
    z: Option<&'a mut [T]>,
    y: &'a mut [T],
}

impl<T: Element> Epilogue<T::Wide> for AddBias<'_, T> {
    #[inline(always)]
    fn rows(&mut self, rows: &[u32], column: usize, sums: Sums<'_, T::Wide>) {
        let bias = &self.bias[column..][..sums.len];
        for (&row, sums) in rows.iter().zip(sums.rows()) {
            let place = row as usize * self.n + column;
            let y = &mut self.y[place..][..sums.len()];
            for j in 0..sums.len() {
                y[j] = T::narrow(sums[j] + bias[j]);
            }
            if let Some(z) = &mut self.z {
                let z = &mut z[place..][..sums.len()];
                z.copy_from_slice(y);
                for j in 0..sums.len() {
                    y[j] = T::narrow(gelu(z[j].widen()));
                }
            }
        }
    }

    #[inline(always)]
    fn prefetch(&self, row: usize, column: usize, len: usize) {
        prefetch(self.y, row * self.n + column, len);
    }

    #[inline(always)]
    fn finish(self) {}
}

/// Takes the gradient of `x`: through the GELU, plus an addend, into rows with a stride.
struct StoreGradient<'a, T: Element> {
    k: usize,
    stride: usize,
    gelu: Option<&'a [T]>,
    addend: Option<&'a [T]>,
    write: Write,
    dx: &'a mut [T],
}

impl<T: Element> Epilogue<T::Wide> for StoreGradient<'_, T> {
    #[inline(always)]
    fn rows(&mut self, rows: &[u32], column: usize, sums: Sums<'_, T::Wide>) {
        for (row, sums) in rows.iter().map(|&row| row as usize).zip(sums.rows()) {
            let dense = row * self.k + column;
            let dx = &mut self.dx[row * self.stride + column..][..sums.len()];
            for j in 0..sums.len() {
                let mut value = sums[j];
                if let Some(z) = self.gelu {
                    value = value * gelu_derivative(z[dense + j].widen());
                }
                if let Some(addend) = self.addend {
                    value += addend[dense + j].widen();
                }
                if self.write == Write::Accumulate {
                    value += dx[j].widen();
                }
                dx[j] = T::narrow(value);
            }
        }
    }

    #[inline(always)]
    fn prefetch(&self, row: usize, column: usize, len: usize) {
        prefetch(self.dx, row * self.stride + column, len);
    }

    #[inline(always)]
    fn finish(self) {}
}

/// Rows of a dense operand that belong to a tile.
fn tile_of<T>(dense: Option<&[T]>, tile: usize, k: usize) -> Option<&[T]> {
    dense.map(|dense| &dense[tile * SUM_ROWS * k..((tile + 1) * SUM_ROWS * k).min(dense.len())])
}

pub(crate) fn gemm_forward<T: Element>(cpu: &Cpu, args: Forward<'_, Cpu, T>) -> Result<()> {
    let Forward { dims: d, x, w, bias, activation, y } = args;
    let z = match activation {
        Activation::Identity => None,
        Activation::Gelu { z } => Some(z),
    };
    cpu.install(|| {
        let panels = Panels::from_columns(cpu, d.k, d.n, w);
        let source = Rows { x, len: d.k, stride: d.x_stride };
        let tiles = d.m.div_ceil(SUM_ROWS);
        let z: Vec<Option<&mut [T]>> = match z {
            Some(z) => z.chunks_mut(SUM_ROWS * d.n).map(Some).collect(),
            None => (0..tiles).map(|_| None).collect(),
        };
        let epilogues = y.par_chunks_mut(SUM_ROWS * d.n).zip(z).map(|(y, z)| AddBias { n: d.n, bias, z, y });
        multiply(cpu, Reach::Row, d.m, &source, &panels, epilogues);
    });
    Ok(())
}

pub(crate) fn gemm_backward_data<T: Element>(cpu: &Cpu, args: BackwardData<'_, Cpu, T>) -> Result<()> {
    let BackwardData { dims: d, dy, w, gelu, addend, write, dx } = args;
    cpu.install(|| {
        let panels = Panels::from_filter(cpu, d.n, 1, d.k, w);
        let source = Rows { x: dy, len: d.n, stride: d.n };
        // The last row may end before its stride does.
        let epilogues = dx[..d.len_x()].par_chunks_mut(SUM_ROWS * d.x_stride).enumerate().map(|(tile, dx)| {
            let (gelu, addend) = (tile_of(gelu, tile, d.k), tile_of(addend, tile, d.k));
            StoreGradient { k: d.k, stride: d.x_stride, gelu, addend, write, dx }
        });
        multiply(cpu, Reach::Row, d.m, &source, &panels, epilogues);
    });
    Ok(())
}

pub(crate) fn gemm_backward_weight<T: Element>(cpu: &Cpu, args: BackwardWeight<'_, Cpu, T>) -> Result<()> {
    let BackwardWeight { dims: d, x, dy, dw, dbias } = args;
    cpu.install(|| {
        let target = Rows { x: dy, len: d.n, stride: d.n };
        let source = Rows { x, len: d.k, stride: d.x_stride };
        outer_products(cpu, Reach::Row, d.m, &target, &source, dw);
        // Sums of tiles in their order, each exact to f32; merged in f64.
        const COLUMNS: usize = 64;
        dbias.par_chunks_mut(COLUMNS).enumerate().for_each(|(i, dbias)| {
            vectorize(
                #[inline(always)]
                || {
                    let width = dbias.len();
                    let mut total = [0f64; COLUMNS];
                    for rows in dy.chunks(SUM_ROWS * d.n) {
                        dbias.fill(T::Wide::zero());
                        for row in rows.chunks_exact(d.n) {
                            for (sum, dy) in dbias.iter_mut().zip(&row[i * COLUMNS..][..width]) {
                                *sum += dy.widen();
                            }
                        }
                        for (total, sum) in total.iter_mut().zip(dbias.iter()) {
                            *total += sum.to_f64();
                        }
                    }
                    for (sum, total) in dbias.iter_mut().zip(total) {
                        *sum = T::Wide::from_f64(total);
                    }
                },
            );
        });
    });
    Ok(())
}

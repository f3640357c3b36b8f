//! Convolution on the CPU: tiles of output pixels through the matrix engine, the transforms applied while a tile's
//! source rows are loaded.

use super::{Addend, BackwardData, BackwardFilter, Forward, ProjectionBackwardData};
use crate::cpu::engine::{Epilogue, Load, Panels, Sums, multiply, outer_products};
use crate::cpu::lanes::{Place, blocks, map};
use crate::cpu::sums::{add_grad, tile_stats};
use crate::cpu::transform::{affine_grad, normalize, relu_grad};
use crate::cpu::{Cpu, Reach, prefetch, winograd};
use crate::partials::{Cut, SUM_ROWS};
use crate::{ConvDims, Element, Grad, Result, Wide};
use num_traits::Zero;
use rayon::prelude::*;

/// `relu(scale * x + shift)`, row by row.
struct LoadNormRelu<'a, T: Element> {
    x: &'a [T],
    scale: &'a [T::Wide],
    shift: &'a [T::Wide],
}

impl<'a, T: Element> LoadNormRelu<'a, T> {
    fn new(x: &'a [T], norm: &'a [T::Wide]) -> Self {
        let c = norm.len() / 4;
        Self { x, scale: &norm[2 * c..3 * c], shift: &norm[3 * c..] }
    }
}

impl<T: Element> Load<T::Wide> for LoadNormRelu<'_, T> {
    fn len(&self) -> usize {
        self.scale.len()
    }

    #[inline(always)]
    fn row(&self, row: usize, column: usize, to: &mut [T::Wide]) {
        let x = &self.x[row * self.scale.len() + column..][..to.len()];
        let scale = &self.scale[column..][..to.len()];
        let shift = &self.shift[column..][..to.len()];
        blocks!(to.len(), |at| {
            let (x, scale, shift) = (at.load(x), at.load(scale), at.load(shift));
            at.store(to, &map!(|j| normalize(x[j], scale[j], shift[j]).relu()));
        });
    }
}

/// Rows of a gradient, its affine map applied.
pub(crate) struct LoadGrad<'a, T: Element> {
    pub(crate) grad: Grad<'a, Cpu, T>,
    pub(crate) channels: usize,
}

impl<T: Element> Load<T::Wide> for LoadGrad<'_, T> {
    fn len(&self) -> usize {
        self.channels
    }

    #[inline(always)]
    fn row(&self, row: usize, column: usize, to: &mut [T::Wide]) {
        let place = row * self.channels + column;
        match self.grad {
            Grad::Plain(dy) => {
                let dy = &dy[place..][..to.len()];
                blocks!(to.len(), |at| {
                    at.store(to, &at.load(dy));
                });
            }
            Grad::Affine(affine) => {
                let (dz, x) = (&affine.dz[place..][..to.len()], &affine.x[place..][..to.len()]);
                let coef = |i: usize| &affine.coef[i * self.channels + column..][..to.len()];
                let (a, b, c) = (coef(0), coef(1), coef(2));
                blocks!(to.len(), |at| {
                    let (dz, x) = (at.load(dz), at.load(x));
                    let (a, b, c) = (at.load(a), at.load(b), at.load(c));
                    at.store(to, &map!(|j| affine_grad(dz[j], x[j], a[j], b[j], c[j])));
                });
            }
        }
    }
}

/// Stores a tile of `y`, then takes its statistics.
pub(crate) struct StoreWithStats<'a, T: Element> {
    pub(crate) k: usize,
    pub(crate) residual: Option<&'a [T]>,
    pub(crate) y: &'a mut [T],
    pub(crate) stats: Option<&'a mut [T::Wide]>,
}

impl<T: Element> Epilogue<T::Wide> for StoreWithStats<'_, T> {
    #[inline(always)]
    fn rows(&mut self, rows: &[u32], column: usize, sums: Sums<'_, T::Wide>) {
        for (&row, sums) in rows.iter().zip(sums.rows()) {
            let place = row as usize * self.k + column;
            let y = &mut self.y[place..][..sums.len()];
            let residual = self.residual.map(|residual| &residual[place..][..sums.len()]);
            blocks!(sums.len(), |at| {
                let mut sum = at.load(sums);
                if let Some(residual) = residual {
                    let residual = at.load(residual);
                    sum = map!(|j| sum[j] + residual[j]);
                }
                at.store(y, &sum);
            });
        }
    }

    #[inline(always)]
    fn prefetch(&self, row: usize, column: usize, len: usize) {
        let place = row * self.k + column;
        prefetch(self.y, place, len);
        if let Some(residual) = self.residual {
            prefetch(residual, place, len);
        }
    }

    #[inline(always)]
    fn finish(self) {
        if let Some(stats) = self.stats {
            tile_stats(self.y, self.k, stats);
        }
    }
}

/// One epilogue for each tile of `y`.
pub(crate) fn store_with_stats<'a, T: Element>(
    k: usize,
    residual: Option<&'a [T]>,
    y: &'a mut [T],
    stats: Option<&'a mut [T::Wide]>,
) -> impl IndexedParallelIterator<Item = StoreWithStats<'a, T>> {
    let tiles = y.len().div_ceil(SUM_ROWS * k);
    let stats: Vec<Option<&mut [T::Wide]>> = match stats {
        Some(stats) => stats.chunks_mut(2 * k).map(Some).collect(),
        None => (0..tiles).map(|_| None).collect(),
    };
    y.par_chunks_mut(SUM_ROWS * k).zip(stats).enumerate().map(move |(tile, (y, stats))| {
        let residual = residual.map(|residual| &residual[tile * SUM_ROWS * k..][..y.len()]);
        StoreWithStats { k, residual, y, stats }
    })
}

/// Adds, masks and stores a tile of `dz`, and sums it, while the rows are at hand.
struct MaskWithSums<'a, T: Element> {
    dims: ConvDims,
    first: usize,
    addend: Option<Addend<'a, Cpu, T>>,
    x: &'a [T],
    norm: &'a [T::Wide],
    dz: &'a mut [T],
    sums: &'a mut [T::Wide],
}

impl<'a, T: Element> MaskWithSums<'a, T> {
    /// The addend of a row, if that pixel has one.
    #[inline(always)]
    fn addend(&self, row: usize) -> Option<&'a [T]> {
        let ConvDims { h, w, c, .. } = self.dims;
        let Addend { values, stride } = self.addend?;
        let pixel = self.first + row;
        let compact = if stride == 1 {
            pixel
        } else {
            let (n, y, x) = (pixel / (h * w), pixel / w % h, pixel % w);
            if y % stride != 0 || x % stride != 0 {
                return None;
            }
            (n * h.div_ceil(stride) + y / stride) * w.div_ceil(stride) + x / stride
        };
        Some(&values[compact * c..][..c])
    }
}

impl<T: Element> Epilogue<T::Wide> for MaskWithSums<'_, T> {
    #[inline(always)]
    fn rows(&mut self, rows: &[u32], column: usize, gradients: Sums<'_, T::Wide>) {
        let (c, len) = (self.dims.c, gradients.len);
        let norm = [0, 1, 2, 3].map(|i| &self.norm[i * c + column..][..len]);
        let sums = [column, c + column];
        blocks!(len, |at| {
            let [mean, rstd, scale, shift] = norm.map(|row| at.load(row));
            let mut added = sums.map(|start| at.load(&self.sums[start..][..len]));
            for (&row, gradient) in rows.iter().zip(gradients.rows()) {
                let place = row as usize * c + column;
                let x = at.load(&self.x[place..][..len]);
                let mut gradient = at.load(gradient);
                if let Some(addend) = self.addend(row as usize) {
                    let addend = at.load(&addend[column..][..len]);
                    gradient = map!(|j| gradient[j] + addend[j]);
                }
                let masked = map!(|j| relu_grad(normalize(x[j], scale[j], shift[j]), gradient[j]));
                let dz = at.store(&mut self.dz[place..][..len], &masked);
                add_grad(&mut added, &dz, &x, &mean, &rstd);
            }
            for (start, added) in sums.iter().zip(&added) {
                at.store(&mut self.sums[*start..][..len], added);
            }
        });
    }

    #[inline(always)]
    fn prefetch(&self, row: usize, column: usize, len: usize) {
        let place = row * self.dims.c + column;
        prefetch(self.x, place, len);
        prefetch(self.dz, place, len);
        if let Some(addend) = self.addend(row) {
            prefetch(addend, column, len);
        }
    }

    #[inline(always)]
    fn finish(self) {}
}

pub(crate) fn norm_relu_conv_forward<T: Element>(cpu: &Cpu, args: Forward<'_, Cpu, T>) -> Result<()> {
    let Forward { dims: d, x, norm, w, residual, y, stats } = args;
    cpu.install(|| {
        let source = LoadNormRelu::new(x, norm);
        let stats = stats.map(|stats| stats.make(Cut::plain(d.rows_out()), d.k));
        let epilogues = store_with_stats(d.k, residual, y, stats);
        if winograd::pays(&d) {
            winograd::multiply(cpu, &d, &source, &winograd::forward_panels(cpu, &d, w), epilogues);
        } else {
            let panels = Panels::from_columns(cpu, d.r * d.s * d.c, d.k, w);
            multiply(cpu, Reach::forward(&d), d.rows_out(), &source, &panels, epilogues);
        }
    });
    Ok(())
}

pub(crate) fn norm_relu_conv_backward_data<T: Element>(cpu: &Cpu, args: BackwardData<'_, Cpu, T>) -> Result<()> {
    let BackwardData { dims: d, dy, w, x, norm, addend, dz, sums } = args;
    cpu.install(|| {
        let source = LoadGrad { grad: dy, channels: d.k };
        let epilogues = dz
            .par_chunks_mut(SUM_ROWS * d.c)
            .zip(sums.make(Cut::plain(d.rows_in()), d.c).par_chunks_mut(2 * d.c))
            .zip(x.par_chunks(SUM_ROWS * d.c))
            .enumerate()
            .map(|(tile, ((dz, sums), x))| {
                sums.fill(T::Wide::zero());
                let first = tile * SUM_ROWS;
                MaskWithSums { dims: d, first, addend, x, norm, dz, sums }
            });
        if winograd::pays(&d) {
            winograd::multiply(cpu, &d, &source, &winograd::transposed_panels(cpu, &d, w), epilogues);
        } else {
            let panels = Panels::from_filter(cpu, d.k, d.r * d.s, d.c, w);
            multiply(cpu, Reach::transposed(&d), d.rows_in(), &source, &panels, epilogues);
        }
    });
    Ok(())
}

pub(crate) fn projection_backward_data<T: Element>(cpu: &Cpu, args: ProjectionBackwardData<'_, Cpu, T>) -> Result<()> {
    let ProjectionBackwardData { dims: d, dy, w, dx } = args;
    cpu.install(|| {
        let panels = Panels::from_filter(cpu, d.k, 1, d.c, w);
        let source = LoadGrad { grad: dy, channels: d.k };
        multiply(cpu, Reach::Row, d.rows_out(), &source, &panels, store_with_stats(d.c, None, dx, None));
    });
    Ok(())
}

pub(crate) fn norm_relu_conv_backward_filter<T: Element>(cpu: &Cpu, args: BackwardFilter<'_, Cpu, T>) -> Result<()> {
    let BackwardFilter { dims: d, x, norm, dy, dw } = args;
    cpu.install(|| {
        let (target, source) = (LoadGrad { grad: dy, channels: d.k }, LoadNormRelu::new(x, norm));
        if winograd::pays(&d) {
            winograd::outer_products(cpu, &d, &target, &source, dw);
        } else {
            outer_products(cpu, Reach::forward(&d), d.rows_out(), &target, &source, dw);
        }
    });
    Ok(())
}

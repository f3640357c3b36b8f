//! Convolution on the CPU: tiles of output pixels through the matrix engine, the transforms applied while a tile's
//! source rows are loaded.

use super::{Addend, BackwardData, BackwardFilter, ConvDims, Forward, Grad, ProjectionBackwardData, SUM_ROWS};
use crate::cpu::engine::{Epilogue, Load, Panels, multiply, outer_products};
use crate::cpu::lanes::{LANES, load, map, store};
use crate::cpu::sums::{add_grad, tile_stats};
use crate::cpu::transform::{affine_grad, normalize, relu_grad};
use crate::cpu::{Cpu, Reach, prefetch};
use crate::{Element, Result, Wide};
use num_traits::Zero;
use rayon::prelude::*;

/// `relu(scale * x + shift)`, row by row.
struct NormRelu<'a, T: Element> {
    x: &'a [T],
    scale: &'a [T::Wide],
    shift: &'a [T::Wide],
}

impl<'a, T: Element> NormRelu<'a, T> {
    fn new(x: &'a [T], norm: &'a [T::Wide]) -> Self {
        let c = norm.len() / 4;
        Self { x, scale: &norm[2 * c..3 * c], shift: &norm[3 * c..] }
    }
}

impl<T: Element> Load<T::Wide> for NormRelu<'_, T> {
    fn len(&self) -> usize {
        self.scale.len()
    }

    #[inline(always)]
    fn row(&self, row: usize, column: usize, to: &mut [T::Wide]) {
        let x = &self.x[row * self.scale.len() + column..][..to.len()];
        let scale = &self.scale[column..][..to.len()];
        let shift = &self.shift[column..][..to.len()];
        for start in (0..to.len()).step_by(LANES) {
            let (x, scale, shift) = (load(x, start), load(scale, start), load(shift, start));
            store(to, start, &map!(|j| normalize(x[j], scale[j], shift[j]).relu()));
        }
    }
}

/// Rows of a gradient, its affine map applied.
pub(crate) struct GradRows<'a, T: Element> {
    pub(crate) grad: Grad<'a, Cpu, T>,
    pub(crate) channels: usize,
}

impl<T: Element> Load<T::Wide> for GradRows<'_, T> {
    fn len(&self) -> usize {
        self.channels
    }

    #[inline(always)]
    fn row(&self, row: usize, column: usize, to: &mut [T::Wide]) {
        let place = row * self.channels + column;
        match self.grad {
            Grad::Plain(dy) => {
                let dy = &dy[place..][..to.len()];
                for start in (0..to.len()).step_by(LANES) {
                    store(to, start, &load(dy, start));
                }
            }
            Grad::Affine(affine) => {
                let (dz, x) = (&affine.dz[place..][..to.len()], &affine.x[place..][..to.len()]);
                let coef = |i: usize| &affine.coef[i * self.channels + column..][..to.len()];
                let (a, b, c) = (coef(0), coef(1), coef(2));
                for start in (0..to.len()).step_by(LANES) {
                    let (dz, x) = (load(dz, start), load(x, start));
                    let (a, b, c) = (load(a, start), load(b, start), load(c, start));
                    store(to, start, &map!(|j| affine_grad(dz[j], x[j], a[j], b[j], c[j])));
                }
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
    fn row(&mut self, row: usize, column: usize, sums: &[T::Wide]) {
        let place = row * self.k + column;
        let y = &mut self.y[place..][..sums.len()];
        let residual = self.residual.map(|residual| &residual[place..][..sums.len()]);
        for start in (0..sums.len()).step_by(LANES) {
            let mut sum = load(sums, start);
            if let Some(residual) = residual {
                let residual = load(residual, start);
                sum = map!(|j| sum[j] + residual[j]);
            }
            store(y, start, &sum);
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
    fn row(&mut self, row: usize, column: usize, gradient: &[T::Wide]) {
        let (c, len) = (self.dims.c, gradient.len());
        let place = row * c + column;
        let x = &self.x[place..][..len];
        let norm = |i: usize| &self.norm[i * c + column..][..len];
        let (mean, rstd, scale, shift) = (norm(0), norm(1), norm(2), norm(3));
        let addend = self.addend(row).map(|addend| &addend[column..][..len]);
        let dz = &mut self.dz[place..][..len];
        let (sum, product) = self.sums.split_at_mut(c);
        let (sum, product) = (&mut sum[column..][..len], &mut product[column..][..len]);
        for start in (0..len).step_by(LANES) {
            let (x, scale, shift) = (load(x, start), load(scale, start), load(shift, start));
            let mut gradient = load(gradient, start);
            if let Some(addend) = addend {
                let addend = load(addend, start);
                gradient = map!(|j| gradient[j] + addend[j]);
            }
            let masked = map!(|j| relu_grad(normalize(x[j], scale[j], shift[j]), gradient[j]));
            let dz = store(dz, start, &masked);
            add_grad(start, &dz, &x, [mean, rstd], [&mut *sum, &mut *product]);
        }
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
        let panels = Panels::from_columns(cpu, d.r * d.s * d.c, d.k, w);
        let epilogues = store_with_stats(d.k, residual, y, stats);
        multiply(cpu, Reach::forward(&d), d.rows_out(), &NormRelu::new(x, norm), &panels, epilogues);
    });
    Ok(())
}

pub(crate) fn norm_relu_conv_backward_data<T: Element>(cpu: &Cpu, args: BackwardData<'_, Cpu, T>) -> Result<()> {
    let BackwardData { dims: d, dy, w, x, norm, addend, dz, sums } = args;
    cpu.install(|| {
        let panels = Panels::from_filter(cpu, d.k, d.r * d.s, d.c, w);
        let epilogues = dz
            .par_chunks_mut(SUM_ROWS * d.c)
            .zip(sums.par_chunks_mut(2 * d.c))
            .zip(x.par_chunks(SUM_ROWS * d.c))
            .enumerate()
            .map(|(tile, ((dz, sums), x))| {
                sums.fill(T::Wide::zero());
                let first = tile * SUM_ROWS;
                MaskWithSums { dims: d, first, addend, x, norm, dz, sums }
            });
        let source = GradRows { grad: dy, channels: d.k };
        multiply(cpu, Reach::transposed(&d), d.rows_in(), &source, &panels, epilogues);
    });
    Ok(())
}

pub(crate) fn projection_backward_data<T: Element>(cpu: &Cpu, args: ProjectionBackwardData<'_, Cpu, T>) -> Result<()> {
    let ProjectionBackwardData { dims: d, dy, w, dx } = args;
    cpu.install(|| {
        let panels = Panels::from_filter(cpu, d.k, 1, d.c, w);
        let source = GradRows { grad: dy, channels: d.k };
        multiply(cpu, Reach::Row, d.rows_out(), &source, &panels, store_with_stats(d.c, None, dx, None));
    });
    Ok(())
}

pub(crate) fn norm_relu_conv_backward_filter<T: Element>(cpu: &Cpu, args: BackwardFilter<'_, Cpu, T>) -> Result<()> {
    let BackwardFilter { dims: d, x, norm, dy, dw } = args;
    cpu.install(|| {
        let target = GradRows { grad: dy, channels: d.k };
        outer_products(cpu, Reach::forward(&d), d.rows_out(), &target, &NormRelu::new(x, norm), dw);
    });
    Ok(())
}

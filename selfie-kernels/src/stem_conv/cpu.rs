//! The stem on the CPU: few input channels, so each output pixel's `r * s * c` inputs are gathered into one row of the
//! tile, and the convolution is a plain product.

use super::{BackwardFilter, Forward};
use crate::cpu::engine::{Load, Panels, multiply, outer_products};
use crate::cpu::{Cpu, Reach};
use crate::norm_relu_conv::{LoadGrad, store_with_stats};
use crate::partials::Cut;
use crate::{ConvDims, Element, Result};
use num_traits::Zero;

/// The inputs of one output pixel, `[r, s, c]`, zero where the filter hangs over the edge.
struct Receptive<'a, T> {
    dims: ConvDims,
    x: &'a [T],
}

impl<T: Element> Load<T::Wide> for Receptive<'_, T> {
    fn len(&self) -> usize {
        self.dims.r * self.dims.s * self.dims.c
    }

    #[inline(always)]
    fn row(&self, row: usize, column: usize, to: &mut [T::Wide]) {
        let d = &self.dims;
        let (p, q) = (d.p(), d.q());
        let (n, y, x) = (row / (p * q), row / q % p * d.stride, row % q * d.stride);
        // A filter row reads a run of the image's row, `[w, c]`; the part of it inside the image, counted from its begin.
        let run = d.s * d.c;
        let inside = d.pad.saturating_sub(x) * d.c..(d.w + d.pad - x).min(d.s) * d.c;
        let mut at = column;
        let mut rest = to;
        while !rest.is_empty() {
            let (r, begin) = (at / run, at % run);
            let (part, behind) = rest.split_at_mut(rest.len().min(run - begin));
            let end = begin + part.len();
            let (first, last) = (inside.start.clamp(begin, end), inside.end.clamp(begin, end));
            match (y + r).checked_sub(d.pad).filter(|&y| y < d.h && first < last) {
                None => part.fill(T::Wide::zero()),
                Some(y) => {
                    part[..first - begin].fill(T::Wide::zero());
                    part[last - begin..].fill(T::Wide::zero());
                    let from = ((n * d.h + y) * d.w + x) * d.c + first - d.pad * d.c;
                    for (to, from) in part[first - begin..last - begin].iter_mut().zip(&self.x[from..]) {
                        *to = from.widen();
                    }
                }
            }
            at += part.len();
            rest = behind;
        }
    }
}

pub(crate) fn stem_conv_forward<T: Element>(cpu: &Cpu, args: Forward<'_, Cpu, T>) -> Result<()> {
    let Forward { dims: d, x, w, y, stats } = args;
    cpu.install(|| {
        let panels = Panels::from_columns(cpu, d.r * d.s * d.c, d.k, w);
        let stats = stats.map(|stats| stats.make(Cut::plain(d.rows_out()), d.k));
        let epilogues = store_with_stats(d.k, None, y, stats);
        multiply(cpu, Reach::Row, d.rows_out(), &Receptive { dims: d, x }, &panels, epilogues);
    });
    Ok(())
}

pub(crate) fn stem_conv_backward_filter<T: Element>(cpu: &Cpu, args: BackwardFilter<'_, Cpu, T>) -> Result<()> {
    let BackwardFilter { dims: d, x, dy, dw } = args;
    cpu.install(|| {
        let target = LoadGrad { grad: dy, channels: d.k };
        outer_products(cpu, Reach::Row, d.rows_out(), &target, &Receptive { dims: d, x }, dw);
    });
    Ok(())
}

use super::Join;
use crate::cpu::lanes::{Place, blocks, map};
use crate::cpu::transform::{AffineRows, GradRows};
use crate::cpu::vectorize;
use crate::partials::SUM_ROWS;
use crate::{Cpu, Element, Result};
use rayon::prelude::*;

pub(crate) fn grad_join<T: Element>(cpu: &Cpu, args: Join<'_, Cpu, T>) -> Result<()> {
    let Join { c, affine, skip, dx, .. } = args;
    let grad = AffineRows::new(affine, c);
    cpu.install(|| {
        dx.par_chunks_mut(SUM_ROWS * c).enumerate().for_each(|(tile, dx)| {
            vectorize(
                #[inline(always)]
                || {
                    for (row, dx) in dx.chunks_exact_mut(c).enumerate() {
                        let pixel = tile * SUM_ROWS + row;
                        blocks!(c, |at| {
                            let mut sum = grad.block(pixel, at);
                            if let Some(skip) = skip {
                                let skip = at.load(&skip[pixel * c..][..c]);
                                sum = map!(|j| sum[j] + skip[j]);
                            }
                            at.store(dx, &sum);
                        });
                    }
                },
            );
        });
    });
    Ok(())
}

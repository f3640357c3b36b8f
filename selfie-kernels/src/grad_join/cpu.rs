use super::Join;
use crate::cpu::lanes::{LANES, load, map, store};
use crate::cpu::transform::{AffineRows, GradRows};
use crate::cpu::vectorize;
use crate::norm_relu_conv::SUM_ROWS;
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
                        for start in (0..c).step_by(LANES) {
                            let mut sum = grad.block(pixel, start);
                            if let Some(skip) = skip {
                                let skip = load(&skip[pixel * c..][..c], start);
                                sum = map!(|j| sum[j] + skip[j]);
                            }
                            store(dx, start, &sum);
                        }
                    }
                },
            );
        });
    });
    Ok(())
}

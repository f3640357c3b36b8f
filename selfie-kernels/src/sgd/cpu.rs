use super::{Accumulate, Norm, SUM_ELEMENTS, Update};
use crate::cpu::vectorize;
use crate::{Cpu, Element, Result, Wide};
use num_traits::Float;
use rayon::prelude::*;

/// Parameters of one task.
const CHUNK: usize = 16 * 1024;
/// Sums that run side by side within a partial sum.
const LANES: usize = 64;

pub(crate) fn gradient_norm<T: Element>(cpu: &Cpu, args: Norm<'_, Cpu, T>) -> Result<()> {
    let Norm { gradient, metrics, finite } = args;
    let partial: Vec<f64> =
        cpu.install(|| gradient.par_chunks(SUM_ELEMENTS).map(|chunk| sum_of_squares(chunk).to_f64()).collect());
    let norm = T::Wide::from_f64(partial.into_iter().sum::<f64>().sqrt());
    finite[0] = u32::from(norm.is_finite() && metrics[0].is_finite());
    metrics[2] = norm;
    metrics[3] = T::Wide::from_f64(f64::from(finite[0]));
    Ok(())
}

pub(crate) fn gradient_accumulate<T: Element>(cpu: &Cpu, args: Accumulate<'_, Cpu, T>) -> Result<()> {
    let Accumulate { scale, gradient, total } = args;
    let scale = T::Wide::from_f64(scale);
    cpu.install(|| {
        total.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK)).for_each(|(total, gradient)| {
            vectorize(
                #[inline(always)]
                || {
                    for (total, &gradient) in total.iter_mut().zip(gradient) {
                        *total = scale.mul_add(gradient, *total);
                    }
                },
            );
        });
    });
    Ok(())
}

pub(crate) fn sgd_update<T: Element>(cpu: &Cpu, args: Update<'_, Cpu, T>) -> Result<()> {
    let Update { rate, momentum, weight_decay, finite, gradient, velocity, master, copy } = args;
    if finite[0] == 0 {
        return Ok(());
    }
    let [rate, momentum, decay] = [f64::from_bits(rate[0]), momentum, weight_decay].map(T::Wide::from_f64);
    cpu.install(|| {
        let inputs = gradient.par_chunks(CHUNK).zip(velocity.par_chunks_mut(CHUNK));
        let outputs = master.par_chunks_mut(CHUNK).zip(copy.par_chunks_mut(CHUNK));
        inputs.zip(outputs).for_each(|((gradient, velocity), (master, copy))| {
            vectorize(
                #[inline(always)]
                || {
                    let n = gradient.len();
                    let (velocity, master, copy) = (&mut velocity[..n], &mut master[..n], &mut copy[..n]);
                    for i in 0..n {
                        let g = decay.mul_add(master[i], gradient[i]);
                        velocity[i] = momentum.mul_add(velocity[i], g);
                        master[i] = (-rate).mul_add(momentum.mul_add(velocity[i], g), master[i]);
                        copy[i] = T::narrow(master[i]);
                    }
                },
            );
        });
    });
    Ok(())
}

/// One partial sum.
fn sum_of_squares<W: Wide>(chunk: &[W]) -> W {
    vectorize(
        #[inline(always)]
        || {
            let mut lanes = [W::zero(); LANES];
            let mut groups = chunk.chunks_exact(LANES);
            for group in &mut groups {
                for i in 0..LANES {
                    lanes[i] = group[i].mul_add(group[i], lanes[i]);
                }
            }
            for (lane, &g) in lanes.iter_mut().zip(groups.remainder()) {
                *lane = g.mul_add(g, *lane);
            }
            lanes.into_iter().sum()
        },
    )
}

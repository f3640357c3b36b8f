use super::Commit;
use crate::cpu::vectorize;
use crate::{Cpu, Element, Result, Wide};
use num_traits::Float;

pub(crate) fn bn_commit<T: Element>(_cpu: &Cpu, args: Commit<'_, Cpu, T>) -> Result<()> {
    let Commit { momentum, finite, batch, running } = args;
    if finite[0] != 0 {
        let momentum = T::Wide::from_f64(momentum);
        // One thread: a whole network has some ten thousand statistics, less than a hand-over costs.
        vectorize(
            #[inline(always)]
            || {
                for (running, &batch) in running.iter_mut().zip(batch) {
                    *running = momentum.mul_add(batch - *running, *running);
                }
            },
        );
    }
    Ok(())
}

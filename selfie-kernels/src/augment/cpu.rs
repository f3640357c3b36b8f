use super::{Args, AugmentDims, byte_table};
use crate::{Cpu, Element, Result};
use rayon::prelude::*;

pub(crate) fn augment<T: Element>(cpu: &Cpu, args: Args<'_, Cpu, T>) -> Result<()> {
    let Args { dims, images, draws, mean, std, x } = args;
    let table = byte_table(mean, std);
    let inputs = images.par_chunks(dims.h * dims.w * 3).zip(draws.par_chunks(3));
    cpu.install(|| {
        x.par_chunks_mut(dims.len_out() / dims.n)
            .zip(inputs)
            .for_each(|(x, (image, draws))| cut(&dims, image, draws, &table, x));
    });
    Ok(())
}

/// One image to its patches.
fn cut<T: Element>(dims: &AugmentDims, image: &[u8], draws: &[i32], table: &[[T; 3]; 256], x: &mut [T]) {
    let AugmentDims { h, w, grid, patch, .. } = *dims;
    let side = (grid * patch) as i64;
    let (top, left) = (i64::from(draws[0]), i64::from(draws[1]));
    // Column of the image under column `j` of the crop: `first + step * j`.
    let (first, step) = if draws[2] == 0 { (left, 1) } else { (left + side - 1, -1) };
    let inside = |index: i64, extent: usize| usize::try_from(index).ok().filter(|&i| i < extent);
    for (line, x) in x.chunks_exact_mut(patch * 3).enumerate() {
        let (row, column) = (line / patch / grid * patch + line % patch, line / patch % grid * patch);
        let source = inside(top + row as i64, h).map(|i| &image[i * w * 3..][..w * 3]);
        for (j, x) in x.chunks_exact_mut(3).enumerate() {
            let at = inside(first + step * (column + j) as i64, w);
            let pixel =
                source.zip(at).map_or([0; 3], |(source, at)| [source[3 * at], source[3 * at + 1], source[3 * at + 2]]);
            for k in 0..3 {
                x[k] = table[usize::from(pixel[k])][k];
            }
        }
    }
}

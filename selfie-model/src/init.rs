//! Initial values: the distributions of the method, drawn by name.
//!
//! A number depends on the seed, its tensor's name and its place in the tensor: not on precision, device or on what
//! else the network has, so the patch network and the ResNet of one seed begin with the same shared layers.

use crate::{Entry, Layout, Table};
use selfie_kernels::{Philox, Purpose, Wide};

/// Where a tensor's initial values come from.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Distribution {
    Constant(f64),
    /// Mean 0 and this standard deviation.
    Normal(f64),
}

/// Convolutions: Kaiming normal over the fan-out (He et al. 2015). Classifier: 0.01. Transformer linears, u0 and positions: 0.02.
/// Biases 0, gains of normalisations 1.
fn distribution(entry: &Entry) -> Distribution {
    let name = entry.name.as_str();
    if entry.layout == Layout::Filter {
        let fan_out = entry.shape[0] * entry.shape[2] * entry.shape[3];
        Distribution::Normal((2.0 / fan_out as f64).sqrt())
    } else if name == "head.fc.weight" {
        Distribution::Normal(0.01)
    } else if name.ends_with(".bias") {
        Distribution::Constant(0.0)
    } else if name.ends_with(".weight") && entry.shape.len() == 1 {
        Distribution::Constant(1.0)
    } else {
        Distribution::Normal(0.02)
    }
}

/// All parameters of a table.
pub(crate) fn parameters<W: Wide>(seed: u64, table: &Table) -> Vec<W> {
    let mut values = Vec::with_capacity(table.len());
    for entry in table.entries() {
        match distribution(entry) {
            Distribution::Constant(value) => values.resize(entry.range.end, W::from_f64(value)),
            Distribution::Normal(deviation) => {
                let normals = standard_normals(seed, &entry.name);
                values.extend(normals.take(entry.len()).map(|z| W::from_f64(deviation * z)));
            }
        }
    }
    values
}

/// Mean 0 and variance 1.
pub(crate) fn statistics<W: Wide>(table: &Table) -> Vec<W> {
    let mut values = Vec::with_capacity(table.len());
    for entry in table.entries() {
        let value = if entry.name.ends_with("running_var") { 1.0 } else { 0.0 };
        values.resize(entry.range.end, W::from_f64(value));
    }
    values
}

/// The standard normal stream of a name, by Box and Muller (1958). `libm`, so that it is the same on every machine.
fn standard_normals(seed: u64, name: &str) -> impl Iterator<Item = f64> {
    let philox = Philox { seed };
    let sample = fnv1a(name);
    (0..).flat_map(move |block| {
        let [a, b, c, d] = philox.words(Purpose::Init as u32, sample, block);
        [[a, b], [c, d]].into_iter().flat_map(|[radius, angle]| {
            let unit = |word: u32| (f64::from(word) + 0.5) / 4_294_967_296.0;
            let radius = libm::sqrt(-2.0 * libm::log(unit(radius)));
            let (sin, cos) = libm::sincos(std::f64::consts::TAU * unit(angle));
            [radius * cos, radius * sin]
        })
    })
}

/// The 64-bit FNV-1a hash.
fn fnv1a(name: &str) -> u64 {
    name.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_of_the_method() {
        let mut table = Table::default();
        let filter = table.push("stages.0.blocks.0.conv2.weight", &[64, 16, 3, 3], Layout::Filter);
        let gain = table.push("norm.weight", &[8], Layout::Plain);
        let bias = table.push("norm.bias", &[8], Layout::Plain);
        let u0 = table.push("pool.u0", &[4096], Layout::Plain);
        let head = table.push("head.fc.weight", &[10, 512, 1, 1], Layout::Plain);
        let values = parameters::<f64>(7, &table);
        assert_eq!(values.len(), table.len());
        for (range, deviation) in [(filter, (2.0f64 / 576.0).sqrt()), (u0, 0.02), (head, 0.01)] {
            let (n, part) = (range.len() as f64, &values[range]);
            let mean = part.iter().sum::<f64>() / n;
            let variance = part.iter().map(|v| v * v).sum::<f64>() / n;
            // Five standard errors of the mean and of the variance of n normal numbers.
            assert!(mean.abs() < 5.0 * deviation / n.sqrt(), "mean {mean}");
            assert!((variance / (deviation * deviation) - 1.0).abs() < 5.0 * (2.0 / n).sqrt(), "variance {variance}");
        }
        assert!(values[gain].iter().all(|&v| v == 1.0) && values[bias].iter().all(|&v| v == 0.0));
    }

    #[test]
    fn values_depend_on_seed_and_name_alone() {
        let mut small = Table::default();
        small.push("stem.conv.weight", &[4, 3, 3, 3], Layout::Filter);
        let mut large = Table::default();
        large.push("pool.u0", &[5], Layout::Plain);
        let place = large.push("stem.conv.weight", &[4, 3, 3, 3], Layout::Filter);
        let a = parameters::<f64>(1, &small);
        assert_eq!(a, parameters::<f64>(1, &large)[place]);
        assert_ne!(a, parameters::<f64>(2, &small));
        let narrow: Vec<f32> = a.iter().map(|&v| v as f32).collect();
        assert_eq!(narrow, parameters::<f32>(1, &small));
    }
}

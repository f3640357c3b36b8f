//! Initial values: the distributions of the method, drawn by name.
//!
//! A number depends on the seed, its tensor's name and its place in the tensor: not on precision, device or on what
//! else the network has, so the patch network and the ResNet of one seed begin with the same shared layers.
//!
//! An attention pooling with a token for each hidden place ([`Query::Places`]) begins so that every place looks at its
//! neighbours: [`look_around`]. From the paper's values it does not learn to within hundreds of steps, since attention
//! by place and what is to be fetched by it are worth nothing without each other.

use crate::{Entry, Layout, ModelConfig, Query, Table};
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
fn distribution(entry: &Entry, query: Query) -> Distribution {
    let name = entry.name.as_str();
    let is_linear = name.ends_with(".weight") && entry.shape.len() == 2;
    if query == Query::Places && name.starts_with("pool.") && is_linear {
        // LeCun: the tokens are not small here.
        Distribution::Normal((1.0 / entry.shape[1] as f64).sqrt())
    } else if entry.layout == Layout::Filter {
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
pub(crate) fn parameters<W: Wide>(seed: u64, table: &Table, config: &ModelConfig) -> Vec<W> {
    let mut values = vec![W::zero(); table.len()];
    for entry in table.entries() {
        let values = &mut values[entry.range.clone()];
        match distribution(entry, config.query) {
            Distribution::Constant(value) => values.fill(W::from_f64(value)),
            Distribution::Normal(deviation) => {
                let normals = standard_normals(seed, &entry.name);
                values.iter_mut().zip(normals).for_each(|(value, z)| *value = W::from_f64(deviation * z));
            }
        }
    }
    if config.query == Query::Places {
        look_around(&mut values, table, config);
    }
    values
}

/// Root mean square of the position embeddings, about that of a patch's features.
const POSITION_SCALE: f64 = 0.3;

/// Angles of the position embeddings from one place to the next, in radians: the least and the greatest.
const POSITION_ANGLES: [f64; 2] = [0.2, 1.6];

/// Logit that a place has with itself in the first block, on average over the heads.
const SHARPNESS: f64 = 4.0;

/// Gain of the last norm: what the pooling says begins small beside the position embeddings, so that at first patches are
/// told apart by their place alone.
const LAST_GAIN: f64 = 0.1;

/// Sines and cosines of row and column as position embeddings (Vaswani et al. 2017, in two dimensions), and the same
/// projection for queries and keys in the first block: near places have a greater product than far ones.
fn look_around<W: Wide>(values: &mut [W], table: &Table, config: &ModelConfig) {
    let d = config.pool_width();
    let grid = config.grid();
    let element = |row: f64, column: f64, i: usize| {
        let [least, greatest] = POSITION_ANGLES;
        let angle = least + (greatest - least) * (i / 4) as f64 / (d / 4) as f64;
        let amplitude = POSITION_SCALE * std::f64::consts::SQRT_2;
        amplitude
            * match i % 4 {
                0 => libm::sin(row * angle),
                1 => libm::cos(row * angle),
                2 => libm::sin(column * angle),
                _ => libm::cos(column * angle),
            }
    };
    let last_norm = format!("pool.blocks.{}.norm2.weight", config.pool_blocks.saturating_sub(1));
    for entry in table.entries() {
        let values = &mut values[entry.range.clone()];
        let mut fill = |of: &dyn Fn(usize, usize) -> f64| {
            for (i, value) in values.iter_mut().enumerate() {
                *value = W::from_f64(of(i / d, i % d));
            }
        };
        match entry.name.as_str() {
            "pool.pos" => fill(&|place, i| element((place / grid) as f64, (place % grid) as f64, i)),
            "pool.row" => fill(&|row, i| if i % 4 < 2 { element(row as f64, 0.0, i) } else { 0.0 }),
            "pool.col" => fill(&|column, i| if i % 4 < 2 { 0.0 } else { element(0.0, column as f64, i) }),
            "pool.blocks.0.qkv.weight" => {
                // With q = k = s * normals, a vector e has the logit s^2 * |e|^2 * sqrt(width of a head) with itself.
                let head = (d / config.heads) as f64;
                let squares = POSITION_SCALE * POSITION_SCALE * d as f64;
                let scale = (SHARPNESS / (squares * head.sqrt())).sqrt() * (d as f64).sqrt();
                let (query, rest) = values.split_at_mut(d * d);
                for (query, key) in query.iter_mut().zip(rest) {
                    *query = *query * W::from_f64(scale);
                    *key = *query;
                }
            }
            name if name == last_norm => values.fill(W::from_f64(LAST_GAIN)),
            _ => {}
        }
    }
}

/// Mean 0 and variance 1.
pub(crate) fn statistics<W: Wide>(table: &Table) -> Vec<W> {
    let mut values = vec![W::zero(); table.len()];
    for entry in table.entries() {
        let value = if entry.name.ends_with("running_var") { 1.0 } else { 0.0 };
        values[entry.range.clone()].fill(W::from_f64(value));
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
    use crate::{Build, Network, Positions, Preset, Purpose, Selfie};
    use selfie_kernels::Cpu;

    #[test]
    fn moments_are_those_of_the_method() {
        let mut table = Table::default();
        let filter = table.push("stages.0.blocks.0.conv2.weight", &[64, 16, 3, 3], Layout::Filter);
        let gain = table.push("norm.weight", &[8], Layout::Plain);
        let bias = table.push("norm.bias", &[8], Layout::Plain);
        let u0 = table.push("pool.u0", &[4096], Layout::Plain);
        let head = table.push("head.fc.weight", &[10, 512, 1, 1], Layout::Plain);
        let values = parameters::<f64>(7, &table, &ModelConfig::default());
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
        let alone = small.push("stem.conv.weight", &[4, 3, 3, 3], Layout::Filter);
        let mut large = Table::default();
        large.push("pool.u0", &[5], Layout::Plain);
        let place = large.push("stem.conv.weight", &[4, 3, 3, 3], Layout::Filter);
        fn parameters<W: Wide>(seed: u64, table: &Table) -> Vec<W> {
            super::parameters(seed, table, &ModelConfig::default())
        }
        let a = parameters::<f64>(1, &small);
        assert_eq!(a[alone], parameters::<f64>(1, &large)[place]);
        assert_ne!(a, parameters::<f64>(2, &small));
        let narrow: Vec<f32> = a.iter().map(|&v| v as f32).collect();
        assert_eq!(narrow, parameters::<f32>(1, &small));
    }

    /// A pooling that asks by places, for 7 x 7 places both kinds of positions.
    fn looking_around(kind: Positions, image_size: usize) -> (ModelConfig, Table, Vec<f64>) {
        let config = ModelConfig { positions: kind, ..ModelConfig::preset(Preset::Small, image_size) };
        let build = Build { config: &config, batch: 2, purpose: Purpose::Train, seed: 3 };
        let network = Selfie::<Cpu, f64>::new(Cpu::new(1).expect("a thread"), build).expect("a sound preset");
        let parameters = network.parameters();
        let (table, master) = (parameters.table.clone(), parameters.master.clone());
        (config, table, master)
    }

    #[test]
    fn places_look_at_their_neighbours_first() {
        let (config, table, values) = looking_around(Positions::Table, 224);
        let (d, grid) = (config.pool_width(), config.grid());
        let part = |name: &str| &values[table.get(name).expect(name).range.clone()];
        let (positions, qkv) = (part("pool.pos"), part("pool.blocks.0.qkv.weight"));
        assert_eq!(qkv[..d * d], qkv[d * d..2 * d * d]);
        assert_ne!(qkv[..d * d], qkv[2 * d * d..]);
        let projected: Vec<Vec<f64>> = positions
            .chunks(d)
            .map(|e| qkv[..d * d].chunks(d).map(|row| row.iter().zip(e).map(|(w, e)| w * e).sum()).collect())
            .collect();
        // Mean over the heads of q . k / sqrt(width of a head).
        let logit = |a: usize, b: usize| {
            let product: f64 = projected[a].iter().zip(&projected[b]).map(|(a, b)| a * b).sum();
            product / config.heads as f64 / ((d / config.heads) as f64).sqrt()
        };
        // A random projection to d numbers keeps a product to about sqrt(2 / d) of it: 9%.
        let places = grid * grid;
        let itself = (0..places).map(|place| logit(place, place)).sum::<f64>() / places as f64;
        assert!((itself / SHARPNESS - 1.0).abs() < 0.1, "{itself}");
        let centre = grid / 2 * grid + grid / 2;
        for near in [centre - 1, centre + 1, centre - grid, centre + grid] {
            for far in [0, grid - 1, grid * (grid - 1), grid * grid - 1] {
                assert!(logit(centre, near) > logit(centre, far) + 1.0, "{near}, {far}");
            }
        }
        assert!(part("pool.blocks.0.norm2.weight").iter().all(|&gain| gain == LAST_GAIN));
    }

    #[test]
    fn rows_and_columns_add_up_to_the_table() {
        let (config, table, values) = looking_around(Positions::Table, 224);
        let (_, split, parts) = looking_around(Positions::RowCol, 224);
        let (d, grid) = (config.pool_width(), config.grid());
        let whole = &values[table.get("pool.pos").expect("a table").range.clone()];
        let of = |name: &str, place: usize| &parts[split.get(name).expect(name).range.start + place * d..][..d];
        for place in 0..grid * grid {
            for i in 0..d {
                let sum = of("pool.row", place / grid)[i] + of("pool.col", place % grid)[i];
                assert_eq!(sum, whole[place * d + i], "place {place}, feature {i}");
            }
        }
    }
}

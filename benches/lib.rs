//! What the benchmarks share.

use selfie_kernels::norm_relu_conv::{BackwardData, BackwardFilter, Forward, NormReluConv};
use selfie_kernels::{Affine, ConvDims, Cpu, Element, Grad, Partials, Philox, Result, Wide, partials_room};

/// Random numbers in (-1, 1): kernels are never timed on zeros.
pub fn random<T: Element>(seed: u64, len: usize) -> Vec<T> {
    let philox = Philox { seed };
    (0..len as u64)
        .map(|i| T::narrow(T::Wide::from_f64(f64::from(2.0 * Philox::unit(philox.words(0, i, 0)[0]) - 1.0))))
        .collect()
}

/// The value in the middle, of an even number the upper one; there must be one.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// The CPU with as many threads as `SELFIE_THREADS` says, or one per core.
pub fn cpu() -> Cpu {
    let threads = std::env::var("SELFIE_THREADS").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    Cpu::new(threads).expect("threads can be started")
}

/// A convolution with random operands in `f32`, as a network has it: normalised input, statistics, a gradient with its affine
/// map.
pub struct Convolution {
    dims: ConvDims,
    x: Vec<f32>,
    norm: Vec<f32>,
    w: Vec<f32>,
    y: Vec<f32>,
    stats: Partials<Cpu, f32>,
    dy: [Vec<f32>; 2],
    coef: Vec<f32>,
    dz: Vec<f32>,
    sums: Partials<Cpu, f32>,
    dw: Vec<f32>,
}

impl Convolution {
    /// Draws the operands.
    pub fn new(dims: ConvDims) -> Self {
        Self {
            dims,
            x: random(1, dims.len_in()),
            norm: random(2, 4 * dims.c),
            w: random(3, dims.len_filter()),
            y: vec![0.0; dims.len_out()],
            stats: Partials::within(vec![0.0; partials_room(dims.rows_out(), dims.k)]),
            dy: [random(4, dims.len_out()), random(5, dims.len_out())],
            coef: random(6, 3 * dims.k),
            dz: vec![0.0; dims.len_in()],
            sums: Partials::within(vec![0.0; partials_room(dims.rows_in(), dims.c)]),
            dw: vec![0.0; dims.len_filter()],
        }
    }

    /// The forward pass.
    pub fn forward(&mut self, cpu: &Cpu) -> Result<()> {
        let Self { dims, x, norm, w, y, stats, .. } = self;
        let (y, stats) = (&mut y[..], Some(stats));
        cpu.norm_relu_conv_forward(Forward { dims: *dims, x, norm, w, residual: None, y, stats })
    }

    /// The gradient of the input.
    pub fn backward_data(&mut self, cpu: &Cpu) -> Result<()> {
        let Self { dims, x, norm, w, dy: [dy, raw], coef, dz, sums, .. } = self;
        let dy = Grad::Affine(Affine { dz: &dy[..], x: &raw[..], coef: &coef[..] });
        cpu.norm_relu_conv_backward_data(BackwardData { dims: *dims, dy, w, x, norm, addend: None, dz, sums })
    }

    /// The gradient of the filter.
    pub fn backward_filter(&mut self, cpu: &Cpu) -> Result<()> {
        let Self { dims, x, norm, dy: [dy, raw], coef, dw, .. } = self;
        let dy = Grad::Affine(Affine { dz: &dy[..], x: &raw[..], coef: &coef[..] });
        cpu.norm_relu_conv_backward_filter(BackwardFilter { dims: *dims, x, norm, dy, dw })
    }
}

/// A pass of [`Convolution`].
pub type Pass = fn(&mut Convolution, &Cpu) -> Result<()>;

/// The passes by name.
pub const PASSES: [(&str, Pass); 3] = [
    ("forward", Convolution::forward),
    ("backward data", Convolution::backward_data),
    ("backward filter", Convolution::backward_filter),
];

//! Every heavy operation on the shapes that training has, in GFLOP/s (criterion's Gelem/s).
//!
//! `cargo bench -p selfie-benches --bench kernels [-- FILTER]`; `SELFIE_THREADS=1` for one thread.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use selfie_benches::{cpu, random};
use selfie_kernels::norm_relu_conv::{
    Affine, BackwardData, BackwardFilter, ConvDims, Forward, Grad, NormReluConv, sum_tiles,
};
use std::time::Duration;

/// Convolutions of ResNet-50 v2 on 32px images, batch 64, and of its first and last stage on 224px, batch 8.
#[rustfmt::skip]
const CONVOLUTIONS: [(&str, ConvDims); 9] = [
    ("stage1 1x1 256-64", ConvDims { n: 64, h: 32, w: 32, c: 256, k: 64, r: 1, s: 1, stride: 1, pad: 0 }),
    ("stage1 3x3 64", ConvDims { n: 64, h: 32, w: 32, c: 64, k: 64, r: 3, s: 3, stride: 1, pad: 1 }),
    ("stage1 1x1 64-256", ConvDims { n: 64, h: 32, w: 32, c: 64, k: 256, r: 1, s: 1, stride: 1, pad: 0 }),
    ("stage2 3x3 128 stride 2", ConvDims { n: 64, h: 32, w: 32, c: 128, k: 128, r: 3, s: 3, stride: 2, pad: 1 }),
    ("stage3 3x3 256", ConvDims { n: 64, h: 8, w: 8, c: 256, k: 256, r: 3, s: 3, stride: 1, pad: 1 }),
    ("stage3 1x1 1024-256", ConvDims { n: 64, h: 8, w: 8, c: 1024, k: 256, r: 1, s: 1, stride: 1, pad: 0 }),
    ("stage4 3x3 512", ConvDims { n: 64, h: 4, w: 4, c: 512, k: 512, r: 3, s: 3, stride: 1, pad: 1 }),
    ("patch 3x3 256 on 2x2", ConvDims { n: 1024, h: 2, w: 2, c: 256, k: 256, r: 3, s: 3, stride: 1, pad: 1 }),
    ("224px stage1 3x3 64", ConvDims { n: 8, h: 56, w: 56, c: 64, k: 64, r: 3, s: 3, stride: 1, pad: 1 }),
];

fn convolution(c: &mut Criterion) {
    let cpu = cpu();
    let mut group = c.benchmark_group("convolution");
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    for (name, d) in CONVOLUTIONS {
        group.throughput(Throughput::Elements(d.flops() as u64));
        let (x, w) = (random::<f32>(1, d.len_in()), random::<f32>(2, d.len_filter()));
        let (norm, coef) = (random::<f32>(3, 4 * d.c), random::<f32>(4, 3 * d.k));
        let (dy, raw) = (random::<f32>(5, d.len_out()), random::<f32>(6, d.len_out()));
        let mut y = vec![0f32; d.len_out()];
        let mut stats = vec![0f32; sum_tiles(d.rows_out()) * 2 * d.k];
        group.bench_function(BenchmarkId::new("forward", name), |b| {
            b.iter(|| {
                let (y, stats) = (&mut y[..], Some(&mut stats[..]));
                let args = Forward { dims: d, x: &x[..], norm: &norm[..], w: &w[..], residual: None, y, stats };
                cpu.norm_relu_conv_forward(args)
            });
        });
        let mut dx = vec![0f32; d.len_in()];
        let mut sums = vec![0f32; sum_tiles(d.rows_in()) * 2 * d.c];
        group.bench_function(BenchmarkId::new("backward data", name), |b| {
            b.iter(|| {
                let dy = Grad::Affine(Affine { dz: &dy[..], x: &raw[..], coef: &coef[..] });
                let (x, norm, w, dz, sums) = (&x[..], &norm[..], &w[..], &mut dx[..], &mut sums[..]);
                let args = BackwardData::<_, f32> { dims: d, dy, w, x, norm, addend: None, dz, sums };
                cpu.norm_relu_conv_backward_data(args)
            });
        });
        let mut dw = vec![0f32; d.len_filter()];
        group.bench_function(BenchmarkId::new("backward filter", name), |b| {
            b.iter(|| {
                let dy = Grad::Affine(Affine { dz: &dy[..], x: &raw[..], coef: &coef[..] });
                let args = BackwardFilter { dims: d, x: &x[..], norm: &norm[..], dy, dw: &mut dw[..] };
                cpu.norm_relu_conv_backward_filter(args)
            });
        });
    }
}

criterion_group!(benches, convolution);
criterion_main!(benches);

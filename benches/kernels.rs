//! Every heavy operation on the shapes that training has, in GFLOP/s (criterion's Gelem/s).
//!
//! `cargo bench -p selfie-benches --bench kernels [-- FILTER]`; `SELFIE_THREADS=1` for one thread.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use selfie_benches::{Convolution, PASSES, cpu};
use selfie_kernels::ConvDims;
use std::time::Duration;

/// Convolutions of ResNet-50 v2 on 32px images, batch 64, of the patch network, and of the first stage on 224px, batch 8; all of
/// them, without statistics, are in `layers.rs`.
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
        let mut convolution = Convolution::new(d);
        for (pass, run) in PASSES {
            group.bench_function(BenchmarkId::new(pass, name), |b| b.iter(|| run(&mut convolution, &cpu)));
        }
    }
}

criterion_group!(benches, convolution);
criterion_main!(benches);

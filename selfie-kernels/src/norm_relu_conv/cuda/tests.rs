//! The launchers' rules, for the devices there are; no kernel runs.

use super::Named;
use super::backward_filter::{FilterGradient, Gradient};
use super::product::{Load, Product};
use crate::ConvDims;
use crate::cuda::{Address, GpuFacts};
use half::bf16;

/// ResNet-50's convolutions behind a stem that leaves maps of this side.
fn resnet50(n: usize, side: usize) -> Vec<ConvDims> {
    let layer = |side: usize, [c, k]: [usize; 2], r: usize, stride: usize| ConvDims {
        n,
        h: side,
        w: side,
        c,
        k,
        r,
        s: r,
        stride,
        pad: r / 2,
    };
    let stage = |number: usize| {
        let (width, out) = (64 << number, 256 << number);
        let (before, stride) = if number == 0 { (64, 1) } else { (out / 2, 2) };
        let (first, later) = (side >> number.saturating_sub(1), side >> number);
        [
            layer(first, [before, width], 1, 1),
            layer(first, [width; 2], 3, stride),
            layer(first, [before, out], 1, stride),
            layer(later, [width, out], 1, 1),
            layer(later, [out, width], 1, 1),
            layer(later, [width; 2], 3, 1),
        ]
    };
    (0..4).flat_map(stage).collect()
}

/// A network's layers at 224 pixels, at 32, and on patches of 8.
fn layers() -> impl Iterator<Item = ConvDims> {
    [(256, 56), (512, 32), (8192, 8)].into_iter().flat_map(|(n, side)| resnet50(n, side))
}

fn device(capability: u32) -> GpuFacts {
    GpuFacts::emulated(capability, 108).expect("one of those that kernels are made for")
}

const GRADIENTS: [Load; 2] = [Load::Plain, Load::Affine];

/// All products of a layer but its filter's gradient, with both kinds of gradients.
fn products(dims: ConvDims) -> Vec<Product> {
    let compact = ConvDims { h: dims.p(), w: dims.q(), stride: 1, ..dims };
    let gradient = |load: Load| {
        let all = [Product::backward_data(dims), Product::projection(compact)];
        all.into_iter().take(if dims.r == 1 { 2 } else { 1 }).map(move |product| {
            let mut product = product.expect("small enough");
            product.load = load;
            product
        })
    };
    let forward = Product::forward(dims).expect("small enough");
    std::iter::once(forward).chain(GRADIENTS.into_iter().flat_map(gradient)).collect()
}

#[test]
fn every_layer_has_a_kernel_of_the_tensor_cores_on_every_device() {
    for capability in [80, 86, 90, 120] {
        let facts = device(capability);
        for dims in layers() {
            for product in products(dims) {
                let rule = product.rule::<bf16>(&facts);
                assert!(!rule.is_plain(), "{capability}: {dims}, {:?}", product.load);
                assert!(product.kernels::<bf16>(&facts).contains(&rule), "{capability}: {dims}, {rule:?}");
            }
            for coef in [Address::NONE, Address(16)] {
                let dy = Gradient { dz: Address::NONE, x: Address::NONE, coef };
                let none = Address::NONE;
                let filter = FilterGradient { dims, x: none, norm: none, dy, dw: none };
                assert!(!filter.variants::<bf16>(&facts).is_empty(), "{capability}: {dims}, {} gradient", dy.kind());
            }
        }
    }
}

#[test]
fn only_lines_that_do_not_fit_have_fewer_channels() {
    let narrow = |capability: u32| {
        let facts = device(capability);
        let is_narrow = |dims: &ConvDims| {
            let none = Address::NONE;
            let dy = Gradient { dz: none, x: none, coef: Address(16) };
            let filter = FilterGradient { dims: *dims, x: none, norm: none, dy, dw: none };
            filter.variants::<bf16>(&facts)[0].name() == "9x64x32"
        };
        layers().filter(is_narrow).map(|d| (d.h, d.stride)).collect::<Vec<_>>()
    };
    assert_eq!(narrow(80), []);
    assert_eq!(narrow(86), [(56, 1), (56, 1), (56, 2)]);
}

#[test]
fn maps_of_more_elements_than_31_bits_count_keep_their_kernels() {
    let facts = device(80);
    for dims in resnet50(4096, 56) {
        for product in products(dims) {
            assert!(!product.rule::<bf16>(&facts).is_plain(), "{dims}, {:?}", product.load);
        }
    }
    let beyond = ConvDims { n: 1 << 14, ..resnet50(1, 56)[4] };
    assert!(Product::forward(beyond).expect("few enough rows").rule::<bf16>(&facts).is_plain(), "{beyond}");
}

/// Blocks of 8.0's and 8.6's multiprocessors, which have 1 KiB more than one block may, and reserve as much for each.
#[test]
fn as_many_blocks_as_the_tiles_were_made_for() {
    let blocks = |capability: u32, product: &Product| {
        let facts = device(capability);
        let rule = product.rule::<bf16>(&facts);
        // What a kernel has of its own: `Rows`, and `TileTaps` with what aligns the rest.
        let own = if rule.name().starts_with("halo") { 2048 } else { 3072 };
        (facts.shared_bytes + 1024) / (product.shared_bytes(rule) + own + 1024)
    };
    let layers = resnet50(256, 56);
    let [narrow, wide] = [0, 1].map(|stage| layers[6 * stage + 5]);
    for (dims, least) in [(narrow, [3, 2]), (wide, [2, 1])] {
        for product in products(dims).iter().filter(|product| product.load != Load::Plain) {
            assert_eq!([80, 86].map(|capability| blocks(capability, product)), least, "{dims}, {:?}", product.load);
        }
    }
    let mut data = Product::backward_data(layers[0]).expect("small enough");
    data.load = Load::Affine;
    assert_eq!([80, 86].map(|capability| blocks(capability, &data)), [2, 1], "1x1, narrow");
}

use super::*;
use crate::testing::*;
use crate::{Affine, Cpu, Wide};
use ndarray::{Array4, ArrayView4};
use proptest::prelude::any;

const fn conv([n, h, w]: [usize; 3], [c, k]: [usize; 2], [r, s]: [usize; 2], stride: usize, pad: usize) -> ConvDims {
    ConvDims { n, h, w, c, k, r, s, stride, pad }
}

/// `conv(images, channels in and out, filter, stride, padding)`
const CASES: &[(&str, ConvDims)] = &[
    ("one number", conv([1, 1, 1], [1, 1], [1, 1], 1, 0)),
    ("1x1, one full tile of sums", conv([2, 8, 8], [17, 33], [1, 1], 1, 0)),
    ("1x1, columns shared out among few tiles, the last one short", conv([3, 10, 9], [70, 72], [1, 1], 1, 0)),
    ("1x1, many tiles", conv([9, 16, 15], [33, 3], [1, 1], 1, 0)),
    ("projection, stride 2, even sides", conv([2, 6, 8], [16, 33], [1, 1], 2, 0)),
    ("projection, stride 2, odd sides", conv([2, 7, 5], [33, 17], [1, 1], 2, 0)),
    ("3x3 on one pixel", conv([5, 1, 1], [17, 16], [3, 3], 1, 1)),
    ("3x3 on 2x2", conv([3, 2, 2], [16, 17], [3, 3], 1, 1)),
    ("3x3 on 4x4", conv([2, 4, 4], [3, 64], [3, 3], 1, 1)),
    ("3x3 on 8x8, columns shared out", conv([3, 8, 8], [70, 70], [3, 3], 1, 1)),
    ("3x3 on 7x9", conv([3, 7, 9], [64, 1], [3, 3], 1, 1)),
    ("3x3, many tiles", conv([33, 8, 8], [3, 17], [3, 3], 1, 1)),
    ("minimal filtering, even sides, columns shared out", conv([3, 8, 12], [35, 100], [3, 3], 1, 1)),
    ("minimal filtering, odd sides, two groups of filters and channels", conv([2, 9, 11], [70, 66], [3, 3], 1, 1)),
    ("minimal filtering, many tasks", conv([20, 14, 15], [32, 33], [3, 3], 1, 1)),
    ("minimal filtering, a strip longer than a task", conv([1, 4, 140], [33, 32], [3, 3], 1, 1)),
    ("3x3, stride 2, even sides", conv([2, 8, 6], [16, 33], [3, 3], 2, 1)),
    ("3x3, stride 2, odd sides", conv([2, 9, 7], [33, 16], [3, 3], 2, 1)),
    ("3x3 without padding", conv([2, 5, 6], [3, 5], [3, 3], 1, 0)),
    ("5x3", conv([2, 6, 7], [5, 9], [5, 3], 1, 2)),
    ("1x1, stride 3", conv([2, 7, 5], [3, 9], [1, 1], 3, 0)),
];

/// As a GPU's tensor cores take them: channels in chunks of eight, tiles of 128 pixels and of 64 or 128 channels, steps of
/// 32 or 64 channels.
const CASES_OF_WHOLE_CHUNKS: &[(&str, ConvDims)] = &[
    ("1x1, narrow, one step that is not full", conv([1, 10, 13], [8, 64], [1, 1], 1, 0)),
    ("1x1, wide, steps and tiles that are not full", conv([2, 5, 14], [200, 136], [1, 1], 1, 0)),
    ("1x1, wide and narrow, full tiles and more steps than stages", conv([1, 16, 8], [64, 256], [1, 1], 1, 0)),
    ("projection, stride 2", conv([2, 7, 5], [72, 16], [1, 1], 2, 0)),
    ("3x3, one step of channels", conv([3, 7, 9], [64, 64], [3, 3], 1, 1)),
    ("3x3, two steps, two tiles of filters", conv([1, 5, 6], [72, 136], [3, 3], 1, 1)),
    ("3x3, as wide as a run reaches", conv([1, 3, 63], [72, 80], [3, 3], 1, 1)),
    ("3x3, wider than a run reaches", conv([1, 2, 64], [8, 16], [3, 3], 1, 1)),
    ("3x3, many images in a tile", conv([33, 2, 2], [136, 8], [3, 3], 1, 1)),
    ("3x3 on one pixel", conv([130, 1, 1], [8, 8], [3, 3], 1, 1)),
    ("3x3, stride 2, parities of several tiles, even sides", conv([2, 18, 16], [24, 72], [3, 3], 2, 1)),
    ("3x3, stride 2, odd sides", conv([2, 9, 7], [72, 8], [3, 3], 2, 1)),
    ("3x3, stride 2, a parity without pixels", conv([9, 1, 2], [16, 8], [3, 3], 2, 1)),
    ("3x3, stride 3", conv([2, 7, 8], [16, 8], [3, 3], 3, 1)),
    ("5x3", conv([1, 6, 7], [8, 16], [5, 3], 1, 2)),
    ("5x7, more taps than a word has bits", conv([1, 6, 8], [8, 8], [5, 7], 1, 2)),
];

/// Small maps of many images, of which a tile of 128 rows may be one place, and of the last images several.
const CASES_OF_PLACES: &[(&str, ConvDims)] = &[
    ("2x2, narrow, images left over", conv([168, 2, 2], [24, 40], [3, 3], 1, 1)),
    ("2x2, wide, more steps than stages, whole tiles", conv([128, 2, 2], [136, 72], [3, 3], 1, 1)),
    ("4x4, images left over", conv([131, 4, 4], [8, 24], [3, 3], 1, 1)),
    ("a line of pixels, several tiles of images", conv([260, 1, 3], [8, 72], [3, 3], 1, 1)),
    ("a column of pixels", conv([136, 4, 1], [40, 8], [3, 3], 1, 1)),
    ("stride 2, 4x4 to 2x2, images left over", conv([136, 4, 4], [24, 72], [3, 3], 2, 1)),
    ("stride 2, odd sides", conv([130, 3, 5], [72, 8], [3, 3], 2, 1)),
    ("5x3", conv([129, 2, 3], [8, 16], [5, 3], 1, 2)),
];

/// As Hopper's kernels take them: channels of the sum in steps of 64, tiles of 256 pixels and of 64 or 128 channels.
const FORWARD_CASES: &[(&str, ConvDims)] = &[
    ("1x1, narrow, less than a tile of sums", conv([1, 7, 9], [64, 56], [1, 1], 1, 0)),
    ("1x1, narrow, more steps than stages, two tiles", conv([2, 13, 14], [320, 64], [1, 1], 1, 0)),
    ("1x1, wide, a tile that is not full", conv([1, 11, 13], [128, 200], [1, 1], 1, 0)),
    ("1x1, wide, more tiles than multiprocessors", conv([5, 16, 13], [192, 256], [1, 1], 1, 0)),
    ("3x3, narrow, less than a tile of sums", conv([1, 7, 9], [64, 40], [3, 3], 1, 1)),
    ("3x3, wide, a map that is several tiles, more steps than halos", conv([1, 28, 19], [192, 72], [3, 3], 1, 1)),
    ("3x3, narrow, small maps, more tiles than multiprocessors", conv([27, 7, 6], [64, 64], [3, 3], 1, 1)),
    ("3x3, wide, a line is a tile", conv([1, 3, 128], [64, 136], [3, 3], 1, 1)),
    ("3x3, narrow, maps of a pixel", conv([270, 1, 1], [64, 64], [3, 3], 1, 1)),
    ("3x3, wide, maps of 4x3", conv([22, 4, 3], [128, 72], [3, 3], 1, 1)),
    ("3x3, stride 2, narrow, odd sides", conv([5, 15, 13], [64, 64], [3, 3], 2, 1)),
    ("3x3, stride 2, wide, even sides", conv([3, 18, 20], [128, 136], [3, 3], 2, 1)),
    ("1x1, stride 2, narrow, odd sides", conv([5, 15, 13], [128, 64], [1, 1], 2, 0)),
    ("1x1, stride 2, wide, even sides", conv([3, 20, 18], [64, 136], [1, 1], 2, 0)),
    ("3x3, narrow, a place at a time", conv([512, 2, 2], [64, 64], [3, 3], 1, 1)),
    ("3x3, stride 2, wide, a place at a time", conv([256, 3, 4], [64, 192], [3, 3], 2, 1)),
];

/// The same, of input and output.
const BACKWARD_DATA_CASES: &[(&str, ConvDims)] = &[
    ("1x1, narrow, less than a tile of sums", conv([1, 7, 9], [64, 64], [1, 1], 1, 0)),
    ("1x1, narrow, more steps than slots, more tiles than multiprocessors", conv([5, 13, 14], [64, 256], [1, 1], 1, 0)),
    ("1x1, wide, half a tile of channels", conv([1, 11, 13], [192, 128], [1, 1], 1, 0)),
    ("1x1, wide, tiles of channels share a gradient", conv([9, 8, 6], [384, 192], [1, 1], 1, 0)),
    ("1x1, wide, more steps than slots", conv([3, 11, 8], [128, 576], [1, 1], 1, 0)),
    ("1x1, deep", conv([4, 12, 9], [320, 384], [1, 1], 1, 0)),
    ("1x1, long, more steps than slots", conv([2, 9, 11], [256, 576], [1, 1], 1, 0)),
    ("projection", conv([3, 15, 13], [128, 192], [1, 1], 2, 0)),
    ("projection, wider, more steps than slots", conv([9, 9, 7], [512, 320], [1, 1], 2, 0)),
    ("3x3, narrow, less than a tile of sums", conv([1, 7, 9], [64, 64], [3, 3], 1, 1)),
    ("3x3, wide, half a tile of channels, two steps", conv([1, 23, 13], [192, 128], [3, 3], 1, 1)),
    ("3x3, narrow, small maps, more tiles than multiprocessors", conv([27, 8, 7], [64, 64], [3, 3], 1, 1)),
    ("3x3, narrow, more images than are done at once", conv([37, 8, 8], [64, 64], [3, 3], 1, 1)),
    ("3x3, stride 2, narrow, less than a tile of sums", conv([1, 14, 18], [64, 64], [3, 3], 2, 1)),
    ("3x3, stride 2, wide, half a tile of channels, more rounds than one", conv([2, 46, 26], [192, 128], [3, 3], 2, 1)),
    ("3x3, stride 2, wide, small maps, more images than are done at once", conv([37, 16, 16], [128, 64], [3, 3], 2, 1)),
    ("3x3, stride 2, narrow, maps of 4x4", conv([22, 8, 8], [64, 128], [3, 3], 2, 1)),
    ("3x3, narrow, a place at a time", conv([512, 2, 2], [64, 64], [3, 3], 1, 1)),
    ("3x3, stride 2, wide, half a tile of channels, a place at a time", conv([256, 4, 3], [192, 64], [3, 3], 2, 1)),
];

/// The same, for the filter's gradient.
const FILTER_CASES_OF_WHOLE_STEPS: &[(&str, ConvDims)] = &[
    ("1x1, few channels", conv([1, 13, 11], [64, 320], [1, 1], 1, 0)),
    ("1x1, few filters, more steps than stages, half a tile of channels", conv([5, 13, 14], [192, 64], [1, 1], 1, 0)),
    ("1x1, a square tile", conv([3, 11, 13], [128, 128], [1, 1], 1, 0)),
    ("1x1, part of a tile of filters", conv([4, 9, 11], [192, 448], [1, 1], 1, 0)),
    ("1x1, less pixels than a step", conv([1, 5, 7], [128, 256], [1, 1], 1, 0)),
    ("1x1, few channels and filters", conv([2, 9, 11], [64, 64], [1, 1], 1, 0)),
    ("1x1, stride 2, odd sides", conv([3, 15, 13], [128, 192], [1, 1], 2, 0)),
    ("1x1, stride 2, even sides", conv([2, 14, 18], [64, 320], [1, 1], 2, 0)),
    ("3x3, nine taps, lines of several strips", conv([3, 9, 60], [64, 64], [3, 3], 1, 1)),
    ("3x3, nine taps, an odd number of products, images that are not there", conv([19, 5, 7], [64, 128], [3, 3], 1, 1)),
    ("3x3, nine taps, a line", conv([9, 1, 4], [128, 64], [3, 3], 1, 1)),
    ("3x3, three taps", conv([9, 6, 14], [128, 128], [3, 3], 1, 1)),
    ("3x3, three taps, part of a tile of channels", conv([3, 6, 7], [320, 128], [3, 3], 1, 1)),
    ("3x3, three taps, part of a tile of filters", conv([3, 6, 7], [128, 320], [3, 3], 1, 1)),
    ("3x3, a line of pixels", conv([2, 1, 8], [128, 128], [3, 3], 1, 1)),
    ("3x3, nine taps, more images than are done at once", conv([50, 8, 8], [64, 64], [3, 3], 1, 1)),
    ("3x3, stride 2, nine taps", conv([9, 12, 20], [64, 64], [3, 3], 2, 1)),
    ("3x3, stride 2, three taps, more images than are done at once", conv([41, 16, 16], [128, 128], [3, 3], 2, 1)),
    ("3x3, stride 2, one pixel", conv([5, 2, 2], [128, 192], [3, 3], 2, 1)),
    ("3x3, nine taps, whole lines, images that are not there", conv([41, 2, 2], [64, 128], [3, 3], 1, 1)),
    ("3x3, nine taps, whole lines, an odd number of products", conv([16, 4, 5], [64, 64], [3, 3], 1, 1)),
    ("3x3, three taps, whole lines, images that are not there", conv([41, 2, 2], [128, 128], [3, 3], 1, 1)),
    ("3x3, three taps, whole lines, more than one product of a column", conv([64, 3, 4], [128, 128], [3, 3], 1, 1)),
    ("3x3, whole lines of a pixel, more images than are done at once", conv([300, 3, 1], [128, 128], [3, 3], 1, 1)),
    ("3x3, stride 2, nine taps, whole lines", conv([48, 6, 4], [64, 64], [3, 3], 2, 1)),
    ("3x3, stride 2, three taps, whole lines, images that are not there", conv([41, 4, 6], [128, 128], [3, 3], 2, 1)),
    ("3x3, stride 2, three taps, whole lines of a pixel", conv([32, 4, 2], [128, 128], [3, 3], 2, 1)),
];

/// Those of 3x3 filters whose lines of taps a device of some size cuts into unequal numbers of splits.
const FILTER_CASES_OF_LINES: &[(&str, ConvDims)] = &[
    ("strips", conv([9, 6, 14], [128, 128], [3, 3], 1, 1)),
    ("whole lines", conv([70, 2, 2], [128, 128], [3, 3], 1, 1)),
    ("stride 2, whole lines", conv([41, 4, 4], [128, 128], [3, 3], 2, 1)),
    ("a line of pixels, of which two lines of taps have none", conv([80, 1, 2], [128, 128], [3, 3], 1, 1)),
    ("stride 2, a line of taps that has none of pixels", conv([48, 2, 4], [128, 128], [3, 3], 2, 1)),
];

/// For both gradients at once: what Hopper's kernels form the gradient of once, and what they do not.
const CASES_OF_BOTH: &[(&str, ConvDims, Formed)] = &[
    ("1x1", conv([3, 11, 13], [64, 128], [1, 1], 1, 0), Formed::ByEach),
    ("projection", conv([3, 7, 6], [64, 72], [1, 1], 2, 0), Formed::ByEach),
    ("3x3, channels that are no whole steps", conv([2, 7, 9], [24, 40], [3, 3], 1, 1), Formed::ByEach),
    ("3x3, odd sides, stride 2", conv([2, 9, 7], [64, 64], [3, 3], 2, 1), Formed::ByEach),
    ("3x3, one tile of rows", conv([2, 6, 8], [64, 128], [3, 3], 1, 1), Formed::Once),
    ("3x3, all images at once", conv([5, 6, 8], [64, 128], [3, 3], 1, 1), Formed::Once),
    ("3x3, many images", conv([19, 8, 8], [64, 64], [3, 3], 1, 1), Formed::Once),
    ("3x3, tiles of rows end later than strips", conv([50, 4, 6], [64, 64], [3, 3], 1, 1), Formed::Once),
    ("3x3, stride 2, many images", conv([19, 16, 16], [64, 64], [3, 3], 2, 1), Formed::Once),
    ("3x3, whole lines, images that are no whole places", conv([300, 2, 2], [128, 128], [3, 3], 1, 1), Formed::ByEach),
    ("3x3, whole lines and places, many images", conv([512, 2, 2], [64, 64], [3, 3], 1, 1), Formed::Once),
    ("3x3, stride 2, whole lines and places, many images", conv([512, 4, 2], [64, 64], [3, 3], 2, 1), Formed::Once),
];

/// How often Hopper's kernels form an affine gradient for both passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Formed {
    Once,
    ByEach,
}

/// More for the filter's gradient alone: channels and pixels at the edges of tiles.
const FILTER_CASES: &[(&str, ConvDims)] = &[
    ("1x1, less than a tile of 64 x 64", conv([3, 5, 7], [56, 40], [1, 1], 1, 0)),
    ("1x1, many tiles of pixels", conv([7, 15, 16], [16, 24], [1, 1], 1, 0)),
    ("1x1, many filters of few channels", conv([2, 5, 5], [64, 264], [1, 1], 1, 0)),
    ("1x1, few filters of many channels", conv([2, 5, 4], [264, 64], [1, 1], 1, 0)),
    ("1x1, 128 x 128", conv([3, 5, 5], [72, 128], [1, 1], 1, 0)),
    ("1x1, more than 128 filters", conv([1, 7, 7], [128, 136], [1, 1], 1, 0)),
    ("1x1, more than 128 filters and channels", conv([1, 5, 7], [136, 136], [1, 1], 1, 0)),
    ("projection, rows of several images", conv([5, 7, 9], [24, 72], [1, 1], 2, 0)),
    ("3x3, short tiles of filters and channels", conv([3, 7, 6], [72, 136], [3, 3], 1, 1)),
    ("3x3, many small images in a tile", conv([70, 2, 2], [8, 16], [3, 3], 1, 1)),
    ("3x3, many tiles, rows of an image", conv([3, 30, 19], [16, 8], [3, 3], 1, 1)),
    ("3x3, wide padding", conv([2, 5, 6], [8, 8], [3, 3], 1, 2)),
    ("3x3 without padding, in chunks", conv([2, 5, 6], [16, 8], [3, 3], 1, 0)),
    ("3x3, stride 2, even sides, in chunks", conv([5, 8, 10], [64, 72], [3, 3], 2, 1)),
    ("3x3, stride 2, odd sides, in chunks", conv([4, 9, 7], [24, 16], [3, 3], 2, 1)),
    ("3x3, stride 2, one pixel", conv([19, 2, 2], [16, 16], [3, 3], 2, 1)),
    ("3x3, wide lines", conv([1, 3, 58], [40, 72], [3, 3], 1, 1)),
    ("3x3, stride 2, wide lines", conv([1, 5, 112], [40, 8], [3, 3], 2, 1)),
];

on_every_device! {
    elements:
        cases, any_shape, any_larger_shape, any_chunks, a_view_may_start_anywhere, statistics_keep_their_digits_far_from_zero,
        a_nan_goes_no_further_in_whole_chunks, any_filter_gradient, a_nan_of_the_last_pixel_reaches_the_taps_that_read_it,
        filter_gradients_of_views_that_start_anywhere, both_gradients_have_the_bits_of_each;
    gpu_elements:
        cases_of_whole_chunks, cases_of_places, forward_in_whole_steps, backward_data_in_whole_steps,
        filter_gradients_in_whole_steps, filter_gradients_cut_by_lines, both_gradients_in_whole_steps,
        filter_gradients_at_the_edges_of_tiles;
    once:
        a_padded_tap_contributes_nothing, no_gradient_passes_at_zero, a_nan_of_the_input_reaches_every_output_that_reads_it,
        a_nan_of_the_filter_reaches_its_outputs, a_nan_of_the_gradient_reaches_what_it_touches,
        forward_refuses_what_does_not_fit, backward_data_refuses_what_does_not_fit, projection_refuses_what_does_not_fit,
        backward_filter_refuses_what_does_not_fit, both_gradients_are_refused_before_one_is_written;
}

/// What all passes share.
#[derive(Debug, Clone)]
struct Layer<T: Element> {
    dims: ConvDims,
    x: Vec<T>,
    /// mean, rstd, scale, shift
    norm: Vec<T::Wide>,
    w: Vec<T>,
}

impl<T: Element> Layer<T> {
    fn draw(dims: ConvDims, draws: &mut Draws) -> Self {
        let (x, norm) = (draws.values(dims.len_in()), draws.values(4 * dims.c));
        Self { dims, x, norm, w: draws.values(dims.len_filter()) }
    }

    /// `scale * x + shift`, rounded once.
    fn z(&self) -> Vec<f64> {
        let (c, norm) = (self.dims.c, exact(&self.norm));
        let z = |(i, x): (usize, f64)| norm[2 * c + i % c].mul_add(x, norm[3 * c + i % c]);
        exact(&self.x).into_iter().enumerate().map(z).collect()
    }

    /// Its ReLU, which keeps NaN.
    fn activation(&self) -> Vec<f64> {
        self.z().into_iter().map(|z| if z < 0.0 { 0.0 } else { z }).collect()
    }

    /// Either kind of gradient of `y`.
    fn gradients(&self, draws: &mut Draws) -> [HostGrad<T>; 2] {
        let len = self.dims.len_out();
        let (dz, x, coef) = (draws.values(len), draws.values(len), draws.values(3 * self.dims.k));
        [HostGrad::Plain(draws.values(len)), HostGrad::Affine { dz, x, coef }]
    }
}

/// `y` and its statistics.
fn forward<T: Element, B: NormReluConv<T>>(
    device: &B,
    layer: &Layer<T>,
    residual: Option<&[T]>,
) -> (Vec<T>, Partials<B, T::Wide>) {
    let mut stats = room(device, layer.dims.rows_out(), layer.dims.k);
    let y = run_forward(device, layer, residual, Some(&mut stats));
    let without = run_forward(device, layer, residual, None);
    assert!(bits(&y) == bits(&without), "statistics change the output");
    (y, stats)
}

fn run_forward<T: Element, B: NormReluConv<T>>(
    device: &B,
    layer: &Layer<T>,
    residual: Option<&[T]>,
    stats: Option<&mut Partials<B, T::Wide>>,
) -> Vec<T> {
    let Layer { dims, x, norm, w } = layer;
    let (x, norm, w) = (Guarded::new(device, x), Guarded::new(device, norm), Guarded::new(device, w));
    let residual = residual.map(|residual| Guarded::new(device, residual));
    let mut y = Guarded::poisoned(device, dims.len_out());
    let args = Forward {
        dims: *dims,
        x: x.view(),
        norm: norm.view(),
        w: w.view(),
        residual: residual.as_ref().map(Guarded::view),
        y: y.view_mut(),
        stats,
    };
    device.norm_relu_conv_forward(args).expect("dims and lengths fit");
    y.read(device)
}

#[derive(Debug, Clone)]
struct HostAddend<T> {
    values: Vec<T>,
    stride: usize,
}

impl<T: Element> HostAddend<T> {
    fn draw(d: ConvDims, stride: usize, draws: &mut Draws) -> Self {
        Self { values: draws.values(d.n * d.h.div_ceil(stride) * d.w.div_ceil(stride) * d.c), stride }
    }
}

/// `dz` and its sums.
fn backward_data<T: Element, B: NormReluConv<T>>(
    device: &B,
    layer: &Layer<T>,
    dy: &HostGrad<T>,
    addend: Option<&HostAddend<T>>,
) -> (Vec<T>, Partials<B, T::Wide>) {
    let Layer { dims, x, norm, w } = layer;
    let (x, norm, w) = (Guarded::new(device, x), Guarded::new(device, norm), Guarded::new(device, w));
    let dy = dy.upload(device);
    let addend = addend.map(|addend| (Guarded::new(device, &addend.values), addend.stride));
    let mut dz = Guarded::poisoned(device, dims.len_in());
    let mut sums = room(device, dims.rows_in(), dims.c);
    let args = BackwardData {
        dims: *dims,
        dy: dy.view(),
        w: w.view(),
        x: x.view(),
        norm: norm.view(),
        addend: addend.as_ref().map(|(values, stride)| Addend { values: values.view(), stride: *stride }),
        dz: dz.view_mut(),
        sums: &mut sums,
    };
    device.norm_relu_conv_backward_data(args).expect("dims and lengths fit");
    (dz.read(device), sums)
}

fn projection<T: Element, B: NormReluConv<T>>(device: &B, layer: &Layer<T>, dy: &HostGrad<T>) -> Vec<T> {
    let dims = layer.dims;
    let (dy, w) = (dy.upload(device), Guarded::new(device, &layer.w));
    let mut dx = Guarded::poisoned(device, dims.rows_out() * dims.c);
    let args = ProjectionBackwardData { dims, dy: dy.view(), w: w.view(), dx: dx.view_mut() };
    device.projection_backward_data(args).expect("dims and lengths fit");
    dx.read(device)
}

fn backward_filter<T: Element, B: NormReluConv<T>>(device: &B, layer: &Layer<T>, dy: &HostGrad<T>) -> Vec<T::Wide> {
    let Layer { dims, x, norm, .. } = layer;
    let (x, norm, dy) = (Guarded::new(device, x), Guarded::new(device, norm), dy.upload(device));
    let mut dw = Guarded::poisoned(device, dims.len_filter());
    let args = BackwardFilter { dims: *dims, x: x.view(), norm: norm.view(), dy: dy.view(), dw: dw.view_mut() };
    device.norm_relu_conv_backward_filter(args).expect("dims and lengths fit");
    dw.read(device)
}

/// Both gradients of a layer.
struct Gradients<D: TestDevice, T: Element> {
    dw: Vec<T::Wide>,
    dz: Vec<T>,
    sums: Partials<D, T::Wide>,
    /// That made them.
    passes: Vec<&'static str>,
    filter: Filter,
}

/// How sums of the filter's gradient were cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Filter {
    /// For the whole device.
    Alone,
    /// For a part of it.
    BesideTheInputs,
}

fn backward<D: Tested<T>, T: Element>(
    device: &D,
    layer: &Layer<T>,
    dy: &HostGrad<T>,
    addend: Option<&HostAddend<T>>,
) -> Gradients<D, T> {
    let Layer { dims, x, norm, w } = layer;
    let (x, norm, w) = (Guarded::new(device, x), Guarded::new(device, norm), Guarded::new(device, w));
    let dy = dy.upload(device);
    let addend = addend.map(|addend| (Guarded::new(device, &addend.values), addend.stride));
    let mut dz = Guarded::poisoned(device, dims.len_in());
    let mut dw = Guarded::poisoned(device, dims.len_filter());
    let mut sums = room(device, dims.rows_in(), dims.c);
    let data = BackwardData {
        dims: *dims,
        dy: dy.view(),
        w: w.view(),
        x: x.view(),
        norm: norm.view(),
        addend: addend.as_ref().map(|(values, stride)| Addend { values: values.view(), stride: *stride }),
        dz: dz.view_mut(),
        sums: &mut sums,
    };
    let profiled = device.profiled();
    profiled.norm_relu_conv_backward(Backward { data, dw: dw.view_mut() }).expect("dims and lengths fit");
    let calls = profiled.calls().expect("they are done");
    let choices = || calls.iter().filter_map(|call| call.choice.as_ref());
    let is_beside = choices().any(|choice| choice.variants[choice.taken].ends_with("beside each other"));
    let filter = if is_beside { Filter::BesideTheInputs } else { Filter::Alone };
    let passes = calls.iter().map(|call| call.pass).collect();
    Gradients { dw: dw.read(device), dz: dz.read(device), sums, passes, filter }
}

fn oracle_forward<D: TestDevice, T: Element>(layer: &Layer<T>, residual: Option<&[T]>) -> Vec<Exact> {
    let (d, x, w) = (layer.dims, layer.activation(), exact(&layer.w));
    let mut y = convolve(d, &x, &w);
    if D::filters_minimally(&d) {
        set_magnitudes(&mut y, minimal::convolution(d, &x, d.k, |k, tap, c| w[(k * 9 + tap) * d.c + c]));
    }
    for (y, residual) in y.iter_mut().zip(exact(residual.unwrap_or_default())) {
        y.add(residual);
    }
    y
}

/// The gradient of the convolution's input, before the mask.
fn oracle_products<D: TestDevice, T: Element>(layer: &Layer<T>, dy: &[Exact]) -> Vec<Exact> {
    let (d, w) = (layer.dims, exact(&layer.w));
    let mut dx = input_gradient(d, dy, &w);
    if D::filters_minimally(&d) {
        let dy: Vec<_> = dy.iter().map(|dy| dy.magnitude).collect();
        let magnitudes = minimal::convolution(d, &dy, d.c, |c, tap, k| w[(k * 9 + 8 - tap) * d.c + c]);
        set_magnitudes(&mut dx, magnitudes);
    }
    dx
}

fn oracle_backward_data<T: Element>(
    layer: &Layer<T>,
    products: &[Exact],
    addend: Option<&HostAddend<T>>,
) -> Vec<Exact> {
    let d = layer.dims;
    let mut dx = Array4::from_shape_vec((d.n, d.h, d.w, d.c), products.to_vec()).expect("length of dx");
    if let Some(HostAddend { values, stride }) = addend {
        let values = exact(values);
        let shape = (d.n, d.h.div_ceil(*stride), d.w.div_ceil(*stride), d.c);
        let values = ArrayView4::from_shape(shape, &values).expect("length of the addend");
        for ((n, y, x, c), &value) in values.indexed_iter() {
            dx[[n, y * stride, x * stride, c]].add(value);
        }
    }
    let masked = |(z, dx): (f64, Exact)| if z <= 0.0 { Exact::default() } else { dx };
    layer.z().into_iter().zip(dx).map(masked).collect()
}

fn oracle_backward_filter<D: TestDevice, T: Element>(layer: &Layer<T>, dy: &[Exact]) -> Vec<Exact> {
    let (d, x) = (layer.dims, layer.activation());
    let mut dw = filter_gradient(d, dy, &x);
    if D::filters_minimally(&d) {
        let dy: Vec<_> = dy.iter().map(|dy| dy.magnitude).collect();
        set_magnitudes(&mut dw, minimal::filter_gradient(d, &dy, &x));
    }
    dw
}

/// The terms of minimal filtering are others. The roundings are fewer, as its sums are a ninth (for a filter's gradient a
/// quarter) as long, and the transforms add eight and the product one.
fn set_magnitudes(values: &mut [Exact], magnitudes: Vec<f64>) {
    for (value, magnitude) in values.iter_mut().zip(magnitudes) {
        assert!(magnitude >= value.magnitude * (1.0 - 1e-9), "every term of the plain way is among them");
        value.magnitude = magnitude;
    }
}

fn oracle_projection<T: Element>(layer: &Layer<T>, dy: &[Exact]) -> Vec<Exact> {
    // As if it had no stride.
    let compact = ConvDims { h: layer.dims.p(), w: layer.dims.q(), stride: 1, ..layer.dims };
    input_gradient(compact, dy, &exact(&layer.w))
}

/// Every pass, with and without what is optional. A sum of n products is n roundings deep in whatever order it is
/// formed, n + 1 where the products are rounded too.
fn check<D: Tested<T>, T: Element>(dims: ConvDims, seed: u64) {
    let mut draws = Draws::new(seed);
    let layer = Layer::draw(dims, &mut draws);
    check_forward::<D, T>(&layer, &mut draws);
    let dense = HostAddend::draw(dims, 1, &mut draws);
    let sparse = HostAddend::draw(dims, 2, &mut draws);
    for dy in layer.gradients(&mut draws) {
        check_backward_data::<D, T>(&layer, &dy, &[None, Some(&dense), Some(&sparse)]);
        check_filter_gradient::<D, T>(D::get(), &layer, &dy);
    }
}

fn check_forward<D: Tested<T>, T: Element>(layer: &Layer<T>, draws: &mut Draws) {
    let (device, operand, dims) = (D::get(), D::operand_epsilon::<T>(), layer.dims);
    let residual = draws.values(dims.len_out());
    for residual in [None, Some(&residual[..])] {
        let (y, stats) = forward(device, layer, residual);
        let (transform, add) = (1, 1);
        let roundings = dims.r * dims.s * dims.c + 1 + transform + add;
        let want = oracle_forward::<D, T>(layer, residual);
        assert_close_products::<T::Wide, _>("y", &y, &want, roundings, operand);
        assert_stats(device, &y, dims.k, &stats);
    }
}

/// With each of the addends.
fn check_backward_data<D: Tested<T>, T: Element>(
    layer: &Layer<T>,
    dy: &HostGrad<T>,
    addends: &[Option<&HostAddend<T>>],
) {
    let (device, dims) = (D::get(), layer.dims);
    let grad = dy.oracle(dims.k);
    let products = oracle_products::<D, T>(layer, &grad);
    for &addend in addends {
        let (dz, sums) = backward_data(device, layer, dy, addend);
        assert_data_gradient::<D, T>(layer, dy, &oracle_backward_data(layer, &products, addend), (&dz, &sums));
    }
    if (dims.r, dims.s, dims.pad) == (1, 1, 0) {
        let dx = projection(device, layer, dy);
        let want = oracle_projection(layer, &grad);
        let (transform, operands) = (HostGrad::<T>::ROUNDINGS, dy.operand_epsilon(D::operand_epsilon::<T>()));
        assert_close_products::<T::Wide, _>("dx", &dx, &want, dims.k + 1 + transform, operands);
    }
}

fn assert_data_gradient<D: Tested<T>, T: Element>(
    layer: &Layer<T>,
    dy: &HostGrad<T>,
    want: &[Exact],
    (dz, sums): (&[T], &Partials<D, T::Wide>),
) {
    let (transform, add) = (HostGrad::<T>::ROUNDINGS, 1);
    let roundings = layer.dims.r * layer.dims.s * layer.dims.k + 1 + transform + add;
    let operands = dy.operand_epsilon(D::operand_epsilon::<T>());
    assert_close_products::<T::Wide, _>("dz", dz, want, roundings, operands);
    assert_grad_sums(D::get(), (dz, &layer.x, &layer.norm), sums);
}

fn check_filter_gradient<D: Tested<T>, T: Element>(device: &D, layer: &Layer<T>, dy: &HostGrad<T>) {
    assert_filter_gradient::<D, T>(layer, dy, &backward_filter(device, layer, dy));
}

/// A sum of n products is n roundings deep in whatever order it is formed, n + 1 where the products are rounded too; the
/// input is transformed by one, the gradient by its own. Where operands are rounded, both are.
fn assert_filter_gradient<D: Tested<T>, T: Element>(layer: &Layer<T>, dy: &HostGrad<T>, dw: &[T::Wide]) {
    let (dims, operand) = (layer.dims, D::operand_epsilon::<T>());
    let want = oracle_backward_filter::<D, T>(layer, &dy.oracle(dims.k));
    let roundings = dims.rows_out() + 1 + HostGrad::<T>::ROUNDINGS + 1;
    let operands = operand + dy.operand_epsilon(operand);
    assert_close_products::<T::Wide, _>("dw", dw, &want, roundings, operands);
}

fn check_filter_gradients<D: Tested<T>, T: Element>(device: &D, dims: ConvDims, seed: u64) {
    let mut draws = Draws::new(seed);
    let layer = Layer::<T>::draw(dims, &mut draws);
    for dy in layer.gradients(&mut draws) {
        check_filter_gradient::<D, T>(device, &layer, &dy);
    }
}

fn filter_gradients_at_the_edges_of_tiles<D: Tested<T>, T: Element>() {
    for &(name, dims) in FILTER_CASES {
        eprintln!("{}: {name}", T::NAME);
        check_filter_gradients::<D, T>(D::get(), dims, 1);
    }
}

/// Channels in chunks of 8, as the tensor cores want them.
fn any_filter_gradient<D: Tested<T>, T: Element>() {
    let shapes = ([1..7usize, 1..12, 1..12], [1..12usize, 1..12], any::<bool>(), 1..3usize, 0..3usize, any::<u64>());
    for_any::<D, _>(64, shapes, |([n, h, w], [c, k], pointwise, stride, pad, seed)| {
        let side = if pointwise { 1 } else { 3 };
        let pad = pad.min(side - 1).max(side.saturating_sub(h.min(w)).div_ceil(2));
        check_filter_gradients::<D, T>(D::get(), conv([n, h, w], [8 * c, 8 * k], [side, side], stride, pad), seed);
    });
}

fn a_nan_of_the_last_pixel_reaches_the_taps_that_read_it<D: Tested<T>, T: Element>() {
    for dims in [
        conv([1, 5, 5], [16, 24], [3, 3], 1, 1),
        conv([1, 5, 5], [16, 24], [3, 3], 2, 1),
        conv([3, 2, 3], [16, 24], [3, 3], 1, 1),
        conv([1, 5, 5], [16, 24], [1, 1], 1, 0),
        conv([1, 5, 5], [3, 5], [3, 3], 1, 1),
    ] {
        let mut draws = Draws::new(8);
        let mut layer = Layer::<T>::draw(dims, &mut draws);
        let last = dims.rows_in() - 1;
        layer.x[last * dims.c + 2] = stored(f64::NAN);
        let reads = |tap: usize| conv_taps(dims).any(|(_, by, input)| by == tap && input == last);
        for dy in layer.gradients(&mut draws) {
            for (i, dw) in exact(&backward_filter(D::get(), &layer, &dy)).into_iter().enumerate() {
                let expected = i % dims.c == 2 && reads(i / dims.c % (dims.r * dims.s));
                assert_eq!(dw.is_nan(), expected, "{} {dims:?} dw[{i}] = {dw}", T::NAME);
            }
        }
    }
}

/// One element behind the start of its buffer, each operand in turn, nothing may be read or written in chunks.
fn filter_gradients_of_views_that_start_anywhere<D: Tested<T>, T: Element>() {
    let (device, mut draws) = (D::get(), Draws::new(9));
    let layer = Layer::<T>::draw(conv([2, 5, 5], [16, 8], [3, 3], 1, 1), &mut draws);
    let Layer { dims, x, norm, .. } = &layer;
    let dy = draws.values::<T>(dims.len_out());
    let want = oracle_backward_filter::<D, T>(&layer, &HostGrad::Plain(dy.clone()).oracle(dims.k));
    let norm = Guarded::new(device, norm);
    for [x_at, dy_at, dw_at] in [[1, 0, 0], [0, 1, 0], [0, 0, 1]] {
        let (x, dy) = (behind(device, x, x_at), behind(device, &dy, dy_at));
        let mut dw = behind(device, &vec![T::Wide::default(); want.len()], dw_at);
        let args = BackwardFilter {
            dims: *dims,
            x: D::view(&x, x_at..D::len(&x)),
            norm: norm.view(),
            dy: Grad::Plain(D::view(&dy, dy_at..D::len(&dy))),
            dw: D::view_mut(&mut dw, dw_at..dw_at + want.len()),
        };
        device.norm_relu_conv_backward_filter(args).expect("dims and lengths fit");
        let mut got = vec![T::Wide::default(); dw_at + want.len()];
        device.download(D::all(&dw), &mut got).expect("lengths agree");
        let roundings = dims.rows_out() + 1 + 1;
        assert_close_products::<T::Wide, _>("dw", &got[dw_at..], &want, roundings, D::operand_epsilon::<T>());
    }
}

/// Values behind so many elements.
fn behind<M: Memory, S: crate::Scalar>(device: &M, values: &[S], at: usize) -> M::Buffer<S> {
    let mut buffer = device.alloc(at + values.len()).expect("a test's buffer fits");
    device.upload(values, M::view_mut(&mut buffer, at..at + values.len())).expect("lengths agree");
    buffer
}

fn cases<D: Tested<T>, T: Element>() {
    for &(name, dims) in CASES {
        eprintln!("{}: {name}", T::NAME);
        check::<D, T>(dims, 1);
    }
}

fn cases_of_whole_chunks<D: Tested<T>, T: Element>() {
    for &(name, dims) in CASES_OF_WHOLE_CHUNKS {
        eprintln!("{}: {name}", T::NAME);
        check::<D, T>(dims, 1);
    }
}

fn cases_of_places<D: Tested<T>, T: Element>() {
    for &(name, dims) in CASES_OF_PLACES {
        eprintln!("{}: {name}", T::NAME);
        check::<D, T>(dims, 1);
    }
}

fn forward_in_whole_steps<D: Tested<T>, T: Element>() {
    for &(name, dims) in FORWARD_CASES {
        eprintln!("{}: {name}", T::NAME);
        let mut draws = Draws::new(1);
        check_forward::<D, T>(&Layer::draw(dims, &mut draws), &mut draws);
    }
}

fn filter_gradients_in_whole_steps<D: Tested<T>, T: Element>() {
    for &(name, dims) in FILTER_CASES_OF_WHOLE_STEPS {
        eprintln!("{}: {name}", T::NAME);
        check_filter_gradients::<D, T>(D::get(), dims, 1);
    }
}

fn filter_gradients_cut_by_lines<D: Tested<T>, T: Element>() {
    let device = D::larger();
    for &(name, dims) in FILTER_CASES_OF_LINES {
        eprintln!("{}: {name}", T::NAME);
        check_filter_gradients::<D, T>(&device, dims, 1);
    }
}

fn backward_data_in_whole_steps<D: Tested<T>, T: Element>() {
    for &(name, dims) in BACKWARD_DATA_CASES {
        eprintln!("{}: {name}", T::NAME);
        let mut draws = Draws::new(1);
        let layer = Layer::draw(dims, &mut draws);
        let addends = [1, 2].map(|stride| HostAddend::draw(dims, stride, &mut draws));
        for dy in layer.gradients(&mut draws) {
            check_backward_data::<D, T>(&layer, &dy, &[None, Some(&addends[0]), Some(&addends[1])]);
        }
    }
}

fn both_gradients_in_whole_steps<D: Tested<T>, T: Element>() {
    for &(name, dims, _) in CASES_OF_BOTH {
        eprintln!("{}: {name}", T::NAME);
        let mut draws = Draws::new(1);
        let layer = Layer::<T>::draw(dims, &mut draws);
        let [_, dy] = layer.gradients(&mut draws);
        let Gradients { dw, dz, sums, .. } = backward(D::get(), &layer, &dy, None);
        let products = oracle_products::<D, T>(&layer, &dy.oracle(dims.k));
        assert_data_gradient(&layer, &dy, &oracle_backward_data(&layer, &products, None), (&dz, &sums));
        assert_filter_gradient::<D, T>(&layer, &dy, &dw);
    }
}

fn both_gradients_have_the_bits_of_each<D: Tested<T>, T: Element>() {
    let (device, mut draws) = (D::get(), Draws::new(11));
    let on_hopper = device.describe().contains("sm_90") && size_of::<T>() == 2;
    for &(name, dims, formed) in CASES_OF_BOTH {
        eprintln!("{}: {name}", T::NAME);
        let layer = Layer::<T>::draw(dims, &mut draws);
        let addend = HostAddend::draw(dims, 2, &mut draws);
        let [plain, affine] = layer.gradients(&mut draws);
        for (dy, addend) in [(&plain, None), (&affine, None), (&affine, Some(&addend))] {
            let Gradients { dw, dz, sums, passes, filter } = backward(device, &layer, dy, addend);
            let (dz_alone, sums_alone) = backward_data(device, &layer, dy, addend);
            let dw_alone = backward_filter(device, &layer, dy);
            assert!(filter == Filter::BesideTheInputs || bits(&dw) == bits(&dw_alone), "dw");
            assert!(bits(&dz) == bits(&dz_alone), "dz");
            let [sums, sums_alone] = [sums, sums_alone].map(|sums| bits(&read_partials(device, &sums).1));
            assert!(sums == sums_alone, "the sums");
            let is_affine = matches!(dy, HostGrad::Affine { .. });
            if on_hopper && is_affine && addend.is_none() && formed == Formed::Once {
                assert_eq!(passes, ["norm_relu_conv_backward"]);
            } else {
                assert_eq!(passes, ["norm_relu_conv_backward_filter", "norm_relu_conv_backward_data"]);
            }
        }
    }
}

fn any_shape<D: Tested<T>, T: Element>() {
    let images = [1..4usize, 1..7, 1..7];
    let (channels, filters) = ([1..40usize, 1..40], [1..4usize, 1..4]);
    let shapes = (images, channels, filters, 1..4usize, 0..3usize, any::<u64>());
    for_any::<D, _>(128, shapes, |(image, channels, filter, stride, pad, seed)| {
        let pad = pad.min(filter[0] - 1).min(filter[1] - 1);
        let filter = [filter[0].min(image[1] + 2 * pad), filter[1].min(image[2] + 2 * pad)];
        check::<D, T>(conv(image, channels, filter, stride, pad), seed);
    });
}

/// Mostly 3x3 with stride 1, at least 32 channels and room for several squares: by minimal filtering on the CPU.
fn any_larger_shape<D: Tested<T>, T: Element>() {
    let shapes = ([1..3usize, 4..12, 4..12], [32..72usize, 32..72], any::<u64>());
    for_any::<D, _>(32, shapes, |(image, channels, seed)| {
        check::<D, T>(conv(image, channels, [3, 3], 1, 1), seed);
    });
}

/// Channels in chunks of eight, filters up to 3x3 with stride 1 or 2.
fn any_chunks<D: Tested<T>, T: Element>() {
    let shapes = ([1..4usize, 1..9, 1..9], [1..18usize, 1..18], (1..3usize, 0..2usize), any::<u64>());
    for_any::<D, _>(32, shapes, |(image, channels, (stride, pad), seed)| {
        check::<D, T>(conv(image, channels.map(|chunks| 8 * chunks), [2 * pad + 1; 2], stride, pad), seed);
    });
}

/// Devices that read whole chunks of channels look at the addresses first.
fn a_view_may_start_anywhere<D: Tested<T>, T: Element>() {
    let dims = conv([1, 3, 4], [16, 8], [3, 3], 1, 1);
    let (device, operand, mut draws) = (D::get(), D::operand_epsilon::<T>(), Draws::new(8));
    let layer = Layer::<T>::draw(dims, &mut draws);
    let want = oracle_forward::<D, T>(&layer, None);
    let norm = Guarded::new(device, &layer.norm);
    for [x_at, w_at, y_at] in [[1, 0, 0], [0, 3, 0], [0, 0, 1]] {
        let (x, w) = (behind(device, &layer.x, x_at), behind(device, &layer.w, w_at));
        let mut y = Guarded::poisoned(device, y_at + dims.len_out());
        let args = Forward {
            dims,
            x: D::view(&x, x_at..D::len(&x)),
            norm: norm.view(),
            w: D::view(&w, w_at..D::len(&w)),
            residual: None,
            y: D::split_at(y.view_mut(), y_at).1,
            stats: None,
        };
        device.norm_relu_conv_forward(args).expect("dims and lengths fit");
        let y = y.read(device).split_off(y_at);
        assert_close_products::<T::Wide, _>("y", &y, &want, 9 * dims.c + 3, operand);
    }
}

/// Outputs about 1000: a few units in the last place apart, and all the same, where a sum of all of them is off by more than
/// the mean may be.
fn statistics_keep_their_digits_far_from_zero<D: Tested<T>, T: Element>() {
    let (dims, mut draws) = (conv([1, 10, 17], [8, 136], [1, 1], 1, 0), Draws::new(9));
    let row = |value: f64| vec![stored::<T::Wide>(value); dims.c];
    let norm = [row(0.0), row(1.0), row(f64::powi(2.0, -10)), row(125.0)].concat();
    let w = draws.uniform(dims.len_filter(), 0.5, 1.5);
    for x in [draws.values(dims.len_in()), vec![stored(1.0); dims.len_in()]] {
        let layer = Layer::<T> { dims, x, norm: norm.clone(), w: w.clone() };
        let (y, stats) = forward(D::get(), &layer, None);
        assert_stats(D::get(), &y, dims.k, &stats);
    }
}

#[test]
fn gradient() {
    for dims in [
        conv([2, 4, 3], [2, 3], [3, 3], 1, 1),
        conv([1, 5, 4], [2, 3], [3, 3], 2, 1),
        conv([2, 3, 4], [3, 2], [1, 1], 2, 0),
    ] {
        let (c, mut draws) = (dims.c, Draws::new(2));
        // Inputs are odd multiples of 1/32: with these scales and shifts, 1/64 from the ReLU's kink.
        let x = draws.distinct::<f64>(dims.len_in());
        let scale = (0..c).map(|i| [-0.5, 1.0, 0.5][i]);
        let shift = (0..c).map(|i| [0.25, -0.5, 0.0][i]);
        let norm: Vec<_> = draws.values::<f64>(2 * c).into_iter().chain(scale).chain(shift).collect();
        let layer = Layer { dims, x, norm, w: draws.values(dims.len_filter()) };
        let dy = draws.values::<f64>(dims.len_out());
        let loss = |layer: &Layer<f64>| {
            oracle_forward::<Cpu, _>(layer, None).into_iter().zip(&dy).map(|(y, dy)| y.times(*dy)).sum::<Exact>()
        };
        let roundings = dims.len_out() + dims.r * dims.s * c + 4;
        let plain = HostGrad::Plain(dy.clone());

        let (dz, _) = backward_data(cpu(), &layer, &plain, None);
        let dx: Vec<_> = dz.iter().enumerate().map(|(i, dz)| dz * layer.norm[2 * c + i % c]).collect();
        assert_gradient("dx", &dx, &layer.x, roundings, |x| loss(&Layer { x: x.to_vec(), ..layer.clone() }));
        let dw = backward_filter(cpu(), &layer, &plain);
        assert_gradient("dw", &dw, &layer.w, roundings, |w| loss(&Layer { w: w.to_vec(), ..layer.clone() }));
    }
}

/// Tables of choices, which GPUs alone have.
mod on_cuda_by_a_table {
    use super::*;
    use crate::cuda::{Choices, Misfit};
    use crate::{Choice, Cuda, Profile};
    use half::bf16;
    use std::collections::{BTreeMap, BTreeSet};
    use std::sync::mpsc;

    const PASS: &str = "norm_relu_conv_backward_filter";

    fn layer() -> (Layer<bf16>, HostGrad<bf16>) {
        let mut draws = Draws::new(12);
        let layer = Layer::draw(conv([9, 16, 16], [64, 72], [1, 1], 1, 0), &mut draws);
        let [_, dy] = layer.gradients(&mut draws);
        (layer, dy)
    }

    /// The gradient, and by which kernel.
    fn run(device: &Cuda, layer: &Layer<bf16>, dy: &HostGrad<bf16>) -> (Vec<f32>, Choice) {
        let device = device.profiled();
        let dw = backward_filter(&device, layer, dy);
        let choice = device.calls().expect("it is done").pop().and_then(|call| call.choice);
        (dw, choice.expect("several kernels take it"))
    }

    fn table(shape: &str, named: &str) -> Choices {
        Choices::Table(BTreeMap::from([(PASS.into(), BTreeMap::from([(shape.into(), named.into())]))]))
    }

    #[test]
    #[ignore = "takes a CUDA device, or the emulator"]
    fn the_named_variant_is_taken_and_its_bits_stay() {
        let (layer, dy) = layer();
        let (by_rule, Choice { shape, variants, .. }) = run(&Cuda::own(), &layer, &dy);
        assert_eq!(shape, "bf16 1x1 64->72 at 16x16, 9 images, affine gradient");
        let mut all = BTreeSet::new();
        for (number, named) in variants.iter().enumerate() {
            let run = || {
                let by_table = Cuda::own().with_choices(table(&shape, named), |misfit| panic!("{misfit:?}"));
                run(&by_table, &layer, &dy)
            };
            let ((dw, choice), (again, _)) = (run(), run());
            assert_eq!((choice.taken, &choice.variants), (number, &variants));
            assert_filter_gradient::<Cuda, _>(&layer, &dy, &dw);
            assert!(bits(&dw) == bits(&again), "{named}");
            assert!(number > 0 || bits(&dw) == bits(&by_rule), "the rule's is the first");
            all.insert(bits(&dw));
        }
        assert!(all.len() > 1, "sums that are cut in another way are rounded in another way");
    }

    #[test]
    #[ignore = "takes a CUDA device, or the emulator"]
    fn a_name_that_is_no_variants_leaves_it_to_the_rule_and_is_told_once() {
        let (layer, dy) = layer();
        let (by_rule, Choice { shape, .. }) = run(&Cuda::own(), &layer, &dy);
        let (tell, told) = mpsc::channel();
        let named = "norm_relu_conv_backward_filter_of_yesterday";
        let device = Cuda::own().with_choices(table(&shape, named), move |misfit| {
            tell.send(misfit).expect("it is listened to");
        });
        for _ in 0..2 {
            let (dw, choice) = run(&device, &layer, &dy);
            assert_eq!(choice.taken, 0);
            assert!(bits(&dw) == bits(&by_rule));
        }
        drop(device);
        let misfit = Misfit { pass: PASS, shape, named: named.into() };
        assert_eq!(told.into_iter().collect::<Vec<_>>(), [misfit]);
    }
}

/// A layer of ones: `relu(scale * x + shift)` is `shift` everywhere.
fn shifted(dims: ConvDims, shift: f32) -> Layer<f32> {
    let norm = [0.0, 1.0, 1.0, shift].iter().flat_map(|&row| vec![row; dims.c]).collect();
    Layer { dims, x: vec![0.0; dims.len_in()], norm, w: vec![1.0; dims.len_filter()] }
}

fn a_padded_tap_contributes_nothing<D: Tested<f32>>() {
    // On 2x2 pixels four taps of nine lie inside at each pixel; each corner tap is inside at one pixel, each side's at
    // two, the middle one at four.
    let layer = shifted(conv([1, 2, 2], [3, 2], [3, 3], 1, 1), 1024.0);
    let (y, _) = forward(D::get(), &layer, None);
    assert_eq!(y, [4.0 * 3.0 * 1024.0; 8]);
    let dw = backward_filter(D::get(), &layer, &HostGrad::Plain(vec![1.0; 8]));
    let pixels = [1, 2, 1, 2, 4, 2, 1, 2, 1].iter().flat_map(|&pixels| [1024.0 * pixels as f32; 3]);
    assert_eq!(dw, pixels.clone().chain(pixels).collect::<Vec<_>>());
}

fn no_gradient_passes_at_zero<D: Tested<f32>>() {
    let dy = HostGrad::Plain(vec![1.0; 8]);
    for (shift, want) in [(0.0, 0.0), (-1.0, 0.0), (f32::MIN_POSITIVE, 8.0)] {
        let (dz, _) = backward_data(D::get(), &shifted(conv([1, 2, 2], [3, 2], [3, 3], 1, 1), shift), &dy, None);
        assert_eq!(dz, [want; 12], "shift {shift}");
    }
}

/// The middle of a 5x5 map with 3x3 taps, of 17 channels in and 35 out.
const MIDDLE: usize = 12;

fn five_by_five() -> (Layer<f32>, Vec<f32>) {
    let (dims, mut draws) = (conv([1, 5, 5], [17, 35], [3, 3], 1, 1), Draws::new(3));
    (Layer::draw(dims, &mut draws), draws.values(dims.len_out()))
}

/// Whether a pixel is the middle one or touches it.
fn near_the_middle(pixel: usize) -> bool {
    (pixel / 5).abs_diff(2) <= 1 && (pixel % 5).abs_diff(2) <= 1
}

fn assert_nan_where<W: Wide>(what: &str, values: &[W], expected: impl Fn(usize) -> bool) {
    for (i, value) in values.iter().enumerate() {
        assert_eq!(value.is_nan(), expected(i), "{what}[{i}] = {value}");
    }
}

fn assert_stats_nan<M: Memory, W: Wide>(device: &M, stats: &Partials<M, W>) {
    let MergedStats { mean, squares, .. } = merge_stats(device, stats);
    assert!(mean.iter().chain(&squares).all(|x| x.is_nan()));
}

fn a_nan_of_the_input_reaches_every_output_that_reads_it<D: Tested<f32>>() {
    let (mut layer, dy) = five_by_five();
    let (c, k) = (17, 35);
    layer.x[MIDDLE * c + 4] = f32::NAN;
    let (y, stats) = forward(D::get(), &layer, None);
    assert_nan_where("y", &y, |i| near_the_middle(i / k));
    assert_stats_nan(D::get(), &stats);
    let dy = HostGrad::Plain(dy);
    let dw = backward_filter(D::get(), &layer, &dy);
    assert_nan_where("dw", &dw, |i| i % c == 4);
    // Here the mask lets the gradient pass, and only the sum of `dz * xhat` sees the NaN.
    let want = oracle_backward_data(&layer, &oracle_products::<D, _>(&layer, &dy.oracle(k)), None);
    let (dz, sums) = backward_data(D::get(), &layer, &dy, None);
    assert!(dz[MIDDLE * c + 4] != 0.0);
    assert_close::<f32, _>("dz", &dz, &want, 9 * k + 2);
    let (sums, _) = merge_sums(D::get(), &sums);
    assert!((0..2 * c).all(|i| sums[i].is_nan() == (i == c + 4)));
}

fn a_nan_of_the_filter_reaches_its_outputs<D: Tested<f32>>() {
    let (mut layer, dy) = five_by_five();
    let (c, k, tap) = (17, 35, 4);
    layer.w[(20 * 9 + tap) * c + 4] = f32::NAN;
    let (y, _) = forward(D::get(), &layer, None);
    assert_nan_where("y", &y, |i| i % k == 20);
    let z = layer.z();
    let (dz, _) = backward_data(D::get(), &layer, &HostGrad::Plain(dy), None);
    assert_nan_where("dz", &dz, |i| i % c == 4 && z[i] > 0.0);
}

fn a_nan_of_the_gradient_reaches_what_it_touches<D: Tested<f32>>() {
    let (layer, mut dy) = five_by_five();
    let (c, k) = (17, 35);
    dy[MIDDLE * k + 20] = f32::NAN;
    let dy = HostGrad::Plain(dy);
    let z = layer.z();
    let (dz, _) = backward_data(D::get(), &layer, &dy, None);
    assert_nan_where("dz", &dz, |i| near_the_middle(i / c) && z[i] > 0.0);
    let dw = backward_filter(D::get(), &layer, &dy);
    assert_nan_where("dw", &dw, |i| i / (9 * c) == 20);
    let pointwise = Layer::draw(conv([1, 5, 5], [17, 35], [1, 1], 1, 0), &mut Draws::new(4));
    assert_nan_where("dx", &projection(D::get(), &pointwise, &dy), |i| i / c == MIDDLE);
}

/// The same of `y` and `dz` where devices take whole chunks of channels.
fn a_nan_goes_no_further_in_whole_chunks<D: Tested<T>, T: Element>() {
    let (c, k, nan) = (16, 8, stored::<T>(f64::NAN));
    for filter in [1, 3] {
        let (dims, mut draws) = (conv([1, 5, 5], [c, k], [filter; 2], 1, filter / 2), Draws::new(10));
        let touched = |pixel: usize| if filter == 1 { pixel == MIDDLE } else { near_the_middle(pixel) };
        let mut layer = Layer::<T>::draw(dims, &mut draws);
        for mut dy in layer.gradients(&mut draws) {
            let (HostGrad::Plain(values) | HostGrad::Affine { x: values, .. }) = &mut dy;
            values[MIDDLE * k + 5] = nan;
            let z = layer.z();
            let (dz, _) = backward_data(D::get(), &layer, &dy, None);
            assert_nan_where("dz", &exact(&dz), |i| touched(i / c) && z[i] > 0.0);
        }
        layer.x[MIDDLE * c + 4] = nan;
        let (y, stats) = forward(D::get(), &layer, None);
        assert_nan_where("y", &exact(&y), |i| touched(i / k));
        assert_stats_nan(D::get(), &stats);
        let dy = HostGrad::Plain(vec![stored(1.0); dims.len_out()]);
        let (dz, sums) = backward_data(D::get(), &layer, &dy, None);
        assert!(exact(&dz)[MIDDLE * c + 4] != 0.0, "the mask lets the gradient pass");
        let (sums, _) = merge_sums(D::get(), &sums);
        assert!((0..2 * c).all(|i| sums[i].is_nan() == (i == c + 4)));
    }
}

#[test]
fn a_nan_reaches_at_most_one_pixel_more_by_minimal_filtering() {
    let (dims, middle, mut draws) = (conv([1, 8, 8], [33, 35], [3, 3], 1, 1), 3 * 8 + 3, Draws::new(6));
    assert!(Cpu::filters_minimally(&dims));
    let mut layer = Layer::<f32>::draw(dims, &mut draws);
    let mut dy = draws.values::<f32>(dims.len_out());
    let (c, k, z) = (dims.c, dims.k, layer.z());
    let distance = |pixel: usize| (pixel / 8).abs_diff(3).max((pixel % 8).abs_diff(3));
    let assert_spread = |what: &str, values: &[f32], channels: usize, live: &dyn Fn(usize) -> bool| {
        for (i, value) in values.iter().enumerate().filter(|(i, _)| live(*i)) {
            match distance(i / channels) {
                0 | 1 => assert!(value.is_nan(), "{what}[{i}] = {value}"),
                2 => {}
                _ => assert!(value.is_finite(), "{what}[{i}] = {value}"),
            }
        }
    };

    dy[middle * k + 20] = f32::NAN;
    let grad = HostGrad::Plain(dy);
    let (dz, _) = backward_data(cpu(), &layer, &grad, None);
    assert_spread("dz", &dz, c, &|i| z[i] > 0.0);
    assert!(dz.iter().zip(&z).all(|(&dz, &z)| z > 0.0 || dz == 0.0), "the mask stops it");
    assert_nan_where("dw", &backward_filter(cpu(), &layer, &grad), |i| i / (9 * c) == 20);

    layer.x[middle * c + 4] = f32::NAN;
    let (y, stats) = forward(cpu(), &layer, None);
    assert_spread("y", &y, k, &|_| true);
    assert_stats_nan(cpu(), &stats);
    let plain = HostGrad::Plain(vec![1.0; dims.len_out()]);
    assert_nan_where("dw", &backward_filter(cpu(), &layer, &plain), |i| i % c == 4);

    layer = Layer::draw(dims, &mut Draws::new(7));
    layer.w[(20 * 9 + 4) * c + 4] = f32::NAN;
    let (y, _) = forward(cpu(), &layer, None);
    assert_nan_where("y", &y, |i| i % k == 20);
}

#[test]
fn bits_do_not_depend_on_threads() {
    for dims in [
        conv([3, 7, 7], [70, 72], [3, 3], 1, 1),
        conv([33, 8, 8], [17, 16], [3, 3], 1, 1),
        conv([3, 10, 9], [70, 72], [3, 3], 1, 1),
        conv([20, 8, 8], [35, 33], [3, 3], 1, 1),
    ] {
        let mut draws = Draws::new(5);
        let layer = Layer::<f32>::draw(dims, &mut draws);
        let [dy, _] = layer.gradients(&mut draws);
        let addend = HostAddend::draw(dims, 2, &mut draws);
        assert_same_on_any_threads(|cpu| {
            let (y, stats) = forward(cpu, &layer, None);
            let (dz, sums) = backward_data(cpu, &layer, &dy, Some(&addend));
            let dw = backward_filter(cpu, &layer, &dy);
            let [stats, sums] = [stats, sums].map(|partials| read_partials(cpu, &partials).1);
            [y, stats, dz, sums, dw].map(|values| bits(&values)).concat()
        });
    }
}

fn forward_refuses_what_does_not_fit<D: Tested<f32>>() {
    let dims = conv([2, 4, 4], [3, 5], [3, 3], 2, 1);
    let run = |dims, lens, k| {
        let [x, norm, w, residual, mut y] = buffers::<D, f32, 5>(lens);
        let mut stats = bare_room(D::get(), 8, k);
        let (x, norm, w, residual) = (x.view(), norm.view(), w.view(), Some(residual.view()));
        let (y, stats) = (y.view_mut(), Some(&mut stats));
        D::get().norm_relu_conv_forward(Forward { dims, x, norm, w, residual, y, stats })
    };
    assert_eq!(run(dims, [96, 12, 135, 40, 40], 5), Ok(()));
    assert_refuses_length(run(dims, [95, 12, 135, 40, 40], 5), "x");
    assert_refuses_length(run(dims, [96, 6, 135, 40, 40], 5), "norm");
    assert_refuses_length(run(dims, [96, 12, 15, 40, 40], 5), "w");
    assert_refuses_length(run(dims, [96, 12, 135, 41, 40], 5), "residual");
    assert_refuses_length(run(dims, [96, 12, 135, 40, 160], 5), "y");
    assert_refuses_dims(run(dims, [96, 12, 135, 40, 40], 4));
    assert_refuses_dims(run(ConvDims { stride: 0, ..dims }, [96, 12, 135, 40, 40], 5));
    assert_refuses_dims(run(ConvDims { n: 0, ..dims }, [0, 12, 135, 0, 0], 5));
    assert_refuses_dims(run(ConvDims { r: 7, ..dims }, [96, 12, 315, 0, 0], 5));
    assert_refuses_dims(run(ConvDims { pad: 3, ..dims }, [96, 12, 135, 160, 160], 5));
}

fn backward_data_refuses_what_does_not_fit<D: Tested<f32>>() {
    let dims = conv([2, 4, 4], [3, 5], [3, 3], 2, 1);
    let run = |stride, lens, c| {
        let [dy, w, x, norm, addend, mut dz] = buffers::<D, f32, 6>(lens);
        let mut sums = bare_room(D::get(), 32, c);
        let (dy, w, x, norm) = (Grad::Plain(dy.view()), w.view(), x.view(), norm.view());
        let addend = Some(Addend { values: addend.view(), stride });
        let (dz, sums) = (dz.view_mut(), &mut sums);
        D::get().norm_relu_conv_backward_data(BackwardData { dims, dy, w, x, norm, addend, dz, sums })
    };
    assert_eq!(run(2, [40, 135, 96, 12, 24, 96], 3), Ok(()));
    assert_eq!(run(1, [40, 135, 96, 12, 96, 96], 3), Ok(()));
    assert_refuses_length(run(2, [160, 135, 96, 12, 24, 96], 3), "dy");
    assert_refuses_length(run(2, [40, 134, 96, 12, 24, 96], 3), "w");
    assert_refuses_length(run(2, [40, 135, 24, 12, 24, 96], 3), "x");
    assert_refuses_length(run(2, [40, 135, 96, 6, 24, 96], 3), "norm");
    assert_refuses_length(run(2, [40, 135, 96, 12, 96, 96], 3), "addend");
    assert_refuses_length(run(2, [40, 135, 96, 12, 24, 24], 3), "dz");
    assert_refuses_dims(run(2, [40, 135, 96, 12, 24, 96], 2));
    assert_refuses_dims(run(0, [40, 135, 96, 12, 24, 96], 3));
}

fn projection_refuses_what_does_not_fit<D: Tested<f32>>() {
    let dims = conv([2, 4, 4], [3, 5], [1, 1], 2, 0);
    let run = |dims, lens| {
        let [dy, w, mut dx] = buffers::<D, f32, 3>(lens);
        let (dy, w, dx) = (Grad::Plain(dy.view()), w.view(), dx.view_mut());
        D::get().projection_backward_data(ProjectionBackwardData { dims, dy, w, dx })
    };
    assert_eq!(run(dims, [40, 15, 24]), Ok(()));
    assert_refuses_length(run(dims, [39, 15, 24]), "dy");
    assert_refuses_length(run(dims, [40, 16, 24]), "w");
    assert_refuses_length(run(dims, [40, 15, 96]), "dx");
    assert_refuses_dims(run(ConvDims { r: 3, s: 3, pad: 1, ..dims }, [40, 135, 24]));
}

fn backward_filter_refuses_what_does_not_fit<D: Tested<f32>>() {
    let dims = conv([2, 4, 4], [3, 5], [3, 3], 2, 1);
    let run = |lens| {
        let [x, norm, dz, y, coef, mut dw] = buffers::<D, f32, 6>(lens);
        let dy = Grad::Affine(Affine { dz: dz.view(), x: y.view(), coef: coef.view() });
        let (x, norm, dw) = (x.view(), norm.view(), dw.view_mut());
        D::get().norm_relu_conv_backward_filter(BackwardFilter { dims, x, norm, dy, dw })
    };
    assert_eq!(run([96, 12, 40, 40, 15, 135]), Ok(()));
    assert_refuses_length(run([97, 12, 40, 40, 15, 135]), "x");
    assert_refuses_length(run([96, 3, 40, 40, 15, 135]), "norm");
    assert_refuses_length(run([96, 12, 96, 40, 15, 135]), "dz");
    assert_refuses_length(run([96, 12, 40, 96, 15, 135]), "x (of the affine gradient)");
    assert_refuses_length(run([96, 12, 40, 40, 9, 135]), "coef");
    assert_refuses_length(run([96, 12, 40, 40, 15, 15]), "dw");
}

fn both_gradients_are_refused_before_one_is_written<D: Tested<f32>>() {
    let dims = conv([2, 4, 4], [3, 5], [3, 3], 2, 1);
    let run = |lens: [usize; 6]| {
        let [dy, w, x, norm, dz, dw] = lens;
        // No NaN, which in an output would look like what was never written.
        let [dy, w, x, norm] = [dy, w, x, norm].map(|len| Guarded::new(D::get(), &vec![1.0; len]));
        let [mut dz, mut dw] = buffers::<D, f32, 2>([dz, dw]);
        let mut sums = bare_room(D::get(), 32, 3);
        let (dy, w, x, norm) = (Grad::Plain(dy.view()), w.view(), x.view(), norm.view());
        let data = BackwardData { dims, dy, w, x, norm, addend: None, dz: dz.view_mut(), sums: &mut sums };
        let done = D::get().norm_relu_conv_backward(Backward { data, dw: dw.view_mut() });
        if done.is_err() {
            let written = [dz, dw].map(|gradient| gradient.read(D::get())).concat();
            assert!(bits(&written).iter().all(|&byte| byte == 0xFF), "written, though refused");
        }
        done
    };
    assert_eq!(run([40, 135, 96, 12, 96, 135]), Ok(()));
    assert_refuses_length(run([160, 135, 96, 12, 96, 135]), "dy");
    assert_refuses_length(run([40, 134, 96, 12, 96, 135]), "w");
    assert_refuses_length(run([40, 135, 24, 12, 96, 135]), "x");
    assert_refuses_length(run([40, 135, 96, 6, 96, 135]), "norm");
    assert_refuses_length(run([40, 135, 96, 12, 24, 135]), "dz");
    assert_refuses_length(run([40, 135, 96, 12, 96, 15]), "dw");
}

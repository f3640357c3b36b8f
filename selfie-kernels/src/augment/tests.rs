use super::*;
use crate::testing::*;
use ndarray::ArrayView4;
use proptest::prelude::any;

on_every_device! {
    elements: cases, any_shape;
    once: refuses_what_does_not_fit;
}

/// (name, dims, row and column of the crop and mirrored or not, for each image)
const CASES: &[(&str, AugmentDims, &[[i32; 3]])] = &[
    ("one pixel", dims(1, [1, 1], 1, 1), &[[0, 0, 0]]),
    ("whole image, mirrored", dims(2, [6, 6], 1, 6), &[[0, 0, 0], [0, 0, 1]]),
    ("several turns", dims(2, [50, 60], 1, 50), &[[0, 4, 0], [-3, 0, 1]]),
    ("patches", dims(2, [6, 6], 3, 2), &[[0, 0, 0], [0, 0, 1]]),
    ("crop inside an oblong image", dims(3, [9, 7], 2, 2), &[[0, 0, 0], [5, 3, 1], [2, 1, 0]]),
    ("crop over the edges", dims(4, [5, 5], 1, 5), &[[-2, 1, 0], [3, -4, 1], [-1, -1, 1], [4, 4, 0]]),
    ("crop beyond the image", dims(2, [4, 4], 2, 2), &[[i32::MIN, i32::MAX, 1], [4, 0, 0]]),
];
const MEAN: [f64; 3] = [0.485, 0.456, 0.406];
const STD: [f64; 3] = [0.229, 0.224, 0.225];

const fn dims(n: usize, [h, w]: [usize; 2], grid: usize, patch: usize) -> AugmentDims {
    AugmentDims { n, h, w, grid, patch }
}

fn augment<T: Element, B: Augment<T>>(
    device: &B,
    dims: AugmentDims,
    images: &[u8],
    draws: &[[i32; 3]],
    (mean, std): ([f64; 3], [f64; 3]),
) -> Vec<T> {
    let (images, draws) = (Guarded::new(device, images), Guarded::new(device, &draws.concat()));
    let mut x = Guarded::poisoned(device, dims.len_out());
    let args = Args { dims, images: images.view(), draws: draws.view(), mean, std, x: x.view_mut() };
    device.augment(args).expect("dims and lengths fit");
    x.read(device)
}

/// In the order of the definition: crop, mirror, normalise, and cut.
fn oracle(dims: AugmentDims, images: &[u8], draws: &[[i32; 3]]) -> Vec<Exact> {
    let AugmentDims { n, h, w, grid, patch } = dims;
    let images = ArrayView4::from_shape((n, h, w, 3), images).expect("length of images");
    let side = grid * patch;
    let crop = ndarray::Array4::from_shape_fn((n, side, side, 3), |(n, i, j, k)| {
        let [top, left, mirrored] = draws[n].map(i64::from);
        let j = if mirrored == 1 { side - 1 - j } else { j };
        let (row, column) = (top + i as i64, left + j as i64);
        let inside = (0..h as i64).contains(&row) && (0..w as i64).contains(&column);
        let byte = if inside { images[[n, row as usize, column as usize, k]] } else { 0 };
        [f64::from(byte) / 255.0, -MEAN[k]].into_iter().sum::<Exact>().times(1.0 / STD[k])
    });
    let patches = ndarray::indices((n, grid, grid, patch, patch)).into_iter();
    let pixel = |(n, row, column, i, j)| crop.slice(ndarray::s![n, row * patch + i, column * patch + j, ..]).to_vec();
    patches.flat_map(pixel).collect()
}

fn check<T: Element>(device: &impl Augment<T>, dims: AugmentDims, draws: &[[i32; 3]], seed: u64) {
    let mut bytes = Draws::new(seed);
    let images: Vec<u8> = (0..dims.n * dims.h * dims.w * 3).map(|_| bytes.word() as u8).collect();
    let x = augment(device, dims, &images, draws, (MEAN, STD));
    // The constants, the quotient, the difference, the quotient.
    assert_close::<T::Wide, _>("x", &x, &oracle(dims, &images, draws), 6);
}

fn cases<D: Tested<T>, T: Element>() {
    for &(name, dims, draws) in CASES {
        eprintln!("{}: {name}", T::NAME);
        check::<T>(D::get(), dims, draws, 1);
    }
}

fn any_shape<D: Tested<T>, T: Element>() {
    let crops = proptest::collection::vec([-5..12i32, -5..12i32, 0..2i32], 1..4);
    let shapes = ([1..9usize, 1..9usize], 1..4usize, 1..4usize, crops, any::<u64>());
    for_any::<D, _>(256, shapes, |(extents, grid, patch, draws, seed)| {
        check::<T>(D::get(), dims(draws.len(), extents, grid, patch), &draws, seed);
    });
}

#[test]
fn a_small_image_by_hand() {
    // Rows 0 to 3, columns 0 to 3; red counts through the pixels, green and blue are full.
    let image: Vec<u8> = (0..16).flat_map(|i| [i, 255, 255]).collect();
    let plain = ([0.0; 3], [1.0 / 255.0, 1.0, 0.5]);
    let run = |draw| augment::<f64, _>(cpu(), dims(1, [4, 4], 2, 2), &image, &[draw], plain);
    let x = run([0, 0, 0]);
    let reds = |x: &[f64]| x.iter().step_by(3).map(|x| x.round() as i32).collect::<Vec<_>>();
    assert_eq!(reds(&x), [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]);
    assert!(x.chunks(3).all(|pixel| pixel[1..] == [1.0, 2.0]));
    assert_eq!(reds(&run([0, 0, 1])), [3, 2, 7, 6, 1, 0, 5, 4, 11, 10, 15, 14, 9, 8, 13, 12]);
    assert_eq!(reds(&run([-1, 1, 0])), [0, 0, 1, 2, 0, 0, 3, 0, 5, 6, 9, 10, 7, 0, 11, 0]);
    assert_eq!(reds(&run([-1, 1, 1])), [0, 0, 0, 3, 0, 0, 2, 1, 0, 7, 0, 11, 6, 5, 10, 9]);
}

#[test]
fn bits_do_not_depend_on_threads() {
    let (dims, mut draws) = (dims(7, [12, 12], 3, 4), Draws::new(2));
    let images: Vec<u8> = (0..7 * 12 * 12 * 3).map(|_| draws.word() as u8).collect();
    let crops: Vec<_> = (0..7).map(|i| [draws.below(5) as i32 - 2, draws.below(5) as i32 - 2, i % 2]).collect();
    assert_same_on_any_threads(|cpu| bits(&augment::<f32, _>(cpu, dims, &images, &crops, (MEAN, STD))));
}

fn refuses_what_does_not_fit<D: Tested<f32>>() {
    let good = dims(2, [4, 5], 2, 2);
    let run = |dims, std, images, draws, x| {
        let ([images], [draws], [mut x]) =
            (buffers::<D, _, _>([images]), buffers::<D, _, _>([draws]), buffers::<D, f32, 1>([x]));
        let (images, draws, x) = (images.view(), draws.view(), x.view_mut());
        D::get().augment(Args { dims, images, draws, mean: MEAN, std, x })
    };
    assert_eq!(run(good, STD, 120, 6, 96), Ok(()));
    assert_refuses_length(run(good, STD, 119, 6, 96), "images");
    assert_refuses_length(run(good, STD, 120, 2, 96), "draws");
    assert_refuses_length(run(good, STD, 120, 6, 120), "x");
    assert_refuses_dims(run(dims(2, [4, 5], 0, 2), STD, 120, 6, 0));
    assert_refuses_dims(run(dims(2, [0, 5], 2, 2), STD, 0, 6, 96));
    for std in [0.0, -1.0, f64::NAN] {
        assert_refuses_dims(run(good, [1.0, std, 1.0], 120, 6, 96));
    }
}

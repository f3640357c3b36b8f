//! Real data, where they are: the folder of `SELFIE_DATA`, or `../shared/data` beside the workspace.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use selfie_data::{
    Augment, Dataset, Draws, EpochStream, EvalLoader, Geometry, LabelBudget, LoaderConfig, Need, Purpose, Split,
    TrainLoader, open,
};

struct Counted(u64);

impl Draws for Counted {
    fn words(&self, purpose: Purpose, sample: u64, block: u32) -> [u32; 4] {
        let mut x = self.0 ^ sample.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(block) << 8 ^ purpose as u64;
        std::array::from_fn(|_| {
            x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9).wrapping_add(1);
            (x >> 32) as u32
        })
    }
}

fn seeded(seed: u64) -> Arc<dyn Draws> {
    Arc::new(Counted(seed))
}

fn data(name: &str) -> PathBuf {
    let beside = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data");
    Path::new(&std::env::var("SELFIE_DATA").unwrap_or(beside.into())).join(name)
}

fn both(name: &str) -> [Arc<dyn Dataset>; 2] {
    let [train, test] = [Split::Train, Split::Test]
        .map(|split| open(&data(name), split, Need::Labels, &seeded).unwrap_or_else(|error| panic!("{error}")));
    assert_eq!(train.classes(), test.classes());
    [train, test]
}

fn per_class(data: &dyn Dataset) -> Vec<usize> {
    let mut counts = vec![0; data.classes().len()];
    (0..data.len()).for_each(|index| counts[data.label(index).expect("labelled") as usize] += 1);
    counts
}

#[test]
#[ignore = "needs SELFIE_DATA"]
fn cifar_10_is_the_published_one() {
    let [train, test] = both("cifar-10-binary.tar.gz");
    assert_eq!((train.len(), test.len()), (50_000, 10_000));
    assert_eq!((per_class(&*train), per_class(&*test)), (vec![5_000; 10], vec![1_000; 10]));
    let names = "airplane automobile bird cat deer dog frog horse ship truck";
    assert_eq!(train.classes().join(" "), names);
    assert_eq!(train.geometry(), Geometry::Fixed { height: 32, width: 32 });
    // The first image is a frog, the first of the test a cat.
    assert_eq!((train.label(0), train.key(0).as_str()), (Some(6), "data_batch_1.bin:0"));
    assert_eq!((test.label(0), test.key(9_999).as_str()), (Some(3), "test_batch.bin:9999"));
    assert_eq!(train.key(49_999), "data_batch_5.bin:9999");
    // The published means of the training images, per channel: 125.307, 122.950, 113.865.
    let mut sums = [0u64; 3];
    for index in 0..train.len() {
        for pixel in train.read(index).expect("in memory").pixels.chunks(3) {
            sums.iter_mut().zip(pixel).for_each(|(sum, &value)| *sum += u64::from(value));
        }
    }
    let means = sums.map(|sum| (sum as f64 / (50_000.0 * 1_024.0) * 1_000.0).round() / 1_000.0);
    assert_eq!(means, [125.307, 122.950, 113.865]);
    // The upper left pixel of the first image, as every reader of CIFAR shows it.
    assert_eq!(train.read(0).expect("in memory").pixels[..3], [59, 62, 63]);

    let five: LabelBudget = "5%".parse().expect("well formed");
    assert_eq!(five.select(&*train, &seeded).expect("labelled").len(), 2_500);
}

#[test]
#[ignore = "needs SELFIE_DATA"]
fn photographs_from_a_tar() {
    let [train, test] = both("imagenette-224.tar");
    assert_eq!((train.len(), test.len()), (1_200, 600));
    assert_eq!((per_class(&*train), per_class(&*test)), (vec![120; 10], vec![60; 10]));
    assert_eq!(train.key(0), "train/n01440764/ILSVRC2012_val_00000293.JPEG");
    for index in (0..test.len()).step_by(7) {
        let image = test.read(index).expect("a good JPEG");
        assert_eq!((image.height, image.width, image.pixels.len()), (224, 224, 224 * 224 * 3));
    }

    let stream = Arc::new(EpochStream::over_all(train.len(), seeded(0)).expect("not empty"));
    let batches = |workers| {
        let config = LoaderConfig { workers, max_bad: 0.0, ..LoaderConfig::new(16, 96) };
        let made = TrainLoader::new(train.clone(), stream.clone(), seeded(0), Augment::Train, config, 5);
        let mut loader = made.expect("a good configuration");
        (0..4).map(|_| loader.next_batch().expect("no bad images")).collect::<Vec<_>>()
    };
    assert_eq!(batches(1), batches(3));

    let config = LoaderConfig { workers: 2, max_bad: 0.0, ..LoaderConfig::new(64, 224) };
    let mut loader =
        EvalLoader::new(test.clone(), (0..test.len()).collect(), seeded(0), config).expect("a good configuration");
    let mut seen = 0;
    while let Some(batch) = loader.next_batch().expect("no bad images") {
        seen += batch.valid;
        loader.recycle(batch);
    }
    assert_eq!((seen, loader.bad_files().len()), (600, 0));
}

//! The encoder against the networks whose layers it has: the same features, whatever is beside an image in its batch.

use safetensors::tensor::SafeTensors;
use selfie_data::{Dataset, Geometry, Image};
use selfie_kernels::{Backend, Cpu, Element};
use selfie_model::{
    About, Begin, Build, Classifier, Classify, Encoder, EncoderLayers, ErrorKind, Head, Images, Inputs, Layer, Mode,
    ModelConfig, Network, Pooling, Preset, Purpose, Selfie, write_weights,
};
use std::path::Path;
use std::sync::Arc;

/// Squares of noise without labels, one of which may be unreadable.
struct Noise {
    side: usize,
    pixels: Vec<u8>,
    bad: Option<usize>,
}

impl Noise {
    fn new(side: usize, count: usize) -> Self {
        let mut state = 1u32;
        let pixels = (0..count * side * side * 3).map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        });
        Self { side, pixels: pixels.collect(), bad: None }
    }

    fn image(&self, index: usize) -> &[u8] {
        let bytes = self.side * self.side * 3;
        &self.pixels[index * bytes..][..bytes]
    }
}

impl Dataset for Noise {
    fn len(&self) -> usize {
        self.pixels.len() / (self.side * self.side * 3)
    }
    fn describe(&self) -> String {
        "noise".into()
    }
    fn classes(&self) -> &[String] {
        &[]
    }
    fn label(&self, _: usize) -> Option<u32> {
        None
    }
    fn geometry(&self) -> Geometry {
        Geometry::Fixed { height: self.side, width: self.side }
    }
    fn key(&self, index: usize) -> String {
        format!("noise {index}")
    }
    fn read(&self, index: usize) -> selfie_data::Result<Image> {
        if self.bad == Some(index) {
            return Err(selfie_data::Error::BadImage { key: self.key(index), reason: "torn".into() });
        }
        Ok(Image { height: self.side, width: self.side, pixels: self.image(index).to_vec() })
    }
}

fn images(noise: Noise) -> Images {
    let items = (0..noise.len()).collect();
    Images { dataset: Arc::new(noise), items, workers: 1, max_bad: 0.5 }
}

fn cpu(threads: usize) -> Cpu {
    Cpu::new(threads).expect("threads")
}

/// Running statistics that are not those of the beginning, and differ from channel to channel.
fn disturb<T: Element>(network: &mut impl Network<Cpu, T>)
where
    Cpu: Backend<T>,
{
    use selfie_kernels::Wide;
    let statistics = network.statistics_mut();
    for entry in statistics.table.entries().to_vec() {
        // Means near 0: far above, ReLU would leave nothing to compare.
        let least = if entry.name.ends_with("running_mean") { -0.5 } else { 0.5 };
        for i in entry.range {
            statistics.running[i] = T::Wide::from_f64(least + (i * 37 % 100) as f64 / 100.0);
        }
    }
}

/// Index, features and scores of each image.
type All = Vec<(usize, Vec<f32>, Vec<f32>)>;

/// What the weights in `folder` make of images.
fn encode<T: Element>(folder: &Path, config: &ModelConfig, batch: usize, threads: usize, images: &Images) -> All
where
    Cpu: Backend<T>,
{
    let layer = EncoderLayers::of(folder).expect("weights").last();
    encode_at(layer, folder, config, batch, threads, images)
}

/// The same at a layer.
fn encode_at<T: Element>(
    layer: Layer,
    folder: &Path,
    config: &ModelConfig,
    batch: usize,
    threads: usize,
    images: &Images,
) -> All
where
    Cpu: Backend<T>,
{
    let layers = EncoderLayers::of(folder).expect("weights");
    let build = Build { config, batch, purpose: Purpose::Evaluate, seed: 99 };
    let mut encoder = Encoder::<Cpu, T>::new(cpu(threads), build, layers, layer).expect("a sound network");
    let loaded = encoder.load(folder).expect("its own weights");
    assert!(loaded.fresh.is_empty() && loaded.unused.is_empty());
    let mut found = Vec::new();
    encoder
        .encode(images, |image| found.push((image.index, image.features.to_vec(), image.scores.to_vec())))
        .expect("no image fails the device");
    found
}

/// As many images as a classifier takes at once, and what it makes of them.
fn classified<T: Element>(head: Head) -> (tempfile::TempDir, ModelConfig, All)
where
    Cpu: Backend<T>,
{
    const N: usize = 7;
    let config = ModelConfig { head, ..ModelConfig::preset(Preset::Tiny, 32) };
    let build = Build { config: &config, batch: N, purpose: Purpose::Evaluate, seed: 3 };
    let mut network = Classifier::<Cpu, T>::new(cpu(1), build, 5).expect("a sound network");
    disturb(&mut network);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let classes = ["a", "b", "c", "d", "e"].map(String::from);
    write_weights(&network, About { model: &config, classes: &classes }, folder.path()).expect("written");

    let noise = Noise::new(32, N);
    let (draws, targets) = ([0; 3 * N], [0; N]);
    let inputs = Inputs { images: &noise.pixels, draws: &draws, targets: &targets, first_sample: 0, valid: N };
    network.load(&inputs, Begin::Evaluation).expect("fits");
    network.forward(Mode::Evaluate).expect("forward");
    let narrow = |values: &[T]| values.iter().map(|&value| value.widen()).map(f32_of).collect::<Vec<_>>();
    let (features, scores) = (narrow(network.features()), narrow(network.logits()));
    let width = features.len() / N;
    let row = |i: usize| (i, features[i * width..][..width].to_vec(), scores[5 * i..][..5].to_vec());
    (folder, config, (0..N).map(row).collect())
}

fn f32_of(value: impl selfie_kernels::Wide) -> f32 {
    value.to_f64() as f32
}

#[test]
fn features_and_scores_are_the_classifiers() {
    for (head, stages, width) in [(Head::Conv, 4, 256), (Head::Attention, 3, 128)] {
        let (folder, config, expected) = classified::<f64>(head);
        assert_eq!(EncoderLayers::of(folder.path()).expect("weights"), EncoderLayers { stages, head, classes: 5 });
        assert_eq!(encode::<f64>(folder.path(), &config, 7, 1, &images(Noise::new(32, 7))), expected);
        // What is compared says something: images and channels differ, and the classifier is not zero.
        assert_eq!(expected[0].1.len(), width);
        assert_ne!(expected[0].1, expected[1].1);
        assert!(expected[0].1.iter().any(|&value| value != expected[0].1[0]) && expected[0].2[0] != 0.0);
    }
}

#[test]
fn neither_batch_nor_threads_matter() {
    for head in [Head::Conv, Head::Attention] {
        let (folder, config, expected) = classified::<f32>(head);
        for (batch, threads) in [(1, 1), (2, 3), (3, 1), (7, 2), (20, 3)] {
            let found = encode::<f32>(folder.path(), &config, batch, threads, &images(Noise::new(32, 7)));
            assert_eq!(found, expected, "{head:?}, a batch of {batch} on {threads} threads");
        }
    }
}

/// A pretrained network, an image, and the vectors `[16, 128]` that the network made of its patches.
fn pretrained<T: Element>() -> (tempfile::TempDir, ModelConfig, Noise, Vec<Vec<T>>)
where
    Cpu: Backend<T>,
{
    let config = ModelConfig::preset(Preset::Tiny, 32);
    let build = Build { config: &config, batch: 1, purpose: Purpose::Evaluate, seed: 4 };
    let mut network = Selfie::<Cpu, T>::new(cpu(1), build).expect("a sound network");
    disturb(&mut network);
    let folder = tempfile::tempdir().expect("a temporary folder");
    write_weights(&network, About { model: &config, classes: &[] }, folder.path()).expect("written");
    let whole = Noise::new(32, 1);
    let order: Vec<u32> = (0..16).collect();
    let inputs = Inputs { images: &whole.pixels, draws: &[0; 3], targets: &order, first_sample: 0, valid: 1 };
    network.load(&inputs, Begin::Evaluation).expect("fits");
    network.forward(Mode::Evaluate).expect("forward");
    let vectors = network.features().chunks(128).map(<[T]>::to_vec).collect();
    (folder, config, whole, vectors)
}

#[test]
fn a_patch_as_an_image_has_the_patch_networks_features() {
    let (folder, config, whole, expected) = pretrained::<f32>();
    // The 4 x 4 patches, row by row, as images of 8 x 8.
    let mut patches = Noise { side: 8, pixels: Vec::new(), bad: None };
    for patch in 0..16 {
        for y in 0..8 {
            let start = ((patch / 4 * 8 + y) * 32 + patch % 4 * 8) * 3;
            patches.pixels.extend(&whole.pixels[start..start + 8 * 3]);
        }
    }
    let small = ModelConfig { image_size: 8, ..config };
    let found = encode::<f32>(folder.path(), &small, 5, 2, &images(patches));
    assert_eq!(found.len(), 16);
    for (patch, features, scores) in found {
        assert_eq!((features, scores.len()), (expected[patch].clone(), 0), "patch {patch}");
    }
    assert_ne!(expected[0], expected[1]);
}

#[test]
fn a_pretrained_network_sees_an_image_patch_by_patch() {
    let (folder, config, whole, vectors) = pretrained::<f64>();
    let layers = EncoderLayers::of(folder.path()).expect("weights");
    let patches = Layer { pooling: Pooling::Patches, ..layers.last() };
    let mean = |j: usize| (vectors.iter().map(|vector| vector[j]).sum::<f64>() / 16.0) as f32;
    let expected: Vec<f32> = (0..128).map(mean).collect();
    let mut noise = Noise::new(32, 5);
    noise.pixels[..whole.pixels.len()].copy_from_slice(&whole.pixels);
    let noise = images(noise);
    let at = |layer, batch, threads| encode_at::<f64>(layer, folder.path(), &config, batch, threads, &noise);
    let all = at(patches, 5, 1);
    assert_eq!(all[0], (0, expected, Vec::new()));
    assert_ne!(all[0].1, all[1].1);
    assert_eq!(at(patches, 2, 3), all, "neither batch nor threads matter");
    // Whole images are something else, and so is an earlier stage.
    assert_ne!(at(layers.last(), 5, 1)[0].1, all[0].1);
    let earlier = Layer { stage: 2, ..patches };
    assert_eq!(at(earlier, 5, 1)[0].1.len(), config.channels(1));
    let build = Build { config: &config, batch: 1, purpose: Purpose::Evaluate, seed: 0 };
    for layer in [Layer { stage: 4, ..earlier }, Layer { pooling: Pooling::Attention, ..layers.last() }] {
        let refused = Encoder::<Cpu, f64>::new(cpu(1), build, layers, layer).expect_err("it has none such");
        assert_eq!(refused.kind(), ErrorKind::Usage);
    }
}

#[test]
fn an_unreadable_image_is_left_out_and_named() {
    let (folder, config, mut expected) = classified::<f32>(Head::Conv);
    let mut noise = Noise::new(32, 7);
    noise.bad = Some(2);
    assert_eq!(noise.image(2).len(), 3072);
    let images = images(noise);
    expected.remove(2);
    assert_eq!(encode::<f32>(folder.path(), &config, 3, 1, &images), expected);
    let build = Build { config: &config, batch: 3, purpose: Purpose::Evaluate, seed: 0 };
    let layers = EncoderLayers { stages: 4, head: Head::Conv, classes: 0 };
    let mut encoder = Encoder::<Cpu, f32>::new(cpu(1), build, layers, layers.last()).expect("a sound network");
    let bad = encoder.encode(&images, |_| ()).expect("one may be bad");
    assert_eq!(bad.iter().map(|file| (file.index, file.reason.as_str())).collect::<Vec<_>>(), [(2, "torn")]);
    // Without the head the weights have too much, and none of them is taken.
    assert_eq!(encoder.load(folder.path()).expect_err("a head").kind(), ErrorKind::Input);
    let none = Images { items: Vec::new(), ..images };
    assert_eq!(encoder.encode(&none, |_| ()).expect_err("no image").kind(), ErrorKind::Usage);
}

#[test]
fn an_untrained_encoder_is_what_training_begins_with() {
    let config = ModelConfig::preset(Preset::Tiny, 32);
    let build = Build { config: &config, batch: 4, purpose: Purpose::Evaluate, seed: 11 };
    let scratch = Classifier::<Cpu, f32>::new(cpu(1), build, 5).expect("a sound network");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let classes = ["a", "b", "c", "d", "e"].map(String::from);
    write_weights(&scratch, About { model: &config, classes: &classes }, folder.path()).expect("written");
    let expected = encode::<f32>(folder.path(), &config, 4, 1, &images(Noise::new(32, 7)));
    let layers = EncoderLayers { stages: 4, head: Head::Conv, classes: 0 };
    let mut untrained = Encoder::<Cpu, f32>::new(cpu(1), build, layers, layers.last()).expect("a sound network");
    let mut found = Vec::new();
    untrained.encode(&images(Noise::new(32, 7)), |image| found.push(image.features.to_vec())).expect("encodes");
    assert_eq!(found, expected.into_iter().map(|(_, features, _)| features).collect::<Vec<_>>());
}

/// The tensors of a file under other names; those without one are left out.
fn renamed(from: &Path, to: &Path, name: impl Fn(&str) -> Option<String>) {
    let bytes = std::fs::read(from).expect("written");
    let file = SafeTensors::deserialize(&bytes).expect("ours");
    let tensors = file.iter().filter_map(|(old, view)| Some((name(old)?, view)));
    std::fs::write(to, safetensors::serialize(tensors, None).expect("unique names")).expect("writable");
}

#[test]
fn an_earlier_layer_is_a_shorter_network() {
    let (folder, config, _) = classified::<f64>(Head::Conv);
    let whole = folder.path().join("model.safetensors");
    for stage in 1..4 {
        // The norm that takes the stage's output ends a network of so many stages.
        let short = folder.path().join(format!("short-{stage}.safetensors"));
        let next = format!("stages.{stage}.blocks.0.norm1.");
        renamed(&whole, &short, |name| match name.strip_prefix(&next) {
            Some(rest) => Some(format!("norm.{rest}")),
            None => {
                let of = name.strip_prefix("stages.").map_or(0, |rest| rest[..1].parse().expect("a stage"));
                (of < stage && !name.starts_with("norm.") && !name.starts_with("head.")).then(|| name.into())
            }
        });
        let expected = encode::<f64>(&short, &config, 3, 1, &images(Noise::new(32, 7)));
        let layer = Layer { stage, pooling: Pooling::Map };
        let found = encode_at::<f64>(layer, folder.path(), &config, 4, 2, &images(Noise::new(32, 7)));
        assert_eq!(found, expected, "stage {stage}");
        assert!(found[0].1 != found[1].1 && found[0].1.len() == config.channels(stage - 1));
    }
    let layers = EncoderLayers::of(folder.path()).expect("weights");
    for (stage, pooling) in [(5, Pooling::Map), (0, Pooling::Map), (4, Pooling::Patches)] {
        assert!(!layers.has(Layer { stage, pooling }), "{stage} {pooling:?}");
    }
}

#[test]
fn an_attention_pooling_is_a_layer_of_its_own() {
    let (folder, config, pooled) = classified::<f64>(Head::Attention);
    let layers = EncoderLayers::of(folder.path()).expect("weights");
    let at = |layer| encode_at::<f64>(layer, folder.path(), &config, 4, 2, &images(Noise::new(32, 7)));
    // The average over the map is what the backbone's file alone makes.
    let backbone = folder.path().join("backbone.safetensors");
    std::fs::copy(folder.path().join("model.safetensors"), &backbone).expect("copied");
    let average = Layer { stage: 3, pooling: Pooling::Map };
    assert_eq!(at(average), encode::<f64>(&backbone, &config, 3, 1, &images(Noise::new(32, 7))));
    assert_eq!(at(layers.last()), pooled);
    assert!(!layers.has(Layer { stage: 2, pooling: Pooling::Attention }));
}

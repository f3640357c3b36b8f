//! Weights from timm and for timm, with the full ResNet-50 v2. Python makes and checks the other side:
//!
//! ```text
//! export SELFIE_TIMM=/tmp/timm
//! python benches/pytorch/check_timm.py make $SELFIE_TIMM
//! cargo test -p selfie-model --test timm -- --ignored
//! python benches/pytorch/check_timm.py compare $SELFIE_TIMM/ours --expect $SELFIE_TIMM/ours/expected.json
//! python -c "import timm; timm.create_model('local-dir:$SELFIE_TIMM/patches', pretrained=True)"
//! cd $SELFIE_TIMM/small && sed -n '/^```python/,/^```$/p' README.md | grep -v '^```' | python
//! ```

use selfie_kernels::{Cpu, Memory, Wide};
use selfie_model::{
    About, Begin, Build, Classifier, Classify, Mode, ModelConfig, Network, Preset, Purpose, Selfie, load_weights,
    write_weights,
};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// How much further from f64 than PyTorch's f32 ours may be.
const F32_FACTOR: f64 = 4.0;

fn folder() -> PathBuf {
    PathBuf::from(std::env::var_os("SELFIE_TIMM").expect("SELFIE_TIMM is set when these tests are asked for"))
}

fn json_file(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Pixels `[n, h, w, 3]` of what `torch_selfie.py` calls `hashed_images`: see `fixtures/README.md`.
fn pixels(name: &str, [n, c, h, w]: [usize; 4]) -> Vec<f32> {
    let seed = name
        .bytes()
        .fold(0xCBF2_9CE4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3));
    let hashed = |i: u64| {
        let z = seed.wrapping_add((i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (((z ^ (z >> 31)) >> 48) as f32 - 32768.0) / 32768.0
    };
    let place = |i: usize| {
        let (image, row, column, channel) = (i / (h * w * c), i / (w * c) % h, i / c % w, i % c);
        ((image * c + channel) * h + row) * w + column
    };
    (0..n * c * h * w).map(|i| hashed(place(i) as u64)).collect()
}

fn network(classes: usize, seed: u64) -> Classifier<Cpu, f32> {
    let config = ModelConfig::preset(Preset::Resnet50, 224);
    let build = Build { config: &config, batch: 2, purpose: Purpose::Evaluate, seed };
    Classifier::new(Cpu::new(0).expect("threads"), build, classes).expect("a sound configuration")
}

fn logits(network: &mut Classifier<Cpu, f32>, images: &str) -> Vec<f64> {
    network.put_pixels(&pixels(images, [2, 3, 224, 224]), &[0; 2], 0).expect("two images");
    network.begin(Begin::Evaluation).expect("they were put");
    network.forward(Mode::Evaluate).expect("host memory");
    let mut logits = vec![0.0; 2 * network.classes()];
    Cpu::download(network.device(), network.logits(), &mut logits).expect("as many");
    logits.into_iter().map(Wide::to_f64).collect()
}

#[test]
#[ignore = "needs SELFIE_TIMM, a folder made by check_timm.py"]
fn timms_weights_give_timms_outputs() {
    let expected = json_file(&folder().join("expected.json"));
    let classes = json_file(&folder().join("config.json"))["num_classes"].as_u64().expect("a number") as usize;
    let mut network = network(classes, 0);
    let report = load_weights(&mut network, &folder()).expect("timm's resnetv2_50");
    assert!(report.fresh.is_empty() && report.unused.is_empty(), "{report:?}");

    let ours = logits(&mut network, expected["images"].as_str().expect("a name"));
    let rows = expected["outputs"].as_array().expect("rows");
    let theirs = rows.iter().flat_map(|row| row.as_array().expect("a row")).map(|x| x.as_f64().expect("a number"));
    let theirs: Vec<f64> = theirs.collect();
    assert_eq!(ours.len(), theirs.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let distance = norm(&mut ours.iter().zip(&theirs).map(|(a, b)| a - b)) / norm(&mut theirs.iter().copied());
    let allowed = F32_FACTOR * expected["f32_distance"].as_f64().expect("a number");
    println!("relative distance {distance:.3e}, allowed {allowed:.3e}");
    assert!(distance <= allowed, "{distance:e} > {allowed:e}");
}

#[test]
#[ignore = "needs SELFIE_TIMM, and writes there what check_timm.py compares"]
fn ours_are_written_for_timm() {
    let config = ModelConfig::preset(Preset::Resnet50, 224);
    let about = About { model: &config, classes: &[] };
    let mut classifier = network(10, 3);
    // Statistics that show a mix-up of means and variances.
    for (value, i) in classifier.statistics_mut().running.iter_mut().zip(0u32..) {
        *value += (i % 7) as f32 / 16.0;
    }
    write_weights(&classifier, about, &folder().join("ours")).expect("a writable folder");
    let outputs = logits(&mut classifier, "images/3");
    let rows: Vec<_> = outputs.chunks(10).collect();
    let expected = json!({ "images": "images/3", "shape": [2, 3, 224, 224], "outputs": rows });
    std::fs::write(folder().join("ours/expected.json"), expected.to_string()).expect("a writable folder");

    let build = Build { config: &config, batch: 1, purpose: Purpose::Evaluate, seed: 3 };
    let pretrained = Selfie::<Cpu, f32>::new(Cpu::new(0).expect("threads"), build).expect("a sound configuration");
    write_weights(&pretrained, about, &folder().join("patches")).expect("a writable folder");

    let config = ModelConfig::preset(Preset::Small, 32);
    let build = Build { config: &config, batch: 1, purpose: Purpose::Evaluate, seed: 3 };
    let small = Classifier::<Cpu, f32>::new(Cpu::new(0).expect("threads"), build, 10).expect("a sound configuration");
    write_weights(&small, About { model: &config, classes: &[] }, &folder().join("small")).expect("a writable folder");
}

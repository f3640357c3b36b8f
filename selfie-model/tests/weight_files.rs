//! Weight files: ours read back, another's taken in, and what does not fit.

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use selfie_kernels::{Backend, Cpu};
use selfie_model::{
    About, Build, CheckpointStore, Classifier, Entry, ErrorKind, Head, MODEL_FILE, ModelConfig, Network, POOL_FILE,
    PatchNorm, Preset, Progress, Purpose, Selfie, find_weights, initialize, load_weights, write_weights,
};
use serde_json::{Value, json};
use std::path::Path;

/// A value that no initialisation has.
const MARK: f32 = 12_345.0;

fn model() -> ModelConfig {
    ModelConfig::preset(Preset::Tiny, 32)
}

fn build(config: &ModelConfig, seed: u64) -> Build<'_> {
    Build { config, batch: 4, purpose: Purpose::Train, seed }
}

fn selfie(config: &ModelConfig, seed: u64) -> Selfie<Cpu, f32> {
    let mut network = Selfie::new(Cpu::new(1).expect("threads"), build(config, seed)).expect("sound");
    mark_statistics(&mut network, seed);
    network
}

fn classifier(config: &ModelConfig, classes: usize, seed: u64) -> Classifier<Cpu, f32> {
    let mut network = Classifier::new(Cpu::new(1).expect("threads"), build(config, seed), classes).expect("sound");
    mark_statistics(&mut network, seed);
    network
}

/// Running statistics that can be told apart.
fn mark_statistics(network: &mut impl Network<Cpu, f32>, seed: u64) {
    let (statistics, mut values) = (network.statistics_mut(), (1u32..).map(|i| seed as f32 + i as f32 / 7.0));
    for entry in statistics.table.entries() {
        statistics.running[entry.range.clone()].iter_mut().zip(&mut values).for_each(|(to, value)| *to = value);
    }
}

fn tensor(network: &impl Network<Cpu, f32>, name: &str) -> Vec<f32> {
    let (parameters, statistics) = (network.parameters(), network.statistics());
    match parameters.table.get(name) {
        Some(entry) => parameters.master[entry.range.clone()].to_vec(),
        None => statistics.running[statistics.table.get(name).expect("one of the two").range.clone()].to_vec(),
    }
}

fn write(network: &impl Network<Cpu, f32>, config: &ModelConfig, folder: &Path) {
    write_weights(network, About { model: config, classes: &[] }, folder).expect("a writable folder");
}

/// Names and shapes of a file, and its metadata.
fn header(path: &Path) -> (Vec<(String, Vec<usize>)>, Value) {
    let bytes = std::fs::read(path).expect("written");
    let (_, metadata) = SafeTensors::read_metadata(&bytes).expect("safetensors");
    let mut tensors: Vec<_> = metadata.tensors().into_iter().map(|(name, info)| (name, info.shape.clone())).collect();
    tensors.sort();
    (tensors, json!(metadata.metadata()))
}

#[test]
fn pretrained_weights_are_read_back_bit_by_bit() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = model();
    let written = selfie(&config, 1);
    write(&written, &config, &folder.path().join("weights"));
    let mut read = selfie(&config, 2);
    let report = load_weights(&mut read, folder.path()).expect("ours");
    assert_eq!(read.parameters().master, written.parameters().master);
    assert_eq!(read.parameters().copy, written.parameters().copy);
    assert_eq!(read.statistics().running, written.statistics().running);
    assert!(report.fresh.is_empty() && report.unused.is_empty());

    // What timm has no place for is in its own file.
    let (model, metadata) = header(&folder.path().join("weights").join(MODEL_FILE));
    let (pool, _) = header(&folder.path().join("weights").join(POOL_FILE));
    assert_eq!(metadata, json!({ "format": "pt" }));
    assert!(model.iter().all(|(name, _)| !name.starts_with("pool.")));
    assert!(!pool.is_empty() && pool.iter().all(|(name, _)| name.starts_with("pool.")));
    assert!(model.contains(&("stem.conv.weight".into(), vec![8, 3, 3, 3])));
    assert!(model.contains(&("stages.1.blocks.0.downsample.conv.weight".into(), vec![64, 32, 1, 1])));
    assert!(model.contains(&("norm.running_var".into(), vec![128])));
}

#[test]
fn classifier_weights_are_read_back_bit_by_bit() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = model();
    let written = classifier(&config, 5, 1);
    write(&written, &config, folder.path());
    let mut read = classifier(&config, 5, 2);
    load_weights(&mut read, &folder.path().join(MODEL_FILE)).expect("ours");
    assert_eq!(read.parameters().master, written.parameters().master);
    assert_eq!(read.statistics().running, written.statistics().running);
    assert!(!folder.path().join(POOL_FILE).exists());
    let (tensors, _) = header(&folder.path().join(MODEL_FILE));
    assert!(tensors.contains(&("head.fc.weight".into(), vec![5, 256, 1, 1])));
    assert!(tensors.contains(&("head.fc.bias".into(), vec![5])));
}

#[test]
fn an_attention_head_takes_all_that_was_pretrained_and_is_read_back() {
    let (pretraining, finetuning) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let config = ModelConfig { head: Head::Attention, ..model() };
    let pretrained = selfie(&config, 1);
    write(&pretrained, &config, pretraining.path());
    let mut network = classifier(&config, 3, 2);
    let report = initialize(&mut network, pretraining.path(), PatchNorm::Fresh).expect("the same preset");
    assert_eq!(report.fresh, ["head.fc.weight", "head.fc.bias"]);
    assert!(report.unused.is_empty(), "{report}");
    let names = |network: &Selfie<Cpu, f32>| {
        let tables = [network.parameters().table.clone(), network.statistics().table.clone()];
        tables.iter().flat_map(|table| table.entries().iter().map(|entry| entry.name.clone())).collect::<Vec<_>>()
    };
    for name in names(&pretrained) {
        assert_eq!(tensor(&network, &name), tensor(&pretrained, &name), "{name}");
    }

    // Written, the classes stand beside the pooling, so that timm takes the rest.
    write(&network, &config, finetuning.path());
    let (backbone, _) = header(&finetuning.path().join(MODEL_FILE));
    let (pool, _) = header(&finetuning.path().join(POOL_FILE));
    assert!(backbone.iter().all(|(name, _)| !name.starts_with("pool.") && !name.starts_with("head.")));
    assert!(pool.contains(&("head.fc.weight".into(), vec![3, 128, 1, 1])));
    let text = std::fs::read(finetuning.path().join("config.json")).expect("written");
    assert_eq!(serde_json::from_slice::<Value>(&text).expect("JSON")["num_classes"], 0);
    let mut read = classifier(&config, 3, 4);
    assert!(load_weights(&mut read, finetuning.path()).expect("ours").unused.is_empty());
    assert_eq!(read.parameters().master, network.parameters().master);
    assert_eq!(read.statistics().running, network.statistics().running);
    // As first weights they give the classes, too, and to others what these share.
    let mut again = classifier(&config, 3, 5);
    assert!(initialize(&mut again, finetuning.path(), PatchNorm::Fresh).expect("ours").fresh.is_empty());
    assert_eq!(again.parameters().master, network.parameters().master);
    let report = initialize(&mut classifier(&model(), 3, 6), finetuning.path(), PatchNorm::Fresh).expect("stages");
    assert!(report.to_string().contains("fresh: stages.3, norm, head"), "{report}");

    // A pooling of more blocks must not lose the last ones in silence, nor have them made up.
    for pool_blocks in [1, 3] {
        let other = ModelConfig { pool_blocks, ..config.clone() };
        let deep = ModelConfig { pool_blocks: 2, ..config.clone() };
        write(&selfie(&deep, 1), &deep, pretraining.path());
        let error =
            initialize(&mut classifier(&other, 3, 2), pretraining.path(), PatchNorm::Fresh).expect_err("blocks");
        assert!(error.to_string().contains("pool.blocks."), "{error}");
    }
}

#[test]
fn a_classifier_starts_from_the_patch_network() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = model();
    let pretrained = selfie(&config, 1);
    write(&pretrained, &config, folder.path());
    let (fresh, mut finetuned) = (classifier(&config, 3, 2), classifier(&config, 3, 2));
    let report = initialize(&mut finetuned, folder.path(), PatchNorm::Fresh).expect("the same preset");
    let shared = |entry: &Entry| {
        let name = entry.name.as_str();
        ["stem.", "stages.0.", "stages.1.", "stages.2."].iter().any(|part| name.starts_with(part))
    };
    for table in [&fresh.parameters().table, &fresh.statistics().table] {
        for entry in table.entries() {
            let name = &entry.name;
            let expected = if shared(entry) { tensor(&pretrained, name) } else { tensor(&fresh, name) };
            assert_eq!(tensor(&finetuned, name), expected, "{name}");
            assert_eq!(report.loaded.contains(name), shared(entry), "{name}");
            assert_eq!(report.fresh.contains(name), !shared(entry), "{name}");
        }
    }
    assert_eq!(finetuned.parameters().copy, finetuned.parameters().master, "the copy follows");
    assert_eq!(report.unused, ["norm.bias", "norm.running_mean", "norm.running_var", "norm.weight"]);
    let file = folder.path().join(MODEL_FILE);
    let line = format!("stem, stages.0-2 from {}; fresh: stages.3, norm, head; not used: norm", file.display());
    assert_eq!(report.to_string(), line);
}

#[test]
fn the_patch_norm_starts_the_next_stage_if_asked() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = model();
    let pretrained = selfie(&config, 1);
    write(&pretrained, &config, folder.path());
    let mut finetuned = classifier(&config, 3, 2);
    let report = initialize(&mut finetuned, folder.path(), PatchNorm::Reuse).expect("the same preset");
    for part in ["weight", "bias", "running_mean", "running_var"] {
        let next = format!("stages.3.blocks.0.norm1.{part}");
        assert_eq!(tensor(&finetuned, &next), tensor(&pretrained, &format!("norm.{part}")), "{part}");
        assert!(report.loaded.contains(&next));
    }
    assert!(report.unused.is_empty(), "{report:?}");
}

/// timm's files: other float types, PyTorch's counters, a head for other classes.
#[test]
fn a_file_of_timms_shape_is_taken() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("pytorch_model.safetensors");
    let config = model();
    let given = classifier(&config, 7, 1);
    let (parameters, statistics) = (given.parameters(), given.statistics());
    let mut tensors = Vec::new();
    let both = parameters.table.entries().iter().map(|entry| (entry, &parameters.master));
    for (i, (entry, flat)) in
        both.chain(statistics.table.entries().iter().map(|e| (e, &statistics.running))).enumerate()
    {
        let values = entry.to_file(&flat[entry.range.clone()]);
        let (dtype, bytes): (_, Vec<u8>) = match i % 3 {
            0 => (Dtype::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect()),
            1 => (Dtype::F16, values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect()),
            _ => (Dtype::BF16, values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect()),
        };
        tensors.push((entry.name.clone(), dtype, entry.shape.clone(), bytes));
    }
    tensors.push(("norm.num_batches_tracked".into(), Dtype::I64, vec![], vec![0; 8]));
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).expect("as many bytes as the shape says"))
    });
    std::fs::write(&path, safetensors::serialize(views, None).expect("unique names")).expect("a writable folder");

    let rounded = |i: usize, value: f32| match i % 3 {
        0 => value,
        1 => f16::from_f32(value).to_f32(),
        _ => bf16::from_f32(value).to_f32(),
    };
    let mut read = classifier(&config, 7, 2);
    load_weights(&mut read, &path).expect("every tensor is there");
    for (i, entry) in parameters.table.entries().iter().enumerate() {
        let expected: Vec<f32> = tensor(&given, &entry.name).into_iter().map(|value| rounded(i, value)).collect();
        assert_eq!(tensor(&read, &entry.name), expected, "{}", entry.name);
    }

    // Other classes: everything but the head.
    let mut finetuned = classifier(&config, 3, 2);
    let report = initialize(&mut finetuned, &path, PatchNorm::Fresh).expect("the same backbone");
    assert_eq!(report.fresh, ["head.fc.weight", "head.fc.bias"]);
    assert_eq!(report.unused, ["head.fc.bias", "head.fc.weight"]);
    assert!(report.loaded.contains(&"norm.running_var".to_string()));

    // The patch network has no fourth stage, and its norm follows the third.
    let mut patches = selfie(&config, 2);
    let report = initialize(&mut patches, &path, PatchNorm::Fresh).expect("the same backbone");
    assert!(report.loaded.contains(&"stages.2.blocks.0.conv1.weight".to_string()));
    assert!(report.fresh.contains(&"norm.weight".to_string()) && report.fresh.contains(&"pool.u0".to_string()));
}

/// What is refused, with the words that must be in the message.
fn refused<N: Network<Cpu, f32>>(mut network: N, source: &Path, words: &[&str])
where
    Cpu: Backend<f32>,
{
    let before = network.parameters().master.clone();
    for error in [load_weights(&mut network, source), initialize(&mut network, source, PatchNorm::Fresh)] {
        let error = error.expect_err("it does not fit");
        assert_eq!(error.kind(), ErrorKind::Input);
        let text = error.to_string();
        for word in words {
            assert!(text.contains(word), "{word} in {text}");
        }
    }
    assert!(network.parameters().master == before, "a refused file changes nothing");
}

#[test]
fn other_networks_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = model();
    write(&classifier(&config, 3, 1), &config, folder.path());
    let name = MODEL_FILE;

    let wide = ModelConfig { stem_width: 16, ..config.clone() };
    let stem = ["stem.conv.weight", "[16, 3, 3, 3]", "[8, 3, 3, 3]", name];
    refused(classifier(&wide, 3, 2), folder.path(), &stem);

    let large = ModelConfig { stem: selfie_model::Stem::Large, ..config.clone() };
    refused(classifier(&large, 3, 2), folder.path(), &["stem.conv.weight", "[8, 3, 7, 7]", "[8, 3, 3, 3]"]);

    // More blocks than the file has, and fewer.
    let deep = ModelConfig { depths: [1, 2, 1, 1], ..config.clone() };
    refused(classifier(&deep, 3, 2), folder.path(), &["stages.1.blocks.1.", "no such tensor"]);
    let file = tempfile::tempdir().expect("a temporary folder");
    write(&classifier(&deep, 3, 1), &deep, file.path());
    refused(classifier(&config, 3, 2), file.path(), &["stages.1.blocks.1.", "expects no such tensor"]);
}

#[test]
fn other_files_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let missing = folder.path().join("weights.safetensors");
    refused(classifier(&model(), 3, 1), &missing, &["cannot read", "weights.safetensors"]);
    refused(classifier(&model(), 3, 1), folder.path(), &["weights/model.safetensors", "none of them"]);
    let text = folder.path().join("model.pth");
    std::fs::write(&text, "PK\u{3}\u{4} a zip archive of pickles").expect("writable");
    refused(classifier(&model(), 3, 1), &text, &["model.pth: expected a safetensors file"]);
}

/// A file that names a stage beyond all numbers.
#[test]
fn lying_names_are_only_unused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("weights.safetensors");
    let last = format!("stages.{}.blocks.0.conv1.weight", usize::MAX);
    let marked = MARK.to_le_bytes().repeat(8 * 3 * 9);
    let given = classifier(&model(), 3, 1);
    let parts = [
        (&given.parameters().table, &given.parameters().master),
        (&given.statistics().table, &given.statistics().running),
    ];
    let mut tensors = vec![(last.clone(), vec![2], vec![0; 8])];
    for (entry, flat) in parts.iter().flat_map(|(table, flat)| table.entries().iter().map(move |entry| (entry, flat))) {
        let bytes = flat[entry.range.clone()].iter().flat_map(|value| value.to_le_bytes()).collect();
        let bytes = if entry.name == "stem.conv.weight" { marked.clone() } else { bytes };
        tensors.push((entry.name.clone(), entry.shape.clone(), bytes));
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name, TensorView::new(Dtype::F32, shape.clone(), bytes).expect("as many bytes as the shape says"))
    });
    std::fs::write(&path, safetensors::serialize(views, None).expect("unique names")).expect("a writable folder");
    let mut network = classifier(&model(), 3, 2);
    let report = initialize(&mut network, &path, PatchNorm::Reuse).expect("stages 0 to 3 are there");
    assert!(report.unused.contains(&last), "{report:?}");
    assert!(tensor(&network, "stem.conv.weight").iter().all(|&value| value == MARK));
}

#[test]
fn a_run_and_a_folder_mean_their_weights() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("weights").join(MODEL_FILE);
    write(&classifier(&model(), 3, 1), &model(), &folder.path().join("weights"));
    for source in [folder.path(), &folder.path().join("weights"), &file] {
        assert_eq!(find_weights(source).expect("there"), file);
    }
}

fn card(network: &impl Network<Cpu, f32>, config: &ModelConfig, classes: &[String]) -> (Value, String) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write_weights(network, About { model: config, classes }, folder.path()).expect("a writable folder");
    let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).expect("written");
    (serde_json::from_str(&read("config.json")).expect("JSON"), read("README.md"))
}

#[test]
fn config_json_has_timms_keys() {
    let config = ModelConfig::preset(Preset::Tiny, 224);
    let classes = ["cat".to_string(), "dog".to_string()];
    let (finetuned, readme) = card(&classifier(&config, 2, 1), &config, &classes);
    assert_eq!(finetuned["architecture"], "resnetv2_50");
    assert_eq!((&finetuned["num_classes"], &finetuned["num_features"]), (&json!(2), &json!(256)));
    assert_eq!(finetuned["label_names"], json!(classes));
    let args = json!({ "layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256], "stem_chs": 8 });
    assert_eq!(finetuned["model_args"], args);
    let cfg = &finetuned["pretrained_cfg"];
    assert_eq!(cfg["pool_size"], json!([7, 7]));
    assert_eq!((&cfg["input_size"], &cfg["mean"]), (&json!([3, 224, 224]), &json!([0.5, 0.5, 0.5])));
    assert!(readme.contains("local-dir:"), "{readme}");

    let (pretrained, readme) = card(&selfie(&config, 1), &config, &[]);
    assert_eq!((&pretrained["num_classes"], &pretrained["num_features"]), (&json!(0), &json!(128)));
    assert_eq!(pretrained["model_args"]["layers"], json!([1, 1, 1]));
    assert_eq!(pretrained["pretrained_cfg"]["pool_size"], json!([14, 14]));
    assert!(pretrained.get("label_names").is_none());
    assert!(readme.contains(POOL_FILE), "{readme}");
}

#[test]
fn the_small_stem_is_not_called_timms() {
    let (config, readme) = card(&classifier(&model(), 3, 1), &model(), &[]);
    assert_eq!(config["architecture"], "selfie_resnetv2_small_stem");
    for line in ["not a timm model", "model.stem.conv = ", "model.stem.pool = torch.nn.Identity()", "stem_chs=8"] {
        assert!(readme.contains(line), "{line} in {readme}");
    }
}

#[test]
fn weights_that_are_not_finite_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut network = classifier(&model(), 3, 1);
    let place = network.parameters().table.get("stem.conv.weight").expect("a stem").range.start;
    network.parameters_mut().master[place + 1] = f32::INFINITY;
    write(&network, &model(), folder.path());
    let mut other = classifier(&model(), 3, 2);
    let before = other.parameters().master.clone();
    for error in [
        load_weights(&mut other, folder.path()).expect_err("infinite"),
        initialize(&mut other, folder.path(), PatchNorm::Fresh).expect_err("infinite"),
    ] {
        let text = error.to_string();
        assert!(text.contains("stem.conv.weight") && text.contains("1 of 216"), "{text}");
    }
    assert_eq!(other.parameters().master, before);
}

/// Where a tensor lies in memory is no part of a file: names, shapes and bytes are those of the first version, which laid them
/// side by side, so its checkpoints are read and it would read ours. The sums are of files that it wrote.
#[test]
fn checkpoints_are_those_of_packed_buffers() {
    let config =
        ModelConfig { stem_width: 4, heads: 2, ffn: 40, pool_blocks: 2, ..ModelConfig::preset(Preset::Tiny, 32) };
    let build = Build { config: &config, batch: 2, purpose: Purpose::Train, seed: 11 };
    let network = Selfie::<Cpu, f32>::new(Cpu::new(1).expect("a thread"), build).expect("sound");
    assert!(network.parameters().table.len() > network.parameters().table.elements());
    let folder = tempfile::tempdir().expect("a temporary folder");
    let progress = Progress { step: 0, seconds: 0.0, skipped: 0, skipped_in_a_row: 0, seed: 11 };
    let store = CheckpointStore::new(folder.path(), 1);
    let saved = store.save(&network, progress, &json!({})).expect("a writable folder");
    let manifest = std::fs::read(saved.join("manifest.json")).expect("written");
    let manifest: Value = serde_json::from_slice(&manifest).expect("ours");
    let files = manifest["files"].as_array().expect("a list");
    let sums: Vec<_> = files[1..].iter().map(|file| (&file["name"], &file["bytes"], &file["crc32"])).collect();
    let expected = [
        json!(["weights.safetensors", 222_352, 652_167_264u32]),
        json!(["velocity.safetensors", 219_056, 1_776_703_650u32]),
    ];
    for ((name, bytes, crc32), expected) in sums.into_iter().zip(&expected) {
        assert_eq!(json!([name, bytes, crc32]), *expected);
    }

    // And back, into a network that had other values.
    let newest = store.newest::<f32>().expect("sound").expect("one was saved");
    let mut other =
        Selfie::<Cpu, f32>::new(Cpu::new(1).expect("a thread"), Build { seed: 12, ..build }).expect("sound");
    assert!(other.parameters().master != network.parameters().master);
    newest.checkpoint.restore(&mut other).expect("the same network");
    assert!(other.parameters().master == network.parameters().master);
    assert!(other.parameters().copy == network.parameters().copy);
}

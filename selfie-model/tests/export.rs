//! Weights on their way out: what was written is what the network is, and what is not is found.

use selfie_kernels::Cpu;
use selfie_model::{
    About, Build, Classifier, Description, EncoderLayers, ErrorKind, Export, Format, Head, MODEL_FILE, ModelConfig,
    Network, PatchNorm, Preset, Purpose, Selfie, initialize, write_weights,
};
use std::path::{Path, PathBuf};

const FORMATS: [Format; 3] = [Format::Timm, Format::Onnx, Format::Safetensors];

/// One with a pooling, blocks of both kinds and a normalisation of its own, small enough to compute in a test.
fn large() -> ModelConfig {
    let image_size = 65;
    ModelConfig { depths: [1, 2, 1, 1], mean: [0.48, 0.45, 0.4], ..ModelConfig::preset(Preset::Tiny, image_size) }
}

fn small() -> ModelConfig {
    ModelConfig { std: [0.25, 0.5, 0.1], ..ModelConfig::preset(Preset::Tiny, 32) }
}

fn build(config: &ModelConfig) -> Build<'_> {
    Build { config, batch: 1, purpose: Purpose::Evaluate, seed: 5 }
}

/// Makes a network and writes its weights.
type Write = fn(&ModelConfig, &Path);

/// Numbers that no initialisation has, different for each channel: a mix-up of tensors shows.
fn disturb(network: &mut impl Network<Cpu, f32>) {
    let statistics = network.statistics_mut();
    for entry in statistics.table.entries().to_vec() {
        let least = if entry.name.ends_with("running_mean") { -0.5 } else { 0.5 };
        entry.range.for_each(|i| statistics.running[i] = least + (i * 37 % 100) as f32 / 100.0);
    }
    let parameters = network.parameters_mut();
    for entry in parameters.table.entries().to_vec() {
        if entry.shape.len() == 1 {
            entry.range.for_each(|i| parameters.master[i] += (i * 53 % 100) as f32 / 100.0 - 0.3);
        }
    }
}

fn classifier(config: &ModelConfig, folder: &Path) {
    let mut network = Classifier::<Cpu, f32>::new(Cpu::new(1).expect("threads"), build(config), 3).expect("sound");
    disturb(&mut network);
    let classes = ["cat", "dog", "naïve \"owl\""].map(String::from);
    write_weights(&network, About { model: config, classes: &classes }, folder).expect("a writable folder");
}

fn pretrained(config: &ModelConfig, folder: &Path) {
    let mut network = Selfie::<Cpu, f32>::new(Cpu::new(1).expect("threads"), build(config)).expect("sound");
    disturb(&mut network);
    write_weights(&network, About { model: config, classes: &[] }, folder).expect("a writable folder");
}

fn place(folder: &Path, format: Format) -> PathBuf {
    folder.join(match format {
        Format::Timm => "timm",
        Format::Onnx => "x.onnx",
        Format::Safetensors => "x.safetensors",
    })
}

#[test]
fn what_is_written_is_the_network() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let cases: [(&str, ModelConfig, Write); 3] = [
        ("a classifier with the small stem", small(), classifier),
        ("a classifier with the large stem", large(), classifier),
        ("a patch network", small(), pretrained),
    ];
    for (place_of_case, (case, config, write)) in cases.into_iter().enumerate() {
        let run = folder.path().join(format!("run-{place_of_case}"));
        write(&config, &run.join("weights"));
        let export = Export::read(&run).expect("a run");
        for format in FORMATS {
            let path = place(&run, format);
            export.write(format, &path).expect("a writable folder");
            let found = export.check(format, &path, 2).unwrap_or_else(|error| panic!("{case}, {format:?}: {error}"));
            let trained = export.description().layers.stages == 4;
            assert_eq!(found.tensors, if trained { 2 } else { 0 } + found_tensors(&export), "{case}");
            assert!(found.distance <= 1e-9, "{case}, {format:?}: {found:?}");
        }
    }
}

/// Tensors of stem, blocks and norm: a filter each, and four for each normalisation.
fn found_tensors(export: &Export) -> usize {
    let description = export.description();
    let stages = description.layers.stages;
    let blocks: usize = description.model.depths[..stages].iter().sum();
    1 + blocks * (3 + 3 * 4) + stages + 4
}

#[test]
fn files_describe_themselves() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = large();
    classifier(&config, folder.path());
    let export = Export::read(folder.path()).expect("weights");
    let description = export.description();
    assert_eq!(description.layers, EncoderLayers { stages: 4, head: Head::Conv, classes: 3 });
    assert_eq!((description.model.image_size, description.model.mean), (65, config.mean));
    assert_eq!((description.model.stem_width, description.model.depths), (8, config.depths));
    assert_eq!(description.classes[2], "naïve \"owl\"");
    // The same from one file alone, and from a file that tells nothing but its tensors.
    let one = place(folder.path(), Format::Safetensors);
    export.write(Format::Safetensors, &one).expect("a writable folder");
    let again = Description::of(&one).expect("ours");
    assert_eq!(
        (&again.model, &again.classes, &again.resize),
        (&description.model, &description.classes, &description.resize)
    );
    assert_eq!(again.told_by, Some(one.clone()));
    let bare = folder.path().join("bare/weights.safetensors");
    std::fs::create_dir(folder.path().join("bare")).expect("a folder");
    std::fs::copy(folder.path().join(MODEL_FILE), &bare).expect("copied");
    let assumed = Description::of(&bare).expect("tensors");
    assert_eq!((assumed.told_by, assumed.model.image_size, assumed.model.mean), (None, 224, [0.5; 3]));
    assert_eq!(assumed.layers, description.layers);

    // A classifier starts from it as from any of ours.
    let mut network = Classifier::<Cpu, f32>::new(Cpu::new(1).expect("threads"), build(&config), 3).expect("sound");
    let report = initialize(&mut network, &one, PatchNorm::Fresh).expect("the same network");
    assert!(report.fresh.is_empty() && report.unused.is_empty(), "{report:?}");
}

#[test]
fn descriptions_that_lie_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    classifier(&small(), folder.path());
    let path = folder.path().join("config.json");
    let whole = std::fs::read_to_string(&path).expect("written");
    for (from, to, word) in [
        ("\"bilinear\"", "7", "interpolation"),
        ("\"dog\",", "", "label_names"),
        ("\"dog\"", "7", "label_names"),
        ("0.25,", "", "`std`"),
        ("0.25,", "0.0,", "std"),
        ("\"crop_pct\": 1.0", "\"crop_pct\": 1.5", "crop_pct"),
        ("{", "", "JSON"),
    ] {
        let changed = whole.replacen(from, to, 1);
        assert_ne!(changed, whole, "{from}");
        std::fs::write(&path, changed).expect("writable");
        let error = Export::read(folder.path()).expect_err(from);
        assert_eq!(error.kind(), ErrorKind::Input, "{error}");
        assert!(error.to_string().contains(word) && error.to_string().contains("config.json"), "{error}");
    }
    std::fs::write(&path, whole).expect("writable");
    // No network of ours.
    std::fs::write(folder.path().join(MODEL_FILE), b"PK").expect("writable");
    assert_eq!(Export::read(folder.path()).expect_err("no weights").kind(), ErrorKind::Input);
}

/// Replaces bytes of a file in one place.
fn change(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|part| part == from).expect("it is there");
    [&bytes[..at], to, &bytes[at + from.len()..]].concat()
}

#[test]
fn what_was_changed_is_found() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    classifier(&large(), folder.path());
    let export = Export::read(folder.path()).expect("weights");
    let path = place(folder.path(), Format::Onnx);
    export.write(Format::Onnx, &path).expect("a writable folder");
    let whole = std::fs::read(&path).expect("written");
    let found = |bytes: &[u8]| {
        std::fs::write(&path, bytes).expect("writable");
        let error = export.check(Format::Onnx, &path, 2).expect_err("it is another");
        assert_eq!(error.kind(), ErrorKind::Input, "{error}");
        error.to_string()
    };
    for (what, bytes, words) in [
        ("an operator", change(&whole, b"MaxPool", b"MinPool"), "MinPool"),
        ("an operator's number", change(&whole, &1e-5f32.to_le_bytes(), &1e-4f32.to_le_bytes()), "relative distance"),
        ("a node's input", change(&whole, b"stem.pool", b"stem.conv"), ""),
        ("the metadata", change(&whole, b"[0.48,0.45", b"[0.47,0.45"), "metadata"),
        ("its end", whole[..whole.len() - 1].to_vec(), ""),
        ("an output", change(&whole, b"\x0a\x06logits", b"\x0a\x06Logits"), ""),
    ] {
        let text = found(&bytes);
        assert!(text.contains(words), "{what}: {text}");
    }
    // One bit of a tensor's number.
    let mut tensor = whole.clone();
    tensor[whole.len() * 3 / 4] ^= 1;
    assert!(found(&tensor).contains("another tensor in place of"), "one bit");

    let path = place(folder.path(), Format::Safetensors);
    export.write(Format::Safetensors, &path).expect("a writable folder");
    let mut bytes = std::fs::read(&path).expect("written");
    let end = bytes.len() - 4;
    bytes[end] ^= 1;
    std::fs::write(&path, bytes).expect("writable");
    let error = export.check(Format::Safetensors, &path, 1).expect_err("one bit").to_string();
    assert!(error.contains("tensors"), "{error}");
}

#[test]
fn python_is_told_how_to_load_it() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    classifier(&small(), &folder.path().join("small"));
    classifier(&large(), &folder.path().join("large"));
    let lines = |name: &str, format| {
        let export = Export::read(&folder.path().join(name)).expect("weights");
        export.loading(format, Path::new("a \"b\""))
    };
    let large = lines("large", Format::Timm);
    assert_eq!(large.lines().last(), Some(r#"model = timm.create_model("local-dir:a \"b\"", pretrained=True)"#));
    let small = lines("small", Format::Timm);
    for line in ["stem_chs=8", "model.stem.conv = ", "model.stem.pool", r#"load_file("a \"b\"/model.safetensors")"#] {
        assert!(small.contains(line), "{line} in {small}");
    }
    assert!(lines("large", Format::Safetensors).ends_with(r#"safetensors.torch.load_file("a \"b\""))"#));
    let onnx = lines("large", Format::Onnx);
    assert!(onnx.contains("[n, 3, 65, 65]") && onnx.contains("logits, embedding = session.run"), "{onnx}");
    let description = Description::of(&folder.path().join("large")).expect("weights");
    let here = folder.path().join("large").display().to_string();
    assert!(description.loading(&folder.path().join("large")).expect("there").contains(&format!("local-dir:{here}")));
}

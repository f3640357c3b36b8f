//! Doors for the targets in `fuzz/`: what a parser of this crate makes of any bytes.

use std::path::Path;

use crate::checkpoint::parse_manifest_and_state;
use crate::parameters::{Layout, Table};
use crate::tensor_file::TensorFile;
use crate::weights::describe;
use crate::{Description, EncoderLayers, Head, MemoryPlan, ModelConfig, Preset, Replay, Resize, Selfie};

/// A weight file, read for a network of a convolution and a norm.
pub fn safetensors(bytes: &[u8]) {
    let mut table = Table::default();
    table.push("stem.conv.weight", &[2, 3, 1, 2], Layout::Filter);
    table.push("norm.weight", &[2], Layout::Plain);
    let Ok(file) = TensorFile::<f32>::parse(Path::new("weights.safetensors"), bytes) else { return };
    assert!(
        file.flat(&table).is_ok() == table.entries().iter().all(|entry| file.shape(&entry.name) == Some(&entry.shape))
    );
    let _ = file.expect_only(&[&table], |_| true);
    describe(&file);
}

/// The file of a step, and the plan of its network.
pub fn step_file(bytes: &[u8]) {
    let Ok(replay) = Replay::<f32>::parse(Path::new("not-finite-00000001.safetensors"), bytes) else { return };
    assert!(replay.micro_batch() > 0);
    let _: crate::Result<MemoryPlan> = Selfie::<selfie_kernels::Cpu, f32>::memory_plan(replay.build());
}

/// `config.json` beside weights of a classifier, and of a network without classes, as `export` and `inspect` take it.
pub fn weights_config(bytes: &[u8]) {
    let Ok(config) = serde_json::from_slice(bytes) else { return };
    for classes in [0, 2] {
        let model = ModelConfig::preset(Preset::Resnet50, 224);
        let (layers, resize) = (EncoderLayers { stages: 4, head: Head::Conv, classes }, Resize::ours(&model));
        let mut description =
            Description { model, layers, classes: Vec::new(), pooled_classes: 0, resize, told_by: None };
        if description.take(Path::new("config.json"), &config).is_ok() {
            assert!(description.model.check().is_ok() && description.resize.crop > 0.0);
            assert!(description.classes.is_empty() || description.classes.len() == classes);
            assert!(!description.input().is_empty());
        }
    }
}

/// `manifest.json` or `state.json` of a checkpoint.
pub fn checkpoint(bytes: &[u8]) {
    parse_manifest_and_state(bytes);
}

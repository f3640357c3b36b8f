//! The presets: a network, and the training that suits it.

use selfie_model::{ModelConfig, Preset, Query};

use super::keys::{Key, Task};
use super::value::Value;

/// Their names.
pub const NAMES: &[&str] = &["tiny", "small", "resnet50"];

/// What the presets set a key to, in words: `tiny 64, small 256`; none where they leave it alone.
pub fn summary(key: &Key, task: Task) -> Option<String> {
    let of = |preset: &str| {
        let (_, value) = values(preset, task).into_iter().find(|(set, _)| set.name == key.name)?;
        Some(format!("{preset} {}", value.plain()))
    };
    let parts: Vec<_> = NAMES.iter().filter_map(|preset| of(preset)).collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// What the preset of that name sets for a command; nothing for an unknown name, which the kind of `model.preset`
/// refuses.
pub fn values(name: &str, task: Task) -> Vec<(&'static Key, Value)> {
    use Task::{Evaluate, Finetune, Pretrain};
    // Steps, batch and learning rate. Those of resnet50 are the paper's for CIFAR-10; 0.1 lies inside the range that it
    // searches, 0.01 to 0.4.
    let (preset, steps, batch, rate) = match (name, task) {
        ("tiny", Pretrain) => (Preset::Tiny, 500, 64, 0.1),
        ("tiny", Finetune) => (Preset::Tiny, 300, 16, 0.05),
        ("small", Pretrain) => (Preset::Small, 1_500, 256, 0.1),
        ("small", Finetune) => (Preset::Small, 1_500, 128, 0.05),
        ("resnet50", Pretrain) => (Preset::Resnet50, 120_000, 512, 0.1),
        ("resnet50", Finetune) => (Preset::Resnet50, 120_000, 512, 0.1),
        (_, Evaluate) | (_, Pretrain | Finetune) => return Vec::new(),
    };
    // Nothing taken from here depends on the image size.
    let network = ModelConfig::preset(preset, 32);
    let whole = |value: usize| Value::Whole(value as u64);
    let query = match network.query {
        Query::Summary => "summary",
        Query::Places => "places",
    };
    let set = [
        ("model.stem_width", whole(network.stem_width)),
        ("model.depths", Value::Wholes(network.depths.iter().map(|&depth| depth as u64).collect())),
        ("model.heads", whole(network.heads)),
        ("model.ffn", whole(network.ffn)),
        ("model.pool_blocks", whole(network.pool_blocks)),
        ("model.dropout", Value::Number(network.dropout)),
        ("model.query", Value::Text(query.into())),
        ("train.steps", Value::Whole(steps)),
        ("train.batch", whole(batch)),
        ("train.lr", Value::Number(rate)),
    ];
    set.into_iter().map(|(name, value)| (Key::find(name).expect("presets set keys of the table"), value)).collect()
}

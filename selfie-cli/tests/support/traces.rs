//! What a run leaves that must not depend on how it went: stopped, killed or neither, on any number of threads.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;

/// Keys of metrics and progress that tell the time, or what the machine had at hand.
const TIMED: [&str; 4] = ["seconds", "images_per_second", "data_wait", "memory_bytes"];

/// Weights, the last and the best checkpoint, lists and metrics, without times.
pub(crate) fn traces(out: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut traces = BTreeMap::new();
    let mut add = |name: String| {
        if let Ok(bytes) = fs::read(out.join(&name)) {
            traces.insert(name, bytes);
        }
    };
    for name in ["model.safetensors", "pool.safetensors", "config.json"] {
        add(format!("weights/{name}"));
    }
    for pointer in ["last", "best"] {
        let folder = fs::read_to_string(out.join("state").join(pointer)).unwrap_or_default();
        add(format!("state/{pointer}"));
        for name in ["weights.safetensors", "velocity.safetensors", "state.json"] {
            add(format!("state/{}/{name}", folder.trim_end()));
        }
    }
    for name in ["labels.txt", "skipped.txt", "metrics.jsonl"] {
        add(name.into());
    }
    for (name, bytes) in &mut traces {
        match name.rsplit('.').next() {
            Some("jsonl") => *bytes = bytes.split_inclusive(|&byte| byte == b'\n').flat_map(without_times).collect(),
            Some("json") => *bytes = without_times(bytes),
            _ => {}
        }
    }
    assert!(traces.len() >= 7, "a run leaves more than {:?}", traces.keys());
    traces
}

/// A JSON object without times, and without a configuration, which names the folder and the threads.
fn without_times(object: &[u8]) -> Vec<u8> {
    let mut value: Value = serde_json::from_slice(object).expect("JSON");
    let keys = value.as_object_mut().expect("an object");
    keys.remove("config");
    let progress = keys.get_mut("progress").and_then(Value::as_object_mut);
    progress.into_iter().for_each(|progress| progress.retain(|key, _| !TIMED.contains(&key.as_str())));
    keys.retain(|key, _| !TIMED.contains(&key.as_str()));
    format!("{value}\n").into_bytes()
}

/// Asserts that two runs left the same.
#[track_caller]
pub(crate) fn assert_same(one: &Path, other: &Path) {
    let (one, other) = (traces(one), traces(other));
    assert_eq!(one.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>());
    for (name, bytes) in &one {
        assert!(*bytes == other[name], "{name} differs:\n{}", describe(bytes, &other[name]));
    }
}

fn describe(one: &[u8], other: &[u8]) -> String {
    match (std::str::from_utf8(one), std::str::from_utf8(other)) {
        (Ok(one), Ok(other)) => format!("{one}\n---\n{other}"),
        _ => format!("{} and {} bytes", one.len(), other.len()),
    }
}

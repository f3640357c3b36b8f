//! A step in Chrome's trace format: for <https://ui.perfetto.dev>, or `chrome://tracing`.

use serde_json::{Value, json};

use super::measure::Found;

/// Seconds as the format has them.
const MICROSECONDS: f64 = 1e6;

/// The step, on one track, and its passes, on another.
pub fn of(found: &Found) -> Value {
    let calls = &found.passes.calls;
    let track = |id: u32, name: &str| json!({ "ph": "M", "pid": 1, "tid": id, "name": "thread_name", "args": { "name": name } });
    let end = calls.last().map_or(0.0, |(call, _)| call.end);
    let step = json!({ "ph": "X", "pid": 1, "tid": 1, "name": "step", "ts": 0.0, "dur": end * MICROSECONDS });
    let calls = calls.iter().map(|(call, _)| {
        json!({
            "ph": "X",
            "pid": 1,
            "tid": 2,
            "name": call.pass,
            "ts": call.begin * MICROSECONDS,
            "dur": call.seconds() * MICROSECONDS,
            "args": { "shape": call.cost.shape, "flops": call.cost.flops, "bytes": call.cost.bytes },
        })
    });
    let head = [track(1, "step"), track(2, &found.device), step];
    json!({ "displayTimeUnit": "ms", "traceEvents": head.into_iter().chain(calls).collect::<Vec<_>>() })
}

//! `env.json`: on what a run ran.

use serde_json::{Value, json};

use crate::choices::Table;
use crate::system::System;

/// The machine and the program. `threads` are those that compute; 0 is as many as can run at once. `table` is what chooses
/// kernels beside the rules.
pub fn environment(threads: usize, table: Option<&Table>) -> Value {
    let system = System::here();
    json!({
        "selfie": env!("CARGO_PKG_VERSION"),
        "commit": option_env!("SELFIE_COMMIT"),
        "os": std::env::consts::OS,
        "architecture": std::env::consts::ARCH,
        "cpu": system.cpu,
        "cores": system.processors,
        "threads": if threads == 0 { system.threads.most } else { threads },
        "threads_limit": system.threads.source.to_string(),
        "memory_bytes": system.memory.as_ref().map(|memory| memory.most),
        "memory_limit": system.memory.as_ref().map(|memory| memory.source.to_string()),
        "choices": table.map(Table::about),
    })
}

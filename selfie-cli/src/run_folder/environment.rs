//! `env.json`: on what a run ran.

use serde_json::{Value, json};

/// The machine and the program. `threads` are those that compute; 0 is one per core.
pub fn environment(threads: usize) -> Value {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    json!({
        "selfie": env!("CARGO_PKG_VERSION"),
        "commit": option_env!("SELFIE_COMMIT"),
        "os": std::env::consts::OS,
        "architecture": std::env::consts::ARCH,
        "cpu": cpu_name(),
        "cores": cores,
        "threads": if threads == 0 { cores } else { threads },
        "memory_bytes": memory_bytes(),
    })
}

/// The processor's name.
pub fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| format!("{} processor", std::env::consts::ARCH), |(_, name)| name.trim().to_string())
}

/// Memory of the machine, where it is known.
pub fn memory_bytes() -> Option<u64> {
    proc_bytes("/proc/meminfo", "MemTotal:")
}

/// The most memory that this process has held, where it is known.
pub fn peak_bytes() -> Option<u64> {
    proc_bytes("/proc/self/status", "VmHWM:")
}

/// A line such as `VmHWM: 1234 kB`.
fn proc_bytes(path: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let kilobytes: u64 =
        text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()?;
    Some(kilobytes * 1024)
}

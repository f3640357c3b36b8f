//! The configuration as text: TOML of a run, the commented template, a table with origins, JSON.

use std::fmt::Write;

use super::keys::{KEYS, Key};
use super::presets;
use super::resolve::Resolved;

/// What every writer to a `String` is.
const INFALLIBLE: &str = "writing to a string cannot fail";

/// `config.toml` of a run: the values that its command uses, with their origin.
pub fn as_toml(resolved: &Resolved) -> String {
    let mut text = format!(
        "# Resolved configuration. Runs as is: selfie {} -c THIS_FILE\n# After each value stands where it came from.\n",
        resolved.task.name()
    );
    let mut current = "";
    for entry in resolved.entries() {
        let (section, name) = entry.key.split();
        if section != current {
            write!(text, "\n[{section}]\n").expect(INFALLIBLE);
            current = section;
        }
        writeln!(text, "{:<40} # {}", format!("{name} = {}", entry.value), entry.origin).expect(INFALLIBLE);
    }
    text
}

/// `config init`: every key with its meaning, range and default, commented out, so that presets still apply.
pub fn template() -> String {
    let mut text = String::from(
        "# Configuration of selfie: every key, its meaning and its default.\n\
         # Take away the `#` in front of a key to set it; use the file by `selfie pretrain -c FILE`.\n\
         # Precedence: default < preset < -c file < SELFIE_SECTION_KEY environment < --set section.key=value < flag.\n",
    );
    let mut current = "";
    for key in KEYS {
        let (section, name) = key.split();
        if section != current {
            write!(text, "\n[{section}]\n").expect(INFALLIBLE);
            current = section;
        }
        text.push('\n');
        for line in wrapped(key.help, 110) {
            writeln!(text, "# {line}").expect(INFALLIBLE);
        }
        let commands: Vec<_> = key.used_by.iter().map(|task| task.name()).collect();
        let flag = key.flag.map(|flag| format!(" Flag --{flag}.")).unwrap_or_default();
        writeln!(text, "# Takes {}. Used by {}.{flag}", key.kind.expected(), commands.join(", ")).expect(INFALLIBLE);
        if let Some(line) = by_preset(key) {
            writeln!(text, "# The presets set it: {line}.").expect(INFALLIBLE);
        }
        writeln!(text, "#{name} = {}", key.default_value()).expect(INFALLIBLE);
    }
    text
}

/// What the presets set a key to; by command, where the commands differ.
fn by_preset(key: &Key) -> Option<String> {
    let parts = key.used_by.iter().filter_map(|&task| Some((task, presets::summary(key, task)?)));
    let parts: Vec<_> = parts.collect();
    match &parts[..] {
        [] => None,
        [(_, first), rest @ ..] if rest.iter().all(|(_, text)| text == first) => Some(first.clone()),
        _ => {
            let texts = parts.iter().map(|(task, text)| format!("{text} ({})", task.name()));
            Some(texts.collect::<Vec<_>>().join("; "))
        }
    }
}

/// `config show`: a line for each key.
pub fn as_table(resolved: &Resolved) -> String {
    let rows: Vec<_> =
        resolved.entries().map(|entry| (entry.key.name, entry.value.to_string(), entry.origin.to_string())).collect();
    let name_width = rows.iter().map(|(name, ..)| name.len()).max().unwrap_or(0);
    let value_width = rows.iter().map(|(_, value, _)| value.len()).max().unwrap_or(0).min(40);
    let mut text = String::new();
    for (name, value, origin) in rows {
        writeln!(text, "{name:<name_width$}  {value:<value_width$}  {origin}").expect(INFALLIBLE);
    }
    text
}

/// `config show --json`.
pub fn as_json(resolved: &Resolved) -> serde_json::Value {
    let entries = resolved.entries().map(|entry| {
        let described = serde_json::json!({ "value": entry.value.as_json(), "origin": entry.origin.to_string() });
        (entry.key.name.to_string(), described)
    });
    serde_json::Value::Object(entries.collect())
}

/// Breaks text between words.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("there is always a line");
        if !line.is_empty() && line.len() + 1 + word.len() > width {
            lines.push(word.into());
        } else {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

//! `config show` and `config init`.

use crate::args::{Config, ConfigShow};
use crate::config::{Resolved, as_json, as_table, template};
use crate::exit::Exit;
use crate::screen;

/// Runs the command.
///
/// # Errors
/// What [`Resolved::new`] refuses, and standard output that cannot be written.
pub fn run(config: &Config) -> anyhow::Result<Exit> {
    let text = match config {
        Config::Init => template(),
        Config::Show(ConfigShow { task, json, flags }) => {
            let resolved = Resolved::new((*task).into(), &flags.request)?;
            if *json { format!("{:#}\n", as_json(&resolved)) } else { as_table(&resolved) }
        }
    };
    screen::print(&text)?;
    Ok(Exit::Done)
}

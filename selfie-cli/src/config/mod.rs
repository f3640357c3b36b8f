//! The configuration: one table of keys, layers of values with their origin, one struct for the rest of the program.

mod keys;
mod presets;
mod render;
mod resolve;
mod settings;
mod value;

pub use keys::{KEYS, Key, Task};
pub use presets::summary as by_preset;
pub use render::{as_json, as_table, as_toml, template};
pub use resolve::{Change, Entry, Origin, Request, Resolved, saved_data_path};
pub use settings::{Data, Run, Settings, Train};
pub use value::Kind;

//! The command as a user runs it. One program, as each would be linked with everything.

mod bad_input;
mod bench;
mod command_line;
mod data_as_found;
mod data_check;
#[cfg(target_os = "linux")]
mod devices;
mod embed;
mod evaluate;
mod export;
mod fewlabel;
mod full_disk;
mod killed;
#[cfg(unix)]
mod messages;
mod moved;
mod objectives;
mod pictures;
mod predict;
mod probe;
mod support;
mod training;

//! Data as they are found. One program, as each would be linked with everything.

mod archives;
mod jpegs;
mod label_files;
mod open;
mod pictures;
mod published;
mod real_data;
mod shards;

//! Configuration files, and the networks and trainings that they describe.
#![no_main]

mod memory_file;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| memory_file::with(bytes, selfie_cli::fuzzing::config_toml));

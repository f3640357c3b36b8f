//! `config.json` beside weights.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| selfie_cli::fuzzing::weights_config(bytes));

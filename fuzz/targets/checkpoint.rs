//! `manifest.json` and `state.json` of a checkpoint.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| selfie_model::fuzzing::checkpoint(bytes));

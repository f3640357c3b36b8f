//! `status.json` of a run.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| selfie_cli::fuzzing::status(bytes));

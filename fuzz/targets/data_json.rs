//! `data.json` of a run that is resumed.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| selfie_cli::fuzzing::data_json(bytes));

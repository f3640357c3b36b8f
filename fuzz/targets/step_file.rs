//! Files of steps that were not finite, which `selfie replay` reads.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| selfie_model::fuzzing::step_file(bytes));

//! Options after `synthetic:`.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| selfie_data::fuzzing::synthetic(text));

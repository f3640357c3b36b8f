//! Label budgets, and lists of image names.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| selfie_data::fuzzing::labels(text));

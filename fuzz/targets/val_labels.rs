//! Labels of a validation folder without class folders.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &[u8]| selfie_data::fuzzing::val_labels(text));

//! Weight files, and the tensors of checkpoints.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| selfie_model::fuzzing::safetensors(bytes));

//! Pickled batches of CIFAR and the downsampled ImageNet.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| selfie_data::fuzzing::pickle(bytes));

//! A CIFAR archive as it is downloaded: gzip, tar, records.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| selfie_data::fuzzing::cifar_gzip(bytes));

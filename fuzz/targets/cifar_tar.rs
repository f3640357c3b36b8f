//! The tar inside a CIFAR archive, and its records.
#![no_main]

mod checksums;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| selfie_data::fuzzing::cifar_tar(&checksums::repaired(bytes)));

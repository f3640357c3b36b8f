//! Batches of the downsampled ImageNet as .npz.
#![no_main]

mod memory_file;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| memory_file::with(bytes, selfie_data::fuzzing::npz));

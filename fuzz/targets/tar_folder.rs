//! A tar of images: its index.
#![no_main]

mod checksums;
mod memory_file;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    memory_file::with(&checksums::repaired(bytes), selfie_data::fuzzing::tar_folder);
});

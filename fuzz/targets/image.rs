//! Image files of every format.
#![no_main]

// A decoder that panics is caught, and is no finding; the fuzzer's own hook would end the process before.
libfuzzer_sys::fuzz_target!(init: std::panic::set_hook(Box::new(|_| ())), |bytes: &[u8]| selfie_data::fuzzing::image(bytes));

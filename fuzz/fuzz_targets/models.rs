#![no_main]

libfuzzer_sys::fuzz_target!(init: rerankd_fuzz::allow_caught_panics(), |input: &[u8]| rerankd_fuzz::targets::models::run(input));

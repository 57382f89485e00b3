#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| rerankd_fuzz::targets::chunks::run(input));

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| knarr_api::fuzz::run("json_patch", data));

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Err(problem) = coney::guard_fuzz::guard(bytes) {
        panic!("{problem}");
    }
});

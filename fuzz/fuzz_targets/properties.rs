#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Err(problem) = coney::embedded::fuzz::properties(bytes) {
        panic!("{problem}");
    }
});

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // Whatever comes, what amiquip gets of it is a frame that its parser takes.
    let _ = coney::session_fuzz::inbound(bytes, |frame| {
        let is_whole = matches!(amq_protocol::frame::parsing::parse_frame(frame), Ok((rest, _)) if rest.is_empty());
        assert!(is_whole || !matches!(frame[0], 1 | 2), "amiquip cannot parse what it is given: {frame:?}");
    });
});

//! Claim tokens: none harms, and one that is taken says the same after a round trip.
#![no_main]

use absurd_server::domain::ClaimToken;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(token) = ClaimToken::parse(text) else { return };
    assert!(token.lease_seconds <= 86_400, "the longest lease is a day");
    let again = ClaimToken::parse(&token.encode()).expect("what we write, we read");
    assert_eq!(token.encode(), again.encode());
    assert_eq!(token.digest(), again.digest());
    assert_eq!(token.digest().as_str().len(), 22);
    assert!(!format!("{token:?}").contains(text), "a token is never logged");
});

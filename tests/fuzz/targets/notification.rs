//! Notifications, which anybody who may connect can send: none harms, and one that is ours says the same when sent on.
#![no_main]

use absurd_server::doorbell::note::Note;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|payload: &str| {
    let Some(note) = Note::parse(payload) else { return };
    assert_eq!(Note::parse(&note.encode()).as_ref(), Some(&note));
});

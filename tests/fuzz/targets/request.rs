//! Requests: any bytes that are a message become arguments within bounds, or an error with a reason.
#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use absurd_proto::v1 as pb;
use absurd_server::domain::Error;
use absurd_server::store::batch::Write;
use absurd_server::store::{Store, StoreOptions};
use absurd_server::transport::{Limits, convert, status::status};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

/// Never connected: it mints ids.
static STORE: LazyLock<Store> = LazyLock::new(|| {
    let database = "postgresql://me@nowhere/db".parse().expect("a URL");
    let options = StoreOptions { database, connections_max: 2, wait_max: Duration::from_secs(1), test_clock: false };
    Store::new(options).expect("a store")
});

fn told(error: &Error) {
    let status = status(error);
    assert!(!status.message().is_empty());
    assert!(!error.reason().is_empty());
}

fuzz_target!(|bytes: &[u8]| {
    let limits = Limits { payload_bytes_max: 4096, headers_bytes_max: 1024, ..Limits::default() };
    if let Ok(item) = pb::SettleItem::decode(bytes) {
        match convert::settle_item(item, &limits) {
            Ok((_, Write::Complete { result: Some(json) })) => assert!(json.len() <= 4096),
            Ok(_) => {}
            Err(error) => told(&error),
        }
    }
    if let Ok(task) = pb::NewTask::decode(bytes) {
        match convert::new_task(task, &limits, &STORE) {
            Ok(task) => {
                assert!(task.params.is_none_or(|json| json.len() <= 4096));
                assert!((1..=512).contains(&task.name.as_str().len()));
                assert!(task.max_attempts.is_none_or(|attempts| attempts >= 1));
            }
            Err(error) => told(&error),
        }
    }
});

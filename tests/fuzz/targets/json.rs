//! The JSON guard: what it takes is JSON, within the bound; what serde takes and the guard does not is for a reason that
//! jsonb has; whatever is made of it is taken again.
#![no_main]

use absurd_server::domain::JsonText;
use absurd_server::domain::json::{DEPTH_MAX, JsonBound};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

const BOUND: JsonBound = JsonBound { bytes: 1 << 20, depth: DEPTH_MAX };

fuzz_target!(|text: &str| {
    let parsed = serde_json::from_str::<Value>(text);
    match JsonText::parse("field", text.to_owned(), BOUND) {
        Ok(json) => {
            // serde's numbers end where a double does; everything else is the same language.
            let out_of_range = |error: &serde_json::Error| error.to_string().contains("number out of range");
            assert!(parsed.as_ref().err().is_none_or(out_of_range), "taken, and no JSON: {parsed:?}");
            assert_eq!(json.as_str(), text);
        }
        Err(error) => {
            let error = error.to_string();
            let jsonbs_own = ["nested deeper", "\\u0000", "number"].iter().any(|reason| error.contains(reason));
            assert!(parsed.is_err() || jsonbs_own, "refused, and JSON: {error}");
        }
    }
    if let Ok(object) = JsonText::parse_object("field", text.to_owned(), BOUND) {
        let keyed = JsonText::with_text_key(Some(object), "key", "text").into_string();
        JsonText::parse_object("field", keyed.clone(), JsonBound { bytes: usize::MAX, ..BOUND })
            .expect("an object again");
        if let Ok(value) = serde_json::from_str::<Value>(&keyed) {
            assert_eq!(value["key"], "text");
        }
    }
    let reason = JsonText::reason(text).into_string();
    JsonText::parse("reason", reason, BOUND).expect("a failure's reason is never refused");
});

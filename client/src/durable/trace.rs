//! Trace context, which the headers of a task carry from its spawner to its worker.
//!
//! With the feature `opentelemetry`, a spawn carries the context of the current span, written by the process-wide
//! propagator (W3C trace context: `traceparent`, `tracestate`). The span of each execution has that context as its
//! parent. Without the feature, a child gets the trace headers of its parent.

use serde_json::{Map, Value};

/// Headers of the W3C trace context.
const FIELDS: [&str; 2] = ["traceparent", "tracestate"];

/// Adds the trace context to the headers of a spawn, unless they hold one. `parent` has the headers of the spawning
/// task.
pub(super) fn inject(headers: &mut Map<String, Value>, parent: Option<&Map<String, Value>>) {
    if headers.contains_key(FIELDS[0]) {
        return;
    }
    #[cfg(feature = "opentelemetry")]
    if otel::inject(headers) {
        return;
    }
    for (field, value) in FIELDS.iter().filter_map(|field| Some((*field, parent?.get(*field)?))) {
        headers.insert(field.to_owned(), value.clone());
    }
}

/// Makes the trace context in the headers the parent of an execution's span.
pub(super) fn go_on(span: &tracing::Span, headers: &Map<String, Value>) {
    if let Some(parent) = headers.get(FIELDS[0]).and_then(Value::as_str) {
        span.record("trace.parent", parent);
    }
    #[cfg(feature = "opentelemetry")]
    otel::go_on(span, headers);
}

#[cfg(feature = "opentelemetry")]
mod otel {
    use opentelemetry::global::get_text_map_propagator;
    use opentelemetry::propagation::{Extractor, Injector};
    use opentelemetry::trace::TraceContextExt as _;
    use serde_json::{Map, Value};
    use tracing_opentelemetry::OpenTelemetrySpanExt as _;

    struct Headers<'a>(&'a mut Map<String, Value>);

    impl Injector for Headers<'_> {
        fn set(&mut self, key: &str, value: String) {
            if !value.is_empty() {
                self.0.insert(key.to_owned(), value.into());
            }
        }
    }

    struct Stored<'a>(&'a Map<String, Value>);

    impl Extractor for Stored<'_> {
        fn get(&self, key: &str) -> Option<&str> {
            self.0.get(key)?.as_str()
        }

        fn keys(&self) -> Vec<&str> {
            self.0.keys().map(String::as_str).collect()
        }
    }

    pub(super) fn inject(headers: &mut Map<String, Value>) -> bool {
        let context = tracing::Span::current().context();
        if !context.span().span_context().is_valid() {
            return false;
        }
        get_text_map_propagator(|propagator| propagator.inject_context(&context, &mut Headers(headers)));
        true
    }

    pub(super) fn go_on(span: &tracing::Span, headers: &Map<String, Value>) {
        let context = get_text_map_propagator(|propagator| propagator.extract(&Stored(headers)));
        if context.span().span_context().is_valid() {
            // Without a subscriber that records parents, there is nothing to do.
            let _ = span.set_parent(context);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_carries_on_what_its_parent_has_unless_it_has_its_own() {
        let map = |value: Value| value.as_object().cloned().expect("an object");
        let parent = map(serde_json::json!({"traceparent": "00-1-2-01", "tracestate": "a=b", "other": 1}));
        let mut headers = map(serde_json::json!({"mine": 1}));
        inject(&mut headers, Some(&parent));
        let expected = serde_json::json!({"mine": 1, "traceparent": "00-1-2-01", "tracestate": "a=b"});
        assert_eq!(headers, map(expected));
        let mut own = map(serde_json::json!({"traceparent": "00-3-4-01"}));
        inject(&mut own, Some(&parent));
        assert_eq!(own, map(serde_json::json!({"traceparent": "00-3-4-01"})));
        let mut none = Map::new();
        inject(&mut none, None);
        assert!(none.is_empty());
    }
}

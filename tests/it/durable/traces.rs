//! Trace context: from the span that spawns, through the task's headers, to the spans of its executions, its steps and its
//! children.

use absurd_client::durable::{Absurd, BoxError, Context, TaskType, WorkerOptions};
use absurd_tests::{PATIENCE, Server, eventually};
use opentelemetry::trace::{SpanId, TracerProvider as _};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};
use serde_json::{Value, json as j};
use tracing::Instrument as _;
use tracing_subscriber::layer::SubscriberExt as _;

const CHILD: TaskType<Value, Value> = TaskType::new("child");

/// One thread: the subscriber is this test's alone.
#[tokio::test]
async fn a_trace_goes_from_the_spawner_through_tasks_steps_and_children() {
    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder().with_simple_exporter(exporter.clone()).build();
    opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
    let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
    // With a single subscriber in the process, other tests' threads, which have none, would decide for all threads that nobody
    // is interested in a span. With a second one each of both is asked.
    let _second = tracing::Dispatch::new(tracing_subscriber::registry());
    let _guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(layer));

    let server = Server::start().await;
    let absurd = Absurd::new(server.client());
    absurd.register(
        CHILD,
        |ctx: Context, _: Value| async move { Ok::<_, BoxError>(ctx.headers()["traceparent"].clone()) },
    );
    let parent = absurd.register("parent", |ctx: Context, _: Value| async move {
        ctx.step("s", async || Ok::<_, BoxError>(1)).await?;
        let child = ctx.spawn(&CHILD, &j!(null)).await?;
        Ok::<_, BoxError>(ctx.await_task_result(&CHILD, child.task_id).await?)
    });
    let worker = absurd.start_worker(WorkerOptions::default()).await.unwrap();
    let spawn = async { absurd.spawn(&parent, &j!(null)).await };
    let spawned = spawn.instrument(tracing::info_span!("request")).await.unwrap();
    let end = absurd.await_task_result(&parent, spawned.task_id, Some(PATIENCE)).await.unwrap();
    let seen: String = end.result.unwrap().to().unwrap();
    worker.stop().await;

    let find = |spans: &[SpanData], name: &str| -> Vec<SpanData> {
        spans.iter().filter(|span| span.name == name).cloned().collect()
    };
    let spans = eventually("all spans have ended", || async {
        let spans = exporter.get_finished_spans().unwrap();
        // The parent twice, as it was suspended, and the child.
        (find(&spans, "absurd.task").len() == 3).then_some(spans)
    })
    .await;
    let request = find(&spans, "request").remove(0);
    let tasks = find(&spans, "absurd.task");
    for span in tasks.iter().chain(&find(&spans, "absurd.step")) {
        assert_eq!(span.span_context.trace_id(), request.span_context.trace_id(), "{span:?}");
    }
    let under = |parent: SpanId| tasks.iter().filter(move |task| task.parent_span_id == parent);
    assert_eq!(under(request.span_context.span_id()).count(), 2, "both executions go on from the spawner");
    let step = find(&spans, "absurd.step").remove(0);
    let first = under(request.span_context.span_id()).find(|task| task.span_context.span_id() == step.parent_span_id);
    let first = first.expect("the step belongs to the first execution").span_context.span_id();
    assert_eq!(under(first).count(), 1, "the child goes on from the execution that spawned it");
    let parts: Vec<&str> = seen.split('-').collect();
    assert_eq!(parts[1..3], [request.span_context.trace_id().to_string(), first.to_string()]);
}

//! Every statement prepares, for queues of both modes whose name needs quoting; the hot ones walk an index.

use absurd_server::store::statement::{ALL, RUN_CLAIM, Wait};
use absurd_tests::Database;

const ODD: &str = "it's \"Odd\" – queue";

#[tokio::test(flavor = "multi_thread")]
async fn every_statement_prepares_for_a_queue_that_needs_quoting() {
    let database = Database::new().await;
    let sql = database.connect().await;
    for mode in ["unpartitioned", "partitioned"] {
        let queue = format!("{ODD} {mode}");
        sql.execute("select absurd.create_queue($1, $2)", &[&queue, &mode]).await.unwrap();
        for statement in ALL.iter().filter(|statement| mode == "partitioned" || !statement.is_for_partitioned()) {
            for wait in [Wait::Skip, Wait::Block] {
                let text = statement.render(&queue, wait);
                if let Err(error) = sql.prepare(&text).await {
                    panic!("{} does not prepare for a {mode} queue: {error:?}\n{text}", statement.name);
                }
            }
        }
    }
}

/// With a backlog and statistics, a claim reads the index in order and never sorts or scans the backlog.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_walks_the_index_whatever_the_backlog() {
    let database = Database::new().await;
    let sql = database.connect().await;
    sql.execute("select absurd.create_queue('q')", &[]).await.unwrap();
    sql.batch_execute(
        "insert into absurd.t_q (task_id, task_name, params, state, attempts)
         select md5(i::text)::uuid, 'n', 'null', 'pending', 1 from generate_series(1, 20000) i;
         insert into absurd.r_q (run_id, task_id, attempt, state, available_at)
         select md5('r' || i)::uuid, md5(i::text)::uuid, 1, 'pending', now() - i * interval '1 second'
           from generate_series(1, 20000) i;
         analyze absurd.t_q; analyze absurd.r_q; set plan_cache_mode = force_generic_plan",
    )
    .await
    .unwrap();
    let text = RUN_CLAIM.render("q", Wait::Skip);
    sql.batch_execute(&format!("prepare claim as {text}")).await.unwrap();
    let explain = "explain (analyze, costs off, timing off, summary off)
                   execute claim(array['w'], array['0123456789012345678901'], array[30], 1, '{}')";
    let rows = sql.simple_query(explain).await.unwrap();
    let plan: String = rows
        .iter()
        .filter_map(|row| match row {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(|line| format!("{line}\n")),
            _ => None,
        })
        .collect();
    assert!(plan.contains("Index Scan using r_q_sai on r_q"), "{plan}");
    assert!(!plan.contains("Seq Scan on r_q") && !plan.contains("Seq Scan on t_q"), "{plan}");
    // Whatever the walk touched, it did not touch the backlog.
    let most = plan
        .lines()
        .filter_map(|line| line.split("rows=").nth(1)?.split_whitespace().next()?.parse::<f64>().ok())
        .fold(0.0, f64::max);
    assert!(most < 10.0, "{most} rows at one node\n{plan}");
}

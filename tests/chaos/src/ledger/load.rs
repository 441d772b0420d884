//! Reads both books.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader};
use std::path::Path;

use absurd_server::domain::ClaimToken;
use anyhow::Context as _;
use tokio_postgres::Client;

use super::{Arrival, Asked, Books, Row, Seen};
use crate::history::{How, Line};

/// Rows of the audit that are read at once.
const PAGE: i64 = 100_000;

fn digest(token: &str) -> String {
    ClaimToken::parse(token).map(|token| token.digest().as_str().to_owned()).unwrap_or_default()
}

/// Reads the books of all processes in a directory.
pub(crate) fn read_histories(home: &Path, books: &mut Books) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(home)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "jsonl") {
            read_history(&path, books).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}

fn read_history(path: &Path, books: &mut Books) -> anyhow::Result<()> {
    let process = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let mut open: HashMap<u64, usize> = HashMap::new();
    for line in BufReader::new(std::fs::File::open(path)?).lines() {
        match serde_json::from_str(&line?)? {
            Line::Begin { n, t, op, call } => {
                open.insert(n, books.asked.len());
                let digest = call.token.as_deref().map(digest);
                books.asked.push(Asked {
                    op,
                    call,
                    digest,
                    began: t,
                    ended: i64::MAX,
                    how: How::Info,
                    why: Some("no answer".into()),
                    value: None,
                    first: None,
                });
            }
            Line::End { n, t, how, why, value, first } => {
                let place = open.remove(&n).with_context(|| format!("call {n} ended before it began"))?;
                let asked = &mut books.asked[place];
                (asked.ended, asked.how, asked.why, asked.value, asked.first) = (t, how, why, value, first);
            }
            Line::Delivered { t, stream, task, run, token, attempt: _, params, steps, complete, woken } => {
                books.arrivals.push(Arrival {
                    process: process.clone(),
                    at: t,
                    stream,
                    task,
                    run,
                    digest: digest(&token),
                    params,
                    steps,
                    complete,
                    woken,
                });
            }
            Line::Stream { t, stream, what, credit } => {
                books.seen.push(Seen { process: process.clone(), at: t, stream, what, credit });
            }
        }
    }
    Ok(())
}

/// Reads the audit.
pub(crate) async fn read_audit(sql: &Client, books: &mut Books) -> anyhow::Result<()> {
    let statement = sql
        .prepare(
            "select seq, at, kind, op, task, run, attempt, old_state, state, old_owner, owner, expires, available, name, value
               from chaos.audit where seq > $1 order by seq limit $2",
        )
        .await?;
    let mut after = 0_i64;
    loop {
        let rows = sql.query(&statement, &[&after, &PAGE]).await?;
        let Some(last) = rows.last() else { return Ok(()) };
        after = last.get(0);
        books.audit.extend(rows.iter().map(|row| {
            let text = |place: usize| row.get::<_, Option<String>>(place).unwrap_or_default();
            let letter = |place: usize| text(place).chars().next().unwrap_or(' ');
            Row {
                at: row.get(1),
                kind: letter(2),
                op: letter(3),
                task: row.get::<_, Option<_>>(4).unwrap_or_default(),
                run: row.get::<_, Option<_>>(5).unwrap_or_default(),
                attempt: row.get::<_, Option<_>>(6).unwrap_or_default(),
                old_state: text(7),
                state: text(8),
                old_owner: text(9),
                owner: text(10),
                expires: row.get(11),
                available: row.get(12),
                name: row.get(13),
                value: row.get(14),
            }
        }));
    }
}

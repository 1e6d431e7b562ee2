//! Attempts to write rows into the target, or to remove some: each stands under a savepoint and ends with `SET CONSTRAINTS ALL IMMEDIATE`.
//! One that the target refuses for a reason that lies in a record leaves nothing behind.

use bytes::{Bytes, BytesMut};
use futures_util::SinkExt;
use pg_dedup_record::fold::Way;
use pg_dedup_record::refusal::{Refusal, RefusedAttempt, refuses_record};
use pg_dedup_record::{Batch, pgcopy};
use tokio_postgres::Statement;

use crate::conn::protocol_error;
use crate::error::{At, Error, Result, Side};
use crate::failpoint::{self, Failpoint};
use crate::protocol::{ChunkCalls, GENERIC_PLANS, USUAL_PLANS};
use crate::tables::TableWork;

/// Bytes sent in one piece, rows being whole: every piece costs a message, two task switches and a system call or more, and a socket takes
/// about this much at once.
const PIECE_BYTES: usize = 128 << 10;

/// Neighbours of this size are sent without a copy.
const SLICE_BYTES: usize = 16 << 10;

/// Attempts to write rows of a batch, in their order; `None`: they are written.
pub async fn write(
    calls: ChunkCalls<'_>,
    table: &TableWork,
    batch: &Batch,
    rows: &[u32],
    way: Way,
) -> Result<Option<RefusedAttempt>> {
    match way {
        Way::Insert => attempt(calls, insert(calls, table, batch, rows)).await,
        Way::Upsert => {
            // Outside of the savepoint: a table made under each of them would cost the server a lock each until the chunk's end.
            let staging = calls.upsert_staging().await?;
            attempt(calls, upsert(calls, table, &staging, batch, rows)).await
        }
    }
}

/// Attempts to remove the rows with these keys, whose contents stand elsewhere.
pub async fn remove(calls: ChunkCalls<'_>, keys: &[u8]) -> Result<Option<RefusedAttempt>> {
    attempt(calls, calls.delete_superseded(keys)).await
}

/// One attempt under a savepoint; `None`: accepted.
async fn attempt(
    calls: ChunkCalls<'_>,
    write: impl Future<Output = Result<Driver<()>>>,
) -> Result<Option<RefusedAttempt>> {
    let client = &calls.session.client;
    let doing = "writing rows";
    client.batch_execute(&format!("SAVEPOINT dedup_rows; {USUAL_PLANS}")).await.at(Side::Target, doing)?;
    let done = match write.await? {
        Ok(()) => {
            let end = format!("SET CONSTRAINTS ALL IMMEDIATE; RELEASE SAVEPOINT dedup_rows; {GENERIC_PLANS}");
            client.batch_execute(&end).await
        }
        Err(error) => Err(error),
    };
    let Err(error) = done else { return Ok(None) };
    let Some(db) = error.as_db_error().filter(|db| refuses_record(db.code().code())) else {
        return Err(Error::record_driver(Side::Target, doing, error));
    };
    let told = RefusedAttempt {
        refusal: Refusal::by_target(db.code().code(), db.message()),
        constraint: db.schema().zip(db.constraint()).map(|(s, c)| (s.to_owned(), c.to_owned())),
        line: db.where_().and_then(copy_line),
    };
    client
        .batch_execute("ROLLBACK TO SAVEPOINT dedup_rows; RELEASE SAVEPOINT dedup_rows")
        .await
        .at(Side::Target, "taking back refused rows")?;
    Ok(Some(told))
}

/// What the driver says, for the caller to judge.
type Driver<T> = std::result::Result<T, tokio_postgres::Error>;

async fn insert(calls: ChunkCalls<'_>, table: &TableWork, batch: &Batch, rows: &[u32]) -> Result<Driver<()>> {
    let statement = calls.session.prepared(&table.copy_in).await?;
    Ok(copy_in(calls, &statement, batch, rows).await)
}

/// Changed rows go into a staging table first; the extension locks, keeps what was there, and updates.
async fn upsert(
    calls: ChunkCalls<'_>,
    table: &TableWork,
    staging: &str,
    batch: &Batch,
    rows: &[u32],
) -> Result<Driver<()>> {
    let client = &calls.session.client;
    let apply = calls.session.prepared("SELECT dedup.apply_upserts($1::uuid, $2::text)").await?;
    let applied = async {
        let copy = client.prepare(&table.copy_into(staging)).await?;
        copy_in(calls, &copy, batch, rows).await?;
        client.query_one(&apply, &[&calls.run, &calls.chunk_id]).await?.try_get::<_, i64>(0)
    };
    match applied.await {
        Ok(count) if count == rows.len() as i64 => Ok(Ok(())),
        Ok(count) => Err(protocol_error(
            Side::Target,
            format!("apply_upserts changed {count} rows where {} were to be changed", rows.len()),
        )),
        Err(error) => Ok(Err(error)),
    }
}

/// One COPY of rows.
async fn copy_in(calls: ChunkCalls<'_>, statement: &Statement, batch: &Batch, rows: &[u32]) -> Driver<()> {
    let sink = calls.session.client.copy_in::<_, Bytes>(statement).await?;
    let mut sink = std::pin::pin!(sink);
    let sent = async {
        sink.feed(Bytes::from_static(pgcopy::header())).await?;
        let (first, second) = rows.split_at(rows.len() / 2);
        for piece in pieces(batch, first) {
            pace(calls, &piece).await;
            sink.feed(piece).await?;
        }
        failpoint::reach(Failpoint::MiddleOfCopy).await;
        for piece in pieces(batch, second) {
            pace(calls, &piece).await;
            sink.feed(piece).await?;
        }
        sink.feed(Bytes::from_static(pgcopy::trailer())).await
    }
    .await;
    // When the server has refused the stream, its reason comes with the end; the sink only says that it is closed.
    let finished = sink.as_mut().finish().await;
    match (finished, sent) {
        (Ok(_), sent) => sent,
        (Err(error), _) => Err(error),
    }
}

/// A chunk that was read slowly is written slowly, too: else the target would bear it all at once.
async fn pace(calls: ChunkCalls<'_>, piece: &Bytes) {
    if let Some(throttle) = calls.throttle {
        throttle.pace_writing(piece.len()).await;
    }
}

/// The rows, in order, in pieces of about [`PIECE_BYTES`]. What stands side by side in the batch and is large enough is a slice of it, the rest
/// is gathered.
fn pieces<'a>(batch: &'a Batch, rows: &'a [u32]) -> impl Iterator<Item = Bytes> + 'a {
    let mut rows = rows.iter().map(|row| batch.row_range(*row as usize)).peekable();
    let mut neighbours = move || {
        let mut run = rows.next()?;
        while let Some(next) = rows.next_if(|next| next.start == run.end && run.len() < PIECE_BYTES) {
            run.end = next.end;
        }
        Some(run)
    };
    let mut next = neighbours();
    let mut gathered = BytesMut::new();
    std::iter::from_fn(move || {
        while let Some(run) = next.take() {
            if run.len() >= SLICE_BYTES {
                if gathered.is_empty() {
                    next = neighbours();
                    return Some(batch.data().slice(run));
                }
                next = Some(run);
                break;
            }
            gathered.reserve(if gathered.is_empty() { PIECE_BYTES + SLICE_BYTES } else { run.len() });
            gathered.extend_from_slice(&batch.data()[run]);
            next = neighbours();
            if gathered.len() >= PIECE_BYTES {
                break;
            }
        }
        (!gathered.is_empty()).then(|| gathered.split().freeze())
    })
}

/// The line, from 0, that an error's CONTEXT names: `COPY t, line N` or `COPY t, line N, column c`. The outermost COPY
/// is the last; the table's name may itself look like one, so this is a hypothesis and is used as one.
pub fn copy_line(context: &str) -> Option<usize> {
    context.lines().rev().find_map(|line| {
        let rest = line.strip_prefix("COPY ")?;
        rest.match_indices(", line ").find_map(|(at, marker)| {
            let after = &rest[at + marker.len()..];
            let digits = after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len());
            let ends_well = matches!(after[digits..].chars().next(), None | Some(',' | ':'));
            if ends_well { after[..digits].parse::<usize>().ok()?.checked_sub(1) } else { None }
        })
    })
}

#[cfg(test)]
mod tests {
    use pg_dedup_record::{BatchBuilder, Canonical, Column, ENCODING_VERSION, Layout};

    use super::*;

    #[test]
    fn lines_are_read_from_the_context() {
        assert_eq!(copy_line("COPY t, line 1"), Some(0));
        assert_eq!(copy_line("COPY t, line 12, column a"), Some(11));
        assert_eq!(copy_line("COPY t, line 12, column a: \"x\""), Some(11));
        assert_eq!(copy_line("COPY my, line table, line 7"), Some(6));
        assert_eq!(copy_line("PL/pgSQL function f() line 3 at RAISE\nCOPY t, line 5"), Some(4));
        assert_eq!(copy_line("COPY inner, line 2\nSQL statement \"COPY\"\nCOPY outer, line 9"), Some(8));
        for none in [
            "",
            "COPY t",
            "COPY t, line ",
            "COPY t, line 0",
            "COPY t, line x",
            "SQL statement \"COPY t, line 3\"",
        ] {
            assert_eq!(copy_line(none), None, "{none}");
        }
    }

    fn batch(rows: usize, bytes: usize) -> Batch {
        let column = Column { name: "c".into(), type_name: "bytea".into(), canonical: Canonical::Verbatim };
        let layout = Layout {
            encoding_version: ENCODING_VERSION,
            columns: vec![column],
            content: vec![0],
            key: vec![],
            rest: vec![],
        };
        let mut data = pgcopy::header().to_vec();
        for row in 0..rows {
            pgcopy::write_tuple(&[Some(&vec![row as u8; bytes])], &mut data).unwrap();
        }
        data.extend_from_slice(pgcopy::trailer());
        let mut builder = BatchBuilder::new(&layout, true);
        builder.push(&data).unwrap();
        builder.finish().unwrap()
    }

    #[test]
    fn pieces_are_the_rows_in_order() {
        let batch = batch(1000, 1000);
        let rows: Vec<u32> = (0..1000).filter(|row| row % 3 != 0).collect();
        let expected: Vec<u8> = rows.iter().flat_map(|row| batch.row_bytes(*row as usize)).copied().collect();
        let pieces: Vec<Bytes> = pieces(&batch, &rows).collect();
        assert_eq!(pieces.concat(), expected);
        assert_eq!(pieces.len(), expected.len().div_ceil(PIECE_BYTES));
        assert!(pieces.iter().all(|piece| piece.len() < PIECE_BYTES + SLICE_BYTES));
    }

    #[test]
    fn large_neighbours_are_sent_without_a_copy() {
        let wide = batch(3, 3 << 20);
        let sent: Vec<Bytes> = pieces(&wide, &[0, 2]).collect();
        assert_eq!(sent.len(), 2);
        assert_eq!(sent[1].as_ptr(), wide.row_bytes(2).as_ptr());
        assert_eq!(pieces(&wide, &[]).count(), 0);

        // One row, a gap, and many neighbours: the one is gathered, the others are slices.
        let narrow = batch(1000, 1000);
        let rows: Vec<u32> = std::iter::once(0).chain(2..1000).collect();
        let sent: Vec<Bytes> = pieces(&narrow, &rows).collect();
        assert_eq!(&sent[0][..], narrow.row_bytes(0));
        assert_eq!(sent[1].as_ptr(), narrow.row_bytes(2).as_ptr());
        let expected: Vec<u8> =
            rows.iter().flat_map(|row| narrow.row_bytes(*row as usize)).copied().collect();
        assert_eq!(sent.concat(), expected);
    }
}

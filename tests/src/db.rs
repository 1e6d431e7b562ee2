//! SQL over one connection.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, TryStreamExt};
use tokio::task::JoinHandle;
use tokio_postgres::types::{FromSqlOwned, ToSql};
use tokio_postgres::{Client, Error, NoTls, SimpleQueryMessage};

use crate::cluster::Cluster;

/// One connection to a database. Whatever is expected to work panics with the statement when it does not.
pub struct Db {
    client: Client,
    connection: JoinHandle<()>,
}

impl Db {
    /// Connects as superuser.
    pub async fn connect(cluster: &Cluster, database: &str) -> Self {
        let (client, connection) = cluster
            .config(database)
            .connect(NoTls)
            .await
            .unwrap_or_else(|error| panic!("cannot connect to {database}: {}", describe(&error)));
        // The connection ends in an error when a test stops its server; the client reports that too.
        let connection = tokio::spawn(async move { drop(connection.await) });
        Db { client, connection }
    }

    /// The client below, for what is not covered here.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Runs one or more statements.
    pub async fn exec(&self, sql: &str) {
        if let Err(error) = self.try_exec(sql).await {
            panic!("{}\nin: {sql}", describe(&error));
        }
    }

    /// Runs statements that may fail.
    pub async fn try_exec(&self, sql: &str) -> Result<(), Error> {
        self.client.batch_execute(sql).await
    }

    /// Runs a statement that has to fail; returns its SQLSTATE and its message with detail and hint.
    pub async fn fails(&self, sql: &str) -> (String, String) {
        match self.try_exec(sql).await {
            Ok(()) => panic!("succeeded, and should not have: {sql}"),
            Err(error) => (sqlstate(&error), describe(&error)),
        }
    }

    /// The single value of a query with parameters.
    pub async fn value<T: FromSqlOwned>(&self, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> T {
        match self.try_value(sql, parameters).await {
            Ok(value) => value,
            Err(error) => panic!("{}\nin: {sql}", describe(&error)),
        }
    }

    /// The single value of a query that may fail.
    pub async fn try_value<T: FromSqlOwned>(
        &self,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<T, Error> {
        self.client.query_one(sql, parameters).await?.try_get(0)
    }

    /// The single value of a query.
    pub async fn one<T: FromSqlOwned>(&self, sql: &str) -> T {
        self.value(sql, &[]).await
    }

    /// Waits until a condition is true; panics when it has not come true within half a minute.
    pub async fn wait_until(&self, condition: &str) {
        for _ in 0..3_000 {
            if self.one(&format!("SELECT {condition}")).await {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("never came true: {condition}");
    }

    /// All rows of a query, every value as text.
    pub async fn texts(&self, sql: &str) -> Vec<Vec<Option<String>>> {
        let messages = match self.client.simple_query(sql).await {
            Ok(messages) => messages,
            Err(error) => panic!("{}\nin: {sql}", describe(&error)),
        };
        messages
            .iter()
            .filter_map(|message| match message {
                SimpleQueryMessage::Row(row) => {
                    Some((0..row.len()).map(|column| row.get(column).map(str::to_string)).collect())
                }
                _ => None,
            })
            .collect()
    }

    /// The first column of a query as text, nulls left out.
    pub async fn column(&self, sql: &str) -> Vec<String> {
        self.texts(sql).await.into_iter().filter_map(|row| row.into_iter().next().flatten()).collect()
    }

    /// Everything that `COPY (query) TO STDOUT` sends, one line a row.
    pub async fn copy_lines(&self, query: &str) -> Vec<Vec<u8>> {
        let sql = format!("COPY ({query}) TO STDOUT");
        let stream = match self.client.copy_out(&sql).await {
            Ok(stream) => stream,
            Err(error) => panic!("{}\nin: {sql}", describe(&error)),
        };
        let data = match stream.try_collect::<Vec<Bytes>>().await {
            Ok(parts) => parts.concat(),
            Err(error) => panic!("{}\nin: {sql}", describe(&error)),
        };
        // Text format: a newline inside a value is written as \n, so every newline byte ends a row.
        data.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect()
    }

    /// Feeds `COPY … FROM STDIN`; returns the number of rows.
    pub async fn try_copy_in(&self, sql: &str, data: Bytes) -> Result<u64, Error> {
        let sink = self.client.copy_in(sql).await?;
        tokio::pin!(sink);
        sink.send(data).await?;
        sink.finish().await
    }

    /// Process id of the backend.
    pub async fn backend_pid(&self) -> i32 {
        self.one("SELECT pg_backend_pid()").await
    }
}

impl Drop for Db {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// SQLSTATE of a server error; empty when the error is the connection's.
pub fn sqlstate(error: &Error) -> String {
    error.code().map(|code| code.code().to_string()).unwrap_or_default()
}

/// Message, detail and hint in one text.
pub fn describe(error: &Error) -> String {
    match error.as_db_error() {
        None => error.to_string(),
        Some(db) => {
            let mut text = format!("{}: {}", db.code().code(), db.message());
            for (label, part) in [("DETAIL", db.detail()), ("HINT", db.hint()), ("CONTEXT", db.where_())] {
                if let Some(part) = part {
                    text.push_str(&format!("\n{label}: {part}"));
                }
            }
            text
        }
    }
}

/// Quotes a text as a literal.
pub fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

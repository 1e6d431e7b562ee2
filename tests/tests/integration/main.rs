//! Everything that needs a server: one binary, one private pair of clusters a test, a module a subject.

mod bad_input;
mod commands;
mod crash;
mod doctor;
mod harness;
mod index_functions;
mod keys;
mod lost_records;
mod migrate;
mod names;
mod pauses;
mod protocol;
mod quarantine;
mod reconcile;
mod regressions;
mod rehearsal;
mod repair;
mod rollback;
mod sample;
mod second_run;
mod shapes;
mod sql_source;
mod stop;
mod tls;
mod types;
mod verification;

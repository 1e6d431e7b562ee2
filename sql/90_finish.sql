-- Last file of the script, when every object exists: comments on what is made in Rust or bears no comment of its own, then privileges.

COMMENT ON SCHEMA dedup IS 'pg_dedup_migrate: runs, checkpoints, hash index and the functions that work on them';
COMMENT ON SEQUENCE dedup.ordinal_seq IS 'ordinals: the order in which chunks finish';
COMMENT ON SEQUENCE dedup.segment_id_seq IS 'segment numbers: a new one for every attempt';
COMMENT ON SEQUENCE dedup.targets_target_id_seq IS 'numbers of dedup.targets';
COMMENT ON SEQUENCE dedup.quarantine_quarantine_id_seq IS 'numbers of dedup.quarantine';
COMMENT ON SEQUENCE dedup.rollbacks_rollback_id_seq IS 'numbers of dedup.rollbacks';
COMMENT ON SEQUENCE dedup.left_alone_left_alone_id_seq IS 'numbers of dedup.left_alone';
COMMENT ON SEQUENCE dedup.events_event_id_seq IS 'order of dedup.events';
COMMENT ON SEQUENCE dedup.alert_log_alert_id_seq IS 'numbers of dedup.alert_log';
COMMENT ON SEQUENCE dedup.archives_archive_id_seq IS 'numbers of dedup.archives';
COMMENT ON TRIGGER append_only ON dedup.events IS 'keeps the audit log append-only';
COMMENT ON TRIGGER mark_filter_cold ON dedup.segment IS 'rows that come in past the extension are not in the filter';
COMMENT ON TRIGGER mark_filter_cold ON dedup.segment_block IS 'rows that come in past the extension are not in the filter';
COMMENT ON TRIGGER mark_filter_cold_row ON dedup.segment IS 'rows that logical replication applies are not in the filter';
COMMENT ON TRIGGER keep_owner ON dedup.runs IS 'a run belongs to the role that created it';
COMMENT ON TRIGGER keep_stored_sql ON dedup.run_tables IS 'what a run reads is said by its owner';

-- For a DBA.
COMMENT ON FUNCTION dedup.version() IS 'version of the loaded library';
COMMENT ON FUNCTION dedup.locate(regclass, bytea) IS 'URI of the row that holds this content now; null: the target does not hold it';
COMMENT ON FUNCTION dedup.maybe_seen(regclass, bytea) IS 'the filter alone: false: certainly not in the target; true: perhaps; a cold filter says true';
COMMENT ON FUNCTION dedup.provenance(regclass, bytea) IS 'run and chunk that wrote this content; nulls: it stood there before any run; no row: the target does not hold it';
COMMENT ON FUNCTION dedup.filter_stats() IS 'state of filter and claims in shared memory: warm or cold, fill, predicted share of needless look-ups, claims held';
COMMENT ON FUNCTION dedup.warm_filter() IS 'reads every segment of this database into the filter; returns the entries read, 0 when it was warm';
COMMENT ON FUNCTION dedup.index_existing(regclass) IS 'hashes the rows that stand in a target and are not indexed yet; returns the entries added';
COMMENT ON FUNCTION dedup.reindex_target(regclass) IS 'drops the entries of a target and hashes its rows anew; returns the entries added';
COMMENT ON FUNCTION dedup.forget_target(regclass) IS 'drops the entries of a target, its rows stay; returns the segments dropped';
COMMENT ON FUNCTION dedup.orphans(uuid) IS 'chunks of a run that dropped duplicates whose content stands nowhere any more, and how many';

COMMENT ON FUNCTION dedup.commit_took(float8) IS 'a probe of the target, by a session that migrates itself, took so many milliseconds';
COMMENT ON FUNCTION dedup.decide_here(uuid, uuid, float8, text) IS 'reports a session that migrates itself, and sets the limits of the run if it is its turn';

-- The worker protocol: docs/protocol.md has the packed forms.
COMMENT ON FUNCTION dedup.begin_chunk(uuid, text, uuid) IS 'opens a leased chunk in this transaction; true: keys of its range may stand in the target, so match_keys comes next';
COMMENT ON FUNCTION dedup.match_keys(uuid, text, bytea, bytea) IS 'locks the rows under these keys and says of each: absent, unchanged, changed, collision, delivered again, or written by this chunk before';
COMMENT ON FUNCTION dedup.claim(uuid, text, bytea) IS 'takes the right to write these content hashes; one verdict each: new, duplicate or pending';
COMMENT ON FUNCTION dedup.resolve(uuid, text, bytea) IS 'waits for the transactions that hold pending content hashes; one verdict each: new (now ours) or duplicate';
COMMENT ON FUNCTION dedup.upsert_staging(uuid, text) IS 'the empty temporary table that takes changed records, made once a transaction; returns its name';
COMMENT ON FUNCTION dedup.apply_upserts(uuid, text) IS 'replaces the rows under the staged records'' keys, before images kept; returns how many';
COMMENT ON FUNCTION dedup.keep_rows(uuid, text, bytea) IS 'rows whose replacement was refused stay; answers their content digests';
COMMENT ON FUNCTION dedup.take_back(uuid, text, bytea) IS 'removes rows that this chunk wrote before it turned out that another row keeps their content; returns how many';
COMMENT ON FUNCTION dedup.delete_superseded(uuid, text, bytea) IS 'removes rows whose records now carry content that other rows hold, before images kept; returns how many';
COMMENT ON FUNCTION dedup.add_lists(uuid, text, bytea, bytea) IS 'takes parts of manifest and ledger ahead of finish_chunk, which takes the last ones';
COMMENT ON FUNCTION dedup.finish_chunk(uuid, text, bigint[], bytea, bytea, bytea, jsonb) IS 'writes manifest and ledger, reads the written rows back and closes the books; returns the ordinal';
COMMENT ON FUNCTION dedup.verify_written(uuid, int, bool) IS 'compares what chunks of a run wrote and did not read back (tables without a key, runs that verify at the end) with the target''s rows, by scanning it; they become verified or failed; returns the rows missing or different; null: another session is at it';
COMMENT ON FUNCTION dedup.reconcile_chunk(bigint, text, bytea) IS 'compares a chunk''s records with the target''s rows and enters what is found; returns the mismatches';
COMMENT ON FUNCTION dedup.reconcile_local_chunks(bigint) IS 'reads and compares the chunks that are left of sources which this database sees; returns how many';
COMMENT ON FUNCTION dedup.recheck_chunks(bigint) IS 'forgets chunks of a pass that is taken up whose rows in the target are others now; returns how many';
COMMENT ON FUNCTION dedup.settle_reconcile(bigint) IS 'compares the hash index with the targets'' rows when every chunk is compared, and enters what that shows';
COMMENT ON FUNCTION dedup.retract_stale(uuid) IS 'takes every entry that no row bears out out of the index of a run''s targets; returns how many';
COMMENT ON FUNCTION dedup.prepare_rollback(bigint) IS 'refuses a rollback of what others rest on, or keeps it for them, and of what foreign keys point at; lists the steps; returns the rows kept';
COMMENT ON FUNCTION dedup.undo_ordinal(bigint, bigint, bool) IS 'takes back what a chunk did when it finished under an ordinal; no row: a newer change of one of its rows comes first';
COMMENT ON FUNCTION dedup.run_chunk(uuid, text) IS 'the work of migrate_chunk';

-- Parts of the above.
COMMENT ON FUNCTION dedup.compact_step(int) IS 'merges one full level of a target''s segments; false: no level is full, or somebody else is at it';
COMMENT ON FUNCTION dedup.key_text(int, bytea) IS 'a packed key as column=value, joined by &; null: an empty key';
COMMENT ON FUNCTION dedup.indexed_target(regclass) IS 'the number of a target''s hash index, for who may read the target';
COMMENT ON FUNCTION dedup.segment_entries(int, bytea) IS 'unpacks a block of a segment; dedup.hash_index is the way to read it';
COMMENT ON FUNCTION dedup.disk_space() IS 'bytes free on the file systems of the data directory, pg_wal and every tablespace';
COMMENT ON FUNCTION dedup.ledger_entries(int, bytea) IS 'unpacks a block of the ledger; dedup.duplicates is the way to read it';
COMMENT ON FUNCTION dedup.target_layout(regclass, text[], text[], text[]) IS 'columns in COPY order with their canonical form and roles; refuses types that cannot be hashed';
COMMENT ON FUNCTION dedup.mark_filter_cold() IS 'trigger: what comes into the segments past the extension is not in the filter';

-- Nothing is granted to PUBLIC. docs/privileges.md lists the grants of a worker, an observer and an owner.
REVOKE ALL ON SCHEMA dedup FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA dedup FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA dedup FROM PUBLIC;
REVOKE ALL ON ALL ROUTINES IN SCHEMA dedup FROM PUBLIC;

-- Rows that come into the segment tables past the extension's own code (restore, logical apply, by hand) are not in the filter.
-- ALWAYS: under session_replication_role = replica too. The extension's own inserts bypass triggers.
CREATE TRIGGER mark_filter_cold BEFORE INSERT OR UPDATE ON dedup.segment FOR EACH STATEMENT EXECUTE FUNCTION dedup.mark_filter_cold();
ALTER TABLE dedup.segment ENABLE ALWAYS TRIGGER mark_filter_cold;
CREATE TRIGGER mark_filter_cold BEFORE INSERT OR UPDATE ON dedup.segment_block FOR EACH STATEMENT EXECUTE FUNCTION dedup.mark_filter_cold();
ALTER TABLE dedup.segment_block ENABLE ALWAYS TRIGGER mark_filter_cold;
-- Logical apply fires row triggers only. Blocks come with their segment's row in one transaction, so the segments' are enough.
CREATE TRIGGER mark_filter_cold_row AFTER INSERT OR UPDATE ON dedup.segment FOR EACH ROW EXECUTE FUNCTION dedup.mark_filter_cold();
ALTER TABLE dedup.segment ENABLE ALWAYS TRIGGER mark_filter_cold_row;

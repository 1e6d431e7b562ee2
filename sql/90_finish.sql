-- Nothing is granted to PUBLIC. docs/privileges.md lists the grants of a worker, an observer and an owner.
REVOKE ALL ON SCHEMA dedup FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA dedup FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA dedup FROM PUBLIC;
REVOKE ALL ON ALL ROUTINES IN SCHEMA dedup FROM PUBLIC;

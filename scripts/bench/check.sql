-- The target's contents and the source's distinct ones, by EXCEPT both ways, the source read anew through postgres_fdw.
-- Variables: relation, content (its columns), host, port, database of the source. Answers one line:
-- rows in the target, rows in the source, distinct contents in the source, contents missing, contents too many.
SET work_mem = '1GB';
SET client_min_messages = warning;
CREATE EXTENSION postgres_fdw;
CREATE SERVER origin FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host :'host', port :'port', dbname :'database', fetch_size '10000');
CREATE USER MAPPING FOR CURRENT_USER SERVER origin OPTIONS (user 'postgres');
CREATE SCHEMA origin;
IMPORT FOREIGN SCHEMA public LIMIT TO (:relation) FROM SERVER origin INTO origin;
CREATE TEMP TABLE expected AS SELECT :content, count(*) AS times FROM origin.:relation GROUP BY :content;
SELECT (SELECT count(*) FROM public.:relation),
       (SELECT sum(times) FROM expected),
       (SELECT count(*) FROM expected),
       (SELECT count(*) FROM (SELECT :content FROM expected EXCEPT SELECT :content FROM public.:relation) AS missing),
       (SELECT count(*) FROM (SELECT :content FROM public.:relation EXCEPT SELECT :content FROM expected) AS extra);

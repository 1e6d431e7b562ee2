//! What only a server can show: hashes of stored values against the server's own send functions, scans, layouts.

use pgrx::prelude::*;

#[pg_schema]
mod tests {
    use crate::error::{Error, Result};
    use crate::hash::layout::target_layout;
    use crate::hash::rows::{RowView, scan};
    use crate::hash::types;
    use pg_dedup_record::canonical::Canonical;
    use pg_dedup_record::digest::Digest;
    use pg_dedup_record::layout::Layout;
    use pg_dedup_record::pgcopy;
    use pgrx::pg_sys::Oid;
    use pgrx::prelude::*;

    fn run(sql: &str) {
        Spi::run(sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
    }

    fn get<T: FromDatum + IntoDatum>(sql: &str) -> Option<T> {
        Spi::get_one(sql).unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    fn oid_of(table: &str) -> Oid {
        get(&format!("SELECT '{table}'::regclass::oid")).unwrap()
    }

    fn names(list: &str) -> Vec<String> {
        list.split_whitespace().map(String::from).collect()
    }

    fn layout(table: &str, columns: &str, key: &str, content: &str) -> Result<Layout> {
        target_layout(oid_of(table), &names(columns), &names(key), &names(content))
    }

    fn rows(query: &str, layout: &Layout, on_row: impl FnMut(RowView<'_>) -> Result<()>) -> Result<u64> {
        scan(query, &[], layout, 0, on_row)
    }

    /// Every value of a verbatim type hashes as its send function says.
    #[pg_test]
    fn shortcuts_agree_with_send_functions() {
        let checks = [
            (
                "numeric_send",
                "(random() * 10 ^ (i % 40 - 20))::numeric * (CASE WHEN i % 2 = 0 THEN 1 ELSE -1 END)",
            ),
            ("numeric_send", "round((random() * 10 ^ (i % 12))::numeric, i % 9)"),
            ("numeric_send", "(i * 10000)::numeric ^ (i % 30)"),
            (
                "numeric_send",
                "(ARRAY['NaN', 'Infinity', '-Infinity', '0', '0.000', '1e-300'])[1 + i % 6]::numeric",
            ),
            ("interval_send", "make_interval(i % 7, i % 13, 0, i % 31, 0, 0, random() * i)"),
            ("timetz_send", "('12:00'::time + i * '1 s'::interval)::timetz"),
            ("timestamptz_send", "'1900-01-01'::timestamptz + i * '1 day 1 ms'::interval"),
            ("float4send", "(random() - 0.5)::float4"),
            ("float8send", "(random() - 0.5) * 10 ^ (i % 300)"),
            ("int2send", "(i - 500)::int2"),
            ("int8send", "(i - 500)::int8 * 9000000000000000"),
            ("cash_send", "(i - 500)::money"),
            ("uuid_send", "gen_random_uuid()"),
            ("byteasend", "decode(repeat('0a', i), 'hex')"),
            ("textsend", "repeat('añ', i)"),
            ("bpcharsend", "i::text::char(7)"),
        ];
        for (send, expression) in checks {
            let wrong: Option<i64> = get(&format!(
                "WITH v AS MATERIALIZED (SELECT {expression} AS v FROM generate_series(0, 999) i)
                 SELECT count(*) FROM v
                 WHERE dedup.content_hash(v) <> sha256(int4send(octet_length({send}(v))) || {send}(v))"
            ));
            assert_eq!(wrong, Some(0), "{expression}");
        }
    }

    #[pg_test]
    fn wide_values_hash_from_toast() {
        run("CREATE TABLE wide (a text, b text, c bytea)");
        run("ALTER TABLE wide ALTER a SET STORAGE EXTERNAL");
        run("INSERT INTO wide SELECT repeat('x', n), repeat('y', n), decode(repeat('00', n), 'hex')
             FROM unnest(ARRAY[1, 125, 126, 127, 2100, 9000, 3000000]) n");
        let wrong: Option<i64> = get(
            "SELECT count(*) FROM wide WHERE dedup.content_hash(a, b, c) <> sha256(
             int4send(length(a)) || a::bytea || int4send(length(b)) || b::bytea || int4send(length(c)) || c)",
        );
        assert_eq!(wrong, Some(0));
    }

    #[pg_test]
    fn nested_types_lose_their_oids() {
        run("CREATE TYPE mood AS ENUM ('sad', 'ok')");
        run("CREATE TYPE pair AS (a int, m mood[])");
        let hash: Option<Vec<u8>> = get("SELECT dedup.content_hash(ROW(1, '{ok,NULL}')::pair)");
        let expected: Option<Vec<u8>> = get(r"SELECT sha256('\x00000036 00000002 00000000 00000004 00000001
             00000000 0000001e 00000001 00000001 00000000 00000002 00000001 00000002 6f6b ffffffff')");
        assert_eq!(hash, expected);
    }

    #[pg_test(error = "content_hash does not take a whole row as one argument")]
    fn whole_rows_are_refused() {
        run("CREATE TABLE whole (a int); INSERT INTO whole VALUES (1)");
        run("SELECT dedup.content_hash(t.*) FROM whole t");
    }

    #[pg_test(error = "argument 2 of content_hash is a literal of unknown type")]
    fn unknown_literals_are_refused() {
        run("SELECT dedup.content_hash(1, 'x')");
    }

    #[pg_test(error = "cannot hash values of type regclass[]")]
    fn catalog_references_are_refused_inside_arrays() {
        run("SELECT dedup.content_hash(ARRAY['pg_class'::regclass])");
    }

    #[pg_test]
    fn scans_hash_as_content_hash_does() {
        run("CREATE TABLE scanned (id bigint PRIMARY KEY, t text, n numeric, a int[], d date)");
        run("INSERT INTO scanned SELECT i, CASE WHEN i % 5 > 0 THEN repeat('é', i * 7) END, i / 7.0, ARRAY[i, NULL],
             '2020-01-01'::date + i FROM generate_series(1, 1000) i");
        let layout = layout("scanned", "id t n a d", "id", "n a t").unwrap();
        assert_eq!((&layout.content, &layout.key, &layout.rest), (&vec![2, 3, 1], &vec![0], &vec![4]));
        let mut seen = Vec::new();
        let count = rows("SELECT id, t, n, a, d FROM scanned ORDER BY id", &layout, |row| {
            let mut key = Vec::new();
            assert!(row.write_key(&mut key)?);
            let mut tuple = vec![0xff];
            row.write_tuple(&mut tuple)?;
            assert_eq!(tuple[1..11], [0, 5, 0, 0, 0, 8, 0, 0, 0, 0]);
            assert_eq!(key, tuple[7..15]);
            seen.push(row.digests()?);
            Ok(())
        })
        .unwrap();
        assert_eq!((count, seen.len()), (1000, 1000));
        for (id, digests) in seen.iter().enumerate().step_by(97) {
            let expected = |columns: &str| -> Digest {
                let hash: Option<Vec<u8>> =
                    get(&format!("SELECT dedup.content_hash({columns}) FROM scanned WHERE id = {}", id + 1));
                Digest::from_slice(&hash.unwrap()).unwrap()
            };
            assert_eq!(digests.content, expected("n, a, t"));
            assert_eq!(digests.row, expected("n, a, t, id, d"));
        }
    }

    #[pg_test]
    fn tuples_are_those_of_binary_copy() {
        run("CREATE TYPE made AS (a int, b text)");
        run("CREATE TABLE copied_out AS SELECT i, i / 3.0 AS n, ARRAY[ROW(i, 'é')::made, NULL] AS m,
             CASE WHEN i % 2 = 0 THEN repeat('x', i * 100) END AS t, now() AS at FROM generate_series(1, 100) i");
        let file = "pg_dedup_migrate_test.copy";
        let directory: String = get("SELECT current_setting('data_directory')").unwrap();
        run(&format!("COPY copied_out TO '{directory}/{file}' (FORMAT binary)"));
        let layout = layout("copied_out", "i n m t at", "i", "n m t at").unwrap();
        let mut stream = pgcopy::header().to_vec();
        rows("SELECT i, n, m, t, at FROM copied_out", &layout, |row| row.write_tuple(&mut stream)).unwrap();
        stream.extend_from_slice(pgcopy::trailer());
        let copied: Option<Vec<u8>> = get(&format!("SELECT pg_read_binary_file('{file}')"));
        std::fs::remove_file(format!("{directory}/{file}")).unwrap();
        assert!(copied == Some(stream), "COPY and the scan differ");
    }

    #[pg_test]
    fn an_error_stops_the_scan_and_comes_back() {
        run("CREATE TABLE counted AS SELECT i FROM generate_series(1, 100) i");
        let layout = layout("counted", "i", "", "i").unwrap();
        let mut calls = 0;
        let outcome = rows("SELECT i FROM counted", &layout, |_| {
            calls += 1;
            if calls == 7 { Err(Error::invalid("enough")) } else { Ok(()) }
        });
        assert_eq!(outcome.unwrap_err().to_string(), "enough");
        assert_eq!(calls, 7);
        assert_eq!(get("SELECT count(*) FROM counted"), Some(100i64), "SPI is usable again");
    }

    #[pg_test]
    fn a_callback_may_use_spi_and_write() {
        run("CREATE TABLE origin AS SELECT i FROM generate_series(1, 10) i; CREATE TABLE copied (i int)");
        let layout = layout("origin", "i", "", "i").unwrap();
        scan("SELECT i, i FROM origin", &[], &layout, 1, |row| {
            let value = row.trailing::<i32>(0)?;
            Ok(Spi::run_with_args("INSERT INTO copied VALUES ($1)", &[value.into()])?)
        })
        .unwrap();
        assert_eq!(get("SELECT sum(i) FROM copied"), Some(55i64));
    }

    #[pg_test(error = "division by zero")]
    fn an_error_of_the_query_passes_through() {
        run("CREATE TABLE zero AS SELECT 0 AS i");
        let layout = layout("zero", "i", "", "i").unwrap();
        let _ = rows("SELECT 1 / i FROM zero", &layout, |_| Ok(()));
    }

    #[pg_test]
    fn trailing_columns_and_parameters() {
        run("CREATE TABLE trailed AS SELECT i, i::text AS t FROM generate_series(1, 9) i");
        let layout = layout("trailed", "i", "", "i").unwrap();
        let query = "SELECT i, xmin, ctid, t, NULL::int8 FROM trailed WHERE i > $1 AND t <> $2";
        let params = [5.into(), "8".into()];
        let count = scan(query, &params, &layout, 4, |row| {
            assert_eq!(
                row.trailing::<pg_sys::TransactionId>(0)?,
                Some(get::<pg_sys::TransactionId>("SELECT pg_current_xact_id()::xid").unwrap())
            );
            assert!(row.trailing::<pg_sys::ItemPointerData>(1)?.is_some_and(|tid| tid.ip_posid > 5));
            let mut tuple = Vec::new();
            row.write_tuple(&mut tuple)?;
            let value =
                row.trailing::<String>(2)?.map(|text| text.parse::<i32>().unwrap().to_be_bytes().to_vec());
            assert_eq!(value.as_deref(), tuple.get(6..10));
            assert_eq!(row.trailing::<i64>(3)?, None);
            assert!(row.trailing::<i64>(2).is_err() && row.trailing::<i64>(4).is_err());
            Ok(())
        });
        assert_eq!(count.unwrap(), 3);
    }

    #[pg_test]
    fn a_scan_sees_this_transactions_rows_and_may_lock_them() {
        run("CREATE TABLE snapped (i int)");
        let layout = layout("snapped", "i", "", "i").unwrap();
        run("INSERT INTO snapped VALUES (1)");
        assert_eq!(rows("SELECT i FROM snapped FOR NO KEY UPDATE", &layout, |_| Ok(())).unwrap(), 1);
    }

    #[pg_test]
    fn a_query_of_another_shape_is_refused() {
        run("CREATE DOMAIN small AS int CHECK (VALUE < 100)");
        run("CREATE TABLE shaped (i small, v varchar(5), m numeric(12,2))");
        let layout = layout("shaped", "i v m", "", "i v m").unwrap();
        let outcome = |query: &str| rows(query, &layout, |_| Ok(())).map_err(|error| error.to_string());
        assert_eq!(outcome("SELECT 1, 'x'::varchar, 1.0"), Ok(1));
        for query in
            ["SELECT 1::int8, 'x'::varchar, 1.0", "SELECT 1, 'x'::text, 1.0", "SELECT 1, 'x'::varchar"]
        {
            assert!(outcome(query).is_err(), "{query}");
        }
    }

    #[pg_test]
    fn null_keys_are_told() {
        run("CREATE TABLE nullable (a int, b text); INSERT INTO nullable VALUES (1, NULL), (2, 'x')");
        let layout = layout("nullable", "b a", "a b", "b").unwrap();
        let mut keys = Vec::new();
        rows("SELECT b, a FROM nullable ORDER BY a", &layout, |row| {
            let mut key = vec![9];
            let whole = row.write_key(&mut key)?;
            keys.push((whole, key));
            Ok(())
        })
        .unwrap();
        assert_eq!(keys, [(false, vec![9]), (true, vec![9, 0, 0, 0, 4, 0, 0, 0, 2, b'x'])]);
    }

    #[pg_test]
    fn layouts_name_types_for_any_search_path() {
        run("CREATE SCHEMA \"Odd\"; CREATE TYPE \"Odd\".\"My Type\" AS (a int, b int[])");
        run("CREATE TABLE described (a int, b numeric(12,2), c varchar(5)[], d \"Odd\".\"My Type\", gone int,
             e text, f timestamp(3) with time zone, g \"char\", h char, g2 int GENERATED ALWAYS AS (a + 1) STORED)");
        run("ALTER TABLE described DROP COLUMN gone");
        let table = oid_of("described");
        run("SET LOCAL search_path = \"Odd\", pg_temp, public, pg_catalog");
        let layout = target_layout(table, &names("a b c d e f g h"), &names("a"), &names("h b")).unwrap();
        let named: Vec<&str> = layout.columns.iter().map(|column| column.type_name.as_str()).collect();
        assert_eq!(
            named,
            [
                "integer",
                "numeric(12,2)",
                "character varying(5)[]",
                "\"Odd\".\"My Type\"",
                "pg_catalog.text",
                "timestamp(3) with time zone",
                "pg_catalog.\"char\"",
                "character(1)"
            ]
        );
        assert_eq!(layout.columns[3].canonical, {
            let array = Canonical::array(Canonical::Verbatim);
            Canonical::composite(vec![Canonical::Verbatim, array])
        });
        assert_eq!((layout.content, layout.key, layout.rest), (vec![7, 1], vec![0], vec![2, 3, 4, 5, 6]));
        for column in &layout.columns {
            assert!(types::base_type_named(&column.type_name).is_ok(), "{}", column.type_name);
        }
    }

    #[pg_test]
    fn layouts_refuse_what_cannot_be_migrated() {
        run("CREATE TABLE refused (a int, b int GENERATED ALWAYS AS (a) STORED, c regclass)");
        let refused = |columns: &str, key: &str, content: &str| {
            layout("refused", columns, key, content).unwrap_err().to_string()
        };
        assert_eq!(refused("a b", "", "a"), "column \"b\" of table \"refused\" is generated");
        assert_eq!(refused("a x", "", "a"), "column \"x\" of table \"refused\" does not exist");
        assert_eq!(refused("a c", "", "a"), "cannot hash values of type regclass");
        assert_eq!(refused("a", "c", "a"), "key column \"c\" is not among the columns to migrate");
        assert_eq!(refused("a", "a a", "a"), "column \"a\" is named more than once");
        assert_eq!(refused("a", "a", ""), "columns of table \"refused\" make no layout");
        let absent = target_layout(Oid::from(1), &names("a"), &[], &names("a"));
        assert_eq!(absent.unwrap_err().to_string(), "relation with OID 1 does not exist");
    }
}

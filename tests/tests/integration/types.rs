//! Every type that can be migrated, with the values that are easy to get wrong. The sidecar hashes the bytes it
//! forwards, the server hashes what it stored: read-back and the index compare the two for every row.

use integration::check::{Table, assert_first_run};
use integration::pair::Pair;
use integration::sidecar::exit;

/// Types of our own, the same on both sides but for their OIDs.
const DEFINITIONS: &str = "\
    CREATE TYPE mood AS ENUM ('sad', 'ok', 'überglücklich'); \
    CREATE DOMAIN positive AS int CHECK (VALUE > 0); \
    CREATE DOMAIN short_text AS varchar(10); \
    CREATE TYPE inner_pair AS (x int, y text); \
    CREATE TYPE nested AS (label text, pair inner_pair, moods mood[], spans int4range[]); \
    CREATE TYPE float_span AS RANGE (subtype = float8); \
    CREATE TYPE mood_span AS RANGE (subtype = mood)";

/// Column name (and table suffix), type, values of the rows: repeated values are duplicates to find.
const TYPES: &[(&str, &str, &[&str])] = &[
    ("bool", "boolean", &["true", "false", "NULL", "true"]),
    ("int2", "smallint", &["-32768", "32767", "0", "NULL", "0"]),
    ("int4", "integer", &["-2147483648", "2147483647", "0", "0"]),
    ("int8", "bigint", &["-9223372036854775808", "9223372036854775807", "0", "0"]),
    ("float4", "real", &["'NaN'", "'Infinity'", "'-Infinity'", "1.5e-38", "0.1", "'-0'", "'NaN'"]),
    ("float8", "double precision", &["'NaN'", "'Infinity'", "'-Infinity'", "5e-324", "0.1", "'-0'", "0.1"]),
    (
        "numeric",
        "numeric",
        &[
            "'NaN'",
            "'Infinity'",
            "'-Infinity'",
            "0",
            "1.5",
            "1.50",
            "1.500",
            "1e100",
            "-1e-100",
            "123456789012345678901234567890.123456789",
            "1.50",
            "repeat('9', 1000)::numeric",
        ],
    ),
    ("numeric_scaled", "numeric(12,2)", &["1.5", "1.50", "-0.01", "9999999999.99", "NULL"]),
    ("money", "money", &["'$1,234.56'", "'-$0.01'", "'$1,234.56'"]),
    (
        "text",
        "text",
        &[
            "''",
            "'a'",
            "E'tab\\tnewline\\nback\\\\slash'",
            "'naïve 日本 🦀'",
            "'a'",
            "NULL",
            "repeat('long ', 5000)",
        ],
    ),
    ("varchar", "varchar(20)", &["''", "'twenty characters ok'", "'a '", "'a'", "'a'"]),
    ("bpchar", "char(8)", &["'a'", "'a  '", "'abcdefgh'", "'é'"]),
    ("single_char", "\"char\"", &["'a'", "'z'", "'a'"]),
    ("name", "name", &["'pg_class'", "'ünï'", "'pg_class'"]),
    ("bytea", "bytea", &["''", "'\\x00'", "'\\x00ff7f80'", "'\\x00'", "decode(repeat('00ff', 9000), 'hex')"]),
    (
        "date",
        "date",
        &["'infinity'", "'-infinity'", "'0044-03-15 BC'", "'2024-02-29'", "'5874897-12-31'", "'2024-02-29'"],
    ),
    ("time", "time", &["'00:00'", "'24:00'", "'12:34:56.789012'", "'00:00'"]),
    ("timetz", "timetz", &["'00:00+00'", "'24:00-15:59'", "'12:00+05:30'", "'00:00+00'"]),
    (
        "timestamp",
        "timestamp",
        &[
            "'infinity'",
            "'-infinity'",
            "'4713-01-01 00:00 BC'",
            "'294276-12-31 23:59:59.999999'",
            "'infinity'",
        ],
    ),
    (
        "timestamptz",
        "timestamptz",
        &[
            "'infinity'",
            "'-infinity'",
            "'0001-01-01 00:00+00 BC'",
            "'2024-03-31 02:30+01'",
            "'2024-03-31 01:30+00'",
        ],
    ),
    (
        "interval",
        "interval",
        &["'1 month'", "'30 days'", "'720 hours'", "'-1 year 2 mons -3 days 04:05:06.789'", "'1 month'"],
    ),
    (
        "uuid",
        "uuid",
        &[
            "'00000000-0000-0000-0000-000000000000'",
            "'ffffffff-ffff-ffff-ffff-ffffffffffff'",
            "'00000000-0000-0000-0000-000000000000'",
        ],
    ),
    ("json", "json", &["'{\"a\": 1}'", "'{ \"a\":1 }'", "'{\"a\": 1}'", "'null'"]),
    (
        "jsonb",
        "jsonb",
        &[
            "'{\"a\": 1}'",
            "'{ \"a\":1 }'",
            "'{\"b\": [1, null, 1.50, \"\\u00e9\"], \"a\": {}}'",
            "'null'",
            "NULL",
        ],
    ),
    ("jsonpath", "jsonpath", &["'$.a[*] ? (@ > 1)'", "'strict $.b'", "'$.a[*] ? (@ > 1)'"]),
    ("xml", "xml", &["'<a>1</a>'", "'<a b=\"é\"/>'", "'<a>1</a>'"]),
    ("bit", "bit(5)", &["B'00000'", "B'10101'", "B'00000'"]),
    ("varbit", "varbit(70)", &["B''", "B'1'", "B'10'", "B'1'", "repeat('10', 35)::varbit"]),
    ("inet", "inet", &["'192.168.0.1'", "'192.168.0.1/24'", "'::1'", "'2001:db8::/32'", "'::1'"]),
    ("cidr", "cidr", &["'192.168.0.0/24'", "'::/0'", "'::/0'"]),
    ("macaddr", "macaddr", &["'08:00:2b:01:02:03'", "'ff:ff:ff:ff:ff:ff'", "'08:00:2b:01:02:03'"]),
    ("macaddr8", "macaddr8", &["'08:00:2b:01:02:03:04:05'", "'08:00:2b:01:02:03:04:05'"]),
    ("point", "point", &["'(1,2)'", "'(-0,1e300)'", "'(1,2)'"]),
    ("line", "line", &["'{1,2,3}'", "'{1,2,3}'"]),
    ("lseg", "lseg", &["'[(0,0),(1,1)]'", "'[(0,0),(1,1)]'"]),
    ("box", "box", &["'(1,1),(0,0)'", "'(2,2),(0,0)'", "'(1,1),(0,0)'"]),
    ("path", "path", &["'((0,0),(1,1))'", "'[(0,0),(1,1)]'", "'((0,0),(1,1))'"]),
    ("polygon", "polygon", &["'((0,0),(1,1),(1,0))'", "'((0,0),(1,1),(1,0))'"]),
    ("circle", "circle", &["'<(0,0),1>'", "'<(0,0),0>'", "'<(0,0),1>'"]),
    ("tsvector", "tsvector", &["'a:1A fat:2B,4C cat:5D'", "'a cat'", "''", "'a cat'"]),
    ("tsquery", "tsquery", &["'fat & (rat | !cat:ab) <-> dog:*'", "'fat'", "'fat'"]),
    ("pg_lsn", "pg_lsn", &["'0/0'", "'FFFFFFFF/FFFFFFFF'", "'0/0'"]),
    ("xid8", "xid8", &["'0'", "'18446744073709551615'", "'0'"]),
    ("pg_snapshot", "pg_snapshot", &["'10:20:10,14,15'", "'10:10:'", "'10:10:'"]),
    ("enum", "mood", &["'sad'", "'überglücklich'", "'sad'", "NULL"]),
    ("domain", "positive", &["1", "2147483647", "1"]),
    ("domain_text", "short_text", &["'ten chars.'", "''", "''"]),
    (
        "int_array",
        "int[]",
        &[
            "'{}'",
            "'{1,NULL,3}'",
            "'{{1,2},{3,4}}'",
            "'[0:1]={1,2}'",
            "'{1,2}'",
            "'{1,2}'",
            "array_remove(ARRAY[1,NULL], NULL)",
            "ARRAY[1]",
        ],
    ),
    ("text_array", "text[]", &["'{}'", "ARRAY['', 'a\"b', NULL]", "ARRAY['NULL']", "ARRAY['NULL']"]),
    (
        "enum_array",
        "mood[]",
        &["ARRAY['sad','ok']::mood[]", "ARRAY[NULL]::mood[]", "ARRAY['sad','ok']::mood[]"],
    ),
    ("domain_array", "positive[]", &["ARRAY[1,2]::positive[]", "ARRAY[1,2]::positive[]"]),
    (
        "composite",
        "inner_pair",
        &["ROW(1, 'a')::inner_pair", "ROW(NULL, NULL)::inner_pair", "NULL", "ROW(1, 'a')::inner_pair"],
    ),
    (
        "nested_composite",
        "nested",
        &[
            "ROW('n', ROW(1, NULL)::inner_pair, ARRAY['ok']::mood[], ARRAY[int4range(1,3), 'empty'])::nested",
            "ROW(NULL, NULL, '{}', NULL)::nested",
            "ROW('n', ROW(1, NULL)::inner_pair, ARRAY['ok']::mood[], ARRAY[int4range(1,3), 'empty'])::nested",
        ],
    ),
    (
        "composite_array",
        "inner_pair[]",
        &["ARRAY[ROW(1,'a'), NULL]::inner_pair[]", "'{}'", "ARRAY[ROW(1,'a'), NULL]::inner_pair[]"],
    ),
    ("int4range", "int4range", &["'[1,3)'", "'[1,2]'", "'empty'", "'(,)'", "'[1,)'", "'empty'"]),
    ("int8range", "int8range", &["'[1,3)'", "'[1,3)'"]),
    ("numrange", "numrange", &["'[1.50,2)'", "'[1.5,2)'", "'(1.5,2]'", "'[1.5,2)'"]),
    ("daterange", "daterange", &["'[2024-01-01,infinity)'", "'[2024-01-01,)'", "'[2024-01-01,)'"]),
    ("tsrange", "tsrange", &["'[2024-01-01 10:00,2024-01-01 11:00)'", "'empty'", "'empty'"]),
    ("tstzrange", "tstzrange", &["'[2024-01-01 10:00+00,)'", "'[2024-01-01 11:00+01,)'"]),
    ("own_range", "float_span", &["'[0.1,0.2]'", "'(,NaN)'", "'[0.1,0.2]'"]),
    ("enum_range", "mood_span", &["'[sad,ok]'", "'[sad,ok]'", "'empty'"]),
    (
        "range_array",
        "int4range[]",
        &["ARRAY[int4range(1,2), NULL, 'empty']", "ARRAY[int4range(1,2), NULL, 'empty']"],
    ),
    ("int4multirange", "int4multirange", &["'{[1,3),[5,9)}'", "'{}'", "'{[1,2],[5,8]}'"]),
    ("nummultirange", "nummultirange", &["'{[1.5,2),(3,)}'", "'{[1.5,2),(3,)}'"]),
    ("own_multirange", "float_span_multirange", &["'{[0.1,0.2],[1,2)}'", "'{[0.1,0.2],[1,2)}'"]),
];

/// One table a type, so that a failure names the type; the value is the content, the number the key.
#[tokio::test(flavor = "multi_thread")]
async fn every_type_alone() {
    let pair = Pair::start().await;
    // Other OIDs for our types on the other side, and so in arrays and composites.
    pair.target.exec("CREATE TYPE earlier AS ENUM ('a'); CREATE TYPE earlier_still AS (a int)").await;
    pair.both(DEFINITIONS).await;
    let mut run = pair.sidecar("run").workers(2);
    for (name, type_name, values) in TYPES {
        let table = format!("public.t_{name}");
        pair.both(&format!(
            "CREATE TABLE {table} (id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, value {type_name})"
        ))
        .await;
        let rows: Vec<String> =
            values.iter().enumerate().map(|(n, value)| format!("({n}, ({value})::{type_name})")).collect();
        // Not a VALUES list of all rows: its common type would change what a value means.
        for row in rows {
            pair.source.exec(&format!("INSERT INTO {table} VALUES {row}")).await;
        }
        run = run.arg("--table").arg(table);
    }
    run.exits(exit::DONE).await;
    for (name, _, values) in TYPES {
        let table = format!("public.t_{name}");
        let query = format!("SELECT count(*) FROM {table}");
        assert_eq!(pair.source.one::<i64>(&query).await, values.len() as i64, "{name}: rows of the source");
        assert_contents(&pair, name, &table).await;
    }
}

/// The rows are the source's, one a digest, and the digests that the sidecar sent are those of the server.
async fn assert_contents(pair: &Pair, name: &str, table: &str) {
    let rows = pair.source.copy_lines(&format!("SELECT id, value FROM {table}")).await;
    for line in pair.target.copy_lines(&format!("SELECT id, value FROM {table}")).await {
        assert!(
            rows.contains(&line),
            "{name}: {} is not a row of the source",
            String::from_utf8_lossy(&line)
        );
    }
    // Which values are the same is PostgreSQL's own output to say, except that a digest also tells apart what
    // prints alike and is not (1.5 and 1.50 print differently; padding of char(n) does not count).
    let distinct: i64 = pair
        .source
        .one(&format!("SELECT count(DISTINCT coalesce(value::text, 'no value')) FROM {table}"))
        .await;
    let written: i64 = pair.target.one(&format!("SELECT count(*) FROM {table}")).await;
    assert_eq!(written, distinct, "{name}: distinct values");
    let indexed =
        pair.target.column(&format!("SELECT content_hash FROM dedup.hash_index('{table}') ORDER BY 1")).await;
    let hashed =
        pair.target.column(&format!("SELECT dedup.content_hash(value) FROM {table} ORDER BY 1")).await;
    assert_eq!(indexed, hashed, "{name}: digests of the sidecar and of the server");
}

/// All types in one row, nulls everywhere in another.
#[tokio::test(flavor = "multi_thread")]
async fn all_types_in_one_row() {
    let pair = Pair::start().await;
    pair.both(DEFINITIONS).await;
    let columns: Vec<String> = TYPES.iter().map(|(name, ..)| format!("c_{name}")).collect();
    let definitions: Vec<String> =
        TYPES.iter().map(|(name, type_name, _)| format!("c_{name} {type_name}")).collect();
    pair.both(&format!(
        "CREATE TABLE public.everything (id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, {})",
        definitions.join(", ")
    ))
    .await;
    let rows = TYPES.iter().map(|(.., values)| values.len()).max().unwrap_or_default();
    for row in 0..rows {
        let values: Vec<String> = TYPES
            .iter()
            .map(|(_, type_name, values)| format!("({})::{type_name}", values[row % values.len()]))
            .collect();
        for id in [row, row + 1_000] {
            pair.source
                .exec(&format!("INSERT INTO public.everything VALUES ({id}, {})", values.join(", ")))
                .await;
        }
    }
    pair.source.exec("INSERT INTO public.everything (id) VALUES (5000), (5001)").await;
    pair.run(&["public.everything"]).workers(2).exits(exit::DONE).await;
    let content: Vec<&str> = columns.iter().map(String::as_str).collect();
    let mut all = vec!["id"];
    all.extend(&content);
    let table =
        Table { source: "public.everything", target: "public.everything", content: &content, columns: &all };
    // json and xml have no equality, so the comparison is by text, as everywhere in the checks.
    assert_first_run(&pair.source, &pair.target, &table).await;
}

/// What cannot be migrated is refused by name, before anything is written.
#[tokio::test(flavor = "multi_thread")]
async fn types_that_are_refused() {
    let pair = Pair::start().await;
    for (name, type_name) in
        [("regtype", "regtype"), ("regclass_array", "regclass[]"), ("aclitem", "aclitem")]
    {
        let table = format!("public.t_{name}");
        pair.both(&format!("CREATE TABLE {table} (id int PRIMARY KEY, value {type_name})")).await;
        let output = pair.run(&[&table]).exits(exit::ERROR).await;
        output.says("value");
        let doctor = pair.sidecar("doctor").arg("--table").arg(&table).exits(exit::ERROR).await;
        assert!(doctor.describe().contains("value"), "{}", doctor.describe());
        let chunks: i64 = pair.target.one("SELECT count(*) FROM dedup.checkpoints").await;
        assert_eq!(chunks, 0, "{name}: something was planned");
    }
}

//! Pieces of SQL that both sides write.

use crate::layout::Layout;

/// Quotes an identifier, always: a quoted name can't turn into a keyword.
pub fn quote_ident(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Quotes a literal so that it means the same whatever `standard_conforming_strings` says.
pub fn quote_literal(value: &str) -> String {
    let quoted = value.replace('\'', "''");
    if quoted.contains('\\') { format!("E'{}'", quoted.replace('\\', "\\\\")) } else { format!("'{quoted}'") }
}

/// Whether [`has_key_among`] finds records by the target's keys: key columns, `key` in the source's SQL, go over as they are, in types that both
/// sides name alike. Elsewhere what a key is in the source only the records tell.
pub fn finds_keys(layout: &Layout, key: &[String], key_types: &[String]) -> bool {
    layout.key.iter().zip(std::iter::zip(key, key_types)).all(|(&i, (key, kind))| {
        *key == quote_ident(&layout.columns[i].name) && *kind == layout.columns[i].type_name
    })
}

/// A condition that holds for records under one of several keys. `select` has one expression a layout column;
/// `arrays` has the values of each key column, one array a column in the text form of arrays.
pub fn has_key_among(layout: &Layout, select: &[String], arrays: &[String]) -> String {
    let names: Vec<String> = (1..=layout.key.len()).map(|i| format!("k{i}")).collect();
    let columns: Vec<&str> = layout.key.iter().map(|&i| select[i].as_str()).collect();
    let values: Vec<String> = std::iter::zip(&names, &layout.key)
        .map(|(name, &i)| format!("k.{name}::{}", layout.columns[i].type_name))
        .collect();
    let sets: Vec<String> = arrays
        .iter()
        .map(|array| format!("pg_catalog.unnest({}::pg_catalog.text[])", quote_literal(array)))
        .collect();
    format!(
        "({}) IN (SELECT {} FROM ROWS FROM ({}) AS k({}))",
        columns.join(", "),
        values.join(", "),
        sets.join(", "),
        names.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ENCODING_VERSION;
    use crate::canonical::Canonical;
    use crate::layout::Column;

    #[test]
    fn names_and_literals_cannot_end_early() {
        assert_eq!(quote_ident(r#"a"b"#), r#""a""b""#);
        assert_eq!(quote_literal("it's"), "'it''s'");
        assert_eq!(quote_literal(r"a\'b"), r"E'a\\''b'");
    }

    #[test]
    fn keys_are_compared_column_by_column() {
        let column = |name: &str, kind: &str| Column {
            name: name.into(),
            type_name: kind.into(),
            canonical: Canonical::Verbatim,
        };
        let layout = Layout {
            encoding_version: ENCODING_VERSION,
            columns: vec![column("b", "text"), column("x", "date"), column("a", "bigint")],
            content: vec![1],
            key: vec![2, 0],
            rest: vec![],
        };
        let select = ["lower(b)".to_owned(), "x".to_owned(), "\"a\"".to_owned()];
        assert_eq!(
            has_key_among(&layout, &select, &["{1,2}".into(), r#"{x,"o'k\"s"}"#.into()]),
            "(\"a\", lower(b)) IN (SELECT k.k1::bigint, k.k2::text FROM ROWS FROM (pg_catalog.unnest('{1,2}'::pg_catalog.text[]), \
             pg_catalog.unnest(E'{x,\"o''k\\\\\"s\"}'::pg_catalog.text[])) AS k(k1, k2))"
        );
        let types = ["bigint".to_owned(), "text".to_owned()];
        let key = |second: &str| ["\"a\"".to_owned(), second.to_owned()];
        assert!(finds_keys(&layout, &key("\"b\""), &types));
        assert!(!finds_keys(&layout, &key("lower(b)"), &types));
        assert!(!finds_keys(
            &layout,
            &key("\"b\""),
            &["bigint".to_owned(), "character varying(5)".to_owned()]
        ));
    }
}

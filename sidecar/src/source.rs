//! How one remote source table is read: the description kept in `run_tables.source_spec`, and the COPY of a chunk.

use pg_dedup_record::layout::Layout;
use pg_dedup_record::sql::{finds_keys, has_key_among, quote_ident, quote_literal};
use serde::{Deserialize, Serialize};

use crate::catalog::{Relation, RelationKind};
use crate::config::TableOptions;
use crate::error::{Error, Result};
use crate::select;

/// What sort of range a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RangeKind {
    /// Half-open range of the key.
    Key,
    /// Rows whose key has a null.
    NullKey,
    /// Half-open range of positions, valid under one snapshot.
    Ctid,
}

impl RangeKind {
    /// The kind that checkpoints call so.
    pub fn named(name: &str) -> Option<RangeKind> {
        match name {
            "key" => Some(RangeKind::Key),
            "null_key" => Some(RangeKind::NullKey),
            "ctid" => Some(RangeKind::Ctid),
            _ => None,
        }
    }
}

/// The records of one chunk: half-open, `None` is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// What the bounds are.
    pub kind: RangeKind,
    /// First key in the range, one text a key column.
    pub lower: Option<Vec<String>>,
    /// First key past it.
    pub upper: Option<Vec<String>>,
}

/// How workers read a source table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceSpec {
    /// Quoted name.
    pub relation: String,
    /// One expression a layout column.
    #[serde(default)]
    pub select: Vec<String>,
    /// Expressions that ranges compare.
    #[serde(default)]
    pub key: Vec<String>,
    /// What a bound's text is cast to.
    #[serde(default)]
    pub key_types: Vec<String>,
    /// Which of the key expressions can be null.
    #[serde(default)]
    pub key_nullable: Vec<bool>,
    /// Filter.
    #[serde(rename = "where")]
    pub filter: Option<String>,
    /// Exported snapshot that positions belong to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// Target column → SQL, as it was given: what a resume must not change.
    #[serde(default)]
    pub transforms: std::collections::BTreeMap<String, String>,
}

impl SourceSpec {
    /// A description that names the table and no more: the layout, which decides the rest, is not known yet.
    pub fn named(source: &Relation, options: &TableOptions) -> SourceSpec {
        SourceSpec {
            relation: source.name.quoted(),
            select: Vec::new(),
            key: Vec::new(),
            key_types: Vec::new(),
            key_nullable: Vec::new(),
            filter: options.filter.clone(),
            snapshot: None,
            transforms: options.transforms.clone(),
        }
    }

    /// Completes the description for a layout.
    pub fn complete(mut self, source: &Relation, target: &Relation, layout: &Layout) -> Result<SourceSpec> {
        for column in &layout.columns {
            let expression = expression(source, target, &column.name, &self)?;
            self.select.push(expression);
        }
        for &index in &layout.key {
            let column =
                layout.columns.get(index).ok_or_else(|| Error::refused("the layout is malformed"))?;
            match (self.transforms.contains_key(&column.name), source.column(&column.name)) {
                // The bare column, so that the source's index serves the range.
                (false, Some(source)) => {
                    self.key.push(quote_ident(&source.name));
                    self.key_types.push(source.kind.declared.clone());
                    self.key_nullable.push(!source.not_null);
                }
                _ => {
                    self.key.push(self.select[index].clone());
                    self.key_types.push(column.type_name.clone());
                    self.key_nullable.push(true);
                }
            }
        }
        Ok(self)
    }

    /// The query of a chunk.
    pub fn query(&self, range: &Range) -> String {
        self.select_where(&self.conditions(range))
    }

    fn select_where(&self, conditions: &[String]) -> String {
        let mut sql = format!("SELECT {} FROM {}", self.select.join(", "), self.relation);
        if !conditions.is_empty() {
            sql.push_str(" WHERE ");
            sql.push_str(&conditions.join(" AND "));
        }
        sql
    }

    /// The COPY of a chunk.
    pub fn copy_out(&self, range: &Range) -> String {
        format!("COPY ({}) TO STDOUT (FORMAT binary)", self.query(range))
    }

    /// Whether records can be found by the target's keys.
    pub fn finds_keys(&self, layout: &Layout) -> bool {
        finds_keys(layout, &self.key, &self.key_types)
    }

    /// The COPY of those records of a chunk that have one of these keys: of each key column an array of texts.
    pub fn copy_out_keys(&self, range: &Range, layout: &Layout, keys: &[String]) -> String {
        let mut conditions = self.conditions(range);
        conditions.push(has_key_among(layout, &self.select, keys));
        format!("COPY ({}) TO STDOUT (FORMAT binary)", self.select_where(&conditions))
    }

    /// The filter as a condition that can't reach past its parentheses or comment out what follows.
    pub fn filter_condition(&self) -> Option<String> {
        self.filter.as_ref().map(|filter| format!("({filter}\n)"))
    }

    /// Whether a key can be null, so that a chunk for such rows is needed.
    pub fn has_nullable_key(&self) -> bool {
        self.key_nullable.iter().any(|nullable| *nullable)
    }

    fn nullable_keys(&self) -> impl Iterator<Item = &String> {
        self.key.iter().zip(&self.key_nullable).filter(|(_, nullable)| **nullable).map(|(key, _)| key)
    }

    fn conditions(&self, range: &Range) -> Vec<String> {
        let mut conditions: Vec<String> = self.filter_condition().into_iter().collect();
        match range.kind {
            RangeKind::NullKey => {
                let nulls: Vec<String> = self.nullable_keys().map(|key| format!("{key} IS NULL")).collect();
                conditions.push(if nulls.is_empty() {
                    "false".into()
                } else {
                    format!("({})", nulls.join(" OR "))
                });
            }
            RangeKind::Key => {
                // A row comparison is decided by its first differing column, nulls after it notwithstanding.
                conditions.extend(self.nullable_keys().map(|key| format!("{key} IS NOT NULL")));
                let keys = if self.key.len() == 1 {
                    self.key[0].clone()
                } else {
                    format!("ROW({})", self.key.join(", "))
                };
                for (bound, operator) in [(&range.lower, ">="), (&range.upper, "<")] {
                    if let Some(bound) = bound {
                        conditions.push(format!("{keys} {operator} {}", self.bound(bound)));
                    }
                }
            }
            RangeKind::Ctid => {
                for (bound, operator) in [(&range.lower, ">="), (&range.upper, "<")] {
                    if let Some(position) = bound.as_ref().and_then(|bound| bound.first()) {
                        conditions
                            .push(format!("ctid {operator} {}::pg_catalog.tid", quote_literal(position)));
                    }
                }
            }
        }
        conditions
    }

    fn bound(&self, values: &[String]) -> String {
        let values: Vec<String> = values
            .iter()
            .zip(&self.key_types)
            .map(|(value, kind)| format!("{}::{kind}", quote_literal(value)))
            .collect();
        if values.len() == 1 { values[0].clone() } else { format!("ROW({})", values.join(", ")) }
    }
}

/// The target columns that a source delivers, in the target's order; refuses what would be lost or can't be filled.
pub fn delivered_columns(
    source: &Relation,
    target: &Relation,
    options: &TableOptions,
) -> Result<Vec<String>> {
    if matches!(source.kind, RelationKind::Other) {
        return Err(Error::refused(format!("{} is not a table", source.name)));
    }
    for name in options.transforms.keys() {
        match target.column(name) {
            None => {
                return Err(Error::usage(format!(
                    "transform: {} has no column {}",
                    target.name,
                    quote_ident(name)
                )));
            }
            Some(column) if column.generated => {
                return Err(Error::usage(format!(
                    "transform: column {} is generated by the target",
                    quote_ident(name)
                )));
            }
            Some(_) => {}
        }
    }
    let lost: Vec<&str> = source
        .columns
        .iter()
        .filter(|column| !column.generated && target.column(&column.name).is_none())
        .map(|column| column.name.as_str())
        .collect();
    if !lost.is_empty() {
        return Err(Error::refused(format!(
            "{} has no column for {} of {}",
            target.name,
            lost.join(", "),
            source.name
        ))
        .hint("add the columns to the target, or migrate a view of the source that leaves them out"));
    }
    let delivered: Vec<String> = target
        .columns
        .iter()
        .filter(|column| !column.generated)
        .filter(|column| {
            source.column(&column.name).is_some() || options.transforms.contains_key(&column.name)
        })
        .map(|column| column.name.clone())
        .collect();
    let unfilled: Vec<&str> = target
        .columns
        .iter()
        .filter(|c| {
            c.not_null && !c.generated && !c.has_default && !c.identity && !delivered.contains(&c.name)
        })
        .map(|column| column.name.as_str())
        .collect();
    if !unfilled.is_empty() {
        return Err(Error::refused(format!("nothing fills {} of {}", unfilled.join(", "), target.name))
            .hint("give the columns a default, or compute them with --transform"));
    }
    if delivered.is_empty() {
        return Err(Error::refused(format!("{} and {} share no column", source.name, target.name)));
    }
    Ok(delivered)
}

fn expression(source: &Relation, target: &Relation, name: &str, spec: &SourceSpec) -> Result<String> {
    let target_column = target
        .column(name)
        .ok_or_else(|| Error::refused(format!("{} has no column {}", target.name, quote_ident(name))))?;
    let read = match (spec.transforms.get(name), source.column(name)) {
        (Some(sql), _) => select::transform_expression(sql, target_column),
        (None, Some(column)) => select::column_expression(column, target_column),
        (None, None) => Err(format!("{} has no column {}", source.name, quote_ident(name))),
    };
    read.map_err(|reason| Error::refused(format!("{}: {reason}", source.name)).sqlstate("42804"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(key: &[&str], nullable: &[bool]) -> SourceSpec {
        SourceSpec {
            relation: "\"s\".\"t\"".into(),
            select: vec!["\"a\"".into(), "\"b\"::numeric(12,2)".into()],
            key: key.iter().map(|k| quote_ident(k)).collect(),
            key_types: key.iter().map(|_| "bigint".into()).collect(),
            key_nullable: nullable.to_vec(),
            filter: None,
            snapshot: None,
            transforms: Default::default(),
        }
    }

    fn bound(values: &[&str]) -> Option<Vec<String>> {
        Some(values.iter().map(|v| (*v).to_owned()).collect())
    }

    #[test]
    fn ranges_are_half_open() {
        let range = Range { kind: RangeKind::Key, lower: bound(&["1"]), upper: bound(&["9"]) };
        assert_eq!(
            spec(&["a"], &[false]).query(&range),
            "SELECT \"a\", \"b\"::numeric(12,2) FROM \"s\".\"t\" WHERE \"a\" >= '1'::bigint AND \"a\" < '9'::bigint"
        );
        let open = Range { kind: RangeKind::Key, lower: None, upper: None };
        assert_eq!(
            spec(&["a"], &[false]).query(&open),
            "SELECT \"a\", \"b\"::numeric(12,2) FROM \"s\".\"t\""
        );
    }

    #[test]
    fn composite_keys_compare_as_rows_and_leave_nulls_to_their_own_chunk() {
        let spec = spec(&["a", "b"], &[false, true]);
        let range = Range { kind: RangeKind::Key, lower: bound(&["1", "2"]), upper: None };
        assert!(
            spec.query(&range)
                .ends_with("WHERE \"b\" IS NOT NULL AND ROW(\"a\", \"b\") >= ROW('1'::bigint, '2'::bigint)")
        );
        let nulls = Range { kind: RangeKind::NullKey, lower: None, upper: None };
        assert!(spec.query(&nulls).ends_with("WHERE (\"b\" IS NULL)"));
    }

    #[test]
    fn filters_stay_inside_their_parentheses() {
        let mut spec = spec(&[], &[]);
        spec.filter = Some("a > 1 OR true -- all".into());
        let range = Range { kind: RangeKind::Ctid, lower: bound(&["(8,0)"]), upper: None };
        assert!(spec.copy_out(&range).ends_with(
            "WHERE (a > 1 OR true -- all\n) AND ctid >= '(8,0)'::pg_catalog.tid) TO STDOUT (FORMAT binary)"
        ));
    }

    #[test]
    fn the_description_keeps_its_form() {
        let json = serde_json::to_value(spec(&["a"], &[false])).unwrap();
        assert_eq!(json["relation"], "\"s\".\"t\"");
        assert_eq!(json["key_types"][0], "bigint");
        assert!(json["where"].is_null() && json.get("snapshot").is_none());
        let short: SourceSpec =
            serde_json::from_str(r#"{"relation": "\"s\".\"t\"", "where": null}"#).unwrap();
        assert!(short.select.is_empty());
        let range =
            serde_json::to_value(Range { kind: RangeKind::NullKey, lower: None, upper: None }).unwrap();
        assert_eq!(range["kind"], "null_key");
    }
}

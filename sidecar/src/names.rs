//! Names as SQL has them: reading them from flags, folding and quoting.

use std::fmt;

use pg_dedup_record::sql::quote_ident;
use serde::{Deserialize, Deserializer};

use crate::error::{Error, Result};

/// A table's name with its schema; `public` where none was given.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableName {
    /// Schema, as the catalog has it.
    pub schema: String,
    /// Table, as the catalog has it.
    pub table: String,
}

impl TableName {
    /// A name as the catalog has it.
    pub fn new(schema: impl Into<String>, table: impl Into<String>) -> TableName {
        TableName { schema: schema.into(), table: table.into() }
    }

    /// Reads `table` or `schema.table`; unquoted parts are folded to lower case as the server does it.
    pub fn parse(text: &str) -> Result<TableName> {
        let mut reader = Reader::new(text);
        let name = reader.table_name()?;
        reader.end()?;
        Ok(name)
    }

    /// The name quoted for SQL.
    pub fn quoted(&self) -> String {
        format!("{}.{}", quote_ident(&self.schema), quote_ident(&self.table))
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", shown(&self.schema), shown(&self.table))
    }
}

impl<'de> Deserialize<'de> for TableName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<TableName, D::Error> {
        TableName::parse(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// Reads `source` or `source=target`; without a target it is the same name.
pub fn parse_pair(text: &str) -> Result<(TableName, TableName)> {
    let mut reader = Reader::new(text);
    let source = reader.table_name()?;
    let target = if reader.eat('=') { reader.table_name()? } else { source.clone() };
    reader.end()?;
    Ok((source, target))
}

/// Reads `table:a,b,c`.
pub fn parse_table_columns(text: &str) -> Result<(TableName, Vec<String>)> {
    let mut reader = Reader::new(text);
    let table = reader.table_name()?;
    reader.expect(':')?;
    let mut columns = vec![reader.ident()?];
    while reader.eat(',') {
        columns.push(reader.ident()?);
    }
    reader.end()?;
    Ok((table, columns))
}

/// Reads `table:SQL`; the SQL is taken as it stands.
pub fn parse_table_sql(text: &str) -> Result<(TableName, String)> {
    let mut reader = Reader::new(text);
    let table = reader.table_name()?;
    reader.expect(':')?;
    Ok((table, reader.sql()?))
}

/// Reads `table:column=SQL`.
pub fn parse_table_transform(text: &str) -> Result<(TableName, String, String)> {
    let mut reader = Reader::new(text);
    let table = reader.table_name()?;
    reader.expect(':')?;
    let column = reader.ident()?;
    reader.expect('=')?;
    Ok((table, column, reader.sql()?))
}

/// Reads one identifier.
pub fn parse_ident(text: &str) -> Result<String> {
    let mut reader = Reader::new(text);
    let ident = reader.ident()?;
    reader.end()?;
    Ok(ident)
}

/// A comma-separated list of quoted identifiers.
pub fn quote_idents<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    names.into_iter().map(quote_ident).collect::<Vec<_>>().join(", ")
}

/// An identifier for messages: quoted only where it has to be.
fn shown(name: &str) -> String {
    let plain = name.chars().next().is_some_and(|c| c.is_ascii_lowercase() || c == '_')
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    if plain { name.to_owned() } else { quote_ident(name) }
}

struct Reader<'a> {
    text: &'a str,
    rest: &'a str,
}

impl<'a> Reader<'a> {
    fn new(text: &'a str) -> Reader<'a> {
        Reader { text, rest: text.trim() }
    }

    fn eat(&mut self, wanted: char) -> bool {
        match self.rest.trim_start().strip_prefix(wanted) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn expect(&mut self, wanted: char) -> Result<()> {
        if self.eat(wanted) { Ok(()) } else { Err(self.wrong(&format!("expected \"{wanted}\""))) }
    }

    fn end(&self) -> Result<()> {
        if self.rest.trim().is_empty() { Ok(()) } else { Err(self.wrong("something follows the name")) }
    }

    fn sql(&self) -> Result<String> {
        let sql = self.rest.trim();
        if sql.is_empty() { Err(self.wrong("the SQL is missing")) } else { Ok(sql.to_owned()) }
    }

    fn table_name(&mut self) -> Result<TableName> {
        let first = self.ident()?;
        Ok(if self.eat('.') { TableName::new(first, self.ident()?) } else { TableName::new("public", first) })
    }

    fn ident(&mut self) -> Result<String> {
        self.rest = self.rest.trim_start();
        let Some(quoted) = self.rest.strip_prefix('"') else { return self.plain_ident() };
        let mut name = String::new();
        let mut chars = quoted.char_indices().peekable();
        while let Some((at, c)) = chars.next() {
            match c {
                '"' if matches!(chars.peek(), Some((_, '"'))) => {
                    chars.next();
                    name.push('"');
                }
                '"' => {
                    self.rest = &quoted[at + 1..];
                    return if name.is_empty() { Err(self.wrong("empty name")) } else { Ok(name) };
                }
                c => name.push(c),
            }
        }
        Err(self.wrong("a quoted name has no end"))
    }

    fn plain_ident(&mut self) -> Result<String> {
        let end = self
            .rest
            .find(|c: char| c.is_whitespace() || matches!(c, '.' | ':' | ',' | '=' | '"'))
            .unwrap_or(self.rest.len());
        let (name, rest) = self.rest.split_at(end);
        if name.is_empty() {
            return Err(self.wrong("expected a name"));
        }
        self.rest = rest;
        Ok(name.to_ascii_lowercase())
    }

    fn wrong(&self, what: &str) -> Error {
        Error::usage(format!("can't read \"{}\": {what}", self.text))
            .hint("names are written as in SQL: schema.table, or \"Schema\".\"Table\" where case or characters matter")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fold_and_quote_as_in_sql() {
        assert_eq!(TableName::parse("Orders").unwrap(), TableName::new("public", "orders"));
        assert_eq!(TableName::parse("S.\"Or.d\"\"ers\"").unwrap(), TableName::new("s", "Or.d\"ers"));
        assert_eq!(TableName::parse("über.straße").unwrap(), TableName::new("über", "straße"));
        assert_eq!(TableName::new("s", "a\"b").quoted(), "\"s\".\"a\"\"b\"");
        assert_eq!(TableName::new("s", "Ab").to_string(), "s.\"Ab\"");
        for bad in ["", "a.", "\"a", "a b", "\"\"", "a.b.c"] {
            assert!(TableName::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn flags_are_read() {
        let orders = TableName::new("public", "orders");
        assert_eq!(parse_pair("public.orders").unwrap(), (orders.clone(), orders.clone()));
        assert_eq!(
            parse_pair("public.orders = x.\"New\"").unwrap(),
            (orders.clone(), TableName::new("x", "New"))
        );
        assert_eq!(
            parse_table_columns("orders:A,\"B,c\", d").unwrap(),
            (orders.clone(), vec!["a".into(), "B,c".into(), "d".into()])
        );
        assert_eq!(parse_table_sql("orders: a = 'x:y'").unwrap(), (orders.clone(), "a = 'x:y'".into()));
        assert_eq!(
            parse_table_transform("orders:email=lower(email)").unwrap(),
            (orders, "email".into(), "lower(email)".into())
        );
        assert!(parse_table_columns("orders").is_err());
        assert!(parse_table_sql("orders:").is_err());
    }
}

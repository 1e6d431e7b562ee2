//! The columns of a table and what each is for.
use serde::{Deserialize, Serialize};

use crate::ENCODING_VERSION;
use crate::canonical::Canonical;

/// One column, in the target's type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Column {
    /// Name in the target, unquoted.
    pub name: String,
    /// Type with its modifier as `format_type` prints it.
    pub type_name: String,
    /// How its send bytes become canonical.
    pub canonical: Canonical,
}

/// The columns of a table in the order of the binary COPY stream, and their roles as indexes into them.
///
/// A column may be content and key at once; every column has a role, so that the row digest covers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// [`ENCODING_VERSION`] of the digests that go with it.
    pub encoding_version: u16,
    /// The fields of a tuple, in order.
    pub columns: Vec<Column>,
    /// What the content digest covers, in hash order.
    pub content: Vec<usize>,
    /// The key, in key order; empty for a keyless table.
    pub key: Vec<usize>,
    /// Columns that are neither content nor key, in hash order.
    pub rest: Vec<usize>,
}

/// Why a layout cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Made for digests of another version.
    #[error("layout has encoding version {0}, this is version {ENCODING_VERSION}")]
    EncodingVersion(u16),
    /// More columns than a table can have.
    #[error("layout has {0} columns, a table has at most 1600")]
    TooManyColumns(usize),
    /// Two columns of one name.
    #[error("column \"{0}\" appears twice in the layout")]
    DuplicateName(String),
    /// Nothing to tell records apart by: all would be duplicates of each other.
    #[error("layout has no content columns")]
    NoContent,
    /// A role names a column that is not there.
    #[error("{role} names column {index}, layout has {columns}")]
    OutOfRange {
        /// `content`, `key` or `rest`.
        role: &'static str,
        /// The index it holds.
        index: usize,
        /// How many columns there are.
        columns: usize,
    },
    /// A role names a column twice, or `rest` one that has a role already.
    #[error("column \"{name}\" is named again in {role}")]
    NamedAgain {
        /// `content`, `key` or `rest`.
        role: &'static str,
        /// The column.
        name: String,
    },
    /// A column that no digest would cover.
    #[error("column \"{0}\" is neither content, key nor rest")]
    Uncovered(String),
}

/// PostgreSQL's limit (`MaxHeapAttributeNumber`).
const MAX_COLUMNS: usize = 1600;

impl Layout {
    /// Checks that version, names and roles are sound.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn validate(&self) -> Result<(), LayoutError> {
        if self.encoding_version != ENCODING_VERSION {
            return Err(LayoutError::EncodingVersion(self.encoding_version));
        }
        if self.columns.len() > MAX_COLUMNS {
            return Err(LayoutError::TooManyColumns(self.columns.len()));
        }
        let mut names = std::collections::HashSet::new();
        for column in &self.columns {
            if !names.insert(column.name.as_str()) {
                return Err(LayoutError::DuplicateName(column.name.clone()));
            }
        }
        if self.content.is_empty() {
            return Err(LayoutError::NoContent);
        }

        let mut covered = vec![false; self.columns.len()];
        for (role, indexes) in [("content", &self.content), ("key", &self.key), ("rest", &self.rest)] {
            let mut named = vec![false; self.columns.len()];
            for &index in indexes {
                let column = self.columns.get(index).ok_or(LayoutError::OutOfRange {
                    role,
                    index,
                    columns: self.columns.len(),
                })?;
                if named[index] || (role == "rest" && covered[index]) {
                    return Err(LayoutError::NamedAgain { role, name: column.name.clone() });
                }
                named[index] = true;
            }
            for (all, this) in covered.iter_mut().zip(named) {
                *all |= this;
            }
        }
        match covered.iter().position(|covered| !covered) {
            Some(index) => Err(LayoutError::Uncovered(self.columns[index].name.clone())),
            None => Ok(()),
        }
    }

    /// What the row digest goes on over after the content columns: key columns that are not content, then
    /// the rest.
    pub fn beyond_content(&self) -> Vec<usize> {
        let key = self.key.iter().filter(|index| !self.content.contains(index));
        key.chain(&self.rest).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::samples;

    fn column(name: &str) -> Column {
        Column { name: name.into(), type_name: "bigint".into(), canonical: Canonical::Verbatim }
    }

    fn orders() -> Layout {
        Layout {
            encoding_version: ENCODING_VERSION,
            columns: vec![column("id"), column("total"), column("note")],
            content: vec![1, 2],
            key: vec![0],
            rest: vec![],
        }
    }

    #[test]
    fn json_is_the_protocol_s() {
        let json = r#"{"encoding_version":1,"columns":[{"name":"id","type_name":"bigint","canonical":"verbatim"}],"content":[0],"key":[0],"rest":[]}"#;
        let layout: Layout = serde_json::from_str(json).unwrap();
        assert_eq!(layout.validate(), Ok(()));
        assert_eq!(serde_json::to_string(&layout).unwrap(), json);
    }

    #[test]
    fn every_fault_is_named() {
        let broken = |damage: fn(&mut Layout)| {
            let mut layout = orders();
            damage(&mut layout);
            layout.validate().unwrap_err()
        };
        assert_eq!(orders().validate(), Ok(()));
        assert_eq!(broken(|l| l.encoding_version = 9), LayoutError::EncodingVersion(9));
        assert_eq!(broken(|l| l.columns[2].name = "id".into()), LayoutError::DuplicateName("id".into()));
        assert_eq!(broken(|l| l.content.clear()), LayoutError::NoContent);
        assert_eq!(broken(|l| l.key.push(3)), LayoutError::OutOfRange { role: "key", index: 3, columns: 3 });
        let again = |role, name: &str| LayoutError::NamedAgain { role, name: name.into() };
        assert_eq!(broken(|l| l.content.push(1)), again("content", "total"));
        assert_eq!(broken(|l| l.rest.push(0)), again("rest", "id"));
        assert_eq!(
            broken(|l| {
                l.content.pop();
            }),
            LayoutError::Uncovered("note".into())
        );
        assert_eq!(
            broken(|l| l.columns = (0..1601).map(|i| column(&i.to_string())).collect()),
            LayoutError::TooManyColumns(1601)
        );
    }

    proptest! {
        #[test]
        fn every_column_is_hashed_once(layout in samples::layout()) {
            prop_assert_eq!(layout.validate(), Ok(()));
            let mut hashed = [layout.content.clone(), layout.beyond_content()].concat();
            hashed.sort_unstable();
            prop_assert_eq!(hashed, (0..layout.columns.len()).collect::<Vec<_>>());
        }
    }
}

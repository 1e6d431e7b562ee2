//! The expression that reads one target column from the source, in the target's exact type.
//!
//! A cast stands only where the types differ. Casting to a shorter char, varchar or bit would truncate silently, so
//! those values go over as they are and the target refuses what is too long: such records end in quarantine.

use pg_dedup_record::sql::quote_ident;

use crate::catalog::{Column, ColumnType, Family};

/// The expression for a column that the source has, or a reason why there is none.
pub fn column_expression(source: &Column, target: &Column) -> Result<String, String> {
    convert(&quote_ident(&source.name), Some(&source.kind), &target.kind)
        .map_err(|reason| format!("column {}: {reason}", quote_ident(&target.name)))
}

/// The expression for a column that a transform computes.
pub fn transform_expression(sql: &str, target: &Column) -> Result<String, String> {
    // The line break ends a comment that the SQL may close with.
    convert(&format!("({sql}\n)"), None, &target.kind)
        .map_err(|reason| format!("transform of {}: {reason}", quote_ident(&target.name)))
}

/// `source` is unknown for a transform.
fn convert(expression: &str, source: Option<&ColumnType>, target: &ColumnType) -> Result<String, String> {
    use Family::{Bit, Bpchar, Enum, Other, SizedArray, Text, Varbit, Varchar, VarcharArray};
    for kind in source.into_iter().chain([target]) {
        if !kind.binary {
            return Err(format!("type {} can't be sent in binary", kind.declared));
        }
        if kind.names_objects {
            return Err(format!("type {} names objects of its own server", kind.declared));
        }
    }
    let from = source.map(|source| source.family);
    if source.is_some_and(|source| source.base == target.base) {
        return Ok(expression.to_owned());
    }
    let fits = |have: Option<i32>, room: Option<i32>| match (have, room) {
        (_, None) => true,
        (Some(have), Some(room)) => have <= room,
        (None, Some(_)) => false,
    };
    Ok(match (target.family, from) {
        (Text | Varchar(None), Some(Text | Varchar(_))) => expression.to_owned(),
        (Text | Varchar(None) | Enum, _) => format!("{expression}::pg_catalog.text"),
        (Varchar(room), Some(Varchar(have))) if fits(have, room) => expression.to_owned(),
        (Varchar(Some(room)), _) => varchar(expression, room),
        (Bpchar(Some(room)), _) => bpchar(expression, room),
        (Bpchar(None), _) => format!("{expression}::pg_catalog.bpchar"),
        (Bit(_) | Varbit(_), Some(Bit(_) | Varbit(_))) => expression.to_owned(),
        (Bit(_) | Varbit(_), _) => format!("{expression}::pg_catalog.text::pg_catalog.varbit"),
        (VarcharArray(room), Some(VarcharArray(have))) if fits(have, room) => expression.to_owned(),
        (VarcharArray(_), _) => format!("{expression}::pg_catalog.varchar[]"),
        (SizedArray, _) => {
            let from = source.map_or("an expression", |source| source.declared.as_str());
            return Err(format!("{from} can't be cast to {} without truncating elements", target.declared));
        }
        (Other, _) => format!("{expression}::{}", target.base),
    })
}

/// `varchar(n)` drops blanks past its length as it stores a value; the same is done here so that the digest is that of
/// what will be stored. Anything else that is too long stays so, and is refused.
fn varchar(expression: &str, room: i32) -> String {
    let text = format!("{expression}::pg_catalog.text");
    format!(
        "CASE WHEN pg_catalog.length({text}) > {room} AND pg_catalog.length(pg_catalog.rtrim({text}, ' ')) <= {room} \
         THEN pg_catalog.substr({text}, 1, {room}) ELSE {text} END"
    )
}

/// `char(n)` is stored padded, and blanks past its length are dropped; the rest stays too long and is refused.
fn bpchar(expression: &str, room: i32) -> String {
    let trimmed = format!("pg_catalog.rtrim({expression}::pg_catalog.text, ' ')");
    format!("pg_catalog.rpad({trimmed}, GREATEST({room}, pg_catalog.length({trimmed})))")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(base: &str, family: Family) -> ColumnType {
        ColumnType { declared: base.into(), base: base.into(), family, binary: true, names_objects: false }
    }

    fn column(name: &str, kind: ColumnType) -> Column {
        Column {
            name: name.into(),
            kind,
            not_null: false,
            identity: false,
            generated: false,
            has_default: false,
            surrogate: false,
            referenced: false,
        }
    }

    fn read(source: (&str, Family), target: (&str, Family)) -> String {
        column_expression(&column("c", kind(source.0, source.1)), &column("c", kind(target.0, target.1)))
            .unwrap()
    }

    #[test]
    fn equal_types_pass_untouched() {
        let numeric = ("numeric(12,2)", Family::Other);
        assert_eq!(read(numeric, numeric), "\"c\"");
        assert_eq!(read(("text", Family::Text), ("character varying", Family::Varchar(None))), "\"c\"");
        let (short, long) = (Family::Varchar(Some(3)), Family::Varchar(Some(5)));
        assert_eq!(read(("character varying(3)", short), ("character varying(5)", long)), "\"c\"");
        assert_eq!(read(("bit(8)", Family::Bit(Some(8))), ("bit(4)", Family::Bit(Some(4)))), "\"c\"");
    }

    #[test]
    fn other_types_are_cast_to_the_exact_type() {
        assert_eq!(
            read(("integer", Family::Other), ("numeric(12,2)", Family::Other)),
            "\"c\"::numeric(12,2)"
        );
        assert_eq!(read(("public.mood", Family::Enum), ("app.mood", Family::Enum)), "\"c\"::pg_catalog.text");
        assert_eq!(
            read(("text[]", Family::Other), ("varchar(3)[]", Family::VarcharArray(Some(3)))),
            "\"c\"::pg_catalog.varchar[]"
        );
    }

    #[test]
    fn nothing_is_cast_to_a_shorter_string() {
        let varchar = read(("text", Family::Text), ("character varying(5)", Family::Varchar(Some(5))));
        assert!(
            varchar.contains("ELSE \"c\"::pg_catalog.text END") && !varchar.contains("varying"),
            "{varchar}"
        );
        let bpchar = read(("text", Family::Text), ("character(5)", Family::Bpchar(Some(5))));
        assert!(bpchar.contains("GREATEST(5, ") && !bpchar.contains("character(5)"), "{bpchar}");
        let bits = read(("text", Family::Text), ("bit(4)", Family::Bit(Some(4))));
        assert_eq!(bits, "\"c\"::pg_catalog.text::pg_catalog.varbit");
    }

    #[test]
    fn what_cannot_be_read_is_refused_by_name() {
        let target = column("Tags", kind("character(3)[]", Family::SizedArray));
        let error = column_expression(&column("Tags", kind("text[]", Family::Other)), &target).unwrap_err();
        assert!(error.contains("\"Tags\"") && error.contains("character(3)[]"), "{error}");
        let mut class = kind("regclass", Family::Other);
        class.names_objects = true;
        assert!(column_expression(&column("r", class.clone()), &column("r", class)).is_err());
    }

    #[test]
    fn a_transform_is_cast_and_its_comment_ends() {
        let target = column("email", kind("public.citext", Family::Other));
        assert_eq!(
            transform_expression("lower(email) -- x", &target).unwrap(),
            "(lower(email) -- x\n)::public.citext"
        );
    }
}

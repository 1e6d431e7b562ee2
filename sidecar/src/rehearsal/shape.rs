//! The shape of a target as a temporary table can have it, and what of the target it can't have.

use pg_dedup_record::sql::{quote_ident, quote_literal};

use super::trial::name_of;
use crate::conn::Session;
use crate::error::{At, Error, Result, Side};
use crate::setup::Added;

/// How a temporary table like a target is made.
#[derive(Debug, Default)]
pub struct Shape {
    /// What LIKE takes over.
    like: String,
    /// What follows; `{name}` is the table's name.
    further: Vec<String>,
    /// What rows are not tried on, and why.
    pub not_tried: Vec<String>,
}

impl Shape {
    /// Looks at a target, and whether a table like it can be made.
    pub async fn of(target: &Session, pair: &Added) -> Result<Shape> {
        let mut shape = Shape::default();
        shape.defaults(target, pair).await?;
        shape.partitions(target, pair).await?;
        shape.left_out(target, pair).await?;
        let name = pair.target.name.quoted();
        let with = storage(target, pair).await?;
        // With less and less of the target, until the server makes it.
        let mut refusal = None;
        for (including, lost) in [
            ("INCLUDING ALL EXCLUDING DEFAULTS", None),
            (
                "INCLUDING ALL EXCLUDING DEFAULTS EXCLUDING INDEXES",
                Some("the size of indexes, and unique values within a chunk"),
            ),
            ("INCLUDING GENERATED INCLUDING IDENTITY INCLUDING STORAGE", Some("check constraints, indexes")),
            ("INCLUDING STORAGE", Some("check constraints, indexes, generated columns")),
        ] {
            shape.like = format!("(LIKE {name} {including}){with}");
            match shape.rehearse(target, pair).await {
                Ok(()) => {
                    if let (Some(lost), Some(why)) = (lost, refusal) {
                        shape.not_tried.push(format!("{lost}: {why}"));
                    }
                    return Ok(shape);
                }
                Err(error) if error.sqlstate.is_some() => refusal = Some(error.message),
                Err(error) => return Err(error),
            }
        }
        Err(Error::new(
            Side::Target,
            crate::error::Kind::Refused,
            format!("no temporary table like {} can be made", pair.target.name),
        )
        .detail(refusal.unwrap_or_default())
        .hint("the role needs TEMPORARY on the database"))
    }

    /// Makes it once and takes it back.
    async fn rehearse(&self, target: &Session, pair: &Added) -> Result<()> {
        let doing = "making a temporary table like the target";
        target.client.batch_execute("BEGIN").await.at(Side::Target, doing)?;
        let made = self.create(target, &name_of(pair.table_id)).await;
        target.client.batch_execute("ROLLBACK").await.at(Side::Target, doing)?;
        made
    }

    /// Makes the table.
    pub async fn create(&self, target: &Session, name: &str) -> Result<()> {
        let mut sql = format!("CREATE TEMPORARY TABLE {name} {}", self.like);
        for further in &self.further {
            sql.push_str("; ");
            sql.push_str(&further.replace("{name}", name));
        }
        // Values that an exclusion constraint keeps apart are those of all records, and none of it is in the trial.
        let excluded = format!(
            "DO $do$ DECLARE c name; BEGIN FOR c IN SELECT conname FROM pg_catalog.pg_constraint WHERE conrelid = {}::pg_catalog.regclass AND contype = 'x' \
             LOOP EXECUTE pg_catalog.format('ALTER TABLE {name} DROP CONSTRAINT %I', c); END LOOP; END $do$",
            quote_literal(name)
        );
        let doing = "making a temporary table like the target";
        target.client.batch_execute(&format!("{sql}; {excluded}")).await.at(Side::Target, doing)
    }

    /// Columns that the source does not deliver take their defaults, where these do nothing but compute. Numbers come from sequences of the
    /// temporary table's own; what calls a function of somebody's stays out, for nobody knows what that does.
    async fn defaults(&mut self, target: &Session, pair: &Added) -> Result<()> {
        let doing = "reading the defaults";
        let delivered: Vec<&str> = pair.layout.columns.iter().map(|column| column.name.as_str()).collect();
        let rows = target
            .client
            .query(
                "SELECT a.attname::text, pg_catalog.pg_get_expr(d.adbin, d.adrelid), \
                     pg_catalog.pg_get_expr(d.adbin, d.adrelid) ~ '^(pg_catalog\\.)?nextval\\(''[^'']+''::regclass\\)$', \
                     EXISTS (SELECT FROM pg_catalog.pg_depend AS p WHERE p.classid = 'pg_catalog.pg_attrdef'::pg_catalog.regclass AND p.objid = d.oid \
                             AND (p.refclassid = 'pg_catalog.pg_proc'::pg_catalog.regclass \
                                  OR p.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass AND p.refobjid <> d.adrelid)) \
                 FROM pg_catalog.pg_attrdef AS d JOIN pg_catalog.pg_attribute AS a ON a.attrelid = d.adrelid AND a.attnum = d.adnum \
                 WHERE d.adrelid = $1 AND a.attgenerated = '' AND NOT a.attname = ANY ($2::text[]) ORDER BY a.attnum",
                &[&pair.target.oid, &delivered],
            )
            .await
            .at(Side::Target, doing)?;
        for (n, row) in rows.iter().enumerate() {
            let column: String = row.try_get(0).at(Side::Target, doing)?;
            let default: String = row.try_get(1).at(Side::Target, doing)?;
            let (numbers, calls): (bool, bool) =
                (row.try_get(2).at(Side::Target, doing)?, row.try_get(3).at(Side::Target, doing)?);
            let quoted = quote_ident(&column);
            if numbers {
                let sequence = format!("{{name}}_{n}");
                self.further.push(format!(
                    "CREATE TEMPORARY SEQUENCE {sequence}; ALTER TABLE {{name}} ALTER {quoted} SET DEFAULT pg_catalog.nextval('{sequence}'::pg_catalog.regclass)"
                ));
            } else if calls {
                self.further.push(format!("ALTER TABLE {{name}} ALTER {quoted} DROP NOT NULL"));
                self.not_tried
                    .push(format!("column {column}: its default calls functions or reads sequences"));
            } else {
                self.further.push(format!("ALTER TABLE {{name}} ALTER {quoted} SET DEFAULT {default}"));
            }
        }
        Ok(())
    }

    /// A row for which there is no partition is refused; what the partitions ask beyond that is not.
    async fn partitions(&mut self, target: &Session, pair: &Added) -> Result<()> {
        let doing = "reading the partitions";
        let row = target
            .client
            .query_one(
                "SELECT pg_catalog.string_agg('(' || pg_catalog.pg_get_partition_constraintdef(p.relid) || ')', ' OR '), \
                     (SELECT pg_catalog.string_agg(DISTINCT c.conname, ', ') FROM pg_catalog.pg_partition_tree($1::oid::regclass) AS l \
                          JOIN pg_catalog.pg_constraint AS c ON c.conrelid = l.relid WHERE l.relid <> $1::oid AND c.coninhcount = 0 AND c.conparentid = 0), \
                     pg_catalog.bool_or(EXISTS (SELECT FROM pg_catalog.pg_attribute AS a JOIN pg_catalog.pg_attribute AS r ON r.attrelid = $1::oid AND r.attname = a.attname \
                          WHERE a.attrelid = p.relid AND a.attnotnull AND NOT r.attnotnull)) \
                 FROM pg_catalog.pg_partition_tree($1::oid::regclass) AS p WHERE p.isleaf AND p.relid <> $1::oid",
                &[&pair.target.oid],
            )
            .await
            .at(Side::Target, doing)?;
        if let Some(bounds) = row.try_get::<_, Option<String>>(0).at(Side::Target, doing)? {
            self.further.push(format!("ALTER TABLE {{name}} ADD CHECK ({bounds})"));
        }
        if let Some(own) = row.try_get::<_, Option<String>>(1).at(Side::Target, doing)? {
            self.not_tried.push(format!("constraints of single partitions: {own}"));
        }
        if row.try_get::<_, Option<bool>>(2).at(Side::Target, doing)? == Some(true) {
            self.not_tried.push("NOT NULL of single partitions".into());
        }
        Ok(())
    }

    /// What a temporary table does not have.
    async fn left_out(&mut self, target: &Session, pair: &Added) -> Result<()> {
        let doing = "looking at triggers and constraints";
        let rows = target
            .client
            .query(
                "SELECT 'triggers: ' || pg_catalog.string_agg(DISTINCT tgname, ', ') FROM pg_catalog.pg_trigger \
                     WHERE tgrelid = $1 AND NOT tgisinternal AND tgenabled <> 'D' HAVING count(*) > 0 \
                 UNION ALL SELECT 'exclusion constraints: ' || pg_catalog.string_agg(conname, ', ') FROM pg_catalog.pg_constraint \
                     WHERE conrelid = $1 AND contype = 'x' HAVING count(*) > 0 \
                 UNION ALL SELECT 'rules: ' || pg_catalog.string_agg(rulename, ', ') FROM pg_catalog.pg_rewrite WHERE ev_class = $1 AND ev_enabled <> 'D' HAVING count(*) > 0",
                &[&pair.target.oid],
            )
            .await
            .at(Side::Target, doing)?;
        for row in rows {
            self.not_tried.push(row.try_get(0).at(Side::Target, doing)?);
        }
        Ok(())
    }
}

/// Storage parameters of the target, which decide about room.
async fn storage(target: &Session, pair: &Added) -> Result<String> {
    let doing = "reading storage parameters";
    let options: Option<String> = target
        .client
        .query_one(
            "SELECT pg_catalog.string_agg(o, ', ') FROM pg_catalog.pg_class AS c, pg_catalog.unnest(c.reloptions) AS o WHERE c.oid = $1 AND c.relkind = 'r'",
            &[&pair.target.oid],
        )
        .await
        .and_then(|row| row.try_get(0))
        .at(Side::Target, doing)?;
    Ok(options.map(|options| format!(" WITH ({options})")).unwrap_or_default())
}

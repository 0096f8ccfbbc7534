//! The role that servers use: row-level security applies to it, and it has only the rights that serving needs.

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use super::{error::store_error, migrations::open_as_owner};
use crate::store::StoreError;

/// The SQL that creates such a role. The owner of the tables, or a superuser, runs it after `migrate up`.
pub fn role_sql(role: &str) -> String {
    let name = format!("\"{}\"", role.replace('"', "\"\""));
    format!(
        r"-- A role that serves jobledger: neither owner nor superuser, so that row-level security holds it to one org at a
-- time. Run this after `jobledger migrate up`, by the owner of the schema (CREATE ROLE takes CREATEROLE), and again after
-- later migrations. Partitions are deliberately not named: they are reached through job_event alone.
DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = {literal}) THEN
        CREATE ROLE {name} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOBYPASSRLS;
    END IF;
END $$;
-- Set up its authentication yourself, for example: \password {name}
GRANT USAGE ON SCHEMA jobledger TO {name};
GRANT SELECT ON jobledger.migration, jobledger.ledger TO {name};
-- Read API tokens. Servers make and revoke those of orgs by functions that know no operators.
GRANT SELECT ON jobledger.api_token TO {name};
GRANT EXECUTE ON FUNCTION jobledger.create_token(UUID, UUID, BYTEA, TEXT, TEXT, TIMESTAMPTZ, BIGINT), jobledger.revoke_token(UUID, UUID),
    jobledger.revoked_tokens(BIGINT, BIGINT) TO {name};
-- Record when API tokens were last used.
GRANT SELECT, INSERT, UPDATE ON jobledger.api_token_use TO {name};
-- Pause retention during a verification and after the clock was set.
GRANT UPDATE (retention_paused_until, clock_seen_at) ON jobledger.ledger TO {name};
GRANT SELECT, INSERT, UPDATE ON jobledger.org_head, jobledger.org_due TO {name};
GRANT SELECT, INSERT, DELETE ON jobledger.org_record, jobledger.org_month, jobledger.job_payload, jobledger.job_remains,
    jobledger.job_label TO {name};
GRANT SELECT, INSERT, UPDATE, DELETE ON jobledger.job, jobledger.org_counter, jobledger.org_series, jobledger.job_unblanked TO {name};
-- Events are inserted and deleted. Only an erasure updates what people have put into them.
GRANT SELECT, INSERT, DELETE ON jobledger.job_event, jobledger.org_event TO {name};
GRANT UPDATE (actor, detail_json, labels, result, payload, image, bytes) ON jobledger.job_event TO {name};
GRANT SELECT, INSERT, UPDATE, DELETE ON jobledger.org_type, jobledger.bulk_operation, jobledger.worker TO {name};
GRANT EXECUTE ON FUNCTION jobledger.make_partitions(INTEGER), jobledger.drop_empty_partitions(), jobledger.renew_log_id(UUID, UUID) TO {name};
",
        literal = format_args!("'{}'", role.replace('\'', "''")),
    )
}

/// Runs [`role_sql`] as the owner.
pub(super) async fn grant(url: &str, role: &str) -> Result<(), StoreError> {
    let mut connection = open_as_owner(url).await?;
    sqlx::raw_sql(AssertSqlSafe(role_sql(role))).execute(&mut connection).await.map_err(store_error)?;
    connection.close().await.map_err(store_error)
}

/// Refuses a role that lacks rights, and warns of one to which row-level security does not apply, or refuses that too.
pub(super) async fn check(connection: &mut PgConnection, require_rls: bool) -> Result<(), StoreError> {
    const SQL: &str = "/* check */ SELECT r.rolname::text, r.rolsuper, r.rolbypassrls,
            pg_has_role(r.oid, c.relowner, 'MEMBER'), has_column_privilege('jobledger.job_event', 'labels', 'UPDATE')
        FROM pg_roles r, pg_class c WHERE r.rolname = current_user AND c.oid = 'jobledger.job'::regclass";
    let (role, is_super, bypasses, owns, may_set): (String, bool, bool, bool, bool) =
        sqlx::query_as(SQL).fetch_one(connection).await.map_err(store_error)?;
    if !may_set {
        return Err(StoreError::Unusable(format!(
            "the role {role} lacks rights that a migration has added: run the SQL of `jobledger migrate role-sql` again, as the owner"
        )));
    }
    let reason = match (is_super, bypasses, owns) {
        (true, _, _) => "is a superuser, to whom row-level security does not apply",
        (_, true, _) => "has BYPASSRLS, so row-level security does not apply to it",
        (_, _, true) => "owns the tables, and so may turn row-level security off",
        _ => return Ok(()),
    };
    if require_rls {
        return Err(StoreError::Unusable(format!(
            "the role {role} {reason}: connect as another role (`jobledger migrate role-sql` prints SQL that creates one)"
        )));
    }
    tracing::warn!(role, "the role {reason}; `jobledger migrate role-sql` prints SQL that creates a suitable role");
    Ok(())
}

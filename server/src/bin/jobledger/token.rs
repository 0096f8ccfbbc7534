//! `jobledger token`.

use std::{
    error::Error,
    io::{self, Write as _},
};

use chrono::{DateTime, SecondsFormat, Utc};
use jobledger_server::{
    access::{Principal, Secret},
    domain::{
        access::{ApiToken, NO_ORG, Role, Roles},
        clock::{Clock as _, SystemClock, Time},
        id::OrgId,
    },
    store::DatabaseUrl,
    telemetry,
};
use uuid::Uuid;

use crate::cli::TokenCommand;

/// Value of `--expires` for a token that does not expire.
const NEVER: &str = "never";

#[tokio::main(flavor = "current_thread")]
pub(crate) async fn run(command: TokenCommand) -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut out = io::stdout().lock();
    let now = SystemClock.now();
    match command {
        TokenCommand::Create { org, role, operator, name, expires, database } => {
            if org == Some(NO_ORG) {
                return Err(format!("{NO_ORG} is not a valid org").into());
            }
            if role.contains(&Role::Operator) {
                return Err("an operator's token has no org: use --operator instead of --org and --role".into());
            }
            let org = org.map(OrgId);
            let roles = if operator { Roles::of(&[Role::Operator]) } else { role.into_iter().collect() };
            let id = Uuid::now_v7();
            let name = name.unwrap_or_else(|| format!("token-{}", &id.simple().to_string()[20..]));
            if !Principal::is_name(&name) {
                return Err(
                    "a name has 1 to 240 characters, none of them control or bidirectional formatting characters"
                        .into(),
                );
            }
            let expires_at = (expires != NEVER).then(|| parse(&expires, now)).transpose()?;
            let secret = Secret::generate(org)?;
            let token = ApiToken {
                id,
                org,
                digest: secret.digest(),
                name,
                roles,
                created_at: now,
                expires_at,
                revoked_at: None,
                used_at: None,
            };
            database.database_url.database()?.add_token(&token).await?;
            // Names the database file: whoever makes a token in the wrong one sees it here.
            let place = match &database.database_url {
                DatabaseUrl::Sqlite(path) => format!(" in {path}"),
                DatabaseUrl::Postgres(_) | DatabaseUrl::Other => String::new(),
            };
            let what = describe(&token, now);
            telemetry::say(&format!(
                "created token {}{place} ({what}): store it now, it can't be shown again",
                token.id
            ));
            writeln!(out, "{}", secret.text())?;
        }
        TokenCommand::List { org, database } => {
            let mut tokens = database.database_url.database()?.tokens().await?;
            tokens.retain(|token| org.is_none_or(|org| token.org == Some(OrgId(org))));
            tokens.sort_by_key(|token| (token.created_at, token.id));
            for token in tokens {
                writeln!(out, "{}  {}, {}", token.id, describe(&token, now), last_used(&token))?;
            }
        }
        TokenCommand::Revoke { id, database } => {
            if !database.database_url.database()?.revoke_token(id, now).await? {
                return Err(format!("there is no token {id}: see `jobledger token list`").into());
            }
            writeln!(out, "revoked {id}")?;
        }
    }
    Ok(())
}

/// Describes a token in one line.
fn describe(token: &ApiToken, now: Time) -> String {
    let org = token.org.map_or_else(|| "no org".to_owned(), |org| format!("org {org}"));
    let holds = match (token.revoked_at, token.expires_at) {
        (Some(at), _) => format!("revoked at {}", shown(at)),
        (None, Some(at)) if at <= now => format!("expired at {}", shown(at)),
        (None, Some(at)) => format!("expires at {}", shown(at)),
        (None, None) => "does not expire".to_owned(),
    };
    format!("{}, {org}, {}, made at {}, {holds}", token.name, token.roles, shown(token.created_at))
}

fn last_used(token: &ApiToken) -> String {
    token.used_at.map_or_else(|| "never used".to_owned(), |at| format!("last used at {}", shown(at)))
}

fn shown(time: Time) -> String {
    time.to_rfc3339_opts(SecondsFormat::Secs, true)
}

/// Parses a time, or a duration from now.
fn parse(when: &str, now: Time) -> Result<Time, String> {
    let expected =
        || format!("--expires {when}: expected a time like 2027-01-31T00:00:00Z, a duration like 90d, or never");
    let time = match DateTime::parse_from_rfc3339(when) {
        Ok(time) => time.with_timezone(&Utc),
        Err(_) => now + humantime::parse_duration(when).map_err(|_| expected())?,
    };
    if time <= now {
        return Err(format!("--expires {when}: this time is in the past"));
    }
    Ok(time)
}

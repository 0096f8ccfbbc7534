//! Who is let in, and by which certificates.

use std::{path::PathBuf, str::FromStr, time::Duration};

use clap::{ArgGroup, Args};
use jobledger_server::{
    TlsConfig,
    access::{AccessConfig, Authentication, JwtConfig, KeySource},
    domain::access::Role,
};

/// See the module.
#[derive(Debug, Args)]
#[command(next_help_heading = "Who is let in", group(ArgGroup::new("keys_of_jwts").multiple(true)))]
pub(super) struct AccessArgs {
    /// Ask callers who they are also where only this machine can reach the server. Elsewhere they always are, and wherever JWTs or client
    /// certificates are configured.
    #[arg(long, env = "JOBLEDGER_REQUIRE_AUTH", conflicts_with = "insecure_no_auth")]
    require_auth: bool,

    /// Ask nobody who they are: whoever reaches the server may read and change every job.
    #[arg(long, env = "JOBLEDGER_INSECURE_NO_AUTH")]
    insecure_no_auth: bool,

    /// A name by which this server is called, beside localhost and addresses, where it asks nobody who they are and only this machine can
    /// reach it: a page from elsewhere whose name leads here is turned away. May be given several times.
    #[arg(long, env = "JOBLEDGER_ALLOWED_HOST", value_name = "NAME", value_delimiter = ',')]
    allowed_host: Vec<String>,

    /// Take JWTs that are signed with these keys, by RS256, ES256 or EdDSA: a JWKS in a file, which is read again when it changes, or
    /// at a URL, which is read again now and then and when a new key is named.
    #[arg(long, env = "JOBLEDGER_JWT_KEYS", value_name = "FILE|URL", group = "keys_of_jwts", requires_all = ["jwt_issuer", "jwt_audience"])]
    jwt_keys: Option<Keys>,

    /// Take JWTs that are signed with the secret in this file, by HS256: 32 bytes or more.
    #[arg(long, env = "JOBLEDGER_JWT_HS256_SECRET_FILE", value_name = "FILE", group = "keys_of_jwts", requires_all = ["jwt_issuer", "jwt_audience"])]
    jwt_hs256_secret_file: Option<PathBuf>,

    /// What the claim `iss` of a JWT must be.
    #[arg(long, env = "JOBLEDGER_JWT_ISSUER", value_name = "TEXT", requires = "keys_of_jwts")]
    jwt_issuer: Option<String>,

    /// What the claim `aud` of a JWT must be, or have among others.
    #[arg(long, env = "JOBLEDGER_JWT_AUDIENCE", value_name = "TEXT", requires = "keys_of_jwts")]
    jwt_audience: Option<String>,

    /// The claim that says whose a JWT is, by the organisation's UUID: its name, or a JSON pointer as /app/org.
    #[arg(long, env = "JOBLEDGER_JWT_ORG_CLAIM", value_name = "CLAIM", default_value = "org_id")]
    jwt_org_claim: String,

    /// The claim that says who calls.
    #[arg(long, env = "JOBLEDGER_JWT_SUBJECT_CLAIM", value_name = "CLAIM", default_value = "sub")]
    jwt_subject_claim: String,

    /// The claim that says what the caller may do: an array of strings, or a string of words.
    #[arg(long, env = "JOBLEDGER_JWT_ROLES_CLAIM", value_name = "CLAIM", default_value = "roles")]
    jwt_roles_claim: String,

    /// What a role is called in that claim, as in `job-admins=admin`; may be given several times; names that are not given are nothing then.
    /// By default roles are called as here.
    #[arg(long, env = "JOBLEDGER_JWT_ROLE", value_name = "NAME=ROLE", value_delimiter = ',', value_parser = named_role)]
    jwt_role: Vec<(String, Role)>,

    /// What operators are called in that claim. They are every organisation's, so no JWT makes one unless this is said.
    #[arg(long, env = "JOBLEDGER_JWT_OPERATOR_ROLE", value_name = "NAME", requires = "keys_of_jwts")]
    jwt_operator_role: Option<String>,

    /// For how long a JWT may hold, from when it was issued (`iat`) or, where that is not said, from now: 1m to 366d.
    #[arg(long, env = "JOBLEDGER_JWT_MAX_LIFETIME", value_name = "TIME", default_value = "24h", value_parser = lifetime)]
    jwt_max_lifetime: Duration,

    /// By how much the clocks of issuers may differ: 0s to 5m.
    #[arg(long, env = "JOBLEDGER_JWT_LEEWAY", value_name = "TIME", default_value = "30s", value_parser = leeway)]
    jwt_leeway: Duration,

    /// How often keys are read from a URL: 10s to 24h.
    #[arg(long, env = "JOBLEDGER_JWT_REFRESH", value_name = "TIME", default_value = "5m", value_parser = refresh)]
    jwt_refresh: Duration,

    /// How long keys count that can't be read again, as when the issuer does not answer: 1m to 30d.
    #[arg(long, env = "JOBLEDGER_JWKS_MAX_AGE", value_name = "TIME", default_value = "1h", value_parser = max_age)]
    jwks_max_age: Duration,

    /// Let clients in by their certificates: lines of NAME ORG ROLES, where NAME is dns:…, uri:… or email:… as the certificate has it,
    /// ORG a UUID or - for operators, ROLES as worker,producer. Read again when it changes.
    #[arg(long, env = "JOBLEDGER_CLIENT_IDENTITIES", value_name = "FILE", requires = "tls_client_ca")]
    client_identities: Option<PathBuf>,

    /// Serve by TLS (1.2 and 1.3) with this certificate and those that lead to its root, in PEM. Read again when it changes.
    #[arg(long, env = "JOBLEDGER_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// The certificate's private key, in PEM.
    #[arg(long, env = "JOBLEDGER_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// Ask clients for certificates that were issued by these, in PEM. Read again when it changes, for new connections.
    #[arg(long, env = "JOBLEDGER_TLS_CLIENT_CA", value_name = "FILE", requires_all = ["tls_cert", "client_identities"])]
    tls_client_ca: Option<PathBuf>,

    /// Refuse clients whose certificates are in these lists of revoked ones (CRLs, in PEM), one from each issuer. Read again when it
    /// changes, for new connections.
    #[arg(long, env = "JOBLEDGER_TLS_CLIENT_CRL", value_name = "FILE", requires = "tls_client_ca")]
    tls_client_crl: Option<PathBuf>,
}

impl AccessArgs {
    pub(super) fn access(&self) -> AccessConfig {
        let authentication = match (self.require_auth, self.insecure_no_auth) {
            (_, true) => Authentication::Off,
            (true, false) => Authentication::Required,
            (false, false) => Authentication::Automatic,
        };
        let has_keys = self.jwt_keys.is_some() || self.jwt_hs256_secret_file.is_some();
        let jwt = has_keys.then(|| JwtConfig {
            keys: self.jwt_keys.clone().map(|keys| keys.0),
            hs256_secret: self.jwt_hs256_secret_file.clone(),
            issuer: self.jwt_issuer.clone().unwrap_or_default(),
            audience: self.jwt_audience.clone().unwrap_or_default(),
            org_claim: self.jwt_org_claim.clone(),
            subject_claim: self.jwt_subject_claim.clone(),
            roles_claim: self.jwt_roles_claim.clone(),
            roles: self.jwt_role.clone(),
            operator_role: self.jwt_operator_role.clone(),
            max_lifetime: self.jwt_max_lifetime,
            leeway: self.jwt_leeway,
            refresh: self.jwt_refresh,
            keys_max_age: self.jwks_max_age,
        });
        let (client_identities, allowed_hosts) = (self.client_identities.clone(), self.allowed_host.clone());
        AccessConfig { authentication, jwt, client_identities, allowed_hosts }
    }

    pub(super) fn tls(&self) -> Option<TlsConfig> {
        let (certificate, key) = self.tls_cert.clone().zip(self.tls_key.clone())?;
        let (client_ca, client_crl) = (self.tls_client_ca.clone(), self.tls_client_crl.clone());
        Some(TlsConfig { certificate, key, client_ca, client_crl })
    }
}

/// Where keys are.
#[derive(Debug, Clone)]
struct Keys(KeySource);

impl FromStr for Keys {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("expected a file or a URL".to_owned());
        }
        let is_url = text.starts_with("https://") || text.starts_with("http://");
        Ok(Self(if is_url { KeySource::Url(text.to_owned()) } else { KeySource::File(text.into()) }))
    }
}

fn named_role(text: &str) -> Result<(String, Role), String> {
    let (name, role) = text.split_once('=').ok_or("expected NAME=ROLE")?;
    match role.parse()? {
        Role::Operator => {
            Err("operators are every organisation's: --jwt-operator-role NAME says who they are".to_owned())
        }
        role => Ok((name.to_owned(), role)),
    }
}

fn lifetime(text: &str) -> Result<Duration, String> {
    super::time(text, Duration::from_secs(60)..=Duration::from_secs(366 * 86_400))
}

fn max_age(text: &str) -> Result<Duration, String> {
    super::time(text, Duration::from_secs(60)..=Duration::from_secs(30 * 86_400))
}

fn leeway(text: &str) -> Result<Duration, String> {
    super::seconds(text, Duration::ZERO..=Duration::from_secs(300))
}

fn refresh(text: &str) -> Result<Duration, String> {
    super::time(text, Duration::from_secs(10)..=Duration::from_secs(86_400))
}

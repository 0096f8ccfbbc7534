//! Options for authentication and TLS.

use std::{path::PathBuf, str::FromStr, time::Duration};

use clap::{ArgGroup, Args};
use jobledger_server::{
    TlsConfig,
    access::{AccessConfig, Authentication, JwtConfig, KeySource},
    domain::access::Role,
};

/// Authentication and TLS.
#[derive(Debug, Args)]
#[command(next_help_heading = "Authentication and TLS", group(ArgGroup::new("keys_of_jwts").multiple(true)))]
pub(super) struct AccessArgs {
    /// Require credentials even on an address that only this machine can reach. On other addresses, and where JWTs or
    /// client certificates are configured, they are always required.
    #[arg(long, env = "JOBLEDGER_REQUIRE_AUTH", conflicts_with = "insecure_no_auth")]
    require_auth: bool,

    /// Turn authentication off: anyone who can reach the server may read and change every job.
    #[arg(long, env = "JOBLEDGER_INSECURE_NO_AUTH")]
    insecure_no_auth: bool,

    /// A host name that clients may use for this server beside localhost and addresses, if it requires no credentials
    /// and only this machine can reach it. Calls with other host names are refused, against DNS rebinding by web
    /// pages. May be given several times.
    #[arg(long, env = "JOBLEDGER_ALLOWED_HOST", value_name = "NAME", value_delimiter = ',')]
    allowed_host: Vec<String>,

    /// Accept JWTs that are signed with these keys, by RS256, ES256 or EdDSA. The keys are a JWKS: in a file, which is
    /// read again when it changes, or at a URL, which is read again regularly and when a JWT names a new key.
    #[arg(long, env = "JOBLEDGER_JWT_KEYS", value_name = "FILE|URL", group = "keys_of_jwts", requires_all = ["jwt_issuer", "jwt_audience"])]
    jwt_keys: Option<Keys>,

    /// Accept JWTs that are signed by HS256 with the secret in this file, of at least 32 bytes.
    #[arg(long, env = "JOBLEDGER_JWT_HS256_SECRET_FILE", value_name = "FILE", group = "keys_of_jwts", requires_all = ["jwt_issuer", "jwt_audience"])]
    jwt_hs256_secret_file: Option<PathBuf>,

    /// The required value of a JWT's claim `iss`.
    #[arg(long, env = "JOBLEDGER_JWT_ISSUER", value_name = "TEXT", requires = "keys_of_jwts")]
    jwt_issuer: Option<String>,

    /// The required value of a JWT's claim `aud`, or of one of its elements.
    #[arg(long, env = "JOBLEDGER_JWT_AUDIENCE", value_name = "TEXT", requires = "keys_of_jwts")]
    jwt_audience: Option<String>,

    /// The claim with the UUID of the organisation that a JWT belongs to: its name, or a JSON pointer like /app/org.
    #[arg(long, env = "JOBLEDGER_JWT_ORG_CLAIM", value_name = "CLAIM", default_value = "org_id")]
    jwt_org_claim: String,

    /// The claim with the name of the caller.
    #[arg(long, env = "JOBLEDGER_JWT_SUBJECT_CLAIM", value_name = "CLAIM", default_value = "sub")]
    jwt_subject_claim: String,

    /// The claim with the caller's roles: an array of strings, or one string separated by spaces.
    #[arg(long, env = "JOBLEDGER_JWT_ROLES_CLAIM", value_name = "CLAIM", default_value = "roles")]
    jwt_roles_claim: String,

    /// Maps a name in the roles claim to a role, like `job-admins=admin`. May be given several times; other names
    /// then give no role. By default the claim uses jobledger's own role names.
    #[arg(long, env = "JOBLEDGER_JWT_ROLE", value_name = "NAME=ROLE", value_delimiter = ',', value_parser = named_role)]
    jwt_role: Vec<(String, Role)>,

    /// The name of the operator role in that claim. Operators may act for every organisation, so by default no JWT has
    /// that role.
    #[arg(long, env = "JOBLEDGER_JWT_OPERATOR_ROLE", value_name = "NAME", requires = "keys_of_jwts")]
    jwt_operator_role: Option<String>,

    /// The longest lifetime of a JWT, counted from its `iat`, or from now if it has none: 1m to 366d.
    #[arg(long, env = "JOBLEDGER_JWT_MAX_LIFETIME", value_name = "TIME", default_value = "24h", value_parser = lifetime)]
    jwt_max_lifetime: Duration,

    /// Clock difference to JWT issuers that is tolerated: 0s to 5m.
    #[arg(long, env = "JOBLEDGER_JWT_LEEWAY", value_name = "TIME", default_value = "30s", value_parser = leeway)]
    jwt_leeway: Duration,

    /// How often the keys at a URL are read: 10s to 24h.
    #[arg(long, env = "JOBLEDGER_JWT_REFRESH", value_name = "TIME", default_value = "5m", value_parser = refresh)]
    jwt_refresh: Duration,

    /// How long keys stay in use if they can't be refreshed, for example while the issuer is down: 1m to 30d.
    #[arg(long, env = "JOBLEDGER_JWKS_MAX_AGE", value_name = "TIME", default_value = "1h", value_parser = max_age)]
    jwks_max_age: Duration,

    /// Accept client certificates. The file has lines of NAME ORG ROLES: NAME is dns:…, uri:… or email:… as in the certificate,
    /// ORG is a UUID or - for operators, and ROLES is a list like worker,producer. Read again when it changes.
    #[arg(long, env = "JOBLEDGER_CLIENT_IDENTITIES", value_name = "FILE", requires = "tls_client_ca")]
    client_identities: Option<PathBuf>,

    /// Serve TLS (1.2 and 1.3) with this certificate chain, in PEM. Read again when it changes.
    #[arg(long, env = "JOBLEDGER_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// The certificate's private key, in PEM.
    #[arg(long, env = "JOBLEDGER_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// Ask clients for certificates that these CAs have issued, in PEM. Read again when it changes, for new connections.
    #[arg(long, env = "JOBLEDGER_TLS_CLIENT_CA", value_name = "FILE", requires_all = ["tls_cert", "client_identities"])]
    tls_client_ca: Option<PathBuf>,

    /// Refuse client certificates that these CRLs revoke, in PEM, one CRL from each issuer. Read again when it changes,
    /// for new connections.
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

/// Where the JWKS is: in a file, or at a URL.
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
        Role::Operator => Err("the operator role can't be mapped here: use --jwt-operator-role NAME".to_owned()),
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

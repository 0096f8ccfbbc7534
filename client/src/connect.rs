//! How to connect, and what every call says of its caller.

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use jobledger_proto::v1::job_service_client::JobServiceClient;
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Certificate, ClientTlsConfig, Endpoint, Identity},
};
use uuid::Uuid;

use crate::{Client, Error, failover::Connections, shutdown::in_runtime};

/// The metadata that names the org.
const ORG_HEADER: &str = "x-org-id";
/// How long one connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A silent server is asked for a sign of life this often, and given up if there is none within a while: together half of a lease of the
/// default length, so that a network that has swallowed a connection costs no worker its job.
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_WITHIN: Duration = Duration::from_secs(5);
/// What the server may send ahead on one call or stream.
const STREAM_WINDOW: u32 = 256 << 10;
/// The same for all of a connection's together: out of reach, else one stream that is not read would stop every call
/// beside it. The windows of the streams bound the memory.
const CONNECTION_WINDOW: u32 = 1 << 30;
/// As good as none, and far from what a clock can't add.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(366 * 86_400);
/// What a call may take with all its tries, unless said otherwise.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The generated client, with the org and the token of the [`Client`] that it comes from.
pub type RawClient = JobServiceClient<InterceptedService<Connections, WithCaller>>;

/// Says in every request who calls, and about which org.
#[derive(Debug, Clone)]
pub struct WithCaller {
    org: Option<MetadataValue<Ascii>>,
    token: Option<Token>,
}

impl Interceptor for WithCaller {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(org) = &self.org {
            request.metadata_mut().insert(ORG_HEADER, org.clone());
        }
        if let Some(header) = self.token.as_ref().map(Token::header) {
            request.metadata_mut().insert("authorization", header);
        }
        Ok(request)
    }
}

/// What lets a client in: an API token or a JWT. Clones share it, so that it can be [replaced](Token::replace) before it expires,
/// while clients use it.
#[derive(Clone)]
pub struct Token(Arc<RwLock<MetadataValue<Ascii>>>);

impl Token {
    /// A token.
    ///
    /// # Errors
    ///
    /// [`Error::Token`] if it has characters that no token has.
    pub fn new(token: &str) -> Result<Self, Error> {
        Ok(Self(Arc::new(RwLock::new(header(token)?))))
    }

    /// Puts another in its place, for calls from now on.
    ///
    /// # Errors
    ///
    /// As for [`Token::new`]; the one of before then stays.
    pub fn replace(&self, token: &str) -> Result<(), Error> {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = header(token)?;
        Ok(())
    }

    fn header(&self) -> MetadataValue<Ascii> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn header(token: &str) -> Result<MetadataValue<Ascii>, Error> {
    let mut header: MetadataValue<Ascii> = format!("Bearer {}", token.trim()).parse().map_err(|_| Error::Token)?;
    header.set_sensitive(true);
    Ok(header)
}

/// Without the token.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Where servers are: URLs of the form `http://HOST:PORT` or `https://HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoints(Vec<String>);

impl From<&str> for Endpoints {
    /// One, or several that are separated by commas.
    fn from(text: &str) -> Self {
        text.split(',').map(str::trim).collect()
    }
}

impl From<String> for Endpoints {
    fn from(text: String) -> Self {
        Self::from(text.as_str())
    }
}

impl From<&String> for Endpoints {
    fn from(text: &String) -> Self {
        Self::from(text.as_str())
    }
}

impl<S: Into<String>> From<Vec<S>> for Endpoints {
    fn from(endpoints: Vec<S>) -> Self {
        endpoints.into_iter().collect()
    }
}

impl<S: Into<String>, const N: usize> From<[S; N]> for Endpoints {
    fn from(endpoints: [S; N]) -> Self {
        endpoints.into_iter().collect()
    }
}

impl<S: Into<String>> FromIterator<S> for Endpoints {
    fn from_iter<I: IntoIterator<Item = S>>(endpoints: I) -> Self {
        Self(endpoints.into_iter().map(Into::into).collect())
    }
}

/// How to connect.
#[derive(Clone)]
#[must_use]
pub struct ClientBuilder {
    endpoints: Endpoints,
    org: Option<Uuid>,
    token: Option<Token>,
    ca: Option<Vec<u8>>,
    identity: Option<(Vec<u8>, Vec<u8>)>,
    timeout: Duration,
}

impl ClientBuilder {
    pub(crate) fn new(endpoints: Endpoints) -> Self {
        Self { endpoints, org: None, token: None, ca: None, identity: None, timeout: TIMEOUT }
    }

    /// The org that calls are about. Default: that of the token, or where the server asks for none the nil UUID.
    pub fn org(mut self, org: Uuid) -> Self {
        self.org = Some(org);
        self
    }

    /// The token that lets calls in.
    pub fn token(mut self, token: Token) -> Self {
        self.token = Some(token);
        self
    }

    /// Trusts servers whose certificates were issued by these, in PEM, instead of by those that the system trusts.
    pub fn ca(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.ca = Some(pem.into());
        self
    }

    /// Shows the server this certificate, with its private key, both in PEM.
    pub fn identity(mut self, certificate: impl Into<Vec<u8>>, key: impl Into<Vec<u8>>) -> Self {
        self.identity = Some((certificate.into(), key.into()));
        self
    }

    /// What a call may take with all its tries. Default 30 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout.min(LONGEST_TIMEOUT);
        self
    }

    pub(crate) fn endpoints(&self) -> &[String] {
        &self.endpoints.0
    }

    /// The client. Nothing is connected before the first call.
    ///
    /// # Errors
    ///
    /// [`Error::Endpoint`] if there is no endpoint, one is not of the form `http://HOST:PORT` or `https://HOST:PORT`, or the
    /// certificates can't be used; [`Error::Runtime`] outside a tokio runtime.
    pub fn build(self) -> Result<Client, Error> {
        in_runtime()?;
        if self.endpoints.0.is_empty() {
            return Err(Error::Endpoint("there is none".to_owned()));
        }
        let connect = |url: &String| Ok((url.clone(), self.endpoint(url)?.connect_lazy()));
        let connections = Connections::new(self.endpoints.0.iter().map(connect).collect::<Result<Vec<_>, Error>>()?);
        let org = self.org.map(|org| org.to_string().parse().expect("a UUID is ASCII"));
        let caller = WithCaller { org, token: self.token.clone() };
        let service = JobServiceClient::with_interceptor(connections.clone(), caller);
        Ok(Client::of(service, connections, self.timeout, self))
    }

    /// How one server is connected to.
    fn endpoint(&self, url: &str) -> Result<Endpoint, Error> {
        let invalid = |reason: &str| Error::Endpoint(format!("{url}: {reason}"));
        let is_tls = url.starts_with("https://");
        if !is_tls && !url.starts_with("http://") {
            return Err(invalid("expected http://HOST:PORT or https://HOST:PORT"));
        }
        if !is_tls && (self.ca.is_some() || self.identity.is_some()) {
            return Err(invalid("certificates are for https://HOST:PORT"));
        }
        let mut endpoint = Endpoint::from_shared(url.to_owned())
            .map_err(|error| invalid(&error.to_string()))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE_WITHIN)
            .keep_alive_while_idle(true);
        if is_tls {
            let tls = ClientTlsConfig::new();
            let tls = match &self.ca {
                Some(pem) => tls.ca_certificate(Certificate::from_pem(pem)),
                None => tls.with_native_roots(),
            };
            let tls = match &self.identity {
                Some((certificate, key)) => tls.identity(Identity::from_pem(certificate, key)),
                None => tls,
            };
            endpoint = endpoint.tls_config(tls).map_err(|error| invalid(&error.to_string()))?;
        }
        Ok(endpoint)
    }
}

/// Without what nobody else may see.
impl fmt::Debug for ClientBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientBuilder")
            .field("endpoints", &self.endpoints.0)
            .field("org", &self.org)
            .finish_non_exhaustive()
    }
}

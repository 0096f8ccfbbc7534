//! Connection settings, and the metadata that every call carries.

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use jobledger_proto::v1::{
    bulk_operation_service_client::BulkOperationServiceClient, job_service_client::JobServiceClient,
    job_type_service_client::JobTypeServiceClient, server_service_client::ServerServiceClient,
    worker_service_client::WorkerServiceClient,
};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Certificate, ClientTlsConfig, Endpoint, Identity},
};
use uuid::Uuid;

use crate::{Client, Error, failover::Connections, shutdown::in_runtime};

/// The metadata key of the org.
const ORG_HEADER: &str = "x-org-id";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Interval of HTTP/2 pings, and how long the client waits for the answer before it drops the connection. Both together
/// are half of the default lease (30 s), so a connection that the network dropped silently costs no worker its lease.
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_WITHIN: Duration = Duration::from_secs(5);
/// Bytes that the server may send ahead on one call or stream.
const STREAM_WINDOW: u32 = 256 << 10;
/// Bytes that the server may send ahead on one connection. The window is so large that it never fills: otherwise one
/// stream that is not read would block every other call on the connection. The windows of the streams bound the memory.
const CONNECTION_WINDOW: u32 = 1 << 30;
/// Bound of a timeout: practically unlimited, and small enough to be added to an [`Instant`](std::time::Instant).
const LONGEST_TIMEOUT: Duration = Duration::from_secs(366 * 86_400);
/// Default bound of a call, all its tries together.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The generated client. It adds the org and the token of its [`Client`] to each call.
pub type RawClient = JobServiceClient<InterceptedService<Connections, WithCaller>>;
/// The same for BulkOperationService.
pub type RawBulkClient = BulkOperationServiceClient<InterceptedService<Connections, WithCaller>>;
/// The same for JobTypeService.
pub type RawJobTypeClient = JobTypeServiceClient<InterceptedService<Connections, WithCaller>>;
/// The same for WorkerService.
pub type RawWorkerClient = WorkerServiceClient<InterceptedService<Connections, WithCaller>>;
/// The same for ServerService.
pub type RawServerClient = ServerServiceClient<InterceptedService<Connections, WithCaller>>;

/// Adds the org and the token to the metadata of every request.
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

/// An API token or a JWT. Clones share the token, so [`Token::replace`] renews it for clients that are in use.
#[derive(Clone)]
pub struct Token(Arc<RwLock<MetadataValue<Ascii>>>);

impl Token {
    /// Wraps a token, without the `Bearer` prefix. Surrounding white space is ignored.
    ///
    /// # Errors
    ///
    /// [`Error::Token`] if it has characters that a header can't carry.
    pub fn new(token: &str) -> Result<Self, Error> {
        Ok(Self(Arc::new(RwLock::new(header(token)?))))
    }

    /// Replaces the token for all later calls of every client that uses it.
    ///
    /// # Errors
    ///
    /// [`Error::Token`], as for [`Token::new`]. The previous token then stays.
    pub fn replace(&self, token: &str) -> Result<(), Error> {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = header(token)?;
        Ok(())
    }

    /// The token's text, to be stored.
    pub fn text(&self) -> String {
        let header = self.header();
        header.to_str().ok().and_then(|header| header.strip_prefix("Bearer ")).unwrap_or_default().to_owned()
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

/// Omits the token.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// The URLs of the servers, of the form `http://HOST:PORT` or `https://HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoints(Vec<String>);

impl From<&str> for Endpoints {
    /// Parses one URL, or several URLs separated by commas.
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

/// Configures a [`Client`]. [`Client::builder`] makes one.
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

    /// Sets the org of all calls. Default: the credential's org (an operator's has none), or without authentication the
    /// nil UUID.
    pub fn org(mut self, org: Uuid) -> Self {
        self.org = Some(org);
        self
    }

    /// Authenticates calls with this token.
    pub fn token(mut self, token: Token) -> Self {
        self.token = Some(token);
        self
    }

    /// Trusts only server certificates that these CA certificates (PEM) have issued, instead of the system's CAs.
    pub fn ca(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.ca = Some(pem.into());
        self
    }

    /// Authenticates with this client certificate and its private key, both in PEM.
    pub fn identity(mut self, certificate: impl Into<Vec<u8>>, key: impl Into<Vec<u8>>) -> Self {
        self.identity = Some((certificate.into(), key.into()));
        self
    }

    /// Bounds each call, all its tries together. Default 30 s; longer than 366 days counts as 366 days.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout.min(LONGEST_TIMEOUT);
        self
    }

    pub(crate) fn endpoints(&self) -> &[String] {
        &self.endpoints.0
    }

    /// Builds the client. It connects on the first call.
    ///
    /// # Errors
    ///
    /// [`Error::Endpoint`] if there is no endpoint, if an endpoint is not of the form `http://HOST:PORT` or
    /// `https://HOST:PORT`, or if the certificates can't be used; [`Error::Runtime`] outside a tokio runtime.
    pub fn build(self) -> Result<Client, Error> {
        in_runtime()?;
        if self.endpoints.0.is_empty() {
            return Err(Error::Endpoint("(none): the client needs at least one".to_owned()));
        }
        let connect = |url: &String| Ok((url.clone(), self.endpoint(url)?.connect_lazy()));
        let connections = Connections::new(self.endpoints.0.iter().map(connect).collect::<Result<Vec<_>, Error>>()?);
        let org = self.org.map(|org| org.to_string().parse().expect("a UUID is ASCII"));
        let caller = WithCaller { org, token: self.token.clone() };
        Ok(Client::of(connections, caller, self.timeout, self))
    }

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

/// Omits the token, the certificates and the key.
impl fmt::Debug for ClientBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientBuilder")
            .field("endpoints", &self.endpoints.0)
            .field("org", &self.org)
            .finish_non_exhaustive()
    }
}

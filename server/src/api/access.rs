//! The layer before every service: finds the caller, checks its roles and determines the org. `rpc.rs` has the roles of each
//! call; a call that it does not know is refused.

use std::{
    convert::Infallible,
    future::Future,
    net::{IpAddr, Ipv4Addr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use http::{HeaderMap, HeaderValue, Request, Response, header, uri::Authority};
use http_body::{Frame, SizeHint};
use prost::bytes::Bytes;
use tonic::{Status, body::Body};
use tower::{Layer, Service};
use uuid::Uuid;

use super::{
    caller::Caller,
    reject::{LayerFuture, refuse},
    request::ORG_HEADER,
    rpc::{Allowed, Rpc},
    status::ApiError,
};
use crate::{
    access::{Access, Credential, Presented, Refusal},
    domain::{
        access::{NO_ORG, Role, Roles},
        id::OrgId,
    },
    ledger::Author,
    net::Peer,
    scheduler,
    shares::network,
    telemetry::RateLimitedLog,
};

const WRONG_ROLES: &str = "the credential's roles don't allow this call";

/// Admits calls whose callers may make them; every call where authentication is off.
#[derive(Clone)]
pub(crate) struct AccessLayer {
    access: Option<Arc<Access>>,
    /// With authentication off: the host names that a request may use beside localhost and addresses; `None`: not checked.
    hosts: Option<Arc<[String]>>,
    refused: Arc<Refused>,
}

impl AccessLayer {
    pub(crate) fn new(access: Option<Arc<Access>>, hosts: Option<Vec<String>>) -> Self {
        Self { access, hosts: hosts.map(Arc::from), refused: Arc::default() }
    }
}

impl<S> Layer<S> for AccessLayer {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { access: self.access.clone(), hosts: self.hosts.clone(), refused: Arc::clone(&self.refused), inner }
    }
}

/// Logs refused credentials by network and reason: somebody may be guessing them.
#[derive(Default)]
struct Refused(RateLimitedLog<(IpAddr, Refusal)>);

impl Refused {
    fn note(&self, address: IpAddr, refusal: Refusal) {
        // A call without a credential guesses none.
        if refusal == Refusal::Nothing {
            return;
        }
        if let Some(times) = self.0.note((network(address), refusal)) {
            tracing::info!(%address, reason = %refusal, times, "credentials were refused");
        }
    }
}

#[derive(Clone)]
pub(crate) struct Guarded<S> {
    access: Option<Arc<Access>>,
    hosts: Option<Arc<[String]>>,
    refused: Arc<Refused>,
    inner: S,
}

impl<S> Service<Request<Body>> for Guarded<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future = LayerFuture>
        + Clone
        + Send
        + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = LayerFuture;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> LayerFuture {
        let rpc = request.extensions().get::<Rpc>().copied();
        let allowed = rpc.map(Rpc::allowed);
        let Some(access) = &self.access else {
            // A page in a browser on this machine can call any server that listens here.
            if [header::ORIGIN.as_str(), "sec-fetch-site"].iter().any(|of| request.headers().contains_key(*of)) {
                return refuse(
                    ApiError::Denied("browsers may not call a server that requires no credentials"),
                    request,
                );
            }
            // Probes may use any host name.
            if let Some(Allowed::Roles(_) | Allowed::Operators | Allowed::AnyRole) = allowed
                && let Some(hosts) = &self.hosts
                && let Some(host) = host(&request)
                && !is_ours(host, hosts)
            {
                return refuse(
                    ApiError::Denied(
                        "unknown host name: use localhost, an IP address, or a name set with --allowed-host",
                    ),
                    request,
                );
            }
            if let Some(Allowed::Roles(_)) = allowed {
                match asked_org(request.headers()) {
                    Ok(org) => let_in(&mut request, Caller::anybody(org.unwrap_or(OrgId::DEFAULT))),
                    Err(error) => return refuse(error, request),
                }
            }
            return self.inner.call(request);
        };
        if let Some(Allowed::Anybody) = allowed {
            // Nobody reads the headers, which may be large, and they would be kept while the rest of the request arrives.
            let kind = request.headers_mut().remove(header::CONTENT_TYPE);
            *request.headers_mut() = kind.into_iter().map(|kind| (header::CONTENT_TYPE, kind)).collect();
            return self.inner.call(request);
        }
        let peer = request.extensions().get::<Peer>();
        let from = peer.map_or(Ipv4Addr::UNSPECIFIED.into(), |peer| peer.address.ip());
        let certificate = peer.and_then(|peer| peer.certificate.clone());
        let authorization = request.headers().get_all(header::AUTHORIZATION).iter().map(HeaderValue::as_bytes);
        let presented = match Presented::of(authorization, certificate.as_ref()) {
            Ok(presented) => presented,
            Err(refusal) => {
                self.refused.note(from, refusal);
                return refuse(refusal.into(), request);
            }
        };
        match access.known(&presented) {
            Err(refusal) => {
                self.refused.note(from, refusal);
                refuse(refusal.into(), request)
            }
            Ok(Some(credential)) => enter(access, &mut self.inner, rpc, presented, credential, request),
            Ok(None) => {
                let (access, refused, mut inner) = (Arc::clone(access), Arc::clone(&self.refused), self.inner.clone());
                Box::pin(async move {
                    scheduler::now_looks_up();
                    match access.find(&presented, from).await {
                        Ok(credential) => enter(&access, &mut inner, rpc, presented, credential, request).await,
                        Err(refusal) => {
                            refused.note(from, refusal);
                            refuse(refusal.into(), request).await
                        }
                    }
                })
            }
        }
    }
}

/// The host name that a request uses, without the port.
fn host(request: &Request<Body>) -> Option<&str> {
    let named = || request.headers().get(header::HOST)?.to_str().ok();
    let authority = request.uri().authority().map(Authority::as_str).or_else(named)?;
    let (host, port) = authority.rsplit_once(':').unwrap_or((authority, ""));
    Some(if port.bytes().all(|byte| byte.is_ascii_digit()) { host } else { authority })
}

/// True of localhost, IP addresses and the allowed names. A page elsewhere may have any other name resolve to this machine.
fn is_ours(host: &str, hosts: &[String]) -> bool {
    let name = host.trim_end_matches('.');
    let is_local = name.eq_ignore_ascii_case("localhost") || name.to_ascii_lowercase().ends_with(".localhost");
    let is_address = name.trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
    is_local || is_address || hosts.iter().any(|host| host.eq_ignore_ascii_case(name))
}

/// Passes on the call of a caller with a credential, if its roles allow the call.
fn enter<S>(
    access: &Arc<Access>,
    inner: &mut S,
    rpc: Option<Rpc>,
    presented: Presented,
    credential: Arc<Credential>,
    mut request: Request<Body>,
) -> LayerFuture
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future = LayerFuture>,
{
    scheduler::now_runs_for(credential.principal.org.unwrap_or(OrgId(NO_ORG)));
    let Some(rpc) = rpc else { return refuse(ApiError::NoSuchCall, request) };
    match rpc.allowed() {
        Allowed::Roles(roles) => match caller(&credential, roles, request.headers()) {
            Ok(caller) => let_in(&mut request, caller),
            Err(error) => return refuse(error, request),
        },
        Allowed::Operators if !credential.principal.roles.has(Role::Operator) => {
            return refuse(ApiError::Denied(WRONG_ROLES), request);
        }
        Allowed::Operators => runs_for(&request, OrgId(NO_ORG)),
        Allowed::AnyRole | Allowed::Anybody => {}
    }
    request.extensions_mut().insert(Arc::clone(&credential));
    let answer = inner.call(request);
    if !rpc.is_long() {
        return answer;
    }
    let access = Arc::clone(access);
    Box::pin(async move {
        let mut end: End = Box::pin(async move { access.end_of(&presented, &credential).await });
        let answer = tokio::select! {
            answer = answer => answer?,
            why = &mut end => return Ok(Status::from(ApiError::from(why)).into_http()),
        };
        Ok(answer.map(|body| Body::new(WhileLetIn { body, end, is_over: false })))
    })
}

/// Attaches the caller to the request. The call's task and its connection are its org's from now on.
fn let_in(request: &mut Request<Body>, caller: Caller) {
    runs_for(request, caller.org());
    request.extensions_mut().insert(caller);
}

/// Counts the processor time of the call's task and of its connection for this org from now on.
fn runs_for(request: &Request<Body>, org: OrgId) {
    scheduler::now_runs_for(org);
    if let Some(peer) = request.extensions().get::<Peer>() {
        peer.owner.is_called_on_by(org);
    }
}

/// The caller and its org: the credential's, or for an operator the one that the call names.
fn caller(credential: &Credential, roles: Roles, headers: &HeaderMap) -> Result<Caller, ApiError> {
    let principal = &credential.principal;
    let asked = asked_org(headers)?;
    let org = match (principal.org, asked) {
        (Some(org), None) => org,
        (Some(org), Some(asked)) if org == asked => org,
        (Some(_), Some(_)) => return Err(ApiError::Denied("x-org-id differs from the credential's org")),
        (None, Some(asked)) => asked,
        (None, None) => return Err(ApiError::invalid(ORG_HEADER, "is needed: an operator's credential has no org")),
    };
    if !principal.roles.meets(roles) {
        return Err(ApiError::Denied(WRONG_ROLES));
    }
    let by = Author { org, actor: Some(Arc::clone(&principal.name)) };
    Ok(Caller { by, roles: principal.roles })
}

/// The org that a call names in `x-org-id`.
fn asked_org(headers: &HeaderMap) -> Result<Option<OrgId>, ApiError> {
    let mut values = headers.get_all(ORG_HEADER).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(ApiError::invalid(ORG_HEADER, "must be given exactly once"));
    }
    let org = value.to_str().ok().and_then(|text| Uuid::try_parse(text).ok()).filter(|org| *org != NO_ORG);
    org.map(|org| Some(OrgId(org))).ok_or_else(|| ApiError::invalid(ORG_HEADER, "must be a UUID"))
}

type End = Pin<Box<dyn Future<Output = Refusal> + Send>>;

/// The body of an answer that ends when its caller's credential ends.
struct WhileLetIn {
    body: Body,
    end: End,
    is_over: bool,
}

impl http_body::Body for WhileLetIn {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        if let Poll::Ready(why) = self.end.as_mut().poll(context) {
            self.is_over = true;
            let mut trailers = HeaderMap::new();
            return Poll::Ready(Some(match Status::from(ApiError::from(why)).add_header(&mut trailers) {
                Ok(()) => Ok(Frame::trailers(trailers)),
                Err(error) => Err(error),
            }));
        }
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.is_over || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_here_and_are_anothers_are_not_ours() {
        let request = |host: &str| Request::get("/jobs").header(header::HOST, host).body(Body::empty()).unwrap();
        let given = ["ledger.internal".to_owned()];
        for ours in
            ["localhost:50051", "LOCALHOST", "a.localhost", "127.0.0.1:1", "[::1]:50051", "[::1]", "ledger.internal"]
        {
            assert!(is_ours(host(&request(ours)).unwrap(), &given), "{ours}");
        }
        for anothers in ["example.com:50051", "localhost.example.com", "127.0.0.1.example.com", "ledger.internal.x", ""]
        {
            assert!(!is_ours(host(&request(anothers)).unwrap(), &given), "{anothers}");
        }
        let of_uri = Request::get("http://example.com:50051/x").body(Body::empty()).unwrap();
        assert_eq!(host(&of_uri), Some("example.com"));
    }
}

//! The outermost layer of every call: its deadline, its panics and its line in the log.

use std::{
    future::Future,
    panic::AssertUnwindSafe,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode,
    header::{ACCEPT, ALLOW, CONTENT_TYPE},
};
use tokio::time::Instant;
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};
use uuid::Uuid;

use super::{
    limits::CallLimits,
    request::ORG_HEADER,
    rpc::Rpc,
    status::{ApiError, plain},
};

/// tonic answers an expired deadline with CANCELLED, from a timer outside of all layers. Our timer fires this much
/// earlier and answers with DEADLINE_EXCEEDED.
const AHEAD_OF_TONIC: Duration = Duration::from_millis(1);

/// Bounds each call by its `grpc-timeout` and by [`CallLimits::call_within`], and logs it. Turns panics, expired
/// deadlines and tonic's own errors into errors of the contract. A server stream is bounded until its response headers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CallLayer(pub(crate) CallLimits);

impl<S> Layer<S> for CallLayer {
    type Service = Call<S>;

    fn layer(&self, inner: S) -> Call<S> {
        Call { inner, limits: self.0 }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Call<S> {
    inner: S,
    limits: CallLimits,
}

type CallFuture<E> = Pin<Box<dyn Future<Output = Result<Response<Body>, E>> + Send>>;

impl<S, B> Service<Request<B>> for Call<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
    S::Future: Send + Unpin + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = CallFuture<S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let (started, limits) = (Instant::now(), self.limits);
        let is_grpc = is_grpc(request.headers());
        let rpc = request.uri().path().to_owned();
        let org_id = request.headers().get(ORG_HEADER).and_then(|org| org.to_str().ok()).map(str::to_owned);
        let deadline = match request.headers().get("grpc-timeout").map(parse_timeout) {
            None => started + limits.call_within,
            Some(Some(allowed)) => started + allowed.saturating_sub(AHEAD_OF_TONIC).min(limits.call_within),
            Some(None) => {
                let description = "must be at most 8 digits and a unit (H, M, S, m, u or n)";
                let status = Status::from(ApiError::invalid("grpc-timeout", description));
                return Box::pin(async move { Ok(status.into_http()) });
            }
        };
        if is_of_grpc(&rpc) && (request.method() != Method::POST || !is_grpc) {
            let answer = match request.method() {
                &Method::POST => nothing_but(StatusCode::UNSUPPORTED_MEDIA_TYPE, ACCEPT, "application/grpc"),
                _ => nothing_but(StatusCode::METHOD_NOT_ALLOWED, ALLOW, "POST"),
            };
            return Box::pin(async move { Ok(answer) });
        }
        if let Some(called) = Rpc::of(request.method(), &rpc) {
            request.extensions_mut().insert(called);
        }
        let answer = CatchPanic(self.inner.call(request));
        Box::pin(async move {
            let failed = match tokio::time::timeout_at(deadline, answer).await {
                Ok(Ok(response)) => Ok(response?),
                Ok(Err(())) => {
                    let id = Uuid::new_v4();
                    tracing::error!(error_id = %id, rpc, org_id, "a call panicked");
                    Err(ApiError::Panicked { id })
                }
                Err(_) => Err(ApiError::DeadlineExceeded),
            };
            let response = match failed {
                Ok(response) => response,
                Err(error) if is_grpc => Status::from(error).into_http(),
                Err(error) => plain(error),
            };
            // Only errors have their status in the headers; success has it in the trailers.
            let response =
                match Status::from_header_map(response.headers()).and_then(|status| in_contract(&status, &limits)) {
                    Some(error) => Status::from(error).into_http(),
                    None => response,
                };
            if !is_grpc
                && Status::from_header_map(response.headers())
                    .is_some_and(|status| status.code() == Code::Unimplemented)
            {
                return Ok(nowhere());
            }
            let status = response.headers().get(Status::GRPC_STATUS).and_then(|status| status.to_str().ok());
            let elapsed_us = started.elapsed().as_micros() as u64;
            tracing::debug!(rpc, org_id, grpc_status = status, elapsed_us, "call");
            Ok(response)
        })
    }
}

/// True of gRPC and gRPC-Web. Everything else is plain HTTP.
pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// The answer to plain HTTP at the path of a gRPC call: this code, and a header that names what is allowed.
fn nothing_but(code: StatusCode, header: HeaderName, value: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = code;
    response.headers_mut().insert(header, HeaderValue::from_static(value));
    response
}

/// True of the paths of gRPC calls: `/package.Service/Method`.
fn is_of_grpc(path: &str) -> bool {
    let mut parts = path.split('/').skip(1);
    parts.next().is_some_and(|service| service.contains('.')) && parts.next().is_some_and(|method| !method.is_empty())
}

/// Turns a panic of the future into an error. State that it shares with other calls has to survive a panic by itself.
struct CatchPanic<F>(F);

impl<F: Future + Unpin> Future for CatchPanic<F> {
    type Output = Result<F::Output, ()>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match std::panic::catch_unwind(AssertUnwindSafe(|| Pin::new(&mut self.0).poll(context))) {
            Ok(polled) => polled.map(Ok),
            // The panic hook has logged the message.
            Err(_) => Poll::Ready(Err(())),
        }
    }
}

/// The answer to plain HTTP at an unknown path. tonic would answer 200, with the error in a gRPC header.
fn nowhere() -> Response<Body> {
    let mut response = Response::new(Body::new(r#"{"detail":"Not Found"}"#.to_owned()));
    *response.status_mut() = StatusCode::NOT_FOUND;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// The contract's error for an error that tonic made by itself, before the request reached the service.
fn in_contract(status: &Status, limits: &CallLimits) -> Option<ApiError> {
    if !status.details().is_empty() {
        return None;
    }
    match status.code() {
        Code::Internal if status.message().starts_with("failed to decode Protobuf message") => {
            Some(ApiError::invalid("(message)", "is not a message of the contract, or nested too deep"))
        }
        Code::OutOfRange => Some(ApiError::MessageTooLarge { limit: limits.request_bytes }),
        // From the codec: the message is incomplete, or marked as compressed without an encoding.
        Code::Internal | Code::Unknown => Some(ApiError::invalid("(message)", "can't be read")),
        Code::Unimplemented if status.message().contains("compressed") => Some(ApiError::UnsupportedEncoding),
        Code::Unimplemented => Some(ApiError::NoSuchCall),
        _ => None,
    }
}

/// Parses `grpc-timeout` as the gRPC protocol defines it; `None` if it is malformed.
fn parse_timeout(value: &HeaderValue) -> Option<Duration> {
    let text = value.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(amount * 3_600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    })
}

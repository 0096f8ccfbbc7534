//! One connection, from its first bytes to its last.

use std::{
    convert::Infallible,
    future::Future,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use http::{Request, Response};
use http_body::{Frame, SizeHint};
use hyper::body::Bytes;
use hyper::{body::Incoming, service::Service as HyperService};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto::Builder,
};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf, Take},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body};
use tower::Service;

use super::{
    ConnectionLimits, Peer,
    response_memory::{AnswerBytes, Holding, Share, StreamingResponse},
};
use crate::scheduler::{CallExecutor, Owner};

/// Bytes of the HTTP/2 preface, with which a connection begins (RFC 9113, 3.4). No useful HTTP/1 request is shorter.
const PREFACE: u64 = 24;
/// Bytes of an answer that a stream buffers until the caller takes them.
const SEND_BUFFER: usize = 64 << 10;
/// HTTP/2 flow-control windows: bytes that a client may send before the server has read them.
const CONNECTION_WINDOW: u32 = 1 << 20;
const STREAM_WINDOW: u32 = 256 << 10;
/// The most headers of an HTTP/1 request.
const HEADERS: usize = 64;
/// The least buffer of an HTTP/1 connection for a request's head.
const LEAST_BUFFER: usize = 8 << 10;
/// Bytes that are read at once.
const AT_ONCE: u64 = 16 << 10;
const AT_ONCE_OF_STRANGERS: u64 = 1 << 10;
/// How long a closing connection without calls is kept: after it was idle or became too old, and when the server
/// stops. A client that obeys GOAWAY closes it earlier.
const LAST_CALLS: Duration = Duration::from_secs(20);
const LAST_CALLS_AT_STOP: Duration = Duration::from_secs(1);

/// How long streams may continue at most on a connection that is too old.
const LAST_STREAMS: Duration = Duration::from_secs(300);

/// The period over which resets are counted.
const RESETS_WITHIN: Duration = Duration::from_secs(60);

/// Checks for idleness in each idle timeout. A connection closes up to an eighth of the timeout late.
const LOOKS: u32 = 8;

/// Serves a connection to its end.
pub(super) async fn run<IO, S>(
    io: IO,
    peer: Peer,
    unread: Share,
    service: S,
    limits: ConnectionLimits,
    draining: CancellationToken,
) where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + Unpin + 'static,
    S::Future: Send + Unpin + 'static,
{
    let (address, cut, ending) = (peer.address, peer.cut.clone(), peer.ending.clone());
    let owner = Arc::clone(&peer.owner);
    let calls = Arc::new(Calls { resets: limits.resets as u32, cut: cut.clone(), ..Calls::default() });
    let read = Arc::new(AtomicU64::new(0));
    let service = Counting { service, peer, unread, calls: Arc::clone(&calls) };
    let io = Counted { io: io.take(0), owner: Arc::clone(&owner), read: Arc::clone(&read), at_once: 0 };
    let io = TokioIo::new(io);
    let builder = builder(&limits, Arc::clone(&owner));
    let mut connection = pin!(builder.serve_connection(io, service));
    let mut silent = pin!(silent(&read, limits.first_bytes_within));
    let mut idle = pin!(idle(&calls, &owner, &limits));
    let (mut is_draining, mut is_ending, mut is_old) = (false, false, false);
    let mut aging = pin!(sleep(about(limits.age)));
    let (mut last_calls, mut pause) = (pin!(sleep(Duration::MAX)), LAST_CALLS);
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%address, %error, "a connection broke");
                }
                return;
            }
            () = &mut silent => {
                tracing::debug!(%address, "a connection said nothing");
                return;
            }
            () = cut.cancelled() => return,
            () = draining.cancelled(), if !is_draining => {
                (is_draining, is_ending, pause) = (true, true, LAST_CALLS_AT_STOP);
                last_calls.as_mut().reset(Instant::now() + pause);
                connection.as_mut().graceful_shutdown();
            }
            () = &mut idle, if !is_ending => {
                is_ending = true;
                last_calls.as_mut().reset(Instant::now() + pause);
                connection.as_mut().graceful_shutdown();
            }
            () = &mut aging, if !ending.is_cancelled() => {
                if is_old {
                    ending.cancel();
                } else {
                    (is_old, is_ending) = (true, true);
                    aging.as_mut().reset(Instant::now() + limits.age.min(LAST_STREAMS));
                    last_calls.as_mut().reset(Instant::now() + pause);
                    connection.as_mut().graceful_shutdown();
                }
            }
            () = &mut last_calls, if is_ending => {
                // A call that came at the last moment may finish.
                if calls.open.load(Ordering::Relaxed) == 0 {
                    return;
                }
                last_calls.as_mut().reset(Instant::now() + pause);
            }
        }
    }
}

fn builder(limits: &ConnectionLimits, owner: Arc<Owner>) -> Builder<CallExecutor> {
    let mut builder = Builder::new(CallExecutor(owner));
    let header_bytes = usize::try_from(limits.header_bytes).unwrap_or(usize::MAX);
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.first_bytes_within)
        .max_headers(HEADERS)
        .max_buf_size(header_bytes.max(LEAST_BUFFER));
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_connection_window_size(CONNECTION_WINDOW)
        .initial_stream_window_size(STREAM_WINDOW)
        .max_concurrent_streams(limits.calls_per_connection)
        .max_header_list_size(limits.header_bytes)
        .max_pending_accept_reset_streams(limits.resets)
        .max_local_error_reset_streams(limits.resets)
        .max_send_buf_size(SEND_BUFFER)
        .keep_alive_interval(limits.keepalive)
        .keep_alive_timeout(limits.keepalive);
    builder
}

/// The time, varied at random by up to a tenth, so that connections opened together are not renewed together.
fn about(time: Duration) -> Duration {
    let share = f64::from(getrandom::u32().unwrap_or(u32::MAX / 2)) / f64::from(u32::MAX);
    time.mul_f64(0.9 + 0.2 * share)
}

/// Completes if the connection sent fewer than [`PREFACE`] bytes in time; else never.
async fn silent(read: &AtomicU64, within: Duration) {
    sleep(within).await;
    if read.load(Ordering::Relaxed) >= PREFACE {
        std::future::pending().await
    }
}

/// Completes once the connection had no call for too long.
async fn idle(calls: &Calls, owner: &Owner, limits: &ConnectionLimits) {
    let mut since = (Instant::now(), calls.begun.load(Ordering::Relaxed));
    loop {
        let after = if owner.is_known() { limits.idle } else { limits.unknown_idle.min(limits.idle) };
        sleep_until(Instant::now() + after / LOOKS).await;
        let begun = calls.begun.load(Ordering::Relaxed);
        if begun != since.1 || calls.open.load(Ordering::Relaxed) > 0 {
            since = (Instant::now(), begun);
        } else if since.0.elapsed() >= after {
            return;
        }
    }
}

/// The calls of one connection.
#[derive(Default)]
struct Calls {
    open: AtomicUsize,
    begun: AtomicU64,
    /// Calls that the client may reset within [`RESETS_WITHIN`] before they are answered.
    resets: u32,
    reset: Mutex<Option<(Instant, u32)>>,
    cut: CancellationToken,
}

impl Calls {
    /// Counts a call that the client reset before it was answered. Too many close the connection.
    fn count_reset(&self) {
        let mut reset = self.reset.lock();
        let (since, n) = reset.filter(|(since, _)| since.elapsed() < RESETS_WITHIN).unwrap_or((Instant::now(), 0));
        *reset = Some((since, n + 1));
        if n >= self.resets && !self.cut.is_cancelled() {
            tracing::warn!(resets = n + 1, "closing a connection that reset too many calls");
            self.cut.cancel();
        }
    }
}

/// Counts the bytes that are read, and reads few at once: what comes with a read is worked off in one step.
struct Counted<IO> {
    io: Take<IO>,
    owner: Arc<Owner>,
    read: Arc<AtomicU64>,
    /// Bytes that were read since there were none, or others had their turn.
    at_once: u64,
}

impl<IO: AsyncRead + Unpin> AsyncRead for Counted<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let most = if self.owner.is_known() { AT_ONCE } else { AT_ONCE_OF_STRANGERS };
        if self.at_once >= most {
            // Others have their turn first.
            self.at_once = 0;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let limit = most - self.at_once;
        self.io.set_limit(limit);
        let read = Pin::new(&mut self.io).poll_read(context, buffer);
        let bytes = limit - self.io.limit();
        self.read.fetch_add(bytes, Ordering::Relaxed);
        self.at_once = if read.is_pending() { 0 } else { self.at_once + bytes };
        read
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Counted<IO> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(self.io.get_mut()).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(self.io.get_mut()).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(self.io.get_mut()).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.get_ref().is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(self.io.get_mut()).poll_write_vectored(context, slices)
    }
}

/// Adds the peer to each request, and counts the call as open until its answer has ended.
struct Counting<S> {
    service: S,
    peer: Peer,
    unread: Share,
    calls: Arc<Calls>,
}

impl<S> HyperService<Request<Incoming>> for Counting<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Unpin,
    S::Future: Unpin,
{
    type Response = Response<UntilThrough>;
    type Error = Infallible;
    type Future = Answering<S>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(self.peer.clone());
        self.calls.open.fetch_add(1, Ordering::Relaxed);
        self.calls.begun.fetch_add(1, Ordering::Relaxed);
        let (call, open) = (Some((self.service.clone(), request)), Some(Open(Arc::clone(&self.calls))));
        Answering { call, answer: None, unread: self.unread.clone(), open }
    }
}

/// An open call.
struct Open(Arc<Calls>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An answer that is being made. Dropping it before it is ready counts as a reset by the client.
struct Answering<S: Service<Request<Body>>> {
    /// A call that has not begun. It begins in the task of its own, and not in that of the connection, which others wait for.
    call: Option<(S, Request<Body>)>,
    answer: Option<S::Future>,
    unread: Share,
    open: Option<Open>,
}

impl<S: Service<Request<Body>>> Drop for Answering<S> {
    fn drop(&mut self) {
        if let Some(open) = &self.open {
            open.0.count_reset();
        }
    }
}

impl<S> Future for Answering<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Unpin,
    S::Future: Unpin,
{
    type Output = Result<Response<UntilThrough>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some((mut service, request)) = self.call.take() {
            // `poll_ready` is not needed: all services behind this one are always ready.
            self.answer = Some(service.call(request));
        }
        let Some(answer) = &mut self.answer else { return Poll::Pending };
        let answer = ready!(Pin::new(answer).poll(context));
        let open = self.open.take();
        Poll::Ready(answer.map(|mut answer| {
            let extensions = answer.extensions_mut();
            let AnswerBytes { bytes, org } = extensions.remove().unwrap_or(AnswerBytes { bytes: 0, org: None });
            let holding = extensions.remove::<StreamingResponse>().is_none().then(|| self.unread.hold(bytes, org));
            answer.map(|body| UntilThrough { body, _open: open, _holding: holding })
        }))
    }
}

/// An answer's body. Until it is dropped, its call is open, and its bytes count as unread.
struct UntilThrough {
    body: Body,
    _open: Option<Open>,
    _holding: Option<Holding>,
}

impl http_body::Body for UntilThrough {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

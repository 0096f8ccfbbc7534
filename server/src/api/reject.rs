//! Answers to requests that a layer refuses without decoding them.

use std::{convert::Infallible, future::Future, pin::Pin, time::Duration};

use http::{Request, Response};
use http_body_util::BodyExt as _;
use prost::bytes::Bytes;
use tokio::{sync::Semaphore, time::timeout};
use tonic::{Status, body::Body};

use super::{
    deadline::is_grpc,
    rpc::Rpc,
    status::{ApiError, plain},
};

/// The future of a layer's answer.
pub(super) type LayerFuture = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

/// Bounds on receiving refused requests: bytes of one, time for one, and how many at a time. Beyond them the stream is
/// reset while its request still comes, and counts as a reset of its connection.
const MOST: usize = 4 << 20;
const WITHIN: Duration = Duration::from_secs(2);
static PLACES: Semaphore = Semaphore::const_new(1_024);

/// Refuses a request after receiving the rest of its body. Answering earlier would reset the stream. Resets count
/// against the connection, so a caller that is refused often, as when it exceeds its rate, would lose it.
pub(super) fn refuse(error: ApiError, request: Request<Body>) -> LayerFuture {
    let answer = if is_grpc(request.headers()) { Status::from(error).into_http() } else { plain(error) };
    if request.extensions().get() == Some(&Rpc::Reflection) {
        return Box::pin(async { Ok(answer) });
    }
    Box::pin(async move {
        let mut body = request.into_body();
        let come = async {
            let mut bytes = 0;
            while bytes < MOST
                && let Some(Ok(frame)) = body.frame().await
            {
                bytes += frame.data_ref().map_or(0, Bytes::len);
            }
        };
        if let Ok(_place) = PLACES.try_acquire() {
            let _ = timeout(WITHIN, come).await;
        }
        Ok(answer)
    })
}

//! Answers to requests that are not looked at.

use std::{convert::Infallible, future::Future, pin::Pin, time::Duration};

use http::{Request, Response};
use http_body_util::BodyExt as _;
use prost::bytes::Bytes;
use tokio::{sync::Semaphore, time::timeout};
use tonic::{Status, body::Body};

use super::{
    call::{is_dialogue, is_grpc},
    status::{ApiError, plain},
};

/// What layers answer with.
pub(super) type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

/// What is let come of a request that is refused, how long, and of how many at a time: whoever sends more of them, and halves, counts as
/// one who resets.
const MOST: usize = 4 << 20;
const WITHIN: Duration = Duration::from_secs(2);
static PLACES: Semaphore = Semaphore::const_new(1_024);

/// Refuses a request, once what was on its way of it has come: a stream that is reset before counts against its connection, and a caller
/// who is refused often, for calling too often, would lose that.
pub(super) fn refuse(error: ApiError, request: Request<Body>) -> Answer {
    let answer = if is_grpc(request.headers()) { Status::from(error).into_http() } else { plain(error) };
    if is_dialogue(request.uri().path()) {
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

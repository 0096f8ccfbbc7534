//! Receives a request's whole body before the request is handled.

use axum::{
    body::{Body, Bytes},
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use tokio_stream::StreamExt as _;

use super::error::Problem;
use crate::api::{MOST_VALUES, may_be_parsed};

/// Bytes of a body over its limit that are read and discarded. A server that answers and closes while the client still
/// sends resets the connection, and the client may never see the answer.
const DISCARDED: usize = 32 << 20;

/// Passes on a request with its body in memory. Refuses it with 413 if the body has more than `limit` bytes or too many
/// values, and with 400 if it breaks off.
pub(super) async fn receive(State(limit): State<usize>, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    match read(&parts.headers, body, limit).await {
        Ok(bytes) => next.run(Request::from_parts(parts, Body::from(bytes))).await,
        Err(problem) => problem.into_response(),
    }
}

async fn read(headers: &HeaderMap, body: Body, limit: usize) -> Result<Bytes, Problem> {
    let too_large = || Problem::text(StatusCode::PAYLOAD_TOO_LARGE, format!("a body has at most {limit} bytes"));
    let length = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    // A client that sends `Expect` has not sent the body yet.
    if length.is_some_and(|length| length > limit) && headers.contains_key(header::EXPECT) {
        return Err(too_large());
    }
    let (mut kept, mut discarded) = (Vec::new(), 0);
    let mut body = body.into_data_stream();
    while let Some(piece) = body.next().await {
        let piece = piece.map_err(|error| Problem::text(StatusCode::BAD_REQUEST, error.to_string()))?;
        if discarded == 0 && kept.len() + piece.len() <= limit {
            kept.extend_from_slice(&piece);
            continue;
        }
        kept = Vec::new();
        discarded += piece.len();
        if discarded > DISCARDED {
            break;
        }
    }
    if discarded > 0 {
        return Err(too_large());
    }
    if !may_be_parsed(&kept) {
        let many = format!("a body has at most {MOST_VALUES} values");
        return Err(Problem::text(StatusCode::PAYLOAD_TOO_LARGE, many));
    }
    Ok(kept.into())
}

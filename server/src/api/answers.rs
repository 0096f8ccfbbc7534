//! Answers that were made and are not taken yet: encoded, so that they take what their bytes do, which are counted.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
};

use http::Response;
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt as _;
use prost::bytes::Bytes;
use tonic::{Status, body::Body};

use crate::net::AnswerBytes;

/// The answer, all of it made.
pub(super) async fn whole(answer: Response<Body>) -> Response<Body> {
    let (mut parts, mut body) = answer.into_parts();
    if http_body::Body::is_end_stream(&body) {
        return Response::from_parts(parts, body);
    }
    // A message, and the trailers.
    let (mut frames, mut bytes) = (VecDeque::with_capacity(2), 0);
    while let Some(frame) = body.frame().await {
        bytes += frame.as_ref().ok().and_then(Frame::data_ref).map_or(0, Bytes::len);
        frames.push_back(frame);
    }
    parts.extensions.insert(AnswerBytes(bytes));
    Response::from_parts(parts, Body::new(Whole { frames }))
}

/// See [`whole`].
struct Whole {
    frames: VecDeque<Result<Frame<Bytes>, Status>>,
}

impl http_body::Body for Whole {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Poll::Ready(self.frames.pop_front())
    }

    fn is_end_stream(&self) -> bool {
        self.frames.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        // Of what has trailers no length is said.
        let data = self.frames.iter().map(|frame| frame.as_ref().ok().and_then(Frame::data_ref).map(Bytes::len));
        data.sum::<Option<usize>>().map_or_else(SizeHint::default, |bytes| SizeHint::with_exact(bytes as u64))
    }
}

//! Encoded answers that the caller has not taken yet. An answer is encoded whole, so that it takes exactly the memory
//! that is counted for it.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use http::Response;
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt as _;
use parking_lot::Mutex;
use prost::bytes::Bytes;
use tonic::{Status, body::Body};

use crate::{
    domain::id::OrgId,
    ledger::{LeaseDelivery, ReadTurn},
    net::AnswerBytes,
};

/// Encodes the whole answer and attaches its size and its org, if it is about one, for the connection to count.
pub(super) async fn whole(answer: Response<Body>, org: Option<OrgId>) -> Response<Body> {
    let (mut parts, mut body) = answer.into_parts();
    // The read turn ends once the answer is encoded: no more answers are in the making than there are turns.
    let _turn = parts.extensions.remove::<ReadTurn>();
    if http_body::Body::is_end_stream(&body) {
        return Response::from_parts(parts, body);
    }
    // Usually one message and the trailers.
    let (mut frames, mut bytes) = (VecDeque::with_capacity(3), 0);
    while let Some(frame) = body.frame().await {
        match frame.map(Frame::into_data) {
            Ok(Ok(data)) => {
                bytes += data.len();
                in_pieces(data, |piece| frames.push_back(Ok(Frame::data(piece))));
            }
            Ok(Err(frame)) => frames.push_back(Ok(frame)),
            Err(error) => frames.push_back(Err(error)),
        }
    }
    parts.extensions.insert(AnswerBytes { bytes, org: org.map(|org| org.0) });
    let on_taken = parts.extensions.remove();
    Response::from_parts(parts, Body::new(Whole { frames, on_taken }))
}

/// Bytes of one piece. HTTP/2 buffers what the caller's window has no room for, at most one piece.
const PIECE: usize = 16 << 10;

/// Splits data into pieces, the last byte being one of its own. A connection polls for the next frame once the caller's
/// window had room for one byte of the frame before. So it polls for what follows the last byte only after the window
/// had room for everything before.
fn in_pieces(mut data: Bytes, mut push: impl FnMut(Bytes)) {
    while data.len() > 1 {
        push(data.split_to(PIECE.min(data.len() - 1)));
    }
    push(data);
}

/// The body of an answer that [`whole`] has encoded.
struct Whole {
    frames: VecDeque<Result<Frame<Bytes>, Status>>,
    on_taken: Option<OnTaken>,
}

/// Response extension of an answer with claimed jobs. The jobs are the caller's once its connection has taken the last
/// frame of the answer. If the caller goes away before, they are given back.
#[derive(Clone)]
pub(super) struct OnTaken(Arc<Mutex<Option<LeaseDelivery>>>);

impl OnTaken {
    pub(super) fn new(delivery: LeaseDelivery) -> Self {
        Self(Arc::new(Mutex::new(Some(delivery))))
    }

    fn taken(self) {
        if let Some(delivery) = self.0.lock().take() {
            delivery.deliver();
        }
    }
}

impl http_body::Body for Whole {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = self.frames.pop_front();
        if self.frames.is_empty()
            && let Some(on_taken) = self.on_taken.take()
        {
            on_taken.taken();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.frames.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        // With trailers among the frames the length stays unknown.
        let data = self.frames.iter().map(|frame| frame.as_ref().ok().and_then(Frame::data_ref).map(Bytes::len));
        data.sum::<Option<usize>>().map_or_else(SizeHint::default, |bytes| SizeHint::with_exact(bytes as u64))
    }
}

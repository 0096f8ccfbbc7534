//! The service on the wire. It is served as generated, except for StreamJobEvents: an event is encoded once for all streams.

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
};

use jobledger_proto::v1::{self as pb, job_service_server::JobServiceServer, stream_job_events_response::Item};
use prost::{Message as _, bytes::BufMut as _};
use tonic::{
    Request, Response, Status,
    body::Body,
    codec::{BufferSettings, Codec, EncodeBuf, Encoder},
    codegen::{BoxFuture, Service as TowerService, http},
    server::{Grpc, ServerStreamingService},
};
use tonic_prost::ProstCodec;
use tower::Layer;

use super::{
    convert,
    rpc::Rpc,
    service::Service,
    stream::{EventStream, Outgoing},
};
use crate::domain::org_event::LogEvent;

#[derive(Clone)]
pub(crate) struct WireService {
    service: Arc<Service>,
    generated: JobServiceServer<Service>,
    request_bytes: usize,
}

impl WireService {
    /// `request_bytes` bounds the message of a request.
    pub(crate) fn new(service: Service, request_bytes: usize) -> Self {
        let service = Arc::new(service);
        let generated = JobServiceServer::from_arc(Arc::clone(&service)).max_decoding_message_size(request_bytes);
        Self { service, generated, request_bytes }
    }
}

impl TowerService<http::Request<Body>> for WireService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if request.extensions().get() != Some(&Rpc::StreamJobEvents) {
            return self.generated.call(request);
        }
        let (streaming, request_bytes) = (Streaming(Arc::clone(&self.service)), self.request_bytes);
        Box::pin(async move {
            let mut grpc = Grpc::new(EventCodec).max_decoding_message_size(request_bytes);
            Ok(grpc.server_streaming(streaming, request).await)
        })
    }
}

/// Routes calls of the service to it, and others to the inner service. Passing the router would cost as much as a small call.
#[derive(Clone)]
pub(crate) struct WireLayer(pub(crate) WireService);

impl<S> Layer<S> for WireLayer {
    type Service = Front<S>;

    fn layer(&self, others: S) -> Front<S> {
        Front { service: self.0.clone(), others }
    }
}

#[derive(Clone)]
pub(crate) struct Front<S> {
    service: WireService,
    others: S,
}

impl<S> TowerService<http::Request<Body>> for Front<S>
where
    S: TowerService<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.others.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if request.extensions().get().is_some_and(|rpc: &Rpc| rpc.is_of_job_service()) {
            self.service.call(request)
        } else {
            Box::pin(self.others.call(request))
        }
    }
}

struct Streaming(Arc<Service>);

impl ServerStreamingService<pb::StreamJobEventsRequest> for Streaming {
    type Response = Outgoing;
    type ResponseStream = EventStream;
    type Future = BoxFuture<Response<EventStream>, Status>;

    fn call(&mut self, request: Request<pb::StreamJobEventsRequest>) -> Self::Future {
        let service = Arc::clone(&self.0);
        Box::pin(async move { service.stream_events(request).await })
    }
}

/// Protobuf, with messages to send that may be encoded already.
struct EventCodec;

type Generated = ProstCodec<pb::StreamJobEventsResponse, pb::StreamJobEventsRequest>;

impl Codec for EventCodec {
    type Encode = Outgoing;
    type Decode = pb::StreamJobEventsRequest;
    type Encoder = EventEncoder;
    type Decoder = <Generated as Codec>::Decoder;

    fn encoder(&mut self) -> EventEncoder {
        EventEncoder
    }

    fn decoder(&mut self) -> Self::Decoder {
        Generated::raw_decoder(BufferSettings::default())
    }
}

struct EventEncoder;

impl Encoder for EventEncoder {
    type Item = Outgoing;
    type Error = Status;

    /// A small buffer: a stream keeps it for as long as it is open, and most streams are idle.
    fn buffer_settings(&self) -> BufferSettings {
        const BUFFER: usize = 512;
        const SENT_AT: usize = 32 << 10;
        BufferSettings::new(BUFFER, SENT_AT)
    }

    fn encode(&mut self, item: Outgoing, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        match item {
            Outgoing::Event(event) => buffer.put_slice(event.encoded(encode)),
            Outgoing::Message(message) => {
                message.encode(buffer).map_err(|error| Status::internal(error.to_string()))?;
            }
        }
        Ok(())
    }
}

fn encode(event: &LogEvent) -> Vec<u8> {
    let item = match event {
        LogEvent::Job(event) => Item::Event(Box::new(convert::event(event))),
        LogEvent::Org(event) => Item::OrgEvent(Box::new(convert::org_event(event))),
    };
    pb::StreamJobEventsResponse { item: Some(item) }.encode_to_vec()
}

//! Calls as no client would make them, byte by byte.

use std::{collections::BTreeMap, future::Future, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use prost::bytes::Bytes;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
    time::timeout,
};
use tokio_stream::{StreamExt as _, wrappers::UnboundedReceiverStream};
use tonic::{Code, Status, metadata::MetadataMap};

use crate::support::harness::{PATIENCE, TestServer};

type Body = BoxBody<Bytes, std::convert::Infallible>;

/// A message with its prefix, as it is sent.
pub(crate) fn frame(message: &[u8]) -> Vec<u8> {
    let mut frame = vec![0];
    frame.extend((message.len() as u32).to_be_bytes());
    frame.extend(message);
    frame
}

/// The answer to a call.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) http: u16,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Bytes,
}

impl Answer {
    /// Makes a call with this body by HTTP/2. Returns the answer.
    pub(crate) async fn to(server: &TestServer, call: &str, headers: &[(&str, &str)], body: Vec<u8>) -> Self {
        let mut all = vec![("content-type", "application/grpc"), ("te", "trailers")];
        all.extend(headers);
        Self::to_request(server, "POST", call, &all, body).await
    }

    /// As [`Answer::to`], without added headers.
    pub(crate) async fn to_request(
        server: &TestServer,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> Self {
        let mut request = http::Request::builder().method(method).uri(format!("{}/{path}", server.endpoint()));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::from(body).boxed()).unwrap();
        timeout(PATIENCE, answer(request)).await.expect("an answer").expect("a connection")
    }

    /// Begins a call whose body starts with `first` and ends when the sender is dropped. Returns the answer and the sender.
    pub(crate) fn streamed(
        server: &TestServer,
        call: &str,
        headers: &[(&str, &str)],
        first: Bytes,
    ) -> (impl Future<Output = Result<Self, String>> + use<>, mpsc::UnboundedSender<Bytes>) {
        let (sender, rest) = mpsc::unbounded_channel();
        sender.send(first).unwrap();
        let frames = UnboundedReceiverStream::new(rest).map(|bytes| Ok(http_body::Frame::data(bytes)));
        let mut request = http::Request::post(format!("{}/{call}", server.endpoint()))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(BodyExt::boxed(StreamBody::new(frames))).unwrap();
        let answered = tokio::spawn(answer(request));
        (async move { answered.await.unwrap() }, sender)
    }

    /// The answer as a gRPC status.
    pub(crate) fn status(&self) -> Status {
        let text = |name: &str| self.headers.get(name).map(String::as_str);
        let code = text("grpc-status").map_or(Code::Ok, |code| Code::from_i32(code.parse().unwrap()));
        let details = text("grpc-status-details-bin").map(|details| STANDARD_NO_PAD.decode(details).unwrap());
        let message = text("grpc-message").unwrap_or_default();
        Status::with_details_and_metadata(code, message, details.unwrap_or_default().into(), MetadataMap::new())
    }
}

async fn answer(request: http::Request<Body>) -> Result<Answer, String> {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let client: Client<_, Body> = Client::builder(TokioExecutor::new()).http2_only(true).build(connector);
    let (head, body) = client.request(request).await.map_err(|error| format!("{error:?}"))?.into_parts();
    let body = body.collect().await.map_err(|error| format!("{error:?}"))?;
    let trailers = body.trailers().cloned().unwrap_or_default();
    let headers = head.headers.iter().chain(&trailers);
    let headers = headers.map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned())).collect();
    Ok(Answer { http: head.status.as_u16(), headers, body: body.to_bytes() })
}

/// Kinds of frames (RFC 9113, 6).
pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;

pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;
const ACK: u8 = 1;

/// An HTTP/2 connection, frame by frame.
pub(crate) struct Raw {
    pub(crate) stream: TcpStream,
    next: u32,
}

impl Raw {
    pub(crate) async fn to(server: &TestServer) -> Self {
        Self::over(TcpStream::connect(server.address).await.unwrap()).await
    }

    pub(crate) async fn over(stream: TcpStream) -> Self {
        Self::with_settings(stream, &[]).await
    }

    /// Begins a connection with these settings, each of six bytes.
    pub(crate) async fn with_settings(mut stream: TcpStream, settings: &[u8]) -> Self {
        stream.set_nodelay(true).unwrap();
        // A connection that the server refused is noticed when it is read.
        let _ = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
        let mut raw = Self { stream, next: 1 };
        let _ = raw.send(SETTINGS, 0, 0, settings).await;
        raw
    }

    /// A connection without room for any byte of an answer: SETTINGS_INITIAL_WINDOW_SIZE is 0 (RFC 9113, 6.5.2).
    pub(crate) async fn without_window(stream: TcpStream) -> Self {
        let mut raw = Self::with_settings(stream, &[0, 4, 0, 0, 0, 0]).await;
        raw.is_served().await;
        raw
    }

    pub(crate) async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> std::io::Result<()> {
        let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        bytes.extend([kind, flags]);
        bytes.extend(stream.to_be_bytes());
        bytes.extend(payload);
        self.stream.write_all(&bytes).await
    }

    /// The next frame: kind, flags, stream, payload. Acknowledges settings and pings. `None` once the connection is closed.
    pub(crate) async fn receive(&mut self) -> Option<(u8, u8, u32, Vec<u8>)> {
        loop {
            let mut head = [0; 9];
            self.stream.read_exact(&mut head).await.ok()?;
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; length as usize];
            self.stream.read_exact(&mut payload).await.ok()?;
            let (kind, flags) = (head[3], head[4]);
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            match (kind, flags & ACK) {
                (SETTINGS, 0) => self.send(SETTINGS, ACK, 0, &[]).await.ok()?,
                (PING, 0) => self.send(PING, ACK, 0, &payload).await.ok()?,
                _ => return Some((kind, flags, stream, payload)),
            }
        }
    }

    /// Waits until the server serves the connection.
    pub(crate) async fn is_served(&mut self) {
        let seen = async {
            self.send(PING, 0, 0, b"are you?").await.expect("it is open");
            while self.receive().await.expect("it is open").0 != PING {}
        };
        timeout(PATIENCE, seen).await.expect("it is served");
    }

    /// Reads until the server ends the connection, with a GOAWAY or without.
    pub(crate) async fn goes_away(&mut self) {
        while let Some((kind, ..)) = self.receive().await {
            if kind == GOAWAY {
                return;
            }
        }
    }

    /// Begins a call. Returns its stream id.
    pub(crate) async fn call(&mut self, path: &str, flags: u8) -> std::io::Result<u32> {
        let stream = self.next;
        self.next += 2;
        self.send(HEADERS, flags | END_HEADERS, stream, &header_block(path, &[])).await?;
        Ok(stream)
    }

    /// Takes the next stream id.
    pub(crate) fn next_stream(&mut self) -> u32 {
        self.next += 2;
        self.next - 2
    }

    /// Reads for this time, and drops what comes. Returns false if the connection has ended by then.
    pub(crate) async fn drain(&mut self, time: Duration) -> bool {
        timeout(time, async { while self.receive().await.is_some() {} }).await.is_err()
    }
}

/// The header block of a call.
pub(crate) fn header_block(path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let usual = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    literals(&[&usual, more].concat())
}

/// Headers as literals without indexing (RFC 7541, 6.2.2).
pub(crate) fn literals(headers: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in headers {
        block.push(0);
        for text in [name, value] {
            length(&mut block, text.len());
            block.extend(text.as_bytes());
        }
    }
    block
}

/// Writes a length with a prefix of seven bits (RFC 7541, 5.1).
fn length(block: &mut Vec<u8>, mut n: usize) {
    if n < 127 {
        return block.push(n as u8);
    }
    block.push(127);
    n -= 127;
    while n >= 128 {
        block.push((n % 128 + 128) as u8);
        n /= 128;
    }
    block.push(n as u8);
}

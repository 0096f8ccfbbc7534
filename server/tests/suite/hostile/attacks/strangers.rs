//! Attacks by connections, guesses and noise. Most of them need no valid credential.

use std::{io::ErrorKind, net::SocketAddr, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use prost::Message as _;
use tokio::{task::JoinSet, time::sleep};
use tonic_reflection::pb::v1::{ServerReflectionRequest, server_reflection_request::MessageRequest};
use uuid::Uuid;

use super::{KEPT, SERVICE, Tenant, begin, connect, send};
use crate::{
    support::raw::{DATA, END_HEADERS, END_STREAM, HEADERS, Raw, frame, header_block},
    support::seeded::Seeded,
};

impl Tenant {
    /// Connections from four addresses. Half of them send nothing, half speak HTTP/2.
    pub(super) async fn strangers(self: Arc<Self>, seed: u64) {
        let to: SocketAddr = self.address.parse().unwrap();
        let mut tasks = JoinSet::new();
        for n in 0..2_000_u32 {
            let from = (seed % 1_000) as u32 + n % 4;
            tasks.spawn(async move {
                loop {
                    if let Ok(stream) = connect(to, from).await {
                        if n % 2 == 0 {
                            sleep(Duration::from_secs(60)).await;
                            drop(stream);
                        } else {
                            let mut raw = Raw::over(stream).await;
                            while raw.drain(Duration::from_secs(1)).await {}
                        }
                    }
                    sleep(Duration::from_millis(500)).await;
                }
            });
        }
        tasks.join_all().await;
    }

    pub(super) async fn guessed_tokens(self: Arc<Self>, seed: u64) {
        let (to, good): (SocketAddr, _) = (self.address.parse().unwrap(), self.token.clone());
        let mut tasks = JoinSet::new();
        for lane in 0..16_u32 {
            let good = good.clone();
            tasks.spawn(async move {
                let mut random = Seeded::new(seed ^ u64::from(lane));
                loop {
                    let Ok(stream) = connect(to, lane).await else { continue };
                    let mut raw = Raw::over(stream).await;
                    loop {
                        // A token of the right form with a random secret.
                        let guess: String = good
                            .char_indices()
                            .map(|(n, c)| {
                                if n > 30 && c.is_ascii_lowercase() {
                                    (b'a' + random.below(26) as u8).into()
                                } else {
                                    c
                                }
                            })
                            .collect();
                        let stream = raw.next_stream();
                        let headers =
                            header_block(&format!("{SERVICE}GetJob"), &[("authorization", &format!("Bearer {guess}"))]);
                        let sent = async {
                            raw.send(HEADERS, END_HEADERS, stream, &headers).await?;
                            raw.send(DATA, END_STREAM, stream, &frame(&[])).await
                        };
                        if sent.await.is_err() || !raw.drain(Duration::from_millis(1)).await {
                            break;
                        }
                    }
                }
            });
        }
        tasks.join_all().await;
    }

    pub(super) async fn noise(self: Arc<Self>, seed: u64) {
        const CALLS: [&str; 6] =
            ["CreateJob", "BatchCreateJobs", "ClaimJobs", "Heartbeat", "ListJobs", "StreamJobEvents"];
        self.over_and_over(8, move |tenant: Arc<Self>| async move {
            let mut random = Seeded::new(seed ^ Uuid::new_v4().as_u64_pair().0);
            let mut raw = tenant.raw(true).await;
            loop {
                let noise: Vec<u8> = (0..random.below(2_000)).map(|_| random.below(256) as u8).collect();
                let call = CALLS[random.below(CALLS.len() as u64) as usize];
                tenant.call(&mut raw, call, &noise).await?;
                if !raw.drain(Duration::from_millis(1)).await {
                    return Ok(());
                }
            }
        })
        .await;
    }

    /// Half of the connections have a token, and keep 5,000 calls open together. The others are refused, and reconnect.
    pub(super) async fn dialogues(self: Arc<Self>) {
        const DIALOGUE: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
        let symbol = MessageRequest::FileContainingSymbol("jobledger.v1.JobService".to_owned());
        let request = ServerReflectionRequest { host: String::new(), message_request: Some(symbol) }.encode_to_vec();
        self.by_lane(100, move |tenant: Arc<Self>, lane| {
            let request = request.clone();
            async move {
                let token = lane.is_multiple_of(2).then_some(tenant.token.as_str());
                let mut connection = tenant.windowless(lane).await;
                for _ in 0..100 {
                    // No END_STREAM: more requests may follow.
                    connection.send(DIALOGUE, token, &request, 0).await?;
                }
                connection.stays(if token.is_some() { KEPT } else { Duration::from_secs(1) }).await;
                Ok(())
            }
        })
        .await;
    }

    /// Each call has a new, well-formed JWT with a random signature. After 20 calls it comes from a new address.
    pub(super) async fn bad_signatures(self: Arc<Self>, seed: u64) {
        const CLAIMS: &str =
            r#"{"iss":"https://login.example.com","aud":"jobledger","exp":4102444800,"sub":"alice","roles":["admin"]}"#;
        // A JWT header, and the length of its signature in bytes.
        const RS256: (&str, usize) = (r#"{"alg":"RS256","typ":"JWT","kid":"rsa"}"#, 256);
        const ES256: (&str, usize) = (r#"{"alg":"ES256","typ":"JWT","kid":"ec"}"#, 64);
        self.by_lane(64, move |tenant: Arc<Self>, lane| async move {
            let mut random = Seeded::new(seed ^ Uuid::new_v4().as_u64_pair().0);
            let (header, length) = if lane.is_multiple_of(2) { RS256 } else { ES256 };
            let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(CLAIMS));
            let (to, path): (SocketAddr, _) = (tenant.address.parse().unwrap(), format!("{SERVICE}GetJob"));
            let mut raw = Raw::over(connect(to, random.below(60_000) as u32).await?).await;
            for _ in 0..20 {
                let signature: Vec<u8> = (0..length / 8).flat_map(|_| random.next().to_be_bytes()).collect();
                let token = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature));
                let stream = begin(&mut raw, &path, Some(&token)).await?;
                send(&mut raw, stream, &[], END_STREAM).await?;
                while raw.receive().await.ok_or(ErrorKind::ConnectionReset)?.0 != HEADERS {}
            }
            Ok(())
        })
        .await;
    }
}

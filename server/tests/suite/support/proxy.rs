//! A TCP proxy before a cluster's socket. It counts round trips, and can swallow what passes it.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UnixStream},
    sync::watch,
};

/// The proxy. Connections through it end with their sockets.
pub(crate) struct Proxy {
    pub(crate) port: u16,
    state: Arc<State>,
}

struct State {
    socket: PathBuf,
    /// The applications whose traffic is swallowed.
    swallowed: watch::Sender<Vec<String>>,
    /// The application of each connection so far.
    seen: watch::Sender<Vec<String>>,
    round_trips: AtomicUsize,
}

impl Proxy {
    /// A proxy before the socket of a PostgreSQL server.
    pub(crate) async fn before(socket: PathBuf) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("a bound socket").port();
        let state = Arc::new(State {
            socket,
            swallowed: watch::Sender::default(),
            seen: watch::Sender::default(),
            round_trips: AtomicUsize::new(0),
        });
        let accepting = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(serve(client, Arc::clone(&accepting)));
            }
        });
        Self { port, state }
    }

    /// Swallows all traffic of these applications, in both directions. Their connections stay open.
    pub(crate) fn swallow(&self, applications: &[&str]) {
        self.state.swallowed.send_replace(applications.iter().map(|name| (*name).to_owned()).collect());
    }

    /// Waits until an application has connected this often.
    pub(crate) async fn has_seen(&self, application: &str, times: usize) {
        let mut seen = self.state.seen.subscribe();
        let enough = |seen: &Vec<String>| seen.iter().filter(|name| *name == application).count() >= times;
        tokio::time::timeout(crate::support::harness::PATIENCE, seen.wait_for(enough))
            .await
            .expect("it connects")
            .unwrap();
    }

    /// How often a client has waited for an answer.
    pub(crate) fn round_trips(&self) -> usize {
        self.state.round_trips.load(Ordering::SeqCst)
    }
}

async fn serve(mut client: TcpStream, state: Arc<State>) {
    let Some((startup, application)) = read_startup(&mut client).await else { return };
    state.seen.send_modify(|seen| seen.push(application.clone()));
    let is_swallowed = |swallowed: &Vec<String>| swallowed.contains(&application);
    let mut swallowed = state.swallowed.subscribe();
    let Ok(mut server) = UnixStream::connect(state.socket.join(".s.PGSQL.5432")).await else { return };
    let pass = async {
        let ((mut from_client, mut to_client), (mut from_server, mut to_server)) = (client.split(), server.split());
        if to_server.write_all(&startup).await.is_err() {
            return;
        }
        tokio::select! {
            () = forward(&mut from_client, &mut to_server, &state) => {}
            _ = tokio::io::copy(&mut from_server, &mut to_client) => {}
        }
    };
    tokio::select! {
        () = pass => {}
        () = async { drop(swallowed.wait_for(is_swallowed).await) } => {}
    }
    if state.swallowed.borrow().contains(&application) {
        // Neither side gets a sign, because their sockets stay open.
        std::future::pending().await
    }
}

/// Reads the first message. Returns it and the application's name in it.
async fn read_startup(client: &mut TcpStream) -> Option<(Vec<u8>, String)> {
    loop {
        let length = client.read_u32().await.ok()?;
        let mut message = length.to_be_bytes().to_vec();
        message.resize(length as usize, 0);
        client.read_exact(&mut message[4..]).await.ok()?;
        // A request for TLS, which is refused.
        if length == 8 {
            client.write_all(b"N").await.ok()?;
            continue;
        }
        let words: Vec<_> = message[8..].split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        let at = words.iter().position(|word| word == "application_name")?;
        return Some((message.clone(), words.get(at + 1)?.to_string()));
    }
}

/// Passes a client's messages on, and counts those after which the client waits.
async fn forward(
    client: &mut (impl tokio::io::AsyncRead + Unpin),
    server: &mut (impl tokio::io::AsyncWrite + Unpin),
    state: &State,
) {
    loop {
        let Ok(kind) = client.read_u8().await else { return };
        let Ok(length) = client.read_u32().await else { return };
        let mut message = vec![kind];
        message.extend(length.to_be_bytes());
        message.resize(length as usize + 1, 0);
        if client.read_exact(&mut message[5..]).await.is_err() || server.write_all(&message).await.is_err() {
            return;
        }
        // Query and Sync.
        if matches!(kind, b'Q' | b'S') {
            state.round_trips.fetch_add(1, Ordering::SeqCst);
        }
    }
}

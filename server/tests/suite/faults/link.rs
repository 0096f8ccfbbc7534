//! A TCP proxy that simulates network faults.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UnixStream},
    sync::watch,
};

/// What a link connects to.
#[derive(Clone)]
pub(crate) enum Peer {
    Tcp(String),
    /// The socket of the PostgreSQL server in this directory.
    Postgres(PathBuf),
}

/// What a link does to its traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Passes everything on.
    None,
    /// Delays each piece by this time, in both directions.
    Latency(Duration),
    /// Resets connections, new ones included.
    Cut,
    /// Passes nothing on and reports nothing. Afterwards the delayed traffic arrives.
    BlackHole,
    /// As `BlackHole`, for answers alone.
    Unanswered,
    /// Closes the connections to the peer. Those on this side stay open and receive nothing more.
    HalfOpen,
}

/// A proxy to one peer. It ends with the test's runtime.
pub(crate) struct Link {
    pub(crate) address: SocketAddr,
    fault: watch::Sender<Fault>,
    peer: watch::Sender<Peer>,
}

impl Link {
    pub(crate) async fn to(peer: Peer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound socket");
        let (fault, faults) = watch::channel(Fault::None);
        let (peer, peers) = watch::channel(peer);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let peer = peers.borrow().clone();
                tokio::spawn(serve(stream, peer, faults.clone()));
            }
        });
        Self { address, fault, peer }
    }

    pub(crate) fn set(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }

    /// Leads new connections to another peer.
    pub(crate) fn lead_to(&self, peer: Peer) {
        self.peer.send_replace(peer);
    }
}

async fn serve(stream: TcpStream, peer: Peer, faults: watch::Receiver<Fault>) {
    let _ = stream.set_nodelay(true);
    match peer {
        Peer::Tcp(address) => {
            let Ok(to) = TcpStream::connect(address).await else { return };
            let _ = to.set_nodelay(true);
            pass(stream, to, faults).await;
        }
        Peer::Postgres(folder) => {
            let Ok(to) = UnixStream::connect(folder.join(".s.PGSQL.5432")).await else { return };
            pass(stream, to, faults).await;
        }
    }
}

async fn pass(mut stream: TcpStream, mut to: impl AsyncRead + AsyncWrite + Unpin, mut faults: watch::Receiver<Fault>) {
    let ended = {
        let ((mut from_here, mut to_here), (mut from_there, mut to_there)) =
            (stream.split(), tokio::io::split(&mut to));
        let (mut out, mut back) = (faults.clone(), faults.clone());
        tokio::select! {
            // Errors and ends of connections pass, too.
            () = async {
                tokio::join!(
                    forward(&mut from_here, &mut to_there, &mut out, false),
                    forward(&mut from_there, &mut to_here, &mut back, true),
                );
            } => Fault::None,
            ended = async { faults.wait_for(|fault| matches!(fault, Fault::Cut | Fault::HalfOpen)).await.map(|fault| *fault) } => {
                ended.unwrap_or(Fault::None)
            }
        }
    };
    drop(to);
    match ended {
        Fault::Cut => drop(stream.set_zero_linger()),
        Fault::HalfOpen => {
            // Until the caller closes the connection.
            let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
        }
        _ => {}
    }
}

async fn forward(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    faults: &mut watch::Receiver<Fault>,
    is_answer: bool,
) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = from.read(&mut buffer).await.unwrap_or(0);
        let latency = match *faults.borrow() {
            Fault::Latency(time) => time,
            _ => Duration::ZERO,
        };
        tokio::time::sleep(latency).await;
        let passes = |fault: &Fault| *fault != Fault::BlackHole && !(is_answer && *fault == Fault::Unanswered);
        if faults.wait_for(passes).await.is_err() {
            return;
        }
        if read == 0 {
            let _ = to.shutdown().await;
            return;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}

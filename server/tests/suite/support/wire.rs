//! A relay between callers and a server, whose connections can be cut.

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
};

/// Relays bytes between callers and a server, and cuts all connections on demand.
pub(crate) struct Wire {
    pub(crate) address: String,
    cuts: watch::Sender<u64>,
}

impl Wire {
    pub(crate) async fn to(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound socket").to_string();
        let (cuts, cut) = watch::channel(0);
        tokio::spawn(async move {
            while let Ok((mut caller, _)) = listener.accept().await {
                let (server, mut cut) = (server.clone(), cut.clone());
                tokio::spawn(async move {
                    let Ok(mut server) = TcpStream::connect(server).await else { return };
                    cut.mark_unchanged();
                    tokio::select! {
                        _ = copy_bidirectional(&mut caller, &mut server) => {}
                        _ = cut.changed() => {}
                    }
                });
            }
        });
        Self { address, cuts }
    }

    /// Cuts all connections.
    pub(crate) fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }
}

//! TLS 1.2 and 1.3 by rustls. Certificates are read again when their files change.

use std::{
    fmt, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use parking_lot::RwLock;
use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring::default_provider,
    pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use thiserror::Error;
use tokio::{net::TcpStream, time::sleep};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::{
    access::{LOOK, PeerCertificate, read, read_aside},
    shares::network,
    turns::Turns,
};

/// The files of certificates and keys.
#[derive(Debug, Clone)]
pub struct TlsConfig {
    /// The server's certificate chain, in PEM.
    pub certificate: PathBuf,
    /// The server's private key, in PEM.
    pub key: PathBuf,
    /// The CAs of client certificates, in PEM. Without it, clients are not asked for certificates.
    pub client_ca: Option<PathBuf>,
    /// Revocation lists of all these CAs, in PEM (RFC 5280, 5). An expired list stays in use until it is replaced.
    pub client_crl: Option<PathBuf>,
}

/// Why TLS can't be used.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file can't be read.
    #[error("can't read {path}: {error}")]
    File {
        /// Its path.
        path: String,
        /// The reason.
        error: io::Error,
    },
    /// A file has unusable content.
    #[error("{path}: {reason}")]
    Content {
        /// Its path.
        path: String,
        /// The reason.
        reason: String,
    },
}

/// The current TLS configuration.
pub struct Tls {
    config: TlsConfig,
    now: RwLock<Arc<ServerConfig>>,
    /// Turns at the processor time of handshakes, by address.
    turns: Arc<Turns<IpAddr>>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("config", &self.config).finish_non_exhaustive()
    }
}

/// The contents of the files.
#[derive(PartialEq)]
struct Files {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
    client_crl: Option<Vec<u8>>,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    ///
    /// If one can't be read or used, or key and certificate don't match.
    pub fn open(config: TlsConfig) -> Result<Self, TlsError> {
        let file = |path: &Path| read(path).map_err(|error| TlsError::File { path: path.display().to_string(), error });
        let files = Files {
            certificate: file(&config.certificate)?,
            key: file(&config.key)?,
            client_ca: config.client_ca.as_deref().map(file).transpose()?,
            client_crl: config.client_crl.as_deref().map(file).transpose()?,
        };
        let now = RwLock::new(Arc::new(server_config(&config, &files)?));
        let processors = thread::available_parallelism().map_or(1, usize::from);
        Ok(Self { config, now, turns: Turns::new(processors / 2) })
    }

    fn now(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.now.read())
    }

    /// Performs the handshake. Also returns the client's certificate, if it sent one that can be read.
    pub(super) async fn accept(
        &self,
        stream: TcpStream,
        from: IpAddr,
    ) -> io::Result<(TlsStream<TcpStream>, Option<PeerCertificate>)> {
        let handshake = TlsAcceptor::from(self.now()).accept(stream);
        let stream = self.turns.poll(network(from), handshake).await?;
        let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
        let certificate = shown.and_then(|certificate| PeerCertificate::read(certificate));
        Ok((stream, certificate))
    }

    /// Reads the files again when they change, and uses them for new connections. Runs for as long as it is polled.
    pub(crate) async fn watch(&self) {
        let mut last = None;
        loop {
            sleep(LOOK).await;
            let files = match self.read_again().await {
                Ok(files) if last.as_ref() == Some(&files) => continue,
                Ok(files) => files,
                Err(error) => {
                    tracing::warn!(%error, "can't read the TLS files; the previous certificates stay in use");
                    continue;
                }
            };
            let is_first = last.is_none();
            match server_config(&self.config, &files) {
                Ok(config) => {
                    *self.now.write() = Arc::new(config);
                    if !is_first {
                        tracing::info!("new certificates are used for new connections");
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "the TLS files are invalid; the previous certificates stay in use")
                }
            }
            last = Some(files);
        }
    }

    async fn read_again(&self) -> io::Result<Files> {
        let TlsConfig { certificate, key, client_ca, client_crl } = &self.config;
        let if_there = async |path: &Option<PathBuf>| match path {
            Some(path) => read_aside(path).await.map(Some),
            None => Ok(None),
        };
        Ok(Files {
            certificate: read_aside(certificate).await?,
            key: read_aside(key).await?,
            client_ca: if_there(client_ca).await?,
            client_crl: if_there(client_crl).await?,
        })
    }
}

fn server_config(config: &TlsConfig, files: &Files) -> Result<ServerConfig, TlsError> {
    let wrong = |path: &Path, reason: String| TlsError::Content { path: path.display().to_string(), reason };
    let chain = certificates(&files.certificate).map_err(|reason| wrong(&config.certificate, reason))?;
    let key = PrivateKeyDer::from_pem_slice(&files.key)
        .map_err(|error| wrong(&config.key, format!("no private key in PEM: {error}")))?;
    let provider = Arc::new(default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| wrong(&config.certificate, error.to_string()))?;
    let builder = match config.client_ca.as_deref().zip(files.client_ca.as_deref()) {
        None => builder.with_no_client_auth(),
        Some((path, pem)) => {
            let mut roots = RootCertStore::empty();
            for root in certificates(pem).map_err(|reason| wrong(path, reason))? {
                roots.add(root).map_err(|error| wrong(path, error.to_string()))?;
            }
            // Clients without a certificate may present another credential.
            let mut verifier =
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).allow_unauthenticated();
            if let Some((path, pem)) = config.client_crl.as_deref().zip(files.client_crl.as_deref()) {
                verifier = verifier
                    .with_crls(revocations(pem).map_err(|reason| wrong(path, reason))?)
                    .only_check_end_entity_revocation();
            }
            let verifier = verifier.build().map_err(|error| wrong(path, error.to_string()))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut server = builder
        .with_single_cert(chain, key)
        .map_err(|error| wrong(&config.certificate, format!("can't be used with {}: {error}", config.key.display())))?;
    server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(server)
}

fn revocations(pem: &[u8]) -> Result<Vec<CertificateRevocationListDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|error| format!("not PEM: {error}"))?;
    if found.is_empty() { Err("no X509 CRL in PEM".to_owned()) } else { Ok(found) }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|error| format!("not PEM: {error}"))?;
    if found.is_empty() { Err("no certificate in PEM".to_owned()) } else { Ok(found) }
}

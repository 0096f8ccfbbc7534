//! TLS, and clients that authenticate by certificate.

use std::{
    fs,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use chrono::{DurationRound as _, TimeDelta};
use jobledger_client::{Client, Error, Follow, NewJob, proto::StreamJobEventsRequest};
use jobledger_server::{
    Config, TlsConfig,
    access::Authentication,
    domain::{
        access::Role,
        clock::{Clock as _, SystemClock},
    },
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, ExtendedKeyUsagePurpose,
    IsCa, KeyIdMethod, KeyPair, RevokedCertParams, SanType, SerialNumber, date_time_ymd,
};
use rustls::{
    ClientConfig, RootCertStore, SupportedProtocolVersion,
    crypto::ring::default_provider,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
    version::{TLS12, TLS13},
};
use tempfile::TempDir;
use tokio::{io::AsyncReadExt as _, net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;
use tonic::Code;
use uuid::Uuid;

use crate::{
    callers::access::{end_of, token},
    jobs::errors::assert_error,
    support::harness::{Database, PATIENCE, TestServer},
    support::program::command,
};

const OURS: Uuid = Uuid::from_u128(0xa11ce);

/// A certificate authority.
struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, in PEM.
struct Issued {
    certificate: String,
    key: String,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn pem(&self) -> String {
        self.0.pem()
    }

    /// The revocation list with these serial numbers.
    fn revoke(&self, serials: &[u64]) -> String {
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date_time_ymd(2024, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2024, 1, 1),
            next_update: date_time_ymd(2024, 2, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.0).unwrap().pem().unwrap()
    }

    fn issue(&self, change: impl FnOnce(&mut CertificateParams)) -> Issued {
        let mut params = CertificateParams::default();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Issued { certificate: certificate.pem(), key: key.serialize_pem() }
    }

    /// A certificate for a server on loopback.
    fn server(&self) -> Issued {
        self.issue(|params| params.subject_alt_names = vec![SanType::IpAddress([127, 0, 0, 1].into())])
    }

    /// A certificate for a client with this name.
    fn client(&self, name: SanType) -> Issued {
        self.issue(|params| {
            params.subject_alt_names = vec![name];
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        })
    }
}

fn uri(name: &str) -> SanType {
    SanType::URI(name.try_into().unwrap())
}

/// A server's files, and its configuration.
struct Files {
    folder: TempDir,
    config: Config,
}

impl Files {
    fn new(database: &Database, server: &Issued, clients: &Authority) -> Self {
        let folder = TempDir::new().unwrap();
        let mut config = database.config();
        config.access.authentication = Authentication::Required;
        let path = |name: &str| folder.path().join(name);
        config.tls = Some(TlsConfig {
            certificate: path("cert.pem"),
            key: path("key.pem"),
            client_ca: Some(path("ca.pem")),
            client_crl: None,
        });
        config.access.client_identities = Some(path("identities"));
        let files = Self { folder, config };
        files.put(server);
        files.write("ca.pem", &clients.pem());
        files.write("identities", &format!("uri:spiffe://example.com/worker {OURS} worker,producer billing\n"));
        files
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        // Renamed into place, so that nobody reads half of it.
        fs::write(path.with_extension("new"), text).unwrap();
        fs::rename(path.with_extension("new"), &path).unwrap();
        path
    }

    fn put(&self, server: &Issued) {
        self.write("key.pem", &server.key);
        self.write("cert.pem", &server.certificate);
    }
}

fn client(server: &TestServer, ca: &Authority, identity: Option<&Issued>) -> Client {
    let builder = Client::builder(format!("https://{}", server.address)).ca(ca.pem()).timeout(Duration::from_secs(5));
    let builder = match identity {
        Some(issued) => builder.identity(issued.certificate.clone(), issued.key.clone()),
        None => builder,
    };
    builder.build().unwrap()
}

async fn create(client: &Client) -> Result<String, Error> {
    Ok(client.create(NewJob::new("t")).await?.job.requested_by)
}

/// The certificate that the server shows in a handshake of this version alone.
async fn shake_hands(
    server: &TestServer,
    ca: &Authority,
    version: &'static SupportedProtocolVersion,
) -> std::io::Result<CertificateDer<'static>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem().as_bytes()).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(server.address).await?;
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
    let shown = stream.get_ref().1.peer_certificates().unwrap()[0].clone();
    Ok(shown.into_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_go_by_tls_and_certificates_say_who_calls() {
    let database = Database::sqlite();
    let (authority, clients, strangers) = (Authority::new(), Authority::new(), Authority::new());
    let files = Files::new(&database, &authority.server(), &clients);
    let admin = token(&database, Some(OURS), Role::Admin).await;
    let server = TestServer::start(files.config.clone()).await;
    let known = clients.client(uri("spiffe://example.com/worker"));
    let client_of = |issued| client(&server, &authority, issued);
    assert_eq!(create(&client_of(Some(&known))).await.unwrap(), "cert:billing");
    let denied = client_of(Some(&known)).statistics(&[]).await;
    assert!(matches!(denied, Err(Error::PermissionDenied { .. })), "a worker: {denied:?}");
    // A token takes precedence over the certificate, and is enough without one.
    let by_token = |identity: Option<&Issued>| {
        let builder = Client::builder(format!("https://{}", server.address)).ca(authority.pem());
        let builder = builder.token(jobledger_client::Token::new(&admin).unwrap());
        match identity {
            Some(issued) => builder.identity(issued.certificate.clone(), issued.key.clone()),
            None => builder,
        }
        .build()
        .unwrap()
    };
    assert_eq!(create(&by_token(None)).await.unwrap(), "token:tester");
    assert_eq!(create(&by_token(Some(&known))).await.unwrap(), "token:tester");
    // No certificate, or one whose name is not in the identities.
    let unknown = clients.client(uri("spiffe://example.com/other"));
    let other_kind = clients.client(SanType::DnsName("spiffe://example.com/worker".try_into().unwrap()));
    let nameless = clients.issue(|params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]);
    for issued in [None, Some(&unknown), Some(&other_kind), Some(&nameless)] {
        let found = create(&client_of(issued)).await;
        assert!(matches!(found, Err(Error::Unauthenticated { .. })), "{found:?}");
    }
    // The handshake refuses another authority's certificate, an expired one, one for servers, and a client without TLS.
    let old = clients.issue(|params| {
        params.subject_alt_names = vec![uri("spiffe://example.com/worker")];
        (params.not_before, params.not_after) = (date_time_ymd(2001, 1, 1), date_time_ymd(2002, 1, 1));
    });
    let of_server = clients.issue(|params| {
        params.subject_alt_names = vec![uri("spiffe://example.com/worker")];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    });
    let strange = strangers.client(uri("spiffe://example.com/worker"));
    for issued in [&old, &of_server, &strange] {
        let found = create(&client_of(Some(issued))).await;
        assert!(matches!(found, Err(Error::Unavailable { .. } | Error::DeadlineExceeded)), "{found:?}");
    }
    let plain = Client::builder(server.endpoint()).timeout(Duration::from_secs(2)).build().unwrap();
    let found = create(&plain).await;
    assert!(matches!(found, Err(Error::Unavailable { .. } | Error::DeadlineExceeded)), "{found:?}");
    // A client does not talk to a server whose certificate another authority issued.
    let found = create(&client(&server, &strangers, None)).await;
    assert!(matches!(found, Err(Error::Unavailable { .. } | Error::DeadlineExceeded)), "{found:?}");
    for version in [&TLS12, &TLS13] {
        shake_hands(&server, &authority, version).await.expect("both versions are spoken");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_was_revoked_lets_nobody_in() {
    let database = Database::sqlite();
    let (servers, clients) = (Authority::new(), Authority::new());
    let mut files = Files::new(&database, &servers.server(), &clients);
    let list = files.write("crl.pem", &clients.revoke(&[7]));
    files.config.tls.as_mut().unwrap().client_crl = Some(list);
    let server = TestServer::start(files.config.clone()).await;
    let with_serial = |serial: u64| {
        clients.issue(|params| {
            params.serial_number = Some(SerialNumber::from(serial));
            params.subject_alt_names = vec![uri("spiffe://example.com/worker")];
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        })
    };
    let (revoked, good) = (with_serial(7), with_serial(8));
    assert!(create(&client(&server, &servers, Some(&revoked))).await.is_err());
    create(&client(&server, &servers, Some(&good))).await.unwrap();
    // The list is read again.
    files.write("crl.pem", &clients.revoke(&[7, 8]));
    let refused = async { while create(&client(&server, &servers, Some(&good))).await.is_ok() {} };
    timeout(PATIENCE, refused).await.expect("it is seen");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_called_with_a_certificate_ends_with_it() {
    let database = Database::sqlite();
    let (authority, clients) = (Authority::new(), Authority::new());
    let files = Files::new(&database, &authority.server(), &clients);
    files.write("identities", &format!("uri:spiffe://example.com/worker {OURS} admin\n"));
    let server = TestServer::start(files.config.clone()).await;
    // Certificates have whole seconds.
    let end = (SystemClock.now() + Duration::from_secs(3)).duration_trunc(TimeDelta::seconds(1)).unwrap();
    let short = clients.issue(|params| {
        params.subject_alt_names = vec![uri("spiffe://example.com/worker")];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.not_after = SystemTime::from(end).into();
    });
    let client = client(&server, &authority, Some(&short));
    let stream = client.raw().stream_job_events(StreamJobEventsRequest::default()).await.unwrap().into_inner();
    let ended = end_of(stream).await;
    assert_error(&ended, Code::Unauthenticated, "UNAUTHENTICATED");
    assert!(ended.message().contains("expired"), "{ended:?}");
    assert!(SystemClock.now() >= end);
    assert!(matches!(create(&client).await, Err(Error::Unauthenticated { .. })), "on the same connection");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_and_identities_are_read_again() {
    let database = Database::sqlite();
    let (authority, clients) = (Authority::new(), Authority::new());
    let first = authority.server();
    let files = Files::new(&database, &first, &clients);
    files.write("identities", &format!("uri:spiffe://example.com/worker {OURS} observer,producer billing\n"));
    let server = TestServer::start(files.config.clone()).await;
    let known = clients.client(uri("spiffe://example.com/worker"));
    let client = client(&server, &authority, Some(&known));
    create(&client).await.unwrap();
    let der = |issued: &Issued| CertificateDer::from_pem_slice(issued.certificate.as_bytes()).unwrap();
    assert_eq!(shake_hands(&server, &authority, &TLS13).await.unwrap(), der(&first));
    let mut stream = client.subscribe(Follow::org()).await.unwrap();
    stream.next().await.unwrap().unwrap();
    // Files that can't be used change nothing.
    files.write("identities", "uri:spiffe://example.com/worker everybody admin\n");
    files.write("cert.pem", "-----BEGIN");
    create(&client).await.unwrap();
    let second = authority.server();
    files.put(&second);
    // The last identity is removed.
    files.write("identities", "# nobody\n");
    let ended = async {
        loop {
            if let Err(error) = stream.next().await.expect("an error") {
                return error;
            }
        }
    };
    let ended = timeout(PATIENCE, ended).await.expect("it ends");
    assert!(matches!(ended, Error::Unauthenticated { .. }), "{ended:?}");
    assert!(matches!(create(&client).await, Err(Error::Unauthenticated { .. })));
    let is_new = async { while shake_hands(&server, &authority, &TLS13).await.unwrap() != der(&second) {} };
    timeout(PATIENCE, is_new).await.expect("the new certificate is shown");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handshake_that_does_not_come_is_not_waited_for() {
    let database = Database::sqlite();
    let (authority, clients) = (Authority::new(), Authority::new());
    let mut config = Files::new(&database, &authority.server(), &clients);
    config.config.connections.first_bytes_within = Duration::from_millis(200);
    let server = TestServer::start(config.config.clone()).await;
    let mut silent = TcpStream::connect(server.address).await.unwrap();
    let closed = timeout(PATIENCE, silent.read_u8()).await.expect("it is closed");
    assert!(closed.is_err());
    server.stop().await;
}

#[test]
fn files_that_can_not_be_used_are_told_at_the_start() {
    let database = Database::sqlite();
    let (authority, clients) = (Authority::new(), Authority::new());
    let files = Files::new(&database, &authority.server(), &clients);
    let other = authority.server();
    let path = |name: &str| files.folder.path().join(name).display().to_string();
    let (cert, key, ca) = (path("cert.pem"), path("key.pem"), path("ca.pem"));
    let other_key = files.write("other.key", &other.key).display().to_string();
    let nothing = files.write("nothing", "nothing\n").display().to_string();
    let bad = |name: &str, line: &str| files.write(name, &format!("\n# who\n{line}\n")).display().to_string();
    let (good, nobody) = (bad("i0", &format!("dns:worker {OURS} worker")), bad("i7", "# nobody"));
    let no_kind = bad("i1", &format!("worker {OURS} worker"));
    let no_role = bad("i2", &format!("dns:worker {OURS} root"));
    let no_org = bad("i3", "dns:worker acme worker");
    let no_operator = bad("i4", "dns:worker - worker");
    let twice = bad("i5", &format!("dns:worker {OURS} worker\ndns:WORKER {OURS} admin"));
    let words = bad("i6", "dns:worker");
    let tls = ["--tls-cert", &cert, "--tls-key", &key];
    let with = |more: &[&str]| [&tls[..], more].concat().into_iter().map(str::to_owned).collect::<Vec<_>>();
    let alone = |arguments: &[&str]| arguments.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    for (arguments, expected) in [
        (alone(&["--tls-cert", &cert]), "--tls-key <FILE>"),
        (alone(&["--tls-cert", &path("missing"), "--tls-key", &key]), "No such file"),
        (alone(&["--tls-cert", &nothing, "--tls-key", &key]), "no certificate in PEM"),
        (alone(&["--tls-cert", &cert, "--tls-key", &nothing]), "no private key in PEM"),
        (alone(&["--tls-cert", &cert, "--tls-key", &other_key]), "can't be used with"),
        (with(&["--tls-client-ca", &ca]), "--client-identities <FILE>"),
        (with(&["--tls-client-ca", &nothing, "--client-identities", &good]), "no certificate in PEM"),
        (with(&["--tls-client-ca", &ca, "--client-identities", &nobody]), "the file has no client identity"),
        (with(&["--client-identities", &no_kind]), "--tls-client-ca <FILE>"),
        (with(&["--tls-client-ca", &ca, "--client-identities", &no_kind]), "line 3: invalid name \"worker\""),
        (with(&["--tls-client-ca", &ca, "--client-identities", &no_role]), "unknown role \"root\""),
        (with(&["--tls-client-ca", &ca, "--client-identities", &no_org]), "line 3: invalid org \"acme\""),
        (with(&["--tls-client-ca", &ca, "--client-identities", &no_operator]), "line 3: ORG - and the role operator"),
        (with(&["--tls-client-ca", &ca, "--client-identities", &twice]), "line 4: duplicate name dns:worker"),
        (with(&["--tls-client-ca", &ca, "--client-identities", &words]), "line 3: expected NAME ORG ROLES"),
    ] {
        let url = database.url();
        let mut all = vec!["--listen", "127.0.0.1:0", "--database-url", &url];
        all.extend(arguments.iter().map(String::as_str));
        let output = command(&all).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(expected), "{expected}: {said}");
        assert_eq!(output.stdout, b"", "it does not say that it listens");
    }
}

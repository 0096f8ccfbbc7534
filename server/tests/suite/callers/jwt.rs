//! JWTs: which are accepted, which are refused, and what happens when keys change.

use std::{fs, path::Path, time::Duration};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use jobledger_client::{Client, Error, Follow, Item, NewJob};
use jobledger_server::{
    Config,
    access::{JwtConfig, KeySource},
    domain::{
        access::Role,
        clock::{Clock as _, SystemClock},
    },
};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    sync::watch,
    time::timeout,
};
use uuid::Uuid;

use crate::{
    callers::access::{client_with, guarded},
    support::harness::{Database, PATIENCE, TestServer},
    support::program::command,
};

const OURS: Uuid = Uuid::from_u128(0xa11ce);
pub(crate) const ISSUER: &str = "https://login.example.com";
pub(crate) const AUDIENCE: &str = "jobledger";
const SECRET: &str = "0123456789abcdef0123456789abcdef";
/// A key for tests only, because making an RSA key of 2,048 bits takes seconds. PKCS #1 in DER.
const RSA: [&str; 15] = [
    "MIIEpQIBAAKCAQEA3SOcoBufVsDrh+jE8uAKva9veczcQPC8wYaP9zStyqGsLS3R17LwxWtQpra0m/FLbD5AxQX8v1eKJL/4Uh+3RfVfLK53Q6",
    "2eJaYYpU3MPzys5TqtkHF+DR9BjreTrpDvZr31FQZr2lK3agU0QlEMX3HXHQLGhwUUScr/MMYDvy9TPTTahtVDIGJwewFEfDNSHWB/A4+9XU95",
    "kISR/Fm+UqhQetuje7WqS4brAI1MGqZXGSGQPq5AdgJRPclb9sgq2ElF1oCzNsaljqcaxobeHsWDsbUc6AXxTIGn4gRVoJ+0dpBxoVAwgLbckz",
    "JxCOUj8AM0jQUFp9lCDv/WyF+E/wIDAQABAoIBADF0c+QomUddCK+R4m3QpgZK1Drgkkdhr0z2a37lBJLi+i72Zs3+4jK8b8KA7L5NRclU2MZX",
    "MvGVwbq7Re0T07htChZjhB+aFdqknTFmxy1DRAVVzJgXkZGcslwY+Qmatzd6dvN3RqqCQiuPM2M7XfGAc5O02bI7dBCWueBuAEuCftggHH0nLc",
    "4wJoNoFEDCBumjbbttvVCZYo2aYX96Rl0uXOk8/q0+Nz879dN0Oge0XzhOPpdKhLpgxw0QBDTqyGv/dIdvN6UX8tH558lDJkUgQqCr56C1sPzF",
    "elkpxyLlAFXPJ4PJPaBKKrEFYjQAC7BWexc5zv6ljCM6cPUW0UECgYEA/DhlkcGRtB1qb25v+RqMxWOS4q18MULSoBA8HDE4sABH0vlx9nkGgG",
    "UsDV7+8CNENOyQC2QMsk9+mjj6ynHaaau4iAX29P9a2PVORDUEnSGSd9Vb2zxefC/DQ0Wcs17bmohdNmvjxjz5Da6KtxpLf+6teNpo3hePIkJn",
    "JKRZK78CgYEA4HP6HEmAQYgnG69LRJKCN1HYK+okRHDLsQE/zbtX3ns8drNTTXI+4SSy06Z/jDyURdi84/WWxO+4tcFXPYO5RSWviOJDLSaHeg",
    "SbFaevEGIfBm4HWaQ5qJ0E+UIpQVKcNlEs0vf/X0//dzUSAch7y6pQJSYlGRWljqNE3IXk9sECgYEAtRSYd4kN3s6vt8kGQ0Y4gw72SiBb5dIf",
    "/iMpxOPh2xqYdnP4yggiDtSUSBVH24i2U3j0AfmW0/4W2wrFo8sSEIPlPGNr5oHe651Sz81wvo935Okdxc0V2PtBqW61DmKwL8Zvhb74DT+BX7",
    "1MgiEyy2rEyNumJq2raeFaxAfqrWkCgYEAkoHhbflkKGJQ9Lc1MCtZp/ZaXj/VMH9X1c/077srneNfEjP3WgQKmzczKwfxFX6tYfIZScsSgLXh",
    "IXJ0GYkTs9jnfTgDlUMjBzheaoIruUvy6GWFkrOply/3ASR4fVUI9kOCOKr8HCDBpfQULunINKaU7cq6SGdiy3ozBqa3T4ECgYEA53HZy6MptE",
    "NH5v262qEx4FllCxcdZ0aLijNcCPlzDwwjam3qxDDI/mPPQQ7ceIOqWGtCagzn9l9UQcAI7hOGr+eVjgsqy6fxdSAIUow9qaKiZEuW54vSdy1l",
    "GjusQc6knzBhhF/bLjeUULouCkNQFbcW9ftH5L5867bxJ2L/AYE=",
];

/// Writes a JWKS with the keys `rsa` and `ec`, among others. Nobody signs with them.
pub(crate) fn keys_of_nobody(path: &Path) {
    fs::write(path, Issuer::new().jwks().to_string()).unwrap();
}

/// An issuer of JWTs.
struct Issuer {
    rsa: Vec<u8>,
    ec: KeyPair,
    ed: KeyPair,
}

impl Issuer {
    fn new() -> Self {
        Self {
            rsa: STANDARD.decode(RSA.concat()).unwrap(),
            ec: KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap(),
            ed: KeyPair::generate_for(&PKCS_ED25519).unwrap(),
        }
    }

    /// The modulus and the exponent.
    fn rsa_public(&self) -> (Vec<u8>, Vec<u8>) {
        // SEQUENCE { version, modulus, publicExponent, … }: two long lengths, then an INTEGER of 257 bytes, and one of 3.
        let modulus = &self.rsa[12..268];
        assert_eq!(self.rsa[7..12], [0x02, 0x82, 0x01, 0x01, 0x00], "a modulus of 2,048 bits");
        assert_eq!(self.rsa[268..270], [0x02, 0x03]);
        (modulus.to_vec(), self.rsa[270..273].to_vec())
    }

    fn jwks(&self) -> Value {
        let b64 = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let (n, e) = self.rsa_public();
        let point = self.ec.public_key_raw();
        json!({"keys": [
            {"kty": "RSA", "kid": "rsa", "use": "sig", "alg": "RS256", "n": b64(&n), "e": b64(&e)},
            {"kty": "EC", "kid": "ec", "crv": "P-256", "x": b64(&point[1..33]), "y": b64(&point[33..])},
            {"kty": "OKP", "kid": "ed", "crv": "Ed25519", "x": b64(self.ed.public_key_raw())},
            // Keys for other purposes are skipped without an error.
            {"kty": "RSA", "kid": "enc", "use": "enc", "n": b64(&n), "e": b64(&e)},
            {"kty": "oct", "kid": "oct", "k": b64(SECRET.as_bytes())},
        ]})
    }

    fn sign(&self, algorithm: Algorithm, header: impl FnOnce(&mut Header), claims: &Value) -> String {
        let mut head = Header::new(algorithm);
        let key = match algorithm {
            Algorithm::RS256 | Algorithm::RS512 => EncodingKey::from_rsa_der(&self.rsa),
            Algorithm::ES256 => EncodingKey::from_ec_der(self.ec.serialized_der()),
            Algorithm::EdDSA => EncodingKey::from_ed_der(self.ed.serialized_der()),
            _ => EncodingKey::from_secret(SECRET.as_bytes()),
        };
        head.kid = match algorithm {
            Algorithm::RS256 | Algorithm::RS512 => Some("rsa".to_owned()),
            Algorithm::ES256 => Some("ec".to_owned()),
            Algorithm::EdDSA => Some("ed".to_owned()),
            _ => None,
        };
        header(&mut head);
        jsonwebtoken::encode(&head, claims, &key).unwrap()
    }

    /// A valid token.
    fn good(&self, algorithm: Algorithm) -> String {
        self.sign(algorithm, |_| {}, &claims())
    }
}

/// The Unix time this many seconds from now.
fn from_now(seconds: i64) -> i64 {
    SystemClock.now().timestamp() + seconds
}

fn claims() -> Value {
    json!({
        "iss": ISSUER, "aud": AUDIENCE, "exp": from_now(600), "sub": "alice", "org_id": OURS.to_string(), "roles": ["admin", "plumber"],
    })
}

fn with(name: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[name] = value;
    claims
}

fn without(name: &str) -> Value {
    let mut claims = claims();
    claims.as_object_mut().unwrap().remove(name);
    claims
}

fn config(database: &Database, keys: KeySource, folder: &Path) -> Config {
    let secret = folder.join("secret");
    fs::write(&secret, format!("{SECRET}\n")).unwrap();
    let mut config = guarded(database);
    config.access.jwt = Some(JwtConfig {
        keys: Some(keys),
        hs256_secret: Some(secret),
        issuer: ISSUER.to_owned(),
        audience: AUDIENCE.to_owned(),
        org_claim: "org_id".to_owned(),
        subject_claim: "sub".to_owned(),
        roles_claim: "roles".to_owned(),
        roles: Vec::new(),
        operator_role: None,
        max_lifetime: Duration::from_secs(86_400),
        leeway: Duration::from_secs(30),
        refresh: Duration::from_secs(300),
        keys_max_age: Duration::from_secs(3_600),
    });
    config
}

async fn start(
    database: &Database,
    folder: &TempDir,
    issuer: &Issuer,
    change: impl FnOnce(&mut JwtConfig),
) -> (TestServer, std::path::PathBuf) {
    let file = folder.path().join("jwks.json");
    fs::write(&file, issuer.jwks().to_string()).unwrap();
    let mut config = config(database, KeySource::File(file.clone()), folder.path());
    change(config.access.jwt.as_mut().unwrap());
    (TestServer::start(config).await, file)
}

async fn create(client: &Client) -> Result<String, Error> {
    Ok(client.create(NewJob::new("t")).await?.job.requested_by)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jwts_of_every_algorithm_are_taken_and_say_who_calls() {
    let database = Database::sqlite();
    let (folder, issuer) = (TempDir::new().unwrap(), Issuer::new());
    let (server, _) = start(&database, &folder, &issuer, |_| {}).await;
    for algorithm in [Algorithm::RS256, Algorithm::ES256, Algorithm::EdDSA, Algorithm::HS256] {
        let client = client_with(&server, &issuer.good(algorithm));
        assert_eq!(create(&client).await.unwrap(), "jwt:alice", "{algorithm:?}");
    }
    for claims in [
        with("aud", json!(["other", AUDIENCE])),
        with("nbf", json!(from_now(20))),
        with("exp", json!(from_now(-20))),
        with("exp", json!(from_now(600) as f64 + 0.5)),
        with("roles", json!("openid producer")),
    ] {
        let token = issuer.sign(Algorithm::ES256, |_| {}, &claims);
        create(&client_with(&server, &token)).await.unwrap_or_else(|error| panic!("{claims}: {error}"));
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jwts_that_do_not_hold_are_refused() {
    let database = Database::sqlite();
    let (folder, issuer) = (TempDir::new().unwrap(), Issuer::new());
    let (server, _) = start(&database, &folder, &issuer, |_| {}).await;
    let es = |claims: &Value| issuer.sign(Algorithm::ES256, |_| {}, claims);
    let good = issuer.good(Algorithm::ES256);
    let parts: Vec<_> = good.split('.').collect();
    let b64 = |text: &str| URL_SAFE_NO_PAD.encode(text);
    let hs = |key: &[u8], kid: Option<&str>| {
        let mut header = Header::new(Algorithm::HS256);
        header.kid = kid.map(str::to_owned);
        jsonwebtoken::encode(&header, &claims(), &EncodingKey::from_secret(key)).unwrap()
    };
    let (n, _) = issuer.rsa_public();
    let stranger = Issuer::new();
    let refused = [
        ("alg none", format!("{}.{}.", b64(r#"{"alg":"none"}"#), parts[1])),
        ("alg none, with a signature", format!("{}.{}.{}", b64(r#"{"alg":"none","kid":"ec"}"#), parts[1], parts[2])),
        ("no signature", format!("{}.{}.", parts[0], parts[1])),
        ("other claims", format!("{}.{}.{}", parts[0], b64(&with("sub", json!("root")).to_string()), parts[2])),
        ("a public key as the secret", hs(&n, Some("rsa"))),
        ("a public point as the secret", hs(issuer.ec.public_key_raw(), Some("ec"))),
        ("a secret that the JWKS names", hs(SECRET.as_bytes(), Some("oct"))),
        ("another secret", hs(b"fedcba9876543210fedcba9876543210", None)),
        ("another's key", stranger.good(Algorithm::ES256)),
        ("another's key, for EdDSA", stranger.good(Algorithm::EdDSA)),
        ("another algorithm of the key's family", issuer.sign(Algorithm::RS512, |_| {}, &claims())),
        (
            "a key for another purpose",
            issuer.sign(Algorithm::RS256, |head| head.kid = Some("enc".to_owned()), &claims()),
        ),
        ("another's kid", issuer.sign(Algorithm::ES256, |head| head.kid = Some("rsa".to_owned()), &claims())),
        ("an unknown kid", issuer.sign(Algorithm::ES256, |head| head.kid = Some("new".to_owned()), &claims())),
        ("no kid", issuer.sign(Algorithm::ES256, |head| head.kid = None, &claims())),
        ("critical headers", issuer.sign(Algorithm::ES256, |head| head.crit = Some(vec!["b64".to_owned()]), &claims())),
        ("expired", es(&with("exp", json!(from_now(-31))))),
        ("not valid yet", es(&with("nbf", json!(from_now(40))))),
        ("exp is no number", es(&with("exp", json!("tomorrow")))),
        ("nbf is no number", es(&with("nbf", json!("yesterday")))),
        ("no exp", es(&without("exp"))),
        ("another issuer", es(&with("iss", json!("https://login.example.org")))),
        ("no issuer", es(&without("iss"))),
        ("another audience", es(&with("aud", json!("billing")))),
        ("other audiences", es(&with("aud", json!(["billing", "jobledger2"])))),
        ("no audience", es(&without("aud"))),
        ("nobody", es(&without("sub"))),
        ("an empty name", es(&with("sub", json!("")))),
        ("a name that is a number", es(&with("sub", json!(7)))),
        ("a line break in the name", es(&with("sub", json!("a\nb")))),
        ("a mark of direction in the name", es(&with("sub", json!("a\u{202e}b")))),
        ("no org", es(&without("org_id"))),
        ("an operator's, which nothing is called here", {
            let mut claims = without("org_id");
            claims["roles"] = json!(["operator"]);
            es(&claims)
        }),
        ("too long a time", es(&with("exp", json!(from_now(86_400 + 60))))),
        ("too long a time since it was issued", {
            let mut claims = with("iat", json!(from_now(-86_400)));
            claims["exp"] = json!(from_now(300));
            es(&claims)
        }),
        ("a time that no calendar has", es(&with("exp", json!(1_700_000_000_000_000_000_i64)))),
        ("issued at no time", es(&with("iat", json!("yesterday")))),
        ("issued later", es(&with("iat", json!(from_now(60))))),
        ("another type", issuer.sign(Algorithm::ES256, |head| head.typ = Some("logout+jwt".to_owned()), &claims())),
        ("an org that is none", es(&with("org_id", json!("acme")))),
        ("an org that is a number", es(&with("org_id", json!(1)))),
        ("too long", es(&with("sub", json!("a".repeat(9_000))))),
        ("two parts", format!("{}.{}", parts[0], parts[1])),
        ("five parts", format!("{good}.a.b")),
        ("garbage", "a.b.c".to_owned()),
    ];
    for (what, token) in refused {
        let found = create(&client_with(&server, &token)).await;
        assert!(matches!(found, Err(Error::Unauthenticated { .. })), "{what}: {found:?}");
    }
    // The token is valid, but its roles allow nothing here.
    for claims in [without("roles"), with("roles", json!(["plumber"])), with("roles", json!(["operator"]))] {
        let found = create(&client_with(&server, &es(&claims))).await;
        assert!(matches!(found, Err(Error::PermissionDenied { .. })), "{claims}: {found:?}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn claims_and_roles_are_called_as_configured() {
    let database = Database::sqlite();
    let (folder, issuer) = (TempDir::new().unwrap(), Issuer::new());
    let (server, _) = start(&database, &folder, &issuer, |jwt| {
        jwt.org_claim = "/app/org".to_owned();
        jwt.subject_claim = "email".to_owned();
        jwt.roles_claim = "https://example.com/groups".to_owned();
        jwt.roles = vec![("job-admins".to_owned(), Role::Admin)];
        jwt.operator_role = Some("staff".to_owned());
    })
    .await;
    let mut claims = without("org_id");
    claims["email"] = json!("alice@example.com");
    claims["app"] = json!({ "org": OURS.to_string() });
    claims["https://example.com/groups"] = json!(["job-admins"]);
    let client = client_with(&server, &issuer.sign(Algorithm::EdDSA, |_| {}, &claims));
    assert_eq!(create(&client).await.unwrap(), "jwt:alice@example.com");
    // A role's own name is not accepted if the configuration gives the role another name.
    claims["https://example.com/groups"] = json!(["admin"]);
    let client = client_with(&server, &issuer.sign(Algorithm::EdDSA, |_| {}, &claims));
    assert!(matches!(create(&client).await, Err(Error::PermissionDenied { .. })));
    // An operator has no org of its own, and names one.
    claims["https://example.com/groups"] = json!(["staff"]);
    claims["app"] = json!({});
    let token = issuer.sign(Algorithm::EdDSA, |_| {}, &claims);
    let token = jobledger_client::Token::new(&token).unwrap();
    let client = Client::builder(server.endpoint()).token(token).org(OURS).build().unwrap();
    assert_eq!(create(&client).await.unwrap(), "jwt:alice@example.com");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_is_gone_lets_nobody_in_and_a_new_one_does() {
    let database = Database::sqlite();
    let (folder, before, after) = (TempDir::new().unwrap(), Issuer::new(), Issuer::new());
    let (server, file) = start(&database, &folder, &before, |_| {}).await;
    let old = client_with(&server, &before.good(Algorithm::ES256));
    let mut stream = old.subscribe(Follow::org()).await.unwrap();
    stream.next().await.unwrap().unwrap();
    let new = client_with(&server, &after.good(Algorithm::ES256));
    assert!(matches!(create(&new).await, Err(Error::Unauthenticated { .. })));
    // A file that can't be read changes nothing.
    fs::write(&file, "{").unwrap();
    create(&old).await.unwrap();
    // An added key changes nothing for callers with another key.
    let mut more = before.jwks();
    let mut added = after.jwks()["keys"][2].clone();
    added["kid"] = json!("added");
    more["keys"].as_array_mut().unwrap().push(added);
    fs::write(&file, more.to_string()).unwrap();
    let by_added = after.sign(Algorithm::EdDSA, |head| head.kid = Some("added".to_owned()), &claims());
    let by_added = client_with(&server, &by_added);
    timeout(PATIENCE, async { while create(&by_added).await.is_err() {} }).await.expect("it is known");
    create(&old).await.unwrap();
    fs::write(&file, after.jwks().to_string()).unwrap();
    let ended = async {
        loop {
            match stream.next().await.expect("an error") {
                Ok(Item::Event(_) | Item::Bookmark(_)) => {}
                Ok(other) => panic!("{other:?}"),
                Err(error) => return error,
            }
        }
    };
    let ended = timeout(PATIENCE, ended).await.expect("it ends");
    assert!(matches!(ended, Error::Unauthenticated { .. }), "{ended:?}");
    create(&new).await.expect("the new key is known");
    assert!(matches!(create(&old).await, Err(Error::Unauthenticated { .. })));
    // The last key is removed, too.
    fs::write(&file, r#"{"keys":[]}"#).unwrap();
    timeout(PATIENCE, async { while create(&new).await.is_ok() {} }).await.expect("it lets nobody in");
    server.stop().await;
}

/// Serves a text by HTTP. Returns its URL and the number of requests so far.
async fn serve(text: watch::Receiver<String>) -> (String, watch::Receiver<u32>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/jwks", listener.local_addr().unwrap());
    let (asked, times) = watch::channel(0);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 4_096];
            let _ = stream.read(&mut request).await;
            let body = text.borrow().clone();
            let answer =
                format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
            let _ = stream.write_all(answer.as_bytes()).await;
            asked.send_modify(|n| *n += 1);
        }
    });
    (url, times)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_that_can_not_be_read_for_too_long_let_nobody_in() {
    let database = Database::sqlite();
    let (folder, issuer) = (TempDir::new().unwrap(), Issuer::new());
    let (text, shown) = watch::channel(issuer.jwks().to_string());
    let (url, _) = serve(shown).await;
    let mut config = config(&database, KeySource::Url(url), folder.path());
    let jwt = config.access.jwt.as_mut().unwrap();
    jwt.keys_max_age = Duration::from_secs(4);
    let server = TestServer::start(config).await;
    let client = client_with(&server, &issuer.good(Algorithm::RS256));
    create(&client).await.unwrap();
    let mut stream = client.subscribe(Follow::org()).await.unwrap();
    stream.next().await.unwrap().unwrap();
    text.send_replace("not there".to_owned());
    let refused = async { while create(&client).await.is_ok() {} };
    timeout(PATIENCE, refused).await.expect("they are too old");
    create(&client_with(&server, &issuer.good(Algorithm::HS256))).await.expect("a secret that is here counts");
    let ended = async { while stream.next().await.is_some_and(|item| item.is_ok()) {} };
    timeout(PATIENCE, ended).await.expect("so is what was called with them");
    text.send_replace(issuer.jwks().to_string());
    let known = async { while create(&client).await.is_err() {} };
    timeout(PATIENCE, known).await.expect("they are read again");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_at_a_url_are_read_again_when_another_is_named() {
    let database = Database::sqlite();
    let (folder, before, after) = (TempDir::new().unwrap(), Issuer::new(), Issuer::new());
    let (text, shown) = watch::channel(before.jwks().to_string());
    let (url, mut times) = serve(shown).await;
    let server = TestServer::start(config(&database, KeySource::Url(url), folder.path())).await;
    create(&client_with(&server, &before.good(Algorithm::RS256))).await.unwrap();
    assert_eq!(*times.borrow_and_update(), 1, "it is not asked for with each call");
    let mut keys = after.jwks();
    keys["keys"][1]["kid"] = json!("ec-2");
    text.send_replace(keys.to_string());
    let token = after.sign(Algorithm::ES256, |head| head.kid = Some("ec-2".to_owned()), &claims());
    let client = client_with(&server, &token);
    assert!(matches!(create(&client).await, Err(Error::Unauthenticated { .. })));
    timeout(PATIENCE, times.changed()).await.expect("it is asked for again").unwrap();
    let known = async { while create(&client).await.is_err() {} };
    timeout(PATIENCE, known).await.expect("it is known");
    server.stop().await;
}

#[test]
fn keys_that_can_not_be_used_are_told_at_the_start() {
    let folder = TempDir::new().unwrap();
    let database = Database::sqlite();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let (short, none, not_json) = (file("short", "secret"), file("none", "{\"keys\":[]}"), file("not_json", "x"));
    let missing = folder.path().join("missing").display().to_string();
    let named = ["--jwt-issuer", "i", "--jwt-audience", "a"];
    for (arguments, expected) in [
        (vec!["--jwt-keys", &missing], "No such file"),
        (vec!["--jwt-keys", &none], "no key for RS256, ES256 or EdDSA"),
        (vec!["--jwt-keys", &not_json], "not a JWKS"),
        (vec!["--jwt-keys", "http://127.0.0.1:1/jwks"], "http://127.0.0.1:1/jwks"),
        (vec!["--jwt-hs256-secret-file", &short], "needs at least 32 bytes"),
        (vec!["--jwt-role", "x=root"], "unknown role \"root\""),
        (vec!["--jwt-role", "x=operator"], "--jwt-operator-role"),
    ] {
        let url = database.url();
        let mut all = vec!["serve", "--listen", "127.0.0.1:0", "--database-url", &url];
        all.extend(named);
        all.extend(arguments);
        let output = command(&all).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(expected), "{expected}: {said}");
        assert_eq!(output.stdout, b"", "it does not say that it listens");
    }
    for (alone, lacks) in [(["--jwt-keys", &none], "--jwt-issuer"), (["--jwt-issuer", "i"], "--jwt-keys")] {
        let output = command(&[&["--listen", "127.0.0.1:0"][..], &alone].concat()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(lacks), "{said}");
    }
}

//! Fuzz targets: arbitrary bytes as credentials.

use std::{sync::LazyLock, time::Duration};

use jsonwebtoken::{EncodingKey, Header, encode};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::{JwtConfig, Secret, TokenText, jwt::Jwt};
use crate::domain::{access::Role, id::Digest};

/// Only texts of the one valid form may parse as API tokens.
pub fn api_token(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    if TokenText::parse(text).is_some() {
        assert_eq!(text.len(), Secret::generate(None).expect("the system has a generator").text().len());
    }
}

const SECRET: &[u8] = b"a secret that is long enough for HS256";

/// The only correctly signed JWT.
static GENUINE: LazyLock<String> = LazyLock::new(|| {
    let claims = json!({
        "iss": "https://login.example.com", "aud": "jobledger", "exp": 4_102_444_800_u64, "sub": "somebody",
        "org_id": "6ba7b810-9dad-11d1-80b4-00c04fd430c8", "roles": ["producer"],
    });
    encode(&Header::default(), &claims, &EncodingKey::from_secret(SECRET)).expect("it can be signed")
});

static JWT: LazyLock<Jwt> = LazyLock::new(|| {
    let config = JwtConfig {
        keys: None,
        hs256_secret: None,
        issuer: "https://login.example.com".to_owned(),
        audience: "jobledger".to_owned(),
        org_claim: "org_id".to_owned(),
        subject_claim: "sub".to_owned(),
        roles_claim: "roles".to_owned(),
        roles: Vec::new(),
        operator_role: None,
        max_lifetime: Duration::MAX,
        leeway: Duration::from_secs(30),
        refresh: Duration::from_secs(300),
        keys_max_age: Duration::MAX,
    };
    let jwt = Jwt::with_secret(config, SECRET);
    let genuine = jwt.credential(&GENUINE, Digest(Sha256::digest(GENUINE.as_bytes()).into()));
    let credential = genuine.expect("the genuine one is taken");
    assert!(credential.principal.roles.has(Role::Producer));
    jwt
});

/// Only the signed JWT may be accepted. `{genuine}` in the bytes is replaced by it.
pub fn jwt(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    let text = text.replace("{genuine}", &GENUINE);
    let taken = JWT.credential(&text, Digest(Sha256::digest(text.as_bytes()).into())).is_ok();
    assert!(!taken || text == *GENUINE, "taken: {text}");
}

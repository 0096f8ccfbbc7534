//! Who calls, and what they may do.
//!
//! A call presents an API token (`tokens.rs`), a JWT (`jwt.rs`, with the keys of `keys.rs`) or, by its connection, a
//! client certificate (`certificate.rs`). Valid credentials are cached, and [`Access::watch`] keeps checking them.

mod certificate;
mod config;
mod credential;
mod file;
pub(crate) mod fuzzing;
mod gate;
mod jwt;
mod keys;
mod token;
mod tokens;

use std::{io, net::IpAddr, sync::Arc};

use sha2::{Digest as _, Sha256};
use thiserror::Error;

pub(crate) use self::file::{LOOK, read, read_aside};
use self::{certificate::Identities, jwt::Jwt, tokens::Tokens};
pub use self::{
    certificate::PeerCertificate,
    config::{AccessConfig, Authentication, JwtConfig, KeySource},
    credential::{Credential, Principal, Refusal},
    token::{Secret, TokenText},
};
use crate::{
    domain::{clock::Clock, id::Digest},
    store::{Store, StoreError},
};

/// Authenticates callers.
pub struct Access {
    tokens: Tokens,
    jwt: Option<Arc<Jwt>>,
    identities: Option<Identities>,
    clock: Arc<dyn Clock>,
}

/// Why access can't be set up.
#[derive(Debug, Error)]
pub enum AccessError {
    /// Nobody could call: neither API tokens, nor JWTs, nor client certificates are set up.
    #[error(
        "there are no credentials: make a token with `jobledger token create`, or configure --jwt-keys or --client-identities; \
         or serve without authentication: --insecure-no-auth"
    )]
    NoCredentials,
    /// A file can't be read.
    #[error("can't read {path}: {error}")]
    File {
        /// Its path.
        path: String,
        /// The reason.
        error: io::Error,
    },
    /// The configuration can't be used.
    #[error("{0}")]
    Unusable(String),
    /// The database can't be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The credential that a call presents.
pub enum Presented {
    /// An API token.
    Token(TokenText),
    /// A JWT, and its SHA-256.
    Jwt(String, Digest),
    /// A client certificate.
    Certificate(Arc<PeerCertificate>),
}

impl Presented {
    /// The credential in the `authorization` header, else the connection's certificate.
    ///
    /// # Errors
    ///
    /// If there is neither; if the header is malformed; or if there are two: a proxy may have checked the other one.
    pub fn of<'a>(
        authorization: impl IntoIterator<Item = &'a [u8]>,
        certificate: Option<&Arc<PeerCertificate>>,
    ) -> Result<Self, Refusal> {
        let mut headers = authorization.into_iter();
        let Some(header) = headers.next() else {
            let certificate = certificate.ok_or(Refusal::Nothing)?;
            return Ok(Self::Certificate(Arc::clone(certificate)));
        };
        if headers.next().is_some() {
            return Err(Refusal::Malformed);
        }
        let text = str::from_utf8(header).map_err(|_| Refusal::Malformed)?;
        let (scheme, credential) = text.split_once(' ').ok_or(Refusal::Malformed)?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(Refusal::Malformed);
        }
        let credential = credential.trim();
        if credential.starts_with(token::PREFIX) {
            return TokenText::parse(credential).map(Self::Token).ok_or(Refusal::Malformed);
        }
        if credential.split('.').count() != 3 {
            return Err(Refusal::Malformed);
        }
        Ok(Self::Jwt(credential.to_owned(), Digest(Sha256::digest(credential).into())))
    }
}

impl Access {
    /// Reads the configuration, and the credentials' revision in the database.
    ///
    /// # Errors
    ///
    /// If either can't be read or used, or if nobody could call.
    pub async fn open(
        config: &AccessConfig,
        store: Arc<dyn Store>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, AccessError> {
        let jwt = match &config.jwt {
            Some(jwt) => Some(Arc::new(Jwt::open(jwt).await?)),
            None => None,
        };
        let identities = config.client_identities.as_deref().map(Identities::open).transpose()?;
        let tokens = Tokens::open(store).await?;
        if jwt.is_none() && identities.is_none() && !tokens.were_made() {
            return Err(AccessError::NoCredentials);
        }
        Ok(Self { tokens, jwt, identities, clock })
    }

    /// The credential, if that can be told without waiting: it is cached, or is a certificate.
    ///
    /// # Errors
    ///
    /// If the credential is refused.
    pub fn known(&self, presented: &Presented) -> Result<Option<Arc<Credential>>, Refusal> {
        let found = match presented {
            Presented::Token(token) => self.tokens.known(token),
            Presented::Jwt(_, digest) => self.jwt()?.known(digest),
            Presented::Certificate(certificate) => {
                if self.clock.now() > certificate.not_after {
                    return Err(Refusal::Expired);
                }
                let identities = self.identities.as_ref().ok_or(Refusal::NotTaken("client certificates"))?;
                Some(identities.find(certificate).ok_or(Refusal::Unknown)?)
            }
        };
        found.map(|found| self.in_time(found)).transpose()
    }

    /// The credential: cached, or looked up or verified in a turn of the caller's address.
    ///
    /// # Errors
    ///
    /// If the credential is refused, or can't be checked.
    pub async fn find(&self, presented: &Presented, from: IpAddr) -> Result<Arc<Credential>, Refusal> {
        if let Some(known) = self.known(presented)? {
            return Ok(known);
        }
        match presented {
            Presented::Token(token) => self.in_time(self.tokens.find(token, from).await?),
            Presented::Jwt(text, digest) => self.in_time(self.jwt()?.find(text, *digest, from).await?),
            Presented::Certificate(_) => Err(Refusal::Unknown),
        }
    }

    fn jwt(&self) -> Result<&Arc<Jwt>, Refusal> {
        self.jwt.as_ref().ok_or(Refusal::NotTaken("JWTs"))
    }

    fn in_time(&self, found: Arc<Credential>) -> Result<Arc<Credential>, Refusal> {
        if found.principal.expires_at.is_some_and(|end| self.clock.now() >= end) {
            return Err(Refusal::Expired);
        }
        Ok(found)
    }

    /// Completes with the reason once the presented credential is no longer valid.
    pub async fn end_of(&self, presented: &Presented, credential: &Credential) -> Refusal {
        let end = match presented {
            Presented::Certificate(certificate) => Some(certificate.not_after),
            Presented::Token(_) | Presented::Jwt(..) => credential.principal.expires_at,
        };
        let over = async {
            match end {
                None => std::future::pending().await,
                Some(end) => {
                    let left = (end - self.clock.now()).to_std().unwrap_or_default();
                    tokio::time::sleep(left).await;
                }
            }
        };
        tokio::select! {
            () = over => Refusal::Expired,
            why = credential.ended() => why,
        }
    }

    /// Keeps checking whether cached credentials are still valid, for as long as it is polled.
    pub async fn watch(&self) {
        let jwt = async {
            match &self.jwt {
                Some(jwt) => jwt.watch().await,
                None => std::future::pending().await,
            }
        };
        let identities = async {
            match &self.identities {
                Some(identities) => identities.watch().await,
                None => std::future::pending().await,
            }
        };
        tokio::join!(self.tokens.watch(), jwt, identities);
    }
}

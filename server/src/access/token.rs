//! The text form of API tokens.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::domain::{
    access::NO_ORG,
    id::{Digest, OrgId},
};

/// The prefix by which people and secret scanners recognise a token.
pub(super) const PREFIX: &str = "jl_";
/// An org's id, and a secret of 256 bits.
const BYTES: usize = 16 + 32;

/// A new token. Its text can't be read again later.
pub struct Secret {
    text: String,
    digest: Digest,
}

impl Secret {
    /// Makes a token of an org, or of an operator, with a secret from the system's source of randomness.
    ///
    /// # Errors
    ///
    /// If that source fails.
    pub fn generate(org: Option<OrgId>) -> Result<Self, getrandom::Error> {
        let mut bytes = [0; BYTES];
        let (of_org, secret) = bytes.split_at_mut(16);
        of_org.copy_from_slice(org.map_or(NO_ORG, |org| org.0).as_bytes());
        getrandom::fill(secret)?;
        let digest = Digest(Sha256::digest(&*secret).into());
        Ok(Self { text: format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes)), digest })
    }

    /// The token, to be shown once.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The SHA-256 of the secret, to be stored.
    pub fn digest(&self) -> Digest {
        self.digest
    }
}

/// A token as a call presents it, with the digest in place of the secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TokenText {
    /// The org that the token names; `None` for an operator's.
    pub org: Option<OrgId>,
    /// The SHA-256 of the secret.
    pub digest: Digest,
}

impl TokenText {
    /// Parses a token; `None` if the text is not one.
    pub fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0; BYTES];
        let encoded = text.strip_prefix(PREFIX)?;
        // Also refuses longer texts, and texts whose unused trailing bits are set.
        if URL_SAFE_NO_PAD.decode_slice(encoded, &mut bytes).ok()? != BYTES {
            return None;
        }
        let (org, secret) = bytes.split_at(16);
        let org = Some(Uuid::from_slice(org).ok()?).filter(|org| *org != NO_ORG).map(OrgId);
        Some(Self { org, digest: Digest(Sha256::digest(secret).into()) })
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_says_whose_it_is_and_is_found_by_its_digest() {
        for org in [None, Some(OrgId::DEFAULT), Some(OrgId(Uuid::from_u128(7)))] {
            let secret = Secret::generate(org).unwrap();
            assert_eq!(secret.text().len(), 67);
            assert_eq!(TokenText::parse(secret.text()), Some(TokenText { org, digest: secret.digest() }));
        }
    }

    #[test]
    fn what_is_not_quite_a_token_is_none() {
        let text = Secret::generate(None).unwrap().text().to_owned();
        let broken = [
            "",
            "jl_",
            &text[3..],
            &text[..66],
            &format!("{text}A"),
            &format!("{text}="),
            &format!("JL_{}", &text[3..]),
            &text.replace(&text[10..11], "!"),
            &format!("{text}{text}"),
            &format!(" {text}"),
        ];
        for text in broken {
            assert_eq!(TokenText::parse(text), None, "{text:?}");
        }
    }
}

//! Client certificates, mapped to principals by their subject alternative names.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use chrono::DateTime;
use parking_lot::RwLock;
use tokio::time::sleep;
use uuid::Uuid;
use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, ParsedExtension},
    prelude::FromDer as _,
};

use super::{
    AccessError,
    credential::{Credential, Principal, Refusal},
    file,
};
use crate::domain::{
    access::{NO_ORG, Role, Roles},
    clock::Time,
    id::OrgId,
};

/// A verified client certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerCertificate {
    /// Its subject alternative names: `dns:worker.example.com`, `uri:spiffe://example.com/worker`, `email:a@example.com`.
    pub names: Vec<String>,
    /// The end of its validity.
    pub not_after: Time,
}

impl PeerCertificate {
    /// Reads a certificate in DER; `None` if it can't be read.
    pub fn read(der: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let not_after = DateTime::from_timestamp(certificate.validity().not_after.timestamp(), 0)?;
        let mut names = Vec::new();
        for extension in certificate.extensions() {
            let ParsedExtension::SubjectAlternativeName(alternatives) = extension.parsed_extension() else { continue };
            for name in &alternatives.general_names {
                match name {
                    GeneralName::DNSName(name) => names.push(format!("dns:{}", name.to_ascii_lowercase())),
                    GeneralName::URI(uri) => names.push(format!("uri:{uri}")),
                    GeneralName::RFC822Name(address) => names.push(format!("email:{address}")),
                    _ => {}
                }
            }
        }
        Some(Self { names, not_after })
    }
}

/// Principals by certificate name, from a file with a line for each name.
pub(super) struct Identities {
    path: PathBuf,
    now: RwLock<Arc<HashMap<String, Arc<Credential>>>>,
}

impl Identities {
    pub(super) fn open(path: &Path) -> Result<Self, AccessError> {
        let shown = || path.display().to_string();
        let bytes = file::read(path).map_err(|error| AccessError::File { path: shown(), error })?;
        let read = parse(&bytes).map_err(|error| AccessError::Unusable(format!("{}: {error}", shown())))?;
        // Only at the start: later an empty file may be meant to lock all clients out.
        if read.is_empty() {
            return Err(AccessError::Unusable(format!("{}: the file has no client identity", shown())));
        }
        let now = read.into_iter().map(|(name, principal)| (name, Credential::new(principal))).collect();
        Ok(Self { path: path.to_owned(), now: RwLock::new(Arc::new(now)) })
    }

    fn now(&self) -> Arc<HashMap<String, Arc<Credential>>> {
        Arc::clone(&self.now.read())
    }

    /// The credential of the first of the certificate's names that is configured.
    pub(super) fn find(&self, certificate: &PeerCertificate) -> Option<Arc<Credential>> {
        let now = self.now();
        certificate.names.iter().find_map(|name| now.get(name)).cloned()
    }

    /// Reads the file again when it changes. Ends the calls of names that were removed, or whose principal differs.
    pub(super) async fn watch(&self) {
        let mut last = None;
        loop {
            sleep(file::LOOK).await;
            let read = match file::read_aside(&self.path).await {
                Ok(bytes) if last.as_ref() == Some(&bytes) => continue,
                Ok(bytes) => {
                    let read = parse(&bytes);
                    last = Some(bytes);
                    read
                }
                Err(error) => Err(error.to_string()),
            };
            match read {
                Ok(read) => self.change(read),
                Err(error) => {
                    let path = self.path.display();
                    tracing::warn!(%path, error, "can't load the client identities; the previous ones stay in use");
                }
            }
        }
    }

    fn change(&self, read: HashMap<String, Principal>) {
        let before = self.now();
        let same = |name: &String, principal: &Principal| {
            before.get(name).filter(|known| known.principal == *principal).cloned()
        };
        let now: HashMap<_, _> = read
            .into_iter()
            .map(|(name, principal)| {
                let credential = same(&name, &principal).unwrap_or_else(|| Credential::new(principal));
                (name, credential)
            })
            .collect();
        for (name, known) in &*before {
            if now.get(name).is_none_or(|credential| !Arc::ptr_eq(credential, known)) {
                known.end(Refusal::Unknown);
            }
        }
        *self.now.write() = Arc::new(now);
    }
}

/// Each line has a name, an org (or `-` for operators) and roles, and the principal's name if it differs from the
/// certificate's: `uri:spiffe://example.com/worker 0190… worker,producer billing`. Lines that begin with `#` are comments.
fn parse(bytes: &[u8]) -> Result<HashMap<String, Principal>, String> {
    let text = str::from_utf8(bytes).map_err(|error| error.to_string())?;
    let mut identities = HashMap::new();
    for (n, line) in text.lines().enumerate() {
        let words: Vec<_> = line.split_whitespace().collect();
        if words.first().is_none_or(|word| word.starts_with('#')) {
            continue;
        }
        let (name, principal) = identity(&words).map_err(|error| format!("line {}: {error}", n + 1))?;
        if identities.insert(name.clone(), principal).is_some() {
            return Err(format!("line {}: duplicate name {name}", n + 1));
        }
    }
    Ok(identities)
}

fn identity(words: &[&str]) -> Result<(String, Principal), String> {
    let (san, org, roles, called) = match words {
        [san, org, roles] => (san, org, roles, san),
        [san, org, roles, called] => (san, org, roles, called),
        _ => return Err("expected NAME ORG ROLES, and optionally the principal's name".to_owned()),
    };
    let (kind, name) = san.split_once(':').unwrap_or_default();
    if !matches!(kind, "dns" | "uri" | "email") || name.is_empty() {
        return Err(format!("invalid name {san:?}: expected dns:, uri: or email: at its start"));
    }
    let san = if kind == "dns" { san.to_ascii_lowercase() } else { (*san).to_owned() };
    let roles: Roles = roles.split(',').map(str::parse::<Role>).collect::<Result<_, _>>()?;
    let org = match *org {
        "-" => None,
        org => Some(
            Uuid::try_parse(org)
                .ok()
                .filter(|org| *org != NO_ORG)
                .ok_or(format!("invalid org {org:?}: expected a UUID, or - for operators"))?,
        ),
    };
    if org.is_none() != roles.has(Role::Operator) {
        return Err("ORG - and the role operator require each other".to_owned());
    }
    if !Principal::is_name(called) {
        return Err(format!("{called:?} is not a valid principal name"));
    }
    Ok((san, Principal { name: format!("cert:{called}").into(), org: org.map(OrgId), roles, expires_at: None }))
}

//! Entry points for fuzzing the code that handles bytes from outside first: for `server/fuzz` and `suite/callers/fuzz.rs`. An input
//! that makes one of them panic has found a defect.

use crate::domain::lease::LeaseToken;
pub use crate::{
    access::fuzzing::{api_token, jwt},
    api::fuzzing::{page_token, request},
    legacy::rest::fuzzing::legacy_json,
};

/// A function that accepts any bytes.
pub type Target = fn(&[u8]);

/// All entry points, by name.
pub const TARGETS: [(&str, Target); 6] = [
    ("request", request),
    ("page_token", page_token),
    ("lease_token", lease_token),
    ("api_token", api_token),
    ("jwt", jwt),
    ("legacy_json", legacy_json),
];

/// Parses a lease token. A token that parses must print as the same text.
pub fn lease_token(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    if let Ok(token) = text.parse::<LeaseToken>() {
        assert_eq!(token.to_string(), text);
    }
}

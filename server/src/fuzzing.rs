//! What bytes from outside go through before anything else, as entries for fuzzing: `server/fuzz`, and `suite/fuzz.rs`. None panics,
//! whatever it is given, unless something is wrong with jobledger.

use crate::domain::lease::LeaseToken;
pub use crate::{
    access::fuzzing::{api_token, jwt},
    api::fuzzing::{legacy_json, page_token, request},
};

/// Something that takes any bytes.
pub type Target = fn(&[u8]);

/// All of them, by name.
pub const TARGETS: [(&str, Target); 6] = [
    ("request", request),
    ("page_token", page_token),
    ("lease_token", lease_token),
    ("api_token", api_token),
    ("jwt", jwt),
    ("legacy_json", legacy_json),
];

/// A lease token: nobody's, or one that has this form alone.
pub fn lease_token(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    if let Ok(token) = text.parse::<LeaseToken>() {
        assert_eq!(token.to_string(), text);
    }
}

//! An entry point for fuzzing.

use axum::http::{HeaderMap, HeaderValue, StatusCode};

/// Reads the bodies of the old REST calls: each is read, or refused with 422. `!` as the first byte stands for a browser.
pub fn legacy_json(bytes: &[u8]) {
    let (from_browser, bytes) = bytes.split_first().map_or((false, bytes), |(first, rest)| (*first == b'!', rest));
    let mut headers = HeaderMap::new();
    if from_browser {
        headers.insert("origin", HeaderValue::from_static("https://example.com"));
    }
    for status in super::read_any(&headers, bytes).into_iter().filter_map(Result::err) {
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    }
}

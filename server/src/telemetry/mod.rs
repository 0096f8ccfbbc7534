//! Structured logs, and other output on standard error.

mod lines;
mod rate_limited_log;

use std::io::IsTerminal as _;

use clap::ValueEnum;
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

pub use self::lines::{Open, Stderr, dropped, open, say};
pub(crate) use self::rate_limited_log::RateLimitedLog;

/// The format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

fn is_level(word: &str) -> bool {
    word.parse::<LevelFilter>().is_ok()
}

/// Starts logging for the whole process. Lines that standard error does not take are dropped and counted ([`dropped`]).
///
/// # Errors
///
/// If the filter is malformed, or logging was started before.
pub fn init(filter: &str, format: LogFormat) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    // A lone word would be parsed as a module's name, which silences all other modules.
    if let Some(word) = filter.split(',').map(str::trim).find(|word| !word.contains(['=', ':', '[']) && !is_level(word))
    {
        return Err(format!("invalid log filter {filter:?}: {word:?} is neither a level nor MODULE=LEVEL").into());
    }
    let filter = EnvFilter::try_new(filter).map_err(|error| format!("invalid log filter {filter:?}: {error}"))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => {
            lines::say_notices_in_json();
            builder.json().try_init()
        }
    }?;
    // Panics are logged like everything else.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string);
        tracing::error!(place, message = panic.payload_as_str(), "panic");
    }));
    Ok(())
}

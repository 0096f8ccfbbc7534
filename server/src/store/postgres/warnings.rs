//! Catches the warnings that PostgreSQL sends during a commit.
//!
//! `pg_cancel_backend` ends a commit's wait for a synchronous standby. PostgreSQL then acknowledges the commit, after a warning
//! that the standby may lack it (`SyncRepWaitForLSN`). sqlx passes warnings on only as tracing events, so this subscribes to
//! those.

use std::{cell::RefCell, fmt::Debug, pin::pin, sync::LazyLock, task::Poll};

use tracing::{
    Dispatch, Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
    span,
    subscriber::Interest,
};

/// The target of sqlx's tracing events for notices and warnings.
const NOTICES: &str = "sqlx::postgres::notice";

thread_local! {
    /// The last warning that arrived while a future was polled on this thread.
    static HEARD: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs some work, and also returns the last warning that PostgreSQL sent meanwhile, in the server's language. Other tracing
/// events of the work are dropped.
pub(super) async fn heard<T>(work: impl Future<Output = T>) -> (T, Option<String>) {
    static LISTENING: LazyLock<Dispatch> = LazyLock::new(|| Dispatch::new(WarningSubscriber));
    let mut work = pin!(work);
    let mut warned = None;
    let output = std::future::poll_fn(|context| {
        let polled: Poll<T> = tracing::dispatcher::with_default(&LISTENING, || work.as_mut().poll(context));
        if let Some(warning) = HEARD.take() {
            warned = Some(warning);
        }
        polled
    })
    .await;
    (output, warned)
}

/// Records sqlx's events for warnings, and drops all others.
struct WarningSubscriber;

impl WarningSubscriber {
    fn takes(metadata: &Metadata<'_>) -> bool {
        metadata.target() == NOTICES && *metadata.level() <= Level::WARN
    }
}

impl Subscriber for WarningSubscriber {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if Self::takes(metadata) { Interest::always() } else { Interest::never() }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::WARN)
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        Self::takes(metadata)
    }

    fn event(&self, event: &Event<'_>) {
        if Self::takes(event.metadata()) {
            let mut text = Text::default();
            event.record(&mut text);
            HEARD.set(Some(text.0));
        }
    }

    /// Spans are dropped.
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// The message of an event.
#[derive(Default)]
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

//! What PostgreSQL warns of while it commits.
//!
//! `pg_cancel_backend` ends a commit's wait for a synchronous standby: the commit is then acknowledged, after a warning that the standby may
//! lack it (PostgreSQL's `SyncRepWaitForLSN`). sqlx passes warnings on as tracing events only, so this listens to those.

use std::{cell::RefCell, fmt::Debug, pin::pin, sync::LazyLock, task::Poll};

use tracing::{
    Dispatch, Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
    span,
    subscriber::Interest,
};

/// The target of the events that sqlx makes of notices and warnings.
const NOTICES: &str = "sqlx::postgres::notice";

thread_local! {
    /// The last warning while the future on this thread is polled.
    static HEARD: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs some work, and tells the last warning that PostgreSQL gave meanwhile, in the server's language. Other events of the work are not
/// logged.
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

/// Takes the events that sqlx makes of warnings, and no others.
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

    /// No span is taken.
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// An event's message.
#[derive(Default)]
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

//! Futures whose panics stay theirs.

use std::{
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::Pin,
    task::{Context, Poll},
};

/// A future that is dropped as soon as it ends. A panic while it is dropped goes no further: it would end the process, where the
/// executor drops it.
pub(super) struct Contained<F>(Option<Pin<Box<F>>>);

impl<F> Contained<F> {
    pub(super) fn new(future: F) -> Self {
        Self(Some(Box::pin(future)))
    }

    fn end(&mut self) {
        let future = self.0.take();
        // The panic was reported where it happened.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(future)));
    }
}

impl<F: Future> Future for Contained<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let Some(future) = &mut self.0 else { return Poll::Pending };
        match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context))) {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(ready) => {
                self.end();
                ready
            }
            Err(panic) => {
                self.end();
                resume_unwind(panic)
            }
        }
    }
}

impl<F> Drop for Contained<F> {
    fn drop(&mut self) {
        self.end();
    }
}

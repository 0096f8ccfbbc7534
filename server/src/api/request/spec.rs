//! What the creator of a job asks for, as it is checked when the job is created and when it is changed. `prefix` goes before the
//! fields' names in violations.

use std::time::Duration;

use super::check::Check;
use crate::domain::job::MAX_PRIORITY;

const MAX_ATTEMPTS: i32 = 100;
const RUN_TIMEOUT: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(365 * 24 * 3_600)];

impl Check {
    pub(super) fn priority(&mut self, prefix: &str, priority: i32) -> i32 {
        self.that(&format!("{prefix}priority"), (-MAX_PRIORITY..=MAX_PRIORITY).contains(&priority), || {
            format!("must be −{MAX_PRIORITY} to {MAX_PRIORITY}")
        });
        priority
    }

    /// 0 stands for a single attempt.
    pub(super) fn max_attempts(&mut self, prefix: &str, attempts: i32) -> i32 {
        let attempts = if attempts == 0 { 1 } else { attempts };
        self.that(&format!("{prefix}max_attempts"), (1..=MAX_ATTEMPTS).contains(&attempts), || {
            format!("must be 1 to {MAX_ATTEMPTS}")
        });
        attempts
    }

    pub(super) fn run_timeout(&mut self, prefix: &str, timeout: Option<&prost_types::Duration>) -> Option<Duration> {
        timeout.and_then(|timeout| self.duration(&format!("{prefix}run_timeout"), timeout, RUN_TIMEOUT))
    }
}

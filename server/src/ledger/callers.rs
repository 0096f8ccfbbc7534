//! Which orgs called lately: what one org may have depends on whether others call.

use std::time::Duration;

use tokio::time::Instant;

use crate::domain::id::OrgId;

/// The org that called last, and the org that called last of all others.
#[derive(Default)]
pub(super) struct Callers {
    last: Option<(OrgId, Instant)>,
    other: Option<(OrgId, Instant)>,
}

impl Callers {
    /// Records a call of an org.
    pub(super) fn called(&mut self, org: OrgId, now: Instant) {
        if let Some(last) = self.last.filter(|(last, _)| *last != org) {
            self.other = Some(last);
        }
        self.last = Some((org, now));
    }

    /// True if an org other than this one has called within this time.
    pub(super) fn do_others_call(&self, org: OrgId, within: Duration, now: Instant) -> bool {
        let is_other = |called: &(OrgId, Instant)| called.0 != org && now - called.1 < within;
        [self.last, self.other].iter().flatten().any(is_other)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn an_org_is_alone_once_no_other_has_called_for_a_while() {
        let [org, other] = [1, 2].map(|n| OrgId(Uuid::from_u128(n)));
        let (within, now) = (Duration::from_millis(200), Instant::now());
        let mut callers = Callers::default();
        callers.called(org, now);
        assert!(!callers.do_others_call(org, within, now) && callers.do_others_call(other, within, now));
        callers.called(other, now);
        callers.called(org, now + within / 2);
        assert!(callers.do_others_call(org, within, now + within / 2));
        assert!(!callers.do_others_call(org, within, now + within));
    }
}

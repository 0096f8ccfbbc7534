//! Job types: what an org has set for them, and pauses.
//!
//! A type exists as long as it has jobs or settings. Every change of settings is an event of the org's log
//! ([`OrgEvent`](super::org_event::OrgEvent)), so every server knows it before it grants the next claim.

use std::{collections::BTreeMap, sync::Arc};

use thiserror::Error;

use super::{clock::Time, org_event::OrgChange};

/// The name under which [`OrgSettings`] has the pause of all types: no type has an empty name.
pub const ALL_TYPES: &str = "";

/// A pause: until it ends, no claim gets jobs. Running jobs go on, and reporters without a lease may begin jobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pause {
    /// When it began. A pause that replaces another one goes on from that one's time.
    pub since: Time,
    /// When it ends by itself; `None`: not before somebody resumes the type.
    pub until: Option<Time>,
    /// Why, in the words of the caller that paused the type; may be empty.
    pub reason: Arc<str>,
    /// Who paused the type; empty if unknown.
    pub actor: Arc<str>,
}

/// The settings of one type, or of all types together, which only have a pause.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TypeSettings {
    /// What the type is for, for people; may be empty.
    pub description: Arc<str>,
    /// The current pause.
    pub pause: Option<Pause>,
    /// `seq` of the last event that changed the settings; 0 if none did.
    pub changed_seq: i64,
}

impl TypeSettings {
    /// The version of the settings, for conditional changes.
    pub fn etag(&self) -> String {
        self.changed_seq.to_string()
    }

    /// True if nothing is set.
    pub fn is_default(&self) -> bool {
        self.description.is_empty() && self.pause.is_none()
    }
}

/// The settings of an org's types, as of one place of its log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OrgSettings {
    /// `seq` of the last [org event](super::org_event::OrgEvent) up to which these are the settings; 0 before the first.
    pub as_of: i64,
    /// Settings by type. [`ALL_TYPES`] has the pause of all types.
    pub types: BTreeMap<Arc<str>, TypeSettings>,
}

impl OrgSettings {
    /// The pause that keeps jobs of this type from claims: that of all types, else that of the type.
    pub fn pause_of(&self, job_type: &str) -> Option<&Pause> {
        let pause = |name| self.types.get(name)?.pause.as_ref();
        pause(ALL_TYPES).or_else(|| pause(job_type))
    }

    /// True if no claim gets jobs of this type.
    pub fn is_paused(&self, job_type: &str) -> bool {
        !self.types.is_empty() && self.pause_of(job_type).is_some()
    }

    /// True if no claim gets any job.
    pub fn are_all_paused(&self) -> bool {
        self.types.get(ALL_TYPES).is_some_and(|all| all.pause.is_some())
    }

    /// True if claims get no jobs of some types.
    pub fn has_pause(&self) -> bool {
        self.types.values().any(|settings| settings.pause.is_some())
    }

    /// When the first pause ends by itself.
    pub fn next_end(&self) -> Option<Time> {
        self.types.values().filter_map(|settings| settings.pause.as_ref()?.until).min()
    }

    /// The types whose pauses are over.
    pub fn over(&self, now: Time) -> Vec<Arc<str>> {
        let is_over = |settings: &TypeSettings| {
            settings.pause.as_ref().is_some_and(|pause| pause.until.is_some_and(|until| until <= now))
        };
        self.types.iter().filter(|(_, settings)| is_over(settings)).map(|(name, _)| Arc::clone(name)).collect()
    }

    /// Decides a command on a type's settings. `None` if it changes nothing.
    ///
    /// # Errors
    ///
    /// [`EtagMismatch`] if the settings have another version than the command names.
    pub fn apply(&self, command: &TypeCommand, actor: &Arc<str>, now: Time) -> Result<Option<OrgChange>, EtagMismatch> {
        let none = TypeSettings::default();
        let settings = self.types.get(&command.job_type).unwrap_or(&none);
        if command.etag.as_ref().is_some_and(|etag| *etag != settings.etag()) {
            return Err(EtagMismatch { current: settings.etag() });
        }
        let job_type = Arc::clone(&command.job_type);
        Ok(match &command.change {
            TypeChange::Pause { until, reason } => {
                let since = settings.pause.as_ref().map_or(now, |pause| pause.since);
                let (until, reason, actor) = (*until, Arc::clone(reason), Arc::clone(actor));
                let pause = Pause { since, until, reason, actor };
                let before = settings.pause.clone();
                (before.as_ref() != Some(&pause)).then_some(OrgChange::TypePaused { job_type, pause, before })
            }
            TypeChange::Resume => settings.pause.clone().map(|pause| OrgChange::TypeResumed { job_type, pause }),
            TypeChange::Describe { description } => {
                let (before, after) = (Arc::clone(&settings.description), Arc::clone(description));
                (before != after).then_some(OrgChange::TypeUpdated { job_type, before, after })
            }
            TypeChange::Reset => (!settings.is_default()).then(|| OrgChange::TypeReset {
                job_type,
                description: Arc::clone(&settings.description),
                pause: settings.pause.clone(),
            }),
        })
    }

    /// The settings of a type after a change of them, which is the event with this `seq`. `None` if it changes no settings.
    pub fn after(&self, change: &OrgChange, seq: i64) -> Option<(Arc<str>, TypeSettings)> {
        let current = |name: &Arc<str>| self.types.get(name).cloned().unwrap_or_default();
        let (name, settings) = match change {
            OrgChange::TypePaused { job_type, pause, .. } => {
                (job_type, TypeSettings { pause: Some(pause.clone()), ..current(job_type) })
            }
            OrgChange::TypeResumed { job_type, .. } => (job_type, TypeSettings { pause: None, ..current(job_type) }),
            OrgChange::TypeUpdated { job_type, after, .. } => {
                (job_type, TypeSettings { description: Arc::clone(after), ..current(job_type) })
            }
            OrgChange::TypeReset { job_type, .. } => (job_type, TypeSettings::default()),
            OrgChange::BulkStarted { .. } | OrgChange::BulkEnded { .. } => return None,
        };
        Some((Arc::clone(name), TypeSettings { changed_seq: seq, ..settings }))
    }

    /// Replaces the settings of a type. A type with nothing set is left out.
    pub fn set(&mut self, job_type: Arc<str>, settings: TypeSettings) {
        if settings.is_default() {
            self.types.remove(&job_type);
        } else {
            self.types.insert(job_type, settings);
        }
    }
}

/// A change of a type's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypeCommand {
    /// The type; [`ALL_TYPES`] for all types together, which can be paused and resumed.
    pub job_type: Arc<str>,
    /// If set, the change is refused unless this is the etag of the settings.
    pub etag: Option<String>,
    /// What to change.
    pub change: TypeChange,
}

impl TypeCommand {
    /// Approximate bytes of the command's texts.
    pub fn text_bytes(&self) -> usize {
        let change = match &self.change {
            TypeChange::Pause { reason, .. } => reason.len(),
            TypeChange::Describe { description } => description.len(),
            TypeChange::Resume | TypeChange::Reset => 0,
        };
        self.job_type.len() + change
    }
}

/// What to change in a type's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TypeChange {
    /// Keep jobs of the type from claims. Replaces a pause that there is.
    Pause {
        /// When the pause ends by itself.
        until: Option<Time>,
        /// Why.
        reason: Arc<str>,
    },
    /// End the pause. A type that is not paused stays as it is.
    Resume,
    /// Set the description.
    Describe {
        /// The new one; empty for none.
        description: Arc<str>,
    },
    /// Remove all settings.
    Reset,
}

/// The settings have changed since the caller read them.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the settings of the type have changed: their etag is {current}")]
pub struct EtagMismatch {
    /// The current etag.
    pub current: String,
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};

    use super::*;

    fn at(seconds: i64) -> Time {
        DateTime::UNIX_EPOCH + TimeDelta::seconds(seconds)
    }

    fn command(job_type: &str, change: TypeChange) -> TypeCommand {
        TypeCommand { job_type: job_type.into(), etag: None, change }
    }

    fn pause(until: Option<i64>, reason: &str) -> TypeChange {
        TypeChange::Pause { until: until.map(at), reason: reason.into() }
    }

    /// Applies a command as the event `seq`.
    fn apply(settings: &mut OrgSettings, command: &TypeCommand, now: i64, seq: i64) -> bool {
        let Some(change) = settings.apply(command, &"ann".into(), at(now)).unwrap() else { return false };
        let (name, after) = settings.after(&change, seq).unwrap();
        settings.set(name, after);
        true
    }

    #[test]
    fn a_pause_of_all_types_goes_before_that_of_one() {
        let mut settings = OrgSettings::default();
        assert!(!settings.is_paused("a") && settings.next_end().is_none());
        assert!(apply(&mut settings, &command("a", pause(Some(90), "one")), 10, 1));
        assert!(settings.is_paused("a") && !settings.is_paused("b") && !settings.are_all_paused());
        assert!(apply(&mut settings, &command(ALL_TYPES, pause(Some(50), "all")), 20, 2));
        assert!(settings.is_paused("b") && settings.are_all_paused());
        assert_eq!(&*settings.pause_of("a").unwrap().reason, "all");
        assert_eq!((settings.next_end(), settings.over(at(49))), (Some(at(50)), vec![]));
        assert_eq!(settings.over(at(50)), [ALL_TYPES.into()]);
        assert!(apply(&mut settings, &command(ALL_TYPES, TypeChange::Resume), 50, 3));
        assert!(settings.is_paused("a") && !settings.is_paused("b"));
        assert!(!apply(&mut settings, &command("b", TypeChange::Resume), 50, 4), "it is not paused");
    }

    #[test]
    fn a_pause_that_replaces_another_goes_on_from_its_begin() {
        let mut settings = OrgSettings::default();
        assert!(apply(&mut settings, &command("a", pause(None, "why")), 10, 1));
        assert!(!apply(&mut settings, &command("a", pause(None, "why")), 20, 2), "the same again");
        assert!(apply(&mut settings, &command("a", pause(Some(90), "why")), 30, 2));
        let found = settings.pause_of("a").unwrap();
        assert_eq!((found.since, found.until, settings.types["a"].changed_seq), (at(10), Some(at(90)), 2));
    }

    #[test]
    fn settings_change_under_their_etag_and_go_with_the_last_of_them() {
        let mut settings = OrgSettings::default();
        let describe = TypeChange::Describe { description: "what it does".into() };
        assert!(apply(&mut settings, &command("a", describe.clone()), 10, 7));
        let stale = TypeCommand { etag: Some("6".to_owned()), ..command("a", pause(None, "")) };
        assert_eq!(
            settings.apply(&stale, &"ann".into(), at(20)),
            Err(EtagMismatch { current: settings.types["a"].etag() })
        );
        let current = TypeCommand { etag: Some("7".to_owned()), ..stale };
        assert!(apply(&mut settings, &current, 20, 8));
        assert!(apply(&mut settings, &command("a", TypeChange::Reset), 30, 9));
        assert_eq!(settings, OrgSettings::default());
        assert!(!apply(&mut settings, &command("a", TypeChange::Reset), 30, 10), "nothing is left to reset");
    }
}

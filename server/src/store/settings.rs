//! `org_type`: the settings of an org's types. A type has a row while anything is set.

use std::sync::Arc;

use super::{StoreError, org_events::PauseText, rows::Columns, value::Value};
use crate::domain::{
    id::OrgId,
    job_type::{OrgSettings, TypeSettings},
};

/// The columns of `org_type`, in the order in which they are written and, without `org_id`, read.
pub(super) const SETTING_COLUMNS: [&str; 5] = ["org_id", "type", "description", "pause", "changed_seq"];

/// The values of [`SETTING_COLUMNS`].
pub(super) fn values<'a>(org: OrgId, name: &'a str, settings: &'a TypeSettings) -> Vec<Value<'a>> {
    vec![
        org.0.into(),
        name.into(),
        (&*settings.description).into(),
        settings.pause.as_ref().map(PauseText::text).into(),
        settings.changed_seq.into(),
    ]
}

/// Reads the settings of a type into those of its org.
pub(super) fn read<'r>(columns: &mut impl Columns<'r>, into: &mut OrgSettings) -> Result<(), StoreError> {
    let (name, description): (Arc<str>, Arc<str>) = (columns.text()?.into(), columns.text()?.into());
    let pause = columns.optional_text()?.map(PauseText::parse).transpose()?;
    into.types.insert(name, TypeSettings { description, pause, changed_seq: columns.long()? });
    Ok(())
}

//! Jobs over the wire: what calls take, refuse and answer.

pub(crate) mod batches;
pub(crate) mod bulk;
pub(crate) mod edits;
pub(crate) mod erasures;
pub(crate) mod errors;
pub(crate) mod explain;
pub(crate) mod fields;
pub(crate) mod lists;
pub(crate) mod lives;
pub(crate) mod model;
pub(crate) mod numbers;
pub(crate) mod recent;
pub(crate) mod running;
pub(crate) mod types;

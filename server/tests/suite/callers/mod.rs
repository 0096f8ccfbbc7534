//! Who may call, what callers may take, and what they cannot do to others.

pub(crate) mod access;
pub(crate) mod aging;
pub(crate) mod auditors;
pub(crate) mod connections;
pub(crate) mod fuzz;
pub(crate) mod hygiene;
pub(crate) mod jwt;
pub(crate) mod limits;
pub(crate) mod memory;
pub(crate) mod noisy;
pub(crate) mod probes;
pub(crate) mod quotas;
pub(crate) mod resets;
pub(crate) mod server_info;
pub(crate) mod strangers;
pub(crate) mod tenants;
pub(crate) mod tls;
pub(crate) mod token_calls;
pub(crate) mod tokens;

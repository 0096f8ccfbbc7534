//! What tests are made of: databases, servers, clients, connections that break, random numbers.

pub(crate) mod breaking;
pub(crate) mod cluster;
pub(crate) mod factory;
pub(crate) mod harness;
pub(crate) mod program;
pub(crate) mod proxy;
pub(crate) mod raw;
pub(crate) mod seeded;
pub(crate) mod wire;

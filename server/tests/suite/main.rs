//! Everything that can be seen from outside: the store's contract, the ledger over a real database, and the service on
//! real sockets. One program, so that it is linked once.

mod batches;
mod breaking;
mod claims;
mod cluster;
mod contract;
mod contract_work;
mod crash;
mod demo;
mod errors;
mod example;
mod factory;
mod fencing;
mod fields;
mod grpcurl;
mod harness;
mod house;
mod jobs;
mod leases;
mod ledger;
mod lists;
mod memory;
mod migrate;
mod plans;
mod probes;
mod program;
mod proxy;
mod replicas;
mod retention;
mod rls;
mod shutdown;
mod streams;
mod workers;

//! Tests of what is visible from outside: the store's contract, the ledger over a real database, and the service on
//! real sockets. They are one program, so that it is linked once.

mod callers;
mod faults;
mod hostile;
mod jobs;
mod legacy;
mod program;
mod stores;
mod streams;
mod support;
mod work;

//! Jobs of the service that jobledger replaces, brought in.

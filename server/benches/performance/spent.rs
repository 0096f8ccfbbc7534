//! Processor time, read from `/proc`.

use std::{fs, time::Duration};

use crate::common::{Result, Server, cluster::Cluster};

/// Clock ticks per second in `/proc`, the same on every Linux.
const TICKS_A_SECOND: u64 = 100;

/// Processor time of a process and of its children that have ended and were waited for.
fn with_ended(process: &str) -> Result<Duration> {
    times(process, 4)
}

/// Processor time of a process, given by its id or `self`.
pub(crate) fn of_process(process: &str) -> Result<Duration> {
    times(process, 2)
}

fn times(process: &str, fields: usize) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    let found: Vec<_> = stat.rsplit(')').next().ok_or("no stat")?.split_whitespace().skip(11).take(fields).collect();
    let ticks = found.iter().try_fold(0, |sum, field| Ok::<_, std::num::ParseIntError>(sum + field.parse::<u64>()?))?;
    Ok(Duration::from_millis(ticks * 1_000 / TICKS_A_SECOND))
}

/// The processes whose processor time is read, besides this one.
#[derive(Clone, Copy)]
pub(crate) struct Meter<'a> {
    pub(crate) servers: &'a [Server],
    /// The database, if it has processes of its own.
    pub(crate) cluster: Option<&'a Cluster>,
}

/// Processor time of the servers, the database, and this process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spent {
    pub(crate) server: Duration,
    pub(crate) database: Duration,
    pub(crate) generator: Duration,
}

impl<'a> Meter<'a> {
    pub(crate) fn of(server: &'a Server, cluster: Option<&'a Cluster>) -> Self {
        Self { servers: std::slice::from_ref(server), cluster }
    }

    /// Reads the processor time since the start of the processes.
    pub(crate) fn look(self) -> Result<Spent> {
        let mut database = Duration::ZERO;
        if let Some(cluster) = self.cluster {
            let postmaster = cluster.postmaster().to_string();
            database = with_ended(&postmaster)?;
            for child in
                fs::read_to_string(format!("/proc/{postmaster}/task/{postmaster}/children"))?.split_whitespace()
            {
                // A child that has just ended is counted with the postmaster.
                database += of_process(child).unwrap_or_default();
            }
        }
        let server = self.servers.iter().map(Server::cpu).sum::<Result<_>>()?;
        Ok(Spent { server, database, generator: of_process("self")? })
    }
}

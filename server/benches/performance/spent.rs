//! Processor time, from what the system counts of processes.

use std::{fs, time::Duration};

use crate::common::{Result, Server, cluster::Cluster};

/// Clock ticks of `/proc`, on every Linux that there is.
const TICKS_A_SECOND: u64 = 100;

/// Processor time of a process, and of those of its children that have ended and were waited for.
fn with_ended(process: &str) -> Result<Duration> {
    times(process, 4)
}

/// Processor time of a process: its id, or `self`.
pub(crate) fn of_process(process: &str) -> Result<Duration> {
    times(process, 2)
}

fn times(process: &str, fields: usize) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    let found: Vec<_> = stat.rsplit(')').next().ok_or("no stat")?.split_whitespace().skip(11).take(fields).collect();
    let ticks = found.iter().try_fold(0, |sum, field| Ok::<_, std::num::ParseIntError>(sum + field.parse::<u64>()?))?;
    Ok(Duration::from_millis(ticks * 1_000 / TICKS_A_SECOND))
}

/// Whose processor time is looked at, beside that of this process.
#[derive(Clone, Copy)]
pub(crate) struct Meter<'a> {
    pub(crate) servers: &'a [Server],
    /// Where the database is not in the server.
    pub(crate) cluster: Option<&'a Cluster>,
}

/// Processor time of the servers, of the database, and of this process, which asks.
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

    /// What was spent since the beginning.
    pub(crate) fn look(self) -> Result<Spent> {
        let mut database = Duration::ZERO;
        if let Some(cluster) = self.cluster {
            let postmaster = cluster.postmaster().to_string();
            database = with_ended(&postmaster)?;
            for child in
                fs::read_to_string(format!("/proc/{postmaster}/task/{postmaster}/children"))?.split_whitespace()
            {
                // One that has just ended is counted with the postmaster.
                database += of_process(child).unwrap_or_default();
            }
        }
        let server = self.servers.iter().map(Server::cpu).sum::<Result<_>>()?;
        Ok(Spent { server, database, generator: of_process("self")? })
    }
}

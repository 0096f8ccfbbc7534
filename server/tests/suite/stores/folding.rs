//! No reader can tell which server folds, or what, or when.
//!
//! Servers that fold at once, never, and late share one log, and are restarted. Imports write beside them. The test
//! makes random calls, one after the other, and after each reads everything from every server. All servers must answer
//! the same, and only jobs that the call named may have changed.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime},
};

use jobledger_client::{
    Claim, Client, Error, NewJob, Report,
    proto::{
        CancelJobRequest, GetStatisticsRequest, HeartbeatRequest, Job, JobStatus, LeaseHeartbeat, ListJobsRequest,
        RetryJobRequest,
    },
};
use jobledger_server::domain::clock::{Clock as _, SystemClock};

use uuid::Uuid;

use crate::{
    legacy::database::LegacyDatabase,
    legacy::import::import,
    support::harness::{Database, TestServer, on_both_databases, short_or_long},
    support::seeded::Seeded,
};

on_both_databases! {
    no_reader_can_tell_what_is_folded,
}

/// The most jobs that are not finished.
const OPEN: usize = 10;
/// The most jobs that are imported.
const ELSEWHERE: usize = 12;
const HOUR: Duration = Duration::from_secs(3_600);
/// The `fold_after` of three servers, a row a round: at once, late, or never.
const FOLD_AFTER: [[Duration; 3]; 4] = {
    const LATE: Duration = Duration::from_millis(300);
    [[HOUR; 3], [Duration::ZERO, LATE, HOUR], [LATE, LATE, HOUR], [LATE, HOUR, Duration::ZERO]]
};

/// Everything that a server answers.
#[derive(Debug, PartialEq)]
struct Told {
    jobs: BTreeMap<String, Job>,
    /// The lists by one status, and by several.
    lists: Vec<Vec<String>>,
    statistics: String,
}

async fn ask(client: &Client) -> Told {
    let list = async |statuses: &[JobStatus]| {
        let statuses = statuses.iter().map(|status| i32::from(*status)).collect();
        client.list(ListJobsRequest { statuses, page_size: 1_000, ..Default::default() }).await.unwrap().jobs
    };
    let mut jobs = BTreeMap::new();
    for job in list(&[]).await {
        // A list shows a job as GetJob does, except for payload and result.
        let whole = client.get(&job.id).await.unwrap();
        let basic = Job { payload: None, result: None, ..whole.clone() };
        assert_eq!(Job { payload: None, result: None, ..job }, basic);
        jobs.insert(whole.id.clone(), whole);
    }
    let mut lists = Vec::new();
    for statuses in [
        &[JobStatus::Queued][..],
        &[JobStatus::Running],
        &[JobStatus::Succeeded, JobStatus::Failed, JobStatus::Canceled, JobStatus::DeadLetter],
        &[JobStatus::Queued, JobStatus::Running],
    ] {
        let found = list(statuses).await;
        assert!(found.iter().all(|job| statuses.contains(&job.status())), "{statuses:?}: {found:?}");
        lists.push(found.into_iter().map(|job| job.id).collect());
    }
    let told = client.statistics_of(GetStatisticsRequest::default()).await.unwrap();
    let of_types =
        told.types.iter().map(|of| (&of.r#type, of.counts, of.claimable, of.scheduled, of.oldest_queued_age.is_some()));
    let statistics = format!("{:?}", of_types.collect::<Vec<_>>());
    Told { jobs, lists, statistics }
}

/// A leased job, its lease token, and the claim's `request_id`.
#[derive(Debug, Clone)]
struct Held {
    job: String,
    token: String,
    request: String,
}

struct Calls<'a> {
    random: Seeded,
    database: &'a Database,
    elsewhere: LegacyDatabase,
    /// The imported jobs, and their status in the source.
    jobs: Vec<(String, &'static str)>,
    held: Vec<Held>,
    claims: u64,
}

impl Calls<'_> {
    /// Changes the source and imports it while the servers run. Returns the jobs that this may have changed.
    async fn import(&mut self) -> Vec<String> {
        const AS: [(&str, &str); 4] =
            [("queued", "running"), ("running", "succeeded"), ("running", "failed"), ("failed", "queued")];
        let n = self.random.below(ELSEWHERE as u64) as usize;
        let added = |id: &str, before: &str, status: &str, at: &str| {
            format!(
                "INSERT INTO job_event (job_id, ts, prev_status, next_status) VALUES ('{id}', {at}, {before}, '{status}');"
            )
        };
        let sql = if let Some((id, status)) = self.jobs.get_mut(n) {
            let ways: Vec<_> = AS.iter().filter(|(from, _)| from == status).collect();
            if ways.is_empty() {
                return Vec::new();
            }
            let (from, to) = ways[self.random.below(ways.len() as u64) as usize];
            *status = to;
            format!("UPDATE job SET status = '{to}', updated_at = now(), attempt = attempt + 1 WHERE id = '{id}';")
                + &added(id, &format!("'{from}'"), to, "now()")
        } else {
            let (id, status) = (Uuid::new_v4().to_string(), ["queued", "running"][self.random.below(2) as usize]);
            let (org, r#type) = (Uuid::nil(), ["t", "u"][self.random.below(2) as usize]);
            let mut sql = format!(
                "INSERT INTO job (id, org_id, type, status, created_at, updated_at) VALUES
                    ('{id}', '{org}', '{type}', '{status}', now() - interval '1 minute', now());"
            );
            sql += &added(&id, "NULL", "queued", "now() - interval '1 minute'");
            if status == "running" {
                sql += &added(&id, "'queued'", status, "now()");
            }
            self.jobs.push((id, status));
            sql
        };
        self.elsewhere.run(&sql).await;
        import(&self.elsewhere, self.database, &[]);
        self.jobs.iter().map(|(id, _)| id.clone()).collect()
    }

    /// Takes one of the leases out of `held`.
    fn pick(&mut self) -> Option<Held> {
        let n = self.held.len() as u64;
        (n > 0).then(|| self.random.below(n)).map(|at| self.held.swap_remove(at as usize))
    }

    fn any_job(&mut self, told: &Told) -> Option<String> {
        let n = told.jobs.len() as u64;
        (n > 0).then(|| self.random.below(n)).and_then(|at| told.jobs.keys().nth(at as usize)).cloned()
    }

    /// Makes a random call. Returns the jobs that it may have changed.
    async fn make(&mut self, client: &Client, told: &Told) -> Result<Vec<String>, Error> {
        let open =
            told.jobs.values().filter(|job| matches!(job.status(), JobStatus::Queued | JobStatus::Running)).count();
        match self.random.below(20) {
            0..4 if open < OPEN => {
                let job = NewJob::new(["t", "u"][self.random.below(2) as usize])
                    .run_timeout(HOUR)
                    .payload(&self.random.below(1_000));
                let job = job?.priority(self.random.below(3) as i32).label("l", self.random.below(3).to_string());
                let later = SystemTime::from(SystemClock.now()) + HOUR;
                let job = if self.random.below(4) == 0 { job.scheduled_at(later) } else { job };
                Ok(vec![client.create(job).await?.job.id])
            }
            4..7 => {
                self.claims += 1;
                let request = self.claims.to_string();
                let max = 1 + self.random.below(3) as i32;
                let mut claim = Claim::new("w").request_id(&request).max_jobs(max).lease(HOUR);
                if self.random.below(2) == 0 {
                    claim = claim.types(["t"]);
                }
                let leases = client.claim(claim).await?;
                let held = leases.into_iter().map(|lease| Held {
                    job: lease.job.unwrap().id,
                    token: lease.lease_token,
                    request: request.clone(),
                });
                let held: Vec<_> = held.collect();
                let jobs = held.iter().map(|held| held.job.clone()).collect();
                self.held.extend(held);
                Ok(jobs)
            }
            7 => {
                // The repeated claim finds its leases and extends them.
                let Some(held) = self.pick() else { return Ok(Vec::new()) };
                let again = client.claim(Claim::new("w").request_id(&held.request).max_jobs(3).lease(HOUR)).await?;
                assert!(again.iter().any(|lease| lease.lease_token == held.token), "{held:?} is not among {again:?}");
                let is_known = |lease: &&jobledger_client::proto::Lease| {
                    lease.lease_token == held.token || self.held.iter().any(|held| held.token == lease.lease_token)
                };
                assert!(again.iter().all(|lease| is_known(&lease)), "{again:?}");
                self.held.push(held);
                Ok(again.into_iter().map(|lease| lease.job.unwrap().id).collect())
            }
            8 | 9 => {
                let Some(held) = self.pick() else { return Ok(Vec::new()) };
                let progress = (self.random.below(2) == 0).then(|| self.random.below(100) as i32);
                let beat = LeaseHeartbeat { lease_token: held.token.clone(), progress, ..Default::default() };
                let extend_by = jobledger_client::prost_types::Duration { seconds: 7_200, nanos: 0 };
                let beat = HeartbeatRequest { worker_id: "w".into(), leases: vec![beat], extend_by: Some(extend_by) };
                assert!(!client.heartbeat(beat).await?[0].lease_lost, "{held:?}");
                let jobs = vec![held.job.clone()];
                self.held.push(held);
                Ok(jobs)
            }
            10 | 11 => {
                let Some(held) = self.pick() else { return Ok(Vec::new()) };
                let stage = self.random.next().to_string();
                client.update(Report::progress(&held.job).lease(&held.token).stage(stage)).await?;
                let jobs = vec![held.job.clone()];
                self.held.push(held);
                Ok(jobs)
            }
            12 => {
                let Some(held) = self.pick() else { return Ok(Vec::new()) };
                let report = match self.random.below(3) {
                    0 => Report::succeeded(&held.job).result(&self.random.below(1_000))?,
                    1 => Report::failed(&held.job, "E", "it was so"),
                    _ => Report::released(&held.job),
                };
                client.update(report.lease(&held.token)).await?;
                Ok(vec![held.job])
            }
            13 => {
                let Some(job) = self.any_job(told) else { return Ok(Vec::new()) };
                client.raw().cancel_job(CancelJobRequest { job_id: job.clone(), ..Default::default() }).await?;
                Ok(vec![job])
            }
            14 => {
                let Some(job) = self.any_job(told) else { return Ok(Vec::new()) };
                client.raw().retry_job(RetryJobRequest { job_id: job.clone(), ..Default::default() }).await?;
                Ok(vec![job])
            }
            15..18 => Ok(self.import().await),
            _ => {
                // A worker that got the job without a claim starts it.
                let Some(job) = self.any_job(told) else { return Ok(Vec::new()) };
                if told.jobs[&job].worker_id.is_empty() {
                    client.update(Report::start(&job)).await?;
                }
                Ok(vec![job])
            }
        }
    }
}

async fn no_reader_can_tell_what_is_folded(database: Database) {
    let random = Seeded::new(Seeded::from_environment("folding"));
    let elsewhere = LegacyDatabase::empty().await;
    let mut calls = Calls { random, database: &database, elsewhere, jobs: Vec::new(), held: Vec::new(), claims: 0 };
    // SQLite has one server at a time.
    let servers = if database.is_postgres() { 3 } else { 1 };
    for round in 0..short_or_long(4, 40) {
        let mut running = Vec::new();
        for fold_after in &FOLD_AFTER[round % FOLD_AFTER.len()][..servers] {
            let mut config = database.config();
            config.fold_after = *fold_after;
            running.push(TestServer::start(config).await);
        }
        let clients: Vec<_> = running.iter().map(TestServer::client).collect();
        let mut told = ask(&clients[0]).await;
        for _ in 0..60 {
            let at = calls.random.below(clients.len() as u64) as usize;
            // The call may be refused.
            let touched = match calls.make(&clients[at], &told).await {
                Ok(touched) => touched,
                Err(Error::InvalidTransition { .. }) => Vec::new(),
                Err(error) => panic!("{error:?}"),
            };
            let touched: BTreeSet<_> = touched.into_iter().collect();
            let now = ask(&clients[0]).await;
            for client in &clients[1..] {
                assert_eq!(ask(client).await, now, "servers differ after a call on {touched:?}");
            }
            for (id, before) in told.jobs.iter().filter(|(id, _)| !touched.contains(*id)) {
                assert_eq!(now.jobs.get(id), Some(before), "nobody has named it: {touched:?}");
            }
            for (before, after) in told.jobs.iter().filter_map(|(id, before)| Some((before, now.jobs.get(id)?))) {
                let ends = |job: &Job| job.lease_expires_at.map(|at| (at.seconds, at.nanos));
                let is_held_still = after.attempt == before.attempt && ends(after).is_some();
                assert!(!is_held_still || ends(after) >= ends(before), "a lease was shortened: {before:?}, {after:?}");
            }
            calls.held.retain(|held| now.jobs[&held.job].status() == JobStatus::Running);
            told = now;
        }
        for server in running {
            server.stop().await;
        }
        database.verify().await;
    }
}

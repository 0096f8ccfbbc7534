//! Runs attacks, and what only burns processor time, in processes of their own. They share neither memory nor locks with the
//! clients that don't attack, nor their part of the processors, as on another machine.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, ChildStdout, Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use rustix::time::{ClockId, clock_gettime};
use serde::{Serialize, de::DeserializeOwned};
use tokio::task::JoinSet;

use super::attacks::{ATTACKS, Tenant};
use crate::support::cluster::environment;

/// What tells the process what to do, in JSON.
const TOLD: &str = "JOBLEDGER_TEST_TOLD";
/// What the process says once it has begun.
const BEGUN: &str = "it has begun";

/// A process of its own, which goes on until this is dropped.
pub(super) struct Apart {
    process: Child,
    _output: BufReader<ChildStdout>,
}

impl Apart {
    /// Starts these attacks, by their names, and returns once they have begun.
    pub(super) fn attack(attacks: &[&str], tenant: &Tenant, seed: u64) -> Self {
        Self::start("a_process_attacks_as_it_is_told", &(attacks, &tenant.address, &tenant.token, seed))
    }

    /// Burns this many quarters of a processor by this many threads.
    pub(super) fn burn(quarters: u32, threads: u32) -> Self {
        Self::start("a_process_burns_as_it_is_told", &(quarters, threads))
    }

    /// Starts a test of this file.
    fn start(test: &str, told: &impl Serialize) -> Self {
        let tests = std::env::current_exe().expect("the test runs from a file");
        let mut process = Command::new(tests)
            .args(["--exact", &format!("hostile::attackers::{test}"), "--nocapture"])
            .env(TOLD, serde_json::to_string(told).expect("texts and numbers"))
            // It ends with this process, however that ends.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the test starts");
        let mut output = BufReader::new(process.stdout.take().expect("it is piped"));
        let mut line = String::new();
        while !line.trim_end().ends_with(BEGUN) {
            line.clear();
            assert!(output.read_line(&mut line).expect("text") > 0, "the process ended");
        }
        Self { process, _output: output }
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        self.process.kill().expect("it runs");
        self.process.wait().expect("it has ended");
    }
}

/// What this process is told to do, if anything. It then has a session of its own, and so its own part of the processors.
fn told<T: DeserializeOwned>() -> Option<T> {
    let told = environment(TOLD)?;
    rustix::process::setsid().expect("it leads no group yet");
    Some(serde_json::from_str(&told).expect("it is told in JSON"))
}

/// Says that it has begun, and waits until nobody needs this process.
fn go_on() {
    println!("{BEGUN}");
    std::io::stdin().read_to_end(&mut Vec::new()).expect("nothing is written");
}

/// Without being told it has nothing to do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_attacks_as_it_is_told() {
    let Some((attacks, address, token, seed)) = told::<(Vec<String>, String, String, u64)>() else { return };
    let tenant = Arc::new(Tenant { address, token });
    let mut tasks = JoinSet::new();
    for attack in attacks {
        let (_, attack) = ATTACKS.into_iter().find(|(name, _)| *name == attack).expect("there is such an attack");
        tasks.spawn(attack(Arc::clone(&tenant), seed));
    }
    tokio::task::spawn_blocking(go_on).await.expect("it only waits");
}

/// Without being told it has nothing to do.
#[test]
fn a_process_burns_as_it_is_told() {
    let Some((quarters, threads)) = told::<(u32, u32)>() else { return };
    for n in 0..threads {
        let part = f64::from(quarters) / 4.0 / f64::from(threads);
        thread::spawn(move || burn(part.min(1.0), f64::from(n) / f64::from(threads)));
    }
    go_on();
}

/// Takes this part of a processor's time, for ever. What it didn't get within a tenth of a second it does without.
fn burn(part: f64, phase: f64) {
    const SLICE: Duration = Duration::from_millis(8);
    const PATIENCE: Duration = Duration::from_millis(100);
    let taken = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).expect("it isn't negative");
    let mut next = Instant::now() + SLICE.mul_f64(phase);
    loop {
        thread::sleep(next.saturating_duration_since(Instant::now()));
        let until = taken() + SLICE.mul_f64(part);
        while taken() < until {
            std::hint::spin_loop();
        }
        let now = Instant::now();
        next = (next + SLICE).max(now.checked_sub(PATIENCE).unwrap_or(now));
    }
}

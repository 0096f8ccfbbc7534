//! Runs attacks in a process of their own. They share neither memory nor locks with the clients that don't attack, as on
//! another machine.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, ChildStdout, Command, Stdio},
    sync::Arc,
};

use tokio::task::{JoinSet, spawn_blocking};

use super::attacks::{ATTACKS, Tenant};
use crate::support::cluster::environment;

/// The test that attacks, and the variable that tells it whom, how and with what seed.
const TEST: &str = "hostile::attackers::a_process_attacks_as_it_is_told";
const TOLD: &str = "JOBLEDGER_TEST_ATTACKERS";
/// What the process says once the attacks have begun.
const BEGUN: &str = "the attacks have begun";

/// A process that attacks until this is dropped.
pub(super) struct Attackers {
    process: Child,
    _output: BufReader<ChildStdout>,
}

impl Attackers {
    /// Starts these attacks, by their names, and returns once they have begun.
    pub(super) fn start(attacks: &[&str], tenant: &Tenant, seed: u64) -> Self {
        let told = (attacks, &tenant.address, &tenant.token, seed);
        let tests = std::env::current_exe().expect("the test runs from a file");
        let mut process = Command::new(tests)
            .args(["--exact", TEST, "--nocapture"])
            .env(TOLD, serde_json::to_string(&told).expect("texts and a number"))
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
            assert!(output.read_line(&mut line).expect("text") > 0, "the attackers ended");
        }
        Self { process, _output: output }
    }
}

impl Drop for Attackers {
    fn drop(&mut self) {
        self.process.kill().expect("it runs");
        self.process.wait().expect("it has ended");
    }
}

/// Without being told it has nothing to do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_attacks_as_it_is_told() {
    let Some(told) = environment(TOLD) else { return };
    let (attacks, address, token, seed): (Vec<String>, String, String, u64) =
        serde_json::from_str(&told).expect("it is told in JSON");
    let tenant = Arc::new(Tenant { address, token });
    let mut tasks = JoinSet::new();
    for attack in attacks {
        let (_, attack) = ATTACKS.into_iter().find(|(name, _)| *name == attack).expect("there is such an attack");
        tasks.spawn(attack(Arc::clone(&tenant), seed));
    }
    println!("{BEGUN}");
    let ended = spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()));
    ended.await.expect("it reads").expect("nothing is written");
}

//! Tenants that attack with a valid credential, and strangers. Another org's calls of every kind keep half their rate.
//! Their p99 is at most three times what it is while as much processor time is burnt elsewhere, by as many threads.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use jobledger_server::domain::access::Role;
use tokio::time::sleep;
use uuid::Uuid;

use super::{
    MEMORY_MIB,
    attackers::Apart,
    attacks::{ATTACKS, Tenant},
    victims::{Kind, TOKENS_A_SECOND, Victims},
};
use crate::{
    callers::access::{token, token_with},
    callers::jwt::{AUDIENCE, ISSUER, keys_of_nobody},
    support::cluster::environment,
    support::harness::{Database, on_both_databases, resident, short_or_long},
    support::program::Program,
    support::seeded::Seeded,
};

on_both_databases! {
    hostile_tenants_take_no_others_rate_nor_patience_nor_memory,
    attacks_at_random_take_no_others_rate_nor_patience_nor_memory,
}

/// Latencies below this are noise.
const FLOOR: Duration = Duration::from_millis(20);

/// The least part of its rate that a kind of call must keep, and the bound of its p99. The long form checks both, on an
/// optimised program. Without optimisation the victims alone take all processors, so the short form checks that all calls are
/// answered within [`ANSWERED_WITHIN`], that none fails, and the memory.
const LEAST_RATE: f64 = 0.5;
const LONGEST_P99: f64 = 3.0;
const ANSWERED_WITHIN: Duration = Duration::from_secs(20);

/// For how many seconds this machine's processors were busy, all together.
fn busy() -> f64 {
    let stat = std::fs::read_to_string("/proc/stat").expect("Linux has it");
    let fields: Vec<f64> =
        stat.lines().next().unwrap().split_whitespace().skip(1).map(|n| n.parse().unwrap()).collect();
    // Without the time for which they were idle or waited for a disk.
    (fields.iter().take(8).sum::<f64>() - fields[3] - fields[4]) / 100.0
}

/// How many threads of this machine run or wait for a processor.
fn running() -> u64 {
    let stat = std::fs::read_to_string("/proc/stat").expect("Linux has it");
    let running = stat.lines().find_map(|line| line.strip_prefix("procs_running ")).expect("Linux counts them");
    running.parse().expect("it is a number")
}

/// The processor time that an attack takes: quarters of a processor, by this many threads.
type Load = (u32, u32);

/// What was measured so far, and what went wrong.
struct Measured {
    /// Measurements of the victims while this load is burnt.
    burnt: BTreeMap<Load, BTreeMap<&'static str, Kind>>,
    /// The machine without attacks.
    quiet: Busy,
    time: Duration,
    failures: Vec<String>,
}

/// How busy the machine was.
#[derive(Debug, Clone, Copy)]
struct Busy {
    processors: f64,
    /// Threads that ran or waited for a processor, on average.
    running: f64,
}

/// Looks at the server's memory and the machine's threads, until it is dropped.
struct Watch {
    most_mib: Arc<AtomicU64>,
    /// Sum and number of what [`running`] told.
    running: Arc<Mutex<(u64, u64)>>,
    is_over: Arc<AtomicBool>,
    began: (Instant, f64),
}

impl Watch {
    fn start(process: u32) -> Self {
        let (most_mib, is_over) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let sum = Arc::<Mutex<(u64, u64)>>::default();
        let (most, over, sums) = (Arc::clone(&most_mib), Arc::clone(&is_over), Arc::clone(&sum));
        thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                most.fetch_max(resident(process) >> 10, Ordering::Relaxed);
                let mut sum = sums.lock().unwrap();
                *sum = (sum.0 + running(), sum.1 + 1);
                drop(sum);
                thread::sleep(Duration::from_millis(20));
            }
        });
        Self { most_mib, running: sum, is_over, began: (Instant::now(), busy()) }
    }

    /// How busy the machine was since this began, and the server's peak of memory in MiB.
    fn end(self) -> (Busy, u64) {
        let (began, before) = self.began;
        let processors = (busy() - before) / began.elapsed().as_secs_f64();
        let (sum, looks) = *self.running.lock().unwrap();
        let running = sum as f64 / looks.max(1) as f64;
        (Busy { processors, running }, self.most_mib.load(Ordering::Relaxed))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

impl Busy {
    /// The load to burn for a comparison. Threads are rounded up to a power of two, so that comparisons are few.
    fn load(self) -> Load {
        ((self.processors * 4.0).round() as u32, (self.running.round() as u32).next_power_of_two().max(2))
    }
}

impl fmt::Display for Busy {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:.1} processors by {:.1} threads", self.processors, self.running)
    }
}

/// The server, the clients that don't attack (victims), and what was measured before.
struct Scene {
    program: Program,
    victims: Victims,
    measured: Measured,
    /// The server that is attacked instead, if there is one, and its database.
    elsewhere: Option<(Program, Database)>,
}

impl Scene {
    /// Starts a server for this many measurements. Without earlier ones it measures the victims alone.
    async fn set(database: &Database, phases: u32, time: Duration, measured: Option<Measured>) -> Self {
        database.open().await.close().await;
        let victim = Uuid::new_v4();
        let mut fresh = Vec::new();
        for _ in 0..(time + Duration::from_secs(1)).as_secs_f64() as u32 * TOKENS_A_SECOND * phases {
            fresh.push(token_with(database, Some(victim), &[Role::Observer], |_| {}).await.0);
        }
        let peaceful = token(database, Some(victim), Role::Admin).await;
        let keys = tempfile::NamedTempFile::new().unwrap();
        keys_of_nobody(keys.path());
        let keys = ["--jwt-keys", keys.path().to_str().unwrap(), "--jwt-issuer", ISSUER, "--jwt-audience", AUDIENCE];
        let more = [&["--log", "error", "--require-auth", "--legacy-http"][..], &keys].concat();
        let program = Program::in_own_session(database, &more);
        let victims = Victims::start(&program.address, &peaceful, fresh);
        victims.measure(Duration::from_secs(2)).await;
        let measured = match measured {
            Some(measured) => measured,
            None => {
                let watch = Watch::start(program.id());
                let alone = victims.measure(time).await;
                let (quiet, _) = watch.end();
                println!("alone, {quiet}: {}", shown(&alone));
                Measured { burnt: BTreeMap::from([((0, 0), alone)]), quiet, time, failures: Vec::new() }
            }
        };
        Self { program, victims, measured, elsewhere: None }
    }

    /// A tenant with its own org. With `JOBLEDGER_TEST_ELSEWHERE` it attacks another server, with a database of its own: what
    /// the victims lose then, they lose to the machine that they share with it, not to the attack.
    async fn tenant(&mut self, database: &Database) -> Tenant {
        let is_elsewhere = environment("JOBLEDGER_TEST_ELSEWHERE").is_some();
        let attacked = if is_elsewhere { database.another().await } else { database.clone() };
        // A server that asks for credentials does not start before there is one.
        let token = token(&attacked, Some(Uuid::new_v4()), Role::Admin).await;
        let mut address = self.program.address.clone();
        if is_elsewhere {
            let more = ["--log", "error", "--require-auth", "--legacy-http"];
            let program = Program::in_own_session(&attacked, &more);
            address.clone_from(&program.address);
            self.elsewhere = Some((program, attacked));
        }
        let tenant = Tenant { address, token };
        tenant.prepare().await;
        tenant
    }

    /// Measures the victims during these attacks. Prints the processors and the memory that the attacks take and the
    /// worst ratios, and notes failures.
    async fn attacked(&mut self, attacks: &[&str], tenant: &Tenant, seed: u64) {
        let name = attacks.join(" + ");
        let attackers = Apart::attack(attacks, tenant, seed);
        sleep(Duration::from_millis(300)).await;
        let watch = Watch::start(self.program.id());
        let kinds = self.measured.burnt[&(0, 0)].len();
        let goes_on = |answered, past| short_or_long(true, false) && answered < kinds && past < ANSWERED_WITHIN;
        let attacked = self.victims.measure_while(self.measured.time, goes_on).await;
        let (busy, memory) = watch.end();
        drop(attackers);
        sleep(Duration::from_millis(700)).await;
        let taken = self.taken(busy, &attacked);
        // The short form compares nothing.
        let load @ (quarters, threads) = short_or_long((0, 0), taken.load());
        if !self.measured.burnt.contains_key(&load) {
            let (burning, watch) = (Apart::burn(quarters, threads), Watch::start(self.program.id()));
            let measured = self.victims.measure(self.measured.time).await;
            let (busy, _) = watch.end();
            drop(burning);
            let burnt = self.taken(busy, &measured);
            println!("{quarters} quarters of processors burnt by {threads} threads, {burnt}: {}", shown(&measured));
            self.measured.burnt.insert(load, measured);
        }
        let burnt = &self.measured.burnt[&load];
        let (mut worst_rate, mut worst_p99) = ((f64::INFINITY, ""), (0.0, ""));
        for (kind, beside) in burnt {
            let rate = attacked.get(kind).map_or(0.0, |kind| kind.rate / beside.rate);
            let p99 = attacked
                .get(kind)
                .map_or(f64::INFINITY, |kind| kind.p99.max(FLOOR).as_secs_f64() / beside.p99.max(FLOOR).as_secs_f64());
            worst_rate = if rate < worst_rate.0 { (rate, *kind) } else { worst_rate };
            worst_p99 = if p99 > worst_p99.0 { (p99, *kind) } else { worst_p99 };
        }
        println!(
            "{name} | {taken} | {:.2} ({}) | {:.1} ({}) | {memory} MiB",
            worst_rate.0, worst_rate.1, worst_p99.0, worst_p99.1
        );
        let all = || format!("{}\nbeside burnt processors: {}", shown(&attacked), shown(burnt));
        if worst_rate.0 < short_or_long(f64::MIN_POSITIVE, LEAST_RATE) {
            self.measured.failures.push(format!(
                "{name}: {} keeps {:.2} of its rate: {}",
                worst_rate.1,
                worst_rate.0,
                all()
            ));
        } else if worst_p99.0 > short_or_long(f64::INFINITY, LONGEST_P99) {
            let (times, kind) = worst_p99;
            self.measured.failures.push(format!("{name}: {kind}'s p99 is {times:.1} times as long: {}", all()));
        } else if memory > MEMORY_MIB {
            self.measured.failures.push(format!("{name}: {memory} MiB"));
        }
    }

    /// What was taken of the machine beside the victims' part of it. What they don't do takes no time: what they lost was taken
    /// from them.
    fn taken(&self, busy: Busy, victims: &BTreeMap<&'static str, Kind>) -> Busy {
        let calls = |kinds: &BTreeMap<&'static str, Kind>| kinds.values().map(|kind| kind.rate).sum::<f64>();
        let kept = (calls(victims) / calls(&self.measured.burnt[&(0, 0)])).min(1.0);
        let quiet = self.measured.quiet;
        Busy {
            processors: (busy.processors - quiet.processors * kept).max(0.0),
            running: (busy.running - quiet.running * kept).max(0.0),
        }
    }

    /// Ends the server.
    fn end(self) -> Measured {
        assert!(self.program.end_by("TERM").success());
        self.measured
    }
}

impl Measured {
    #[track_caller]
    fn conclude(self) {
        assert!(self.failures.is_empty(), "{}", self.failures.join("\n"));
    }
}

/// The attacks whose names contain any of these parts, which `|` separates, or all of them, `+`.
fn chosen(parts: &str, separator: char) -> Vec<&'static str> {
    let is_chosen = |name: &str| parts.split(separator).any(|part| name.contains(part.trim()));
    ATTACKS.into_iter().map(|(name, _)| name).filter(|name| is_chosen(name)).collect()
}

fn shown(kinds: &BTreeMap<&'static str, Kind>) -> String {
    let shown: Vec<_> = kinds.iter().map(|(kind, of)| format!("{kind} {of}")).collect();
    shown.join(", ")
}

/// In the long form each attack has a server and a database of its own: what one org has left behind, jobs that expire for
/// instance, would be a second attack beside the next. In the short form all attacks share a server, so its memory shows what
/// they leave behind.
async fn hostile_tenants_take_no_others_rate_nor_patience_nor_memory(database: Database) {
    let time = Duration::from_secs(short_or_long(1, 10));
    // `JOBLEDGER_TEST_ATTACK` chooses attacks by parts of their names, separated by `|`.
    let attacks = chosen(&environment("JOBLEDGER_TEST_ATTACK").unwrap_or_default(), '|');
    let phases = 2 * attacks.len() as u32 + 2;
    let mut scene = Scene::set(&database, short_or_long(phases, 4), time, None).await;
    let (mut database, mut tenant) = (database.clone(), scene.tenant(&database).await);
    for (n, attack) in attacks.into_iter().enumerate() {
        if n > 0 && short_or_long(false, true) {
            database = database.another().await;
            scene = Scene::set(&database, 3, time, Some(scene.end())).await;
            tenant = scene.tenant(&database).await;
        }
        scene.attacked(&[attack], &tenant, 0).await;
    }
    scene.end().conclude();
}

async fn attacks_at_random_take_no_others_rate_nor_patience_nor_memory(database: Database) {
    const AT_ONCE: usize = 3;
    let time = Duration::from_secs(short_or_long(3, 20));
    // `JOBLEDGER_TEST_ATTACK` names the attacks of a single round by parts of their names, separated by `+`.
    let named = environment("JOBLEDGER_TEST_ATTACK").map(|parts| chosen(&parts, '+'));
    let (seeds, rounds) = if named.is_some() { (1, 1) } else { short_or_long((1, 1), (3, 6)) };
    let mut measured = None;
    for n in 0..seeds {
        let seed = Seeded::from_environment("attacks at random");
        let mut random = Seeded::new(seed);
        for round in 0..rounds {
            let at_random = (0..AT_ONCE).map(|_| ATTACKS[random.below(ATTACKS.len() as u64) as usize].0).collect();
            let attacks: Vec<_> = named.clone().unwrap_or(at_random);
            let database = if (n, round) == (0, 0) { database.clone() } else { database.another().await };
            let mut scene = Scene::set(&database, 4, time, measured.take()).await;
            let tenant = scene.tenant(&database).await;
            scene.attacked(&attacks, &tenant, random.next()).await;
            measured = Some(scene.end());
        }
    }
    measured.expect("there are rounds").conclude();
}

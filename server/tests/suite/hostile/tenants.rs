//! Tenants that attack with a valid credential, and strangers. Another org's calls of every kind keep half their rate.
//! Their p99 is at most three times what it is while as much processor time is burnt elsewhere.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
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
    attackers::Attackers,
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

/// Threads that burn processor time until they are dropped.
struct Burning(Arc<AtomicBool>, Vec<thread::JoinHandle<()>>);

impl Burning {
    /// Burns this many quarters of a processor.
    fn quarters(quarters: u32) -> Self {
        const SLICE: Duration = Duration::from_millis(8);
        let is_over = Arc::<AtomicBool>::default();
        let burn = |is_over: Arc<AtomicBool>, part: f64| {
            while !is_over.load(Ordering::Relaxed) {
                let until = Instant::now() + SLICE.mul_f64(part);
                while Instant::now() < until {
                    std::hint::spin_loop();
                }
                thread::sleep(SLICE.mul_f64(1.0 - part));
            }
        };
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let part = (f64::from(quarters) / 4.0 / processors as f64).min(1.0);
        let threads = (0..processors).map(|_| {
            let is_over = Arc::clone(&is_over);
            thread::spawn(move || burn(is_over, part))
        });
        let threads = threads.collect();
        Self(is_over, threads)
    }
}

impl Drop for Burning {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        self.1.drain(..).for_each(|thread| thread.join().expect("it only counts"));
    }
}

/// For how many seconds this machine's processors were busy, all together.
fn busy() -> f64 {
    let stat = std::fs::read_to_string("/proc/stat").expect("Linux has it");
    let fields: Vec<f64> =
        stat.lines().next().unwrap().split_whitespace().skip(1).map(|n| n.parse().unwrap()).collect();
    // Without the time for which they were idle or waited for a disk.
    (fields.iter().take(8).sum::<f64>() - fields[3] - fields[4]) / 100.0
}

/// What was measured so far, and what went wrong.
struct Measured {
    /// Measurements of the victims while this many quarters of a processor are burnt.
    burnt: BTreeMap<u32, BTreeMap<&'static str, Kind>>,
    /// How busy the machine is without attacks, in processors.
    quiet: f64,
    time: Duration,
    failures: Vec<String>,
}

/// The server, the clients that don't attack (victims), and what was measured before.
struct Scene {
    program: Program,
    victims: Victims,
    measured: Measured,
    most_mib: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
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
        let program = Program::start_with(database, &more);
        let victims = Victims::start(&program.address, &peaceful, fresh);
        let (most_mib, is_over) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let (process, most, over) = (program.id(), Arc::clone(&most_mib), Arc::clone(&is_over));
        thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                most.fetch_max(resident(process) >> 10, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(20));
            }
        });
        victims.measure(Duration::from_secs(2)).await;
        let measured = match measured {
            Some(measured) => measured,
            None => {
                let before = busy();
                let alone = victims.measure(time).await;
                let quiet = (busy() - before) / time.as_secs_f64();
                println!("alone, {quiet:.2} processors: {}", shown(&alone));
                Measured { burnt: BTreeMap::from([(0, alone)]), quiet, time, failures: Vec::new() }
            }
        };
        Self { program, victims, measured, most_mib, is_over }
    }

    /// A tenant with its own org.
    async fn tenant(&self, database: &Database) -> Tenant {
        let token = token(database, Some(Uuid::new_v4()), Role::Admin).await;
        let tenant = Tenant { address: self.program.address.clone(), token };
        tenant.prepare().await;
        tenant
    }

    /// Measures the victims during these attacks. Prints the processors and the memory that the attacks take and the
    /// worst ratios, and notes failures.
    async fn attacked(&mut self, attacks: &[&str], tenant: &Tenant, seed: u64) {
        let name = attacks.join(" + ");
        let attackers = Attackers::start(attacks, tenant, seed);
        sleep(Duration::from_millis(300)).await;
        self.most_mib.store(0, Ordering::Relaxed);
        let before = busy();
        let kinds = self.measured.burnt[&0].len();
        let goes_on = |answered, past| short_or_long(true, false) && answered < kinds && past < ANSWERED_WITHIN;
        let began = Instant::now();
        let attacked = self.victims.measure_while(self.measured.time, goes_on).await;
        // What victims don't do takes no time: what they lost went to the attack, too.
        let calls = |kinds: &BTreeMap<&'static str, Kind>| kinds.values().map(|kind| kind.rate).sum::<f64>();
        let kept = (calls(&attacked) / calls(&self.measured.burnt[&0])).min(1.0);
        let taken = ((busy() - before) / began.elapsed().as_secs_f64() - self.measured.quiet * kept).max(0.0);
        let memory = self.most_mib.load(Ordering::Relaxed);
        drop(attackers);
        sleep(Duration::from_millis(700)).await;
        let quarters = (taken * 4.0).round() as u32;
        if !self.measured.burnt.contains_key(&quarters) {
            let burning = Burning::quarters(quarters);
            let measured = self.victims.measure(self.measured.time).await;
            drop(burning);
            println!("{quarters} quarters of processors burnt: {}", shown(&measured));
            self.measured.burnt.insert(quarters, measured);
        }
        let burnt = &self.measured.burnt[&quarters];
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
            "{name} | {taken:.1} processors | {:.2} ({}) | {:.1} ({}) | {memory} MiB",
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

    /// Ends the server.
    fn end(self) -> Measured {
        self.is_over.store(true, Ordering::Relaxed);
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
    let shown: Vec<_> = kinds.iter().map(|(kind, of)| format!("{kind} {:.0}/s {:.1?}", of.rate, of.p99)).collect();
    shown.join(", ")
}

/// In the long form each attack has a server and a database of its own: what one org has left behind, jobs that expire for
/// instance, would be a second attack beside the next. In the short form all attacks share a server, so its memory shows what
/// they leave behind.
async fn hostile_tenants_take_no_others_rate_nor_patience_nor_memory(database: Database) {
    let time = Duration::from_secs(short_or_long(2, 10));
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
    let rounds = short_or_long(1, 6);
    // `JOBLEDGER_TEST_ATTACK` names the attacks of a single round by parts of their names, separated by `+`.
    let named = environment("JOBLEDGER_TEST_ATTACK").map(|parts| chosen(&parts, '+'));
    let mut measured = None;
    for n in 0..short_or_long(1, 3) {
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

//! Servers behind pgbouncer in session mode, as docs/postgresql.md describes it. Skipped where pgbouncer is not installed.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Instant,
};

use jobledger_client::{Claim, Follow, Item, NewJob, Report};
use jobledger_server::Config;
use tokio::{net::TcpStream, time::timeout};

use crate::{
    support::cluster::{OWNER, SERVER},
    support::harness::{Database, PATIENCE, TestServer, fixed_address, root},
};

/// A pgbouncer that is killed when its test ends.
struct Pooler(Child);

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn installed() -> Option<PathBuf> {
    ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer", "/usr/local/bin/pgbouncer"]
        .map(PathBuf::from)
        .into_iter()
        .find(|path| path.is_file())
}

/// The settings that the documentation asks for.
fn documented() -> String {
    let text = fs::read_to_string(root().join("docs/postgresql.md")).unwrap();
    let lines = text.split("```ini\n").nth(1).and_then(|rest| rest.split("```").next());
    lines.expect("there are such lines").to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_work_behind_pgbouncer_as_the_documentation_has_it() {
    let Some(program) = installed() else {
        println!("pgbouncer is not installed");
        return;
    };
    let database = Database::postgres().await;
    let folder = tempfile::TempDir::new().unwrap();
    // If the tests run as root, pgbouncer runs as nobody, and must be able to read the folder.
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let address = fixed_address();
    let (_, port) = address.split_once(':').unwrap();
    let users = folder.path().join("users");
    fs::write(&users, format!("\"{SERVER}\" \"\"\n\"{OWNER}\" \"\"\n")).unwrap();
    let settings = format!(
        "[databases]\n* = host={} port=5432\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
         auth_type = trust\nauth_file = {}\ndefault_pool_size = 40\n{}",
        database.socket().display(),
        users.display(),
        documented()
    );
    let file = folder.path().join("pgbouncer.ini");
    fs::write(&file, settings).unwrap();
    let _pooler = start(&program, &file, &address).await;
    let url = format!("postgres://{SERVER}@{address}/{}", database.name());
    let config = || Config::new(url.parse().unwrap());
    let (first, second) = (TestServer::start(config()).await, TestServer::start(config()).await);
    let (here, there) = (first.client(), second.client());
    let mut events = here.subscribe(Follow::org().after(0)).await.unwrap();
    let began = Instant::now();
    for _ in 0..20 {
        there.create(NewJob::new("t")).await.unwrap();
        let lease = there.claim(Claim::new("w")).await.unwrap().remove(0);
        here.update(Report::succeeded(&lease.job.unwrap().id).lease(&lease.lease_token)).await.unwrap();
    }
    let mut seen = 0;
    while seen < 60 {
        if let Item::Event(event) = timeout(PATIENCE, events.next()).await.unwrap().unwrap().unwrap() {
            seen += 1;
            assert_eq!(event.seq, seen);
        }
    }
    println!("60 events in {:?}", began.elapsed());
    first.stop().await;
    second.stop().await;
    database.verify().await;
}

async fn start(program: &Path, settings: &Path, address: &str) -> Pooler {
    let mut command = Command::new(program);
    if is_root() {
        command.args(["-u", "nobody"]);
    }
    let pooler = Pooler(command.arg(settings).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    let listens = async { while TcpStream::connect(address).await.is_err() {} };
    timeout(PATIENCE, listens).await.expect("pgbouncer listens");
    pooler
}

fn is_root() -> bool {
    let output = Command::new("id").arg("-u").output().expect("id runs");
    output.stdout == b"0\n"
}

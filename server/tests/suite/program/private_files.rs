//! Files with callers' data. Only their owner can read them, whatever the umask is, and they are never written through a link.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    process::{Command, Output},
};

use jobledger_client::NewJob;

use crate::{
    legacy::database::LegacyDatabase,
    support::harness::Database,
    support::program::{Program, command},
};

/// Runs the program from a shell whose umask lets everybody read.
fn run(arguments: &[&str]) -> Output {
    let wanted = command(arguments);
    let mut shell = Command::new("sh");
    shell.args(["-c", r#"umask 022 && exec "$0" "$@""#]).arg(wanted.get_program()).args(wanted.get_args());
    shell.output().expect("the program starts")
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// Asserts that nobody else can read the files in a folder. Returns their names.
#[track_caller]
fn assert_private(folder: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(mode(&path) & 0o077, 0, "{}", path.display());
        names.push(path.file_name().unwrap().to_str().unwrap().to_owned());
    }
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_program_writes_nobody_else_can_read() {
    let database = Database::sqlite();
    let folder = database.path().parent().unwrap().to_owned();
    let file = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let (url, old) = (database.url(), LegacyDatabase::with_rows(3).await);
    old.run("UPDATE jobs SET progress = 250").await;
    let import = run(&["import", "--from", &old.url(), "--database-url", &url, "--refused", &file("refused")]);
    assert!(matches!(import.status.code(), Some(0 | 1)), "{}", String::from_utf8_lossy(&import.stderr));
    let program = Program::start(&database);
    program.client().create(NewJob::new("t")).await.unwrap();
    for arguments in [
        &["token", "create", "--operator", "--database-url", &url][..],
        &["backup", &file("copy.db"), "--database-url", &url],
        &["export", "--legacy", "--output", &file("export.sql"), "--database-url", &url],
    ] {
        let output = run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    let there = assert_private(&folder);
    for name in ["copy.db", "export.sql", "ledger.db", "ledger.db-lock", "ledger.db-wal", "refused"] {
        assert!(there.iter().any(|found| found == name), "{name} is missing in {there:?}");
    }
    assert!(program.end_by("TERM").success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_file_is_written_through_a_link() {
    let database = Database::sqlite();
    database.open().await.close().await;
    let folder = database.path().parent().unwrap().to_owned();
    let (victim, link) = (folder.join("victim"), folder.join("link"));
    fs::write(&victim, "of somebody else").unwrap();
    symlink(&victim, &link).unwrap();
    let (url, old, link) = (database.url(), LegacyDatabase::with_rows(1).await.url(), link.to_str().unwrap());
    for arguments in [
        &["import", "--dry-run", "--from", &old, "--database-url", &url, "--refused", link][..],
        &["import", "--from", &old, "--database-url", &url, "--refused", link],
        &["export", "--legacy", "--output", link, "--database-url", &url],
        &["backup", link, "--database-url", &url],
    ] {
        let output = run(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(link), "{arguments:?}: {said}");
        assert_eq!(fs::read_to_string(&victim).unwrap(), "of somebody else", "{arguments:?}");
    }
    let lock = folder.join("ledger.db-lock");
    fs::remove_file(&lock).unwrap();
    symlink(&victim, &lock).unwrap();
    let output = run(&["--listen", "127.0.0.1:0", "--database-url", &url]);
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("can't lock"));
}

#[test]
fn a_lock_that_others_could_hold_is_closed_to_them_and_a_ledger_that_they_can_read_is_said() {
    let database = Database::sqlite();
    Program::start(&database).end_by("TERM");
    let lock = database.path().with_extension("db-lock");
    for path in [&lock, &database.path()] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    }
    // The server opens the ledger before it checks who could call, and ends because nobody could.
    let output = run(&["--listen", "0.0.0.0:0", "--database-url", &database.url()]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("other users can access the database"), "{said}");
    assert_eq!((mode(&lock), mode(&database.path())), (0o600, 0o644));
}

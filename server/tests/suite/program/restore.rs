//! `jobledger restore`, and copies that are put in place without it.

use std::{fs, path::PathBuf};

use jobledger_client::{Client, Error, Follow, NewJob, Token};
use jobledger_server::domain::access::Role;
use tempfile::TempDir;
use uuid::Uuid;

use crate::{
    callers::access::token_with,
    support::harness::Database,
    support::program::{Program, command},
};

const OURS: Uuid = Uuid::from_u128(7);

/// Runs a command that must succeed. Returns its standard output.
fn run(database: &Database, arguments: &[&str]) -> String {
    let done = command(&[arguments, &["--database-url", &database.url()]].concat()).output().expect("the program runs");
    assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).expect("it prints text")
}

/// Runs a command that must fail. Returns its standard error.
fn fail(database: &Database, arguments: &[&str]) -> String {
    let done = command(&[arguments, &["--database-url", &database.url()]].concat()).output().expect("the program runs");
    assert_eq!(done.status.code(), Some(1), "{arguments:?}: {}", String::from_utf8_lossy(&done.stdout));
    String::from_utf8(done.stderr).expect("it says text")
}

async fn create(client: &Client, jobs: usize) {
    client.create_all((0..jobs).map(|_| NewJob::new("t"))).await.unwrap();
}

async fn count(client: &Client) -> i64 {
    client.statistics(&[]).await.unwrap().as_of_seq
}

/// The files beside the database whose paths contain `part`.
fn beside(database: &Database, part: &str) -> Vec<PathBuf> {
    let path = database.path();
    let paths = fs::read_dir(path.parent().expect("it is in a folder")).unwrap().map(|entry| entry.unwrap().path());
    paths.filter(|path| path.to_string_lossy().contains(part)).collect()
}

/// A folder, and the path of a copy in it.
fn place() -> (TempDir, String) {
    let folder = TempDir::new().expect("a temporary directory");
    let copy = folder.path().join("copy.db").to_str().expect("it is text").to_owned();
    (folder, copy)
}

fn with_token(program: &Program, token: &str) -> Client {
    let token = Token::new(token).unwrap();
    Client::builder(format!("http://{}", program.address)).token(token).build().expect("a valid endpoint")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_is_put_in_place_of_what_a_killed_server_left() {
    let (database, (folder, copy)) = (Database::sqlite(), place());
    let (kept, _) = token_with(&database, Some(OURS), &[Role::Admin], |_| {}).await;
    let (revoked, id) = token_with(&database, Some(OURS), &[Role::Admin], |_| {}).await;
    let program = Program::start_with(&database, &["--require-auth"]);
    let client = with_token(&program, &kept);
    create(&client, 10).await;
    let mut events = client.subscribe(Follow::org().after(0)).await.unwrap();
    events.next().await.unwrap().unwrap();
    let cursor = events.cursor().expect("it was told of something").clone();
    run(&database, &["backup", &copy]);
    run(&database, &["token", "revoke", &id.to_string()]);
    let (made_since, _) = token_with(&database, Some(OURS), &[Role::Admin], |_| {}).await;
    create(&client, 20).await;

    let said = fail(&database, &["restore", &copy]);
    assert!(said.contains("in use by another jobledger server"), "{said}");
    program.kill();
    let of_killed =
        fs::metadata(format!("{}-wal", database.path().display())).expect("a server that is killed leaves one");
    assert!(of_killed.len() > 0);
    let said = run(&database, &["restore", &copy]);
    assert!(said.contains("still revoked: 1"), "{said}");
    // What others write before a server starts belongs to the restored copy.
    let mut beside_it = database.connect().await;
    sqlx::query("PRAGMA journal_mode = WAL; UPDATE ledger SET credentials = credentials + 1")
        .execute(&mut beside_it)
        .await
        .unwrap();
    let log = fs::metadata(format!("{}-wal", database.path().display())).expect("it has a log");
    assert!(log.len() > 0);
    run(&database, &["token", "list"]);

    let program = Program::start_with(&database, &["--require-auth"]);
    drop(beside_it);
    let client = with_token(&program, &kept);
    assert_eq!(count(&client).await, 10);
    for refused in [&revoked, &made_since] {
        let told = with_token(&program, refused).statistics(&[]).await;
        assert!(matches!(told, Err(Error::Unauthenticated { .. })), "{told:?}");
    }
    let told = match client.subscribe(Follow::org().resume(&cursor)).await {
        Err(error) => error,
        Ok(mut events) => events.next().await.unwrap().expect_err("the log is another"),
    };
    assert!(matches!(told, Error::EpochChanged { .. }), "{told:?}");
    create(&client, 1).await;
    assert!(program.end_by("TERM").success());
    database.verify().await;

    // The replaced database is whole.
    let [replaced] = &beside(&database, ".replaced-")[..] else { panic!("{:?}", beside(&database, "")) };
    assert!(said.contains(replaced.to_str().unwrap()), "{said}");
    let aside = TempDir::new().unwrap();
    fs::rename(replaced, aside.path().join("ledger.db")).unwrap();
    let aside = Database::sqlite_at(aside.path().to_owned());
    aside.verify().await;
    let program = Program::start_with(&aside, &["--require-auth"]);
    assert_eq!(count(&with_token(&program, &made_since)).await, 30);
    // A second restore makes another log again.
    run(&database, &["restore", &copy]);
    let told = match with_token(&Program::start_with(&database, &["--require-auth"]), &kept)
        .subscribe(Follow::org().resume(&cursor))
        .await
    {
        Err(error) => error,
        Ok(mut events) => events.next().await.unwrap().expect_err("the log is another"),
    };
    assert!(matches!(told, Error::EpochChanged { .. }), "{told:?}");
    drop(folder);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_beside_the_log_of_another_file_is_refused() {
    let (database, (_folder, copy)) = (Database::sqlite(), place());
    let program = Program::start(&database);
    create(&program.client(), 10).await;
    assert!(program.end_by("TERM").success());
    // `by_hand` is copied while nobody has the file open, `copy` is made as the documentation says.
    let by_hand = format!("{copy}.by-hand");
    fs::copy(database.path(), &by_hand).unwrap();
    let program = Program::start(&database);
    run(&database, &["backup", &copy]);
    create(&program.client(), 20).await;
    program.kill();
    let log = format!("{}-wal", database.path().display());
    let of_killed = fs::read(&log).expect("a server that is killed leaves one");
    for placed in [&copy, &by_hand] {
        fs::copy(placed, database.path()).unwrap();
        let before = fs::read(database.path()).unwrap();
        let commands: [&[&str]; 6] = [
            &["serve"],
            &["token", "list"],
            &["token", "create", "--operator"],
            &["renew-log-id"],
            &["migrate", "up"],
            &["confirm-clock"],
        ];
        for refused in commands {
            let said = fail(&database, refused);
            assert!(said.contains("does not belong to") && said.contains("jobledger restore"), "{refused:?}: {said}");
        }
        assert!(
            fs::read(database.path()).unwrap() == before && fs::read(&log).unwrap() == of_killed,
            "nothing is changed"
        );
    }
    let said = run(&database, &["restore", &copy]);
    assert!(said.contains("are valid again"), "{said}");
    let program = Program::start(&database);
    assert_eq!(count(&program.client()).await, 10);
    // A WAL of the file's own is no obstacle.
    create(&program.client(), 5).await;
    program.kill();
    let program = Program::start(&database);
    assert_eq!(count(&program.client()).await, 15);
    assert!(program.end_by("TERM").success());
    database.verify().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_can_all_be_revoked_where_it_is_not_known_which_were() {
    let (database, (_folder, copy)) = (Database::sqlite(), place());
    let (token, _) = token_with(&database, Some(OURS), &[Role::Admin], |_| {}).await;
    run(&database, &["backup", &copy]);
    fs::remove_file(database.path()).unwrap();
    let said = run(&database, &["restore", &copy]);
    assert!(
        said.contains("are valid again") && said.contains("--revoke-tokens") && !said.contains("kept as"),
        "{said}"
    );
    let program = Program::start_with(&database, &["--require-auth"]);
    create(&with_token(&program, &token), 1).await;
    assert!(program.end_by("TERM").success());
    let said = run(&database, &["restore", &copy, "--revoke-tokens"]);
    assert!(said.contains("all API tokens of the copy were revoked: 1"), "{said}");
    let program = Program::start_with(&database, &["--require-auth"]);
    let told = with_token(&program, &token).statistics(&[]).await;
    assert!(matches!(told, Err(Error::Unauthenticated { .. })), "{told:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_not_be_restored_is_said_and_changes_nothing() {
    let (database, (folder, copy)) = (Database::sqlite(), place());
    database.open().await.close().await;
    let before = fs::read(database.path()).unwrap();
    let said = |arguments: &[&str]| fail(&database, arguments);
    assert!(said(&["restore", &copy]).contains("can't read"));
    fs::write(&copy, "no ledger").unwrap();
    let text = said(&["restore", &copy]);
    assert!(text.contains("copy.db"), "{text}");
    fs::write(&copy, "").unwrap();
    assert!(said(&["restore", &copy]).contains("is not a jobledger database"));
    assert!(
        said(&["restore", database.path().to_str().unwrap()]).contains("is the database to be replaced, not a copy")
    );
    // Another connection reads the database.
    fs::remove_file(&copy).unwrap();
    run(&database, &["backup", &copy]);
    let mut reader = database.connect().await;
    sqlx::query("BEGIN; SELECT * FROM ledger").execute(&mut reader).await.unwrap();
    let text = said(&["restore", &copy]);
    assert!(text.contains("another process has"), "{text}");
    drop(reader);
    assert!(fs::read(database.path()).unwrap() == before, "it is as it was");
    assert_eq!(beside(&database, ".re"), Vec::<PathBuf>::new(), "nothing is left");
    // A database that can't be opened is no obstacle, and is kept.
    fs::write(database.path(), "no ledger any more").unwrap();
    let text = run(&database, &["restore", &copy]);
    assert!(text.contains("are valid again"), "{text}");
    let [replaced] = &beside(&database, ".replaced-")[..] else { panic!("{:?}", beside(&database, "")) };
    assert_eq!(fs::read(replaced).unwrap(), b"no ledger any more");
    let postgres = fail(&Database::postgres().await, &["restore", &copy]);
    assert!(postgres.contains("pg_restore"), "{postgres}");
    drop(folder);
}

//! Rules of the code base: which part may depend on which, and what statements, files and documents must look like.

use std::{fs, path::Path};

use crate::support::harness::root;

fn sources(folder: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("the folder exists") {
        let path = entry.expect("the folder is readable").path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("sources are text");
            found.push((path.display().to_string(), text));
        }
    }
    found
}

/// The lines of code, without comments, that contain one of these names.
fn naming<'a>(sources: &'a [(String, String)], names: &[&str]) -> Vec<(&'a str, &'a str)> {
    let mut found = Vec::new();
    for (path, text) in sources {
        for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
            // `net::IpAddr` is the standard library's, not our `net`.
            let of_ours = line.replace("net::IpAddr", "");
            if names.iter().any(|name| of_ours.contains(name)) {
                found.push((path.as_str(), line));
            }
        }
    }
    found
}

#[test]
fn dependencies_point_one_way() {
    let server = root().join("server/src");
    for (part, may_not_name) in [
        ("domain", &["store::", "ledger::", "api::", "tonic", "prost", "sqlx", "tokio", "async fn", "serde"][..]),
        ("store", &["ledger::", "api::", "tonic", "prost", "jobledger_proto"]),
        (
            "ledger",
            &["api::", "maintenance", "tonic", "prost", "jobledger_proto", "sqlx", "store::sqlite", "store::postgres"],
        ),
        (
            "access",
            &[
                "ledger::",
                "api::",
                "net::",
                "maintenance",
                "tonic",
                "prost",
                "sqlx",
                "store::sqlite",
                "store::postgres",
            ],
        ),
        ("net", &["ledger::", "api::", "store::", "domain::", "maintenance", "prost", "sqlx"]),
        ("api", &["sqlx", "store::", "dyn Store", "maintenance"]),
        ("verify", &["ledger::", "api::", "maintenance", "tonic", "prost", "sqlx", "store::sqlite", "store::postgres"]),
        ("legacy/rest", &["store::", "net::", "access::", "maintenance", "sqlx"]),
        ("legacy/import", &["api::", "maintenance", "tonic", "prost", "jobledger_proto", "store::"]),
        ("maintenance", &["api::", "tonic", "prost", "jobledger_proto", "sqlx", "store::sqlite", "store::postgres"]),
    ] {
        let sources = sources(&server.join(part));
        assert!(!sources.is_empty());
        assert_eq!(naming(&sources, may_not_name), [], "in server/src/{part}");
        // Only `server` and the program know what the service that is replaced needs.
        assert!(part.starts_with("legacy") || naming(&sources, &["crate::legacy"]).is_empty(), "in server/src/{part}");
    }
    assert_eq!(naming(&sources(&root().join("client/src")), &["jobledger_server"]), []);
}

#[test]
fn every_statement_opens_with_the_name_of_its_function() {
    for (path, text) in sources(&root().join("server/src/store")) {
        for word in ["SELECT ", "INSERT INTO ", "UPDATE ", "DELETE FROM ", "WITH "] {
            // A string that begins with the statement has no name before it.
            for (at, _) in text.match_indices(&format!("\"{word}")) {
                let line = text[..at].lines().count();
                assert!(text[..at].is_empty(), "{path}:{line}: a statement without /* name */");
            }
        }
        for (at, _) in text.match_indices("\"/* ") {
            let name = text[at + 4..].split(" */").next().unwrap_or_default();
            let is_name = name.chars().all(|c| c.is_ascii_lowercase() || c == '_' || c == '{' || c == '}');
            assert!(!name.is_empty() && is_name, "{path}: {name} is no name of a function");
        }
    }
}

#[test]
fn sqlite_compiles_no_statement_again_for_its_limit() {
    // The planner takes the value of `LIMIT $1` into account, and compiles the statement again each time that one is bound.
    for (path, text) in sources(&root().join("server/src/store/sqlite")) {
        let found = ["LIMIT $", "LIMIT ?"].iter().find_map(|bound| text.find(bound));
        assert_eq!(found.map(|at| text[..at].lines().count()), None, "{path}: write LIMIT +$1");
    }
}

const SOURCES: [&str; 3] = ["server/src", "client/src", "proto"];

#[test]
fn files_fit_in_the_head() {
    for folder in SOURCES.into_iter().chain(["client/examples", "server/tests", "server/benches", "server/fuzz"]) {
        for (path, text) in sources(&root().join(folder)) {
            let lines = text.lines().count();
            assert!(lines <= 500, "{path} has {lines} lines: split it by what changes together");
        }
    }
}

#[test]
fn functions_fit_on_a_page() {
    for folder in SOURCES {
        for (path, text) in sources(&root().join(folder)) {
            let lines: Vec<_> = text.lines().collect();
            for (start, line) in lines.iter().enumerate() {
                let code = line.trim_start();
                let is_function = code.split('(').next().is_some_and(|head| head.split(' ').any(|word| word == "fn"));
                if !is_function || code.starts_with("//") {
                    continue;
                }
                let indent = &line[..line.len() - code.len()];
                let ends = |line: &&str| {
                    line.strip_prefix(indent).is_some_and(|rest| {
                        rest.starts_with('}')
                            || rest.starts_with("fn") && rest.ends_with(';')
                            || rest.starts_with(')') && rest.ends_with(';')
                    })
                };
                let length = lines[start..].iter().take_while(|line| !ends(line)).count() + 1;
                assert!(
                    line.ends_with([';', '}']) || length <= 70,
                    "{path}:{}: a function of {length} lines",
                    start + 1
                );
            }
        }
    }
}

/// A link whose text is `module::test` leads to that test, so no document names a test that is gone.
#[test]
fn tests_that_documents_name_are_there() {
    let mut named = 0;
    let folders = ["docs", "docs/internals"].map(|folder| fs::read_dir(root().join(folder)).expect("it exists"));
    let paths = folders.into_iter().flatten().map(|entry| entry.expect("the folder is readable").path());
    for path in paths.filter(|path| path.extension().is_some_and(|extension| extension == "md")) {
        let text = fs::read_to_string(&path).expect("documents are text");
        for link in text.split('[').filter_map(|part| part.split_once(')')).map(|(link, _)| link) {
            let Some((name, target)) = link.split_once("](") else { continue };
            let Some((module, test)) = name.split_once("::") else { continue };
            let file = path.parent().expect("it is in a folder").join(target);
            let source =
                fs::read_to_string(&file).unwrap_or_else(|error| panic!("{name}: {}: {error}", file.display()));
            assert!(target.ends_with(&format!("/{module}.rs")), "{name} is said to be in {target}");
            assert!(source.contains(&format!("fn {test}(")), "{target} has no {test}");
            named += 1;
        }
    }
    assert!(named > 20, "{named} were found");
}

/// A file that a document names in backticks, as `store/ready.rs`, exists.
#[test]
fn files_that_documents_name_are_there() {
    let folders = [".", "docs", "docs/internals"].map(|folder| fs::read_dir(root().join(folder)).expect("it exists"));
    let paths = folders.into_iter().flatten().map(|entry| entry.expect("the folder is readable").path());
    let mut named = 0;
    for path in paths.filter(|path| path.extension().is_some_and(|extension| extension == "md")) {
        let text = fs::read_to_string(&path).expect("documents are text");
        let quoted = text.split('`').skip(1).step_by(2);
        for file in
            quoted.filter(|quoted| quoted.ends_with(".rs") && quoted.contains('/') && !quoted.contains(['*', ' ']))
        {
            let bases = ["", "server", "server/src", "server/src/bin/jobledger", "server/tests"];
            let is_there = bases.iter().any(|base| root().join(base).join(file).exists()) || file.starts_with("src/");
            assert!(is_there, "{}: {file} is not there", path.display());
            named += 1;
        }
    }
    assert!(named > 30, "{named} were found");
}

/// A file that a comment names in backticks exists.
#[test]
fn files_that_comments_name_are_there() {
    let sources: Vec<_> =
        ["server", "client", "proto"].iter().flat_map(|folder| sources(&root().join(folder))).collect();
    let mut named = 0;
    for (path, text) in &sources {
        for line in text.lines().filter(|line| line.trim_start().starts_with("//")) {
            for file in line
                .split('`')
                .skip(1)
                .step_by(2)
                .filter(|quoted| quoted.ends_with(".rs") && !quoted.contains(['*', ' ']))
            {
                let is_there = sources.iter().any(|(path, _)| path.ends_with(&format!("/{file}")));
                assert!(is_there, "{path}: {file} is not there");
                named += 1;
            }
        }
    }
    assert!(named > 10, "{named} were found");
}

/// Invariants are numbered without gaps, and each names a test that exists, as `folder::file::test` below `server/tests/suite`.
/// An invariant without a test could break unnoticed.
#[test]
fn each_invariant_names_a_test_that_is_there() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("it is there");
    let (_, invariants) = text.split_once("\n## Invariants\n").expect("there is a section");
    for (n, invariant) in invariants.split("\n- **I").skip(1).enumerate() {
        assert!(invariant.starts_with(&format!("{}** ", n + 1)), "I{} is missing", n + 1);
        let names = invariant.split('`').skip(1).step_by(2).filter_map(|quoted| quoted.rsplit_once("::"));
        let names: Vec<_> = names.collect();
        assert!(!names.is_empty(), "I{} names no test", n + 1);
        for (file, test) in names {
            let path = root().join(format!("server/tests/suite/{}.rs", file.replace("::", "/")));
            let source = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            assert!(source.contains(&format!("fn {test}(")), "{file} has no {test}");
        }
    }
}

/// README.md and ARCHITECTURE.md stay short: their readers decide by them whether to go on.
#[test]
fn first_documents_are_short() {
    for (file, lines, width) in [("README.md", 150, 160), ("ARCHITECTURE.md", 160, 120)] {
        let text = fs::read_to_string(root().join(file)).expect("it is there");
        assert!(text.lines().count() <= lines, "{file} has {} lines", text.lines().count());
        let long = text.lines().position(|line| line.chars().count() > width);
        assert_eq!(long, None, "{file} has a long line");
    }
}

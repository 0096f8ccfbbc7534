//! The grpcurl commands of the docs, run as they are shown, through reflection.

use std::{
    collections::HashMap,
    env, fs,
    process::{Command, Stdio},
};

use serde_json::{Deserializer, Value};

use crate::support::harness::{Database, TestServer, on_both_databases, root};
use crate::support::program::Program;

on_both_databases! {
    calls_in_the_docs_answer_as_they_say,
}

/// A command in the docs, with the output that they show.
struct Shown {
    command: String,
    output: String,
}

/// The `$ grpcurl …` commands in the docs' console blocks, in the order in which they are run.
fn shown() -> Vec<Shown> {
    let read = |file| fs::read_to_string(root().join(file)).expect("it is there");
    let text = ["docs/calls.md", "README.md"].map(read).concat();
    let mut found: Vec<Shown> = Vec::new();
    for block in text.split("```console\n").skip(1) {
        let block = block.split("```").next().expect("a block ends");
        for part in format!("\n{block}").split("\n$ ").skip(1).filter(|part| part.starts_with("grpcurl ")) {
            let mut lines = part.lines();
            let mut command = String::new();
            for line in lines.by_ref() {
                command.push_str(line.trim_end_matches('\\'));
                if !line.ends_with('\\') {
                    break;
                }
            }
            found.push(Shown { command, output: lines.collect::<Vec<_>>().join("\n") });
        }
    }
    found
}

/// The path of grpcurl: `GRPCURL`, or where `make tools` puts it.
pub(crate) fn grpcurl() -> String {
    #[expect(clippy::disallowed_methods, reason = "the Makefile says where grpcurl is")]
    let path = env::var("GRPCURL").unwrap_or_else(|_| root().join(".tools/bin/grpcurl").display().to_string());
    let runs = Command::new(&path).arg("-version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    assert!(runs.is_ok_and(|status| status.success()), "no grpcurl at {path}: run `make tools`, or set GRPCURL");
    path
}

/// Makes the output of two runs comparable: ids become their order of appearance, times and measured values a word.
struct Normal {
    ids: HashMap<String, usize>,
}

impl Normal {
    fn new() -> Self {
        Self { ids: HashMap::new() }
    }

    fn text(&mut self, text: &str) -> String {
        let mut out = String::new();
        for word in text.split_inclusive(|c: char| !(c.is_ascii_alphanumeric() || "-:.".contains(c))) {
            let (core, separator) = word.split_at(word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric()).len());
            if uuid::Uuid::try_parse(core).is_ok_and(|id| !id.is_nil()) {
                let next = self.ids.len();
                out.push_str(&format!("id-{}", self.ids.entry(core.to_owned()).or_insert(next)));
            } else if chrono::DateTime::parse_from_rfc3339(core).is_ok() {
                out.push_str("time");
            } else if core.contains('.') && core.trim_start_matches(':').trim_end_matches('s').parse::<f64>().is_ok() {
                out.push_str("measured");
            } else {
                out.push_str(core);
            }
            out.push_str(separator);
        }
        out
    }

    /// JSON messages in the order in which they came, whatever their layout. Other text is compared by its words.
    fn output(&mut self, output: &str) -> Vec<String> {
        if output.trim_start().starts_with('{') {
            let messages = Deserializer::from_str(output).into_iter::<Value>();
            return messages.map(|message| self.text(&message.expect("grpcurl prints JSON").to_string())).collect();
        }
        self.text(output).lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    }
}

async fn calls_in_the_docs_answer_as_they_say(database: Database) {
    let grpcurl = grpcurl();
    let program = Program::start(&database);
    let shown = shown();
    for rpc in ["list", "CreateJob", "GetJob", "UpdateJobStatus", "StreamJobEvents", "GetStatistics"] {
        assert!(shown.iter().any(|shown| shown.command.ends_with(rpc)), "the docs don't show {rpc}");
    }
    let (mut here, mut there) = (Normal::new(), Normal::new());
    // Maps an id in the docs to the id in this run.
    let mut ids: HashMap<String, String> = HashMap::new();
    for Shown { command, output } in shown {
        let mut run = command.replacen("grpcurl", &grpcurl, 1).replace("127.0.0.1:50051", &program.address);
        for (shown, actual) in &ids {
            run = run.replace(shown, actual);
        }
        let ran = Command::new("sh").args(["-c", &format!("{run} 2>&1")]).output().expect("a shell runs");
        let printed = String::from_utf8(ran.stdout).expect("grpcurl prints text");
        let (expected, found) = (there.output(&output), here.output(&printed));
        if command.ends_with(" list") {
            // Newer versions of grpcurl also list the reflection service that they use.
            assert!(expected.iter().all(|line| found.contains(line)), "{command}\n{printed}");
        } else {
            assert_eq!(found, expected, "{command}\n{printed}");
        }
        let by_number = |ids: &HashMap<String, usize>| -> HashMap<usize, String> {
            ids.iter().map(|(id, number)| (*number, id.clone())).collect()
        };
        let (theirs, ours) = (by_number(&there.ids), by_number(&here.ids));
        ids = theirs.into_iter().filter_map(|(number, id)| Some((id, ours.get(&number)?.clone()))).collect();
    }
}

/// Reflection v1 works. Older versions of grpcurl use only v1alpha, so the other tests may not reach it.
#[tokio::test]
async fn reflection_v1_names_the_service() {
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let database = Database::sqlite();
    let (server, _) = TestServer::on(&database).await;
    let channel = tonic::transport::Endpoint::from_shared(server.endpoint()).unwrap().connect().await.unwrap();
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let answers = ServerReflectionClient::new(channel).server_reflection_info(tokio_stream::iter([request])).await;
    let answer = answers.unwrap().into_inner().message().await.unwrap().expect("an answer");
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else { panic!("{answer:?}") };
    let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains(&"jobledger.v1.JobService"), "{names:?}");
    server.stop().await;
}

#[test]
fn health_and_reflection_v1alpha_answer_grpcurl() {
    let grpcurl = grpcurl();
    let database = Database::sqlite();
    let program = Program::start(&database);
    let run = |arguments: &[&str]| {
        let output = Command::new(&grpcurl).arg("-plaintext").args(arguments).output().expect("grpcurl runs");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("grpcurl prints text")
    };
    for service in ["", "jobledger.v1.JobService"] {
        let request = format!("{{\"service\": \"{service}\"}}");
        let answer = run(&["-d", &request, &program.address, "grpc.health.v1.Health/Check"]);
        assert!(answer.contains("\"SERVING\""), "{answer}");
    }
    let services = run(&[&program.address, "list"]);
    assert!(services.contains("jobledger.v1.JobService"), "{services}");
    let described = run(&[&program.address, "describe", "jobledger.v1.Job"]);
    assert!(described.contains("google.protobuf.Value payload"), "{described}");
}

//! Compiles the contract with protox, so that no protoc is needed.

use std::{env, error::Error, fs, path::PathBuf};

const INCLUDE: &str = "proto";
const FILES: [&str; 3] =
    ["proto/jobledger/v1/job.proto", "proto/jobledger/v1/job_event.proto", "proto/jobledger/v1/job_service.proto"];

#[expect(clippy::disallowed_methods, reason = "cargo tells a build script where to write by a variable")]
fn main() -> Result<(), Box<dyn Error>> {
    for file in FILES {
        println!("cargo::rerun-if-changed={file}");
    }
    let mut compiler = protox::Compiler::new([INCLUDE])?;
    compiler.include_source_info(true).include_imports(true).open_files(FILES)?;

    // Reflection serves this; `compile_fds` would not write it.
    let out_dir = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out_dir.join("jobledger_descriptor.bin"), compiler.encode_file_descriptor_set())?;

    tonic_prost_build::configure()
        // Maps in key order: a request has one encoding, which idempotency digests rely on.
        .btree_map(".jobledger")
        // A stream's message is as small as a bookmark, but where it is an event.
        .boxed(".jobledger.v1.StreamJobEventsResponse.item.event")
        .boxed(".jobledger.v1.StreamJobEventsResponse.item.snapshot")
        // The message of the errors that single items of a batch have, as the crate that makes such errors has it.
        .extern_path(".google.rpc.Status", "::tonic_types::Status")
        // The transport is the server's and the client's choice, not the contract's.
        .build_transport(false)
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}

//! Compiles the contract with protox, so that no protoc is needed.

use std::{env, error::Error, fs, path::PathBuf};

const INCLUDE: &str = "proto";
const FILES: [&str; 9] = [
    "proto/jobledger/v1/bulk_operation_service.proto",
    "proto/jobledger/v1/job.proto",
    "proto/jobledger/v1/job_event.proto",
    "proto/jobledger/v1/job_service.proto",
    "proto/jobledger/v1/job_type.proto",
    "proto/jobledger/v1/job_type_service.proto",
    "proto/jobledger/v1/org_event.proto",
    "proto/jobledger/v1/server_service.proto",
    "proto/jobledger/v1/worker_service.proto",
];

#[expect(clippy::disallowed_methods, reason = "cargo tells a build script where to write by a variable")]
fn main() -> Result<(), Box<dyn Error>> {
    for file in FILES {
        println!("cargo::rerun-if-changed={file}");
    }
    let mut compiler = protox::Compiler::new([INCLUDE])?;
    compiler.include_source_info(true).include_imports(true).open_files(FILES)?;

    // Server reflection needs this file, which `compile_fds` does not write.
    let out_dir = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out_dir.join("jobledger_descriptor.bin"), compiler.encode_file_descriptor_set())?;

    tonic_prost_build::configure()
        // Maps are encoded in key order, so each request has one encoding. Idempotency digests rely on that.
        .btree_map(".jobledger")
        // Boxed, so that a stream message takes no more space than a bookmark unless it has an event or a job.
        .boxed(".jobledger.v1.StreamJobEventsResponse.item.event")
        .boxed(".jobledger.v1.StreamJobEventsResponse.item.snapshot")
        .boxed(".jobledger.v1.StreamJobEventsResponse.item.org_event")
        // The errors of single batch items use the type of the crate that builds such errors.
        .extern_path(".google.rpc.Status", "::tonic_types::Status")
        // It has a secret.
        .skip_debug([".jobledger.v1.CreateTokenResponse"])
        // The client and the server choose their transports.
        .build_transport(false)
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}

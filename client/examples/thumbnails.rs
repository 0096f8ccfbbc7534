//! The worker of docs/start.md. The code below must equal the code on that page.

#![expect(clippy::disallowed_methods, reason = "it has no command line")]

use std::{env, fs};

use jobledger_client::{
    Client, Token, shutdown_signal,
    worker::{Context, Error, Worker},
};
use serde::{Deserialize, Serialize};

#[derive(Deserialize)]
struct Thumbnail {
    path: String,
}

#[derive(Serialize)]
struct Scaled {
    bytes: u64,
}

async fn scale(context: Context, job: Thumbnail) -> Result<Scaled, Error> {
    context.stage("reading");
    let picture = tokio::fs::read(&job.path).await?;
    if picture.is_empty() {
        return Err(Error::permanent("the picture is empty").code("EMPTY"));
    }
    Ok(Scaled { bytes: picture.len() as u64 })
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let shutdown = shutdown_signal()?;
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let client = Client::builder(env::var("JOBLEDGER_SERVER")?)
        .ca(fs::read(env::var("JOBLEDGER_CA")?)?)
        .token(Token::new(fs::read_to_string(env::var("JOBLEDGER_TOKEN_FILE")?)?.trim())?)
        .build()?;
    let worker = Worker::builder(client).handle("thumbnail", scale).concurrency(8).build()?;
    Ok(worker.run(shutdown).await?)
}

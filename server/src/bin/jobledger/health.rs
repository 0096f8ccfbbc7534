//! `jobledger health`: for health checks of containers, whose images have no other program.

use std::{
    io::{self, Read as _, Write as _},
    net::{TcpStream, ToSocketAddrs as _},
    time::Duration,
};

use crate::terminal::Failure;

/// How long the server may take for each step.
const TIME: Duration = Duration::from_secs(2);
/// The status line is at the start.
const ANSWER: u64 = 256;

/// Asks a server whether it is ready. An error says why it is not.
pub(crate) fn check(address: &str) -> Result<(), Failure> {
    let asked = ask(address).map_err(|error| format!("{address} does not answer: {error}"))?;
    let status = asked.split_ascii_whitespace().nth(1).filter(|_| asked.starts_with("HTTP/1.1 "));
    match status {
        Some("200") => Ok(writeln!(io::stdout(), "ready")?),
        Some(_) => Err(format!("{address} is not ready; the server's log says why").into()),
        None => Err(format!("{address} does not speak plain HTTP: if it uses TLS, use the gRPC health check").into()),
    }
}

fn ask(address: &str) -> io::Result<String> {
    let mut failed = io::Error::from(io::ErrorKind::NotFound);
    for address in address.to_socket_addrs()? {
        let mut stream = match TcpStream::connect_timeout(&address, TIME) {
            Ok(stream) => stream,
            Err(error) => {
                failed = error;
                continue;
            }
        };
        stream.set_read_timeout(Some(TIME))?;
        stream.set_write_timeout(Some(TIME))?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.take(ANSWER).read_to_end(&mut answer)?;
        return Ok(String::from_utf8_lossy(&answer).into_owned());
    }
    Err(failed)
}

//! A queue of lines, which its own thread writes to standard error.
//!
//! Callers never wait: standard error may be a pipe that nobody reads, a stopped terminal, or a full disk. Lines that
//! don't fit the queue are dropped and counted. Once writing succeeds again, the count is written in their place.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsFd as _,
    sync::OnceLock,
    thread,
    time::Duration,
};

use chrono::SecondsFormat;
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::domain::clock::{Clock as _, SystemClock};

/// The most bytes in the queue. The thread may have as many in its current write.
const ROOM: usize = 4 << 20;
/// How long the process waits at its end until the queue is written.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// The pause when standard error can't take more at the moment.
const PAUSE: Duration = Duration::from_millis(20);

static LINES: Lines = Lines { state: Mutex::new(LineQueue::EMPTY), changed: Condvar::new(), file: OnceLock::new() };

struct Lines {
    state: Mutex<LineQueue>,
    changed: Condvar,
    /// Standard error, for the thread alone: others could block on the lock of the standard library's handle.
    file: OnceLock<File>,
}

struct LineQueue {
    waiting: Vec<u8>,
    /// Lines that did not fit or could not be written, and are not yet in a notice.
    dropped: u64,
    dropped_ever: u64,
    /// True while the thread has nothing to write.
    is_idle: bool,
    /// Formats the notice about dropped lines.
    notice: fn(u64) -> String,
}

impl LineQueue {
    const EMPTY: Self =
        Self { waiting: Vec::new(), dropped: 0, dropped_ever: 0, is_idle: true, notice: notice_in_text };

    fn drop_lines(&mut self, lines: u64) {
        self.dropped += lines;
        self.dropped_ever += lines;
    }
}

impl Lines {
    fn state(&self) -> MutexGuard<'_, LineQueue> {
        self.state.lock()
    }

    fn write_on(&self, file: &File) {
        let mut state = self.state();
        loop {
            while state.waiting.is_empty() {
                state.is_idle = true;
                self.changed.notify_all();
                self.changed.wait(&mut state);
            }
            state.is_idle = false;
            let batch = std::mem::take(&mut state.waiting);
            // These lines were dropped after those in the batch, and before the next ones.
            let (dropped, notice) = (std::mem::take(&mut state.dropped), state.notice);
            drop(state);
            let lost = write_all(file, &batch);
            let is_said = dropped == 0 || write_all(file, notice(dropped + lost).as_bytes()) == 0;
            state = self.state();
            if !is_said {
                state.dropped += dropped;
            }
            if dropped == 0 || !is_said {
                state.dropped += lost;
            }
            state.dropped_ever += lost;
        }
    }
}

/// Writes all bytes, however long that takes. Returns the number of lines that could not be written.
fn write_all(mut file: &File, mut bytes: &[u8]) -> u64 {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => break,
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Another process with the same pipe or terminal has made it non-blocking.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(PAUSE),
            // The reader has gone, or the disk is full. Later lines may succeed.
            Err(_) => break,
        }
    }
    bytes.iter().filter(|byte| **byte == b'\n').count() as u64
}

/// Starts the writing thread, once. While the returned value lives, the end of the process waits up to a second for the queue.
///
/// # Errors
///
/// If the system provides no thread or no file.
pub fn open() -> io::Result<Open> {
    if LINES.file.get().is_none() {
        let file = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        let file = LINES.file.get_or_init(|| file);
        thread::Builder::new().name("stderr".to_owned()).spawn(|| LINES.write_on(file))?;
    }
    Ok(Open { _private: () })
}

/// Dropping it waits up to a second until the queue is written. Made by [`open`].
#[must_use = "what is left is lost where nobody waits for it"]
pub struct Open {
    _private: (),
}

impl Drop for Open {
    fn drop(&mut self) {
        let is_left = |state: &mut LineQueue| !(state.is_idle && state.waiting.is_empty());
        LINES.changed.wait_while_for(&mut LINES.state(), is_left, LAST_WORDS);
    }
}

/// Lines dropped since the process began.
pub fn dropped() -> u64 {
    LINES.state().dropped_ever
}

/// Queues a line that the program shows to people, outside the log.
pub fn say(line: &str) {
    write(format!("{line}\n").as_bytes());
}

/// Makes notices about dropped lines JSON objects, as log lines are.
pub(super) fn say_notices_in_json() {
    LINES.state().notice = notice_in_json;
}

/// Queues whole lines, or a drawing on a terminal; or drops them.
fn write(bytes: &[u8]) {
    let mut state = LINES.state();
    // A line larger than the queue is accepted if the queue is empty.
    if state.dropped > 0 && !state.is_idle || !state.waiting.is_empty() && state.waiting.len() + bytes.len() > ROOM {
        state.drop_lines(bytes.iter().filter(|byte| **byte == b'\n').count() as u64);
        return;
    }
    state.waiting.extend_from_slice(bytes);
    drop(state);
    LINES.changed.notify_all();
}

/// Writes through the queue. Each write must be one or more whole lines.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const NOTICE: &str = "log lines were dropped: the reader of standard error is too slow";

fn notice_in_text(lines: u64) -> String {
    format!("{}  WARN {}: {NOTICE} lines={lines}\n", now(), module_path!())
}

fn notice_in_json(lines: u64) -> String {
    let fields = serde_json::json!({ "message": NOTICE, "lines": lines });
    let line = serde_json::json!({ "timestamp": now(), "level": "WARN", "fields": fields, "target": module_path!() });
    format!("{line}\n")
}

fn now() -> String {
    SystemClock.now().to_rfc3339_opts(SecondsFormat::Micros, true)
}

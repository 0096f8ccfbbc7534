//! Lines on their way to standard error, which a thread of their own writes.
//!
//! Whoever has a line to say never waits: standard error may be a pipe that nobody reads, a terminal that stands still, a full
//! disk. What finds no room is dropped and counted, and once something can be written again the count is said in its place.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsFd as _,
    sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::Duration,
};

use chrono::SecondsFormat;

use crate::domain::clock::{Clock as _, SystemClock};

/// What lines may take that wait; as much again may be in the thread's hands.
const ROOM: usize = 4 << 20;
/// How long the process's end waits for the lines that are left.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// The wait where standard error says that it can take nothing now.
const PAUSE: Duration = Duration::from_millis(20);

static LINES: Lines = Lines { state: Mutex::new(State::EMPTY), changed: Condvar::new(), file: OnceLock::new() };

struct Lines {
    state: Mutex<State>,
    changed: Condvar,
    /// Standard error, for the thread alone: the standard library's handle has a lock that others could wait for.
    file: OnceLock<File>,
}

struct State {
    waiting: Vec<u8>,
    /// Lines that found no room, or could not be written, and of which nothing was said yet.
    dropped: u64,
    dropped_ever: u64,
    /// The thread has nothing in its hands.
    is_idle: bool,
    /// How the count of what was dropped is said.
    notice: fn(u64) -> String,
}

impl State {
    const EMPTY: Self =
        Self { waiting: Vec::new(), dropped: 0, dropped_ever: 0, is_idle: true, notice: notice_in_text };

    fn drop_lines(&mut self, lines: u64) {
        self.dropped += lines;
        self.dropped_ever += lines;
    }
}

impl Lines {
    /// What is behind this lock stays whole whatever panics beside it.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_on(&self, file: &File) {
        let mut state = self.state();
        loop {
            while state.waiting.is_empty() {
                state.is_idle = true;
                self.changed.notify_all();
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.is_idle = false;
            let batch = std::mem::take(&mut state.waiting);
            // They came after what is in the batch, and before what comes next.
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

/// Writes it all, and waits for as long as that takes. How many lines could not be written.
fn write_all(mut file: &File, mut bytes: &[u8]) -> u64 {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => break,
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Somebody else who has the same pipe or terminal made it so.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(PAUSE),
            // Its reader has gone, or the disk is full: later lines may fare better.
            Err(_) => break,
        }
    }
    bytes.iter().filter(|byte| **byte == b'\n').count() as u64
}

/// Starts the thread that writes, unless it runs. While the answer lives the process waits a moment at its end for what is left.
///
/// # Errors
///
/// If the system gives no thread or no file.
pub fn open() -> io::Result<Open> {
    if LINES.file.get().is_none() {
        let file = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        let file = LINES.file.get_or_init(|| file);
        thread::Builder::new().name("stderr".to_owned()).spawn(|| LINES.write_on(file))?;
    }
    Ok(Open { _private: () })
}

/// See [`open`].
#[must_use = "what is left is lost where nobody waits for it"]
pub struct Open {
    _private: (),
}

impl Drop for Open {
    fn drop(&mut self) {
        let is_left = |state: &mut State| !(state.is_idle && state.waiting.is_empty());
        drop(LINES.changed.wait_timeout_while(LINES.state(), LAST_WORDS, is_left));
    }
}

/// How many lines were dropped since the process began.
pub fn dropped() -> u64 {
    LINES.state().dropped_ever
}

/// Says a line on standard error, soon; for what the program tells people, beside the log.
pub fn say(line: &str) {
    write(format!("{line}\n").as_bytes());
}

/// Has the count of dropped lines be a JSON object, as the lines around it are.
pub(super) fn say_notices_in_json() {
    LINES.state().notice = notice_in_json;
}

/// Puts whole lines, or what is drawn on a terminal, behind what waits; or drops them.
fn write(bytes: &[u8]) {
    let mut state = LINES.state();
    // A line that is larger by itself is taken where there is nothing else.
    if state.dropped > 0 && !state.is_idle || !state.waiting.is_empty() && state.waiting.len() + bytes.len() > ROOM {
        state.drop_lines(bytes.iter().filter(|byte| **byte == b'\n').count() as u64);
        return;
    }
    state.waiting.extend_from_slice(bytes);
    drop(state);
    LINES.changed.notify_all();
}

/// Writes through the queue. Each write is one line or more, whole.
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

const NOTICE: &str = "lines of the log were dropped: standard error did not take them";

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

//! The output of commands. A command never hangs because its output is not read.

use std::{
    error::Error,
    future::Future,
    io::{self, IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

use console::Term;
use indicatif::{ProgressDrawTarget, TermLike};
use jobledger_server::telemetry::Stderr;
use parking_lot::Mutex;
use tokio::{runtime::Runtime, task::spawn_blocking};

/// How long the end of a command waits for blocked threads, for example one that writes to a pipe that nobody reads.
const LAST_WORDS: Duration = Duration::from_secs(1);

pub(crate) type Failure = Box<dyn Error + Send + Sync>;

/// Runs a command that handles signals itself. A blocked thread, for example in a write to standard output, delays its end
/// by [`LAST_WORDS`] at most.
pub(crate) fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = Runtime::new()?;
    let done = runtime.block_on(work);
    runtime.shutdown_timeout(LAST_WORDS);
    done
}

/// Prints on standard output, from another thread: the caller may give up while the reader is slow.
pub(crate) async fn print(text: String) -> io::Result<()> {
    let print = move || {
        let mut out = io::stdout();
        out.write_all(text.as_bytes())?;
        out.flush()
    };
    spawn_blocking(print).await?
}

/// Progress bars are drawn on standard error if that is a terminal, else nowhere.
pub(crate) fn bars() -> ProgressDrawTarget {
    if io::stderr().is_terminal() {
        ProgressDrawTarget::term_like(Box::new(Bars { term: Term::stderr(), drawn: Mutex::default() }))
    } else {
        ProgressDrawTarget::hidden()
    }
}

/// Collects what is drawn, and writes it as a whole.
#[derive(Debug)]
struct Bars {
    /// Used for the size only.
    term: Term,
    drawn: Mutex<String>,
}

impl Bars {
    fn draw(&self, text: &str) -> io::Result<()> {
        self.drawn.lock().push_str(text);
        Ok(())
    }

    /// Draws the ANSI sequence that moves the cursor.
    fn moved(&self, n: usize, way: char) -> io::Result<()> {
        if n == 0 { Ok(()) } else { self.draw(&format!("\x1b[{n}{way}")) }
    }
}

impl TermLike for Bars {
    fn width(&self) -> u16 {
        self.term.size().1
    }

    fn height(&self) -> u16 {
        self.term.size().0
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.moved(n, 'A')
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.moved(n, 'B')
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.moved(n, 'C')
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.moved(n, 'D')
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.draw(text)?;
        self.draw("\n")
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.draw(text)
    }

    fn clear_line(&self) -> io::Result<()> {
        self.draw("\r\x1b[2K")
    }

    fn flush(&self) -> io::Result<()> {
        let drawn = std::mem::take(&mut *self.drawn.lock());
        Stderr.write_all(drawn.as_bytes())
    }
}

/// Shows progress: on a terminal a line that is overwritten every 200 ms, elsewhere a line every 10 s.
pub(crate) struct Display {
    is_terminal: bool,
    next: Instant,
}

impl Display {
    pub(crate) fn new() -> Self {
        let is_terminal = io::stderr().is_terminal();
        Self { is_terminal, next: Instant::now() + Self::pause(is_terminal) }
    }

    fn pause(is_terminal: bool) -> Duration {
        if is_terminal { Duration::from_millis(200) } else { Duration::from_secs(10) }
    }

    pub(crate) fn show(&mut self, how_far: impl FnOnce() -> String) {
        if Instant::now() < self.next {
            return;
        }
        self.next = Instant::now() + Self::pause(self.is_terminal);
        let (before, after) = if self.is_terminal { ("\r\x1b[K", "") } else { ("", "\n") };
        self.draw(&format!("{before}{}{after}", how_far()));
    }

    pub(crate) fn clear(&self) {
        if self.is_terminal {
            self.draw("\r\x1b[K");
        }
    }

    fn draw(&self, text: &str) {
        // This can't fail: `Stderr` queues the text or drops it.
        let _ = Stderr.write_all(text.as_bytes());
    }
}

//! Standard error and standard output: the one place that writes to them.
//!
//! Whoever reads the messages may be gone (a closed pipe, a session that ended), full (the log's disk) or asleep (a pager,
//! a terminal that was stopped). None of it may end or hold up a run, so messages are handed to a thread of their own,
//! which writes them and drops what cannot be written. The bar lives there, too: it is a message that moves.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressState, ProgressStyle};

/// Messages that wait for a reader; more are left out.
const WAITING: usize = 1_000;

/// How long a message waits for a reader that is slow, and the end of the program for the last ones.
const PATIENCE: Duration = Duration::from_secs(1);

/// Parts of a bar.
pub const PARTS: u64 = 1_000;

static SCREEN: Screen = Screen {
    queue: Mutex::new(Queue { waiting: VecDeque::new(), writer: Writer::None, asleep: false, left_out: 0 }),
    changed: Condvar::new(),
};

/// Something to be shown.
#[derive(Debug)]
enum Event {
    Line(String),
    Begin(String),
    Board(String),
    Move(u64, String),
    End,
}

/// The thread that writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writer {
    /// Not started yet.
    None,
    Idle,
    Busy,
}

#[derive(Debug)]
struct Queue {
    waiting: VecDeque<Event>,
    writer: Writer,
    /// A message has waited in vain: the next ones don't.
    asleep: bool,
    /// Messages that were left out since the last one that was written.
    left_out: u64,
}

#[derive(Debug)]
struct Screen {
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// Shows a line on standard error.
pub fn line(text: impl Into<String>) {
    SCREEN.push(Event::Line(text.into()));
}

/// Begins a bar of [`PARTS`] parts; lines go above it. There is one at a time, and only where a terminal is.
pub fn begin_bar(name: &str) {
    SCREEN.push(Event::Begin(name.into()));
}

/// Lines that stay below every bar from now on, such as a table that grows; none if empty.
pub fn board(text: String) {
    SCREEN.push(Event::Board(text));
}

/// The bar stands at `position`.
pub fn move_bar(position: u64, message: String) {
    SCREEN.push(Event::Move(position, message));
}

/// Takes the bar away, if there is one.
pub fn end_bar() {
    SCREEN.push(Event::End);
}

/// Waits until all messages are written, or, if nobody reads them, not for long.
pub fn flush() {
    let patience = |queue: &mut Queue| !(queue.waiting.is_empty() && queue.writer != Writer::Busy);
    let queue = SCREEN.queue();
    // The result is the same in both cases: the end.
    drop(SCREEN.changed.wait_timeout_while(queue, PATIENCE, patience));
}

/// Writes an answer to standard output, whole. A reader that has seen enough, as `head` has, is no failure.
///
/// # Errors
/// Standard output that cannot be written, such as a file on a full disk.
pub fn print(text: &str) -> anyhow::Result<()> {
    flush();
    let mut out = io::stdout().lock();
    match write(&mut out, text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(error).context("cannot write the answer to standard output")
        }
        _ => Ok(()),
    }
}

impl Screen {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&'static self, event: Event) {
        let mut queue = self.queue();
        if queue.writer == Writer::None {
            queue.writer = Writer::Idle;
            let started = std::thread::Builder::new().name("selfie-screen".into()).spawn(|| self.write());
            if started.is_err() {
                // A system without a thread to spare: the next message tries again.
                queue.writer = Writer::None;
                return show(event, &mut Shown::default());
            }
        }
        if let (Event::Move(..), Some(last @ Event::Move(..))) = (&event, queue.waiting.back_mut()) {
            *last = event;
            return;
        }
        if queue.waiting.len() >= WAITING && matches!(event, Event::Line(_)) {
            if !queue.asleep {
                let full = |queue: &mut Queue| queue.waiting.len() >= WAITING;
                let waited = self.changed.wait_timeout_while(queue, PATIENCE, full);
                queue = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            if queue.waiting.len() >= WAITING {
                queue.asleep = true;
                queue.left_out += 1;
                return;
            }
        }
        queue.waiting.push_back(event);
        drop(queue);
        self.changed.notify_all();
    }

    /// The life of the thread that writes.
    fn write(&self) {
        let mut shown = Shown::default();
        let mut queue = self.queue();
        loop {
            let Some(event) = queue.waiting.pop_front() else {
                queue.writer = Writer::Idle;
                self.changed.notify_all();
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            queue.writer = Writer::Busy;
            drop(queue);
            show(event, &mut shown);
            queue = self.queue();
            queue.asleep = false;
            if queue.left_out > 0 {
                let note = format!("note: {} lines were left out here, as nobody read them", queue.left_out);
                queue.left_out = 0;
                queue.waiting.push_front(Event::Line(note));
            }
            self.changed.notify_all();
        }
    }
}

/// What stays at the bottom of the screen.
#[derive(Default)]
struct Shown {
    bar: Option<ProgressBar>,
    board: String,
}

/// Shows something; what cannot be written is dropped.
fn show(event: Event, Shown { bar, board }: &mut Shown) {
    match event {
        Event::Line(text) => {
            // In one piece, so that lines of several processes don't mix.
            let text = text + "\n";
            let line = || drop(write(&mut io::stderr().lock(), text.as_bytes()));
            match bar {
                Some(bar) => bar.suspend(line),
                None => line(),
            }
        }
        Event::Begin(name) => {
            let new = ProgressBar::new(PARTS);
            let template = "{prefix} [{bar:12}] {percent:>3}%  {wide_msg}";
            let template = if board.is_empty() { template.into() } else { format!("{template}\n{{board}}") };
            let style = ProgressStyle::with_template(&template).expect("constant templates").progress_chars("=> ");
            let board = board.clone();
            let below = move |_: &ProgressState, line: &mut dyn fmt::Write| {
                // That the screen cannot take a line is no failure of the run.
                let _ = line.write_str(&board);
            };
            new.set_style(style.with_key("board", below));
            new.set_prefix(name);
            *bar = Some(new);
        }
        Event::Board(text) => *board = text,
        Event::Move(position, message) => {
            if let Some(bar) = bar {
                bar.set_position(position);
                // A narrow terminal cuts the end.
                bar.set_message(message);
            }
        }
        Event::End => {
            if let Some(bar) = bar.take() {
                bar.finish_and_clear();
            }
        }
    }
}

/// Writes all of it. A terminal that another program made non-blocking takes it in parts.
fn write(out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    let mut rest = bytes;
    let mut progress = Instant::now();
    while !rest.is_empty() {
        match out.write(rest) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => {
                rest = &rest[written..];
                progress = Instant::now();
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock && progress.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes three bytes at a time, and between two times says that it would block.
    struct Slow(Vec<u8>, bool);

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1 = !self.1;
            if self.1 {
                return Err(ErrorKind::WouldBlock.into());
            }
            let taken = bytes.len().min(3);
            self.0.extend_from_slice(&bytes[..taken]);
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_terminal_that_does_not_wait_gets_all_of_it() {
        let mut slow = Slow(Vec::new(), false);
        write(&mut slow, b"one line, in parts\n").expect("it takes everything in the end");
        assert_eq!(slow.0, b"one line, in parts\n");
    }
}

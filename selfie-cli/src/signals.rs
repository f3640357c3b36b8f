//! Signals: the first asks for a save and a stop, a second SIGINT or SIGTERM ends at once.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
#[cfg(unix)]
use std::time::{Duration, Instant};

use anyhow::Context;
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::exit::Exit;
use crate::screen;

/// A second signal that comes sooner is the first one: `timeout` sends it to the process and then to its group.
#[cfg(unix)]
const SAME: Duration = Duration::from_millis(100);

/// Says how things stand, before the process ends.
type Goodbye = Box<dyn FnOnce() + Send>;

/// Whether a stop was asked for.
#[derive(Clone)]
pub struct Signals {
    shared: Arc<Shared>,
}

impl fmt::Debug for Signals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signals").field("asked", &self.stop_asked()).finish_non_exhaustive()
    }
}

struct Shared {
    asked: AtomicBool,
    /// While there is one, nothing is to be saved first: the process ends on the spot, with this.
    goodbye: Mutex<Option<Goodbye>>,
    /// What is done after any of them.
    at_last: Mutex<Option<Goodbye>>,
}

impl Shared {
    fn goodbye(&self) -> MutexGuard<'_, Option<Goodbye>> {
        self.goodbye.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the process, if there is nothing to be saved first. Whoever would go on with that waits for the lock.
    fn leave(&self) {
        let mut place = self.goodbye();
        if let Some(goodbye) = place.take() {
            goodbye();
            if let Some(at_last) = self.at_last.lock().unwrap_or_else(PoisonError::into_inner).take() {
                at_last();
            }
            screen::flush();
            signal_hook::low_level::exit(Exit::Stopped as i32);
        }
    }
}

impl Signals {
    /// Takes over SIGINT, SIGTERM and, where there are such, SIGUSR1 and SIGHUP: the terminal or the session is gone.
    /// `nohup` is heeded. Until [`Signals::after_step`] a signal ends the process on the spot.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn install() -> anyhow::Result<Self> {
        let goodbye: Goodbye = Box::new(|| {
            screen::end_bar();
            screen::line("stopped before the first step, as asked: the same command begins again");
        });
        let shared = Arc::new(Shared {
            asked: AtomicBool::new(false),
            goodbye: Mutex::new(Some(goodbye)),
            at_last: Mutex::new(None),
        });
        listen(&shared).context("cannot handle signals")?;
        Ok(Self { shared })
    }

    /// Whether one came.
    pub fn stop_asked(&self) -> bool {
        self.shared.asked.load(Ordering::SeqCst)
    }

    /// Does this, too, whenever a signal ends the process on the spot: for a command of many runs, each with its goodbye.
    pub fn at_last(&self, farewell: impl FnOnce() + Send + 'static) {
        *self.shared.at_last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(farewell));
    }

    /// From now on a signal waits for the end of a step, where [`Signals::stop_asked`] is looked at.
    pub fn after_step(&self) {
        drop(self.shared.goodbye().take());
    }

    /// As long as the result lives, a signal ends the process on the spot, after `goodbye`, with exit code 75: everything
    /// is saved that the same command needs to go on.
    pub fn at_once(&self, goodbye: impl FnOnce() + Send + 'static) -> AtOnce {
        *self.shared.goodbye() = Some(Box::new(goodbye));
        // One that came just before.
        if self.stop_asked() {
            self.shared.leave();
        }
        AtOnce { signals: self.clone() }
    }
}

/// A stretch of work that needs no end: see [`Signals::at_once`].
#[derive(Debug)]
pub struct AtOnce {
    signals: Signals,
}

impl Drop for AtOnce {
    fn drop(&mut self) {
        self.signals.after_step();
    }
}

/// Hears signals in a thread of its own, so that even a system call that hangs does not keep the second one waiting.
#[cfg(unix)]
fn listen(shared: &Arc<Shared>) -> std::io::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGUSR1};
    let mut heard = vec![SIGINT, SIGTERM, SIGUSR1];
    if !crate::system::ignores_signal(SIGHUP.unsigned_abs()) {
        heard.push(SIGHUP);
    }
    let mut signals = signal_hook::iterator::Signals::new(heard)?;
    let shared = shared.clone();
    let hear = move || {
        let mut first: Option<Instant> = None;
        for signal in signals.forever() {
            if [SIGINT, SIGTERM].contains(&signal) {
                if first.is_some_and(|first| first.elapsed() > SAME) {
                    signal_hook::low_level::exit(128 + signal);
                }
                first.get_or_insert_with(Instant::now);
            }
            shared.asked.store(true, Ordering::SeqCst);
            let leaving = shared.clone();
            // What is written on the way out may take its time, too.
            if std::thread::Builder::new().spawn(move || leaving.leave()).is_err() {
                shared.leave();
            }
        }
    };
    std::thread::Builder::new().name("selfie-signals".into()).spawn(hear).map(drop)
}

/// Here a stop waits for the end of a step, and a second signal ends at once.
#[cfg(not(unix))]
fn listen(shared: &Arc<Shared>) -> std::io::Result<()> {
    use signal_hook::flag;
    let (asked, again) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    for signal in [SIGINT, SIGTERM] {
        // In this order: the first signal passes the first handler and arms it.
        flag::register_conditional_shutdown(signal, 128 + signal, again.clone())?;
        flag::register(signal, again.clone())?;
        flag::register(signal, asked.clone())?;
    }
    let shared = shared.clone();
    let wait = move || {
        while !asked.load(Ordering::SeqCst) {
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        shared.asked.store(true, Ordering::SeqCst);
        shared.leave();
    };
    std::thread::Builder::new().name("selfie-signals".into()).spawn(wait).map(drop)
}

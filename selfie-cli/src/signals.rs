//! Signals: the first asks for a save and a stop, the second ends at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// Whether a stop was asked for.
#[derive(Clone, Debug)]
pub struct Signals {
    asked: Arc<AtomicBool>,
}

impl Signals {
    /// Takes over SIGINT, SIGTERM and, where there is one, SIGUSR1.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn install() -> anyhow::Result<Self> {
        let asked = Arc::new(AtomicBool::new(false));
        let install = || -> std::io::Result<()> {
            for signal in [SIGINT, SIGTERM] {
                // In this order: the first signal passes the first handler and arms it.
                flag::register_conditional_shutdown(signal, 128 + signal, asked.clone())?;
                flag::register(signal, asked.clone())?;
            }
            #[cfg(unix)]
            flag::register(signal_hook::consts::SIGUSR1, asked.clone())?;
            Ok(())
        };
        install().context("cannot handle signals")?;
        Ok(Self { asked })
    }

    /// Whether one came.
    pub fn stop_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }
}

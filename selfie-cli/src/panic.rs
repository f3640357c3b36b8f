//! The last resort: a panic is a bug, and is said in a line.

use std::panic::{self, AssertUnwindSafe};

use crate::exit::{Exit, printable};
use crate::screen;

/// Runs the program; a panic becomes exit code 1.
pub fn guarded(program: impl FnOnce() -> Exit) -> Exit {
    panic::set_hook(Box::new(|info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let payload = info.payload();
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
        // Threads of the loader panic, too: their error is reported where it arrives.
        // A panic in here would abort, so nothing that can: not even a standard error that is gone.
        screen::line(printable(&format!(
            "error: this is a bug in selfie {}: {text} ({place})",
            env!("CARGO_PKG_VERSION")
        )));
        tracing::error!("panic at {place}: {text}");
    }));
    panic::catch_unwind(AssertUnwindSafe(program)).unwrap_or(Exit::Failed)
}

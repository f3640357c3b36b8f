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

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use std::process::Command;

    const CHILD: &str = "SELFIE_TEST_PANIC";

    /// This test is its own program: it panics where standard error is a full disk.
    #[test]
    fn a_panic_that_cannot_be_said_is_an_exit_code() {
        if std::env::var_os(CHILD).is_some() {
            std::process::exit(guarded(|| panic!("on purpose")) as i32);
        }
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("a full disk");
        let name = "panic::tests::a_panic_that_cannot_be_said_is_an_exit_code";
        let mut child = Command::new(std::env::current_exe().expect("this program"));
        child.args(["--exact", name, "--nocapture"]).env(CHILD, "1").stdout(std::process::Stdio::null()).stderr(full);
        assert_eq!(child.status().expect("it starts").code(), Some(Exit::Failed as i32), "a signal has no code");
    }
}

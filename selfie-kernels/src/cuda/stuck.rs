//! What is told of a kernel that waits for ever. Waits for mbarriers have an end: after about a second threads write where
//! they wait into memory of the host, which outlives their kernel, and stop it (`stop_stuck` of `hopper.h`). The device is
//! lost then, and whichever call fails next finds what they wrote.

use crate::Error;

/// Threads that have room; `STUCK_THREADS` of `stuck.h`.
pub(crate) const STUCK_THREADS: usize = 16;

/// `StuckThread` of `stuck.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, bytemuck::NoUninit)]
pub(crate) struct StuckThread {
    /// 1 if the others were written.
    told: u32,
    thread: u32,
    barrier: u32,
    parity: u32,
    block: [u32; 3],
    grid: [u32; 3],
}

/// What `threads` have told, if anything; `kernel` names the kernel that had a grid.
pub(crate) fn told(threads: &[StuckThread], kernel: impl FnOnce([u32; 3]) -> String) -> Option<Error> {
    let mut told = threads.iter().filter(|thread| thread.told == 1).peekable();
    let StuckThread { block, grid, .. } = **told.peek()?;
    // Those of other blocks mostly wait for the same.
    let waits = told.filter(|thread| thread.block == block).map(|StuckThread { thread, barrier, parity, .. }| {
        format!("{thread} for parity {parity} of the mbarrier at shared address {barrier}")
    });
    let reason = format!(
        "stuck: threads of block {block:?} of {grid:?} wait: {}; a mistake of the program, please report it; the device is \
         lost to this process: start again, the run goes on from its last save",
        waits.collect::<Vec<_>>().join(", ")
    );
    Some(Error::Launch { kernel: kernel(grid), reason })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Memory;
    use crate::cuda::{Address, Cuda, Grid};
    use crate::testing::{Guarded, TestDevice};
    use std::process::Command;

    /// Tells the test's own process, started once more, to get stuck: the device is lost to it.
    const VARIABLE: &str = "SELFIE_TEST_STUCK";

    #[test]
    fn nothing_is_told_of_kernels_that_end() {
        assert_eq!(told(&[StuckThread::default(); STUCK_THREADS], |_| unreachable!("no kernel")), None);
    }

    #[test]
    fn threads_of_the_first_block_are_told() {
        let stuck = StuckThread { told: 1, block: [7, 0, 0], grid: [132, 1, 1], ..StuckThread::default() };
        let threads = [
            StuckThread { thread: 32, barrier: 1032, parity: 1, ..stuck },
            StuckThread { block: [8, 0, 0], thread: 96, ..stuck },
            StuckThread { thread: 64, barrier: 1040, ..stuck },
            StuckThread::default(),
        ];
        let error = told(&threads, |grid| format!("ring of {}", grid[0])).expect("something is told").to_string();
        let expected = "kernel ring of 132: stuck: threads of block [7, 0, 0] of [132, 1, 1] wait: \
                        32 for parity 1 of the mbarrier at shared address 1032, \
                        64 for parity 0 of the mbarrier at shared address 1040; a mistake";
        assert!(error.starts_with(expected), "{error}");
    }

    #[test]
    #[ignore = "takes a CUDA device, or the emulator"]
    fn a_barrier_that_nobody_completes() {
        let device = Cuda::get();
        if !device.facts().hopper {
            eprintln!("not tried: the device has no mbarriers that wait");
            return;
        }
        if std::env::var_os(VARIABLE).is_some() {
            let mut y = Guarded::<Cuda, u32>::poisoned(device, 3 * 128);
            let args: Address = y.view_mut().into();
            let grid = Grid { blocks: [3, 1, 1], threads: 128, shared_bytes: 16 };
            let launched = device.launch_plain("conformance_sm90", "conformance_stuck", grid, &args);
            let error = launched.and_then(|()| device.sync()).expect_err("it is stuck");
            panic!("it ends by {error}");
        }
        let test = std::env::current_exe().expect("the test has a file");
        let mut again = Command::new(test);
        again.args(["--ignored", "--exact", "cuda::stuck::tests::a_barrier_that_nobody_completes"]).env(VARIABLE, "1");
        let ran = again.output().expect("the test starts once more");
        let said = String::from_utf8_lossy(&[ran.stdout, ran.stderr].concat()).into_owned();
        assert!(
            said.contains("it ends by kernel conformance_stuck: stuck: threads of block [1, 0, 0] of [3, 1, 1] wait: "),
            "{said}"
        );
        for thread in [0, 32, 64, 96] {
            assert!(said.contains(&format!(" {thread} for parity 1 of the mbarrier at shared address")), "{said}");
        }
    }
}

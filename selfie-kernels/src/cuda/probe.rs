//! A look for a driver before cudarc is asked, which panics where the library or a function of it is missing.

use crate::{Error, Result};
use cudarc::driver::sys;
use libloading::Library;
use libloading::os::unix::{Library as UnixLibrary, RTLD_GLOBAL, RTLD_NOW};
use std::error::Error as _;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{LazyLock, OnceLock};
use std::time::Duration;

/// Folders beside the loader's own where drivers lie.
const FOLDERS: [&str; 7] = [
    "/usr/local/nvidia/lib64",
    "/usr/local/nvidia/lib",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/lib/wsl/lib",
    "/usr/local/cuda/compat",
];
const LIBRARY: &str = "libcuda.so.1";
/// CUDA 12.4 (driver 550): what the bindings are made for.
const LEAST_DRIVER: i32 = 12_040;
/// What this backend calls, itself and through cudarc. `selfie-cli/tests/devices.rs` trains on a driver that has these
/// functions and no others, and on drivers that lack one of them.
const CALLS: [&str; 43] = [
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuInit",
    "cuLaunchKernelEx",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleGetGlobal_v2",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamIsCapturing",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
];
/// Seconds that a driver has to begin, unless the environment says otherwise: a healthy one answers within a second or two,
/// one with many GPUs to wake within ten.
const LIMIT_SECONDS: u64 = 30;
/// The variable that says otherwise: a whole number of seconds, at least 1; anything else counts for nothing.
const LIMIT_VARIABLE: &str = "SELFIE_CUDA_PROBE_SECONDS";

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// The driver's library: its file, where the system tells.
    pub library: String,
    /// CUDA version that the driver supports, as 13000 for 13.0.
    pub driver: i32,
    /// GPUs.
    pub devices: usize,
}

/// Looks for a driver and its devices, once a process.
///
/// # Errors
/// [`Error::Device`] with what is missing and the way out.
pub fn probe() -> Result<Probe> {
    static FOUND: OnceLock<Result<Probe>> = OnceLock::new();
    FOUND.get_or_init(|| within_limit("looking for devices", look)).clone()
}

fn missing(reason: impl Into<String>) -> Error {
    Error::Device { device: "CUDA".into(), reason: reason.into() }
}

/// Does what a broken driver may never come back from, and gives up after `SELFIE_CUDA_PROBE_SECONDS` (30).
///
/// # Errors
/// Those of the work; [`Error::Device`] when it takes longer.
pub(crate) fn within_limit<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    static LIMIT: LazyLock<Duration> = LazyLock::new(|| limit(std::env::var(LIMIT_VARIABLE).ok().as_deref()));
    within(*LIMIT, what, work)
}

/// The limit that the variable's value asks for.
fn limit(value: Option<&str>) -> Duration {
    let seconds = value.and_then(|value| value.trim().parse().ok()).filter(|&seconds| seconds > 0);
    Duration::from_secs(seconds.unwrap_or(LIMIT_SECONDS))
}

/// `work` on a thread of its own, which is left behind after `limit`: who waits in a driver cannot be stopped.
fn within<T: Send + 'static>(
    limit: Duration,
    what: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (answer, answered) = mpsc::channel();
    let spawned = std::thread::Builder::new().name("cuda-begin".into()).spawn(move || {
        // Nobody listens any more to an answer that comes too late.
        let _ = answer.send(work());
    });
    spawned.map_err(|e| missing(format!("no thread to ask the driver from: {e}")))?;
    answered.recv_timeout(limit).unwrap_or_else(|e| match e {
        RecvTimeoutError::Timeout => Err(missing(format!(
            "the driver did not answer within {} s, {what}; nvidia-smi may tell why, {LIMIT_VARIABLE} gives it longer",
            limit.as_secs_f64()
        ))),
        RecvTimeoutError::Disconnected => Err(missing(format!("{what} ended in a panic"))),
    })
}

fn look() -> Result<Probe> {
    make_loadable()?;
    // SAFETY: loads the library by its usual names, as `make_loadable` has done with one of them.
    if !unsafe { sys::is_culib_present() } {
        return Err(missing(format!("{LIBRARY} was loaded, but is not found again by its name")));
    }
    // The one that cudarc takes, which may be another where several are in the loader's path.
    // SAFETY: it is present, and stays loaded to the end.
    let library = unsafe { sys::culib() };
    let name = file_of(library).unwrap_or_else(|| LIBRARY.to_owned());
    // SAFETY: the functions have these types in every driver since CUDA 2.0.
    let (init, version, count) = unsafe {
        type Answer = unsafe extern "C" fn(*mut i32) -> i32;
        let lacks =
            |function: &str| missing(format!("{name} has no {function}: not a driver's library, or a broken one"));
        let init = library.get::<unsafe extern "C" fn(u32) -> i32>("cuInit").map_err(|_| lacks("cuInit"))?;
        let version = library.get::<Answer>("cuDriverGetVersion").map_err(|_| lacks("cuDriverGetVersion"))?;
        let count = library.get::<Answer>("cuDeviceGetCount").map_err(|_| lacks("cuDeviceGetCount"))?;
        (init, version, count)
    };
    // SAFETY: takes no pointer.
    match unsafe { init(0) } {
        0 => {}
        code => return Err(missing(refusal(code, &name))),
    }
    let ask = |answer: unsafe extern "C" fn(*mut i32) -> i32, what: &str| {
        let mut value = 0;
        // SAFETY: writes one number.
        match unsafe { answer(&mut value) } {
            0 => Ok(value),
            code => Err(missing(format!("{name}: {what} fails with error {code}"))),
        }
    };
    let driver = ask(*version, "cuDriverGetVersion")?;
    if driver < LEAST_DRIVER {
        let [major, minor] = [driver / 1000, driver % 1000 / 10];
        return Err(missing(format!(
            "the driver is of CUDA {major}.{minor}, the kernels need 12.4 (driver 550) or later: update it"
        )));
    }
    require_calls(library, &name)?;
    let devices = ask(*count, "cuDeviceGetCount")?;
    if devices <= 0 {
        return Err(missing(refusal(100, &name)));
    }
    Ok(Probe { library: name, driver, devices: devices as usize })
}

/// Refuses a library without one of the [`CALLS`].
fn require_calls(library: &Library, name: &str) -> Result<()> {
    // SAFETY: only whether there is such a symbol is asked.
    let lacking = CALLS.iter().find(|call| unsafe { library.get::<*const ()>(**call) }.is_err());
    lacking.map_or(Ok(()), |call| {
        Err(missing(format!("{name} has no {call}: the driver is broken, or not NVIDIA's; install it anew")))
    })
}

/// The file that a driver's library was read from; where its `cuInit` lies tells.
fn file_of(library: &Library) -> Option<String> {
    // SAFETY: only its address is used.
    let init = unsafe { library.get::<unsafe extern "C" fn(u32) -> i32>("cuInit") }.ok()?;
    let address = *init as usize;
    let maps = std::fs::read("/proc/self/maps").ok()?;
    String::from_utf8_lossy(&maps).lines().find_map(|line| {
        // `7f3c00-7f3e00 r-xp 00002000 08:01 4711    /usr/lib/libcuda.so.550.54`
        let (start, rest) = line.split_once('-')?;
        let (end, rest) = rest.split_once(' ')?;
        let [start, end] = [start, end].map(|digits| usize::from_str_radix(digits, 16).ok());
        (start? <= address && address < end?).then(|| rest.find('/').map(|at| rest[at..].to_owned()))?
    })
}

/// Loads the library by the loader's own ways or from the usual folders, so that it is found again by its name.
fn make_loadable() -> Result<()> {
    let names = std::iter::once(LIBRARY.to_owned()).chain(FOLDERS.iter().map(|folder| format!("{folder}/{LIBRARY}")));
    let mut broken = None;
    for name in names {
        // SAFETY: loading a driver's library runs its initialisation, which every CUDA program does. For all to see, so
        // that it is found again.
        match unsafe { UnixLibrary::open(Some(&name), RTLD_NOW | RTLD_GLOBAL) } {
            Ok(library) => {
                std::mem::forget(library); // In use to the end.
                return Ok(());
            }
            Err(error) => broken = broken.or(unless_absent(&error, &name)),
        }
    }
    Err(missing(broken.map_or_else(
        || format!("no NVIDIA driver: {LIBRARY} is neither in the loader's path nor in the usual folders"),
        |reason| format!("the driver's library cannot be loaded: {reason}"),
    )))
}

/// What the loader says against a library, unless it only says that there is none of that name.
fn unless_absent(error: &libloading::Error, name: &str) -> Option<String> {
    let said = error.source().map_or_else(|| error.to_string(), ToString::to_string);
    // `libcuda.so.1: cannot open shared object file: No such file or directory`; a library that it needs in turn has
    // another name.
    let absent = said.contains("No such file") && said.contains(&format!("{name}: "));
    (!absent).then_some(said)
}

/// What an error of `cuInit` means to a user.
fn refusal(code: i32, library: &str) -> String {
    match code {
        100 => "the driver finds no GPU; CUDA_VISIBLE_DEVICES may hide it, or a container may need --gpus all".into(),
        34 => format!("{library} is a stub for building programs, not a driver"),
        802 => "the driver's system services are not ready (nvidia-fabricmanager)".into(),
        803 => "the driver's library and its kernel module are of different versions: restart the machine".into(),
        804 => "this GPU is not supported by the forward-compatible driver library in the path".into(),
        999 => "the driver cannot start (error 999); nvidia-smi may tell why, often a restart helps".into(),
        code => format!("the driver cannot start: cuInit fails with error {code}; nvidia-smi may tell why"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_hangs_is_given_up() {
        let hang = || -> Result<()> {
            std::thread::sleep(Duration::from_secs(3600));
            Err(missing("never"))
        };
        let error = within(Duration::from_millis(20), "looking", hang).expect_err("too late");
        assert!(error.to_string().contains("did not answer within 0.02 s"), "{error}");
    }

    #[test]
    fn limits() {
        for (value, seconds) in [(None, 30), (Some("2"), 2), (Some("0"), 30), (Some("-1"), 30), (Some("long"), 30)] {
            assert_eq!(limit(value), Duration::from_secs(seconds), "{value:?}");
        }
    }
}

//! A look for a driver before cudarc is asked, which panics where there is none.

use crate::{Error, Result};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::sync::{OnceLock, mpsc};
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
/// A healthy driver answers within a second or two; one with many GPUs to wake within ten.
const LIMIT: Duration = Duration::from_secs(30);

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// The driver's library.
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
    FOUND.get_or_init(|| within(LIMIT, look)).clone()
}

fn missing(reason: impl Into<String>) -> Error {
    Error::Device { device: "CUDA".into(), reason: reason.into() }
}

/// `look`, given up after `limit`: a broken driver may hang, and its thread with it.
fn within(limit: Duration, look: fn() -> Result<Probe>) -> Result<Probe> {
    let (answer, answered) = mpsc::channel();
    let spawned = std::thread::Builder::new().name("cuda-probe".into()).spawn(move || {
        let _ = answer.send(look());
    });
    spawned.map_err(|e| missing(format!("no thread to look for a driver: {e}")))?;
    answered.recv_timeout(limit).unwrap_or_else(|_| {
        Err(missing(format!("the driver did not answer within {} s; nvidia-smi may tell why", limit.as_secs())))
    })
}

fn look() -> Result<Probe> {
    let (library, name) = open()?;
    let symbol = |function: &str| missing(format!("{name} has no {function}: not a driver's library, or a broken one"));
    // SAFETY: the functions have these types in every driver since CUDA 2.0.
    let (init, version, count) = unsafe {
        let init = library.get::<unsafe extern "C" fn(u32) -> i32>("cuInit").map_err(|_| symbol("cuInit"))?;
        type Answer = unsafe extern "C" fn(*mut i32) -> i32;
        let version = library.get::<Answer>("cuDriverGetVersion").map_err(|_| symbol("cuDriverGetVersion"))?;
        let count = library.get::<Answer>("cuDeviceGetCount").map_err(|_| symbol("cuDeviceGetCount"))?;
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
            "the driver is of CUDA {major}.{minor}, the kernels need 12.4 (driver 550) or later; update it, or use \
             --device cpu"
        )));
    }
    let devices = ask(*count, "cuDeviceGetCount")?;
    if devices <= 0 {
        return Err(missing(refusal(100, &name)));
    }
    // SAFETY: looks for the library by its usual names, the first of which is loaded by now.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return Err(missing(format!("{name} was loaded, but is not found by its name {LIBRARY}")));
    }
    std::mem::forget(library); // In use to the end.
    Ok(Probe { library: name, driver, devices: devices as usize })
}

/// The library, by the loader's own ways or from the usual folders.
fn open() -> Result<(Library, String)> {
    let names = std::iter::once(LIBRARY.to_owned()).chain(FOLDERS.iter().map(|folder| format!("{folder}/{LIBRARY}")));
    for name in names {
        // SAFETY: loading a driver's library runs its initialisation, which every CUDA program does. For all to see, so
        // that it is found again by its name.
        if let Ok(library) = unsafe { Library::open(Some(&name), RTLD_NOW | RTLD_GLOBAL) } {
            return Ok((library, name));
        }
    }
    Err(missing(format!("no NVIDIA driver: no {LIBRARY} in the loader's path, nor in {}", FOLDERS.join(", "))))
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
        let hang = || {
            std::thread::sleep(Duration::from_secs(3600));
            Err(missing("never"))
        };
        let error = within(Duration::from_millis(20), hang).expect_err("too late");
        assert!(error.to_string().contains("did not answer"), "{error}");
    }
}

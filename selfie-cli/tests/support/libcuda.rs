//! A library that looks like a CUDA driver: memory is the host's, kernels do nothing, by a clock of its own in a tick. `tests/devices.rs`
//! compiles it and tells it by `FAKE_CUDA` how to be broken, as `init=999,hang=context`, or which kernels are slow: by
//! `slow=narrow` those that have the word in their names.
#![allow(non_snake_case, clippy::missing_safety_doc)]

use std::alloc::{Layout, alloc_zeroed};
use std::ffi::{CStr, c_void};
use std::ptr::{copy_nonoverlapping, null_mut, write_bytes};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// An answer of the driver; 0 is success.
type Answer = i32;
type Handle = *mut c_void;
const DONE: Answer = 0;
const INVALID: Answer = 1;

fn told(key: &str) -> Option<String> {
    let all = std::env::var("FAKE_CUDA").unwrap_or_default();
    all.split(',')
        .filter_map(|one| one.split_once('='))
        .find(|(name, _)| *name == key)
        .map(|(_, value)| value.to_owned())
}

fn number(key: &str, otherwise: i32) -> i32 {
    told(key).and_then(|value| value.parse().ok()).unwrap_or(otherwise)
}

fn capability() -> i32 {
    number("capability", 90)
}

/// Waits for ever if `hang` is this place.
fn reach(place: &str) {
    while told("hang").as_deref() == Some(place) {
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}

/// Something that only the driver understands.
unsafe fn give(place: *mut Handle) -> Answer {
    unsafe { *place = 1 as Handle };
    DONE
}

fn allocate(bytes: usize) -> *mut u8 {
    unsafe { alloc_zeroed(Layout::from_size_align(bytes, 256).expect("a size")) }
}

/// What the program says where stuck threads tell of it: the pointer that kernels of the last module have.
static STUCK_THREADS: AtomicU64 = AtomicU64::new(0);

/// Thread 128 of block (5, 0, 0) is stuck, in a grid that no kernel has.
unsafe fn get_stuck() {
    let words = [1, 128, 2048, 1, 5, 0, 0, 1_000_000, 1, 1];
    match STUCK_THREADS.load(Ordering::Relaxed) as *mut u32 {
        place if place.is_null() => {}
        place => unsafe { copy_nonoverlapping(words.as_ptr(), place, words.len()) },
    }
}

/// Ticks since the start: one for each kernel, more for a slow one. A recorded step is replayed in as many of these.
static CLOCK: AtomicU64 = AtomicU64::new(0);
const SLOW: u64 = 9;
const TICK: Duration = Duration::from_micros(50);

/// A function's handle: so many times what its PTX was made for, and its ticks.
const MODULE: u64 = 1000;

fn compiled_for(function: Handle) -> i32 {
    (function as u64 / MODULE) as i32
}

/// `CUlaunchConfig`.
#[repr(C)]
pub struct Launch {
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    stream: Handle,
    attributes: *const Attribute,
    count: u32,
}

/// `CUlaunchAttribute`.
#[repr(C)]
pub struct Attribute {
    which: u32,
    pad: u32,
    value: [u64; 8],
}

impl Attribute {
    fn begins_early(&self) -> bool {
        self.which == 6 && self.value[0] as u32 == 1
    }
}

/// When the recording began, and then how long it was.
static RECORDED: AtomicU64 = AtomicU64::new(0);

/// Bytes of what a step says of itself: loss, accuracy, norm, and whether they are finite, which `finite` claims.
const METRICS: usize = 4 * size_of::<f32>();

unsafe fn name_of<'a>(name: *const u8) -> &'a str {
    unsafe { CStr::from_ptr(name.cast()) }.to_str().expect("names are plain")
}

macro_rules! driver {
    ($($name:ident($($argument:ident: $kind:ty),*) $body:block)*) => {
        $(#[no_mangle]
        pub unsafe extern "C" fn $name($($argument: $kind),*) -> Answer {
            $body
        })*
    };
}

driver! {
    cuInit(_flags: u32) {
        reach("init");
        number("init", DONE)
    }
    cuDriverGetVersion(version: *mut i32) {
        unsafe { *version = number("version", 12_080) };
        DONE
    }
    cuDeviceGetCount(count: *mut i32) {
        unsafe { *count = number("devices", 1) };
        DONE
    }
    cuDeviceGet(device: *mut i32, ordinal: i32) {
        unsafe { *device = ordinal };
        DONE
    }
    cuDeviceGetName(name: *mut u8, _room: i32, _device: i32) {
        let text = b"Fake GPU\0";
        unsafe { copy_nonoverlapping(text.as_ptr(), name, text.len()) };
        DONE
    }
    cuDeviceTotalMem_v2(bytes: *mut usize, _device: i32) {
        unsafe { *bytes = 8 << 30 };
        DONE
    }
    cuDeviceGetAttribute(value: *mut i32, which: i32, _device: i32) {
        let capability = capability();
        unsafe {
            *value = match which {
                16 => 4, // multiprocessors
                75 => capability / 10,
                76 => capability % 10,
                97 if capability == 90 => 227 << 10, // shared memory of a block
                97 => 99 << 10,
                _ => 0,
            }
        };
        DONE
    }
    cuDevicePrimaryCtxRetain(context: *mut Handle, _device: i32) {
        reach("context");
        unsafe { give(context) }
    }
    cuDevicePrimaryCtxRelease_v2(_device: i32) { DONE }
    cuCtxGetCurrent(context: *mut Handle) {
        unsafe { *context = null_mut() };
        DONE
    }
    cuCtxSetCurrent(_context: Handle) { DONE }
    cuCtxSynchronize() { DONE }

    cuStreamCreate(stream: *mut Handle, _flags: u32) { unsafe { give(stream) } }
    cuStreamDestroy_v2(_stream: Handle) { DONE }
    cuStreamWaitEvent(_stream: Handle, _event: Handle, _flags: u32) { DONE }
    cuStreamSynchronize(_stream: Handle) { DONE }
    cuStreamIsCapturing(_stream: Handle, status: *mut i32) {
        unsafe { *status = 0 };
        DONE
    }
    cuStreamBeginCapture_v2(_stream: Handle, _mode: u32) {
        RECORDED.store(CLOCK.load(Ordering::Relaxed), Ordering::Relaxed);
        DONE
    }
    cuStreamEndCapture(_stream: Handle, graph: *mut Handle) {
        let began = RECORDED.load(Ordering::Relaxed);
        RECORDED.store(CLOCK.load(Ordering::Relaxed) - began, Ordering::Relaxed);
        unsafe { give(graph) }
    }
    cuEventCreate(event: *mut Handle, _flags: u32) {
        unsafe { *event = Box::into_raw(Box::new(AtomicU64::new(0))).cast() };
        DONE
    }
    cuEventDestroy_v2(_event: Handle) { DONE }
    cuEventRecord(_event: Handle, _stream: Handle) { DONE }
    cuEventSynchronize(_event: Handle) { DONE }

    cuModuleLoadData(module: *mut Handle, image: *const c_void) {
        let is_machine_code = unsafe { image.cast::<[u8; 4]>().read_unaligned() } == *b"\x7fELF";
        let refused = if is_machine_code { number("code", DONE) } else { DONE };
        match number("module", refused) {
            DONE => unsafe {
                // A module is known by what its PTX was made for: it says so itself, and of machine code it goes without saying.
                let of_ptx = || if name_of(image.cast()).contains(".target sm_90a") { 90 } else { 80 };
                let compiled_for = if is_machine_code { capability().min(90) } else { of_ptx() };
                *module = compiled_for as Handle;
                DONE
            },
            refused => refused,
        }
    }
    cuModuleGetGlobal_v2(address: *mut u64, bytes: *mut usize, _module: Handle, _name: *const u8) {
        // The one that there is: where threads tell that they are stuck.
        unsafe {
            *address = (&raw const STUCK_THREADS) as u64;
            *bytes = 8;
        }
        DONE
    }
    cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const u8) {
        // A function is known by its module, and by its ticks.
        let is_slow = told("slow").is_some_and(|word| unsafe { name_of(name) }.contains(&word));
        let ticks = if is_slow { SLOW } else { 1 };
        unsafe { *function = (module as u64 * MODULE + ticks) as Handle };
        DONE
    }
    cuModuleUnload(_module: Handle) { DONE }
    cuFuncGetAttribute(value: *mut i32, which: i32, function: Handle) {
        const PTX_VERSION: i32 = 5;
        unsafe { *value = if which == PTX_VERSION { compiled_for(function) } else { 0 } };
        DONE
    }
    cuFuncSetAttribute(_function: Handle, _which: i32, _value: i32) { DONE }
    cuLaunchKernelEx(config: *const Launch, function: Handle, _arguments: *mut Handle, _extra: *mut Handle) {
        CLOCK.fetch_add(function as u64 % MODULE, Ordering::Relaxed);
        let attributes = unsafe { std::slice::from_raw_parts((*config).attributes, (*config).count as usize) };
        match attributes {
            [] => number("launch", DONE),
            [attribute] if attribute.begins_early() && compiled_for(function) >= 90 => number("early", DONE),
            // Nothing else is asked for, and who does not wait must not begin early.
            _ => INVALID,
        }
    }
    cuGraphInstantiateWithFlags(instance: *mut Handle, _graph: Handle, _flags: u64) { unsafe { give(instance) } }
    cuGraphLaunch(_instance: Handle, _stream: Handle) {
        if told("stuck").is_some() {
            unsafe { get_stuck() };
        }
        if told("slow").is_some() {
            std::thread::sleep(TICK * RECORDED.load(Ordering::Relaxed) as u32);
        }
        number("replay", DONE)
    }
    cuGraphExecDestroy(_instance: Handle) { DONE }
    cuGraphDestroy(_graph: Handle) { DONE }

    cuMemGetInfo_v2(free: *mut usize, all: *mut usize) {
        unsafe {
            *free = 7 << 30;
            *all = 8 << 30;
        }
        DONE
    }
    cuMemAlloc_v2(address: *mut u64, bytes: usize) {
        unsafe { *address = allocate(bytes) as u64 };
        number("alloc", DONE)
    }
    cuMemFree_v2(_address: u64) { DONE }
    cuMemHostAlloc(place: *mut *mut u8, bytes: usize, _flags: u32) {
        unsafe { *place = allocate(bytes) };
        DONE
    }
    cuMemFreeHost(_place: *mut u8) { DONE }
    cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, bytes: usize, _stream: Handle) {
        unsafe { copy_nonoverlapping(from, to as *mut u8, bytes) };
        DONE
    }
    cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, bytes: usize, _stream: Handle) {
        unsafe { copy_nonoverlapping(from as *const u8, to, bytes) };
        if bytes == METRICS && told("finite").is_some() {
            unsafe { to.cast::<f32>().add(3).write_unaligned(1.0) };
        }
        DONE
    }
    cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, _stream: Handle) {
        unsafe { copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        DONE
    }
    cuMemsetD8Async(to: u64, byte: u8, bytes: usize, _stream: Handle) {
        unsafe { write_bytes(to as *mut u8, byte, bytes) };
        DONE
    }
}

// What only kernels for Hopper need: without them a driver is taken for one of an older GPU.

driver! {
    cuTensorMapEncodeTiled(
        map: *mut u8, _kind: i32, _rank: u32, _address: Handle, _sizes: *const u64, _strides: *const u64,
        _sides: *const u32, _steps: *const u32, _interleave: i32, _swizzle: i32, _promotion: i32, _fill: i32
    ) {
        unsafe { write_bytes(map, 0, 128) };
        DONE
    }
    cuTensorMapEncodeIm2col(
        map: *mut u8, _kind: i32, _rank: u32, _address: Handle, _sizes: *const u64, _strides: *const u64,
        _lower: *const i32, _upper: *const i32, _channels: u32, _pixels: u32, _steps: *const u32, _interleave: i32,
        _swizzle: i32, _promotion: i32, _fill: i32
    ) {
        unsafe { write_bytes(map, 0, 128) };
        DONE
    }
}

// What only measurements need.

driver! {
    cuEventRecordWithFlags(event: Handle, _stream: Handle, _flags: u32) {
        unsafe { &*event.cast::<AtomicU64>() }.store(CLOCK.load(Ordering::Relaxed), Ordering::Relaxed);
        DONE
    }
    cuEventElapsedTime(milliseconds: *mut f32, from: Handle, to: Handle) {
        let [from, to] = [from, to].map(|event| unsafe { &*event.cast::<AtomicU64>() }.load(Ordering::Relaxed));
        unsafe { *milliseconds = (to - from) as f32 * TICK.as_secs_f32() * 1e3 };
        DONE
    }
}

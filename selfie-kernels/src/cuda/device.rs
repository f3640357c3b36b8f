//! The machine's own driver, through cudarc.
//!
//! cudarc panics where the driver's library or one of its symbols is missing, so [`super::probe`] has looked first.

use super::driver::{Address, Boxes, Call, Driver, Facts, Replay, Start, TensorMap, Windows};
use super::modules::{self, Form, Image};
use super::probe::{Probe, probe, within_limit};
use super::stuck::{STUCK_THREADS, StuckThread, told};
use crate::error::require;
use crate::profile::Timeline;
use crate::{Error, Result};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUfunction_attribute as FunctionAttribute, CUresult};
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream, DevicePtrMut, DriverError, result};
use cudarc::nvrtc::Ptx;
use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Compute capability from which the kernels run: bf16 tensor cores and asynchronous copies.
pub(crate) const LEAST_CAPABILITY: u32 = 80;

/// A GPU with its queue.
#[derive(Debug)]
pub(crate) struct Device {
    context: Arc<CudaContext>,
    queue: Arc<Queue>,
    /// What may run beside it: kernels.
    branch: Branch,
    /// And copies of [`Driver::stage`].
    copies: Arc<CudaStream>,
    facts: Facts,
    kernels: Mutex<Kernels>,
    /// Where there are kernels with mbarriers.
    watch: Option<Arc<Watch>>,
    staging: Mutex<Staging>,
    /// Whether every launch is waited for (`SELFIE_SYNC=1`), to name the kernel that fails.
    wait: Wait,
    /// When kernels begin that may begin early: in turn with `SELFIE_OVERLAP=0`, to measure what is gained.
    start: Start,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    EachLaunch,
    Never,
}

/// A queue of work. Kernels may begin early only right behind a kernel, never behind anything else.
#[derive(Debug)]
struct Queue {
    stream: Arc<CudaStream>,
    is_behind_kernel: AtomicBool,
}

impl Queue {
    fn new(context: &Arc<CudaContext>) -> std::result::Result<Self, DriverError> {
        Ok(Self { stream: context.new_stream()?, is_behind_kernel: AtomicBool::new(false) })
    }

    /// For something else than a kernel.
    fn for_other_work(&self) -> &Arc<CudaStream> {
        self.is_behind_kernel.store(false, Ordering::Relaxed);
        &self.stream
    }

    /// For a kernel that may begin so, and when it does.
    fn for_kernel(&self, start: Start) -> (&Arc<CudaStream>, Start) {
        let is_behind_kernel = self.is_behind_kernel.swap(true, Ordering::Relaxed);
        (&self.stream, if is_behind_kernel { start } else { Start::InTurn })
    }
}

/// A second queue, for what [`Driver::branch`] says.
#[derive(Debug)]
struct Branch {
    queue: Arc<Queue>,
    /// Whether calls go there.
    is_open: AtomicBool,
    /// Behind what it waits for.
    forked: CudaEvent,
    /// Behind its own work.
    done: CudaEvent,
}

/// What is loaded.
#[derive(Debug, Default)]
struct Kernels {
    modules: HashMap<&'static str, (Arc<CudaModule>, Form)>,
    /// When each may begin, too.
    functions: HashMap<String, (CudaFunction, Start)>,
}

/// Where kernels tell who is stuck, and which kernels there were.
#[derive(Debug)]
struct Watch {
    context: Arc<CudaContext>,
    /// `[WATCHED, STUCK_THREADS]`, page-locked: kernels know it by the same address.
    place: *mut StuckThread,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// The modules that have a part of the place each, in this order.
    modules: Vec<&'static str>,
    /// Kernels that were launched, by module and grid: a kernel cannot tell its name.
    launched: HashMap<(&'static str, [u32; 3]), BTreeSet<String>>,
}

/// Modules that have room: those for Hopper, and that of the wrappers' tests.
const WATCHED: usize = 8;

// SAFETY: `place` is owned, and only ever read by the host after it was made.
unsafe impl Send for Watch {}
// SAFETY: as above.
unsafe impl Sync for Watch {}

impl Watch {
    fn new(context: &Arc<CudaContext>) -> std::result::Result<Self, DriverError> {
        context.bind_to_thread()?;
        let threads = WATCHED * STUCK_THREADS;
        // SAFETY: a plain allocation, owned by the `Watch`; nobody else knows it while it is cleared.
        let place = unsafe {
            let place = result::malloc_host(threads * size_of::<StuckThread>(), 0)?.cast::<StuckThread>();
            place.write_bytes(0, threads);
            place
        };
        Ok(Self { context: context.clone(), place, known: Mutex::default() })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the kernels of a module know where to tell, if there is room.
    fn add(
        &self,
        name: &'static str,
        module: &Arc<CudaModule>,
        stream: &Arc<CudaStream>,
    ) -> std::result::Result<(), DriverError> {
        let mut known = self.known();
        if known.modules.len() == WATCHED {
            return Ok(());
        }
        let part = self.place.wrapping_add(known.modules.len() * STUCK_THREADS) as u64;
        let mut pointer = module.get_global("stuck_threads", stream)?;
        // SAFETY: the module's pointer has eight bytes; `part` stays until the copy is waited for.
        unsafe { result::memcpy_htod_async(pointer.device_ptr_mut(stream).0, &[part], stream.cu_stream()) }?;
        stream.synchronize()?;
        known.modules.push(name);
        Ok(())
    }

    fn note(&self, call: &Call<'_>) {
        let mut known = self.known();
        if known.modules.contains(&call.module) {
            known.launched.entry((call.module, call.grid)).or_default().insert(call.kernel.to_owned());
        }
    }

    /// What a kernel has told that is stuck.
    fn told(&self) -> Option<Error> {
        let known = self.known();
        known.modules.iter().enumerate().find_map(|(i, module)| {
            // SAFETY: each module that is known has as many, and the place is there as long as this is.
            let threads: [_; STUCK_THREADS] =
                std::array::from_fn(|t| unsafe { self.place.add(i * STUCK_THREADS + t).read_volatile() });
            told(&threads, |grid| match known.launched.get(&(*module, grid)) {
                Some(kernels) => kernels.iter().map(String::as_str).collect::<Vec<_>>().join(" or "),
                None => format!("of {module}.cu"),
            })
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: given back once; its modules' kernels have ended, as the context waits for them.
            let _ = unsafe { result::free_host(self.place.cast()) };
        }
    }
}

/// What a stuck kernel has told, or else `error`, which is how the driver puts it.
fn told_or(watch: Option<&Arc<Watch>>, error: impl FnOnce() -> Error) -> Error {
    watch.and_then(|watch| watch.told()).unwrap_or_else(error)
}

/// The way of staged copies: host memory that the device reads by itself, and the order with the queue.
#[derive(Debug)]
struct Staging {
    /// For each place that is staged into.
    pinned: HashMap<u64, Pinned>,
    /// Behind the last staged copy.
    staged: CudaEvent,
    /// Behind the last work of the queue that may have read what was staged.
    taken: CudaEvent,
    /// Whether something was staged that the queue does not wait for yet.
    pending: Pending,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pending {
    Nothing,
    Staged,
}

/// Page-locked host memory.
#[derive(Debug)]
struct Pinned {
    place: *mut u8,
    bytes: usize,
    /// Behind the copy that reads it.
    read: CudaEvent,
}

// SAFETY: `place` is owned, and only touched under the lock of `Staging`.
unsafe impl Send for Pinned {}

impl Device {
    /// GPU number `ordinal`.
    ///
    /// # Errors
    /// [`Error::Device`] with what is missing and the way out.
    pub(crate) fn open(ordinal: usize) -> Result<Self> {
        let Probe { devices, .. } = probe()?;
        require_ordinal(ordinal, devices)?;
        let facts = facts(ordinal)?;
        if facts.capability < LEAST_CAPABILITY {
            return Err(Error::Device {
                device: format!("GPU {ordinal}, {}", facts.name),
                reason: format!(
                    "compute capability {}.{}, the kernels need 8.0 (Ampere) or later",
                    facts.capability / 10,
                    facts.capability % 10
                ),
            });
        }
        let failed = |what: &str, e: DriverError| Error::Device { device: facts.name.clone(), reason: reason(what, e) };
        let named = facts.name.clone();
        let context = within_limit("making a context", move || {
            CudaContext::new(ordinal).map_err(|e| Error::Device { device: named, reason: reason("no context", e) })
        })?;
        // SAFETY: nothing is allocated yet, and this backend orders its work itself: a queue, and events for what is beside it.
        unsafe { context.disable_event_tracking() };
        let queue = || Queue::new(&context).map(Arc::new).map_err(|e| failed("no stream", e));
        let copies = context.new_stream().map_err(|e| failed("no stream", e))?;
        let event = || context.new_event(None).map_err(|e| failed("no event", e));
        let branch = Branch { queue: queue()?, is_open: AtomicBool::new(false), forked: event()?, done: event()? };
        let queue = queue()?;
        let staging = Staging { pinned: HashMap::new(), staged: event()?, taken: event()?, pending: Pending::Nothing };
        let watch = if facts.hopper {
            let watch = Watch::new(&context).map_err(|e| failed("no page-locked memory", e))?;
            Some(Arc::new(watch))
        } else {
            None
        };
        let is_set = |variable: &str, to: &str| std::env::var_os(variable).is_some_and(|value| value == to);
        let wait = if is_set("SELFIE_SYNC", "1") { Wait::EachLaunch } else { Wait::Never };
        let start = if is_set("SELFIE_OVERLAP", "0") { Start::InTurn } else { Start::Early };
        let (kernels, staging) = (Mutex::default(), Mutex::new(staging));
        Ok(Self { context, queue, branch, copies, facts, kernels, watch, staging, wait, start })
    }

    /// An error of the driver in words.
    fn failed(&self, what: &str, e: DriverError) -> Error {
        told_or(self.watch.as_ref(), || Error::Device { device: self.facts.name.clone(), reason: reason(what, e) })
    }

    /// Where calls go.
    fn open_queue(&self) -> &Queue {
        if self.branch.is_open.load(Ordering::Relaxed) { &self.branch.queue } else { &self.queue }
    }

    fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|e| self.failed("an earlier call failed", e))
    }

    fn kernels(&self) -> MutexGuard<'_, Kernels> {
        self.kernels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn staging(&self) -> MutexGuard<'_, Staging> {
        self.staging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The module, loaded if it is not.
    fn module<'k>(&self, kernels: &'k mut Kernels, name: &'static str) -> Result<&'k (Arc<CudaModule>, Form)> {
        match kernels.modules.entry(name) {
            Entry::Occupied(loaded) => Ok(loaded.into_mut()),
            Entry::Vacant(place) => {
                let refused = |reason: String| Error::Module { module: format!("{name}.cu"), reason };
                let take = |image| {
                    let (image, what) = match image {
                        Image::MachineCode(code) => (Ptx::from_binary(code), "the driver refuses it"),
                        Image::Ptx(text) => (Ptx::from_src(text), "the driver refuses them; a newer one may be needed"),
                    };
                    self.context.load_module(image).map_err(|e| reason(what, e))
                };
                let (module, form) = modules::load(name, self.facts.capability, take).map_err(refused)?;
                if let Some(watch) = self.watch.as_ref().filter(|_| name.ends_with("_sm90")) {
                    // Kernels that cannot tell are better than none.
                    let _ = watch.add(name, &module, &self.copies);
                }
                Ok(place.insert((module, form)))
            }
        }
    }

    /// The kernel, loaded at its first call, and when it may begin.
    fn function(&self, module: &'static str, kernel: &str) -> Result<(sys::CUfunction, Start)> {
        // From which on kernels wait for earlier ones: `wait_for_earlier_kernels` of `device.h`.
        const WAITS_FROM: i32 = 90;
        let mut kernels = self.kernels();
        if let Some((function, start)) = kernels.functions.get(kernel) {
            return Ok((function.cu_function(), *start));
        }
        let refused = |reason: String| Error::Module { module: format!("{module}.cu, {kernel}"), reason };
        let (loaded, _) = self.module(&mut kernels, module)?;
        let function = loaded.load_function(kernel).map_err(|e| refused(reason("not found", e)))?;
        let attribute = |which| function.get_attribute(which).map_err(|e| refused(reason("no attribute", e)));
        // Static and dynamic shared memory together may pass what is given unasked: all that there is may be asked for.
        let fixed = attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        // The architecture that its PTX was made for, whatever was made of that: what `__CUDA_ARCH__` was in its source.
        let compiled_for = attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_PTX_VERSION)?;
        let start = if compiled_for >= WAITS_FROM { self.start } else { Start::InTurn };
        let most = self.facts.shared_bytes as i32 - fixed;
        function
            .set_attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most)
            .map_err(|e| refused(reason("no attribute", e)))?;
        let handle = function.cu_function();
        kernels.functions.insert(kernel.to_owned(), (function, start));
        Ok((handle, start))
    }

    /// Lets the queue wait for what was staged.
    fn take_staged(&self) -> Result<()> {
        let mut staging = self.staging();
        match std::mem::replace(&mut staging.pending, Pending::Nothing) {
            Pending::Nothing => Ok(()),
            Pending::Staged => self.queue.for_other_work().wait(&staging.staged),
        }
        .map_err(|e| self.failed("cannot wait for a copy", e))
    }

    /// To be called behind work that may have read what was staged.
    fn mark_taken(&self) -> Result<()> {
        self.staging().taken.record(self.queue.for_other_work()).map_err(|e| self.failed("cannot record an event", e))
    }

    fn is_recording(&self) -> Result<bool> {
        let status = self.queue.stream.capture_status().map_err(|e| self.failed("no status of the queue", e))?;
        Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }
}

/// What GPU number `ordinal` is; nothing is begun on it.
fn facts(ordinal: usize) -> Result<Facts> {
    let failed =
        |what: &str, e: DriverError| Error::Device { device: format!("GPU {ordinal}"), reason: reason(what, e) };
    let device = result::device::get(ordinal as i32).map_err(|e| failed("no device", e))?;
    // SAFETY: `device` was given by the driver.
    let attribute = |attribute| unsafe { result::device::get_attribute(device, attribute) };
    let attribute = |which| attribute(which).map_err(|e| failed("no attribute", e));
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let capability = (10 * major + minor) as u32;
    Ok(Facts {
        name: result::device::get_name(device).map_err(|e| failed("no name", e))?,
        capability,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        // SAFETY: as above.
        memory_bytes: unsafe { result::device::total_mem(device) }.map_err(|e| failed("no memory size", e))?,
        shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
        l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        hopper: capability == 90 && makes_tensor_maps(),
    })
}

/// Whether the driver has the functions that cudarc would panic without; no driver need have them, see [`super::probe`].
fn makes_tensor_maps() -> bool {
    // SAFETY: the library is loaded; only whether there is such a symbol is asked.
    let has = |call: &str| unsafe { sys::culib().get::<*const ()>(call) }.is_ok();
    ["cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col"].into_iter().all(has)
}

/// All GPUs of this machine.
///
/// # Errors
/// As [`probe`].
pub fn gpus() -> Result<Vec<Facts>> {
    (0..probe()?.devices).map(facts).collect()
}

/// Refuses a device number beyond those there are.
fn require_ordinal(ordinal: usize, devices: usize) -> Result<()> {
    if ordinal < devices {
        return Ok(());
    }
    let there = if devices == 1 { "there is one, number 0".to_owned() } else { format!("there are {devices}, from 0") };
    Err(Error::Device { device: format!("GPU {ordinal}"), reason: format!("no such device: {there}") })
}

/// Of a launch: the kernel may begin beside the last blocks of the one before it, for whose end it waits itself.
fn begin_early() -> sys::CUlaunchAttribute {
    let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
    value.programmaticStreamSerializationAllowed = 1;
    let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    sys::CUlaunchAttribute { id, pad: [0; 4], value }
}

/// What the driver answered, by the name that its manual has.
fn reason(what: &str, e: DriverError) -> String {
    let lost = matches!(
        e.0,
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
            | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUresult::CUDA_ERROR_LAUNCH_FAILED
            | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
            | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
            | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUresult::CUDA_ERROR_INVALID_PC
            | CUresult::CUDA_ERROR_ASSERT
            | CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
            | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE
    );
    let advice =
        if lost { "; the device is lost to this process: start again, the run goes on from its last save" } else { "" };
    format!("{what}: {:?}{advice}", e.0)
}

impl Driver for Device {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn free_bytes(&self) -> Result<usize> {
        self.context.mem_get_info().map(|(free, _)| free).map_err(|e| self.failed("no memory size", e))
    }

    fn alloc(&self, bytes: usize) -> Result<Address> {
        self.bind()?;
        // SAFETY: `bytes` is not 0: empty buffers have no allocation.
        match unsafe { result::malloc_sync(bytes) } {
            Ok(place) => Ok(Address(place)),
            Err(e) if e.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                Err(Error::OutOfMemory { bytes, device: self.facts.name.clone() })
            }
            Err(e) => Err(self.failed("no memory", e)),
        }
    }

    fn free(&self, address: Address) {
        if self.bind().is_ok() {
            // SAFETY: an address of `alloc`, given back once, by its buffer's drop; the driver waits for the device first.
            // An error here is one of earlier work, which its next call reports.
            let _ = unsafe { result::free_sync(address.0) };
        }
    }

    fn upload(&self, host: &[u8], to: Address) -> Result<()> {
        self.bind()?;
        // SAFETY: `to` is a live view of as many bytes; pageable memory has been read when the call returns.
        unsafe { result::memcpy_htod_async(to.0, host, self.queue.for_other_work().cu_stream()) }
            .map_err(|e| self.failed("an upload", e))
    }

    fn stage(&self, host: &[u8], to: Address) -> Result<()> {
        self.bind()?;
        let mut staging = self.staging();
        let failed = |e| self.failed("a staged copy", e);
        if staging.pinned.get(&to.0).is_none_or(|pinned| pinned.bytes < host.len()) {
            let read = self.context.new_event(None).map_err(failed)?;
            // SAFETY: a plain allocation, owned by the `Pinned` that takes it.
            let place = unsafe { result::malloc_host(host.len().max(1), 0) }.map_err(failed)?.cast::<u8>();
            staging.pinned.insert(to.0, Pinned { place, bytes: host.len(), read });
        }
        let Staging { pinned, staged, taken, pending } = &mut *staging;
        let pinned = &pinned[&to.0];
        // The copy before this one has left the host.
        pinned.read.synchronize().map_err(failed)?;
        // SAFETY: `place` has at least `host.len()` bytes, and no copy reads it now.
        let bytes = unsafe {
            std::ptr::copy_nonoverlapping(host.as_ptr(), pinned.place, host.len());
            std::slice::from_raw_parts(pinned.place, host.len())
        };
        self.copies.wait(taken).map_err(failed)?;
        // SAFETY: `to` is a live view of as many bytes; `bytes` stays until `read` has passed.
        unsafe { result::memcpy_htod_async(to.0, bytes, self.copies.cu_stream()) }.map_err(failed)?;
        pinned.read.record(&self.copies).map_err(failed)?;
        staged.record(&self.copies).map_err(failed)?;
        *pending = Pending::Staged;
        Ok(())
    }

    fn download(&self, from: Address, host: &mut [u8]) -> Result<()> {
        self.bind()?;
        // SAFETY: `from` is a live view of as many bytes; `host` is borrowed until the wait below.
        unsafe { result::memcpy_dtoh_async(host, from.0, self.queue.for_other_work().cu_stream()) }
            .map_err(|e| self.failed("a download", e))?;
        self.sync()
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.bind()?;
        let recording = self.is_recording()?;
        if !recording {
            self.take_staged()?;
        }
        // SAFETY: both are live views of as many bytes.
        unsafe { result::memcpy_dtod_async(to.0, from.0, bytes, self.open_queue().for_other_work().cu_stream()) }
            .map_err(|e| self.failed("a copy", e))?;
        if recording { Ok(()) } else { self.mark_taken() }
    }

    fn fill(&self, to: Address, byte: u8, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: `to` is a live view of as many bytes.
        unsafe { result::memset_d8_async(to.0, byte, bytes, self.open_queue().for_other_work().cu_stream()) }
            .map_err(|e| self.failed("a fill", e))
    }

    fn map_boxes(&self, boxes: &Boxes<'_>) -> Result<TensorMap> {
        boxes.check()?;
        let Boxes { address, dims, strides, sides } = *boxes;
        let wide = |sizes: &[usize]| sizes.iter().map(|&size| size as u64).collect::<Vec<_>>();
        let (sizes, strides) = (wide(dims), wide(strides));
        let sides: Vec<_> = sides.iter().map(|&side| side as u32).collect();
        let steps = [1_u32; 5];
        let mut map = TensorMap([0; 128]);
        // SAFETY: facts say `hopper` only where the driver has this function. `map` has the size and alignment of a
        // `CUtensorMap`, the others as many elements as there are dimensions; the driver keeps none of them.
        let made = unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map).cast(),
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                dims.len() as u32,
                address.0 as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                sides.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        made.result().map_err(|e| boxes.refused(&reason("the driver says", e)))?;
        Ok(map)
    }

    fn map_windows(&self, windows: &Windows) -> Result<TensorMap> {
        windows.check()?;
        let [first, last] = windows.corners().map(|corner| [corner; 2]);
        let (sizes, strides, step) = (windows.sizes(), windows.strides(), windows.dims.stride as u32);
        let steps = [1, step, step, 1];
        let mut map = TensorMap([0; 128]);
        // SAFETY: as above; the corners are those of two dimensions.
        let made = unsafe {
            sys::cuTensorMapEncodeIm2col(
                (&raw mut map).cast(),
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                4,
                windows.address.0 as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                first.as_ptr(),
                last.as_ptr(),
                64,
                windows.count as u32,
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        made.result().map_err(|e| windows.refused(&reason("the driver says", e)))?;
        Ok(map)
    }

    fn load(&self, module: &'static str) -> Result<Form> {
        self.bind()?;
        self.module(&mut self.kernels(), module).map(|(_, form)| form.clone())
    }

    fn launch(&self, call: &Call<'_>) -> Result<()> {
        self.bind()?;
        let (function, start) = self.function(call.module, call.kernel)?;
        if let Some(watch) = &self.watch {
            watch.note(call);
        }
        let failed = |e| {
            let refused = || Error::Launch { kernel: call.kernel.into(), reason: reason("the driver says", e) };
            told_or(self.watch.as_ref(), refused)
        };
        let mut params = [call.args.as_ptr().cast_mut().cast::<c_void>()];
        let [x, y, z] = call.grid;
        // Early on a branch, it could take the multiprocessors that the branch before left to what runs beside it.
        let start = if self.branch.is_open.load(Ordering::Relaxed) { Start::InTurn } else { start };
        let (stream, start) = self.open_queue().for_kernel(start);
        let mut early = begin_early();
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: call.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: call.shared_bytes,
            hStream: stream.cu_stream(),
            attrs: &raw mut early,
            numAttrs: (start == Start::Early).into(),
        };
        // SAFETY: the kernel takes one structure by value, of the length of `args` (a test compares each with its PTX); the
        // addresses in it are those of live views, whose lengths the operation's `check` has seen. One that begins early
        // waits before it does anything.
        unsafe { sys::cuLaunchKernelEx(&raw const config, function, params.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(failed)?;
        match self.wait {
            Wait::EachLaunch if !self.is_recording()? => stream.synchronize().map_err(failed),
            _ => Ok(()),
        }
    }

    fn start(&self, module: &'static str, kernel: &str) -> Result<Start> {
        self.bind()?;
        self.function(module, kernel).map(|(_, start)| start)
    }

    fn branch(&self) -> Result<()> {
        let Branch { queue, is_open, forked, .. } = &self.branch;
        let forked_off = forked.record(self.queue.for_other_work()).and_then(|()| queue.for_other_work().wait(forked));
        forked_off.map_err(|e| self.failed("cannot begin a branch", e))?;
        is_open.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn trunk(&self) -> Result<()> {
        let Branch { queue, is_open, done, .. } = &self.branch;
        is_open.store(false, Ordering::Relaxed);
        done.record(queue.for_other_work()).map_err(|e| self.failed("cannot end a branch", e))
    }

    fn join(&self) -> Result<()> {
        let queue = self.queue.for_other_work();
        queue.wait(&self.branch.done).map_err(|e| self.failed("cannot wait for a branch", e))
    }

    fn sync(&self) -> Result<()> {
        self.queue.stream.synchronize().map_err(|e| self.failed("waiting for the device", e))
    }

    fn begin_recording(&self) -> Result<()> {
        self.queue
            .for_other_work()
            .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .map_err(|e| self.failed("cannot record", e))
    }

    fn end_recording(&self) -> Result<Box<dyn Replay>> {
        self.bind()?;
        let failed = |e| self.failed("cannot record", e);
        // SAFETY: the stream is live, and captures since `begin_recording`.
        let graph = unsafe { result::stream::end_capture(self.queue.for_other_work().cu_stream()) }.map_err(failed)?;
        require("repeat", !graph.is_null(), || "the recording was broken off".into())?;
        // SAFETY: the graph was made just now.
        let instance =
            unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) }.map_err(failed)?;
        Ok(Box::new(Graph { graph, instance, queue: self.queue.clone(), watch: self.watch.clone() }))
    }

    fn timeline(&self) -> Box<dyn Timeline> {
        let (queue, name, watch) = (self.queue.clone(), self.facts.name.clone(), self.watch.clone());
        Box::new(Events { queue, points: Mutex::default(), name, watch })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.bind().is_err() {
            return;
        }
        let _ = self.copies.synchronize();
        for pinned in self.staging.get_mut().unwrap_or_else(PoisonError::into_inner).pinned.values() {
            // SAFETY: given back once; no copy is under way any more.
            let _ = unsafe { result::free_host(pinned.place.cast()) };
        }
    }
}

/// Events of the queue, with the device's own time.
#[derive(Debug)]
struct Events {
    queue: Arc<Queue>,
    points: Mutex<Points>,
    /// Of the device.
    name: String,
    watch: Option<Arc<Watch>>,
}

/// Events, of which the first ones are set. None is ever given back: a graph may still hold it.
#[derive(Debug, Default)]
struct Points {
    events: Vec<CudaEvent>,
    set: usize,
}

impl Events {
    fn points(&self) -> MutexGuard<'_, Points> {
        self.points.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, e: DriverError) -> Error {
        let late = || Error::Device { device: self.name.clone(), reason: reason("no time of the queue", e) };
        told_or(self.watch.as_ref(), late)
    }
}

impl Timeline for Events {
    fn mark(&self) -> Result<()> {
        use sys::CUevent_record_flags_enum::{CU_EVENT_RECORD_DEFAULT, CU_EVENT_RECORD_EXTERNAL};
        let failed = |e| self.failed(e);
        let stream = self.queue.for_other_work();
        let mut points = self.points();
        if points.set == points.events.len() {
            let event = stream.context().new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).map_err(failed)?;
            points.events.push(event);
        }
        let event = points.events[points.set].cu_event();
        points.set += 1;
        // In a recording an event is only an order of its work, unless it is said to be asked for from outside.
        let flags = match stream.capture_status().map_err(failed)? {
            sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE => CU_EVENT_RECORD_DEFAULT,
            _ => CU_EVENT_RECORD_EXTERNAL,
        };
        stream.context().bind_to_thread().map_err(failed)?;
        // SAFETY: stream and event are live, and of the context that is bound.
        unsafe { sys::cuEventRecordWithFlags(event, stream.cu_stream(), flags as u32) }.result().map_err(failed)
    }

    fn clear(&self) {
        self.points().set = 0;
    }

    fn seconds(&self) -> Result<Vec<f64>> {
        self.queue.stream.synchronize().map_err(|e| self.failed(e))?;
        let points = self.points();
        let set = &points.events[..points.set];
        let since_first = |event: &CudaEvent| set[0].elapsed_ms(event).map(|ms| 1e-3 * f64::from(ms));
        set.iter().map(since_first).collect::<std::result::Result<_, _>>().map_err(|e| self.failed(e))
    }
}

/// A captured graph.
#[derive(Debug)]
struct Graph {
    graph: sys::CUgraph,
    instance: sys::CUgraphExec,
    queue: Arc<Queue>,
    watch: Option<Arc<Watch>>,
}

// SAFETY: graphs may be used from any thread, one at a time; `Recording` holds a lock around each use.
unsafe impl Send for Graph {}

impl Replay for Graph {
    fn replay(&self) -> Result<()> {
        let failed = |e| {
            let refused =
                || Error::Launch { kernel: "of the recorded step".into(), reason: reason("the driver says", e) };
            told_or(self.watch.as_ref(), refused)
        };
        let stream = self.queue.for_other_work();
        stream.context().bind_to_thread().map_err(failed)?;
        // SAFETY: the instance is live, and so are the buffers that its work uses: `Memory::repeat` asks for that.
        unsafe { result::graph::launch(self.instance, stream.cu_stream()) }.map_err(failed)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let stream = &self.queue.stream;
        if stream.context().bind_to_thread().is_ok() {
            let _ = stream.synchronize();
            // SAFETY: both were made by `end_recording`, and nothing uses them any more.
            unsafe {
                let _ = result::graph::exec_destroy(self.instance);
                let _ = result::graph::destroy(self.graph);
            }
        }
    }
}

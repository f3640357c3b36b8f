//! The emulator as a driver: the kernels' own sources, compiled for the CPU by `cuda/emulator/build`, in a library that
//! this module loads. It needs no GPU, and finds missing barriers, strayed addresses and races that a GPU would hide.

use super::driver::{Address, Boxes, Call, Driver, Facts, Replay, Start, TensorMap, Windows};
use super::modules::Form;
use super::stuck::{STUCK_THREADS, StuckThread, told};
use crate::profile::Timeline;
use crate::{Error, Result};
use libloading::{Library, Symbol};
use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What an emulated kernel takes; `EmuLaunch` in `cuda/emulator/emulator.h`.
#[repr(C)]
struct EmuLaunch {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u64,
    args: *const u8,
    args_bytes: u64,
    stuck: *mut StuckThread,
}

/// `TensorMap` in `cuda/emulator/hopper.h`.
#[repr(C, align(64))]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct EmuTensorMap {
    data: Address,
    rank: u32,
    swizzled: u32,
    size: [u64; 5],
    stride: [u64; 5],
    sides: [u32; 5],
    /// Of windows alone.
    step: i32,
    first: i32,
    last: i32,
}

impl EmuTensorMap {
    /// Sides that are not given are 1.
    fn new(data: Address, sizes: &[u64], strides: &[u64], sides: &[u32]) -> Self {
        let mut map = Self {
            data,
            rank: sizes.len() as u32,
            swizzled: 1,
            size: [0; 5],
            stride: [2; 5],
            sides: [1; 5],
            step: 0,
            first: 0,
            last: 0,
        };
        map.size[..sizes.len()].copy_from_slice(sizes);
        map.stride[1..=strides.len()].copy_from_slice(strides);
        map.sides[..sides.len()].copy_from_slice(sides);
        map
    }
}

type Kernel = unsafe extern "C" fn(*const EmuLaunch);
type Alloc = unsafe extern "C" fn(u64) -> *mut u8;
type Free = unsafe extern "C" fn(*mut u8);

/// Kernels on the CPU; device memory is host memory.
#[derive(Debug)]
pub(crate) struct Emulator {
    library: Arc<Library>,
    facts: Facts,
    queue: Queue,
}

/// Work is done when it comes, unless it is recorded, or comes from two sides.
#[derive(Debug, Clone, Default)]
struct Queue(Arc<Mutex<Work>>);

#[derive(Debug, Default)]
struct Work {
    recording: Option<Vec<Entry>>,
    /// What the branch has, and the trunk beside it; the last one that there is takes what comes.
    sides: Vec<VecDeque<Entry>>,
    joins: usize,
}

impl Work {
    /// Runs, or writes down.
    fn put(&mut self, entry: Entry) -> Result<()> {
        match &mut self.recording {
            Some(entries) => entries.push(entry),
            None => entry.run()?,
        }
        Ok(())
    }

    /// Does what two sides have, in an order that a device may have, too: one after the other, or by turns; and either
    /// begins. From one time to the next that is another one, so that what a side needs of the other shows.
    fn join(&mut self) -> Result<()> {
        let mut sides = std::mem::take(&mut self.sides);
        let (second, by_turns) = (self.joins % 2, self.joins / 2 % 2 == 1);
        self.joins += 1;
        sides.rotate_left(second);
        while let Some(entry) = sides.iter_mut().find_map(VecDeque::pop_front) {
            self.put(entry)?;
            if by_turns {
                sides.rotate_left(1);
            }
        }
        Ok(())
    }
}

impl Queue {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, entry: Entry) -> Result<()> {
        let mut work = self.work();
        match work.sides.last_mut() {
            Some(side) => {
                side.push_back(entry);
                Ok(())
            }
            None => work.put(entry),
        }
    }
}

/// A piece of recorded work.
#[derive(Debug, Clone)]
enum Entry {
    Launch { kernel: Kernel, name: String, grid: [u32; 3], threads: u32, shared_bytes: u32, args: Vec<u8> },
    Copy { from: Address, to: Address, bytes: usize },
    Fill { to: Address, byte: u8, bytes: usize },
    Mark { marks: Arc<Mutex<Vec<Instant>>>, point: usize },
}

impl Entry {
    fn run(&self) -> Result<()> {
        match self {
            Entry::Launch { kernel, name, grid, threads, shared_bytes, args } => {
                let mut stuck = [StuckThread::default(); STUCK_THREADS];
                let launch = EmuLaunch {
                    grid: *grid,
                    block: [*threads, 1, 1],
                    shared_bytes: u64::from(*shared_bytes),
                    args: args.as_ptr(),
                    args_bytes: args.len() as u64,
                    stuck: stuck.as_mut_ptr(),
                };
                // SAFETY: the library's kernels have this type; `args` and `stuck` are whole for the call, which ends before
                // it returns. The addresses in it are those of live buffers, whose lengths the operation's `check` has seen.
                unsafe { kernel(&launch) }
                return told(&stuck, |_| name.clone()).map_or(Ok(()), Err);
            }
            // SAFETY: both are addresses of `emu_alloc` with at least so many bytes: views, whose lengths were compared.
            Entry::Copy { from, to, bytes } => unsafe {
                std::ptr::copy(from.0 as *const u8, to.0 as *mut u8, *bytes);
            },
            // SAFETY: as above.
            Entry::Fill { to, byte, bytes } => unsafe { std::ptr::write_bytes(to.0 as *mut u8, *byte, *bytes) },
            Entry::Mark { marks, point } => {
                let mut marks = marks.lock().unwrap_or_else(PoisonError::into_inner);
                let now = Instant::now();
                if marks.len() <= *point {
                    marks.resize(point + 1, now);
                }
                marks[*point] = now;
            }
        }
        Ok(())
    }
}

/// Compute capability: 8.0, or what `SELFIE_EMULATED_CAPABILITY` asks for.
fn capability() -> Result<u32> {
    const VARIABLE: &str = "SELFIE_EMULATED_CAPABILITY";
    let Ok(asked) = std::env::var(VARIABLE) else { return Ok(80) };
    asked.parse().map_err(|_| refused(format!("{VARIABLE} is {asked:?}, must be a compute capability, as 86 for 8.6")))
}

fn refused(reason: String) -> Error {
    Error::Device { device: "the emulator".into(), reason }
}

impl Facts {
    /// Those of the emulator where it is a device of this capability, with the shared memory that such a one has.
    ///
    /// # Errors
    /// [`Error::Device`] for a capability that no kernels are made for.
    pub(crate) fn emulated(capability: u32, multiprocessors: usize) -> Result<Self> {
        let shared_bytes = match capability {
            80 => 163 << 10,
            86 | 89 | 120 => 99 << 10,
            90 | 100 => 227 << 10,
            other => return Err(refused(format!("capability {other}, must be 80, 86, 89, 90, 100 or 120"))),
        };
        Ok(Self {
            name: "emulated GPU".into(),
            capability,
            multiprocessors,
            memory_bytes: usize::MAX,
            shared_bytes,
            // Little, so that small shapes are cut as large ones are on a GPU.
            l2_bytes: 256 << 10,
            hopper: capability == 90,
        })
    }
}

impl Emulator {
    /// Loads the library that `cuda/emulator/build` made.
    pub(crate) fn open(path: &Path, multiprocessors: usize) -> Result<Self> {
        // SAFETY: the library is the project's own build; loading it runs nothing but its C++ runtime's initialisation.
        let library = unsafe { Library::new(path) }.map_err(|e| refused(format!("{}: {e}", path.display())))?;
        let facts = Facts::emulated(capability()?, multiprocessors)?;
        Ok(Self { library: Arc::new(library), facts, queue: Queue::default() })
    }

    fn symbol<S>(&self, name: &str) -> Result<Symbol<'_, S>> {
        // SAFETY: each name is asked for with its type in `emulator.h`.
        unsafe { self.library.get(name) }
            .map_err(|e| Error::Module { module: name.into(), reason: format!("not in the emulator's library: {e}") })
    }

    fn assert_not_recording(&self, what: &str) {
        assert!(self.queue.work().recording.is_none(), "{what} inside a recording");
    }
}

impl Driver for Emulator {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn free_bytes(&self) -> Result<usize> {
        Ok(usize::MAX)
    }

    fn alloc(&self, bytes: usize) -> Result<Address> {
        self.assert_not_recording("an allocation");
        let alloc = self.symbol::<Alloc>("emu_alloc")?;
        // SAFETY: takes any number of bytes.
        let place = unsafe { alloc(bytes as u64) };
        if place.is_null() {
            return Err(Error::OutOfMemory { bytes, device: self.facts.name.clone() });
        }
        Ok(Address(place as u64))
    }

    fn free(&self, address: Address) {
        if let Ok(free) = self.symbol::<Free>("emu_free") {
            // SAFETY: an address of `emu_alloc`, given back once, by its buffer's drop.
            unsafe { free(address.0 as *mut u8) }
        }
    }

    fn upload(&self, host: &[u8], to: Address) -> Result<()> {
        self.assert_not_recording("an upload");
        // SAFETY: `to` is a live view of `host.len()` bytes: lengths were compared.
        unsafe { std::ptr::copy(host.as_ptr(), to.0 as *mut u8, host.len()) }
        Ok(())
    }

    fn stage(&self, host: &[u8], to: Address) -> Result<()> {
        self.upload(host, to)
    }

    fn download(&self, from: Address, host: &mut [u8]) -> Result<()> {
        self.assert_not_recording("a download");
        // SAFETY: as in `upload`.
        unsafe { std::ptr::copy(from.0 as *const u8, host.as_mut_ptr(), host.len()) }
        Ok(())
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.queue.put(Entry::Copy { from, to, bytes })
    }

    fn fill(&self, to: Address, byte: u8, bytes: usize) -> Result<()> {
        self.queue.put(Entry::Fill { to, byte, bytes })
    }

    fn map_boxes(&self, boxes: &Boxes<'_>) -> Result<TensorMap> {
        boxes.check()?;
        let Boxes { address, dims, strides, sides } = *boxes;
        let wide = |sizes: &[usize]| sizes.iter().map(|&size| size as u64).collect::<Vec<_>>();
        let sides: Vec<_> = sides.iter().map(|&side| side as u32).collect();
        Ok(TensorMap(bytemuck::cast(EmuTensorMap::new(address, &wide(dims), &wide(strides), &sides))))
    }

    fn map_windows(&self, windows: &Windows) -> Result<TensorMap> {
        windows.check()?;
        let [first, last] = windows.corners();
        let step = windows.dims.stride as i32;
        let sides = [64, windows.count as u32];
        let map = EmuTensorMap::new(windows.address, &windows.sizes(), &windows.strides(), &sides);
        Ok(TensorMap(bytemuck::cast(EmuTensorMap { step, first, last, ..map })))
    }

    fn load(&self, _module: &'static str) -> Result<Form> {
        Ok(Form::Emulated)
    }

    fn start(&self, _module: &'static str, _kernel: &str) -> Result<Start> {
        Ok(Start::InTurn)
    }

    fn launch(&self, call: &Call<'_>) -> Result<()> {
        let limit = self.facts.shared_bytes;
        if call.shared_bytes as usize > limit {
            let reason = format!("{} bytes of shared memory, at most {limit}", call.shared_bytes);
            return Err(Error::Launch { kernel: call.kernel.into(), reason });
        }
        let kernel = *self.symbol::<Kernel>(call.kernel)?;
        let Call { grid, threads, shared_bytes, args, .. } = *call;
        let name = call.kernel.to_owned();
        self.queue.put(Entry::Launch { kernel, name, grid, threads, shared_bytes, args: args.to_vec() })
    }

    fn branch(&self) -> Result<()> {
        self.queue.work().sides = vec![VecDeque::new()];
        Ok(())
    }

    fn trunk(&self) -> Result<()> {
        self.queue.work().sides.push(VecDeque::new());
        Ok(())
    }

    fn join(&self) -> Result<()> {
        self.queue.work().join()
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn begin_recording(&self) -> Result<()> {
        self.assert_not_recording("a recording");
        self.queue.work().recording = Some(Vec::new());
        Ok(())
    }

    fn end_recording(&self) -> Result<Box<dyn Replay>> {
        let entries = self.queue.work().recording.take().unwrap_or_default();
        Ok(Box::new(Recorded { entries, _library: self.library.clone() }))
    }

    fn timeline(&self) -> Box<dyn Timeline> {
        Box::new(Clock { queue: self.queue.clone(), marks: Arc::default(), next: Mutex::new(0) })
    }
}

/// The CPU's time at points of the queue.
#[derive(Debug)]
struct Clock {
    queue: Queue,
    marks: Arc<Mutex<Vec<Instant>>>,
    next: Mutex<usize>,
}

impl Timeline for Clock {
    fn mark(&self) -> Result<()> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        self.queue.put(Entry::Mark { marks: self.marks.clone(), point: *next })?;
        *next += 1;
        Ok(())
    }

    fn clear(&self) {
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = 0;
        self.marks.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn seconds(&self) -> Result<Vec<f64>> {
        let marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(marks.iter().map(|mark| (*mark - marks[0]).as_secs_f64()).collect())
    }
}

/// Recorded work; keeps the kernels loaded.
#[derive(Debug)]
struct Recorded {
    entries: Vec<Entry>,
    _library: Arc<Library>,
}

impl Replay for Recorded {
    fn replay(&self) -> Result<()> {
        self.entries.iter().try_for_each(Entry::run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What two sides write, each by way of its scratch, in each of four orders.
    fn of_two_sides(scratch: [usize; 2], out: [usize; 2]) -> [[u8; 2]; 4] {
        let mut work = Work::default();
        [(); 4].map(|()| {
            let mut memory = [0_u8; 4];
            let start = (&raw mut memory) as u64;
            let place = |i: usize| Address(start + i as u64);
            let side = |i: usize| {
                let [scratch, out] = [scratch[i], out[i]].map(place);
                let fill = Entry::Fill { to: scratch, byte: 1 + i as u8, bytes: 1 };
                VecDeque::from([fill, Entry::Copy { from: scratch, to: out, bytes: 1 }])
            };
            work.sides = vec![side(0), side(1)];
            work.join().expect("no kernels that could fail");
            [memory[2], memory[3]]
        })
    }

    #[test]
    fn sides_that_need_each_other_are_found() {
        let of_one_order = |all: [[u8; 2]; 4]| all.iter().all(|written| *written == all[0]);
        assert_eq!(of_two_sides([0, 1], [2, 3]), [[1, 2]; 4]);
        assert!(!of_one_order(of_two_sides([0, 0], [2, 3])), "they share a scratch");
        assert!(!of_one_order(of_two_sides([0, 1], [2, 2])), "they write to the same place");
        assert!(!of_one_order(of_two_sides([2, 1], [0, 2])), "one has its scratch where the other writes");
    }
}

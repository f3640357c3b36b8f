// Runs the blocks of a launch, a block's threads as fibers on one host thread. A fiber runs until it must wait for
// others, so a mistake in synchronisation shows as a wrong value in some order of the threads, as a deadlock, or to the
// thread sanitizer, which is told of the fibers and of what orders them. Never built with a sanitizer's instrumentation
// itself (switches of stacks confuse it); SANITIZE_THREAD adds the calls that tell it.
#include "emulator.h"

#include "hopper.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#ifdef SANITIZE_THREAD
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace emu {

thread_local const Place* here;

namespace {

// ---- What the thread sanitizer is told: who runs, and who is ordered after whom.

#ifdef SANITIZE_THREAD
const bool ONE_HOST_THREAD = true;
typedef void* Identity;
Identity new_identity() { return __tsan_create_fiber(0); }
void end_identity(Identity who) { __tsan_destroy_fiber(who); }
Identity current_identity() { return __tsan_get_current_fiber(); }
void become(Identity who) { __tsan_switch_to_fiber(who, 1 /* orders nothing */); }
void release(const void* at) { __tsan_release(const_cast<void*>(at)); }
void acquire(const void* at) { __tsan_acquire(const_cast<void*>(at)); }
#else
const bool ONE_HOST_THREAD = false;
struct Identity {};
Identity new_identity() { return {}; }
void end_identity(Identity) {}
Identity current_identity() { return {}; }
void become(Identity) {}
void release(const void*) {}
void acquire(const void*) {}
#endif

// ---- Switching stacks.

const size_t STACK_BYTES = 256 << 10;  // address space; a page of it is used where a kernel is modest
const u64 CANARY = 0x5eed5eed5eed5eedull;

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
extern "C" void emu_switch_stack(void** save, void* to);
asm(R"(
.text
.globl emu_switch_stack
.hidden emu_switch_stack
.type emu_switch_stack,@function
emu_switch_stack:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
struct Context {
  void* stack_pointer;
  void start(char* stack, void (*entry)()) {
    void** top = (void**)(stack + STACK_BYTES);
    *--top = nullptr;  // where `entry` would return to
    *--top = (void*)entry;
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    stack_pointer = top;
  }
  void switch_to(Context& other) { emu_switch_stack(&stack_pointer, other.stack_pointer); }
};
#else
}  // namespace
}  // namespace emu
#include <ucontext.h>
namespace emu {
namespace {
struct Context {
  ucontext_t state;
  void start(char* stack, void (*entry)()) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = STACK_BYTES;
    state.uc_link = nullptr;
    makecontext(&state, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&state, &other.state); }
};
#endif

// ---- A block.

enum class State { Ready, AtBlockBarrier, AtWarpCollective, Polling, Done };

// cp.async of a thread: in order, each with the number of its group.
struct Copies {
  struct InGroup {
    Copy copy;
    u32 group;
  };
  std::vector<InGroup> queue;
  size_t finished = 0;
  u32 committed = 0;

  bool finish(u32 left, Copy* copy) {
    if (finished == queue.size() || queue[finished].group + left >= committed) return false;
    *copy = queue[finished++].copy;
    if (finished == queue.size()) queue.clear(), finished = 0;
    return true;
  }
};

struct Fiber {
  Place place;
  u32 warp, lane;
  State state;
  char* stack;
  Context context;
  Identity identity;
  Copies copies;
  bool fenced;                       // since it began
  std::vector<const void*> atomics;  // places, since the last fence
  std::vector<std::shared_ptr<u32>> stores;  // by TMA: how many of each group are under way, the open group last
  std::vector<Wgmma> products;
  u32 product_groups;
  const u64* awaited;  // the mbarrier that it polls, and for which phase; null if it polls none
  u32 awaited_parity;
};

struct Warp {
  u32 arrived;       // lanes at the collective under way
  Site site;         // where that is
  void* slots[32];   // what each of them brings
  u32 turn;          // collectives so far
};

struct Block;
thread_local Block* running;

struct Block {
  const EmuLaunch& launch;
  const Kernel& kernel;
  const u64 seed;
  std::atomic<u32>& stuck_threads;  // of the launch, so far
  u64 random = 1;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<u32> order;
  Fiber* current = nullptr;
  Context scheduler;
  Identity identity;

  u32 alive = 0;
  u32 at_barrier = 0;
  Site barrier_site = {};
  u32 barriers = 0;

  // Addresses that stand for what the sanitizer is to take for ordered: two for the barriers and two for each warp's, by
  // turns, two for each named barrier, and one for what is under way. From the heap for each block, or one block would seem ordered after another that used the same address.
  std::vector<char> ordered;
  char thread_ends = 0, block_ends = 0;

  // Of hopper.h: what is under way, named barriers, and how often something happened that a polling thread may wait for.
  std::vector<std::function<void()>> under_way;
  struct Named {
    int arrived;
    u32 turn;
  } named[16];
  u64 events = 0, events_polled = 0;

  std::map<const void*, void*> arrays;  // shared ones
  u64 array_bytes = 0;
  void* dynamic = nullptr;
  char* stacks = nullptr;  // of its threads

  Block(const EmuLaunch& launch, const Kernel& kernel, u64 seed, std::atomic<u32>& stuck_threads)
      : launch(launch), kernel(kernel), seed(seed), stuck_threads(stuck_threads), fibers(kernel.threads),
        warps(kernel.threads / 32), order(kernel.threads) {
    std::iota(order.begin(), order.end(), 0u);
  }
  ~Block() { unmap_stacks(); }

  void run(u64 number);
  void unmap_stacks();
  void start_fibers(u64 number);
  void end_fibers();
  bool run_ready_fibers();
  bool wake_polling_fibers();
  void do_one_under_way();
  void resume(Fiber& fiber);
  void leave();
  void finish_thread();
  void release_barrier();
  bool tell_stuck();
  [[noreturn]] void report_deadlock();
  const void* ordered_named(int id, u32 turn) const { return &ordered[2 + 2 * warps.size() + (size_t)id * 2 + (turn & 1)]; }
  const void* ordered_under_way() const { return &ordered.back(); }
  u64 draw() {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    return random;
  }
};

}  // namespace

void fail(const char* format, ...) {
  fputs("emulator: ", stderr);
  va_list values;
  va_start(values, format);
  vfprintf(stderr, format, values);
  va_end(values);
  if (running) fprintf(stderr, "; kernel %s", running->kernel.name);
  if (here)
    fprintf(stderr, ", block (%u, %u, %u), thread %u", here->block.x, here->block.y, here->block.z, here->thread.x);
  fputs("\n", stderr);
  fflush(stderr);
  abort();
}

namespace {

void thread_entry() {
  running->kernel.thread(running->launch.args);
  running->finish_thread();
  abort();  // nobody resumes a finished thread
}

void Block::resume(Fiber& fiber) {
  current = &fiber;
  here = &fiber.place;
  become(fiber.identity);
  scheduler.switch_to(fiber.context);
  here = nullptr;
}

// Gives the host thread to another fiber, until this one is ready.
void Block::leave() {
  Fiber& fiber = *current;
  become(identity);
  fiber.context.switch_to(scheduler);
}

void Block::release_barrier() {
  at_barrier = 0;
  barriers++;
  for (Fiber& fiber : fibers)
    if (fiber.state == State::AtBlockBarrier) fiber.state = State::Ready;
}

void Block::finish_thread() {
  if (!current->copies.queue.empty()) fail("a thread ends with a cp.async that it has not waited for");
  if (current->stores.size() > 1 || (current->stores.size() == 1 && *current->stores[0] > 0))
    fail("a thread ends with a store by TMA that it has not waited for");
  if (!current->products.empty()) fail("a thread ends with a wgmma that it has not waited for");
  if (*(u64*)current->stack != CANARY) fail("a thread used more than %zu bytes of stack", STACK_BYTES);
  release(&thread_ends);
  current->state = State::Done;
  alive--;
  // On a GPU a barrier waits for the threads that are still there.
  if (at_barrier != 0 && at_barrier == alive) release_barrier();
  leave();
}

void Block::do_one_under_way() {
  size_t i = seed != 0 ? draw() % under_way.size() : 0;
  std::function<void()> work = std::move(under_way[i]);
  under_way.erase(under_way.begin() + (long)i);
  acquire(ordered_under_way());
  work();
  events++;
}

// Lets threads that wait for an event look again; false if nothing can have changed since they looked last.
bool Block::wake_polling_fibers() {
  if (!under_way.empty()) do_one_under_way();
  if (events == events_polled) return false;
  events_polled = events;
  bool any = false;
  for (Fiber& fiber : fibers)
    if (fiber.state == State::Polling) fiber.state = State::Ready, any = true;
  return any;
}

// Where threads wait for mbarriers, one of each warp, as a GPU would tell it; false if none does.
bool Block::tell_stuck() {
  bool any = false;
  for (u32 w = 0; w < warps.size(); w++)
    for (u32 l = 0; l < 32; l++) {
      const Fiber& fiber = fibers[w * 32 + l];
      if (fiber.state != State::Polling || !fiber.awaited) continue;
      any = true;
      const auto& [thread, block, size, grid] = fiber.place;
      u32 barrier = (u32)((const char*)fiber.awaited - (const char*)dynamic);
      u32 place = stuck_threads++;
      if (place < STUCK_THREADS)
        launch.stuck[place] = {1, thread.x, barrier, fiber.awaited_parity, {block.x, block.y, block.z}, {grid.x, grid.y, grid.z}};
      break;
    }
  return any;
}

void Block::report_deadlock() {
  here = nullptr;
  for (Fiber& fiber : fibers) {
    if (fiber.state == State::Polling) {
      here = &fiber.place;
      fail("deadlock: a thread waits for a named barrier or a store that nobody completes");
    }
    if (fiber.state != State::AtWarpCollective) continue;
    here = &fiber.place;
    Warp& warp = warps[fiber.warp];
    fail("deadlock: only lanes %08x of a warp came to %s:%d", warp.arrived, warp.site.file, warp.site.line);
  }
  fail("deadlock: %u of %u threads came to the barrier at %s:%d", at_barrier, alive, barrier_site.file, barrier_site.line);
}

bool Block::run_ready_fibers() {
  // Shuffled, copies may also land early.
  if (seed != 0 && !under_way.empty() && draw() % 4 == 0) do_one_under_way();
  if (seed != 0)
    for (size_t i = order.size() - 1; i > 0; i--) std::swap(order[i], order[draw() % (i + 1)]);
  bool any = false;
  for (u32 i : order) {
    // In order a thread goes as far as it can; shuffled, all others get their turn first.
    while (fibers[i].state == State::Ready) {
      any = true;
      resume(fibers[i]);
      if (seed != 0) break;
    }
  }
  return any;
}

void Block::start_fibers(u64 number) {
  const u32* grid = launch.grid;
  Index block = {(u32)(number % grid[0]), (u32)(number / grid[0] % grid[1]), (u32)(number / grid[0] / grid[1])};
  for (u32 i = 0; i < fibers.size(); i++) {
    Fiber& fiber = fibers[i];
    fiber.place = {{i, 0, 0}, block, {kernel.threads, 1, 1}, {grid[0], grid[1], grid[2]}};
    fiber.warp = i / 32;
    fiber.lane = i % 32;
    fiber.state = State::Ready;
    fiber.stack = stacks + STACK_BYTES * i;
    *(u64*)fiber.stack = CANARY;
    fiber.context.start(fiber.stack, thread_entry);
    fiber.identity = new_identity();
    fiber.copies = Copies();
    fiber.fenced = false;
    fiber.atomics.clear();
    fiber.stores.clear();
    fiber.products.clear();
    fiber.product_groups = 0;
    fiber.awaited = nullptr;
  }
  for (Named& barrier : named) barrier = {0, 0};
  for (Warp& warp : warps) warp.arrived = 0;
  std::vector<char>(2 + 2 * warps.size() + 2 * 16 + 1).swap(ordered);
  alive = kernel.threads;
  at_barrier = 0;
}

void Block::end_fibers() {
  for (Fiber& fiber : fibers) end_identity(fiber.identity);
  for (auto& array : arrays) free(array.second);
  arrays.clear();
  array_bytes = 0;
  free(dynamic);
  dynamic = nullptr;
  std::vector<char>().swap(ordered);
}

void Block::unmap_stacks() {
  if (stacks) munmap(stacks, STACK_BYTES * kernel.threads);
  stacks = nullptr;
}

char* map_stacks(u32 threads) {
  void* stacks = mmap(nullptr, STACK_BYTES * threads, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) fail("no memory for the stacks of %u threads", threads);
  return (char*)stacks;
}

void Block::run(u64 number) {
  if (!stacks) stacks = map_stacks(kernel.threads);
  running = this;
  random = (seed + 1) * 0x9e3779b97f4a7c15ull ^ (number + 1) * 0xd1342543de82ef95ull;
  if (random == 0) random = 1;
  // To the sanitizer each block is somebody new, who knows what the host knew and nothing of other blocks.
  Identity host = current_identity();
  identity = new_identity();
  become(identity);
  start_fibers(number);
  bool stuck = false;
  while (alive > 0 && !stuck)
    if (!run_ready_fibers() && !wake_polling_fibers() && !(stuck = tell_stuck())) report_deadlock();
  if (stuck) under_way.clear();
  if (!under_way.empty()) fail("a block ends while a copy by TMA is under way");
  acquire(&thread_ends);
  end_fibers();
  running = nullptr;
  // The thread sanitizer would take another block's use of the same stack for a race.
  if (ONE_HOST_THREAD) unmap_stacks();
  release(&block_ends);
  become(host);
  end_identity(identity);
}

// One name of a file is usually one string.
bool is_same(Site a, Site b) { return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0); }

// Does `work` once all lanes of the warp are here; `Order::Memory` where the collective orders their accesses as well.
enum class Order { Nothing, Memory };
template <class Work>
void warp_collective(u32 mask, Site site, void* slot, Order order, Work work) {
  Block& block = *running;
  Fiber& fiber = *block.current;
  Warp& warp = block.warps[fiber.warp];
  if (mask != 0xffffffffu) fail("a warp collective with mask %08x: only whole warps are emulated", mask);
  if (warp.arrived == 0) {
    warp.site = site;
  } else if (!is_same(warp.site, site)) {
    fail("a warp diverges: lanes %08x are at the collective of %s:%d, this one at %s:%d", warp.arrived, warp.site.file,
         warp.site.line, site.file, site.line);
  }
  warp.slots[fiber.lane] = slot;
  warp.arrived |= 1u << fiber.lane;
  const void* ordered = &block.ordered[2 + fiber.warp * 2 + (warp.turn & 1)];
  if (order == Order::Memory) release(ordered);
  if (warp.arrived == 0xffffffffu) {
    work(warp.slots);
    warp.arrived = 0;
    warp.turn++;
    for (u32 l = 0; l < 32; l++) {
      Fiber& other = block.fibers[fiber.warp * 32 + l];
      if (other.state == State::AtWarpCollective) other.state = State::Ready;
    }
  } else {
    fiber.state = State::AtWarpCollective;
    block.leave();
  }
  if (order == Order::Memory) acquire(ordered);
}

}  // namespace

// ---- Collectives.

void block_barrier(Site site) {
  Block& block = *running;
  if (block.at_barrier == 0) {
    block.barrier_site = site;
  } else if (!is_same(block.barrier_site, site)) {
    fail("a block diverges: %u threads are at the barrier of %s:%d, this one at %s:%d", block.at_barrier,
         block.barrier_site.file, block.barrier_site.line, site.file, site.line);
  }
  const void* ordered = &block.ordered[block.barriers & 1];
  release(ordered);
  if (++block.at_barrier == block.alive) {
    block.release_barrier();
  } else {
    block.current->state = State::AtBlockBarrier;
    block.leave();
  }
  acquire(ordered);
}

void warp_barrier(u32 mask, Site site) {
  warp_collective(mask, site, nullptr, Order::Memory, [](void**) {});
}

u64 shuffle(Shuffle kind, u32 mask, u64 value, int lane, Site site) {
  struct Slot {
    u64 value, result;
    int lane;
  } mine = {value, 0, lane};
  warp_collective(mask, site, &mine, Order::Nothing, [kind](void** slots) {
    for (int l = 0; l < 32; l++) {
      Slot& slot = *(Slot*)slots[l];
      int from = kind == Shuffle::From ? slot.lane & 31
                 : kind == Shuffle::Xor ? l ^ slot.lane
                 : kind == Shuffle::Up  ? l - slot.lane
                                        : l + slot.lane;
      slot.result = ((Slot*)slots[from < 0 || from > 31 ? l : from])->value;
    }
  });
  return mine.result;
}

u32 ballot(u32 mask, bool vote, Site site) {
  struct Slot {
    bool vote;
    u32 result;
  } mine = {vote, 0};
  warp_collective(mask, site, &mine, Order::Nothing, [](void** slots) {
    u32 votes = 0;
    for (int l = 0; l < 32; l++) votes |= (u32)((Slot*)slots[l])->vote << l;
    for (int l = 0; l < 32; l++) ((Slot*)slots[l])->result = votes;
  });
  return mine.result;
}

void ldmatrix_x4(u32* r, const void* row, Transpose transpose, Site site) {
  struct Slot {
    u32* r;
    const u16* row;
  } mine = {r, (const u16*)row};
  warp_collective(0xffffffffu, site, &mine, Order::Nothing, [transpose](void** slots) {
    auto element = [slots](int matrix, int row, int column) { return (u32)((Slot*)slots[matrix * 8 + row])->row[column]; };
    for (int l = 0; l < 32; l++) {
      int major = l / 4, minor = l % 4 * 2;
      for (int j = 0; j < 4; j++) {
        u32 first = transpose == Transpose::No ? element(j, major, minor) : element(j, minor, major);
        u32 second = transpose == Transpose::No ? element(j, major, minor + 1) : element(j, minor + 1, major);
        ((Slot*)slots[l])->r[j] = first | second << 16;
      }
    }
  });
}

namespace {
float low(u32 pair) { return bit_cast<float>(pair << 16); }
float high(u32 pair) { return bit_cast<float>(pair & 0xffff0000u); }
}  // namespace

void mma_m16n8k16(float* d, const u32* a, const u32* b, Site site) {
  struct Slot {
    float* d;
    const u32 *a, *b;
  } mine = {d, a, b};
  warp_collective(0xffffffffu, site, &mine, Order::Nothing, [](void** slots) {
    float left[16][16], right[16][8], product[16][8] = {};
    for (int l = 0; l < 32; l++) {
      const Slot& slot = *(Slot*)slots[l];
      int g = l / 4, t = l % 4 * 2;
      for (int i = 0; i < 4; i++) {
        int row = g + i % 2 * 8, k = t + i / 2 * 8;
        left[row][k] = low(slot.a[i]), left[row][k + 1] = high(slot.a[i]);
      }
      for (int i = 0; i < 2; i++) right[t + i * 8][g] = low(slot.b[i]), right[t + i * 8 + 1][g] = high(slot.b[i]);
    }
    for (int m = 0; m < 16; m++)
      for (int k = 0; k < 16; k++)
        for (int n = 0; n < 8; n++) product[m][n] += left[m][k] * right[k][n];
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) ((Slot*)slots[l])->d[i] += product[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
  });
}

// What the sanitizer takes for ordered is what CUDA's memory model orders: what a thread did before a fence and an atomic
// behind it comes before what another does behind an atomic at the same place and a fence behind that.
void memory_fence() {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  Fiber& fiber = *running->current;
  fiber.fenced = true;
  for (const void* place : fiber.atomics) acquire(place);
  fiber.atomics.clear();
}
void atomic_done(const void* place) {
  Fiber& fiber = *running->current;
  if (fiber.fenced) release(place);
  fiber.atomics.push_back(place);
}

// ---- Memory.

namespace {

const u64 STATIC_SHARED_BYTES = 48 << 10, SHARED_BYTES = 227 << 10;  // of a block; the second on the largest devices

void* poisoned(size_t alignment, size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, alignment, bytes) != 0) fail("no memory for %zu bytes", bytes);
  memset(p, 0xff, bytes);
  return p;
}

}  // namespace

void* shared_array(const void* key, size_t bytes) {
  Block& block = *running;
  void*& array = block.arrays[key];
  if (!array) {
    array = poisoned(128, bytes);
    block.array_bytes += bytes;
    if (block.array_bytes > STATIC_SHARED_BYTES) fail("%llu bytes of static shared memory", block.array_bytes);
    if (block.array_bytes + block.launch.shared_bytes > SHARED_BYTES)
      fail("%llu bytes of shared memory", block.array_bytes + block.launch.shared_bytes);
    release(array);
  }
  acquire(array);
  return array;
}

void* dynamic_shared() {
  Block& block = *running;
  if (!block.dynamic) {
    block.dynamic = poisoned(1024, block.launch.shared_bytes);
    release(block.dynamic);
  }
  acquire(block.dynamic);
  return block.dynamic;
}

void begin_copy(Copy copy) {
  Copies& copies = running->current->copies;
  copies.queue.push_back({copy, copies.committed});
}
void commit_copies() { running->current->copies.committed++; }
bool finish_copy(u32 left, Copy* copy) { return running->current->copies.finish(left, copy); }

// ---- Of hopper.h.

namespace {

// An mbarrier's 8 bytes.
struct Mbarrier {
  u16 arrivals, pending;
  int bytes : 31;
  u32 phase : 1;
};
static_assert(sizeof(Mbarrier) == 8, "an mbarrier");

// An address for the sanitizer, by turns: who wakes late must not learn of the next phase.
const void* ordered_by(const u64* barrier, u32 parity) { return (const char*)barrier + parity; }

void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.arrivals;
  running->events++;
}

// Lets others run until something has happened.
void poll() {
  running->current->state = State::Polling;
  running->leave();
}

}  // namespace

void mbarrier_init(u64* barrier, u32 arrivals) {
  Mbarrier fresh = {(u16)arrivals, (u16)arrivals, 0, 0};
  memcpy(barrier, &fresh, sizeof fresh);
}
void mbarrier_arrive(u64* at, u32 expected_bytes) {
  Mbarrier& barrier = *(Mbarrier*)at;
  if (barrier.pending == 0) fail("more arrivals at an mbarrier than it waits for");
  release(ordered_by(at, barrier.phase));
  barrier.bytes += (int)expected_bytes;
  barrier.pending--;
  end_phase_if_complete(barrier);
}
void mbarrier_complete(u64* at, u32 bytes) {
  Mbarrier& barrier = *(Mbarrier*)at;
  release(ordered_by(at, barrier.phase));
  barrier.bytes -= (int)bytes;
  end_phase_if_complete(barrier);
}
void mbarrier_wait(u64* at, u32 parity) {
  Mbarrier& barrier = *(Mbarrier*)at;
  Fiber& fiber = *running->current;
  fiber.awaited = at;
  fiber.awaited_parity = parity & 1;
  while (barrier.phase == (parity & 1)) poll();
  fiber.awaited = nullptr;
  acquire(ordered_by(at, parity & 1));
}
void named_barrier(int id, int threads) {
  if (id < 1 || id > 15) fail("named barrier %d", id);
  Block& block = *running;
  Block::Named& barrier = block.named[id];
  u32 turn = barrier.turn;
  release(block.ordered_named(id, turn));
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    barrier.turn++;
    block.events++;
  } else {
    while (barrier.turn == turn) poll();
  }
  acquire(block.ordered_named(id, turn));
}

void later(std::function<void()> work) {
  release(running->ordered_under_way());
  running->under_way.push_back(std::move(work));
}
void begin_store(std::function<void()> work) {
  auto& stores = running->current->stores;
  if (stores.empty()) stores.push_back(std::make_shared<u32>(0));
  std::shared_ptr<u32> group = stores.back();
  ++*group;
  later([work, group] {
    work();
    --*group;
    release(group.get());
  });
}
void commit_stores() { running->current->stores.push_back(std::make_shared<u32>(0)); }
void wait_stores(u32 left) {
  auto& stores = running->current->stores;
  while (stores.size() > left + 1) {
    while (*stores.front() > 0) poll();
    acquire(stores.front().get());
    stores.erase(stores.begin());
  }
}

void begin_wgmma(const Wgmma& product) {
  Fiber& fiber = *running->current;
  fiber.products.push_back(product);
  fiber.products.back().group = fiber.product_groups;
}
void commit_wgmma() { running->current->product_groups++; }
bool finish_wgmma(u32 left, Wgmma* product) {
  Fiber& fiber = *running->current;
  if (fiber.products.empty() || fiber.products.front().group + left >= fiber.product_groups) return false;
  *product = fiber.products.front();
  fiber.products.erase(fiber.products.begin());
  return true;
}

// ---- Launches.

namespace {

u64 setting(const char* name) {
  const char* value = getenv(name);
  return value ? strtoull(value, nullptr, 10) : 0;
}

void check(const EmuLaunch& launch, const Kernel& kernel) {
  if (launch.args_bytes != kernel.args_bytes)
    fail("kernel %s takes arguments of %llu bytes, was given %llu", kernel.name, kernel.args_bytes, launch.args_bytes);
  if (launch.block[0] != kernel.threads || launch.block[1] != 1 || launch.block[2] != 1)
    fail("kernel %s takes blocks of (%u, 1, 1), was given (%u, %u, %u)", kernel.name, kernel.threads, launch.block[0],
         launch.block[1], launch.block[2]);
  const u32* grid = launch.grid;
  if (grid[0] < 1 || grid[0] > 0x7fffffffu || grid[1] < 1 || grid[1] > 65535 || grid[2] < 1 || grid[2] > 65535)
    fail("kernel %s was given a grid of (%u, %u, %u)", kernel.name, grid[0], grid[1], grid[2]);
  if (launch.shared_bytes > SHARED_BYTES)
    fail("kernel %s was given %llu bytes of shared memory", kernel.name, launch.shared_bytes);
}

std::vector<u64> block_order(u64 blocks, u64 seed) {
  std::vector<u64> order(blocks);
  std::iota(order.begin(), order.end(), 0ull);
  u64 state = seed;
  for (u64 i = blocks - 1; seed != 0 && i > 0; i--) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    std::swap(order[i], order[(state >> 33) % (i + 1)]);
  }
  return order;
}

char launches;  // address for the sanitizer: what one launch did comes before the next

}  // namespace

void launch(const EmuLaunch& host, const Kernel& kernel) {
  check(host, kernel);
  // A device aligns arguments by itself, tensor maps to 64 bytes; the host's may lie anywhere.
  alignas(ARGS_ALIGNMENT) char args[MOST_ARGS_BYTES];
  memcpy(args, host.args, host.args_bytes);
  EmuLaunch launch = host;
  launch.args = args;
  u64 seed = setting("EMU_SEED"), host_threads = ONE_HOST_THREAD ? 1 : setting("EMU_THREADS");
  std::vector<u64> order = block_order((u64)launch.grid[0] * launch.grid[1] * launch.grid[2], seed);
  std::atomic<u64> next{0};
  std::atomic<u32> stuck_threads{0};
  auto work = [&] {
    Block block(launch, kernel, seed, stuck_threads);
    for (u64 i; stuck_threads == 0 && (i = next++) < order.size();) block.run(order[i]);
    acquire(&block.block_ends);
  };
  std::vector<std::thread> others;
  for (u64 i = 1; i < host_threads && i < order.size(); i++) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  release(&launches);
  acquire(&launches);
}

}  // namespace emu

// Device memory: aligned to 256 bytes, NaN at first, on the heap.
EMU_EXPORT void* emu_alloc(u64 bytes) { return emu::poisoned(256, bytes); }
EMU_EXPORT void emu_free(void* p) { free(p); }

#pragma once
// What sm_90a adds: mbarriers, copies by TMA, wgmma and what goes with them; the twins are in emulator/hopper.h. Only for
// files that end in _sm90.cu.
//
// Shared memory is named by 32-bit addresses (shared_address), and all of it lies in DYN_SHARED.
#include "device.h"

// A map of bf16 data for TMA, of boxes or of windows, in the kernel's arguments (`const __grid_constant__`), made by the host.
#ifdef EMULATOR
#include "emulator/hopper.h"
#else
#include "stuck.h"

struct alignas(64) TensorMap {
  char bytes[128];
};

// ---- mbarriers: 8 bytes that count arrivals and bytes; a phase ends when both are complete.

DEV void mbarrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Behind the inits of a thread, before the barrier that lets others see them.
DEV void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEV void mbarrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and so many bytes must come in this phase too.
DEV void mbarrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEV bool mbarrier_try(u32 barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
// STUCK_THREADS of them in the host's memory, which outlives the kernel; the host sets it where it loads the module.
__device__ volatile StuckThread* stuck_threads;
__device__ u32 stuck_count;

// A thread of each warp tells where it waits, and gives the others time to do so; then the kernel is stopped.
DEV void stop_stuck(u32 barrier, u32 parity) {
  u32 active;
  asm volatile("activemask.b32 %0;" : "=r"(active));
  bool tells = stuck_threads != nullptr && (active & ((1u << threadIdx.x % 32) - 1)) == 0;
  u32 place = tells ? atomicAdd(&stuck_count, 1u) : STUCK_THREADS;
  if (place < STUCK_THREADS) {
    volatile StuckThread& stuck = stuck_threads[place];
    stuck.thread = threadIdx.x;
    stuck.barrier = barrier;
    stuck.parity = parity;
    stuck.block[0] = blockIdx.x, stuck.block[1] = blockIdx.y, stuck.block[2] = blockIdx.z;
    stuck.grid[0] = gridDim.x, stuck.grid[1] = gridDim.y, stuck.grid[2] = gridDim.z;
    __threadfence_system();
    stuck.told = 1;
    __threadfence_system();
  }
  for (long long begun = clock64(); clock64() - begun < (1ll << 29);) {
  }
  __trap();
}
// Waits for the end of the phase of this parity (the first has 0). One that never ends would hang the machine: it stops
// the kernel after about a second.
DEV void mbarrier_wait(u32 barrier, u32 parity) {
  if (mbarrier_try(barrier, parity)) return;
  long long begun = clock64();
  while (!mbarrier_try(barrier, parity))
    if (clock64() - begun > (1ll << 31)) stop_stuck(barrier, parity);
}
// bar.sync: `threads` of the block meet at barrier `id`, 1 to 15.
DEV void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- Copies by TMA, begun by one thread. Loads report their bytes to an mbarrier; what lies outside the tensor is zero.
// Stores form groups, as cp.async does.

DEV void tma_prefetch(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
DEV void tma_load_2d(u32 to, const TensorMap* map, u32 barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}
DEV void tma_load_3d(u32 to, const TensorMap* map, u32 barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}
DEV void tma_load_4d(u32 to, const TensorMap* map, u32 barrier, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
// Rows of 64 channels from `channel` on: pixel (x + dx, y + dy) for the window whose corner is (x, y) of an image, and for
// those that follow it, line by line and image by image, as many as a map of windows says.
DEV void tma_load_windows(u32 to, const TensorMap* map, u32 barrier, int channel, int x, int y, int image, int dx, int dy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2], {%7, %8};" ::"r"(to),
      "l"(map), "r"(barrier), "r"(channel), "r"(x), "r"(y), "r"(image), "h"((u16)dx), "h"((u16)dy)
      : "memory");
}
DEV void tma_store_2d(const TensorMap* map, u32 from, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from),
               "r"(x), "r"(y)
               : "memory");
}
// A run of bytes: addresses and their number are multiples of 16.
DEV void bulk_load(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
}
DEV void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All of this thread's stores but its newest N groups have read shared memory, or (bulk_wait) are in global memory.
template <int N>
DEV void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
template <int N>
DEV void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
// Orders ordinary accesses to shared memory before those of TMA and wgmma behind it (and behind a barrier).
DEV void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Shared memory by address.

DEV u32 load_shared(u32 at) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
}
DEV u32x4 load_shared16(u32 at) {
  u32x4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}
DEV void store_shared(u32 at, u32 v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory"); }
DEV void store_shared16(u32 at, u32x4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
// ldmatrix_x4, its transposing form, and the stores that are their inverses.
DEV void ldmatrix_x4_at(u32 (&r)[4], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
DEV void ldmatrix_x4_trans_at(u32 (&r)[4], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
DEV void stmatrix_x4_at(u32 row, const u32 (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(r[0]), "r"(r[1]), "r"(r[2]),
               "r"(r[3])
               : "memory");
}
DEV void stmatrix_x4_trans_at(u32 row, const u32 (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

// ---- Global memory that nobody writes meanwhile. These stand where they are written: those before the first use of what is
// loaded are under way together.

// The bits of a number; no branch, which would be waited at.
DEV u32 load_bits_or_zero(const bf16* from, Fill fill) {
  u32 v;
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\nmov.u32 %0, 0;\n@p ld.global.nc.u16 %0, [%1];\n}"
               : "=r"(v)
               : "l"(from), "r"(fill == Fill::Copy ? 1u : 0u)
               : "memory");
  return v;
}
DEV float2 load_pair_nc(const float* from) {
  float2 v;
  asm volatile("ld.global.nc.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(from) : "memory");
  return v;
}

// ---- Two 16-bit numbers in a word, each half for itself.

// Of bf16: the sum, to the nearest; with zero the number itself, but +0 for -0. A NaN is 0x7fff.
DEV u32 add_bf16x2(u32 a, u32 b) {
  u32 r;
  asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
// The larger one, 0x7fff if either is a NaN.
DEV u32 max_nan_bf16x2(u32 a, u32 b) {
  u32 r;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
// Of unsigned integers: the smaller one.
DEV u32 min_u16x2(u32 a, u32 b) {
  u32 r;
  asm("min.u16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
// All bits of a half are its highest one.
DEV u32 spread_signs(u32 v) {
  u32 r;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(r) : "r"(v));
  return r;
}

// ---- Registers of a warpgroup, and launches that overlap.

template <int N>
DEV void registers_give() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
DEV void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
// Waits for the kernels before; lets the next kernel start.
DEV void grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEV void grid_launch_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- wgmma: d[64][N] (+)= a[64][16] b[16][N] by four warps, in f32, behind their backs.

enum class Major { K, Other };        // which index of an operand is contiguous in shared memory
enum class Start { Zero, Continue };  // what is added to

DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All groups but the newest N are done.
template <int N>
DEV void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from reading sums before the wait.
template <int N>
DEV void wgmma_hold(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Keeps it from writing operands in registers anew before a wait that stands here.
template <int N>
DEV void wgmma_hold(const u32 (&a)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" ::"r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]) : "memory");
}

// Operands of the inline assembly: the sums come first, then a, b, what is added to, and the orders of a and b.
#define SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS_32(i) SUMS_8(i), SUMS_8(i + 8), SUMS_8(i + 16), SUMS_8(i + 24)
#define SUMS_28 SUMS_8(0), SUMS_8(8), SUMS_8(16), SUMS_4(24)
#define SUMS_56 SUMS_32(0), SUMS_8(32), SUMS_8(40), SUMS_8(48)
#define SUMS_64 SUMS_32(0), SUMS_32(32)
#define SUMS_128 SUMS_32(0), SUMS_32(32), SUMS_32(64), SUMS_32(96)
#define NAMES_28 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27"
#define NAMES_56 \
  NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55"
#define NAMES_32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_64 \
  NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES_128 \
  NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
// For N columns, half of that in sums of a thread; then the numbers of the operands behind them.
#define DEFINE_WGMMA(N, HALF, NAMES, SUMS, O0, O1, O2, O3, O4, O5, O6)                                                   \
  template <Major A, Major B>                                                                                            \
  DEV void wgmma(float (&d)[HALF], u64 a, u64 b, Start start) {                                                          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #O2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N                   \
                 "k16.f32.bf16.bf16 {" NAMES "}, %" #O0 ", %" #O1 ", p, 1, 1, %" #O3 ", %" #O4 ";\n}"                    \
                 : SUMS                                                                                                  \
                 : "l"(a), "l"(b), "r"((u32)start), "n"((int)A), "n"((int)B));       \
  }                                                                                                                      \
  template <Major B>                                                                                                     \
  DEV void wgmma(float (&d)[HALF], const u32 (&a)[4], u64 b, Start start) {                                              \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #O5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N                   \
                 "k16.f32.bf16.bf16 {" NAMES "}, {%" #O0 ",%" #O1 ",%" #O2 ",%" #O3 "}, %" #O4 ", p, 1, 1, %" #O6 ";\n}" \
                 : SUMS                                                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((u32)start),                    \
                   "n"((int)B));                                                                              \
  }
DEFINE_WGMMA(56, 28, NAMES_28, SUMS_28, 28, 29, 30, 31, 32, 33, 34)
DEFINE_WGMMA(112, 56, NAMES_56, SUMS_56, 56, 57, 58, 59, 60, 61, 62)
DEFINE_WGMMA(64, 32, NAMES_32, SUMS_32(0), 32, 33, 34, 35, 36, 37, 38)
DEFINE_WGMMA(128, 64, NAMES_64, SUMS_64, 64, 65, 66, 67, 68, 69, 70)
DEFINE_WGMMA(256, 128, NAMES_128, SUMS_128, 128, 129, 130, 131, 132, 133, 134)
#undef DEFINE_WGMMA
#endif  // EMULATOR

// Where an operand of wgmma lies, with swizzled rows of 128 bytes that start at a multiple of 1024. K contiguous: a row
// holds 64 of k, `group` is the step from one 8 rows to the next (1024), `run` is unused; 16 of k further is 32 bytes on. The
// other index contiguous: a row holds 64 of it, one row for each k, `run` is the step from one 64 of it to the next, `group`
// that from one 8 of k to the next (1024); 16 of k further is 2048 bytes on. All in bytes.
DEV u64 wgmma_operand(u32 at, u32 run, u32 group) {
  return (u64)((at & 0x3ffff) >> 4) | (u64)(run >> 4) << 16 | (u64)(group >> 4) << 32 | 1ull << 62;
}
// Without swizzle: blocks of 8 by 8 elements, 128 bytes, of which each row of 8 of the contiguous index is 16 bytes; `run` is
// the step from one 8 of k to the next, `group` that from one 8 of the other index to the next. Blocks may overlap, and begin
// at any multiple of 16.
DEV u64 wgmma_operand_plain(u32 at, u32 run, u32 group) { return wgmma_operand(at, run, group) & ~(1ull << 62); }
DEV u64 wgmma_operand_k(u32 at) { return wgmma_operand(at, 16, 1024); }
DEV u64 wgmma_operand_other(u32 at, u32 run) { return wgmma_operand(at, run, 1024); }
// The same operand so many bytes on.
DEV u64 wgmma_advance(u64 operand, u32 bytes) { return operand + (bytes >> 4); }
// Where byte `b` of row `r` lies in a tile of 128-byte rows that TMA has swizzled.
DEV u32 swizzled(u32 r, u32 b) { return r * 128 + (b ^ (r & 7) << 4); }

#pragma once
// The first part of device.h for a C++ compiler: a kernel runs on the CPU, each of its threads as a fiber, each
// collective by the last thread that reaches it (emulator.cpp). It is there to find mistakes, so
//   - shared memory and what emu_alloc gives begin as NaN, each array lies on the heap where the address sanitizer sees
//     its ends, and accesses to memory stand in this header, in code that a sanitizer has instrumented;
//   - a cp.async lands when it is waited for, and leaves NaN until then;
//   - EMU_SEED=n shuffles the order of blocks and threads (0 or none: in order), EMU_THREADS=n runs blocks on n threads;
//   - whatever would be undefined on a GPU ends the process with a message that names kernel, block and thread.
// It cannot see a wrapper's wrong PTX (conformance.cu is for that), bank conflicts, launch limits, or time.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <math.h>
#include <type_traits>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(8) u32x2 {
  u32 x, y;
};
struct alignas(16) u32x4 {
  u32 x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct bf16 {
  u16 bits;
};

#include "stuck.h"

// A launch, as the host hands it to a kernel's function; src/cuda mirrors this layout.
struct EmuLaunch {
  u32 grid[3];
  u32 block[3];
  u64 shared_bytes;  // dynamic ones
  const void* args;
  u64 args_bytes;
  StuckThread* stuck;  // [STUCK_THREADS], none of which has told anything
};

namespace emu {

struct Index {
  u32 x, y, z;
};
// Where the running fiber stands.
struct Place {
  Index thread, block, block_size, grid;
};
extern thread_local const Place* here;

// The source line of a collective: its threads must come to the same one.
struct Site {
  const char* file;
  int line;
};
#define EMU_HERE \
  emu::Site { __builtin_FILE(), __builtin_LINE() }

struct Kernel {
  const char* name;
  u64 args_bytes;
  u32 threads;
  void (*thread)(const void* args);  // the kernel's body
};
void launch(const EmuLaunch& host, const Kernel& kernel);
constexpr u64 MOST_ARGS_BYTES = 4096, ARGS_ALIGNMENT = 64;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void block_barrier(Site site);
void warp_barrier(u32 mask, Site site);
enum class Shuffle { From, Xor, Up, Down };
u64 shuffle(Shuffle kind, u32 mask, u64 value, int lane, Site site);
u32 ballot(u32 mask, bool vote, Site site);
enum class Transpose { No, Yes };
void ldmatrix_x4(u32* r, const void* row, Transpose transpose, Site site);
void mma_m16n8k16(float* d, const u32* a, const u32* b, Site site);
void memory_fence();
// Tells the sanitizer of an atomic that was just done.
void atomic_done(const void* place);

// The block's array that `key` stands for.
void* shared_array(const void* key, size_t bytes);
void* dynamic_shared();

// A copy of 16 bytes under way; `from` null: zeros.
struct Copy {
  void* to;
  const void* from;
};
void begin_copy(Copy copy);
void commit_copies();
// The next copy of this thread that is done once all groups but the newest `left` are; false where there is none.
bool finish_copy(u32 left, Copy* copy);

template <class T>
static inline void require_aligned(const T* p, size_t bytes, const char* what) {
  if ((uintptr_t)p % bytes != 0) fail("%s at an address not aligned to %zu", what, bytes);
}

template <class To, class From>
static inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace emu

#define DEV static inline
#define DEV_MEMBER inline
#define EMU_EXPORT extern "C" __attribute__((visibility("default")))
#define KERNEL(name, Args, THREADS, MIN_BLOCKS)                                                             \
  static_assert((THREADS) % 32 == 0 && (THREADS) <= 1024, "a block is made of whole warps");                \
  static_assert((MIN_BLOCKS) >= 1 && (MIN_BLOCKS) * (THREADS) <= 2048, "threads of a multiprocessor");      \
  static_assert(sizeof(Args) <= emu::MOST_ARGS_BYTES, "what a launch may carry");                           \
  static_assert(alignof(Args) <= emu::ARGS_ALIGNMENT, "how a launch may carry it");                         \
  static void name##_body(const Args& args);                                                                \
  static void name##_thread(const void* args) { name##_body(*(const Args*)args); }                          \
  EMU_EXPORT void name(const EmuLaunch* l) { emu::launch(*l, {#name, sizeof(Args), (THREADS), name##_thread}); } \
  static void name##_body([[maybe_unused]] const Args& args)

#define SHARED(T, name, dims)      \
  static char name##_key;          \
  typedef T name##_array dims;     \
  name##_array& name = *(name##_array*)emu::shared_array(&name##_key, sizeof(name##_array))
#define DYN_SHARED(name) char* name = (char*)emu::dynamic_shared()

#define threadIdx (emu::here->thread)
#define blockIdx (emu::here->block)
#define blockDim (emu::here->block_size)
#define gridDim (emu::here->grid)

static inline void __syncthreads(emu::Site site = EMU_HERE) { emu::block_barrier(site); }
static inline void __syncwarp(u32 mask = 0xffffffffu, emu::Site site = EMU_HERE) { emu::warp_barrier(mask, site); }
static inline void __threadfence() { emu::memory_fence(); }

namespace emu {
template <class T>
static inline T shuffle_value(Shuffle kind, u32 mask, T value, int lane, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  u64 bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = shuffle(kind, mask, bits, lane, site);
  memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace emu
template <class T>
static inline T __shfl_sync(u32 mask, T value, int lane, emu::Site site = EMU_HERE) {
  return emu::shuffle_value(emu::Shuffle::From, mask, value, lane, site);
}
template <class T>
static inline T __shfl_xor_sync(u32 mask, T value, int bits, emu::Site site = EMU_HERE) {
  return emu::shuffle_value(emu::Shuffle::Xor, mask, value, bits, site);
}
template <class T>
static inline T __shfl_up_sync(u32 mask, T value, int by, emu::Site site = EMU_HERE) {
  return emu::shuffle_value(emu::Shuffle::Up, mask, value, by, site);
}
template <class T>
static inline T __shfl_down_sync(u32 mask, T value, int by, emu::Site site = EMU_HERE) {
  return emu::shuffle_value(emu::Shuffle::Down, mask, value, by, site);
}
static inline u32 __ballot_sync(u32 mask, bool vote, emu::Site site = EMU_HERE) { return emu::ballot(mask, vote, site); }

// Order comes from __threadfence alone, as on a GPU.
static inline u32 atomicAdd(u32* p, u32 v) {
  u32 before = __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
  emu::atomic_done(p);
  return before;
}

template <class T>
static inline T min(T a, T b) {
  static_assert(std::is_integral<T>::value, "fminf hides NaN: say what is meant");
  return a < b ? a : b;
}
template <class T>
static inline T max(T a, T b) {
  static_assert(std::is_integral<T>::value, "fmaxf hides NaN: use max_nan");
  return a > b ? a : b;
}

DEV float bits_to_float(u32 bits) { return emu::bit_cast<float>(bits); }
DEV u32 float_to_bits(float v) { return emu::bit_cast<u32>(v); }

DEV float max_nan(float a, float b) {
  if (a != a || b != b) return bits_to_float(0x7fffffffu);
  return a > b || (a == b && !std::signbit(a)) ? a : b;
}
DEV float relu(float v) { return max_nan(v, 0.0f); }

DEV bf16 float_to_bf16(float v) {
  if (v != v) return {0x7fff};
  u32 bits = float_to_bits(v);
  return {(u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
DEV u32 pack_bf16x2(float low, float high) { return (u32)float_to_bf16(low).bits | (u32)float_to_bf16(high).bits << 16; }
DEV u32 pack_relu_bf16x2(float low, float high) { return pack_bf16x2(relu(low), relu(high)); }

DEV u32x4 load16(const void* from) {
  emu::require_aligned(from, 16, "a load of 16 bytes");
  return *(const u32x4*)from;
}
DEV void store16(void* to, u32x4 v) {
  emu::require_aligned(to, 16, "a store of 16 bytes");
  *(u32x4*)to = v;
}
DEV u32x4 load16_nc(const void* from) { return load16(from); }
DEV void prefetch_l2(const void* line) { (void)*(const volatile char*)line; }

enum class Fill { Copy, Zero };
DEV void cp_async16_or_zero(void* to, const void* from, Fill fill) {
  static const u32 nan = 0xffffffffu;
  emu::require_aligned(to, 16, "the target of cp.async");
  emu::require_aligned(from, 16, "the source of cp.async");
  if (fill == Fill::Copy) (void)*(const volatile u64*)from, (void)((const volatile u64*)from)[1];
  *(u32x4*)to = {nan, nan, nan, nan};
  emu::begin_copy({to, fill == Fill::Copy ? from : nullptr});
}
DEV void cp_async16(void* to, const void* from) { cp_async16_or_zero(to, from, Fill::Copy); }
DEV void cp_async_commit() { emu::commit_copies(); }
template <int N>
DEV void cp_async_wait() {
  emu::Copy copy;
  while (emu::finish_copy(N, &copy)) *(u32x4*)copy.to = copy.from ? *(const u32x4*)copy.from : u32x4{0, 0, 0, 0};
}

namespace emu {
// The collective itself reads in emulator.cpp, where no sanitizer looks.
static inline void read_row(const void* row) {
  require_aligned(row, 16, "a row of ldmatrix");
  (void)((const volatile u64*)row)[0];
  (void)((const volatile u64*)row)[1];
}
}  // namespace emu
DEV void ldmatrix_x4(u32 (&r)[4], const void* row, emu::Site site = EMU_HERE) {
  emu::read_row(row);
  emu::ldmatrix_x4(r, row, emu::Transpose::No, site);
}
DEV void ldmatrix_x4_trans(u32 (&r)[4], const void* row, emu::Site site = EMU_HERE) {
  emu::read_row(row);
  emu::ldmatrix_x4(r, row, emu::Transpose::Yes, site);
}
DEV void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], emu::Site site = EMU_HERE) {
  emu::mma_m16n8k16(d, a, b, site);
}

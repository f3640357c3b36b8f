#pragma once
// The twins of hopper.h. Shared addresses are offsets into the block's dynamic shared memory. Copies by TMA land at some
// time while somebody waits (in any order, by EMU_SEED), and leave NaN until then; a wgmma is done when it is waited for,
// from what its operands hold then. Descriptors are decoded bit by bit, as conformance_sm90.cu holds them against a GPU.
#include "emulator.h"

#include <functional>

// 128 bytes, as on a GPU; src/cuda mirrors this layout. Dimension 0 is contiguous.
struct alignas(64) TensorMap {
  char* data;
  u32 rank;
  u32 swizzled;    // rows of 128 bytes; 0 or 1
  u64 size[5];     // elements
  u64 stride[5];   // bytes; [0] is 2
  u32 box[5];      // elements; of windows: of one pixel, and how many windows
  // Of windows alone: from one to the next, 0 for a map of boxes; their first corner; how far the last is from the end.
  int step, first, last;
};
static_assert(sizeof(TensorMap) == 128, "a tensor map");

namespace emu {

void mbarrier_init(u64* barrier, u32 arrivals);
void mbarrier_arrive(u64* barrier, u32 expected_bytes);
void mbarrier_complete(u64* barrier, u32 bytes);
void mbarrier_wait(u64* barrier, u32 parity);
void named_barrier(int id, int threads);
// Something that is done at some later time.
void later(std::function<void()> work);
// Stores of this thread to global memory: begun, closed to a group, waited for.
void begin_store(std::function<void()> work);
void commit_stores();
void wait_stores(u32 left);

// A product under way.
struct Wgmma {
  float* sums;
  int columns;
  u64 a, b;
  bool a_from_registers, a_other, b_other, from_zero;
  float registers[2][16];  // this thread's two rows of a
  u32 group;
};
void begin_wgmma(const Wgmma& product);
void commit_wgmma();
// The next product that is to be done if only the newest `left` groups may be under way; false where there is none.
bool finish_wgmma(u32 left, Wgmma* product);

static inline char* shared_at(u32 address) { return (char*)dynamic_shared() + address; }
// Within 1024 bytes the eight 16-byte chunks of a row are mixed by the row's number.
static inline u32 swizzle(u32 address) { return address ^ ((address >> 7 & 7) << 4); }

static inline float bf16_at(const char* place) {
  u16 bits;
  memcpy(&bits, place, 2);
  return bit_cast<float>((u32)bits << 16);
}
// Sixteen numbers of row i of an operand in shared memory.
static inline void wgmma_row(const char* shared, u64 operand, bool other, int i, float (&row)[16]) {
  u32 start = (u32)(operand & 0x3fff) << 4, run = (u32)(operand >> 16 & 0x3fff) << 4, group = (u32)(operand >> 32 & 0x3fff) << 4;
  if (operand >> 62 == 0) {
    for (int k = 0; k < 16; k++) {
      int line = other ? k % 8 : i % 8, column = other ? i % 8 : k % 8;
      row[k] = bf16_at(shared + start + k / 8 * run + i / 8 * group + line * 16 + column * 2);
    }
    return;
  }
  if (operand >> 62 != 1) fail("an operand of wgmma that is swizzled by less than 128 bytes");
  for (int k = 0; k < 16; k++)
    row[k] = bf16_at(shared + swizzle(other ? start + i / 64 * run + k / 8 * group + k % 8 * 128 + i % 64 * 2
                                            : start + i / 8 * group + i % 8 * 128 + k * 2));
}
// This thread's share of a product: two rows of two columns in eight.
static inline void multiply(Wgmma& product) {
  int lane = here->thread.x % 32, warp = here->thread.x / 32 % 4;
  const char* shared = shared_at(0);
  if (!product.a_from_registers)
    for (int r = 0; r < 2; r++)
      wgmma_row(shared, product.a, product.a_other, warp * 16 + lane / 4 + r * 8, product.registers[r]);
  const float(&left)[2][16] = product.registers;
  for (int j = 0; j < product.columns / 8; j++) {
    float right[2][16], sums[4] = {};
    for (int e = 0; e < 2; e++) wgmma_row(shared, product.b, product.b_other, j * 8 + lane % 4 * 2 + e, right[e]);
    for (int k = 0; k < 16; k++)
      for (int i = 0; i < 4; i++) sums[i] += left[i / 2][k] * right[i % 2][k];
    float* d = product.sums + j * 4;
    for (int i = 0; i < 4; i++) d[i] = product.from_zero ? sums[i] : d[i] + sums[i];
  }
}

// Calls visit(shared address, global address or null) for each element of a box.
template <class Visit>
static inline void for_each_in_box(const TensorMap& map, const int (&at)[4], u32 address, Visit visit) {
  u32 elements = 1;
  for (u32 i = 0; i < map.rank; i++) elements *= map.box[i];
  for (u32 e = 0; e < elements; e++) {
    u32 rest = e;
    bool inside = true;
    long long offset = 0;
    for (u32 i = 0; i < map.rank; i++) {
      long long place = (long long)at[i] + rest % map.box[i];
      rest /= map.box[i];
      inside = inside && place >= 0 && place < (long long)map.size[i];
      offset += place * (long long)map.stride[i];
    }
    u32 shared = address + e * 2;
    visit(map.swizzled ? swizzle(shared) : shared, inside ? map.data + offset : nullptr);
  }
}
// The same for windows of rank 4.
template <class Visit>
static inline void for_each_in_windows(const TensorMap& map, const int (&at)[4], int dx, int dy, u32 address, Visit visit) {
  int x = at[1], y = at[2], image = at[3];
  int right = (int)map.size[1] - 1 + map.last, bottom = (int)map.size[2] - 1 + map.last;
  for (u32 row = 0; row < map.box[1]; row++) {
    long long place[4] = {0, x + dx, y + dy, image}, offset = 0;
    bool inside = true;
    for (u32 i = 1; i < 4; i++) {
      inside = inside && place[i] >= 0 && place[i] < (long long)map.size[i];
      offset += place[i] * (long long)map.stride[i];
    }
    for (u32 e = 0; e < map.box[0]; e++) {
      u64 channel = (u64)(at[0] + (int)e);
      char* from = inside && channel < map.size[0] ? map.data + offset + channel * 2 : nullptr;
      visit(swizzle(address + (row * map.box[0] + e) * 2), from);
    }
    if ((x += map.step) <= right) continue;
    x = map.first;
    if ((y += map.step) <= bottom) continue;
    y = map.first;
    image++;
  }
}
static inline u32 box_bytes(const TensorMap& map) {
  u32 bytes = 2;
  for (u32 i = 0; i < map.rank; i++) bytes *= map.box[i];
  return bytes;
}
template <u32 RANK>
static inline void tma_load(u32 to, const TensorMap* map, u32 barrier, const int (&at)[4]) {
  if (to % 128 != 0) fail("TMA loads to shared address %u, not aligned to 128", to);
  if (map->rank != RANK || map->step != 0) fail("a load of rank %u from a map of rank %u, or of windows", RANK, map->rank);
  TensorMap copy = *map;
  char* shared = shared_at(0);
  u64* done = (u64*)shared_at(barrier);
  int x = at[0], y = at[1], z = at[2], w = at[3];
  memset(shared + to, 0xff, box_bytes(copy));
  later([=] {
    for_each_in_box(copy, {x, y, z, w}, to, [&](u32 address, const char* from) {
      if (from) memcpy(shared + address, from, 2);
      else memset(shared + address, 0, 2);
    });
    mbarrier_complete(done, box_bytes(copy));
  });
}

static inline void tma_load_windows(u32 to, const TensorMap* map, u32 barrier, const int (&at)[4], int dx, int dy) {
  if (to % 128 != 0) fail("TMA loads to shared address %u, not aligned to 128", to);
  if (map->rank != 4 || map->step == 0) fail("a load of windows from a map of boxes");
  TensorMap copy = *map;
  char* shared = shared_at(0);
  u64* done = (u64*)shared_at(barrier);
  int channel = at[0], x = at[1], y = at[2], image = at[3];
  memset(shared + to, 0xff, box_bytes(copy));
  later([=] {
    for_each_in_windows(copy, {channel, x, y, image}, dx, dy, to, [&](u32 address, const char* from) {
      if (from) memcpy(shared + address, from, 2);
      else memset(shared + address, 0, 2);
    });
    mbarrier_complete(done, box_bytes(copy));
  });
}

}  // namespace emu

DEV u32 shared_address(const void* p) { return (u32)((const char*)p - (const char*)emu::dynamic_shared()); }

DEV void mbarrier_init(u32 barrier, u32 arrivals) { emu::mbarrier_init((u64*)emu::shared_at(barrier), arrivals); }
DEV void mbarrier_init_fence() {}
DEV void mbarrier_arrive(u32 barrier) { emu::mbarrier_arrive((u64*)emu::shared_at(barrier), 0); }
DEV void mbarrier_expect(u32 barrier, u32 bytes) { emu::mbarrier_arrive((u64*)emu::shared_at(barrier), bytes); }
DEV void mbarrier_wait(u32 barrier, u32 parity) { emu::mbarrier_wait((u64*)emu::shared_at(barrier), parity); }
DEV void named_barrier(int id, int threads) { emu::named_barrier(id, threads); }

DEV void tma_prefetch(const TensorMap*) {}
DEV void tma_load_2d(u32 to, const TensorMap* map, u32 barrier, int x, int y) {
  emu::tma_load<2>(to, map, barrier, {x, y, 0, 0});
}
DEV void tma_load_3d(u32 to, const TensorMap* map, u32 barrier, int x, int y, int z) {
  emu::tma_load<3>(to, map, barrier, {x, y, z, 0});
}
DEV void tma_load_4d(u32 to, const TensorMap* map, u32 barrier, int x, int y, int z, int w) {
  emu::tma_load<4>(to, map, barrier, {x, y, z, w});
}
DEV void tma_load_windows(u32 to, const TensorMap* map, u32 barrier, int channel, int x, int y, int image, int dx, int dy) {
  emu::tma_load_windows(to, map, barrier, {channel, x, y, image}, dx, dy);
}
DEV void tma_store_2d(const TensorMap* map, u32 from, int x, int y) {
  if (from % 128 != 0) emu::fail("TMA stores from shared address %u, not aligned to 128", from);
  if (map->rank != 2) emu::fail("a store of rank 2 to a tensor map of rank %u", map->rank);
  TensorMap copy = *map;
  char* shared = emu::shared_at(0);
  emu::begin_store([=] {
    emu::for_each_in_box(copy, {x, y, 0, 0}, from, [&](u32 address, char* to) {
      if (to) memcpy(to, shared + address, 2);
    });
  });
}
DEV void bulk_load(u32 to, const void* from, u32 bytes, u32 barrier) {
  emu::require_aligned(emu::shared_at(to), 16, "the target of a bulk copy");
  emu::require_aligned(from, 16, "the source of a bulk copy");
  if (bytes % 16 != 0) emu::fail("a bulk copy of %u bytes", bytes);
  char* shared = emu::shared_at(to);
  u64* done = (u64*)emu::shared_at(barrier);
  memset(shared, 0xff, bytes);
  emu::later([=] {
    memcpy(shared, from, bytes);
    emu::mbarrier_complete(done, bytes);
  });
}
DEV void bulk_commit() { emu::commit_stores(); }
template <int N>
DEV void bulk_wait_read() {
  emu::wait_stores(N);
}
template <int N>
DEV void bulk_wait() {
  emu::wait_stores(N);
}
DEV void fence_async() {}

namespace emu {
template <class T>
static inline T load_shared(u32 at) {
  require_aligned(shared_at(at), sizeof(T), "a load from shared memory");
  return *(const T*)shared_at(at);
}
template <class T>
static inline void store_shared(u32 at, T v) {
  require_aligned(shared_at(at), sizeof(T), "a store to shared memory");
  *(T*)shared_at(at) = v;
}
}  // namespace emu
DEV u32 load_shared(u32 at) { return emu::load_shared<u32>(at); }
DEV u32x4 load_shared16(u32 at) { return emu::load_shared<u32x4>(at); }
DEV void store_shared(u32 at, u32 v) { emu::store_shared(at, v); }
DEV void store_shared16(u32 at, u32x4 v) { emu::store_shared(at, v); }
DEV void ldmatrix_x4_at(u32 (&r)[4], u32 row, emu::Site site = EMU_HERE) { ldmatrix_x4(r, emu::shared_at(row), site); }
DEV void ldmatrix_x4_trans_at(u32 (&r)[4], u32 row, emu::Site site = EMU_HERE) {
  ldmatrix_x4_trans(r, emu::shared_at(row), site);
}
// Lane l holds of matrix j row l / 4, columns 2 * (l % 4), + 1; lanes 8j .. 8j + 7 name the rows.
DEV void stmatrix_x4_at(u32 row, const u32 (&r)[4], emu::Site site = EMU_HERE) {
  int lane = threadIdx.x % 32;
  emu::require_aligned(emu::shared_at(row), 16, "a row of stmatrix");
  for (int j = 0; j < 4; j++)
    emu::store_shared(__shfl_sync(0xffffffffu, row, j * 8 + lane / 4, site) + lane % 4 * 4, r[j]);
}
// Lane l holds of matrix j rows 2 * (l % 4), + 1 of column l / 4.
DEV void stmatrix_x4_trans_at(u32 row, const u32 (&r)[4], emu::Site site = EMU_HERE) {
  int lane = threadIdx.x % 32;
  emu::require_aligned(emu::shared_at(row), 16, "a row of stmatrix");
  for (int j = 0; j < 4; j++)
    for (int e = 0; e < 2; e++) {
      u32 to = __shfl_sync(0xffffffffu, row, j * 8 + lane % 4 * 2 + e, site) + lane / 4 * 2;
      emu::store_shared<u16>(to, (u16)(r[j] >> e * 16));
    }
}

DEV u32 load_bits_or_zero(const bf16* from, Fill fill) { return fill == Fill::Copy ? from->bits : 0; }
DEV float2 load_pair_nc(const float* from) {
  emu::require_aligned(from, 8, "a load of two floats");
  return make_float2(from[0], from[1]);
}

namespace emu {
template <class F>
static inline u32 each_half(u32 a, u32 b, F f) {
  return (u32)(u16)f((u16)a, (u16)b) | (u32)(u16)f((u16)(a >> 16), (u16)(b >> 16)) << 16;
}
static inline float half_to_float(u16 bits) { return bit_cast<float>((u32)bits << 16); }
}  // namespace emu
DEV u32 add_bf16x2(u32 a, u32 b) {
  return emu::each_half(a, b, [](u16 a, u16 b) { return float_to_bf16(emu::half_to_float(a) + emu::half_to_float(b)).bits; });
}
DEV u32 max_nan_bf16x2(u32 a, u32 b) {
  return emu::each_half(a, b, [](u16 a, u16 b) { return float_to_bf16(max_nan(emu::half_to_float(a), emu::half_to_float(b))).bits; });
}
DEV u32 min_u16x2(u32 a, u32 b) {
  return emu::each_half(a, b, [](u16 a, u16 b) { return a < b ? a : b; });
}
DEV u32 spread_signs(u32 v) {
  return emu::each_half(v, v, [](u16 v, u16) { return v >> 15 != 0 ? 0xffff : 0; });
}

template <int N>
DEV void registers_give() {}
template <int N>
DEV void registers_take() {}
DEV void grid_wait() {}
DEV void grid_launch_next() {}

enum class Major { K, Other };
enum class Start { Zero, Continue };
DEV void wgmma_fence() {}
DEV void wgmma_commit() { emu::commit_wgmma(); }
template <int N>
DEV void wgmma_wait(emu::Site site = EMU_HERE) {
  emu::Wgmma product;
  while (emu::finish_wgmma(N, &product)) emu::multiply(product);
  emu::warp_barrier(0xffffffffu, site);
}
template <int N>
DEV void wgmma_hold(float (&)[N]) {}
template <int N>
DEV void wgmma_hold(const u32 (&)[N][4]) {}
namespace emu {
constexpr bool has_columns(int n) { return n == 56 || n == 64 || n == 112 || n == 128 || n == 256; }
}  // namespace emu
template <Major A, Major B, int HALF>
DEV void wgmma(float (&d)[HALF], u64 a, u64 b, Start start) {
  static_assert(emu::has_columns(HALF * 2), "56, 64, 112, 128 or 256 columns");
  emu::begin_wgmma({d, HALF * 2, a, b, false, A == Major::Other, B == Major::Other, start == Start::Zero, {}, 0});
}
template <Major B, int HALF>
DEV void wgmma(float (&d)[HALF], const u32 (&a)[4], u64 b, Start start, emu::Site site = EMU_HERE) {
  static_assert(emu::has_columns(HALF * 2), "56, 64, 112, 128 or 256 columns");
  emu::Wgmma product = {d, HALF * 2, 0, b, true, false, B == Major::Other, start == Start::Zero, {}, 0};
  // Four lanes share a row: lane t of them has columns 2t, + 1 and 2t + 8, + 9, of rows l / 4 and l / 4 + 8.
  int lane = threadIdx.x % 32;
  for (int t = 0; t < 4; t++)
    for (int i = 0; i < 4; i++) {
      u32 pair = __shfl_sync(0xffffffffu, a[i], (lane & ~3) + t, site);
      float* row = product.registers[i % 2] + i / 2 * 8 + t * 2;
      row[0] = emu::bit_cast<float>(pair << 16), row[1] = emu::bit_cast<float>(pair & 0xffff0000u);
    }
  emu::begin_wgmma(product);
}

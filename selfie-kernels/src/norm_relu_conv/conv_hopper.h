#pragma once
// What the convolutions for Hopper (compute capability 9.0) share. bf16; the channels of the sum in whole steps of 64.
//
// A block stays on its multiprocessor and makes every gridDim.x-th tile, of 256 rows by BN columns; all tiles of a row of
// tiles are made side by side, so that what they read comes from device memory once. The first warpgroup moves data, one
// lane a job, and gives most of its registers to two warpgroups of consumers. A consumer has 128 rows, which are a tile of
// the partial sums, and shares nothing with the other: only so far as the rings of operands reach they may drift apart.
//
// Operands and results lie in shared memory as TMA puts them: rows of 64 channels, 128 bytes, swizzled.
#include "conv.h"
#include "hopper.h"

static constexpr int STEP = 64;
static constexpr int TILE_ROWS = 2 * SUM_ROWS;
static constexpr u32 ROW_BYTES = 2 * STEP;

// The next place in a ring of N, and the parity of the phase that its barriers are in.
template <int N>
struct Turn {
  u32 place = 0, parity = 0;
  DEV_MEMBER void next() {
    if (++place == N) place = 0, parity ^= 1;
  }
};

// Each thread of a warp has what the others have left behind by now.
DEV void arrive_warp(u32 barrier) {
  __syncwarp();
  if (lane() == 0) mbarrier_arrive(barrier);
}

// What results go through, and what they are made of.
struct HopperArgs {
  TensorMap a, b, add, out;  // `add`: what decides, where the result is masked.
  const float* coef;  // [2][kc]: scale, shift; where the result is masked [4][nc]: mean, rstd, scale, shift.
  float* sums;        // [tiles][2][nc]; may be null.
  int rows, kc, nc;
  int adds;           // Whether there is anything in `add`.
  int height, width;  // Of the maps that `a` is made of, and of those of the result.
  int out_height, out_width;
  int step, pad;
  u32 halo_bytes;     // Of one halo.
  // Where the result's rows are the pixels of a map by the parities of their lines and columns, four classes, each with
  // `rows` of them:
  int class_tiles;    // Of the partial sums, of a class.
  bf16* pixels;       // The map; `out` is nothing then.
  int round;          // So many tiles of rows of one class are made, then those of the next.
  int places;         // Pixels of the result's map where a tile of rows is one of them in its images; else 1.

  // Where a row lies in `add` and `out`: these have a row for each image, with the channels of one place after the other.
  struct Row {
    int place, image;
  };
  DEV_MEMBER Row row_at(int row) const {
    int tile = row / TILE_ROWS, images = tile / places;
    return {tile - images * places, images * TILE_ROWS + row % TILE_ROWS};
  }
};

struct HopperTile {
  int row, column;
  int y, x;  // The parities.
};
enum class Classes { One = 1, Four = 4 };
template <int BN, Classes CLASSES = Classes::One>
DEV int tiles_of(const HopperArgs& args) {
  return ceil_div(args.rows, TILE_ROWS) * ceil_div(args.nc, BN) * (int)CLASSES;
}
// Odd lines and columns come first, as most taps of 3x3 filters reach them.
template <int BN, Classes CLASSES = Classes::One>
DEV HopperTile tile_at(const HopperArgs& args, int tile) {
  int columns = ceil_div(args.nc, BN), before = 0, number = 0;
  if (CLASSES == Classes::Four) {
    int round = tile / (args.round * columns * 4);
    before = round * args.round;
    tile -= before * columns * 4;
    int of_class = min(args.round, ceil_div(args.rows, TILE_ROWS) - before) * columns;
    number = tile / of_class;
    tile -= number * of_class;
  }
  int row = tile / columns;
  return {(before + row) * TILE_ROWS, (tile - row * columns) * BN, 1 - number / 2, 1 - number % 2};
}

// relu(scale * x + shift) of two neighbouring channels.
DEV u32 norm_relu(u32 pair, float2 scale, float2 shift) {
  return pack_relu_bf16x2(normalize(bf16x2_low(pair), scale.x, shift.x), normalize(bf16x2_high(pair), scale.y, shift.y));
}

// Eight channels of an affine gradient.
struct AffineChunk {
  float2 coef[3][4];

  // From [3][stride] pairs.
  DEV_MEMBER AffineChunk(const float2* from, int stride) {
#pragma unroll
    for (int i = 0; i < 3; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) coef[i][j] = from[i * stride + j];
  }
  DEV_MEMBER u32 pair(u32 dz, u32 x, int j) const {
    return pack_bf16x2(affine(bf16x2_low(dz), bf16x2_low(x), coef[0][j].x, coef[1][j].x, coef[2][j].x),
                       affine(bf16x2_high(dz), bf16x2_high(x), coef[0][j].y, coef[1][j].y, coef[2][j].y));
  }
  // In place of its first tensor, of every sixteenth of so many pixels; from `live` on there is none.
  template <int PIXELS>
  DEV_MEMBER void form(char* to, const char* x, int live) const {
#pragma unroll 1
    for (int row = 0; row < PIXELS; row += 64) {
      u32x4 v[4], x4[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        v[i] = load16(to + (row + i * 16) * ROW_BYTES);
        x4[i] = load16(x + (row + i * 16) * ROW_BYTES);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        v[i] = {pair(v[i].x, x4[i].x, 0), pair(v[i].y, x4[i].y, 1), pair(v[i].z, x4[i].z, 2), pair(v[i].w, x4[i].w, 3)};
        store16(to + (row + i * 16) * ROW_BYTES, row + i * 16 < live ? v[i] : u32x4{0, 0, 0, 0});
      }
    }
  }
};

// Sums of a consumer's thread: rows i * 64 + warp * 16 + lane / 4 (+ 8), half of the columns.
template <int BN>
using HopperSums = float[2][BN / 2];

template <int BN>
DEV void clear(HopperSums<BN>& sum) {
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < BN / 2; j++) sum[i][j] = 0.0f;
}

// sum += A[128][STEP] * B[BN][STEP]^T, from fragments(f, k), which gives A's of sixteen channels from 16 * k on; `b` is the
// operand in shared memory, and how it lies there. Two halves with registers of their own: one is loaded while the tensor
// cores have the other. When the first is on its way all steps before are done, and what they read is `free`.
template <int BN, Major B, class Fragments, class Free>
DEV void multiply_step(HopperSums<BN>& sum, u64 b, Start start, Fragments fragments, Free free) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    u32 a[2][2][4];
#pragma unroll
    for (int k = 0; k < 2; k++) fragments(a[k], half * 2 + k);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        wgmma<B>(sum[i], a[k][i], wgmma_advance(b, (half * 2 + k) * (B == Major::K ? 32 : 2048)),
                 half + k > 0 ? Start::Continue : start);
    wgmma_commit();
    wgmma_wait<1>();
    if (half == 0) free();
  }
}
template <int BN>
DEV void finish_sums(HopperSums<BN>& sum) {
  wgmma_wait<0>();
  wgmma_hold(sum[0]);
  wgmma_hold(sum[1]);
}

// A consumer's way out, [BN / 64][128] rows in shared memory. One lane of the first warpgroup copies what is to be added into
// it; the consumer adds its sums in place and rounds them; the lane copies the result to global memory while the consumer
// takes its statistics; then comes the next tile's. Pixels of a class the consumer stores itself, as no box holds them.
template <int BN, Classes CLASSES = Classes::One>
struct Outlet {
  static constexpr u32 PART_BYTES = SUM_ROWS * ROW_BYTES, BYTES = BN / 64 * PART_BYTES;
  static constexpr u32 BARRIER_BYTES = 3 * 8;
  // A thread takes the statistics of two columns of 128 / SHARES rows.
  static constexpr int PAIRS = BN / 2, SHARES = 128 / PAIRS;
  // Four sums of each; or, where the result is masked, two of each column and warp.
  static constexpr u32 SHARES_BYTES = 4 * 2 * BN * sizeof(float);
  static_assert(SHARES >= 2 && SHARES_BYTES >= 128 * sizeof(float4), "64 or 128 columns");

  const HopperArgs& args;
  char *buffer, *shares;
  u32 barriers;
  int group;  // Which consumer.

  DEV_MEMBER u32 ready() const { return barriers; }        // Holds what is to be added.
  DEV_MEMBER u32 staged() const { return barriers + 8; }   // Holds the result.
  DEV_MEMBER u32 done() const { return barriers + 16; }    // The statistics are taken.
  DEV_MEMBER void init() const {
    mbarrier_init(ready(), 1);
    mbarrier_init(staged(), 1);
    mbarrier_init(done(), 4);
  }

  // ---- The lane that copies.

  DEV_MEMBER void carry() const {
    tma_prefetch(&args.out);
    u32 parity = 0;
    for (int t = (int)blockIdx.x; t < tiles_of<BN, CLASSES>(args); t += (int)gridDim.x, parity ^= 1) {
      HopperTile tile = tile_at<BN, CLASSES>(args, t);
      int row = tile.row + group * SUM_ROWS, parts = min(BN, args.nc - tile.column + 63) / 64;
      HopperArgs::Row at = args.row_at(row);
      u32 from = shared_address(buffer);
      if (args.adds) {
        mbarrier_expect(ready(), parts * PART_BYTES);
        for (int i = 0; i < parts; i++) load_added(from + i * PART_BYTES, tile, row, tile.column + i * 64);
      } else {
        mbarrier_arrive(ready());
      }
      if (CLASSES == Classes::One) {
        mbarrier_wait(staged(), parity);
        // What lies outside of the map is left out, but some of it must lie inside.
        for (int i = 0; i < parts && row < args.rows; i++)
          tma_store_2d(&args.out, from + i * PART_BYTES, at.place * args.nc + tile.column + i * 64, at.image);
        bulk_commit();
        bulk_wait_read<0>();
      }
      mbarrier_wait(done(), parity);
    }
    bulk_wait<0>();
  }
  DEV_MEMBER void load_added(u32 to, HopperTile tile, int row, int column) const {
    if (CLASSES == Classes::One) {
      HopperArgs::Row at = args.row_at(row);
      tma_load_2d(to, &args.add, ready(), at.place * args.nc + column, at.image);
    } else {
      int line = row / args.width, image = line / args.height;
      int x = row - line * args.width, y = line - image * args.height;
      tma_load_windows(to, &args.add, ready(), column, 2 * x, 2 * y, image, tile.x, tile.y);
    }
  }

  // ---- The consumer.

  DEV_MEMBER void put(const HopperSums<BN>& sum, HopperTile tile, u32 parity) const {
    int row = tile.row + group * SUM_ROWS;
    mbarrier_wait(ready(), parity);
    if (args.adds) round<true>(sum);
    else round<false>(sum);
    fence_async();
    named_barrier(1 + group, 128);
    if (threadIdx.x % 128 == 0) mbarrier_arrive(staged());
    if (args.sums && row < args.rows) store_statistics(row, tile.column);
    arrive_warp(done());
  }

  template <bool ADDS>
  DEV_MEMBER void round(const HopperSums<BN>& sum) const {
    char* lanes = buffer + (warp() % 4 * 16 + lane() / 4) * ROW_BYTES + lane() % 4 * 4;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < BN / 8; j += 4) {
        // Eight at a time, that their latencies overlap.
        u32* at[8];
        u32 add[8];
#pragma unroll
        for (int q = 0; q < 8; q++) {
          u32 chunk = (u32)((j + q / 2) % 8 ^ lane() / 4) << 4;
          at[q] = (u32*)(lanes + j / 8 * PART_BYTES + (i * 64 + q % 2 * 8) * ROW_BYTES + chunk);
          if (ADDS) add[q] = *at[q];
        }
#pragma unroll
        for (int q = 0; q < 8; q++) {
          float low = sum[i][(j + q / 2) * 4 + q % 2 * 2], high = sum[i][(j + q / 2) * 4 + q % 2 * 2 + 1];
          if (ADDS) low += bf16x2_low(add[q]), high += bf16x2_high(add[q]);
          *at[q] = pack_bf16x2(low, high);
        }
      }
  }

  // Of the gradient: masks it by the input that has arrived, in place, and sums it up.
  DEV_MEMBER void put_masked(const HopperSums<BN>& sum, HopperTile tile, u32 parity) const {
    int row = tile.row + group * SUM_ROWS, t = (int)threadIdx.x % 128;
    mbarrier_wait(ready(), parity);
    mask(sum, row, tile.column);
    fence_async();
    named_barrier(1 + group, 128);
    if (CLASSES == Classes::Four) store_pixels(tile, row);
    else if (t == 0) mbarrier_arrive(staged());
    int sums = row / SUM_ROWS;
    if (CLASSES == Classes::Four) sums += (3 - tile.y * 2 - tile.x) * args.class_tiles;
    for (int i = t; i < 2 * BN && row < args.rows; i += 128) {
      int kind = i / BN, column = tile.column + i % BN;
      if (column >= args.nc) continue;
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < 4; w++) total += *share_of(w, kind, i % BN);
      if (kind == 1) total *= args.coef[args.nc + column];
      args.sums[((u64)sums * 2 + kind) * args.nc + column] = total;
    }
    arrive_warp(done());
  }
  // Eight threads have a row, a chunk of each.
  DEV_MEMBER void store_pixels(HopperTile tile, int row) const {
    int t = (int)threadIdx.x % 128, chunk = t % 8;
    for (int r = t / 8; r < SUM_ROWS && row + r < args.rows; r += 16) {
      int line = (row + r) / args.width, x = row + r - line * args.width;
      bf16* to = args.pixels + ((u64)(line * 2 + tile.y) * args.width * 2 + x * 2 + tile.x) * args.nc + tile.column + chunk * 8;
#pragma unroll
      for (int i = 0; i < BN / 64; i++)
        if (tile.column + i * 64 < args.nc) store16(to + i * 64, load16(buffer + i * PART_BYTES + swizzled(r, chunk * 16)));
    }
  }
  // A warp's sum of a column: of dz, and of dz * (x - mean).
  DEV_MEMBER float* share_of(int w, int kind, int column) const { return (float*)shares + (w * 2 + kind) * BN + column; }

  DEV_MEMBER void mask(const HopperSums<BN>& sum, int row, int column) const {
    u32 lanes = shared_address(buffer) + (warp() % 4 * 16 + lane() / 4) * ROW_BYTES + lane() % 4 * 4;
    int valid = args.rows - row - warp() % 4 * 16 - lane() / 4;
    bool upper = (lane() & 16) != 0, odd = (lane() & 8) != 0;
#pragma unroll
    for (int first = 0; first < BN / 8; first += 2) {
      if (first % 8 == 0 && column + first * 8 >= args.nc) break;
      // Twice eight columns at a time, that their latencies overlap.
      u32 at[2][4], x[2][4];
      float2 mean[2], scale[2], shift[2];
#pragma unroll
      for (int q = 0; q < 2; q++) {
        int j = first + q;
        const float* norm = args.coef + column + j * 8 + lane() % 4 * 2;
        mean[q] = load_pair_nc(norm), scale[q] = load_pair_nc(norm + 2 * args.nc), shift[q] = load_pair_nc(norm + 3 * args.nc);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          at[q][i] = lanes + j / 8 * PART_BYTES + (i / 2 * 64 + i % 2 * 8) * ROW_BYTES + ((u32)(j % 8 ^ lane() / 4) << 4);
          x[q][i] = load_shared(at[q][i]);
        }
      }
      float v[2][4] = {};  // This lane's rows' sums of two columns: of dz, and of dz * (x - mean).
#pragma unroll
      for (int q = 0; q < 2; q++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float* pair = sum[i / 2] + (first + q) * 4 + i % 2 * 2;
          float x_low = bf16x2_low(x[q][i]), x_high = bf16x2_high(x[q][i]), low = pair[0], high = pair[1];
          if (!passes(normalize(x_low, scale[q].x, shift[q].x))) low = 0.0f;
          if (!passes(normalize(x_high, scale[q].y, shift[q].y))) high = 0.0f;
          u32 stored = pack_bf16x2(low, high);
          store_shared(at[q][i], stored);
          if (i / 2 * 64 + i % 2 * 8 >= valid) stored = 0;
          low = bf16x2_low(stored), high = bf16x2_high(stored);
          v[q][0] += low, v[q][1] += high;
          v[q][2] = fmaf(low, x_low - mean[q].x, v[q][2]), v[q][3] = fmaf(high, x_high - mean[q].y, v[q][3]);
        }
      // Over the eight lanes of a column; each of the first two steps halves what a lane has.
      float keep[2][2], total[2];
#pragma unroll
      for (int q = 0; q < 2; q++)
#pragma unroll
        for (int i = 0; i < 2; i++)
          keep[q][i] = (upper ? v[q][2 + i] : v[q][i]) + __shfl_xor_sync(WARP, upper ? v[q][i] : v[q][2 + i], 16);
#pragma unroll
      for (int q = 0; q < 2; q++)
        total[q] = (odd ? keep[q][1] : keep[q][0]) + __shfl_xor_sync(WARP, odd ? keep[q][0] : keep[q][1], 8);
#pragma unroll
      for (int q = 0; q < 2; q++) total[q] += __shfl_xor_sync(WARP, total[q], 4);
#pragma unroll
      for (int q = 0; q < 2; q++)
        if ((lane() & 4) == 0)
          *share_of(warp() % 4, upper ? 1 : 0, (first + q) * 8 + lane() % 4 * 2 + (odd ? 1 : 0)) = total[q];
    }
  }

  // Sums of deviations, and of their squares, from a value of the tile itself. However far out that one lies: among 128 rows
  // none is more than sqrt(127) standard deviations from their mean, so at most seven bits cancel.
  DEV_MEMBER void store_statistics(int row, int column) const {
    constexpr int SHARE_ROWS = SUM_ROWS / SHARES;
    int t = (int)threadIdx.x % 128, pair = t % PAIRS, share = t / PAIRS, valid = min(SUM_ROWS, args.rows - row);
    const char* of_pair = buffer + pair / 32 * PART_BYTES + pair % 4 * 4;
    auto value = [&](int r) { return *(const u32*)(of_pair + r * ROW_BYTES + ((pair % 32 / 4 ^ r % 8) << 4)); };
    float2 first = make_float2(bf16x2_low(value(0)), bf16x2_high(value(0)));
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    auto add = [&](u32 v) {
      float low = bf16x2_low(v) - first.x, high = bf16x2_high(v) - first.y;
      sum.x += low, sum.y += high;
      sum.z = fmaf(low, low, sum.z), sum.w = fmaf(high, high, sum.w);
    };
    int r = share * SHARE_ROWS, end = min(valid, r + SHARE_ROWS);
    for (; r + 8 <= end; r += 8) {
      u32 v[8];
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] = value(r + i);
#pragma unroll
      for (int i = 0; i < 8; i++) add(v[i]);
    }
    for (; r < end; r++) add(value(r));
    float4* of_shares = (float4*)shares;
    of_shares[share * PAIRS + pair] = sum;
    named_barrier(1 + group, 128);
    if (share > 0 || column + pair * 2 >= args.nc) return;
#pragma unroll
    for (int i = 1; i < SHARES; i++) {
      float4 more = of_shares[i * PAIRS + pair];
      sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    float* to = args.sums + (u64)(row / SUM_ROWS) * 2 * args.nc + column + pair * 2;
    store_stats(to, to + args.nc, first.x, sum.x, sum.z, (float)valid);
    store_stats(to + 1, to + args.nc + 1, first.y, sum.y, sum.w, (float)valid);
  }
};

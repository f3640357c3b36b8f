#pragma once
// What the two tensor-core convolutions (conv_gather.h, conv_halo.h) share: how a block's share is cut, operands in
// shared memory and what is done to them there, the multiplication, and the epilogue.
//
// bf16 only, channels in whole chunks of 16 bytes. Operands lie in shared memory as rows of BK channels, chunk by chunk
// where swizzle() puts them, so that the eight rows of an ldmatrix meet all banks once.
#include "conv.h"

// A block makes BM rows by BN channels of the result, BK channels of one tap at a time, in a ring of STAGES; its warps
// share it out WARPS_M by WARPS_N. MIN_BLOCKS of them shall fit on a multiprocessor.
template <int BM_, int BN_, int BK_, int STAGES_, int WARPS_M_, int WARPS_N_, int MIN_BLOCKS_>
struct Tile {
  static constexpr int BM = BM_, BN = BN_, BK = BK_, STAGES = STAGES_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_;
  static constexpr int WARPS = WARPS_M * WARPS_N, THREADS = WARPS * 32, MIN_BLOCKS = MIN_BLOCKS_;
  static constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N;  // Of a warp, ..
  static constexpr int MI = WM / 16, NI = WN / 8;             // .. in fragments of mma.
  static_assert(BM == SUM_ROWS, "a block makes a whole tile of the partial sums");
  // Operands are copied in chunks of 16 bytes, all of a thread's in one column, COPY_ROWS rows apart.
  static constexpr int CHUNKS = BK / 8, COPY_ROWS = THREADS / CHUNKS, ROW_BYTES = BK * 2;
  static constexpr int B_COPIES = BN / COPY_ROWS, B_BYTES = BN * ROW_BYTES;
  static_assert(COPY_ROWS % 8 == 0 && BN % COPY_ROWS == 0, "the swizzle is that of a thread's first row");
};

// Where chunk `chunk` of row `row` lies in it, in bytes; rows that differ by a multiple of 8 agree.
template <int BK>
DEV int swizzle(int row, int chunk) {
  static_assert(BK == 64 || BK == 32, "rows of 128 or 64 bytes");
  return (chunk ^ (BK == 64 ? row & 7 : row >> 1 & 3)) << 4;
}

DEV void load8(float (&v)[8], const float* from) {
  float half[4];
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    load_vec_nc(from + i).unpack(half);
#pragma unroll
    for (int j = 0; j < 4; j++) v[i + j] = half[j];
  }
}

// What is done to a chunk of eight channels on its way.
template <Load LOAD>
struct Transform {
  float coef[3][8];

  // Behind the last channel the coefficients are 0, so that zeros stay zeros there.
  DEV_MEMBER void at(const float* from, int kc, int c) {
#pragma unroll
    for (int i = 0; i < (LOAD == Load::Affine ? 3 : 2); i++) {
#pragma unroll
      for (int j = 0; j < 8; j++) coef[i][j] = 0.0f;
      if (c < kc) load8(coef[i], from + i * kc + c);
    }
  }

  DEV_MEMBER u32x4 operator()(u32x4 chunk, [[maybe_unused]] u32x4 chunk2) const {
    if constexpr (LOAD == Load::Plain) {
      return chunk;
    } else {
      float v[8];
      Vec16<bf16>{chunk}.unpack(v);
      if constexpr (LOAD == Load::NormRelu) {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = normalize(v[i], coef[0][i], coef[1][i]);
        return {pack_relu_bf16x2(v[0], v[1]), pack_relu_bf16x2(v[2], v[3]), pack_relu_bf16x2(v[4], v[5]),
                pack_relu_bf16x2(v[6], v[7])};
      } else {
        float x[8];
        Vec16<bf16>{chunk2}.unpack(x);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = affine(v[i], x[i], coef[0][i], coef[1][i], coef[2][i]);
        return Vec16<bf16>::pack(v).words;
      }
    }
  }
};

// What the rows of a block's tile are, worked out once.
template <int BM>
struct Rows {
  int out[BM], add[BM];  // Pixels; -1: none.
  int source[BM];        // First chunk of what tap (0, 0) reads, perhaps outside the map.
  u32 taps[BM];          // Which taps are inside it, tap (r, s) in bit r * taps_s + s.
};

enum class Source { Found, NotAsked };

template <class C, Source SOURCE>
DEV void locate_rows(Rows<C::BM>& rows, const ConvArgs<bf16>& args, const Class& cls, int row0) {
  for (int r = (int)threadIdx.x; r < C::BM; r += C::THREADS) {
    int m = row0 + r;
    bool live = m < cls.rows;
    Pixel pixel = SOURCE == Source::Found ? ordered_pixel_of(args, cls, live ? m : 0) : pixel_of(cls, live ? m : 0);
    rows.out[r] = live ? out_pixel(args, cls, pixel) : -1;
    rows.add[r] = live ? add_pixel(args, cls, pixel) : -1;
    if (SOURCE == Source::NotAsked) continue;
    int y = pixel.i * args.step + cls.source_r, x = pixel.j * args.step + cls.source_s;
    rows.source[r] = ((pixel.image * args.source_height + y) * args.source_width + x) * (args.kc / 8);
    u32 taps = 0;
    for (int tap = 0; live && tap < cls.taps_r * cls.taps_s; tap++)
      if (source_pixel(args, cls, pixel, tap / cls.taps_s, tap % cls.taps_s) >= 0) taps |= 1u << tap;
    rows.taps[r] = taps;
  }
}

// A step's rows of the filters: `to` is where this thread's first chunk goes.
template <class C>
DEV void copy_filters(char* to, const ConvArgs<bf16>& args, int column0, int tap, int c) {
  int first = column0 + (int)(threadIdx.x / C::CHUNKS), inner = c + (int)(threadIdx.x % C::CHUNKS) * 8;
  int from = first * (int)args.b_n + tap * args.kc + inner, left = args.nc - first;
#pragma unroll
  for (int i = 0; i < C::B_COPIES; i++) {
    bool live = i * C::COPY_ROWS < left && inner < args.kc;
    u32 at = live ? (u32)(from + i * C::COPY_ROWS * (int)args.b_n) : 0;
    cp_async16_or_zero(to + i * C::COPY_ROWS * C::ROW_BYTES, args.b + at, live ? Fill::Copy : Fill::Zero);
  }
}

// sum += A[rows][BK] * B[columns][BK]^T of a warp; a(mi, chunk) is where this lane's row of A's fragment mi has its chunk.
template <class C, class A>
DEV void multiply(float (&sum)[C::MI][C::NI][4], A a, const char* b) {
  int row = warp() % C::WARPS_N * C::WN + lane() / 16 * 8 + lane() % 8;
#pragma unroll
  for (int k = 0; k < C::BK / 16; k++) {
    u32 left[C::MI][4];
#pragma unroll
    for (int mi = 0; mi < C::MI; mi++) ldmatrix_x4(left[mi], a(mi, k * 2 + lane() / 16));
#pragma unroll
    for (int ni = 0; ni < C::NI; ni += 2) {
      u32 two[4];
      ldmatrix_x4(two, b + (row + ni * 8) * C::ROW_BYTES + swizzle<C::BK>(row, k * 2 + lane() / 8 % 2));
      u32 right[2][2] = {{two[0], two[1]}, {two[2], two[3]}};
#pragma unroll
      for (int mi = 0; mi < C::MI; mi++) {
        mma_m16n8k16(sum[mi][ni], left[mi], right[0]);
        mma_m16n8k16(sum[mi][ni + 1], left[mi], right[1]);
      }
    }
  }
}

// Rows [first, first + COUNT) of pixels map[..] of a tensor [*, nc], to row(r) each: BN channels, a chunk where the
// swizzle of 64-channel rows puts it. Zeros where there is no pixel or channel.
template <class C, int COUNT, class Row>
DEV void copy_tile(Row row, const bf16* from, const int (&map)[C::BM], int first, int column0, int nc) {
  constexpr int CHUNKS = C::BN / 8;
#pragma unroll 1
  for (int i = (int)threadIdx.x; i < COUNT * CHUNKS; i += C::THREADS) {
    int r = first + i / CHUNKS, chunk = i % CHUNKS, pixel = map[r];
    bool live = pixel >= 0 && column0 + chunk * 8 < nc;
    cp_async16_or_zero(row(r) + swizzle<64>(r, chunk), from + (live ? (u64)(u32)pixel * (u32)nc + (u32)(column0 + chunk * 8) : 0),
                       live ? Fill::Copy : Fill::Zero);
  }
}

// Adds, rounds, masks and stores a block's sums, and reduces what was stored. row(Which::Result, r) is a row of shared
// memory that holds what is to be added, and then the result; row(Which::X, r) the input that decides (Store::Masked).
enum class Which { Result, X };

template <class C, Store STORE>
struct EpilogueSizes {
  static constexpr int TILE_BYTES = C::BM * C::BN * 2;
  // Two sums of each warp, and the forward pass's means.
  static constexpr int ROWS_OF_SUMS = STORE == Store::Plain ? 0 : 2 * C::WARPS + (STORE == Store::Forward ? 1 : 0);
  static constexpr int PARTIAL_BYTES = ROWS_OF_SUMS * C::BN * 4;
};

template <class C, Store STORE, class Row>
struct Epilogue {
  static constexpr int CHUNKS = C::BN / 8, APART = C::THREADS / CHUNKS, OWN = C::BM / APART;
  static_assert(CHUNKS <= 32 && OWN * APART == C::BM, "each thread has one chunk of OWN rows");

  const ConvArgs<bf16>& args;
  const Class& cls;
  const Rows<C::BM>& rows;
  Row row;
  float* partial;  // [2][WARPS][BN], [BN]
  int row0, column0;

  DEV_MEMBER int chunk() const { return (int)threadIdx.x % CHUNKS; }
  DEV_MEMBER int own_row(int i) const { return (int)threadIdx.x / CHUNKS + i * APART; }
  DEV_MEMBER int column() const { return column0 + chunk() * 8; }
  DEV_MEMBER float* mean() const { return partial + 2 * C::WARPS * C::BN; }

  // All threads, behind a barrier.
  DEV_MEMBER void run(const float (&sum)[C::MI][C::NI][4]) {
    round(sum);
    __syncthreads();
    u32x4 stored[OWN];
    float first[8] = {}, second[8] = {};
    if (column() < args.nc) store(stored, first, second);
    if (STORE == Store::Plain || !args.sums) return;
    float* sums = args.sums + (u64)(cls.tile + row0 / SUM_ROWS) * 2 * args.nc + column0;
    if (STORE == Store::Masked) store_sums(sums, first, second);
    if (STORE == Store::Forward) store_statistics(sums, stored, first);
  }

  // Fragments, with what is added, to the rows.
  DEV_MEMBER void round(const float (&sum)[C::MI][C::NI][4]) {
    bool adds = STORE != Store::Plain && args.add;
    int wm = warp() / C::WARPS_N, wn = warp() % C::WARPS_N;
#pragma unroll
    for (int mi = 0; mi < C::MI; mi++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int r = wm * C::WM + mi * 16 + half * 8 + lane() / 4;
        char* to = row(Which::Result, r) + lane() % 4 * 4;
#pragma unroll
        for (int ni = 0; ni < C::NI; ni++) {
          u32* pair = (u32*)(to + swizzle<64>(r, wn * C::NI + ni));
          float low = sum[mi][ni][half * 2], high = sum[mi][ni][half * 2 + 1];
          if (adds) low += bf16x2_low(*pair), high += bf16x2_high(*pair);
          *pair = pack_bf16x2(low, high);
        }
      }
  }

  DEV_MEMBER void store(u32x4 (&stored)[OWN], float (&first)[8], float (&second)[8]) {
    float mean[8], scale[8], shift[8];
    if (STORE == Store::Masked) {
      load8(mean, args.norm + column());
      load8(scale, args.norm + 2 * args.nc + column());
      load8(shift, args.norm + 3 * args.nc + column());
    }
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      int r = own_row(i), pixel = rows.out[r], at = swizzle<64>(r, chunk());
      if (pixel < 0) continue;
      float v[8], x[8];
      stored[i] = load16(row(Which::Result, r) + at);
      Vec16<bf16>{stored[i]}.unpack(v);
      if (STORE == Store::Masked) {
        Vec16<bf16>{load16(row(Which::X, r) + at)}.unpack(x);
#pragma unroll
        for (int j = 0; j < 8; j++) {
          if (!passes(normalize(x[j], scale[j], shift[j]))) v[j] = 0.0f;
          second[j] = fmaf(v[j], x[j] - mean[j], second[j]);
        }
        stored[i] = Vec16<bf16>::pack(v).words;
      }
      store16(args.out + (u64)pixel * args.nc + column(), stored[i]);
#pragma unroll
      for (int j = 0; j < 8; j++) first[j] += v[j];
    }
  }

  // Sums of the threads of a warp that have the same channels.
  DEV_MEMBER void keep(int which, float (&sums)[8]) {
#pragma unroll
    for (int step = 16; step >= CHUNKS; step /= 2)
#pragma unroll
      for (int j = 0; j < 8; j++) sums[j] += __shfl_xor_sync(WARP, sums[j], step);
    if (lane() >= CHUNKS) return;
#pragma unroll
    for (int j = 0; j < 8; j++) partial[(which * C::WARPS + warp()) * C::BN + chunk() * 8 + j] = sums[j];
  }
  DEV_MEMBER float total(int which, int column) const {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < C::WARPS; w++) sum += partial[(which * C::WARPS + w) * C::BN + column];
    return sum;
  }
  // The column that this thread, one of the first BN, sums up.
  DEV_MEMBER bool owns_column() const { return (int)threadIdx.x < C::BN && column0 + (int)threadIdx.x < args.nc; }
  static_assert(C::BN <= C::THREADS, "a thread a column");

  DEV_MEMBER void store_sums(float* sums, float (&first)[8], float (&second)[8]) {
    keep(0, first);
    keep(1, second);
    __syncthreads();
    if (!owns_column()) return;
    int n = (int)threadIdx.x;
    sums[n] = total(0, n);
    sums[args.nc + n] = total(1, n) * args.norm[args.nc + column0 + n];
  }

  DEV_MEMBER void store_statistics(float* sums, const u32x4 (&stored)[OWN], float (&first)[8]) {
    float count = (float)min(C::BM, cls.rows - row0);
    int n = (int)threadIdx.x;
    keep(0, first);
    __syncthreads();
    if (n < C::BN) mean()[n] = total(0, n) / count;
    __syncthreads();
    float deviations[8] = {}, squares[8] = {};
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      if (rows.out[own_row(i)] < 0 || column() >= args.nc) continue;
      float v[8];
      Vec16<bf16>{stored[i]}.unpack(v);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        float deviation = v[j] - mean()[chunk() * 8 + j];
        deviations[j] += deviation;
        squares[j] = fmaf(deviation, deviation, squares[j]);
      }
    }
    keep(0, deviations);
    keep(1, squares);
    __syncthreads();
    if (owns_column()) store_stats(sums + n, sums + args.nc + n, mean()[n], total(0, n), total(1, n), count);
  }
};

template <class C, Store STORE, class Row>
DEV void finish(const ConvArgs<bf16>& args, const Class& cls, const Rows<C::BM>& rows, Row row, float* partial, int row0,
                int column0, const float (&sum)[C::MI][C::NI][4]) {
  Epilogue<C, STORE, Row>{args, cls, rows, row, partial, row0, column0}.run(sum);
}

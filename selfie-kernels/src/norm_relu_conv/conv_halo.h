#pragma once
// A 3x3 convolution with stride 1 and padding 1, or its gradient, which is one too, with the filter turned round.
//
// The pixels that a tile reads, its own 128 and their neighbours, are one run of 128 + 2 * width + 2 pixels in memory. A
// run of 64 channels is transformed once into shared memory; the nine taps are shifted row addresses of ldmatrix, and a
// tap outside the map is the address of a row of zeros. The next channels' run passes through registers, PIECES chunks a
// thread and tap, one tap ahead; the filter streams by cp.async.
#include "conv_tensor.h"

template <class C, int PIECES_, Load LOAD, Store STORE>
struct HaloPlan {
  typedef EpilogueSizes<C, STORE> E;
  static constexpr int PIECES = PIECES_, TAPS = 9, ZEROS = C::ROW_BYTES;
  static_assert(C::BK == 64 && C::STAGES >= 2 && C::STAGES <= TAPS, "rows of 128 bytes");
  static constexpr int RUNS_AT = ZEROS + C::STAGES * C::B_BYTES;
};

template <class C, int PIECES, Load LOAD, Store STORE>
struct Halo {
  typedef HaloPlan<C, PIECES, LOAD, STORE> Plan;

  const ConvArgs<bf16>& args;
  const Class& cls;
  Rows<C::BM>& rows;
  char* shared;  // A row of zeros, the filters' ring, one run or two of them; later the epilogue's tiles and sums.
  int row0, column0, run_rows;

  int chunk, copy_row, chunk_at;  // This thread's chunk of a row, its first row, and where that lies.
  int copy_tap, copy_c;           // Of the next step to copy.
  u32 inside[C::MI];              // Which taps of this lane's row of each fragment lie inside the map.
  u32x4 held[PIECES], held2[PIECES];
  float sum[C::MI][C::NI][4];

  DEV_MEMBER Halo(const ConvArgs<bf16>& args, Rows<C::BM>& rows, char* shared)
      : args(args), cls(args.cls[0]), rows(rows), shared(shared) {
    int tiles = ceil_div(args.nc, C::BN);
    row0 = (int)blockIdx.x / tiles * C::BM;
    column0 = (int)blockIdx.x % tiles * C::BN;
    run_rows = C::BM + 2 * args.source_width + 2;
    chunk = (int)(threadIdx.x % C::CHUNKS);
    copy_row = (int)(threadIdx.x / C::CHUNKS);
    chunk_at = copy_row * C::ROW_BYTES + swizzle<C::BK>(copy_row, chunk);
    copy_tap = copy_c = 0;
  }

  DEV_MEMBER void run() {
    if (threadIdx.x < Plan::ZEROS / 4) ((u32*)shared)[threadIdx.x] = 0;
    locate_rows<C, Source::NotAsked>(rows, args, cls, row0);
    locate_taps();
    multiply_all();
    finish_block();
  }

  DEV_MEMBER void locate_taps() {
#pragma unroll
    for (int mi = 0; mi < C::MI; mi++) {
      int m = row0 + warp() / C::WARPS_N * C::WM + mi * 16 + lane() % 16;
      inside[mi] = 0;
      if (m >= cls.rows) continue;
      Pixel pixel = pixel_of(cls, m);
      // Bit 3 * r + s; a missing row takes three of them, a missing column every third.
      u32 taps = 0777;
      if (pixel.i == 0) taps &= ~0007u;
      if (pixel.i + 1 == cls.height) taps &= ~0700u;
      if (pixel.j == 0) taps &= ~0111u;
      if (pixel.j + 1 == cls.width) taps &= ~0444u;
      inside[mi] = taps;
    }
  }

  DEV_MEMBER char* filters(int stage) { return shared + Plan::ZEROS + stage * C::B_BYTES; }
  DEV_MEMBER char* run_of(int c) { return shared + Plan::RUNS_AT + (c / C::BK & 1) * run_rows * C::ROW_BYTES; }

  DEV_MEMBER void multiply_all() {
#pragma unroll
    for (int stage = 0; stage < C::STAGES - 1; stage++) copy_filter(stage);
    load_first_run();
#pragma unroll
    for (int mi = 0; mi < C::MI; mi++)
#pragma unroll
      for (int ni = 0; ni < C::NI; ni++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[mi][ni][i] = 0.0f;
    cp_async_wait<C::STAGES - 2>();
    int stage = 0, tap = 0, c = 0;
#pragma unroll 1
    while (c < args.kc) {
      __syncthreads();  // This step's filter and run are complete; the step before has been read.
      copy_filter(stage == 0 ? C::STAGES - 1 : stage - 1);
      if (c + C::BK < args.kc) {
        load_next_run(c + C::BK, tap);
      } else if (STORE == Store::Masked && tap == 0) {
        prefetch_x();
      }
      multiply_tap(run_of(c), filters(stage), tap);
      stage = stage + 1 == C::STAGES ? 0 : stage + 1;
      if (++tap == Plan::TAPS) tap = 0, c += C::BK;
      cp_async_wait<C::STAGES - 2>();
    }
  }

  DEV_MEMBER void copy_filter(int stage) {
    if (copy_c < args.kc) {
      int tap = STORE == Store::Forward ? copy_tap : Plan::TAPS - 1 - copy_tap;
      copy_filters<C>(filters(stage) + chunk_at, args, column0, tap, copy_c);
      if (++copy_tap == Plan::TAPS) copy_tap = 0, copy_c += C::BK;
    }
    cp_async_commit();
  }

  // Piece `piece` of this thread: a chunk of row copy_row + piece * COPY_ROWS of the run. Zeros before and behind the map.
  DEV_MEMBER void fetch(int piece, int c, u32x4& v, u32x4& v2) {
    int row = copy_row + piece * C::COPY_ROWS, pixel = row0 - args.source_width - 1 + row;
    v = v2 = {0, 0, 0, 0};
    if (row >= run_rows || pixel < 0 || pixel >= cls.rows || c + chunk * 8 >= args.kc) return;
    u64 at = (u64)pixel * args.kc + c + chunk * 8;
    v = load16_nc(args.a + at);
    if (LOAD == Load::Affine) v2 = load16_nc(args.a2 + at);
  }
  DEV_MEMBER void put(int piece, char* run, const Transform<LOAD>& change, u32x4 v, u32x4 v2) {
    if (copy_row + piece * C::COPY_ROWS < run_rows)
      store16(run + chunk_at + piece * C::COPY_ROWS * C::ROW_BYTES, change(v, v2));
  }

  DEV_MEMBER void load_first_run() {
    Transform<LOAD> change;
    change.at(args.coef, args.kc, chunk * 8);
    constexpr int AT_ONCE = 1024 / C::THREADS;
#pragma unroll 1
    for (int first = 0; first < 8 * PIECES; first += AT_ONCE) {
      u32x4 v[AT_ONCE], v2[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) fetch(first + i, 0, v[i], v2[i]);
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) put(first + i, run_of(0), change, v[i], v2[i]);
    }
  }

  // What tap - 1 fetched is put where the next run lies, and what tap + 1 will put is fetched: eight times PIECES chunks.
  DEV_MEMBER void load_next_run(int c, int tap) {
    if (tap > 0) {
      Transform<LOAD> change;
      change.at(args.coef, args.kc, c + chunk * 8);
#pragma unroll
      for (int i = 0; i < PIECES; i++) put((tap - 1) * PIECES + i, run_of(c), change, held[i], held2[i]);
    }
    if (tap == Plan::TAPS - 1) return;
#pragma unroll
    for (int i = 0; i < PIECES; i++) fetch(tap * PIECES + i, c, held[i], held2[i]);
  }

  // The epilogue's operand comes nearer while the last channels are multiplied.
  DEV_MEMBER void prefetch_x() {
    constexpr int LINES = C::BN / 64;
    for (int i = (int)threadIdx.x; i < C::BM * LINES; i += C::THREADS) {
      int pixel = rows.out[i / LINES], n = column0 + i % LINES * 64;
      if (pixel >= 0 && n < args.nc) prefetch_l2(args.x + (u64)pixel * args.nc + n);
    }
  }

  DEV_MEMBER void multiply_tap(const char* run, const char* b, int tap) {
    // This lane's row in the run; fragments are 16 rows apart, which keeps the swizzle.
    int row = warp() / C::WARPS_N * C::WM + lane() % 16 + tap / 3 * args.source_width + tap % 3;
    const char* a[C::MI];
#pragma unroll
    for (int mi = 0; mi < C::MI; mi++)
      a[mi] = inside[mi] >> tap & 1 ? run + (row + mi * 16) * C::ROW_BYTES : shared;
    multiply<C>(sum, [&](int mi, int chunk) { return a[mi] + swizzle<C::BK>(row, chunk); }, b);
  }

  DEV_MEMBER void finish_block() {
    constexpr int TILE = Plan::E::TILE_BYTES;
    cp_async_wait<0>();
    __syncthreads();
    auto row = [&](Which which, int r) { return shared + (which == Which::X ? TILE : 0) + r * C::BN * 2; };
    auto result = [&](int r) { return row(Which::Result, r); };
    auto x = [&](int r) { return row(Which::X, r); };
    if (STORE != Store::Plain && args.add) copy_tile<C, C::BM>(result, args.add, rows.add, 0, column0, args.nc);
    if (STORE == Store::Masked) copy_tile<C, C::BM>(x, args.x, rows.out, 0, column0, args.nc);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    float* partial = (float*)(shared + (STORE == Store::Masked ? 2 : 1) * TILE);
    finish<C, STORE>(args, cls, rows, row, partial, row0, column0, sum);
  }
};

template <class C, int PIECES, Load LOAD, Store STORE>
DEV void halo_conv(const ConvArgs<bf16>& args) {
  DYN_SHARED(shared);
  SHARED(Rows<C::BM>, rows, [1]);
  Halo<C, PIECES, LOAD, STORE>(args, rows[0], shared).run();
}

#pragma once
// A convolution whose rows are gathered tap by tap: filters of 1x1 and any stride, strided ones of any size, the parity
// classes of their gradients, and 3x3 filters on small maps, where rows lie place by place. Taps that are outside of the map
// for all rows of a tile are left out.
//
// Chunks of A and B stream through a ring of stages by cp.async, padded taps as zeros. Each thread transforms in shared
// memory the chunks of A that it copied itself, behind its own wait and before the barrier that is needed anyway, so that
// no barrier is added and each element is transformed once a block. The epilogue's operands follow the last step through
// the ring.
#include "conv_tensor.h"

template <class C, Load LOAD, Store STORE>
struct GatherPlan {
  typedef EpilogueSizes<C, STORE> E;
  static constexpr int A_BYTES = C::BM * C::ROW_BYTES, A_COPIES = C::BM / C::COPY_ROWS;
  static constexpr int B_AT = LOAD == Load::Affine ? 2 * A_BYTES : A_BYTES;
  static constexpr int STAGE = B_AT + C::B_BYTES, SHARED_BYTES = C::STAGES * STAGE;

  DEV_MEMBER static constexpr int power_of_two_below(int v) { return v < 2 ? 1 : 2 * power_of_two_below(v / 2); }
  // Rows of the epilogue's tiles in a stage, stages of one tile, of that of x, and of both.
  static constexpr int FIT = power_of_two_below(STAGE / (C::BN * 2)), PER_STAGE = FIT < C::BM ? FIT : C::BM;
  static constexpr int OF_TILE = C::BM / PER_STAGE, OF_X = STORE == Store::Masked ? OF_TILE : 0, EXTRA = OF_X + OF_TILE;
  // The partial sums lie behind the rows of the first stage where there is room, else in a stage of their own.
  static constexpr bool BEHIND_ROWS = STAGE - PER_STAGE * C::BN * 2 >= E::PARTIAL_BYTES;
  static_assert(EXTRA + (BEHIND_ROWS ? 0 : 1) <= C::STAGES && E::PARTIAL_BYTES <= STAGE, "the epilogue fits the ring");
};

// The taps that some row of a block's tile has inside of the map: no others are done.
struct TileTaps {
  static constexpr int MOST = 32;
  int count;
  int moved[MOST];   // Chunks from what tap (0, 0) reads to what this one does.
  int filter[MOST];  // The filter's tap.
  u32 bit[MOST];     // In Rows::taps.
};

template <class C, Load LOAD, Store STORE>
struct Gather {
  typedef GatherPlan<C, LOAD, STORE> Plan;

  const ConvArgs<bf16>& args;
  const Class& cls;
  Rows<C::BM>& rows;
  TileTaps& tile_taps;
  char* ring;
  int row0, column0;

  int chunk_at;  // Where this thread's first chunk lies in a tile.
  int steps;
  int copy_tap, copy_c;            // Of the next step to copy ..
  int transform_tap, transform_c;  // .. and to transform.
  float sum[C::MI][C::NI][4];

  DEV_MEMBER Gather(const ConvArgs<bf16>& args, const Class& cls, Rows<C::BM>& rows, TileTaps& tile_taps, char* ring)
      : args(args), cls(cls), rows(rows), tile_taps(tile_taps), ring(ring) {
    int tiles = ceil_div(args.nc, C::BN);
    row0 = (int)blockIdx.x / tiles * C::BM;
    column0 = (int)blockIdx.x % tiles * C::BN;
  }

  DEV_MEMBER void run() {
    if (row0 >= cls.rows) return;  // A class with fewer rows than the largest one.
    locate_rows<C, Source::Found>(rows, args, cls, row0);
    __syncthreads();
    if (warp() == 0) locate_taps();
    __syncthreads();  // The taps.
    begin();
    int stage = multiply_all();
    finish_from(stage);
  }

  // By one warp, a lane a tap.
  DEV_MEMBER void locate_taps() {
    u32 inside = 0;
    for (int r = lane(); r < C::BM; r += 32) inside |= rows.taps[r];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) inside |= __shfl_xor_sync(WARP, inside, step);
    int before = 0, count = 0;
    for (int tap = 0; tap < cls.taps_r * cls.taps_s; tap++) {
      if (tap == lane()) before = count;
      count += (int)(inside >> tap & 1);
    }
    if (lane() == 0) tile_taps.count = count;
    if ((inside >> lane() & 1) == 0) return;
    int r = lane() / cls.taps_s, s = lane() % cls.taps_s;
    tile_taps.moved[before] = (r * cls.source_dr * args.source_width + s * cls.source_ds) * (args.kc / 8);
    tile_taps.filter[before] = filter_tap(args, cls, r, s);
    tile_taps.bit[before] = 1u << lane();
  }

  DEV_MEMBER void begin() {
    chunk_at = own_row(0) * C::ROW_BYTES + swizzle<C::BK>(own_row(0), chunk());
    steps = ceil_div(args.kc, C::BK) * tile_taps.count;
    copy_tap = copy_c = transform_tap = transform_c = 0;
#pragma unroll
    for (int mi = 0; mi < C::MI; mi++)
#pragma unroll
      for (int ni = 0; ni < C::NI; ni++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[mi][ni][i] = 0.0f;
  }

  // This thread's chunk of a row, and its rows.
  DEV_MEMBER int chunk() const { return (int)(threadIdx.x % C::CHUNKS); }
  DEV_MEMBER int own_row(int i) const { return (int)(threadIdx.x / C::CHUNKS) + i * C::COPY_ROWS; }

  // To the tile's next tap, or to its first one and the next channels.
  DEV_MEMBER void next(int& tap, int& c) const {
    if (++tap < tile_taps.count) return;
    tap = 0;
    c += C::BK;
  }

  // Returns the stage behind the last one that was multiplied.
  DEV_MEMBER int multiply_all() {
    int stage = 0, fill = 0;
#pragma unroll 1
    for (int step = 1 - C::STAGES; step < steps; step++) {
      if (step >= 0) __syncthreads();  // This step is copied and transformed; the one before has been read.
      copy(step + C::STAGES - 1, ring + fill * Plan::STAGE);
      fill = fill + 1 == C::STAGES ? 0 : fill + 1;
      if (step >= 0) {
        multiply_stage(ring + stage * Plan::STAGE);
        stage = stage + 1 == C::STAGES ? 0 : stage + 1;
      }
      if (step < -1) continue;
      cp_async_wait<C::STAGES - 2>();
      if (step + 1 < steps) transform(ring + stage * Plan::STAGE);
    }
    return stage;
  }

  // A step's operands, or behind the last one those of the epilogue.
  DEV_MEMBER void copy(int step, char* stage) {
    if (step < steps) {
      copy_operands(stage);
    } else if (step - steps < Plan::EXTRA) {
      copy_extra(step - steps, stage);
    }
    cp_async_commit();
  }

  DEV_MEMBER void copy_operands(char* stage) {
    int c = copy_c + chunk() * 8, moved = tile_taps.moved[copy_tap] + (c >> 3);
    u32 bit = tile_taps.bit[copy_tap];
#pragma unroll
    for (int i = 0; i < Plan::A_COPIES; i++) {
      bool live = (rows.taps[own_row(i)] & bit) != 0 && c < args.kc;
      u64 from = (u64)(live ? (u32)(rows.source[own_row(i)] + moved) : 0) * 8;
      char* to = stage + chunk_at + i * C::COPY_ROWS * C::ROW_BYTES;
      cp_async16_or_zero(to, args.a + from, live ? Fill::Copy : Fill::Zero);
      if (LOAD == Load::Affine)
        cp_async16_or_zero(to + Plan::A_BYTES, args.a2 + from, live ? Fill::Copy : Fill::Zero);
    }
    copy_filters<C>(stage + Plan::B_AT + chunk_at, args, column0, tile_taps.filter[copy_tap], copy_c);
    next(copy_tap, copy_c);
  }

  // x first: it is always needed.
  DEV_MEMBER void copy_extra(int extra, char* stage) {
    int first = extra % Plan::OF_TILE * Plan::PER_STAGE;
    auto row = [&](int r) { return stage + (r - first) * C::BN * 2; };
    if (extra < Plan::OF_X) {
      copy_tile<C, Plan::PER_STAGE>(row, args.x, rows.out, first, column0, args.nc);
    } else if (STORE != Store::Plain && args.add) {
      copy_tile<C, Plan::PER_STAGE>(row, args.add, rows.add, first, column0, args.nc);
    }
  }

  // Of the chunks that this thread copied. Taps outside the map stay 0.
  DEV_MEMBER void transform(char* stage) {
    if constexpr (LOAD != Load::Plain) transform_chunks(stage);
  }
  DEV_MEMBER void transform_chunks(char* stage) {
    Transform<LOAD> change;
    change.at(args.coef, args.kc, transform_c + chunk() * 8);
    u32 bit = tile_taps.bit[transform_tap];
#pragma unroll
    for (int i = 0; i < Plan::A_COPIES; i++) {
      char* at = stage + chunk_at + i * C::COPY_ROWS * C::ROW_BYTES;
      u32x4 chunk = load16(at), changed = change(chunk, LOAD == Load::Affine ? load16(at + Plan::A_BYTES) : chunk);
      bool live = (rows.taps[own_row(i)] & bit) != 0;
      store16(at, live ? changed : u32x4{0, 0, 0, 0});
    }
    next(transform_tap, transform_c);
  }

  DEV_MEMBER void multiply_stage(const char* stage) {
    int row = warp() / C::WARPS_N * C::WM + lane() % 16;
    auto a = [&](int mi, int chunk) {
      return stage + (row + mi * 16) * C::ROW_BYTES + swizzle<C::BK>(row, chunk);
    };
    multiply<C>(sum, a, stage + Plan::B_AT);
  }

  DEV_MEMBER void finish_from(int stage) {
    auto place = [&](int extra) { return ring + (stage + extra) % C::STAGES * Plan::STAGE; };
    // The loop has copied for the first STAGES - 1 stages.
    if (Plan::EXTRA > C::STAGES - 1) {
      __syncthreads();
      for (int extra = C::STAGES - 1; extra < Plan::EXTRA; extra++) copy(steps + extra, place(extra));
    }
    cp_async_wait<0>();
    __syncthreads();
    auto row = [&](Which which, int r) {
      int extra = (which == Which::Result ? Plan::OF_X : 0) + r / Plan::PER_STAGE;
      return place(extra) + r % Plan::PER_STAGE * C::BN * 2;
    };
    char* partial = Plan::BEHIND_ROWS ? place(0) + Plan::PER_STAGE * C::BN * 2 : place(Plan::EXTRA);
    finish<C, STORE>(args, cls, rows, row, (float*)partial, row0, column0, sum);
  }
};

template <class C, Load LOAD, Store STORE>
DEV void gather_conv(const ConvArgs<bf16>& args) {
  // The least that a block of any device may have is 99 KiB; a kernel's own memory is in steps of 1 KiB.
  static_assert(GatherPlan<C, LOAD, STORE>::SHARED_BYTES + ceil_div((int)(sizeof(Rows<C::BM>) + sizeof(TileTaps)), 1024) * 1024 <=
                    99 * 1024,
                "fits a block of 8.6, 8.9 and 12.0");
  DYN_SHARED(ring);
  SHARED(Rows<C::BM>, rows, [1]);
  SHARED(TileTaps, tile_taps, [1]);
  Gather<C, LOAD, STORE>(args, args.cls[blockIdx.z], rows[0], tile_taps[0], ring).run();
}

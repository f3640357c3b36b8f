// The products of gemm.cu in bf16 on Hopper, of operands whose rows are whole chunks of 16 bytes.
//
// A block stays on its multiprocessor and makes every gridDim.x-th tile; the tiles of a row of tiles are made side by side, so
// that they share rows of the left operand. One thread copies both operands to a ring, as they lie, 64 of the depth at a time;
// two warpgroups of consumers have half of a tile's rows each. What lies outside of an operand comes as zeros. Sums go
// through a warp's own shared memory, 64 columns at a time, so that rows are finished and stored whole.
#include "gemm.h"
#include "hopper.h"

static constexpr u32 STEP = 64, ROW_BYTES = 2 * STEP, PART_BYTES = 64 * ROW_BYTES;

template <class Args>
struct TileArgs {
  TensorMap left, right;
  Args to;
};

// A consumer has PRODUCTS times 64 rows.
template <int PRODUCTS_, int COLUMNS_>
struct Tile {
  static constexpr int PRODUCTS = PRODUCTS_, COLUMNS = COLUMNS_, ROWS = 2 * PRODUCTS * 64, THREADS = 384, STAGES = 4;
  static constexpr u32 LEFT_BYTES = ROWS * ROW_BYTES, STAGE_BYTES = LEFT_BYTES + COLUMNS * ROW_BYTES;
  static constexpr u32 SUMS_AT = STAGES * STAGE_BYTES, WARP_SUMS = 16 * 64;
  static constexpr u32 BARRIERS_AT = SUMS_AT + 8 * WARP_SUMS * 4, SHARED_BYTES = BARRIERS_AT + 2 * STAGES * 8;
  static_assert(SHARED_BYTES <= 227 << 10, "what a block may have");
};

template <class C, Depth LEFT, Depth RIGHT, class Args>
struct Gemm {
  const TileArgs<Args>& args;
  char* shared;
  u32 rows = args.to.product.rows, columns = args.to.product.columns, depth = args.to.product.depth;
  u32 part = args.to.product.part, columns_of_tiles = ceil_div(columns, (u32)C::COLUMNS);
  u32 tiles = ceil_div(rows, (u32)C::ROWS) * columns_of_tiles, works = tiles * ceil_div(depth, part);

  DEV_MEMBER u32 stage_at(u32 stage) const { return shared_address(shared) + stage * C::STAGE_BYTES; }
  DEV_MEMBER u32 full(u32 stage) const { return shared_address(shared) + C::BARRIERS_AT + stage * 8; }
  DEV_MEMBER u32 empty(u32 stage) const { return full(C::STAGES + stage); }

  struct Work {
    u32 part, row, column, first, last;  // The last two of the depth.
  };
  template <class Visit>
  DEV_MEMBER void each_work(Visit visit) const {
    for (u32 i = blockIdx.x; i < works; i += gridDim.x) {
      u32 number = i / tiles, tile = i - number * tiles, row = tile / columns_of_tiles, first = number * part;
      visit(Work{number, row * C::ROWS, (tile - row * columns_of_tiles) * C::COLUMNS, first, min(depth, first + part)});
    }
  }

  // The next stage of the ring, and the parity of the phase that its barriers are in.
  struct Turn {
    u32 stage = 0, parity = 0;
    DEV_MEMBER void next() {
      if (++stage == C::STAGES) stage = 0, parity ^= 1;
    }
  };

  DEV_MEMBER void run() const {
    if (threadIdx.x == 0) {
      for (u32 stage = 0; stage < C::STAGES; stage++) {
        mbarrier_init(full(stage), 1);
        mbarrier_init(empty(stage), 8);
      }
      mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
      registers_give<40>();
      if (threadIdx.x == 0) load();
    } else {
      registers_take<232>();
      consume(warp() / 4 - 1);
    }
  }

  DEV_MEMBER void load() const {
    tma_prefetch(&args.left);
    tma_prefetch(&args.right);
    Turn turn;
    each_work([&](const Work& work) {
      for (u32 at = work.first; at < work.last; at += STEP, turn.next()) {
        u32 to = stage_at(turn.stage), barrier = full(turn.stage);
        mbarrier_wait(empty(turn.stage), turn.parity ^ 1);
        mbarrier_expect(barrier, C::STAGE_BYTES);
        copy<LEFT, C::ROWS>(to, &args.left, barrier, work.row, at);
        copy<RIGHT, C::COLUMNS>(to + C::LEFT_BYTES, &args.right, barrier, work.column, at);
      }
    });
  }
  template <Depth D, u32 EXTENT>
  DEV_MEMBER static void copy(u32 to, const TensorMap* map, u32 barrier, u32 first, u32 depth) {
    if (D == Depth::Along) {
      tma_load_2d(to, map, barrier, (int)depth, (int)first);
    } else {
      for (u32 i = 0; i < EXTENT / 64; i++) tma_load_2d(to + i * PART_BYTES, map, barrier, (int)(first + i * 64), (int)depth);
    }
  }

  // Either way 64 rows (or columns) are PART_BYTES; so far apart lie 16 of the depth:
  template <Depth D>
  DEV_MEMBER static u64 operand(u32 at, u32 k) {
    if (D == Depth::Along) return wgmma_operand_k(at + k * 32);
    return wgmma_operand_other(at + k * 16 * ROW_BYTES, PART_BYTES);
  }

  DEV_MEMBER void consume(int group) const {
    constexpr Major A = LEFT == Depth::Along ? Major::K : Major::Other, B = RIGHT == Depth::Along ? Major::K : Major::Other;
    float sum[C::PRODUCTS][C::COLUMNS / 2];
#pragma unroll
    for (int i = 0; i < C::PRODUCTS; i++)
#pragma unroll
      for (int j = 0; j < C::COLUMNS / 2; j++) sum[i][j] = 0.0f;
    Turn turn;
    each_work([&](const Work& work) {
      auto row_of = [&](int i) { return work.row + (group * C::PRODUCTS + i) * 64 + warp() % 4 * 16; };
      // It comes while the products are made.
#pragma unroll
      for (int i = 0; i < C::PRODUCTS; i++) prefetch_rows(args.to, row_of(i), work.column, C::COLUMNS);
      u32 before = C::STAGES;
      for (u32 at = work.first; at < work.last; at += STEP, turn.next()) {
        u32 left = stage_at(turn.stage) + group * C::PRODUCTS * PART_BYTES, right = stage_at(turn.stage) + C::LEFT_BYTES;
        mbarrier_wait(full(turn.stage), turn.parity);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
          for (int i = 0; i < C::PRODUCTS; i++)
            wgmma<A, B>(sum[i], operand<LEFT>(left + i * PART_BYTES, k), operand<RIGHT>(right, k),
                        at == work.first && k == 0 ? Start::Zero : Start::Continue);
        wgmma_commit();
        wgmma_wait<1>();
        if (before < C::STAGES && lane() == 0) mbarrier_arrive(empty(before));
        before = turn.stage;
      }
      wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < C::PRODUCTS; i++) wgmma_hold(sum[i]);
      if (lane() == 0) mbarrier_arrive(empty(before));
#pragma unroll
      for (int i = 0; i < C::PRODUCTS; i++) finish_rows(sum[i], work, row_of(i));
    });
  }

  // Of a warp's sixteen rows from `row` on; sum[j * 4 + r * 2 + e] is row lane / 4 + r * 8, column j * 8 + lane % 4 * 2 + e. In
  // shared memory the eights of a row are mixed by its number, so that rows meet all banks.
  DEV_MEMBER void finish_rows(const float (&sum)[C::COLUMNS / 2], const Work& work, u32 row) const {
    float* sums = (float*)(shared + C::SUMS_AT) + (warp() - 4) * (int)C::WARP_SUMS;
#pragma unroll
    for (int part = 0; part < C::COLUMNS / 64; part++) {
      __syncwarp();
#pragma unroll
      for (int j = 0; j < 8; j++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const float* pair = sum + (part * 8 + j) * 4 + r * 2;
          *(float2*)(sums + (lane() / 4 + r * 8) * 64 + (j ^ lane() / 4) * 8 + lane() % 4 * 2) = make_float2(pair[0], pair[1]);
        }
      __syncwarp();
      u32 column = work.column + part * 64 + lane() % 8 * 8;
#pragma unroll 1
      for (u32 r = lane() / 8; r < 16; r += 4) {
        float v[8];
        load_chunk<8>(sums + r * 64 + (lane() % 8 ^ r % 8) * 8, v);
        if (row + r < rows && column < columns)
          finish(args.to, Place{work.part, row + r, column, min(8u, columns - column)}, v);
      }
    }
  }
};

#define GEMM(pass, Args, LEFT, RIGHT)                                                                          \
  KERNEL(gemm_##pass##_wide_bf16, TileArgs<Args>, 384, 1) {                                                    \
    DYN_SHARED(shared);                                                                                        \
    Gemm<Tile<1, 256>, LEFT, RIGHT, Args>{args, shared}.run();                                                 \
  }                                                                                                            \
  KERNEL(gemm_##pass##_tall_bf16, TileArgs<Args>, 384, 1) {                                                    \
    DYN_SHARED(shared);                                                                                        \
    Gemm<Tile<2, 128>, LEFT, RIGHT, Args>{args, shared}.run();                                                 \
  }
GEMM(forward, ForwardArgs<bf16>, Depth::Along, Depth::Along)
GEMM(backward_data, DataArgs<bf16>, Depth::Along, Depth::Across)
GEMM(backward_weight, WeightArgs<bf16>, Depth::Across, Depth::Across)

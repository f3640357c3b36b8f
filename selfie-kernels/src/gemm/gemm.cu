// Linear layers: three products of matrices that differ in how their operands lie and in what follows the sums. bf16 goes
// through the tensor cores where rows come in whole chunks of 16 bytes; a plain kernel does the rest, and f32.
#include "gemm.h"

#include "column_sums.h"

// ---- Where a block works. Columns go fastest, so that blocks that run side by side share rows of the left operand.

struct Work {
  u32 part, row, column, depth, depth_end;
};

template <u32 SIZE, class T>
DEV Work work(const Product<T>& p) {
  u32 columns = ceil_div(p.columns, SIZE), tiles = ceil_div(p.rows, SIZE) * columns;
  u32 part = blockIdx.x / tiles, tile = blockIdx.x % tiles, depth = part * p.part;
  return {part, tile / columns * SIZE, tile % columns * SIZE, depth, min(p.depth, depth + p.part)};
}

// ---- Any shape: 64 x 64 sums by 256 threads, 4 x 4 each.

static constexpr u32 PLAIN_TILE = 64, PLAIN_SLICE = 16, PLAIN_ROW = PLAIN_TILE + 4, PLAIN_THREADS = 256;
typedef float PlainSlice[PLAIN_SLICE][PLAIN_ROW];

// Rows (or columns) first .. + 64 of an operand, depth .. + 16, zero where there is none.
template <Depth D, class T>
DEV void load_plain(PlainSlice& slice, const Operand<T>& operand, u32 first, u32 end, u32 depth, u32 depth_end) {
#pragma unroll
  for (u32 i = 0; i < PLAIN_TILE * PLAIN_SLICE; i += PLAIN_THREADS) {
    u32 index = i + threadIdx.x;
    // Neighbouring threads read neighbours in memory.
    u32 l = D == Depth::Along ? index % PLAIN_SLICE : index / PLAIN_TILE;
    u32 r = D == Depth::Along ? index / PLAIN_SLICE : index % PLAIN_TILE;
    u64 outer = D == Depth::Along ? first + r : depth + l, inner = D == Depth::Along ? depth + l : first + r;
    bool inside = first + r < end && depth + l < depth_end;
    slice[l][r] = inside ? to_float(operand.at[outer * operand.stride + inner]) : 0.0f;
  }
}

DEV void multiply_plain(float (&sums)[4][4], const PlainSlice& left, const PlainSlice& right, u32 row, u32 column) {
#pragma unroll
  for (u32 l = 0; l < PLAIN_SLICE; l++) {
    float a[4], b[4];
    load_chunk<4>(&left[l][row], a);
    load_chunk<4>(&right[l][column], b);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) sums[i][j] = fmaf(a[i], b[j], sums[i][j]);
  }
}

template <Depth LEFT, Depth RIGHT, class Args>
DEV void plain(const Args& args) {
  SHARED(float, left, [PLAIN_SLICE][PLAIN_ROW]);
  SHARED(float, right, [PLAIN_SLICE][PLAIN_ROW]);
  const auto& p = args.product;
  Work at = work<PLAIN_TILE>(p);
  u32 row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
  float sums[4][4] = {};
  for (u32 l = at.depth; l < at.depth_end; l += PLAIN_SLICE) {
    load_plain<LEFT>(left, p.left, at.row, p.rows, l, at.depth_end);
    load_plain<RIGHT>(right, p.right, at.column, p.columns, l, at.depth_end);
    __syncthreads();
    multiply_plain(sums, left, right, row, column);
    __syncthreads();
  }
  column += at.column;
  if (column >= p.columns) return;
#pragma unroll
  for (u32 i = 0; i < 4; i++)
    if (at.row + row + i < p.rows)
      finish(args, {at.part, at.row + row + i, column, min(4u, p.columns - column)}, sums[i]);
}

// ---- Tensor cores: 128 x 128 sums by four warps of 64 x 64, the depth in slices of 32, four in flight by cp.async.
// Shared memory: 80 KiB, of which every device since sm_80 gives a block 99. Rows are padded by 16 bytes, so that the eight
// rows of an ldmatrix lie in different banks.

static constexpr u32 TILE = 128, SLICE = 32, STAGES = 4, MMA_THREADS = 128;

template <Depth D>
struct Slice {
  static constexpr u32 ROWS = D == Depth::Along ? TILE : SLICE;
  static constexpr u32 CHUNKS = (D == Depth::Along ? SLICE : TILE) / 8;
  static constexpr u32 ROW_BYTES = CHUNKS * 16 + 16;
};
static constexpr u32 SLICE_BYTES = Slice<Depth::Along>::ROWS * Slice<Depth::Along>::ROW_BYTES;
static_assert(SLICE_BYTES >= Slice<Depth::Across>::ROWS * Slice<Depth::Across>::ROW_BYTES, "either fits");
static constexpr u32 SUM_ROW = TILE + 8;  // floats: four rows of float2 in different banks
static_assert(TILE * SUM_ROW * 4 <= 2 * STAGES * SLICE_BYTES, "the sums fit where the slices were");

template <Depth D>
DEV void copy_slice(char* to, const Operand<bf16>& operand, u32 first, u32 end, u32 depth, u32 depth_end) {
  typedef Slice<D> S;
  u32 outer = D == Depth::Along ? first : depth, outer_end = D == Depth::Along ? end : depth_end;
  u32 inner = D == Depth::Along ? depth : first, inner_end = D == Depth::Along ? depth_end : end;
#pragma unroll
  for (u32 i = 0; i < S::ROWS * S::CHUNKS; i += MMA_THREADS) {
    u32 row = (i + threadIdx.x) / S::CHUNKS, chunk = (i + threadIdx.x) % S::CHUNKS;
    bool inside = outer + row < outer_end && inner + chunk * 8 < inner_end;
    const bf16* from = inside ? operand.at + (outer + row) * operand.stride + inner + chunk * 8 : operand.at;
    cp_async16_or_zero(to + row * S::ROW_BYTES + chunk * 16, from, inside ? Fill::Copy : Fill::Zero);
  }
}

// Fragments of 16 rows from `row` on, 16 deep.
template <Depth D>
DEV void left_fragment(u32 (&f)[4], const char* slice, u32 row, u32 depth) {
  constexpr u32 ROW = Slice<D>::ROW_BYTES;
  u32 l = (u32)lane();
  if constexpr (D == Depth::Along) ldmatrix_x4(f, slice + (row + l % 16) * ROW + (depth + l / 16 * 8) * 2);
  else ldmatrix_x4_trans(f, slice + (depth + l / 16 * 8 + l % 8) * ROW + (row + l / 8 % 2 * 8) * 2);
}

// Fragments of 16 columns from `column` on: two words for the first eight, two for the others.
template <Depth D>
DEV void right_fragments(u32 (&f)[4], const char* slice, u32 column, u32 depth) {
  constexpr u32 ROW = Slice<D>::ROW_BYTES;
  u32 l = (u32)lane();
  if constexpr (D == Depth::Along) ldmatrix_x4(f, slice + (column + l / 16 * 8 + l % 8) * ROW + (depth + l / 8 % 2 * 8) * 2);
  else ldmatrix_x4_trans(f, slice + (depth + l % 16) * ROW + (column + l / 16 * 8) * 2);
}

template <Depth LEFT, Depth RIGHT>
DEV void multiply_slice(float (&sums)[4][8][4], const char* stage, u32 row, u32 column) {
#pragma unroll
  for (u32 depth = 0; depth < SLICE; depth += 16) {
    u32 left[4][4], right[4][4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) left_fragment<LEFT>(left[i], stage, row + i * 16, depth);
#pragma unroll
    for (u32 j = 0; j < 4; j++) right_fragments<RIGHT>(right[j], stage + SLICE_BYTES, column + j * 16, depth);
#pragma unroll
    for (u32 i = 0; i < 4; i++)
#pragma unroll
      for (u32 j = 0; j < 8; j++) {
        u32 b[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
        mma_m16n8k16(sums[i][j], left[i], b);
      }
  }
}

// Sums from fragments to [128][SUM_ROW] in shared memory, so that rows are finished and stored whole.
DEV void spread_sums(float* to, const float (&sums)[4][8][4], u32 row, u32 column) {
  u32 l = (u32)lane();
#pragma unroll
  for (u32 i = 0; i < 4; i++)
#pragma unroll
    for (u32 j = 0; j < 8; j++)
#pragma unroll
      for (u32 half = 0; half < 2; half++) {
        u32 at = (row + i * 16 + half * 8 + l / 4) * SUM_ROW + column + j * 8 + l % 4 * 2;
        *(float2*)(to + at) = make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
      }
}

template <Depth LEFT, Depth RIGHT, class Args>
DEV void tensor_cores(const Args& args) {
  DYN_SHARED(shared);
  const auto& p = args.product;
  Work at = work<TILE>(p);
  u32 slices = ceil_div(at.depth_end - at.depth, SLICE);
  auto copy = [&](u32 slice) {
    char* stage = shared + slice % STAGES * 2 * SLICE_BYTES;
    u32 depth = at.depth + slice * SLICE;
    if (slice < slices) {
      copy_slice<LEFT>(stage, p.left, at.row, p.rows, depth, at.depth_end);
      copy_slice<RIGHT>(stage + SLICE_BYTES, p.right, at.column, p.columns, depth, at.depth_end);
    }
    cp_async_commit();  // an empty group where there is no slice, so that the wait counts on
  };
#pragma unroll
  for (u32 slice = 0; slice < STAGES - 1; slice++) copy(slice);
  u32 row = (u32)warp() % 2 * 64, column = (u32)warp() / 2 * 64;
  float sums[4][8][4] = {};
#pragma unroll 1
  for (u32 slice = 0; slice < slices; slice++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // this slice is there for all, and all have read the one before, whose place the next copy takes
    copy(slice + STAGES - 1);
    multiply_slice<LEFT, RIGHT>(sums, shared + slice % STAGES * 2 * SLICE_BYTES, row, column);
  }
  cp_async_wait<0>();
  __syncthreads();
  float* all = (float*)shared;
  spread_sums(all, sums, row, column);
  __syncthreads();
#pragma unroll 2
  for (u32 i = threadIdx.x; i < TILE * TILE / 8; i += MMA_THREADS) {
    u32 r = i / (TILE / 8), c = i % (TILE / 8) * 8;
    if (at.row + r >= p.rows || at.column + c >= p.columns) continue;
    float v[8];
    load_chunk<8>(all + r * SUM_ROW + c, v);
    finish(args, {at.part, at.row + r, at.column + c, min(8u, p.columns - at.column - c)}, v);
  }
}

KERNEL(gemm_forward_f32, ForwardArgs<float>, 256, 2) { plain<Depth::Along, Depth::Along>(args); }
KERNEL(gemm_forward_bf16, ForwardArgs<bf16>, 256, 2) { plain<Depth::Along, Depth::Along>(args); }
KERNEL(gemm_forward_mma_bf16, ForwardArgs<bf16>, 128, 2) { tensor_cores<Depth::Along, Depth::Along>(args); }

KERNEL(gemm_backward_data_f32, DataArgs<float>, 256, 2) { plain<Depth::Along, Depth::Across>(args); }
KERNEL(gemm_backward_data_bf16, DataArgs<bf16>, 256, 2) { plain<Depth::Along, Depth::Across>(args); }
KERNEL(gemm_backward_data_mma_bf16, DataArgs<bf16>, 128, 2) { tensor_cores<Depth::Along, Depth::Across>(args); }

KERNEL(gemm_backward_weight_f32, WeightArgs<float>, 256, 2) { plain<Depth::Across, Depth::Across>(args); }
KERNEL(gemm_backward_weight_bf16, WeightArgs<bf16>, 256, 2) { plain<Depth::Across, Depth::Across>(args); }
KERNEL(gemm_backward_weight_mma_bf16, WeightArgs<bf16>, 128, 2) { tensor_cores<Depth::Across, Depth::Across>(args); }

// ---- The rest of the weights' gradient.

struct ReduceArgs {
  const float* parts;  // [count][len]
  float* sums;
  u64 len;
  u32 count;
  u32 unused;
};

// Parts in their order, added in f64.
KERNEL(gemm_reduce, ReduceArgs, 256, 4) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= args.len) return;
  double sum = 0.0;
#pragma unroll 4
  for (u32 part = 0; part < args.count; part++) sum += (double)args.parts[part * args.len + i];
  args.sums[i] = (float)sum;
}

template <class T>
struct BiasArgs {
  const T* dy;     // [m, n]
  float* parts;    // [parts][n]
  float* dbias;    // [n]
  u32* tickets;    // one for each 32 columns
  u32 m, n, rows;  // rows of a part
  u32 unused;
};

template <class T>
DEV void bias_gradient(const BiasArgs<T>& args) {
  ColumnPart at = column_part(args.m, args.n, args.rows);
  constexpr u32 AT_ONCE = 8;  // rows on their way
  float sum[1] = {};
  if (at.inside)
    for (u32 first = at.row + (u32)warp(); first < at.row_end; first += 8 * AT_ONCE) {
      T dy[AT_ONCE];
#pragma unroll
      for (u32 i = 0; i < AT_ONCE; i++) dy[i] = args.dy[(u64)min(first + 8 * i, at.row_end - 1) * args.n + at.column];
#pragma unroll
      for (u32 i = 0; i < AT_ONCE; i++) sum[0] += first + 8 * i < at.row_end ? to_float(dy[i]) : 0.0f;
    }
  add_parts(at, sum, args.parts, args.dbias, args.n, args.tickets);
}
KERNEL(gemm_bias_gradient_f32, BiasArgs<float>, 256, 4) { bias_gradient(args); }
KERNEL(gemm_bias_gradient_bf16, BiasArgs<bf16>, 256, 4) { bias_gradient(args); }

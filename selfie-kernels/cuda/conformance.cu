// Every function of device.h alone, against plain arithmetic: src/cuda/conformance.rs has the other side and runs on
// whatever device there is, so that a wrapper means the same on a GPU and in the emulator. Each kernel is launched with
// one block unless it says otherwise; outputs are written by `threadIdx.x` unless it says otherwise.
#include "device.h"

// d[16][8] = a[16][16] b[16][8], row-major. a comes as `a` [16][16] by ldmatrix or, in the second kernel, transposed
// [k 16][row 16] by ldmatrix.trans; b comes as [k 16][column 8] by ldmatrix.trans or, in the second, as [column 8][k 16] by
// ldmatrix. Products of two bf16 are exact; a tensor core cuts off what an addition would round, so every element is
// within 32 * 2^-23 * sum |a b|.
struct MmaArgs {
  const bf16 *a, *b;
  float* d;
};
static constexpr int MMA_ROW = 24;  // elements of a row in shared memory: 16 and padding, so that rows start in other banks
DEV void copy_rows(bf16 (&to)[16][MMA_ROW], const bf16* from, int rows, int columns) {
  int chunks = columns / 8;
  for (int i = lane(); i < rows * chunks; i += 32) cp_async16(&to[i / chunks][i % chunks * 8], from + i * 8);
}
DEV void multiply(float* d, const u32 (&a)[4], const u32 (&b)[4]) {
  const u32 pair[2] = {b[0], b[1]};
  float product[4] = {};
  mma_m16n8k16(product, a, pair);
  for (int i = 0; i < 4; i++) d[(lane() / 4 + i / 2 * 8) * 8 + lane() % 4 * 2 + i % 2] = product[i];
}
KERNEL(conformance_mma, MmaArgs, 32, 1) {
  SHARED(bf16, a, [16][MMA_ROW]);
  SHARED(bf16, b, [16][MMA_ROW]);
  copy_rows(a, args.a, 16, 16);
  copy_rows(b, args.b, 16, 8);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  u32 left[4], right[4];
  ldmatrix_x4(left, &a[lane() % 16][lane() / 16 * 8]);
  ldmatrix_x4_trans(right, &b[lane() % 16][0]);
  multiply(args.d, left, right);
}
KERNEL(conformance_mma_transposed, MmaArgs, 32, 1) {
  SHARED(bf16, a, [16][MMA_ROW]);
  SHARED(bf16, b, [16][MMA_ROW]);
  copy_rows(a, args.a, 16, 16);
  copy_rows(b, args.b, 8, 16);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  u32 left[4], right[4];
  ldmatrix_x4_trans(left, &a[lane() / 16 * 8 + lane() % 8][lane() / 8 % 2 * 8]);
  ldmatrix_x4(right, &b[lane() % 8][lane() / 8 % 2 * 8]);
  multiply(args.d, left, right);
}

// The four matrices that lie one after the other in x [matrix 4][row 8][column 8]: `plain` and `transposed` [32][4] are
// what each lane gets, as device.h says it.
struct LdmatrixArgs {
  const u16* x;
  u32 *plain, *transposed;
};
KERNEL(conformance_ldmatrix, LdmatrixArgs, 32, 1) {
  SHARED(u16, x, [32][8]);
  int neighbour = lane() ^ 1;  // each row is written by another lane than the one that names it
  store16(x[neighbour], load16(args.x + neighbour * 8));
  __syncwarp();
  u32 r[4];
  ldmatrix_x4(r, x[lane()]);
  for (int j = 0; j < 4; j++) args.plain[lane() * 4 + j] = r[j];
  ldmatrix_x4_trans(r, x[lane()]);
  for (int j = 0; j < 4; j++) args.transposed[lane() * 4 + j] = r[j];
}

// A pipeline of three stages over x [rounds][128][8]: y[r][t] = x[r][127 - t], or zeros where (r + 127 - t) % 3 == 0. What
// a thread reads was copied by another.
struct CpAsyncArgs {
  const bf16* x;
  bf16* y;
  u64 rounds;
};
static constexpr u32 STAGES = 3;
DEV void begin_stage(bf16 (&stage)[128][8], const CpAsyncArgs& args, u32 round) {
  u32 t = threadIdx.x;
  if (round < args.rounds) {
    const bf16* from = args.x + ((u64)round * 128 + t) * 8;
    if ((round + t) % 3 == 0)
      cp_async16_or_zero(stage[t], from, Fill::Zero);
    else if (t % 2 == 0)
      cp_async16_or_zero(stage[t], from, Fill::Copy);
    else
      cp_async16(stage[t], from);
  }
  cp_async_commit();  // an empty group too, so that the number to wait for stays the same
}
KERNEL(conformance_cp_async, CpAsyncArgs, 128, 1) {
  SHARED(bf16, stages, [STAGES][128][8]);
  for (u32 s = 0; s < STAGES - 1; s++) begin_stage(stages[s], args, s);
  for (u32 round = 0; round < args.rounds; round++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    // Behind the barrier: all have read the stage that is filled next.
    begin_stage(stages[(round + STAGES - 1) % STAGES], args, round + STAGES - 1);
    u32 t = threadIdx.x;
    store16(args.y + ((u64)round * 128 + t) * 8, load16(stages[round % STAGES][127 - t]));
  }
  cp_async_wait<0>();
}

// Of x [64], any values: `plain` and `relus` [32] are pairs (x[2i] in the low half) rounded to bf16, without and behind a
// ReLU; `single` [64] the same one at a time; `relu` and `larger` [64] are max(0, x) and the larger of x[i] and x[63 - i],
// both NaN where one is, in f32; `finite` [64] is 0 or 1; `back` [64] is `single` as f32 again.
struct RoundingArgs {
  const float* x;
  u32 *plain, *relus;
  bf16* single;
  float *relu, *larger, *back;
  u32* finite;
};
KERNEL(conformance_rounding, RoundingArgs, 64, 1) {
  int t = threadIdx.x;
  float x = args.x[t];
  if (t < 32) {
    args.plain[t] = pack_bf16x2(args.x[2 * t], args.x[2 * t + 1]);
    args.relus[t] = pack_relu_bf16x2(args.x[2 * t], args.x[2 * t + 1]);
  }
  args.single[t] = from_float<bf16>(x);
  args.relu[t] = relu(x);
  args.larger[t] = max_nan(x, args.x[63 - t]);
  args.back[t] = to_float(args.single[t]);
  args.finite[t] = is_finite(x);
}

// Of x [32]: `from` = x[lane * 5 % 32], `exchanged` = x[lane ^ 6], `up` = x[lane - 3] and `down` = x[lane + 3] (its own
// where there is no such lane), `wide` = the f64 of lane ^ 1, 1.5 * x, and `votes` = the bits of the odd ones in x.
struct ShuffleArgs {
  const u32* x;
  u32 *from, *exchanged, *up, *down, *votes;
  double* wide;
};
KERNEL(conformance_shuffle, ShuffleArgs, 32, 1) {
  int l = lane();
  u32 x = args.x[l];
  args.from[l] = __shfl_sync(WARP, x, l * 5 % 32);
  args.exchanged[l] = __shfl_xor_sync(WARP, x, 6);
  args.up[l] = __shfl_up_sync(WARP, x, 3);
  args.down[l] = __shfl_down_sync(WARP, x, 3);
  args.wide[l] = __shfl_xor_sync(WARP, 1.5 * x, 1);
  args.votes[l] = __ballot_sync(WARP, x % 2 == 1);
}

// Of x [256]: sums of each warp in f32 and f64, and its maximum; sums and maximum of the block. Every thread writes what
// it got, [256] each. An f32 sum of a warp is that of five rounds in which lane l adds lane l ^ 16, 8, 4, 2, 1, and the
// block's adds the warps' sums in order: the host's, to the bit.
struct ReductionArgs {
  const float* x;
  float *warp_sum, *warp_max, *block_sum, *block_max;
  double *warp_sum_f64, *block_sum_f64;
};
KERNEL(conformance_reduction, ReductionArgs, 256, 1) {
  int t = threadIdx.x;
  float x = args.x[t];
  args.warp_sum[t] = warp_sum(x);
  args.warp_sum_f64[t] = warp_sum((double)x);
  args.warp_max[t] = warp_max(x);
  // Two in a row: the second one's writing must wait for the first one's reading. The difference is exact.
  float doubled = block_sum<256>(2.0f * x);
  args.block_sum[t] = doubled - block_sum<256>(x);
  args.block_sum_f64[t] = block_sum<256>((double)x);
  args.block_max[t] = block_max<256>(x);
}

// y = x, 16 bytes a thread: `single` [128] and `half` [256] through floats, `raw` [128] bit by bit.
struct VectorArgs {
  const float* single;
  float* single_out;
  const bf16* half;
  bf16* half_out;
  const u32* raw;
  u32* raw_out;
};
KERNEL(conformance_vector, VectorArgs, 32, 1) {
  int t = threadIdx.x;
  float four[4], eight[8];
  load_floats(args.single + t * 4, four);
  store_floats(args.single_out + t * 4, four);
  load_vec_nc(args.half + t * 8).unpack(eight);
  store_floats(args.half_out + t * 8, eight);
  prefetch_l2(args.raw);
  store16(args.raw_out + t * 4, load16(args.raw + t * 4));
}

// words [64][4]: philox of (seed, purpose, sample + thread, thread); `units` [64]: of each first word; `multipliers`
// [64][4]: the dropout of elements 4 * thread .. + 4 of the batch's sample 5, `one` [64] the third of them on its own, and
// `none` [64] without dropout.
struct RandomArgs {
  u64 seed, sample;
  u32* words;
  float *units, *multipliers, *one, *none;
  Dropout dropout;
  u64 purpose;
};
KERNEL(conformance_random, RandomArgs, 64, 1) {
  u32 t = threadIdx.x;
  u32x4 words = philox(args.seed, (u32)args.purpose, args.sample + t, t);
  store16(args.words + t * 4, words);
  args.units[t] = philox_unit(words.x);
  float4 m = dropout_multipliers(args.dropout, 5, t);
  args.multipliers[t * 4] = m.x, args.multipliers[t * 4 + 1] = m.y;
  args.multipliers[t * 4 + 2] = m.z, args.multipliers[t * 4 + 3] = m.w;
  args.one[t] = dropout_multiplier(args.dropout, 5, 4 * t + 2);
  args.none[t] = dropout_multiplier({nullptr, 0, 0.0f, 1.0f, 0}, 5, t);
}

// Of x and y [n], by any number of blocks: accurate functions, as far from the true value as CUDA's manual says: 1 ulp
// (logf), 2 ulp (expf, erff), correctly rounded (the others).
struct MathArgs {
  const float *x, *y;
  float *exp, *log, *erf, *sqrt, *quotient, *fma;
  u64 n;
};
KERNEL(conformance_math, MathArgs, 128, 1) {
  u32 i = blockIdx.x * 128 + threadIdx.x;
  if (i >= args.n) return;
  float x = args.x[i], y = args.y[i];
  args.exp[i] = expf(x);
  args.log[i] = logf(fabsf(x));
  args.erf[i] = erff(x);
  args.sqrt[i] = sqrtf(fabsf(x));
  args.quotient[i] = x / y;
  args.fma[i] = fmaf(x, y, 1.0f);
}

// By any number of blocks: parts [blocks] are sums of x [blocks][64], sum [1] is that of the parts in order, made by the
// block that comes last; `ticket` is zero before and behind it.
struct LastBlockArgs {
  const u32* x;
  u32 *parts, *sum, *ticket;
};
KERNEL(conformance_last_block, LastBlockArgs, 64, 1) {
  u32 part = block_sum<64>(args.x[blockIdx.x * 64 + threadIdx.x]);
  if (threadIdx.x == 0) args.parts[blockIdx.x] = part;
  if (!last_block(args.ticket, gridDim.x)) return;
  u32 sum = 0;
  for (u32 b = threadIdx.x; b < gridDim.x; b += 64) sum += args.parts[b];
  sum = block_sum<64>(sum);
  if (threadIdx.x == 0) args.sum[0] = sum;
}

// y [blocks][n] = x [blocks][n] backwards, through n * 4 bytes of dynamic shared memory; blocks are
// numbered x first: block (bx, by, bz) of the grid (3, 2, 2) is (bz * 2 + by) * 3 + bx.
struct DynamicSharedArgs {
  const float* x;
  float* y;
  u64 n;
};
KERNEL(conformance_dynamic_shared, DynamicSharedArgs, 64, 1) {
  DYN_SHARED(bytes);
  float* row = (float*)bytes;
  u64 first = (u64)((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * args.n;
  for (u32 i = threadIdx.x; i < args.n; i += blockDim.x) row[i] = args.x[first + i];
  __syncthreads();
  for (u32 i = threadIdx.x; i < args.n; i += blockDim.x) args.y[first + i] = row[args.n - 1 - i];
}

// Partial sums to coefficients, in f64. A block has 8 channels, the 32 bytes of a sector; 64 threads of each share the tiles,
// with several on their way at once, as each is as far away as the L2. Each adds up every 64th tile in order, and what they have
// is added in a fixed order.
#include "device.h"

static constexpr u32 THREADS = 512, CHANNELS = 8, SHARES = THREADS / CHANNELS;
static constexpr int AT_ONCE = 8;

// Calls take(a tile's first number, its second) for this thread's tiles of channel k, in order.
template <class Take>
DEV void each_tile(const float* sums, u32 c, u32 k, u32 tiles, Take take) {
  for (u32 begin = threadIdx.x / CHANNELS; begin < tiles; begin += SHARES * AT_ONCE) {
    float first[AT_ONCE], second[AT_ONCE];
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; i++) {
      const float* tile = sums + (u64)min(begin + i * SHARES, tiles - 1) * 2 * c + k;
      first[i] = tile[0];
      second[i] = tile[c];
    }
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; i++)
      if (begin + i * SHARES < tiles) take(first[i], second[i]);
  }
}

// Over a channel's threads: those of a warp, then the warps in order; every thread gets its channel's. Holds two barriers.
DEV double sum_over_shares(double v) {
  SHARED(double, sums, [THREADS / 32][CHANNELS]);
  v += __shfl_xor_sync(WARP, v, 8);
  v += __shfl_xor_sync(WARP, v, 16);
  u32 channel = (u32)lane() % CHANNELS;
  if ((u32)lane() < CHANNELS) sums[warp()][channel] = v;
  __syncthreads();
  double sum = sums[0][channel];
#pragma unroll
  for (u32 w = 1; w < THREADS / 32; w++) sum += sums[w][channel];
  __syncthreads();
  return sum;
}

// rstd, scale and shift from the mean and the variance with eps added. shift is formed with scale as it is stored, so that
// `scale * x + shift` is beta at the mean, however large that is.
DEV void fold(float* norm, u32 c, u32 k, double mean, double variance, float gamma, float beta) {
  double rstd = 1.0 / sqrt(variance);
  float scale = (float)((double)gamma * rstd);
  norm[k] = (float)mean;
  norm[c + k] = (float)rstd;
  norm[2 * c + k] = scale;
  norm[3 * c + k] = (float)((double)beta - mean * (double)scale);
}

// How rows were cut: all tiles have `rows` of them, but tile last[run], the last one of a run of rows, is `missing[run]` short.
struct Tiles {
  double rows, missing[4];
  u32 last[4];
};

struct ForwardArgs {
  const float* stats;   // [tiles][2][c]
  const float* affine;  // [2][c]
  float* norm;          // [4][c]
  float* batch;         // [2][c]
  Tiles cut;
  double eps, count;  // of all rows
  u32 tiles, c;
};
KERNEL(bn_finalize_forward, ForwardArgs, THREADS, 1) {
  u32 c = args.c, k = blockIdx.x * CHANNELS + threadIdx.x % CHANNELS;
  bool live = k < c;
  // Moments about the first tile's mean, so that one pass is enough. No tile has more rows, and it is itself one of the
  // terms: what is taken off again is at most the rest times the number of tiles, 13 of 53 bits where there are 8,192.
  double count = args.count, about = live ? (double)args.stats[k] : 0.0, sum = 0.0, within = 0.0, between = 0.0;
  if (live)
    each_tile(args.stats, c, k, args.tiles, [&](float mean, float squares) {
      double apart = (double)mean - about;
      sum += apart;
      between = fma(apart, apart, between);
      within += (double)squares;
    });
  sum *= args.cut.rows;
  double squares = fma(args.cut.rows, between, within);
  if (live && threadIdx.x < CHANNELS) {
    for (int run = 0; run < 4; run++) {
      double missing = args.cut.missing[run];
      if (missing == 0.0) continue;
      double apart = (double)args.stats[(u64)args.cut.last[run] * 2 * c + k] - about, product = missing * apart;
      sum -= product;
      squares = fma(-product, apart, squares);
    }
  }
  sum = sum_over_shares(sum);
  squares = sum_over_shares(squares) - sum * (sum / count);
  if (!live || threadIdx.x >= CHANNELS) return;
  double mean = about + sum / count;
  args.batch[k] = (float)mean;
  args.batch[c + k] = (float)(squares / (count - 1.0));
  fold(args.norm, c, k, mean, squares / count + args.eps, args.affine[k], args.affine[c + k]);
}

struct InferenceArgs {
  const float* running;  // [2][c]
  const float* affine;   // [2][c]
  float* norm;           // [4][c]
  double eps;
  u32 c, unused;
};
KERNEL(bn_finalize_inference, InferenceArgs, 128, 1) {
  u32 c = args.c, k = blockIdx.x * blockDim.x + threadIdx.x;
  if (k >= c) return;
  double variance = (double)args.running[c + k] + args.eps;
  fold(args.norm, c, k, (double)args.running[k], variance, args.affine[k], args.affine[c + k]);
}

struct BackwardArgs {
  const float* sums;    // [tiles][2][c]
  const float* affine;  // [2][c]
  const float* norm;    // [4][c]
  float* daffine;       // [2][c]
  float* coef;          // [3][c]
  double count;         // of all rows
  u32 tiles, c;
};
KERNEL(bn_finalize_backward, BackwardArgs, THREADS, 1) {
  u32 c = args.c, k = blockIdx.x * CHANNELS + threadIdx.x % CHANNELS;
  bool live = k < c;
  double dz = 0.0, dz_xhat = 0.0;
  if (live)
    each_tile(args.sums, c, k, args.tiles, [&](float first, float second) {
      dz += (double)first;
      dz_xhat += (double)second;
    });
  dz = sum_over_shares(dz);
  dz_xhat = sum_over_shares(dz_xhat);
  if (!live || threadIdx.x >= CHANNELS) return;
  double count = args.count, mean = (double)args.norm[k], rstd = (double)args.norm[c + k];
  double a = (double)args.affine[k] * rstd;
  // The rounded factor below, so that `b * x + c` vanishes at the mean, however large that is.
  float b = (float)(-a * rstd * dz_xhat / count);
  args.daffine[k] = (float)dz_xhat;
  args.daffine[c + k] = (float)dz;
  args.coef[k] = (float)a;
  args.coef[c + k] = b;
  args.coef[2 * c + k] = (float)(-a * dz / count - (double)b * mean);
}

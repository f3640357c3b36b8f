// Partial sums to coefficients, in f64. A block has 32 channels (its lanes); its warps share the tiles, each adds up every
// 16th in order, and the warps' sums are added in order.
#include "device.h"

static constexpr int WARPS = 16;

// How rows were cut into tiles: runs of rows one after the other, in tiles of `tile` rows.
struct Cut {
  u64 runs[4];
  u64 tile;
};
DEV u64 tiles(const Cut& cut) {
  u64 sum = 0;
  for (int run = 0; run < 4; run++) sum += ceil_div(cut.runs[run], cut.tile);
  return sum;
}
// Rows of tile `t`.
DEV u64 rows(const Cut& cut, u64 t) {
  for (int run = 0; run < 4; run++) {
    u64 tiles = ceil_div(cut.runs[run], cut.tile);
    if (t < tiles) return min(cut.tile, cut.runs[run] - t * cut.tile);
    t -= tiles;
  }
  return 0;
}

// Of the warps' sums, in order; every thread gets its channel's. Holds two barriers.
DEV double sum_over_warps(double v) {
  SHARED(double, sums, [WARPS][32]);
  sums[warp()][lane()] = v;
  __syncthreads();
  double sum = sums[0][lane()];
  for (int w = 1; w < WARPS; w++) sum += sums[w][lane()];
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

struct ForwardArgs {
  const float* stats;   // [tiles][2][c]
  const float* affine;  // [2][c]
  float* norm;          // [4][c]
  float* batch;         // [2][c]
  Cut cut;
  double eps;
  u64 rows;
  u32 c, unused;
};
KERNEL(bn_finalize_forward, ForwardArgs, WARPS * 32, 1) {
  u32 c = args.c, k = blockIdx.x * 32 + lane();
  bool live = k < c;
  u64 all = tiles(args.cut);
  double count = (double)args.rows, sum = 0.0, squares = 0.0;
  if (live) {
    for (u64 t = warp(); t < all; t += WARPS) sum += (double)rows(args.cut, t) * (double)args.stats[t * 2 * c + k];
  }
  double mean = sum_over_warps(sum) / count;
  if (live) {
    for (u64 t = warp(); t < all; t += WARPS) {
      const float* tile = args.stats + t * 2 * c + k;
      double apart = (double)tile[0] - mean;
      squares += (double)tile[c] + (double)rows(args.cut, t) * (apart * apart);
    }
  }
  squares = sum_over_warps(squares);
  if (!live || warp() != 0) return;
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
  u64 tiles, rows;
  u32 c, unused;
};
KERNEL(bn_finalize_backward, BackwardArgs, WARPS * 32, 1) {
  u32 c = args.c, k = blockIdx.x * 32 + lane();
  bool live = k < c;
  double dz = 0.0, dz_xhat = 0.0;
  if (live) {
    for (u64 t = warp(); t < args.tiles; t += WARPS) {
      dz += (double)args.sums[t * 2 * c + k];
      dz_xhat += (double)args.sums[t * 2 * c + c + k];
    }
  }
  dz = sum_over_warps(dz);
  dz_xhat = sum_over_warps(dz_xhat);
  if (!live || warp() != 0) return;
  double count = (double)args.rows, mean = (double)args.norm[k], rstd = (double)args.norm[c + k];
  double a = (double)args.affine[k] * rstd;
  // The rounded factor below, so that `b * x + c` vanishes at the mean, however large that is.
  float b = (float)(-a * rstd * dz_xhat / count);
  args.daffine[k] = (float)dz_xhat;
  args.daffine[c + k] = (float)dz;
  args.coef[k] = (float)a;
  args.coef[c + k] = b;
  args.coef[2 * c + k] = (float)(-a * dz / count - (double)b * mean);
}

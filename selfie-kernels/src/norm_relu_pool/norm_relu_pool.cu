// Averages of windows behind normalisation and ReLU, and their gradient with its sums.
#include "tile_sums.h"

template <class T>
struct ForwardArgs {
  const T* x;
  const float* norm;  // [4][c]
  T* y;
  u64 len;
  u32 w, c, window_h, window_w;
};

// One thread an output element. Windows cover the map, so rows of all images can be counted through.
template <class T>
DEV void forward(const ForwardArgs<T>& args) {
  u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= args.len) return;
  u32 k = (u32)(at % args.c), q = args.w / args.window_w;
  u64 window = at / args.c, left = window % q * args.window_w, top = window / q * args.window_h;
  float scale = args.norm[2 * args.c + k], shift = args.norm[3 * args.c + k], sum = 0.0f;
  for (u32 i = 0; i < args.window_h; i++) {
    for (u32 j = 0; j < args.window_w; j++) {
      sum += relu(fmaf(scale, to_float(args.x[((top + i) * args.w + left + j) * args.c + k]), shift));
    }
  }
  args.y[at] = from_float<T>(sum / (float)(args.window_h * args.window_w));
}
KERNEL(norm_relu_pool_forward_f32, ForwardArgs<float>, 256, 4) { forward(args); }
KERNEL(norm_relu_pool_forward_bf16, ForwardArgs<bf16>, 256, 4) { forward(args); }

template <class T>
struct BackwardArgs {
  const T *dy, *x;
  const float* norm;  // [4][c]
  T* dz;
  float* sums;  // [tiles][2][c]
  u64 rows;
  u32 w, c, window_h, window_w;
};

// A block makes 128 pixels of 32 channels of dz, and their sums.
template <class T>
DEV void backward(const BackwardArgs<T>& args) {
  u64 first = (u64)blockIdx.x * TILE_ROWS;
  u32 k = blockIdx.y * TILE_CHANNELS + lane(), c = args.c;
  float area = (float)(args.window_h * args.window_w), sum = 0.0f, product = 0.0f;
  if (k < c) {
    float mean = args.norm[k], rstd = args.norm[c + k], scale = args.norm[2 * c + k], shift = args.norm[3 * c + k];
#pragma unroll
    for (int i = 0; i < TILE_VALUES; i++) {
      u64 pixel = first + warp() + i * TILE_WARPS;
      if (pixel >= args.rows) continue;
      u64 window = pixel / args.w / args.window_h * (args.w / args.window_w) + pixel % args.w / args.window_w;
      float x = to_float(args.x[pixel * c + k]), share = to_float(args.dy[window * c + k]) / area;
      // A NaN lets the gradient pass.
      T stored = from_float<T>(fmaf(scale, x, shift) <= 0.0f ? 0.0f : share);
      args.dz[pixel * c + k] = stored;
      float dz = to_float(stored);
      sum += dz;
      product = fmaf(dz, (x - mean) * rstd, product);
    }
  }
  sum = sum_over_rows(sum);
  product = sum_over_rows(product);
  if (warp() == 0 && k < c) {
    float* to = args.sums + (u64)blockIdx.x * 2 * c + k;
    to[0] = sum;
    to[c] = product;
  }
}
KERNEL(norm_relu_pool_backward_f32, BackwardArgs<float>, TILE_THREADS, 4) { backward(args); }
KERNEL(norm_relu_pool_backward_bf16, BackwardArgs<bf16>, TILE_THREADS, 4) { backward(args); }

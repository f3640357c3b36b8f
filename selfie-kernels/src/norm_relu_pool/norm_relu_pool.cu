// Averages of windows behind normalisation and ReLU, and their gradient with its sums.
#include "chunks.h"
#include "tile_sums.h"

template <class T>
struct ForwardArgs {
  const T* x;
  const float* norm;  // [4][c]
  T* y;
  u64 len;
  u32 w, c, window_h, window_w;
};

// A thread has N neighbours of the output. Windows cover the map, so rows of all images can be counted through; 31 bits count
// their pixels.
template <int N, class T>
DEV void forward(const ForwardArgs<T>& args) {
  constexpr u32 AT_ONCE = 8;  // pixels on their way
  u64 at = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * N;
  if (at >= args.len) return;
  u32 window = (u32)(at / args.c), k = (u32)(at - (u64)window * args.c), q = args.w / args.window_w;
  u32 top = window / q * args.window_h, left = window % q * args.window_w, area = args.window_h * args.window_w;
  const T* x = args.x + ((u64)top * args.w + left) * args.c + k;
  float scale[N], shift[N], sum[N] = {};
  load_chunk(args.norm + 2 * args.c + k, scale);
  load_chunk(args.norm + 3 * args.c + k, shift);
  for (u32 first = 0; first < area; first += AT_ONCE) {
    float v[AT_ONCE][N];
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; i++) {
      u32 pixel = min(first + i, area - 1), row = pixel / args.window_w;
      load_chunk(x + (u64)(row * args.w + pixel - row * args.window_w) * args.c, v[i]);
    }
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; i++) {
      if (first + i >= area) continue;
#pragma unroll
      for (int n = 0; n < N; n++) sum[n] += relu(fmaf(scale[n], v[i][n], shift[n]));
    }
  }
#pragma unroll
  for (int n = 0; n < N; n++) sum[n] /= (float)area;
  store_chunk(args.y + at, sum);
}
KERNEL(norm_relu_pool_forward_f32, ForwardArgs<float>, 256, 2) { forward<4>(args); }
KERNEL(norm_relu_pool_forward_bf16, ForwardArgs<bf16>, 256, 2) { forward<8>(args); }
KERNEL(norm_relu_pool_forward_elements_f32, ForwardArgs<float>, 256, 4) { forward<1>(args); }
KERNEL(norm_relu_pool_forward_elements_bf16, ForwardArgs<bf16>, 256, 4) { forward<1>(args); }

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
  int rows = (int)min((u64)TILE_ROWS, args.rows - first);
  float area = (float)(args.window_h * args.window_w), sum = 0.0f, product = 0.0f;
  // Which window each pixel is in is worked out once for all channels.
  SHARED(u32, windows, [TILE_ROWS]);
  if ((int)threadIdx.x < rows) {
    u32 pixel = (u32)first + threadIdx.x, row = pixel / args.w, column = pixel - row * args.w;
    windows[threadIdx.x] = row / args.window_h * (args.w / args.window_w) + column / args.window_w;
  }
  __syncthreads();
  if (k < c) {
    float mean = args.norm[k], rstd = args.norm[c + k], scale = args.norm[2 * c + k], shift = args.norm[3 * c + k];
    // All on their way before the first one is used.
    T xs[TILE_VALUES], dys[TILE_VALUES];
#pragma unroll
    for (int i = 0; i < TILE_VALUES; i++) {
      int row = min(warp() + i * TILE_WARPS, rows - 1);
      xs[i] = args.x[(first + row) * c + k];
      dys[i] = args.dy[(u64)windows[row] * c + k];
    }
#pragma unroll
    for (int i = 0; i < TILE_VALUES; i++) {
      int row = warp() + i * TILE_WARPS;
      if (row >= rows) continue;
      float x = to_float(xs[i]), share = to_float(dys[i]) / area;
      // A NaN lets the gradient pass.
      T stored = from_float<T>(fmaf(scale, x, shift) <= 0.0f ? 0.0f : share);
      args.dz[(first + row) * c + k] = stored;
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
KERNEL(norm_relu_pool_backward_f32, BackwardArgs<float>, TILE_THREADS, 3) { backward(args); }
KERNEL(norm_relu_pool_backward_bf16, BackwardArgs<bf16>, TILE_THREADS, 3) { backward(args); }

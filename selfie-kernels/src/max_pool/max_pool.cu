// 3x3 max pooling with stride 2: a block makes 128 pixels of 32 channels, and their statistics while it has them.
#include "tile_sums.h"

template <class T>
struct ForwardArgs {
  const T* x;
  T* y;
  u8* argmax;
  float* stats;  // [tiles][2][c]
  u64 rows;
  u32 h, w, c, p, q, unused;
};

// Maximum and winner of the window of output pixel `row`; a NaN wins, and of equal values the first.
template <class T>
DEV float window_max(const ForwardArgs<T>& args, u64 row, u32 k, u8& winner) {
  int j = (int)(row % args.q), i = (int)(row / args.q % args.p);
  u64 image = row / args.q / args.p;
  float best = -INFINITY;
  bool none = true;
  for (int tap = 0; tap < 9; tap++) {
    int y = 2 * i + tap / 3 - 1, x = 2 * j + tap % 3 - 1;
    if (y < 0 || y >= (int)args.h || x < 0 || x >= (int)args.w) continue;
    float v = to_float(args.x[((image * args.h + y) * args.w + x) * args.c + k]);
    if (none || v > best || isnan(v)) best = v, winner = (u8)tap;
    none = false;
  }
  return best;
}

template <class T>
DEV void forward(const ForwardArgs<T>& args) {
  u64 first = (u64)blockIdx.x * TILE_ROWS;
  u32 k = blockIdx.y * TILE_CHANNELS + lane();
  int rows = (int)min((u64)TILE_ROWS, args.rows - first);
  float v[TILE_VALUES];
#pragma unroll
  for (int i = 0; i < TILE_VALUES; i++) {
    int row = warp() + i * TILE_WARPS;
    v[i] = 0.0f;
    if (row >= rows || k >= args.c) continue;
    u64 at = (first + row) * args.c + k;
    u8 winner = 0;
    v[i] = window_max(args, first + row, k, winner);
    args.y[at] = from_float<T>(v[i]);
    args.argmax[at] = winner;
  }
  TileStats stats = tile_stats(v, rows);
  if (warp() == 0 && k < args.c) {
    float* to = args.stats + (u64)blockIdx.x * 2 * args.c + k;
    to[0] = stats.mean;
    to[args.c] = stats.squares;
  }
}
KERNEL(max_pool_forward_f32, ForwardArgs<float>, TILE_THREADS, 4) { forward(args); }
KERNEL(max_pool_forward_bf16, ForwardArgs<bf16>, TILE_THREADS, 4) { forward(args); }

template <class T>
struct BackwardArgs {
  const T *dy, *x;    // x: null for a plain gradient
  const float* coef;  // [3][c]
  const u8* argmax;
  T* dx;
  u64 len;
  u32 h, w, c, p, q, unused;
};

// One thread an input element: it gathers from the windows that it lies in, in the CPU's order, and adds where it won.
template <class T>
DEV void backward(const BackwardArgs<T>& args) {
  u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= args.len) return;
  u32 k = (u32)(at % args.c);
  u64 pixel = at / args.c;
  u32 j = (u32)(pixel % args.w), i = (u32)(pixel / args.w % args.h);
  u64 image = pixel / args.w / args.h;
  float a = 0.0f, b = 0.0f, c = 0.0f, sum = 0.0f;
  if (args.x) a = args.coef[k], b = args.coef[args.c + k], c = args.coef[2 * args.c + k];
  // Along a side, an even position is the middle of a window (tap 1); an odd one is the end of a window (tap 2) and, but
  // for the map's last, the start of the next (tap 0).
  for (u32 down = 0; down <= i % 2; down++) {
    for (u32 right = 0; right <= j % 2; right++) {
      u32 p = i / 2 + down, q = j / 2 + right;
      if (p >= args.p || q >= args.q) continue;
      u32 r = down ? 0 : 1 + i % 2, s = right ? 0 : 1 + j % 2;
      u64 window = ((image * args.p + p) * args.q + q) * args.c + k;
      if (args.argmax[window] != 3 * r + s) continue;
      float dy = to_float(args.dy[window]);
      sum += args.x ? fmaf(a, dy, fmaf(b, to_float(args.x[window]), c)) : dy;
    }
  }
  args.dx[at] = from_float<T>(sum);
}
KERNEL(max_pool_backward_f32, BackwardArgs<float>, 256, 4) { backward(args); }
KERNEL(max_pool_backward_bf16, BackwardArgs<bf16>, 256, 4) { backward(args); }

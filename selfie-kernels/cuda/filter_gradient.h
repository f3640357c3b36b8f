#pragma once
// What the filters' gradients share: dw[k][column] = sum over output pixels of g[pixel][k] * a[pixel][column], where a column
// is a tap and an input channel. Here is the plain kernel, for every type and shape; those of the tensor cores lie beside
// their operations. Pixels are cut into splits, each with partial sums of its own, which `add_splits` adds in a fixed order.
#include "device.h"

struct Conv {
  int n, h, w, c, k, r, s, stride, pad;
  int p, q;  // the output's height and width
};

// max(0, scale * x + shift), which keeps NaN.
DEV float norm_relu(float x, float scale, float shift) { return relu(fmaf(scale, x, shift)); }
DEV u32 norm_relu_bf16x2(u32 pair, float2 scale, float2 shift) {
  return pack_relu_bf16x2(fmaf(scale.x, bf16x2_low(pair), shift.x), fmaf(scale.y, bf16x2_high(pair), shift.y));
}

enum class GradKind { Plain, Affine };

// a * dz + b * x + c.
DEV float affine_grad(float dz, float x, float a, float b, float c) { return fmaf(a, dz, fmaf(b, x, c)); }

// The coefficients of eight neighbouring channels of an affine gradient; zero past the last channel.
struct AffineCoef8 {
  float a[8], b[8], c[8];
  DEV_MEMBER void load(const float* coef, int channel, int channels) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      bool there = channel + i < channels;
      a[i] = there ? coef[channel + i] : 0.0f;
      b[i] = there ? coef[channels + channel + i] : 0.0f;
      c[i] = there ? coef[2 * channels + channel + i] : 0.0f;
    }
  }
  DEV_MEMBER u32 pair(u32 dz, u32 x, int i) const {
    return pack_bf16x2(affine_grad(bf16x2_low(dz), bf16x2_low(x), a[i], b[i], c[i]),
                       affine_grad(bf16x2_high(dz), bf16x2_high(x), a[i + 1], b[i + 1], c[i + 1]));
  }
  DEV_MEMBER u32x4 apply(u32x4 dz, u32x4 x) const {
    return {pair(dz.x, x.x, 0), pair(dz.y, x.y, 2), pair(dz.z, x.z, 4), pair(dz.w, x.w, 6)};
  }
};

// ---- The plain kernel: 64 filters x 64 columns a block, 16 pixels at a time, 4 x 4 sums a thread.

template <class T>
struct FilterGradientArgs {
  const T* x;         // [n, h, w, c]
  const float* norm;  // [4, c]; null: x as it is
  const T* dz;        // [n, p, q, k]
  const T* grad_x;    // [n, p, q, k] of an affine gradient, else null
  const float* coef;  // [3, k]
  float* out;         // [splits, k, r * s * c]
  Conv conv;
  int splits;
};

static constexpr int FILTER_THREADS = 256;

template <class T>
struct PlainFilterGradient {
  static constexpr int TILE = 64, STEP = 16, EACH = STEP * TILE / FILTER_THREADS, ROWS = FILTER_THREADS / TILE;

  // Where an output pixel's window begins: the image's first pixel, and row and column, which may lie in the padding.
  struct Window {
    int image, top, left;
  };

  const FilterGradientArgs<T>& args;
  Window (&windows)[STEP];
  float (&g)[STEP][TILE];
  float (&a)[STEP][TILE];
  // What this thread loads: a filter and a column, of every ROWS-th pixel.
  int filter, column, row, tap_y, tap_x, channel;
  float scale, shift, coef[3];
  float g_next[EACH], a_next[EACH];
  // Of the last pixels, which totals take in every so often: rounding grows with the length of a sum.
  float sums[4][4], totals[4][4];
  static constexpr int SUMMED = 16 * STEP;

  DEV_MEMBER PlainFilterGradient(const FilterGradientArgs<T>& args, Window (&windows)[STEP], float (&g)[STEP][TILE],
                                 float (&a)[STEP][TILE])
      : args(args), windows(windows), g(g), a(a) {}

  DEV_MEMBER int columns() const { return args.conv.r * args.conv.s * args.conv.c; }

  DEV_MEMBER void begin(int first_filter, int first_column) {
    const Conv& d = args.conv;
    filter = first_filter + (int)threadIdx.x % TILE;
    column = first_column + (int)threadIdx.x % TILE;
    row = (int)threadIdx.x / TILE;
    channel = column % d.c;
    tap_y = column / d.c / d.s;
    tap_x = column / d.c % d.s;
    bool norm = args.norm && column < columns();
    scale = norm ? args.norm[2 * d.c + channel] : 0.0f;
    shift = norm ? args.norm[3 * d.c + channel] : 0.0f;
    for (int i = 0; i < 3; i++) coef[i] = args.coef && filter < d.k ? args.coef[i * d.k + filter] : 0.0f;
    for (int i = 0; i < 16; i++) sums[i / 4][i % 4] = totals[i / 4][i % 4] = 0.0f;
  }

  DEV_MEMBER void take_in() {
#pragma unroll
    for (int i = 0; i < 16; i++) {
      totals[i / 4][i % 4] += sums[i / 4][i % 4];
      sums[i / 4][i % 4] = 0.0f;
    }
  }

  // The windows of the pixels from `pixel`; past the last one some that exists, as its gradient is zero.
  DEV_MEMBER void find_windows(int pixel, int end) {
    if (threadIdx.x >= STEP) return;
    const Conv& d = args.conv;
    int at = min(pixel + (int)threadIdx.x, end - 1);
    windows[threadIdx.x] = {at / (d.p * d.q) * (d.h * d.w), at / d.q % d.p * d.stride - d.pad, at % d.q * d.stride - d.pad};
  }

  DEV_MEMBER float load_grad(int pixel, int end) const {
    if (pixel >= end || filter >= args.conv.k) return 0.0f;
    size_t at = (size_t)pixel * args.conv.k + filter;
    float dz = to_float(args.dz[at]);
    return args.coef ? affine_grad(dz, to_float(args.grad_x[at]), coef[0], coef[1], coef[2]) : dz;
  }

  DEV_MEMBER float load_input(const Window& window) const {
    const Conv& d = args.conv;
    int y = window.top + tap_y, x = window.left + tap_x;
    if (column >= columns() || (u32)y >= (u32)d.h || (u32)x >= (u32)d.w) return 0.0f;
    float v = to_float(args.x[((size_t)window.image + y * d.w + x) * d.c + channel]);
    return args.norm ? norm_relu(v, scale, shift) : v;
  }

  DEV_MEMBER void load(int pixel, int end) {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      g_next[i] = load_grad(pixel + row + i * ROWS, end);
      a_next[i] = load_input(windows[row + i * ROWS]);
    }
  }

  DEV_MEMBER void store_loaded() {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      g[row + i * ROWS][threadIdx.x % TILE] = g_next[i];
      a[row + i * ROWS][threadIdx.x % TILE] = a_next[i];
    }
  }

  DEV_MEMBER void multiply() {
#pragma unroll
    for (int i = 0; i < STEP; i++) {
      float4 left = *(const float4*)&g[i][threadIdx.x / 16 * 4], right = *(const float4*)&a[i][threadIdx.x % 16 * 4];
      float l[4] = {left.x, left.y, left.z, left.w}, r[4] = {right.x, right.y, right.z, right.w};
#pragma unroll
      for (int j = 0; j < 16; j++) sums[j / 4][j % 4] = fmaf(l[j / 4], r[j % 4], sums[j / 4][j % 4]);
    }
  }

  // Pixels first .. end.
  DEV_MEMBER void run(int first, int end) {
    find_windows(first, end);
    __syncthreads();
    load(first, end);
    for (int pixel = first; pixel < end; pixel += STEP) {
      __syncthreads();  // the last step's products and windows are read
      store_loaded();
      find_windows(pixel + STEP, end);
      __syncthreads();
      if (pixel + STEP < end) load(pixel + STEP, end);
      multiply();
      if ((pixel - first) % SUMMED == SUMMED - STEP) take_in();
    }
    take_in();
  }

  DEV_MEMBER void store(int first_filter, int first_column, int split) const {
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int k = first_filter + (int)threadIdx.x / 16 * 4 + i, at = first_column + (int)threadIdx.x % 16 * 4 + j;
        if (k < args.conv.k && at < columns()) args.out[((size_t)split * args.conv.k + k) * columns() + at] = totals[i][j];
      }
  }
};

// A split's part of `count` things.
DEV int split_begin(int count, int split, int splits) { return (int)((u64)count * split / splits); }

// Blocks: columns' tiles x filters' tiles x splits.
template <class T>
DEV void plain_filter_gradient(const FilterGradientArgs<T>& args) {
  typedef PlainFilterGradient<T> Block;
  SHARED(typename Block::Window, windows, [Block::STEP]);
  SHARED(float, g, [Block::STEP][Block::TILE]);
  SHARED(float, a, [Block::STEP][Block::TILE]);
  Block block(args, windows, g, a);
  const Conv& d = args.conv;
  u32 column_tiles = ceil_div(block.columns(), Block::TILE), filter_tiles = ceil_div(d.k, Block::TILE);
  int first_column = (int)(blockIdx.x % column_tiles) * Block::TILE;
  int first_filter = (int)(blockIdx.x / column_tiles % filter_tiles) * Block::TILE;
  int split = (int)(blockIdx.x / (column_tiles * filter_tiles)), pixels = d.n * d.p * d.q;
  block.begin(first_filter, first_column);
  block.run(split_begin(pixels, split, args.splits), split_begin(pixels, split + 1, args.splits));
  block.store(first_filter, first_column, split);
}

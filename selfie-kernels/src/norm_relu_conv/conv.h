#pragma once
// What the kernels of convolutions share: their arguments, how operands are changed while they are loaded, and which
// pixels they read and write. All of them compute
//
//   D[m][n] = sum over taps t and channels c of load(A)[source(m, t)][c] * B[n][t][c]
//
// A is a map of pixels, a tap outside of it gives 0, and D goes through one of three epilogues.
#include "device.h"

enum class Load {
  Plain,
  NormRelu,  // relu(scale * a + shift)
  Affine,    // coef[0] * a + coef[1] * a2 + coef[2]
};
enum class Store {
  Forward,  // D (+ residual), and the statistics of what was stored
  Masked,   // D (+ addend) where scale * x + shift is positive, and sums for the normalisation's gradient
  Plain,
};

// Pixels of the result that are reached by the same taps: all of them, or those of one parity where the gradient of a
// strided convolution is formed. Row m of the product is pixel (image, i, j) of maps height x width.
struct Class {
  int rows, height, width;
  int taps_r, taps_s;
  // Tap (r, s) reads pixel (i * step + source_r + r * source_dr, ..) / divide, where that is whole and inside the map, ..
  int source_r, source_dr, source_s, source_ds;
  // .. with this row and column of the filter.
  int filter_r, filter_dr, filter_s, filter_ds;
  // It goes to pixel (i * out_step + out_r, ..).
  int out_r, out_s;
  int tile;  // The first one of the partial sums.
};

template <class T>
struct ConvArgs {
  const T *a, *a2;
  const float* coef;  // [2][kc]: scale, shift; or [3][kc]
  const T* b;
  const T* add;       // Residual or addend; may be null.
  const T* x;         // Masked: the input that decides, with the channels of the result, ..
  const float* norm;  // .. and its mean, rstd, scale, shift, [4][nc].
  T* out;
  float* sums;  // [tiles][2][nc]; may be null.
  // Elements from a filter's channel of the result, tap and channel of the sum to the next one.
  u64 b_n, b_tap, b_channel;
  int kc, nc;  // Channels of the sum and of the result.
  int source_height, source_width, step, divide;
  int out_height, out_width, out_step;
  int add_step;  // Only every so many pixels have an addend.
  int filter_width;
  int images;  // How many there are where rows lie place by place, else 0.
  Class cls[4];
};

static constexpr int SUM_ROWS = 128;  // Rows of a tile of partial sums.

DEV float normalize(float x, float scale, float shift) { return fmaf(scale, x, shift); }
DEV float affine(float dz, float x, float a, float b, float c) { return fmaf(a, dz, fmaf(b, x, c)); }
// NaN lets the gradient pass.
DEV bool passes(float z) { return !(z <= 0.0f); }

struct Pixel {
  int image, i, j;
};
DEV Pixel pixel_of(const Class& cls, int row) {
  int image = row / (cls.height * cls.width), rest = row - image * (cls.height * cls.width);
  int i = rest / cls.width;
  return {image, i, rest - i * cls.width};
}

// The same where rows lie place by place: of SUM_ROWS images first those at the first place of the map, then those at the
// next. A tile of them has the same taps inside of the map, but for tiles of the last images where those are fewer.
template <class T>
DEV Pixel ordered_pixel_of(const ConvArgs<T>& args, const Class& cls, int row) {
  if (args.images == 0) return pixel_of(cls, row);
  int first = row / (cls.height * cls.width) / SUM_ROWS * SUM_ROWS, images = min(SUM_ROWS, args.images - first);
  int rest = row - first * cls.height * cls.width, place = rest / images, i = place / cls.width;
  return {first + rest - place * images, i, place - i * cls.width};
}

// The pixel of the result.
template <class T>
DEV int out_pixel(const ConvArgs<T>& args, const Class& cls, Pixel p) {
  return (p.image * args.out_height + p.i * args.out_step + cls.out_r) * args.out_width + p.j * args.out_step + cls.out_s;
}
// The pixel of what is added, -1 where there is none.
template <class T>
DEV int add_pixel(const ConvArgs<T>& args, const Class& cls, Pixel p) {
  int y = p.i * args.out_step + cls.out_r, x = p.j * args.out_step + cls.out_s, step = args.add_step;
  if (y % step != 0 || x % step != 0) return -1;
  return (p.image * ceil_div(args.out_height, step) + y / step) * ceil_div(args.out_width, step) + x / step;
}
// What tap (r, s) reads, -1 outside the map.
template <class T>
DEV int source_pixel(const ConvArgs<T>& args, const Class& cls, Pixel p, int r, int s) {
  int y = p.i * args.step + cls.source_r + r * cls.source_dr, x = p.j * args.step + cls.source_s + s * cls.source_ds;
  if (args.divide > 1) {
    if (y % args.divide != 0 || x % args.divide != 0) return -1;
    y /= args.divide, x /= args.divide;
  }
  bool inside = y >= 0 && y < args.source_height && x >= 0 && x < args.source_width;
  return inside ? (p.image * args.source_height + y) * args.source_width + x : -1;
}
// The filter's tap of tap (r, s).
template <class T>
DEV int filter_tap(const ConvArgs<T>& args, const Class& cls, int r, int s) {
  return (cls.filter_r + r * cls.filter_dr) * args.filter_width + cls.filter_s + s * cls.filter_ds;
}

// A tile's statistics of one channel, from a first idea of its mean and the sums of deviations from it and of their
// squares. Only so the mean of values that lie far from zero and close together keeps its digits.
DEV void store_stats(float* mean_at, float* squares_at, float mean, float deviations, float squares, float rows) {
  float corrected = mean + deviations / rows;
  // sum (x - m - d)^2 = sum (x - m)^2 + d (rows d - 2 sum (x - m)), with d as the mean was moved when it was stored.
  float moved = corrected - mean;
  *mean_at = corrected;
  *squares_at = relu(squares + moved * fmaf(rows, moved, -2.0f * deviations));
}

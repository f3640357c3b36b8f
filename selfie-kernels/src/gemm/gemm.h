#pragma once
// What the kernels of linear layers share: their arguments, and what becomes of sums.
#include "chunks.h"

// Whether the summed index runs along an operand's rows as they lie in memory, or from row to row.
enum class Depth { Along, Across };

template <class T>
struct Operand {
  const T* at;
  u64 stride;  // elements from one row in memory to the next
};

// sums[i][j] over l in the block's part of the depth: left[i][l] * right[l][j].
template <class T>
struct Product {
  Operand<T> left, right;
  u32 rows, columns, depth;
  u32 part;  // of the depth, one block's; a multiple of the slice but for the whole depth
};

template <class T>
struct ForwardArgs {
  Product<T> product;
  const float* bias;
  T *y, *z;  // z may be null: no GELU
  Access access;
  u32 unused;
};

template <class T>
struct DataArgs {
  Product<T> product;
  const T *gelu, *addend;  // may be null
  T* dx;
  u64 dx_stride;
  u32 accumulate;
  Access access;
};

template <class T>
struct WeightArgs {
  Product<T> product;
  float* dw;  // [parts][rows][columns]
  Access access;
  u32 unused;
};

DEV float normal_distribution(float z) { return 0.5f * (1.0f + erff(z * 0.70710678118654752f)); }
DEV float gelu(float z) { return 0.5f * z * (1.0f + erff(z * 0.70710678118654752f)); }
DEV float gelu_derivative(float z) { return fmaf(z, expf(-0.5f * z * z) * 0.3989422804014327f, normal_distribution(z)); }

// ---- What becomes of sums.

// N neighbours of a row, the first `count` of which are there; and the part of the depth that they are sums of.
struct Place {
  u32 part, row, column, count;
};

template <int N, class T>
DEV void finish(const ForwardArgs<T>& args, Place at, float (&v)[N]) {
  float bias[N];
  load_some(args.bias + at.column, at.count, args.access, bias);
#pragma unroll
  for (int j = 0; j < N; j++) v[j] += bias[j];
  u64 dense = (u64)at.row * args.product.columns + at.column;
  if (args.z) {
    store_some(args.z + dense, at.count, args.access, v);
    // Of z as stored.
#pragma unroll
    for (int j = 0; j < N; j++) v[j] = gelu(as_stored<T>(v[j]));
  }
  store_some(args.y + dense, at.count, args.access, v);
}

template <int N, class T>
DEV void finish(const DataArgs<T>& args, Place at, float (&v)[N]) {
  u64 dense = (u64)at.row * args.product.columns + at.column;
  T* dx = args.dx + at.row * args.dx_stride + at.column;
  float other[N];
  if (args.gelu) {
    load_some(args.gelu + dense, at.count, args.access, other);
#pragma unroll
    for (int j = 0; j < N; j++) v[j] *= gelu_derivative(other[j]);
  }
  if (args.addend) {
    load_some(args.addend + dense, at.count, args.access, other);
#pragma unroll
    for (int j = 0; j < N; j++) v[j] += other[j];
  }
  if (args.accumulate) {
    load_some(dx, at.count, args.access, other);
#pragma unroll
    for (int j = 0; j < N; j++) v[j] += other[j];
  }
  store_some(dx, at.count, args.access, v);
}

// Brings to the L2 what will be read for so many columns of a warp's sixteen rows.
template <class T>
DEV void prefetch_rows(const DataArgs<T>& args, u32 row, u32 column, u32 columns) {
  constexpr u32 LINE = 128 / sizeof(T);
  const Product<T>& p = args.product;
  for (u32 i = lane(); i < 16 * columns / LINE; i += 32) {
    u32 r = row + i % 16, c = column + i / 16 * LINE;
    if (r >= p.rows || c >= p.columns) continue;
    u64 dense = (u64)r * p.columns + c;
    if (args.gelu) prefetch_l2(args.gelu + dense);
    if (args.addend) prefetch_l2(args.addend + dense);
    if (args.accumulate) prefetch_l2(args.dx + r * args.dx_stride + c);
  }
}
// Nothing is read for others, but the bias.
template <class Args>
DEV void prefetch_rows(const Args&, u32, u32, u32) {}

template <int N, class T>
DEV void finish(const WeightArgs<T>& args, Place at, float (&v)[N]) {
  const Product<T>& p = args.product;
  store_some(args.dw + ((u64)at.part * p.rows + at.row) * p.columns + at.column, at.count, args.access, v);
}

// y = layer_norm(x + dropout(branch)): a warp a row. Rows of at most 1024 features in whole chunks stay in registers; others
// are read again from where they lie, element by element.
#include "device.h"

#include "chunks.h"
#include "column_sums.h"

template <class T>
struct ForwardArgs {
  const T *x, *branch;
  const float* affine;  // [2][d]
  T *sum, *y;
  float* stats;  // [rows][2]
  Dropout dropout;
  u64 x_stride;
  u32 rows, t, d;
  float eps;
};

template <class T>
struct BackwardArgs {
  const T *dy, *sum;
  const float *stats, *affine;
  T *dx, *dbranch;
  Dropout dropout;
  u32 rows, t, d;
  u32 unused;
};

// The dropout's multipliers of features j .. + N of a row.
template <int N>
DEV void multipliers(const Dropout& dropout, u32 row, u32 t, u32 d, u32 j, float (&m)[N]) {
  u64 image = row / t;
  u32 element = row % t * d + j;
  if constexpr (N == 1) {
    m[0] = dropout_multiplier(dropout, image, element);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      float4 four = dropout_multipliers(dropout, image, element / 4 + i / 4);
      m[i] = four.x, m[i + 1] = four.y, m[i + 2] = four.z, m[i + 3] = four.w;
    }
  }
}

// sum = x + multiplier * branch of features j .. + N, stored; v is x, and becomes the sum as stored.
template <int N, class T>
DEV void residual(const ForwardArgs<T>& args, u32 row, u32 j, const float (&branch)[N], float (&v)[N]) {
  float m[N];
  multipliers(args.dropout, row, args.t, args.d, j, m);
#pragma unroll
  for (int i = 0; i < N; i++) v[i] = as_stored<T>(fmaf(m[i], branch[i], v[i]));
  store_chunk(args.sum + (u64)row * args.d + j, v);
}

template <int N, class T>
DEV void normalize(const ForwardArgs<T>& args, u32 row, u32 j, const float (&v)[N], float mean, float rstd) {
  float gamma[N], beta[N], y[N];
  load_chunk(args.affine + j, gamma);
  load_chunk(args.affine + args.d + j, beta);
#pragma unroll
  for (int i = 0; i < N; i++) y[i] = fmaf((v[i] - mean) * rstd, gamma[i], beta[i]);
  store_chunk(args.y + (u64)row * args.d + j, y);
}

DEV float reciprocal_deviation(float squares, u32 d, float eps) {
  return 1.0f / sqrtf(fmaf(warp_sum(squares), 1.0f / (float)d, eps));
}

template <class T>
DEV void store_stats(const ForwardArgs<T>& args, u32 row, float mean, float rstd) {
  if (lane() != 0) return;
  args.stats[2 * (u64)row] = mean;
  args.stats[2 * (u64)row + 1] = rstd;
}

static constexpr u32 ROWS = 4;          // of a block, one a warp
static constexpr int LANE_VALUES = 32;  // that a lane holds: 1024 features

template <class T>
DEV void forward_chunks(const ForwardArgs<T>& args) {
  constexpr int N = Vec16<T>::N, COUNT = LANE_VALUES / N;
  u32 row = blockIdx.x * ROWS + (u32)warp();
  if (row >= args.rows) return;
  const T *x = args.x + row * args.x_stride, *branch = args.branch + (u64)row * args.d;
  Vec16<T> xs[COUNT], branches[COUNT];
  float v[COUNT][N] = {}, sum = 0.0f, squares = 0.0f;
  // All on their way before the first sum is stored: behind a store a load waits, as they might be of one place.
#pragma unroll
  for (int c = 0; c < COUNT; c++) {
    u32 j = (u32)(c * 32 + lane()) * N;
    if (j >= args.d) continue;
    xs[c] = load_vec(x + j);
    branches[c] = load_vec(branch + j);
  }
#pragma unroll
  for (int c = 0; c < COUNT; c++) {
    u32 j = (u32)(c * 32 + lane()) * N;
    if (j >= args.d) continue;
    float of_branch[N];
    xs[c].unpack(v[c]);
    branches[c].unpack(of_branch);
    residual(args, row, j, of_branch, v[c]);
#pragma unroll
    for (int i = 0; i < N; i++) sum += v[c][i];
  }
  float mean = warp_sum(sum) * (1.0f / (float)args.d);
#pragma unroll
  for (int c = 0; c < COUNT; c++) {
    if ((u32)(c * 32 + lane()) * N >= args.d) continue;
#pragma unroll
    for (int i = 0; i < N; i++) squares = fmaf(v[c][i] - mean, v[c][i] - mean, squares);
  }
  float rstd = reciprocal_deviation(squares, args.d, args.eps);
  store_stats(args, row, mean, rstd);
#pragma unroll
  for (int c = 0; c < COUNT; c++) {
    u32 j = (u32)(c * 32 + lane()) * N;
    if (j < args.d) normalize(args, row, j, v[c], mean, rstd);
  }
}

// A lane reads again only what it wrote itself.
template <class T>
DEV void forward_elements(const ForwardArgs<T>& args) {
  u32 row = blockIdx.x * ROWS + (u32)warp();
  if (row >= args.rows) return;
  const T* stored = args.sum + (u64)row * args.d;
  float sum = 0.0f, squares = 0.0f, v[1], branch[1];
  for (u32 j = (u32)lane(); j < args.d; j += 32) {
    load_chunk(args.x + row * args.x_stride + j, v);
    load_chunk(args.branch + (u64)row * args.d + j, branch);
    residual(args, row, j, branch, v);
    sum += v[0];
  }
  float mean = warp_sum(sum) * (1.0f / (float)args.d);
  for (u32 j = (u32)lane(); j < args.d; j += 32) {
    float centred = to_float(stored[j]) - mean;
    squares = fmaf(centred, centred, squares);
  }
  float rstd = reciprocal_deviation(squares, args.d, args.eps);
  store_stats(args, row, mean, rstd);
  for (u32 j = (u32)lane(); j < args.d; j += 32) {
    v[0] = to_float(stored[j]);
    normalize(args, row, j, v, mean, rstd);
  }
}

KERNEL(residual_norm_forward_f32, ForwardArgs<float>, 128, 4) { forward_chunks(args); }
KERNEL(residual_norm_forward_bf16, ForwardArgs<bf16>, 128, 4) { forward_chunks(args); }
KERNEL(residual_norm_forward_elements_f32, ForwardArgs<float>, 128, 4) { forward_elements(args); }
KERNEL(residual_norm_forward_elements_bf16, ForwardArgs<bf16>, 128, 4) { forward_elements(args); }

// g = dy * gamma and xhat of features j .. + N.
template <int N, class T>
DEV void gradient_and_xhat(const BackwardArgs<T>& args, u32 row, u32 j, float (&g)[N], float (&xhat)[N]) {
  float gamma[N], mean = args.stats[2 * (u64)row], rstd = args.stats[2 * (u64)row + 1];
  u64 at = (u64)row * args.d + j;
  load_chunk(args.dy + at, g);
  load_chunk(args.sum + at, xhat);
  load_chunk(args.affine + j, gamma);
#pragma unroll
  for (int i = 0; i < N; i++) {
    g[i] *= gamma[i];
    xhat[i] = (xhat[i] - mean) * rstd;
  }
}

template <int N, class T>
DEV void store_gradients(const BackwardArgs<T>& args, u32 row, u32 j, const float (&g)[N], const float (&xhat)[N],
                         float mean_g, float mean_g_xhat) {
  float rstd = args.stats[2 * (u64)row + 1], dx[N], dbranch[N], m[N];
  u64 at = (u64)row * args.d + j;
  multipliers(args.dropout, row, args.t, args.d, j, m);
#pragma unroll
  for (int i = 0; i < N; i++) {
    dx[i] = rstd * (g[i] - mean_g - xhat[i] * mean_g_xhat);
    dbranch[i] = dx[i] * m[i];
  }
  store_chunk(args.dx + at, dx);
  store_chunk(args.dbranch + at, dbranch);
}

template <class T>
DEV void backward_chunks(const BackwardArgs<T>& args) {
  constexpr int N = Vec16<T>::N, COUNT = LANE_VALUES / N;
  u32 row = blockIdx.x * ROWS + (u32)warp();
  if (row >= args.rows) return;
  float g[COUNT][N], xhat[COUNT][N], sum = 0.0f, product = 0.0f;
#pragma unroll
  for (int c = 0; c < COUNT; c++) {
    u32 j = (u32)(c * 32 + lane()) * N;
    if (j >= args.d) continue;
    gradient_and_xhat(args, row, j, g[c], xhat[c]);
#pragma unroll
    for (int i = 0; i < N; i++) {
      sum += g[c][i];
      product = fmaf(g[c][i], xhat[c][i], product);
    }
  }
  float share = 1.0f / (float)args.d, mean_g = warp_sum(sum) * share, mean_g_xhat = warp_sum(product) * share;
#pragma unroll
  for (int c = 0; c < COUNT; c++) {
    u32 j = (u32)(c * 32 + lane()) * N;
    if (j < args.d) store_gradients(args, row, j, g[c], xhat[c], mean_g, mean_g_xhat);
  }
}

template <class T>
DEV void backward_elements(const BackwardArgs<T>& args) {
  u32 row = blockIdx.x * ROWS + (u32)warp();
  if (row >= args.rows) return;
  float g[1], xhat[1], sum = 0.0f, product = 0.0f;
  for (u32 j = (u32)lane(); j < args.d; j += 32) {
    gradient_and_xhat(args, row, j, g, xhat);
    sum += g[0];
    product = fmaf(g[0], xhat[0], product);
  }
  float share = 1.0f / (float)args.d, mean_g = warp_sum(sum) * share, mean_g_xhat = warp_sum(product) * share;
  for (u32 j = (u32)lane(); j < args.d; j += 32) {
    gradient_and_xhat(args, row, j, g, xhat);
    store_gradients(args, row, j, g, xhat, mean_g, mean_g_xhat);
  }
}

KERNEL(residual_norm_backward_f32, BackwardArgs<float>, 128, 4) { backward_chunks(args); }
KERNEL(residual_norm_backward_bf16, BackwardArgs<bf16>, 128, 4) { backward_chunks(args); }
KERNEL(residual_norm_backward_elements_f32, BackwardArgs<float>, 128, 4) { backward_elements(args); }
KERNEL(residual_norm_backward_elements_bf16, BackwardArgs<bf16>, 128, 4) { backward_elements(args); }

template <class T>
struct AffineArgs {
  const T *dy, *sum;
  const float* stats;
  float *parts, *daffine;  // [parts][2][d], [2][d]
  u32* tickets;            // one for each 32 features
  u32 rows, d, part_rows;
  u32 unused;
};

// Gradients of gamma and beta: reading dy and sum again is cheaper than keeping sums of all features beside a row.
template <class T>
DEV void affine_gradient(const AffineArgs<T>& args) {
  ColumnPart at = column_part(args.rows, args.d, args.part_rows);
  constexpr u32 AT_ONCE = 4;  // rows on their way
  float sums[2] = {};
  if (at.inside)
    for (u32 first = at.row + (u32)warp(); first < at.row_end; first += 8 * AT_ONCE) {
      T dy[AT_ONCE], sum[AT_ONCE];
      float2 stats[AT_ONCE];
#pragma unroll
      for (u32 i = 0; i < AT_ONCE; i++) {
        u64 row = min(first + 8 * i, at.row_end - 1);
        dy[i] = args.dy[row * args.d + at.column];
        sum[i] = args.sum[row * args.d + at.column];
        stats[i] = {args.stats[2 * row], args.stats[2 * row + 1]};
      }
#pragma unroll
      for (u32 i = 0; i < AT_ONCE; i++) {
        if (first + 8 * i >= at.row_end) continue;
        float mean = stats[i].x, rstd = stats[i].y;
        sums[0] = fmaf(to_float(dy[i]), (to_float(sum[i]) - mean) * rstd, sums[0]);
        sums[1] += to_float(dy[i]);
      }
    }
  add_parts(at, sums, args.parts, args.daffine, args.d, args.tickets);
}
KERNEL(residual_norm_affine_f32, AffineArgs<float>, 256, 4) { affine_gradient(args); }
KERNEL(residual_norm_affine_bf16, AffineArgs<bf16>, 256, 4) { affine_gradient(args); }

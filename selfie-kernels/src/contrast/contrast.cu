// The contrastive loss. A block an image makes the logits, the loss and the gradients of u and h; the last block adds up the
// loss. A second kernel sums the positions' gradient: blocks of eight warps over 32 features of one row of them.
// All in f32: the products are small, and the loss is in f64 from the rows on, as on the CPU.
#include "device.h"

#include "../tokens/patches.h"
#include "column_sums.h"

template <class T>
struct Args {
  Patches patches;
  const T *u, *h;
  const float* positions;
  float* loss;  // [2]
  T *du, *dh;   // null: no gradients
  float* dpositions;
  float* errors;    // [images][hidden + 1][hidden]: gradients of v . h; behind them their sums over the rows
  double* tallies;  // [b][2]: loss and right answers of an image
  u32* tickets;
  u64 u_stride;
  float logit_scale;
  float dlogit;  // of the mean loss with respect to v . h, per unit of probability
  u32 valid;     // images that count
  u32 image;     // the first one of this launch
  u32 images;    // of this launch
  u32 unused;
};

static constexpr u32 WARPS = 8, THREADS = 32 * WARPS;
static constexpr int KEYS = 4;  // that a query is multiplied with at once

DEV u64 errors_of_image(const Patches& p) { return (u64)(p.hidden + 1) * p.hidden; }
template <class T>
DEV float* errors_of(const Args<T>& args, u32 image) {
  return args.errors + (image - args.image) * errors_of_image(args.patches);
}
template <class A>
DEV u32 place_of(const A& args, u32 image, u32 l) {
  return args.patches.order[(u64)image * patches_of(args.patches) + l];
}

// Features j .. + N of a hidden patch, and of what asks for it.
template <int N, class A>
DEV void key(const A& args, u32 image, u32 l, u32 j, float (&v)[N]) {
  const Patches& p = args.patches;
  load_chunk(args.h + ((u64)image * patches_of(p) + place_of(args, image, l)) * p.d + j, v);
}
template <int N, class A>
DEV void query(const A& args, u32 image, u32 l, u32 j, float (&v)[N]) {
  const Patches& p = args.patches;
  u32 asking = p.queries == Queries::Summary ? 0 : l;
  float u[N];
  position(p, args.positions, place_of(args, image, l), j, v);
  load_chunk(args.u + image * args.u_stride + (u64)asking * p.d + j, u);
#pragma unroll
  for (int i = 0; i < N; i++) v[i] += u[i];
}

// A row of logits, by a warp.
template <int N, class T>
DEV void logits(const Args<T>& args, u32 image, u32 l, float* row) {
  const Patches& p = args.patches;
  for (u32 first = 0; first < p.hidden; first += KEYS) {
    float dots[KEYS] = {};
    for (u32 j = (u32)lane() * N; j < p.d; j += 32 * N) {
      float v[N], k[N];
      query(args, image, l, j, v);
#pragma unroll
      for (u32 i = 0; i < KEYS; i++) {
        if (first + i >= p.hidden) continue;
        key(args, image, first + i, j, k);
#pragma unroll
        for (int f = 0; f < N; f++) dots[i] = fmaf(v[f], k[f], dots[i]);
      }
    }
#pragma unroll
    for (u32 i = 0; i < KEYS; i++) {
      float dot = warp_sum(dots[i]);
      if (lane() == 0 && first + i < p.hidden) row[first + i] = dot * args.logit_scale;
    }
  }
  __syncwarp();
}

struct Tally {
  double loss;
  u32 right;
};

// Counts a row of logits, which become gradients of the products; by a warp, and every lane gets the same.
DEV Tally count(float* row, u32 hidden, u32 target, float dlogit) {
  float own = row[target], most = bits_to_float(0xff800000u), sum = 0.0f;
  bool wrong = false;
  for (u32 j = (u32)lane(); j < hidden; j += 32) {
    most = max_nan(most, row[j]);
    // The first of equal maxima is the answer; a NaN is a wrong one.
    wrong |= j < target ? !(row[j] < own) : !(row[j] <= own);
  }
  most = warp_max(most);
  for (u32 j = (u32)lane(); j < hidden; j += 32) sum += expf(row[j] - most);
  sum = warp_sum(sum);
  bool right = __ballot_sync(WARP, wrong) == 0;
  float normalizer = 1.0f / sum;
  __syncwarp();  // all have read their own logit
  for (u32 j = (u32)lane(); j < hidden; j += 32) {
    float error = expf(row[j] - most) * normalizer - (j == target ? 1.0f : 0.0f);
    row[j] = error * dlogit;
  }
  return {(double)((most - own) + logf(sum)), right ? 1u : 0u};
}

// Sums of the errors over the rows, which the gradient of a summary is made of.
DEV void sum_errors(float* errors, u32 hidden) {
  for (u32 j = threadIdx.x; j < hidden; j += THREADS) {
    float sum = 0.0f;
    for (u32 l = 0; l < hidden; l++) sum += errors[(u64)l * hidden + j];
    errors[(u64)hidden * hidden + j] = sum;
  }
}

// Gradient of the hidden patches' features: of KEYS patches and N features a thread.
template <int N, class T>
DEV void key_gradients(const Args<T>& args, u32 image, const float* errors) {
  const Patches& p = args.patches;
  u32 chunks = p.d / N, groups = ceil_div(p.hidden, (u32)KEYS);
  for (u32 item = threadIdx.x; item < chunks * groups; item += THREADS) {
    u32 first = item / chunks * KEYS, j = item % chunks * N;
    float sums[KEYS][N] = {};
    for (u32 l = 0; l < p.hidden; l++) {
      float v[N];
      query(args, image, l, j, v);
#pragma unroll
      for (u32 i = 0; i < KEYS; i++) {
        if (first + i >= p.hidden) continue;
        float error = errors[(u64)l * p.hidden + first + i];
#pragma unroll
        for (int f = 0; f < N; f++) sums[i][f] = fmaf(error, v[f], sums[i][f]);
      }
    }
#pragma unroll
    for (u32 i = 0; i < KEYS; i++) {
      if (first + i >= p.hidden) continue;
      store_chunk(args.dh + ((u64)image * patches_of(p) + place_of(args, image, first + i)) * p.d + j, sums[i]);
    }
  }
}

// Zero where no u lies, from the end of an image's to the next image's.
template <class T>
DEV void zero_between(T* du, u64 end, u64 stride) {
  for (u64 j = end + threadIdx.x; j < stride; j += THREADS) du[j] = from_float<T>(0.0f);
}

// Gradient of what asks, and zero where no u lies.
template <int N, class T>
DEV void query_gradients(const Args<T>& args, u32 image, const float* errors) {
  const Patches& p = args.patches;
  u32 chunks = p.d / N, q = queries_of(p);
  T* du = args.du + image * args.u_stride;
  const float* rows = p.queries == Queries::Summary ? errors + (u64)p.hidden * p.hidden : errors;
  for (u32 item = threadIdx.x; item < chunks * q; item += THREADS) {
    u32 i = item / chunks, j = item % chunks * N;
    float sum[N] = {}, k[N];
    for (u32 l = 0; l < p.hidden; l++) {
      float error = rows[(u64)i * p.hidden + l];
      key(args, image, l, j, k);
#pragma unroll
      for (int f = 0; f < N; f++) sum[f] = fmaf(error, k[f], sum[f]);
    }
    store_chunk(du + (u64)i * p.d + j, sum);
  }
  zero_between(du, (u64)q * p.d, args.u_stride);
}

// The tallies of all images, in an order of their own.
template <class T>
DEV void mean_loss(const Args<T>& args) {
  double loss = 0.0, right = 0.0;
  for (u32 image = threadIdx.x; image < args.valid; image += THREADS) {
    loss += args.tallies[2 * (u64)image];
    right += args.tallies[2 * (u64)image + 1];
  }
  loss = block_sum<THREADS>(loss);
  right = block_sum<THREADS>(right);
  if (threadIdx.x != 0) return;
  double rows = (double)args.valid * (double)args.patches.hidden;
  args.loss[0] = (float)(loss / rows);
  args.loss[1] = (float)(right / rows);
}

template <int N, class T>
DEV void contrast(const Args<T>& args) {
  SHARED(double, losses, [WARPS]);
  SHARED(double, rights, [WARPS]);
  const Patches& p = args.patches;
  u32 image = args.image + blockIdx.x;
  float* errors = errors_of(args, image);
  double loss = 0.0, right = 0.0;
  for (u32 l = (u32)warp(); l < p.hidden; l += WARPS) {
    float* row = errors + (u64)l * p.hidden;
    logits<N>(args, image, l, row);
    Tally tally = count(row, p.hidden, l, args.dlogit);
    loss += tally.loss;
    right += (double)tally.right;
  }
  if (lane() == 0) {
    losses[warp()] = loss;
    rights[warp()] = right;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (u32 w = 1; w < WARPS; w++) {
      loss += losses[w];
      right += rights[w];
    }
    args.tallies[2 * (u64)image] = loss;
    args.tallies[2 * (u64)image + 1] = right;
  }
  if (args.du) {
    if (p.queries == Queries::Summary) {
      sum_errors(errors, p.hidden);
      __syncthreads();
    }
    key_gradients<N>(args, image, errors);
    query_gradients<N>(args, image, errors);
  }
  if (args.image + args.images == args.valid && last_block(args.tickets, args.images)) mean_loss(args);
}

KERNEL(contrast_f32, Args<float>, 256, 2) { contrast<4>(args); }
KERNEL(contrast_bf16, Args<bf16>, 256, 2) { contrast<8>(args); }
KERNEL(contrast_elements_f32, Args<float>, 256, 2) { contrast<1>(args); }
KERNEL(contrast_elements_bf16, Args<bf16>, 256, 2) { contrast<1>(args); }

static constexpr u32 NONE = 0xffffffffu;

// Adds to a feature's sum the errors of row `asking` of an image times the hidden patches; by a warp. Its lanes read a patch's
// place and error each, and tell the others: so no patch's address waits for a read of its own.
template <class T>
DEV void add_row(const Args<T>& args, u32 image, u32 asking, u32 feature, float& sum) {
  constexpr u32 AT_ONCE = 8;  // patches on their way
  const Patches& p = args.patches;
  const float* errors = errors_of(args, image) + (u64)asking * p.hidden;
  const T* patches = args.h + (u64)image * patches_of(p) * p.d + feature;
  for (u32 first = 0; first < p.hidden; first += 32) {
    u32 own = min(first + (u32)lane(), p.hidden - 1), place = place_of(args, image, own);
    u32 count = min(32u, p.hidden - first);
    float error = errors[own];
    for (u32 l = 0; l < count; l += AT_ONCE) {
      T keys[AT_ONCE];
#pragma unroll
      for (u32 i = 0; i < AT_ONCE; i++) keys[i] = patches[(u64)__shfl_sync(WARP, place, (int)(l + i)) * p.d];
#pragma unroll
      for (u32 i = 0; i < AT_ONCE; i++) {
        float of_patch = __shfl_sync(WARP, error, (int)(l + i));
        if (l + i < count) sum = fmaf(of_patch, to_float(keys[i]), sum);
      }
    }
  }
}

// The gradient of a row of the positions: of each (image, use) pair whose place is hidden, all errors of its row.
template <class T>
DEV void positions(const Args<T>& args) {
  SHARED(u32, asking, [THREADS]);
  SHARED(u32, images, [THREADS]);
  const Patches& p = args.patches;
  u32 blocks = ceil_div(p.d, 32u), row = blockIdx.x / blocks, j = blockIdx.x % blocks * 32 + (u32)lane();
  u32 uses = uses_of_row(p), column = min(j, p.d - 1);
  u64 pairs = (u64)args.images * uses;
  float sum[1] = {};
  for (u64 first = 0; first < pairs; first += THREADS) {
    u64 pair = first + threadIdx.x;
    u32 image = args.image + (u32)(pair / uses), l = p.hidden;
    if (pair < pairs) l = slot_of(p, image, place_of_use(p, row, (u32)(pair % uses)), p.hidden);
    asking[threadIdx.x] = l < p.hidden ? l : NONE;
    images[threadIdx.x] = image;
    __syncthreads();
    for (u32 i = (u32)warp(); i < THREADS; i += WARPS) {
      if (asking[i] != NONE) add_row(args, images[i], asking[i], column, sum[0]);
    }
    __syncthreads();
  }
  add_warps(sum);
  if (warp() != 0 || j >= p.d) return;
  float* to = args.dpositions + (u64)row * p.d + j;
  *to = args.image == 0 ? sum[0] : *to + sum[0];
}
KERNEL(contrast_positions_f32, Args<float>, 256, 4) { positions(args); }
KERNEL(contrast_positions_bf16, Args<bf16>, 256, 4) { positions(args); }

// ---- Negatives from the whole batch: unit vectors for a product of matrices, and the way back. A row is a hidden place.

template <class T>
struct UnitsArgs {
  Patches patches;
  const T *u, *h;
  const float* positions;
  T *queries, *keys;  // [rows][d]
  float* norms;       // [rows][2]: one over what they were long
  u64 u_stride;
  float length;  // of the queries
  u32 unused;
};

// One over the length of a warp's vector; zeros have no direction.
DEV float inverse_length(float squares) {
  squares = warp_sum(squares);
  return squares == 0.0f ? 0.0f : 1.0f / sqrtf(squares);
}

template <int N, class T>
DEV void units(const UnitsArgs<T>& args) {
  const Patches& p = args.patches;
  u64 row = (u64)blockIdx.x * WARPS + warp();
  if (row >= (u64)p.b * p.hidden) return;
  u32 image = (u32)(row / p.hidden), l = (u32)(row % p.hidden);
  float v[N], k[N], squares_v = 0.0f, squares_k = 0.0f;
  for (u32 j = (u32)lane() * N; j < p.d; j += 32 * N) {
    query(args, image, l, j, v);
    key(args, image, l, j, k);
#pragma unroll
    for (int i = 0; i < N; i++) {
      squares_v = fmaf(v[i], v[i], squares_v);
      squares_k = fmaf(k[i], k[i], squares_k);
    }
  }
  float of_v = inverse_length(squares_v), of_k = inverse_length(squares_k);
  if (lane() == 0) {
    args.norms[2 * row] = of_v;
    args.norms[2 * row + 1] = of_k;
  }
  for (u32 j = (u32)lane() * N; j < p.d; j += 32 * N) {
    query(args, image, l, j, v);
    key(args, image, l, j, k);
#pragma unroll
    for (int i = 0; i < N; i++) {
      v[i] *= of_v * args.length;
      k[i] *= of_k;
    }
    store_chunk(args.queries + row * p.d + j, v);
    store_chunk(args.keys + row * p.d + j, k);
  }
}

KERNEL(contrast_units_f32, UnitsArgs<float>, 256, 4) { units<4>(args); }
KERNEL(contrast_units_bf16, UnitsArgs<bf16>, 256, 4) { units<8>(args); }
KERNEL(contrast_units_elements_f32, UnitsArgs<float>, 256, 4) { units<1>(args); }
KERNEL(contrast_units_elements_bf16, UnitsArgs<bf16>, 256, 4) { units<1>(args); }

template <class T>
struct UnitsBackwardArgs {
  Patches patches;
  const T *queries, *keys, *dqueries;  // [rows][d]
  const float *dkeys, *norms;          // [rows][d], [rows][2]
  float* along;                        // [rows]: what of a query goes back along it
  T *du, *dh;
  float* dpositions;
  u64 u_stride;
  float length;   // of the queries
  float squared;  // one over its square
};

// The gradient of v is scale * dq - along * q.
template <class T>
DEV float scale_of(const UnitsBackwardArgs<T>& args, u64 row) {
  return args.norms[2 * row] * args.length;
}

// A row's `along`, and the gradient of its patch; by a warp.
template <int N, class T>
DEV void row_backward(const UnitsBackwardArgs<T>& args, u32 image, u32 l) {
  const Patches& p = args.patches;
  u64 row = (u64)image * p.hidden + l, first = row * p.d;
  float unit[N], gradient[N], dot_q = 0.0f, dot_k = 0.0f;
  for (u32 j = (u32)lane() * N; j < p.d; j += 32 * N) {
    load_chunk(args.queries + first + j, unit);
    load_chunk(args.dqueries + first + j, gradient);
#pragma unroll
    for (int i = 0; i < N; i++) dot_q = fmaf(gradient[i], unit[i], dot_q);
    load_chunk(args.keys + first + j, unit);
    load_chunk(args.dkeys + first + j, gradient);
#pragma unroll
    for (int i = 0; i < N; i++) dot_k = fmaf(gradient[i], unit[i], dot_k);
  }
  dot_q = warp_sum(dot_q);
  dot_k = warp_sum(dot_k);
  if (lane() == 0) args.along[row] = dot_q * args.squared * scale_of(args, row);
  T* dh = args.dh + ((u64)image * patches_of(p) + place_of(args, image, l)) * p.d;
  float norm = args.norms[2 * row + 1];
  for (u32 j = (u32)lane() * N; j < p.d; j += 32 * N) {
    load_chunk(args.keys + first + j, unit);
    load_chunk(args.dkeys + first + j, gradient);
#pragma unroll
    for (int i = 0; i < N; i++) gradient[i] = fmaf(-dot_k, unit[i], gradient[i]) * norm;
    store_chunk(dh + j, gradient);
  }
}

// A block an image.
template <int N, class T>
DEV void units_backward(const UnitsBackwardArgs<T>& args) {
  const Patches& p = args.patches;
  u32 image = blockIdx.x, chunks = p.d / N, q = queries_of(p);
  for (u32 l = (u32)warp(); l < p.hidden; l += WARPS) row_backward<N>(args, image, l);
  __syncthreads();
  T* du = args.du + image * args.u_stride;
  for (u32 item = threadIdx.x; item < chunks * q; item += THREADS) {
    u32 asking = item / chunks, j = item % chunks * N;
    bool summary = p.queries == Queries::Summary;
    float sum[N] = {}, unit[N], gradient[N];
    for (u32 l = summary ? 0 : asking; l < (summary ? p.hidden : asking + 1); l++) {
      u64 row = (u64)image * p.hidden + l;
      float scale = scale_of(args, row), along = args.along[row];
      load_chunk(args.queries + row * p.d + j, unit);
      load_chunk(args.dqueries + row * p.d + j, gradient);
#pragma unroll
      for (int i = 0; i < N; i++) sum[i] = fmaf(-along, unit[i], fmaf(scale, gradient[i], sum[i]));
    }
    store_chunk(du + (u64)asking * p.d + j, sum);
  }
  zero_between(du, (u64)q * p.d, args.u_stride);
}

KERNEL(contrast_units_backward_f32, UnitsBackwardArgs<float>, 256, 4) { units_backward<4>(args); }
KERNEL(contrast_units_backward_bf16, UnitsBackwardArgs<bf16>, 256, 4) { units_backward<8>(args); }
KERNEL(contrast_units_backward_elements_f32, UnitsBackwardArgs<float>, 256, 4) { units_backward<1>(args); }
KERNEL(contrast_units_backward_elements_bf16, UnitsBackwardArgs<bf16>, 256, 4) { units_backward<1>(args); }

// The gradient of a row of the positions: of each (image, use) pair whose place is hidden, the gradient of what asked.
template <class T>
DEV void units_positions(const UnitsBackwardArgs<T>& args) {
  SHARED(u32, asking, [THREADS]);
  const Patches& p = args.patches;
  u32 blocks = ceil_div(p.d, 32u), row = blockIdx.x / blocks, j = blockIdx.x % blocks * 32 + (u32)lane();
  u32 uses = uses_of_row(p);
  u64 pairs = (u64)p.b * uses;
  float sum[1] = {};
  for (u64 first = 0; first < pairs; first += THREADS) {
    u64 pair = first + threadIdx.x;
    u32 image = (u32)(pair / uses), l = p.hidden;
    if (pair < pairs) l = slot_of(p, image, place_of_use(p, row, (u32)(pair % uses)), p.hidden);
    asking[threadIdx.x] = l < p.hidden ? image * p.hidden + l : NONE;
    __syncthreads();
    for (u32 i = (u32)warp(); i < THREADS; i += WARPS) {
      u64 from = asking[i];
      if (from == NONE || j >= p.d) continue;
      sum[0] = fmaf(scale_of(args, from), to_float(args.dqueries[from * p.d + j]), sum[0]);
      sum[0] = fmaf(-args.along[from], to_float(args.queries[from * p.d + j]), sum[0]);
    }
    __syncthreads();
  }
  add_warps(sum);
  if (warp() == 0 && j < p.d) args.dpositions[(u64)row * p.d + j] = sum[0];
}
KERNEL(contrast_units_positions_f32, UnitsBackwardArgs<float>, 256, 4) { units_positions(args); }
KERNEL(contrast_units_positions_bf16, UnitsBackwardArgs<bf16>, 256, 4) { units_positions(args); }

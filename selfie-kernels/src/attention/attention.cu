// Attention. bf16 over at most 64 tokens with heads of 16, 32 or 64 goes through the tensor cores: everything of a head lies
// in shared memory, a warp has 16 queries with their scores, softmax and dropout in registers; the backward pass then gives
// each warp 16 keys. Other shapes, and f32: a warp a query, then a warp a key.
#include "device.h"

#include "chunks.h"

template <class T>
struct Args {
  const T *q, *kv, *dout;
  T *out, *dq, *dkv;
  float* weights;  // scratch of the plain backward pass: [2][units][t_query][t], dropped weights and gradients of scores
  Dropout dropout;
  u32 b, t_query, t, heads, d;
  float scale;
  u32 unit, units;  // (image, head) pairs of this launch, heads fastest
};

template <class T>
DEV u64 query_row(const Args<T>& args) {
  return (u64)args.heads * args.d;
}
// First elements of what belongs to a head; its values come heads * d behind its keys.
template <class T>
DEV u64 first_query(const Args<T>& args, u32 image, u32 head) {
  return image * args.t_query * query_row(args) + (u64)head * args.d;
}
template <class T>
DEV u64 first_key(const Args<T>& args, u32 image, u32 head) {
  return image * args.t * 2 * query_row(args) + (u64)head * args.d;
}

// ---- Any shape.

static constexpr u32 WARPS = 4, MAX_TOKENS = 1024;

// What a warp of the plain kernels works at: one query, or one key, of one head.
struct Item {
  u32 unit, index, image, head;
  bool inside;
};
template <class T>
DEV Item my_item(const Args<T>& args, u32 of_unit) {
  u64 i = (u64)blockIdx.x * WARPS + (u32)warp();
  u32 local = (u32)(i / of_unit), unit = args.unit + local;
  return {local, (u32)(i % of_unit), unit / args.heads, unit % args.heads, local < args.units};
}

// left . right of d elements.
template <class T>
DEV float dot(const T* left, const T* right, u32 d) {
  float sum = 0.0f;
  for (u32 c = 0; c < d; c++) sum = fmaf(to_float(left[c]), to_float(right[c]), sum);
  return sum;
}

// Softmax of a query's scores; a lane has every 32nd key.
template <class T>
DEV void attend(const Args<T>& args, const T* q, const T* keys, float* weights) {
  u64 row = 2 * query_row(args);
  float most = bits_to_float(0xff800000u), sum = 0.0f;
  for (u32 j = (u32)lane(); j < args.t; j += 32) {
    weights[j] = dot(q, keys + j * row, args.d) * args.scale;
    most = max_nan(most, weights[j]);
  }
  most = warp_max(most);
  for (u32 j = (u32)lane(); j < args.t; j += 32) {
    weights[j] = expf(weights[j] - most);
    sum += weights[j];
  }
  float normalizer = 1.0f / warp_sum(sum);
  for (u32 j = (u32)lane(); j < args.t; j += 32) weights[j] *= normalizer;
}

// out = sum over the keys of weights * rows, features c = lane, + 32, ..
template <class T>
DEV void weigh(const Args<T>& args, const float* weights, const T* rows, T* out) {
  u64 row = 2 * query_row(args);
  for (u32 c = (u32)lane(); c < args.d; c += 32) {
    float sum = 0.0f;
#pragma unroll 4
    for (u32 j = 0; j < args.t; j++) sum = fmaf(weights[j], to_float(rows[j * row + c]), sum);
    out[c] = from_float<T>(sum);
  }
}

template <class T>
DEV float multiplier(const Args<T>& args, const Item& at, u32 j) {
  return dropout_multiplier(args.dropout, at.image, (at.head * args.t_query + at.index) * args.t + j);
}

template <class T>
DEV void forward(const Args<T>& args) {
  SHARED(float, all_weights, [WARPS][MAX_TOKENS]);
  Item at = my_item(args, args.t_query);
  if (!at.inside) return;
  float* weights = all_weights[warp()];
  u64 query = first_query(args, at.image, at.head) + at.index * query_row(args);
  const T* keys = args.kv + first_key(args, at.image, at.head);
  attend(args, args.q + query, keys, weights);
  for (u32 j = (u32)lane(); j < args.t; j += 32) weights[j] *= multiplier(args, at, j);
  __syncwarp();
  weigh(args, weights, keys + query_row(args), args.out + query);
}

// The gradient of a query; dropped weights and gradients of scores are left for the keys.
template <class T>
DEV void backward_query(const Args<T>& args) {
  SHARED(float, all_weights, [WARPS][MAX_TOKENS]);
  SHARED(float, all_dscores, [WARPS][MAX_TOKENS]);
  Item at = my_item(args, args.t_query);
  if (!at.inside) return;
  float *weights = all_weights[warp()], *dscores = all_dscores[warp()];
  u64 query = first_query(args, at.image, at.head) + at.index * query_row(args), row = 2 * query_row(args);
  const T *keys = args.kv + first_key(args, at.image, at.head), *values = keys + query_row(args);
  attend(args, args.q + query, keys, weights);
  float* dropped_out = args.weights + ((u64)at.unit * args.t_query + at.index) * args.t;
  float* dscores_out = dropped_out + (u64)args.units * args.t_query * args.t;
  float mean = 0.0f;
  for (u32 j = (u32)lane(); j < args.t; j += 32) {
    float dropped = weights[j] * multiplier(args, at, j);
    dscores[j] = dot(args.dout + query, values + j * row, args.d);
    dropped_out[j] = dropped;
    mean = fmaf(dropped, dscores[j], mean);
  }
  mean = warp_sum(mean);
  for (u32 j = (u32)lane(); j < args.t; j += 32) {
    dscores[j] = weights[j] * (dscores[j] * multiplier(args, at, j) - mean) * args.scale;
    dscores_out[j] = dscores[j];
  }
  __syncwarp();
  weigh(args, dscores, keys, args.dq + query);
}

// The gradients of a key and its value.
template <class T>
DEV void backward_key(const Args<T>& args) {
  Item at = my_item(args, args.t);
  if (!at.inside) return;
  u64 query = first_query(args, at.image, at.head), row = query_row(args);
  u64 key = first_key(args, at.image, at.head) + at.index * 2 * row;
  const float* dropped = args.weights + (u64)at.unit * args.t_query * args.t + at.index;
  const float* dscores = dropped + (u64)args.units * args.t_query * args.t;
  for (u32 c = (u32)lane(); c < args.d; c += 32) {
    float dk = 0.0f, dv = 0.0f;
#pragma unroll 4
    for (u32 i = 0; i < args.t_query; i++) {
      dk = fmaf(dscores[(u64)i * args.t], to_float(args.q[query + i * row + c]), dk);
      dv = fmaf(dropped[(u64)i * args.t], to_float(args.dout[query + i * row + c]), dv);
    }
    args.dkv[key + c] = from_float<T>(dk);
    args.dkv[key + row + c] = from_float<T>(dv);
  }
}

KERNEL(attention_forward_f32, Args<float>, 128, 4) { forward(args); }
KERNEL(attention_forward_bf16, Args<bf16>, 128, 4) { forward(args); }
KERNEL(attention_backward_query_f32, Args<float>, 128, 4) { backward_query(args); }
KERNEL(attention_backward_query_bf16, Args<bf16>, 128, 4) { backward_query(args); }
KERNEL(attention_backward_key_f32, Args<float>, 128, 4) { backward_key(args); }
KERNEL(attention_backward_key_bf16, Args<bf16>, 128, 4) { backward_key(args); }

// ---- Tensor cores. T: tiles of 16 queries and of 16 keys, and warps of a head; D: size of a head.

template <u32 T, u32 D>
struct Shape {
  static constexpr u32 HEADS = T == 1 ? 4 : T == 4 ? 1 : 2;  // of a block: neighbours, so that rows are read in longer runs
  static constexpr u32 ROW = D * 2 + 16;                     // bytes; eight rows lie in different banks
  static constexpr u32 TILE = 16 * ROW;
  static constexpr u32 WEIGHT_ROW = T * 32 + 16;             // of weights, [query][key]
  static constexpr u32 BITS = (T * T * 64 + 2 + 15) / 16 * 16;  // a byte for four elements of the dropout
  static constexpr u32 FORWARD = 3 * T * TILE + BITS;
  static constexpr u32 BACKWARD = 4 * T * TILE + 2 * T * 16 * WEIGHT_ROW + BITS;
};

// What a warp works at, and where its head's part of shared memory begins.
struct Head {
  u32 image, head, tile, thread;  // tile: which 16 queries or keys; thread: of the head
  bool live;
  char* shared;
};
template <u32 T, u32 D, u32 BYTES>
DEV Head my_head(const Args<bf16>& args, char* shared) {
  u32 mine = threadIdx.x / (T * 32), unit = blockIdx.x * Shape<T, D>::HEADS + mine;
  bool live = unit < args.b * args.heads;
  if (!live) unit = 0;  // takes part in the barriers, and stores nothing
  u32 thread = threadIdx.x % (T * 32);
  return {unit / args.heads, unit % args.heads, thread / 32, thread, live, shared + mine * BYTES};
}

// T * 16 rows of D to shared memory by the head's threads; rows from `count` on are zero.
template <u32 T, u32 D>
DEV void rows_in(char* to, const bf16* from, u64 stride, u32 count, u32 thread) {
#pragma unroll
  for (u32 i = 0; i < 2 * T * D; i += T * 32) {
    u32 row = (i + thread) / (D / 8), chunk = (i + thread) % (D / 8);
    bool inside = row < count;
    cp_async16_or_zero(to + row * Shape<T, D>::ROW + chunk * 16, inside ? from + row * stride + chunk * 8 : from,
                       inside ? Fill::Copy : Fill::Zero);
  }
}
// At most 16 rows of D, by a warp.
template <u32 T, u32 D>
DEV void rows_out(bf16* to, const char* from, u64 stride, u32 count) {
#pragma unroll
  for (u32 i = 0; i < 2 * D; i += 32) {
    u32 row = (i + (u32)lane()) / (D / 8), chunk = (i + (u32)lane()) % (D / 8);
    if (row < count) store16(to + row * stride + chunk * 8, load16(from + row * Shape<T, D>::ROW + chunk * 16));
  }
}
// Sums of 16 x D to rows of shared memory.
template <u32 T, u32 D>
DEV void tile_out(char* to, const float (&sums)[D / 8][4]) {
  u32 l = (u32)lane();
#pragma unroll
  for (u32 j = 0; j < D / 8; j++)
#pragma unroll
    for (u32 half = 0; half < 2; half++)
      *(u32*)(to + (half * 8 + l / 4) * Shape<T, D>::ROW + (j * 8 + l % 4 * 2) * 2) =
          pack_bf16x2(sums[j][2 * half], sums[j][2 * half + 1]);
}
// Fragments of 16 rows of D as a left operand.
template <u32 T, u32 D>
DEV void left_rows(u32 (&f)[D / 16][4], const char* rows) {
#pragma unroll
  for (u32 k = 0; k < D / 16; k++)
    ldmatrix_x4(f[k], rows + (u32)lane() % 16 * Shape<T, D>::ROW + (k * 16 + (u32)lane() / 16 * 8) * 2);
}
// scores = left (16 x D) rows^T, over T * 16 rows.
template <u32 T, u32 D>
DEV void times_rows(float (&scores)[2 * T][4], const u32 (&left)[D / 16][4], const char* rows) {
  u32 l = (u32)lane();
#pragma unroll
  for (u32 j = 0; j < T; j++) {
#pragma unroll
    for (u32 e = 0; e < 4; e++) scores[2 * j][e] = scores[2 * j + 1][e] = 0.0f;
#pragma unroll
    for (u32 k = 0; k < D / 16; k++) {
      u32 f[4];
      ldmatrix_x4(f, rows + (j * 16 + l / 16 * 8 + l % 8) * Shape<T, D>::ROW + (k * 16 + l / 8 % 2 * 8) * 2);
      u32 first[2] = {f[0], f[1]}, second[2] = {f[2], f[3]};
      mma_m16n8k16(scores[2 * j], left[k], first);
      mma_m16n8k16(scores[2 * j + 1], left[k], second);
    }
  }
}
// sums += left (16 x 16) times 16 rows of D.
template <u32 T, u32 D>
DEV void times_tile(float (&sums)[D / 8][4], const u32 (&left)[4], const char* rows) {
  u32 l = (u32)lane();
#pragma unroll
  for (u32 j = 0; j < D / 16; j++) {
    u32 f[4];
    ldmatrix_x4_trans(f, rows + l % 16 * Shape<T, D>::ROW + (j * 16 + l / 16 * 8) * 2);
    u32 first[2] = {f[0], f[1]}, second[2] = {f[2], f[3]};
    mma_m16n8k16(sums[2 * j], left, first);
    mma_m16n8k16(sums[2 * j + 1], left, second);
  }
}
// Sums of 16 x 16, two neighbouring fragments, as a left operand.
DEV void as_left(u32 (&f)[4], const float (&x)[4], const float (&y)[4]) {
  f[0] = pack_bf16x2(x[0], x[1]);
  f[1] = pack_bf16x2(x[2], x[3]);
  f[2] = pack_bf16x2(y[0], y[1]);
  f[3] = pack_bf16x2(y[2], y[3]);
}

// Over the four lanes that have a row of a fragment.
DEV float row_sum(float v) {
  v += __shfl_xor_sync(WARP, v, 1);
  return v + __shfl_xor_sync(WARP, v, 2);
}
DEV float row_max(float v) {
  v = max_nan(v, __shfl_xor_sync(WARP, v, 1));
  return max_nan(v, __shfl_xor_sync(WARP, v, 2));
}

// Element e of fragment j of this lane: its key, and its query in the tile.
DEV u32 key_of(u32 j, u32 e) { return j * 8 + (u32)lane() % 4 * 2 + e % 2; }
DEV u32 query_of(u32 e) { return (u32)lane() / 4 + e / 2 * 8; }

// Scores to weights, in place; zero from key t on.
template <u32 T>
DEV void softmax(float (&s)[2 * T][4], u32 t, float scale) {
#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    float most = bits_to_float(0xff800000u), sum = 0.0f;
#pragma unroll
    for (u32 j = 0; j < 2 * T; j++)
#pragma unroll
      for (u32 e = 2 * half; e < 2 * half + 2; e++) {
        s[j][e] *= scale;
        if (key_of(j, e) < t) most = max_nan(most, s[j][e]);
      }
    most = row_max(most);
#pragma unroll
    for (u32 j = 0; j < 2 * T; j++)
#pragma unroll
      for (u32 e = 2 * half; e < 2 * half + 2; e++) {
        s[j][e] = key_of(j, e) < t ? expf(s[j][e] - most) : 0.0f;
        sum += s[j][e];
      }
    float normalizer = 1.0f / row_sum(sum);
#pragma unroll
    for (u32 j = 0; j < 2 * T; j++)
#pragma unroll
      for (u32 e = 2 * half; e < 2 * half + 2; e++) s[j][e] *= normalizer;
  }
}

// Which elements of a head the dropout keeps, four a byte, beginning with the block that holds its first one.
DEV void draw_keep_bits(u8* bits, const Args<bf16>& args, const Head& at, u32 threads) {
  if (!args.dropout.rng) return;
  u32 len = args.t_query * args.t, first = at.head * len, end = (first + len - 1) / 4;
  for (u32 block = first / 4 + at.thread; block <= end; block += threads) {
    float4 m = dropout_multipliers(args.dropout, at.image, block);
    bits[block - first / 4] = (u8)((m.x != 0.0f) | (m.y != 0.0f) << 1 | (m.z != 0.0f) << 2 | (m.w != 0.0f) << 3);
  }
}
DEV float kept(const u8* bits, const Args<bf16>& args, const Head& at, u32 query, u32 key) {
  if (!args.dropout.rng) return 1.0f;
  u32 first = at.head * args.t_query * args.t, element = first % 4 + query * args.t + key;
  return bits[element / 4] >> element % 4 & 1 ? args.dropout.factor : 0.0f;
}

template <u32 T, u32 D>
DEV void forward_tiles(const Args<bf16>& args) {
  typedef Shape<T, D> S;
  DYN_SHARED(shared);
  Head at = my_head<T, D, S::FORWARD>(args, shared);
  u64 row = query_row(args), query = first_query(args, at.image, at.head), key = first_key(args, at.image, at.head);
  char *q = at.shared, *k = q + T * S::TILE, *v = k + T * S::TILE;
  u8* bits = (u8*)(v + T * S::TILE);
  rows_in<T, D>(q, args.q + query, row, args.t_query, at.thread);
  rows_in<T, D>(k, args.kv + key, 2 * row, args.t, at.thread);
  rows_in<T, D>(v, args.kv + key + row, 2 * row, args.t, at.thread);
  cp_async_commit();
  draw_keep_bits(bits, args, at, T * 32);
  cp_async_wait<0>();
  __syncthreads();

  char* mine = q + at.tile * S::TILE;
  u32 left[D / 16][4];
  left_rows<T, D>(left, mine);
  float weights[2 * T][4], out[D / 8][4] = {};
  times_rows<T, D>(weights, left, k);
  softmax<T>(weights, args.t, args.scale);
#pragma unroll
  for (u32 j = 0; j < 2 * T; j++)
#pragma unroll
    for (u32 e = 0; e < 4; e++) {
      u32 i = at.tile * 16 + query_of(e);
      bool inside = i < args.t_query && key_of(j, e) < args.t;
      weights[j][e] = inside ? weights[j][e] * kept(bits, args, at, i, key_of(j, e)) : 0.0f;
    }
#pragma unroll
  for (u32 j = 0; j < T; j++) {
    u32 f[4];
    as_left(f, weights[2 * j], weights[2 * j + 1]);
    times_tile<T, D>(out, f, v + j * S::TILE);
  }
  __syncwarp();  // every lane has read these queries
  tile_out<T, D>(mine, out);
  __syncwarp();
  u32 first = at.tile * 16, count = at.live && first < args.t_query ? args.t_query - first : 0;
  rows_out<T, D>(args.out + query + first * row, mine, row, count);
}

// Of 16 queries: dropped weights and gradients of scores, as stored in [query][key]; and the gradient of the queries.
template <u32 T, u32 D>
DEV void backward_queries(const Args<bf16>& args, const Head& at, const char* q, const char* dout, const char* k,
                          const char* v, const u8* bits, char* dropped, char* dscores, float (&dq)[D / 8][4]) {
  typedef Shape<T, D> S;
  float p[2 * T][4], d[2 * T][4];
  u32 left[D / 16][4];
  left_rows<T, D>(left, q + at.tile * S::TILE);
  times_rows<T, D>(p, left, k);
  softmax<T>(p, args.t, args.scale);
  left_rows<T, D>(left, dout + at.tile * S::TILE);
  times_rows<T, D>(d, left, v);
#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    u32 i = at.tile * 16 + query_of(2 * half);
    float mean = 0.0f;
#pragma unroll
    for (u32 j = 0; j < 2 * T; j++) {
      float w[2];
#pragma unroll
      for (u32 e = 0; e < 2; e++) {
        bool inside = i < args.t_query && key_of(j, e) < args.t;
        float keep = inside ? kept(bits, args, at, i, key_of(j, e)) : 0.0f;
        w[e] = inside ? p[j][2 * half + e] * keep : 0.0f;
        mean += inside ? w[e] * d[j][2 * half + e] : 0.0f;
        d[j][2 * half + e] *= keep;
      }
      *(u32*)(dropped + i * S::WEIGHT_ROW + key_of(j, 0) * 2) = pack_bf16x2(w[0], w[1]);
    }
    mean = row_sum(mean);
#pragma unroll
    for (u32 j = 0; j < 2 * T; j++) {
#pragma unroll
      for (u32 e = 0; e < 2; e++) {
        bool inside = i < args.t_query && key_of(j, e) < args.t;
        float& x = d[j][2 * half + e];
        x = inside ? p[j][2 * half + e] * (x - mean) * args.scale : 0.0f;
      }
      *(u32*)(dscores + i * S::WEIGHT_ROW + key_of(j, 0) * 2) = pack_bf16x2(d[j][2 * half], d[j][2 * half + 1]);
    }
  }
#pragma unroll
  for (u32 j = 0; j < T; j++) {
    u32 f[4];
    as_left(f, d[2 * j], d[2 * j + 1]);
    times_tile<T, D>(dq, f, k + j * S::TILE);
  }
}

template <u32 T, u32 D>
DEV void backward_tiles(const Args<bf16>& args) {
  typedef Shape<T, D> S;
  DYN_SHARED(shared);
  Head at = my_head<T, D, S::BACKWARD>(args, shared);
  u64 row = query_row(args), query = first_query(args, at.image, at.head), key = first_key(args, at.image, at.head);
  char *q = at.shared, *dout = q + T * S::TILE, *k = dout + T * S::TILE, *v = k + T * S::TILE;
  char *dropped = v + T * S::TILE, *dscores = dropped + T * 16 * S::WEIGHT_ROW;
  u8* bits = (u8*)(dscores + T * 16 * S::WEIGHT_ROW);
  rows_in<T, D>(q, args.q + query, row, args.t_query, at.thread);
  rows_in<T, D>(dout, args.dout + query, row, args.t_query, at.thread);
  rows_in<T, D>(k, args.kv + key, 2 * row, args.t, at.thread);
  rows_in<T, D>(v, args.kv + key + row, 2 * row, args.t, at.thread);
  cp_async_commit();
  draw_keep_bits(bits, args, at, T * 32);
  cp_async_wait<0>();
  __syncthreads();

  float dq[D / 8][4] = {};
  backward_queries<T, D>(args, at, q, dout, k, v, bits, dropped, dscores, dq);
  __syncthreads();  // the weights are whole, and nobody reads k and v any more

  // Of 16 keys; what lies as [query][key] is transposed on the way.
  float dk[D / 8][4] = {}, dv[D / 8][4] = {};
#pragma unroll
  for (u32 i = 0; i < T; i++) {
    u32 f[4], l = (u32)lane();
    u32 place = (i * 16 + l / 16 * 8 + l % 8) * S::WEIGHT_ROW + (at.tile * 16 + l / 8 % 2 * 8) * 2;
    ldmatrix_x4_trans(f, dropped + place);
    times_tile<T, D>(dv, f, dout + i * S::TILE);
    ldmatrix_x4_trans(f, dscores + place);
    times_tile<T, D>(dk, f, q + i * S::TILE);
  }
  char *my_k = k + at.tile * S::TILE, *my_v = v + at.tile * S::TILE, *my_q = q + at.tile * S::TILE;
  tile_out<T, D>(my_k, dk);
  tile_out<T, D>(my_v, dv);
  __syncthreads();  // all have read the queries
  tile_out<T, D>(my_q, dq);
  __syncwarp();
  u32 first = at.tile * 16;
  u32 keys = at.live && first < args.t ? args.t - first : 0;
  u32 queries = at.live && first < args.t_query ? args.t_query - first : 0;
  rows_out<T, D>(args.dkv + key + first * 2 * row, my_k, 2 * row, keys);
  rows_out<T, D>(args.dkv + key + first * 2 * row + row, my_v, 2 * row, keys);
  rows_out<T, D>(args.dq + query + first * row, my_q, row, queries);
}

#define TILES(T, D, THREADS)                                                                                           \
  static_assert(Shape<T, D>::HEADS * T * 32 == THREADS, "a warp for each tile");                                       \
  KERNEL(attention_forward_tiles_##T##_##D##_bf16, Args<bf16>, THREADS, 2) { forward_tiles<T, D>(args); }               \
  KERNEL(attention_backward_tiles_##T##_##D##_bf16, Args<bf16>, THREADS, 2) { backward_tiles<T, D>(args); }

TILES(1, 16, 128)
TILES(2, 16, 128)
TILES(3, 16, 192)
TILES(4, 16, 128)
TILES(1, 32, 128)
TILES(2, 32, 128)
TILES(3, 32, 192)
TILES(4, 32, 128)
TILES(1, 64, 128)
TILES(2, 64, 128)
TILES(3, 64, 192)
TILES(4, 64, 128)

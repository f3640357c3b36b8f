// Gathering patches to tokens: one thread a chunk of a token, or an element where rows do not come in whole chunks. The sums
// of the gradients of u0 and of the positions' rows: blocks of eight warps over 32 features of one row.
#include "device.h"

#include "column_sums.h"
#include "patches.h"

template <class T>
struct ForwardArgs {
  Patches patches;
  const T* h;
  const float *u0, *positions;  // positions may be null
  T* x;
};

template <class T>
struct BackwardArgs {
  Patches patches;
  const T* dx;
  T* dh;
};

template <class T>
struct SumArgs {
  Patches patches;
  const T* dx;
  float *du0, *dpositions;  // the latter is added to
  u32 first_row;            // that there is a block for
  u32 unused;
};

// Features j .. + N of a token.
struct Token {
  u32 image, token, j;
  bool inside;
};

template <int N>
DEV Token my_token(const Patches& p) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  u32 chunks = p.d / N, tokens = tokens_of(p);
  u64 token = i / chunks;
  return {(u32)(token / tokens), (u32)(token % tokens), (u32)(i % chunks) * N, token < (u64)p.b * tokens};
}

// The place of a token that asks for one or shows it: all but a summary.
DEV u32 place_of_token(const Patches& p, u32 image, u32 token) {
  u32 q = queries_of(p), slot = token < q ? token : token - q + p.hidden;
  return p.order[(u64)image * patches_of(p) + slot];
}

template <int N, class T>
DEV void forward(const ForwardArgs<T>& args) {
  const Patches& p = args.patches;
  Token at = my_token<N>(p);
  if (!at.inside) return;
  u32 place = place_of_token(p, at.image, at.token);
  bool asks = at.token < queries_of(p);
  float v[N];
  if (asks) load_chunk(args.u0 + at.j, v);
  else load_chunk(args.h + ((u64)at.image * patches_of(p) + place) * p.d + at.j, v);
  if (args.positions && !(asks && p.queries == Queries::Summary)) {
    float added[N];
    position(p, args.positions, place, at.j, added);
#pragma unroll
    for (int i = 0; i < N; i++) v[i] += added[i];
  }
  store_chunk(args.x + ((u64)at.image * tokens_of(p) + at.token) * p.d + at.j, v);
}

template <int N, class T>
DEV void backward(const BackwardArgs<T>& args) {
  const Patches& p = args.patches;
  Token at = my_token<N>(p);
  if (!at.inside || at.token < queries_of(p)) return;
  u32 place = place_of_token(p, at.image, at.token);
  float v[N];
  load_chunk(args.dx + ((u64)at.image * tokens_of(p) + at.token) * p.d + at.j, v);
  store_chunk(args.dh + ((u64)at.image * patches_of(p) + place) * p.d + at.j, v);
}

KERNEL(tokens_forward_f32, ForwardArgs<float>, 256, 4) { forward<4>(args); }
KERNEL(tokens_forward_bf16, ForwardArgs<bf16>, 256, 4) { forward<8>(args); }
KERNEL(tokens_forward_elements_f32, ForwardArgs<float>, 256, 4) { forward<1>(args); }
KERNEL(tokens_forward_elements_bf16, ForwardArgs<bf16>, 256, 4) { forward<1>(args); }
KERNEL(tokens_backward_f32, BackwardArgs<float>, 256, 4) { backward<4>(args); }
KERNEL(tokens_backward_bf16, BackwardArgs<bf16>, 256, 4) { backward<8>(args); }
KERNEL(tokens_backward_elements_f32, BackwardArgs<float>, 256, 4) { backward<1>(args); }
KERNEL(tokens_backward_elements_bf16, BackwardArgs<bf16>, 256, 4) { backward<1>(args); }

// ---- Sums over the batch. A block's row is one of the positions', or behind them u0; what adds to it are (image, use) pairs,
// images in order.

static constexpr u32 NONE = 0xffffffffu;

// The token that is a pair's, as its number in the batch; NONE if there is none.
DEV u32 token_of_pair(const Patches& p, u32 row, u64 pair) {
  u32 q = queries_of(p), tokens = tokens_of(p);
  if (row == position_rows(p)) return (u32)(pair / q) * tokens + (u32)(pair % q);
  u32 uses = uses_of_row(p), image = (u32)(pair / uses), n = patches_of(p);
  u32 slot = slot_of(p, image, place_of_use(p, row, (u32)(pair % uses)), n);
  if (slot >= p.hidden) return image * tokens + q + slot - p.hidden;
  return p.queries == Queries::Places ? image * tokens + slot : NONE;
}

template <class T>
DEV void sums(const SumArgs<T>& args) {
  SHARED(u32, tokens, [256]);
  const Patches& p = args.patches;
  u32 blocks = ceil_div(p.d, 32u), row = args.first_row + blockIdx.x / blocks, j = blockIdx.x % blocks * 32 + (u32)lane();
  bool is_u0 = row == position_rows(p), inside = j < p.d;
  u64 pairs = (u64)p.b * (is_u0 ? queries_of(p) : uses_of_row(p));
  float sum[1] = {};
  for (u64 first = 0; first < pairs; first += 256) {
    u64 pair = first + threadIdx.x;
    tokens[threadIdx.x] = pair < pairs ? token_of_pair(p, row, pair) : NONE;
    __syncthreads();
    if (inside)
#pragma unroll 8
      for (u32 i = (u32)warp(); i < 256; i += 8)
        if (tokens[i] != NONE) sum[0] += to_float(args.dx[(u64)tokens[i] * p.d + j]);
    __syncthreads();
  }
  add_warps(sum);
  if (warp() != 0 || !inside) return;
  if (is_u0) args.du0[j] = sum[0];
  else args.dpositions[(u64)row * p.d + j] += sum[0];
}
KERNEL(tokens_sums_f32, SumArgs<float>, 256, 4) { sums(args); }
KERNEL(tokens_sums_bf16, SumArgs<bf16>, 256, 4) { sums(args); }

// The norm of the flat gradient and the gate, the sum over micro-batches, and the optimizer in one pass over everything.
#include "device.h"

static constexpr int THREADS = 256;
static constexpr int SUM_ELEMENTS = 4096;  // that share one partial sum

struct SquaresArgs {
  const float* gradient;
  double* partial;  // [ceil(len / SUM_ELEMENTS)]
  u64 len;
};
KERNEL(sgd_squares, SquaresArgs, THREADS, 4) {
  constexpr int COUNT = SUM_ELEMENTS / THREADS;
  u64 first = (u64)blockIdx.x * SUM_ELEMENTS + threadIdx.x;
  float g[COUNT], sum = 0.0f;
  // All on their way at once.
#pragma unroll
  for (int i = 0; i < COUNT; i++) g[i] = first + i * THREADS < args.len ? args.gradient[first + i * THREADS] : 0.0f;
#pragma unroll
  for (int i = 0; i < COUNT; i++) sum = fmaf(g[i], g[i], sum);
  sum = block_sum<THREADS>(sum);
  if (threadIdx.x == 0) args.partial[blockIdx.x] = (double)sum;
}

struct NormArgs {
  const double* partial;
  float* metrics;  // [4]: loss, accuracy, norm, finite
  u32* finite;
  u64 partials;
};
KERNEL(sgd_norm, NormArgs, THREADS, 1) {
  double sum = 0.0;
  for (u64 i = threadIdx.x; i < args.partials; i += THREADS) sum += args.partial[i];
  sum = block_sum<THREADS>(sum);
  if (threadIdx.x != 0) return;
  float norm = (float)sqrt(sum);
  u32 finite = is_finite(norm) && is_finite(args.metrics[0]);
  args.metrics[2] = norm;
  args.metrics[3] = (float)finite;
  *args.finite = finite;
}

struct AccumulateArgs {
  const float* gradient;
  float* total;
  u64 len;
  float scale;
  u32 unused;
};
KERNEL(sgd_accumulate, AccumulateArgs, THREADS, 4) {
  u64 i = (u64)blockIdx.x * THREADS + threadIdx.x;
  if (i < args.len) args.total[i] = fmaf(args.scale, args.gradient[i], args.total[i]);
}

template <class T>
struct UpdateArgs {
  const double* rate;
  const u32* finite;
  const float* gradient;
  float *velocity, *master;
  T* copy;
  u64 len;
  float momentum, weight_decay;
};

DEV void descend(float g, float& v, float& p, float rate, float momentum, float decay) {
  g = fmaf(decay, p, g);
  v = fmaf(momentum, v, g);
  p = fmaf(-rate, fmaf(momentum, v, g), p);
}
DEV void store_copy(float* to, const float (&p)[4]) { store_floats(to, p); }
DEV void store_copy(bf16* to, const float (&p)[4]) {
  *(u32x2*)to = u32x2{pack_bf16x2(p[0], p[1]), pack_bf16x2(p[2], p[3])};
}

// Four parameters a thread; the last ones, where they are fewer, one by one.
template <class T>
DEV void update(const UpdateArgs<T>& args) {
  if (*args.finite == 0) return;
  float rate = (float)*args.rate;
  u64 at = ((u64)blockIdx.x * THREADS + threadIdx.x) * 4;
  if (at + 4 <= args.len) {
    float g[4], v[4], p[4];
    load_floats(args.gradient + at, g);
    load_floats(args.velocity + at, v);
    load_floats(args.master + at, p);
#pragma unroll
    for (int i = 0; i < 4; i++) descend(g[i], v[i], p[i], rate, args.momentum, args.weight_decay);
    store_floats(args.velocity + at, v);
    store_floats(args.master + at, p);
    store_copy(args.copy + at, p);
    return;
  }
  for (; at < args.len; at++) {
    descend(args.gradient[at], args.velocity[at], args.master[at], rate, args.momentum, args.weight_decay);
    args.copy[at] = from_float<T>(args.master[at]);
  }
}
KERNEL(sgd_update_f32, UpdateArgs<float>, THREADS, 4) { update(args); }
KERNEL(sgd_update_bf16, UpdateArgs<bf16>, THREADS, 4) { update(args); }

// dx = a * dz + b * x + c (+ skip): one thread a chunk of 16 bytes, or an element where rows do not come in whole chunks.
#include "device.h"

template <class T>
struct Args {
  const T *dz, *x;
  const float* coef;  // [3][c]
  const T* skip;      // may be null
  T* dx;
  u64 len;
  u32 c;
  u32 unused;
};

DEV float join(float dz, float x, float a, float b, float c, float skip) { return fmaf(a, dz, fmaf(b, x, c)) + skip; }

template <class T>
DEV void join_vectors(const Args<T>& args) {
  constexpr int N = Vec16<T>::N;
  u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * N;
  if (i >= args.len) return;
  u32 k = (u32)(i % args.c);
  float dz[N], x[N], skip[N] = {}, dx[N];
  load_floats(args.dz + i, dz);
  load_floats(args.x + i, x);
  if (args.skip) load_floats(args.skip + i, skip);
#pragma unroll
  for (int j = 0; j < N; j++) {
    const float* coef = args.coef + k + j;
    dx[j] = join(dz[j], x[j], coef[0], coef[args.c], coef[2 * args.c], skip[j]);
  }
  store_floats(args.dx + i, dx);
}

template <class T>
DEV void join_elements(const Args<T>& args) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= args.len) return;
  const float* coef = args.coef + i % args.c;
  float skip = args.skip ? to_float(args.skip[i]) : 0.0f;
  float dx = join(to_float(args.dz[i]), to_float(args.x[i]), coef[0], coef[args.c], coef[2 * args.c], skip);
  args.dx[i] = from_float<T>(dx);
}

KERNEL(grad_join_f32, Args<float>, 256, 4) { join_vectors(args); }
KERNEL(grad_join_bf16, Args<bf16>, 256, 4) { join_vectors(args); }
KERNEL(grad_join_elements_f32, Args<float>, 256, 4) { join_elements(args); }
KERNEL(grad_join_elements_bf16, Args<bf16>, 256, 4) { join_elements(args); }

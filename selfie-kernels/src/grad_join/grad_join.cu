// dx = a * dz + b * x + c (+ skip): in chunks of 16 bytes, or one thread an element where rows do not come in whole chunks.
#include "chunks.h"

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

// All threads together are a multiple of a row's chunks, so a thread has the same channels in every turn, and keeps their
// coefficients: read for each chunk they would take twelve times as long as it.
template <class T>
DEV void join_chunks(const Args<T>& args) {
  constexpr int N = Vec16<T>::N, AT_ONCE = 2;
  u64 chunks = args.len / N, all = (u64)gridDim.x * blockDim.x;
  u32 thread = blockIdx.x * blockDim.x + threadIdx.x, k = thread % (args.c / N) * N;
  float a[N], b[N], c[N];
  load_chunk(args.coef + k, a);
  load_chunk(args.coef + args.c + k, b);
  load_chunk(args.coef + 2 * args.c + k, c);
  for (u64 first = thread; first < chunks; first += AT_ONCE * all) {
    Vec16<T> dz[AT_ONCE], x[AT_ONCE], skip[AT_ONCE] = {};
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      u64 chunk = first + i * all, at = (chunk < chunks ? chunk : first) * N;
      dz[i] = load_vec(args.dz + at);
      x[i] = load_vec(args.x + at);
      if (args.skip) skip[i] = load_vec(args.skip + at);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      u64 chunk = first + i * all;
      if (chunk >= chunks) continue;
      float of_dz[N], of_x[N], of_skip[N], dx[N];
      dz[i].unpack(of_dz);
      x[i].unpack(of_x);
      skip[i].unpack(of_skip);
#pragma unroll
      for (int j = 0; j < N; j++) dx[j] = join(of_dz[j], of_x[j], a[j], b[j], c[j], of_skip[j]);
      store_floats(args.dx + chunk * N, dx);
    }
  }
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

KERNEL(grad_join_f32, Args<float>, 256, 3) { join_chunks(args); }
KERNEL(grad_join_bf16, Args<bf16>, 256, 3) { join_chunks(args); }
KERNEL(grad_join_elements_f32, Args<float>, 256, 4) { join_elements(args); }
KERNEL(grad_join_elements_bf16, Args<bf16>, 256, 4) { join_elements(args); }

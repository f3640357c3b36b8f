#pragma once
// What a kernel may use of the device: every PTX instruction behind a function, the two element types, reductions in a
// fixed order and the random numbers. The same .cu file is compiled for a GPU (here) and by a C++ compiler for the
// emulator, which has a twin of every function of the first part (emulator/emulator.h). So no PTX and no CUDA header
// stands anywhere else, shared memory and collectives go through this file, all threads of a block or warp reach a
// collective at the same source line, and every warp collective is of the whole warp.
//
// Compiled without fast-math: division, square root, expf, logf and erff are the accurate ones. The compiler may still
// contract a * b + c; where two kernels must agree to the bit, write fmaf.
#ifdef EMULATOR
#include "emulator/emulator.h"
#else

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Of functions, and of members of structs.
#define DEV static __device__ __forceinline__
#define DEV_MEMBER __device__ __forceinline__

// KERNEL(name, Args, THREADS, MIN_BLOCKS) { .. args.x .. }: a kernel that takes one struct by value, is launched with
// one-dimensional blocks of THREADS, and must fit MIN_BLOCKS times on a multiprocessor. What stands in braces is a
// function that the entry calls, so that no kernel can forget to wait.
#define KERNEL(name, Args, THREADS, MIN_BLOCKS)                                                               \
  static_assert((THREADS) % 32 == 0 && (THREADS) <= 1024, "a block is made of whole warps");                  \
  DEV void name##_body(const Args& args);                                                                     \
  extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) name(const __grid_constant__ Args args) { \
    wait_for_earlier_kernels();                                                                               \
    name##_body(args);                                                                                        \
  }                                                                                                           \
  DEV void name##_body(const Args& args)

// From 9.0 on a kernel may be launched so that its blocks begin beside the last ones of the kernel before it
// (src/cuda/device.rs), which hides what a launch takes, and the blocks' beginning. Each lets the next one begin, and waits
// itself, ahead of all else. That this is as safe as if each began when the one before had ended:
//   - The wait ends when the kernel before has ended, and all that it wrote is seen. None of its blocks could end before
//     its own wait did, so the one before that had ended, and so on: every earlier kernel has.
//   - Nothing of the body stands before the wait, which `compile` sees to in the PTX: who has begun early has read and
//     written nothing.
//   - Kernels launched plainly, copies, fills, events and the end of a graph wait for whole kernels, as ever. They never
//     tell a kernel behind them to begin early, so it comes when they are done.
//   - A kernel begins only once all blocks of the one before have begun: it takes no room that those need to end. That is
//     so of one queue; on a branch kernels begin in turn, as there it could take the room of what runs beside them.
DEV void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// SHARED(bf16, tile, [16][24]): an array in shared memory, the same for the whole block, undefined at first.
#define SHARED(T, name, dims) __shared__ __align__(128) T name dims
// The bytes of shared memory that the launch asked for: char*, aligned to 1024. Only in a KERNEL itself, which hands it on.
#define DYN_SHARED(name) extern __shared__ __align__(1024) char name[]

struct bf16 {
  u16 bits;
};
struct __align__(8) u32x2 {
  u32 x, y;
};
struct __align__(16) u32x4 {
  u32 x, y, z, w;
};

DEV float bits_to_float(u32 bits) { return __uint_as_float(bits); }
#define INFINITY bits_to_float(0x7f800000u)
#define NAN bits_to_float(0x7fffffffu)
DEV u32 float_to_bits(float v) { return __float_as_uint(v); }

// max(0, v) that keeps NaN (the CPU's `if v < 0 { 0 } else { v }`); -0 gives +0.
DEV float relu(float v) {
  float r;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(r) : "f"(v));
  return r;
}
// The larger one, NaN if either is; fmaxf hides it.
DEV float max_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// To the nearest, ties to even; every NaN becomes 0x7fff.
DEV bf16 float_to_bf16(float v) {
  bf16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
  return r;
}
// Two at once, the first in the low half.
DEV u32 pack_bf16x2(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// The same behind a ReLU that keeps NaN.
DEV u32 pack_relu_bf16x2(float low, float high) {
  u32 r;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// 16 bytes, aligned to 16.
DEV u32x4 load16(const void* from) { return *(const u32x4*)from; }
DEV void store16(void* to, u32x4 v) { *(u32x4*)to = v; }
// 16 bytes of global memory that nobody writes while the kernel runs.
DEV u32x4 load16_nc(const void* from) {
  uint4 v = __ldg((const uint4*)from);
  return {v.x, v.y, v.z, v.w};
}
// Brings the line to the L2; a hint.
DEV void prefetch_l2(const void* line) { asm volatile("prefetch.global.L2 [%0];" ::"l"(line)); }

DEV u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// cp.async: 16 bytes from global to shared memory behind the thread's back. Copies since the last commit form a group;
// cp_async_wait<N> waits for all groups but the newest N. Others see the data after a barrier behind the wait.
DEV void cp_async16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
enum class Fill { Copy, Zero };
// With Fill::Zero sixteen zeros; `from` is not read, but must be an address of the buffer.
DEV void cp_async16_or_zero(void* to, const void* from, Fill fill) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(fill == Fill::Copy ? 16 : 0)
               : "memory");
}
DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEV void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8x8 matrices of 16-bit elements from shared memory: lane l names row l % 8 of matrix l / 8 (16 bytes, aligned to
// 16), and gets in r[j] the elements 2 * (l % 4), + 1 of row l / 4 of matrix j.
DEV void ldmatrix_x4(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same with each matrix transposed: r[j] has rows 2 * (l % 4), + 1 of column l / 4.
DEV void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d[16][8] += a[16][16] * b[16][8] by a warp, in f32. Lane l, with g = l / 4 and t = 2 * (l % 4), holds
//   a[0..4]: (row g, k t), (g + 8, t), (g, t + 8), (g + 8, t + 8), two neighbours in k each: ldmatrix_x4 in this order;
//   b[0..2]: (k t, column g), (t + 8, g), two neighbours in k each;
//   d[0..4]: (row g, column t), (g, t + 1), (g + 8, t), (g + 8, t + 1).
DEV void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif  // EMULATOR: what follows is the same in both worlds. CUDA's own names that the emulator has too: threadIdx.x,
        // blockIdx, blockDim.x, gridDim, __syncthreads(), __syncwarp(), __shfl_sync, __shfl_xor_sync, __shfl_up_sync,
        // __shfl_down_sync (with WARP), __ballot_sync, __threadfence(), atomicAdd on u32, min and max of integers,
        // float2 and float4 with make_*, and the functions of <math.h>
        // with INFINITY and NAN.

static constexpr u32 WARP = 0xffffffffu;
DEV int lane() { return (int)(threadIdx.x % 32); }
DEV int warp() { return (int)(threadIdx.x / 32); }

template <class A, class B>
DEV constexpr auto ceil_div(A a, B b) { return (a + b - 1) / b; }

DEV bool is_finite(float v) { return (float_to_bits(v) & 0x7f800000u) != 0x7f800000u; }

// ---- Elements: float and bf16, computed with as float.

DEV float to_float(float v) { return v; }
DEV float to_float(bf16 v) { return bits_to_float((u32)v.bits << 16); }
DEV float bf16x2_low(u32 pair) { return bits_to_float(pair << 16); }
DEV float bf16x2_high(u32 pair) { return bits_to_float(pair & 0xffff0000u); }

// 16 bytes of elements, and the rounding to one of them.
template <class T>
struct Vec16;

template <>
struct Vec16<float> {
  static constexpr int N = 4;
  u32x4 words;
  DEV_MEMBER static float round(float v) { return v; }
  DEV_MEMBER static Vec16 pack(const float (&v)[N]) {
    return {{float_to_bits(v[0]), float_to_bits(v[1]), float_to_bits(v[2]), float_to_bits(v[3])}};
  }
  DEV_MEMBER void unpack(float (&v)[N]) const {
    v[0] = bits_to_float(words.x), v[1] = bits_to_float(words.y);
    v[2] = bits_to_float(words.z), v[3] = bits_to_float(words.w);
  }
};

template <>
struct Vec16<bf16> {
  static constexpr int N = 8;
  u32x4 words;
  DEV_MEMBER static bf16 round(float v) { return float_to_bf16(v); }
  DEV_MEMBER static Vec16 pack(const float (&v)[N]) {
    return {{pack_bf16x2(v[0], v[1]), pack_bf16x2(v[2], v[3]), pack_bf16x2(v[4], v[5]), pack_bf16x2(v[6], v[7])}};
  }
  DEV_MEMBER void unpack(float (&v)[N]) const {
    v[0] = bf16x2_low(words.x), v[1] = bf16x2_high(words.x), v[2] = bf16x2_low(words.y), v[3] = bf16x2_high(words.y);
    v[4] = bf16x2_low(words.z), v[5] = bf16x2_high(words.z), v[6] = bf16x2_low(words.w), v[7] = bf16x2_high(words.w);
  }
};

// Rounded once, to the nearest.
template <class T>
DEV T from_float(float v) {
  return Vec16<T>::round(v);
}

// Addresses aligned to 16: 4 floats or 8 bf16 in one access.
template <class T>
DEV Vec16<T> load_vec(const T* from) {
  return {load16(from)};
}
// Of global memory that nobody writes while the kernel runs.
template <class T>
DEV Vec16<T> load_vec_nc(const T* from) {
  return {load16_nc(from)};
}
template <class T>
DEV void store_vec(T* to, const Vec16<T>& v) {
  store16(to, v.words);
}
// The same as floats.
template <class T>
DEV void load_floats(const T* from, float (&v)[Vec16<T>::N]) {
  load_vec(from).unpack(v);
}
template <class T>
DEV void store_floats(T* to, const float (&v)[Vec16<T>::N]) {
  store_vec(to, Vec16<T>::pack(v));
}

// ---- Reductions. The order is fixed by the number of threads, and every thread gets the same bits.

// Over a warp; T is float or double.
template <class T>
DEV T warp_sum(T v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(WARP, v, step);
  return v;
}
// NaN if any is.
DEV float warp_max(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v = max_nan(v, __shfl_xor_sync(WARP, v, step));
  return v;
}
// Over a block of THREADS: the warps' sums in order. All threads call it; it holds two barriers, so that it may be
// called again at once.
template <int THREADS, class T>
DEV T block_sum(T v) {
  SHARED(T, sums, [THREADS / 32]);
  v = warp_sum(v);
  if (lane() == 0) sums[warp()] = v;
  __syncthreads();
  T sum = sums[0];
#pragma unroll
  for (int w = 1; w < THREADS / 32; w++) sum += sums[w];
  __syncthreads();
  return sum;
}
template <int THREADS>
DEV float block_max(float v) {
  SHARED(float, maxima, [THREADS / 32]);
  v = warp_max(v);
  if (lane() == 0) maxima[warp()] = v;
  __syncthreads();
  float most = maxima[0];
#pragma unroll
  for (int w = 1; w < THREADS / 32; w++) most = max_nan(most, maxima[w]);
  __syncthreads();
  return most;
}

// Whether this block is the last of `blocks` to come here, so that it alone goes on with what all of them wrote. `ticket`
// is zero before the launch and zero again behind it. All threads of a block call it.
DEV bool last_block(u32* ticket, u32 blocks) {
  SHARED(u32, drawn, [1]);
  __syncthreads();
  if (threadIdx.x == 0) {
    // The barriers take the one thread's fences for all: what the block wrote is seen before its ticket, and what
    // other blocks wrote before theirs is seen behind it.
    __threadfence();
    drawn[0] = atomicAdd(ticket, 1u);
    __threadfence();
  }
  __syncthreads();
  bool last = drawn[0] == blocks - 1;
  if (last && threadIdx.x == 0) *ticket = 0;
  return last;
}

// ---- Random numbers: Philox4x32-10, as src/philox.rs.

// Four words for (purpose, sample, block).
DEV u32x4 philox(u64 seed, u32 purpose, u64 sample, u32 block) {
  u32x4 c = {(u32)sample, (u32)(sample >> 32), block, purpose};
  u32 key0 = (u32)seed, key1 = (u32)(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    u64 a = (u64)0xd2511f53u * c.x, b = (u64)0xcd9e8d57u * c.z;
    c = {(u32)(b >> 32) ^ c.y ^ key0, (u32)b, (u32)(a >> 32) ^ c.w ^ key1, (u32)a};
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return c;
}
// In (0, 1): the middle of one of 2^24 equal intervals.
DEV float philox_unit(u32 word) { return ((float)(word >> 8) + 0.5f) * (1.0f / 16777216.0f); }

// Random zeroing of values; the host's struct of the same name has the rule.
struct Dropout {
  const u64* rng;  // [2]: seed; number of the batch's first sample. Null: no dropout.
  u32 purpose;
  float rate;
  float factor;  // 1 / (1 - rate)
  u32 unused;    // the host's mirror has no gaps
};
// What elements 4 * block .. + 4 of sample `b` of the batch are multiplied by: 0 or the factor, 1 without dropout.
DEV float4 dropout_multipliers(const Dropout& dropout, u64 b, u32 block) {
  if (!dropout.rng) return make_float4(1.0f, 1.0f, 1.0f, 1.0f);
  u32x4 words = philox(dropout.rng[0], dropout.purpose, dropout.rng[1] + b, block);
  return make_float4(philox_unit(words.x) >= dropout.rate ? dropout.factor : 0.0f,
                     philox_unit(words.y) >= dropout.rate ? dropout.factor : 0.0f,
                     philox_unit(words.z) >= dropout.rate ? dropout.factor : 0.0f,
                     philox_unit(words.w) >= dropout.rate ? dropout.factor : 0.0f);
}
// The same for one element.
DEV float dropout_multiplier(const Dropout& dropout, u64 b, u32 element) {
  float4 m = dropout_multipliers(dropout, b, element / 4);
  u32 i = element % 4;
  return i == 0 ? m.x : i == 1 ? m.y : i == 2 ? m.z : m.w;
}

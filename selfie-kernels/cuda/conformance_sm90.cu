// Every function of hopper.h alone, as conformance.cu does it for device.h. One block each.
#include "hopper.h"

// y = x [2][n], n * 4 a multiple of 16 and at most 8192, by 128 threads: two phases of one mbarrier. Dynamic shared memory:
// 8192 + 8.
struct BulkArgs {
  const u32* x;
  u32* y;
  u64 n;
};
KERNEL(conformance_bulk, BulkArgs, 128, 1) {
  DYN_SHARED(bytes);
  const u32 data = shared_address(bytes), barrier = data + 8192, n = (u32)args.n;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  for (u32 phase = 0; phase < 2; phase++) {
    if (threadIdx.x == 0) {
      mbarrier_expect(barrier, n * 4);
      bulk_load(data, args.x + phase * n, n * 4, barrier);
    }
    mbarrier_wait(barrier, phase);
    for (u32 i = threadIdx.x; i < n; i += 128) args.y[phase * n + i] = load_shared(data + i * 4);
    __syncthreads();
  }
}

// Matrix j has j * 64 + row * 8 + column in it. `raw` [256] is what stmatrix stores, `plain` and `transposed` [32][4] what
// ldmatrix reads of it, `turned` [256] what stmatrix stores transposed. Dynamic shared memory: 512.
struct MatricesArgs {
  u16 *raw, *turned;
  u32 *plain, *transposed;
};
KERNEL(conformance_stmatrix, MatricesArgs, 32, 1) {
  DYN_SHARED(bytes);
  const u32 base = shared_address(bytes);
  u32 r[4];
  for (int j = 0; j < 4; j++) {
    u32 first = j * 64 + lane() / 4 * 8 + lane() % 4 * 2;
    r[j] = first | (first + 1) << 16;
  }
  const u32 row = base + lane() * 16;
  stmatrix_x4_at(row, r);
  __syncwarp();
  for (int i = lane(); i < 128; i += 32) ((u32*)args.raw)[i] = load_shared(base + i * 4);
  ldmatrix_x4_at(r, row);
  store16(args.plain + lane() * 4, {r[0], r[1], r[2], r[3]});
  ldmatrix_x4_trans_at(r, row);
  store16(args.transposed + lane() * 4, {r[0], r[1], r[2], r[3]});
  ldmatrix_x4_at(r, row);
  __syncwarp();
  stmatrix_x4_trans_at(row, r);
  __syncwarp();
  for (int i = lane(); i < 128; i += 32) ((u32*)args.turned)[i] = load_shared(base + i * 4);
}

// Two groups of 128 threads with a named barrier each go 3 and 5 rounds of v[t] = v[(5 t + 1) % 128] + 1, from v[t] = t: y
// [2][128]. Dynamic shared memory: 1024.
struct NamedBarrierArgs {
  u32* y;
};
KERNEL(conformance_named_barrier, NamedBarrierArgs, 256, 1) {
  DYN_SHARED(bytes);
  const int group = threadIdx.x / 128, t = threadIdx.x % 128;
  const u32 base = shared_address(bytes) + group * 512;
  u32 v = t;
  for (int round = 0; round < 3 + group * 2; round++) {
    store_shared(base + t * 4, v);
    named_barrier(1 + group, 128);
    v = load_shared(base + (t * 5 + 1) % 128 * 4) + 1;
    named_barrier(1 + group, 128);
  }
  args.y[threadIdx.x] = v;
}

// A producer and two warpgroups of consumers, with registers moved from the one to the others, over a ring of three stages:
// y [256] = sums of x [tiles][256] over the tiles. Dynamic shared memory: 3 * 1024 + 48.
struct RingArgs {
  const u32* x;
  u32* y;
  u64 tiles;
};
KERNEL(conformance_ring, RingArgs, 384, 1) {
  DYN_SHARED(bytes);
  const u32 base = shared_address(bytes), full = base + 3 * 1024, empty = full + 24;
  if (threadIdx.x == 0) {
    for (u32 s = 0; s < 3; s++) {
      mbarrier_init(full + s * 8, 1);
      mbarrier_init(empty + s * 8, 8);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_give<40>();
    if (threadIdx.x != 0) return;
    for (u32 i = 0; i < args.tiles; i++) {
      u32 s = i % 3;
      mbarrier_wait(empty + s * 8, (i / 3 & 1) ^ 1);  // the first round need not wait
      mbarrier_expect(full + s * 8, 1024);
      bulk_load(base + s * 1024, args.x + i * 256, 1024, full + s * 8);
    }
  } else {
    registers_take<232>();
    u32 sum = 0;
    for (u32 i = 0; i < args.tiles; i++) {
      u32 s = i % 3;
      mbarrier_wait(full + s * 8, i / 3 & 1);
      sum += load_shared(base + s * 1024 + (threadIdx.x - 128) * 4);
      __syncwarp();
      if (lane() == 0) mbarrier_arrive(empty + s * 8);
    }
    args.y[threadIdx.x - 128] = sum;
  }
}

// Block (1, 0, 0) waits for the end of the second phase of the barrier 8 bytes behind the start of shared memory, for which
// its last warp has not arrived: the kernel is stopped. Dynamic shared memory: 16 bytes.
struct StuckArgs {
  u32* y;
};
KERNEL(conformance_stuck, StuckArgs, 128, 1) {
  DYN_SHARED(bytes);
  const u32 barrier = shared_address(bytes) + 8;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 4);
    mbarrier_init_fence();
  }
  __syncthreads();
  for (u32 phase = 0; phase < 2; phase++) {
    __syncwarp();
    bool arrives = blockIdx.x != 1 || phase == 0 || threadIdx.x < 96;
    if (lane() == 0 && arrives) mbarrier_arrive(barrier);
    mbarrier_wait(barrier, phase);
  }
  args.y[blockIdx.x * 128 + threadIdx.x] = 1;
}

// One box of a tensor of rank 2 to 4 into shared memory that was all 0xeeeeeeee, `to` bytes (a multiple of 128) behind its
// start; y [total / 4] is how it lies there then. With a swizzled map the 16-byte chunks of each 128 bytes are mixed, chunk c
// of the row at address a being at c ^ (a / 128 % 8). Dynamic shared memory: total + 8, total a multiple of 16.
struct TmaLoadArgs {
  TensorMap map;
  int at[4];
  u32 to, box_bytes, total, rank;
  u32* y;
  int dx, dy;
  u64 unused[2];
};
KERNEL(conformance_tma_load, TmaLoadArgs, 128, 1) {
  DYN_SHARED(bytes);
  const u32 base = shared_address(bytes), barrier = base + args.total;
  for (u32 i = threadIdx.x; i < args.total / 4; i += 128) store_shared(base + i * 4, 0xeeeeeeeeu);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
  }
  fence_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    const int(&at)[4] = args.at;
    tma_prefetch(&args.map);
    mbarrier_expect(barrier, args.box_bytes);
    if (args.rank == 0)
      tma_load_windows(base + args.to, &args.map, barrier, at[0], at[1], at[2], at[3], args.dx, args.dy);
    if (args.rank == 2) tma_load_2d(base + args.to, &args.map, barrier, at[0], at[1]);
    if (args.rank == 3) tma_load_3d(base + args.to, &args.map, barrier, at[0], at[1], at[2]);
    if (args.rank == 4) tma_load_4d(base + args.to, &args.map, barrier, at[0], at[1], at[2], at[3]);
  }
  mbarrier_wait(barrier, 0);
  for (u32 i = threadIdx.x; i < args.total / 4; i += 128) args.y[i] = load_shared(base + i * 4);
}

// Three boxes of 16 rows of 64 at (x, y), (x, y + 16), (x, y + 32) of a swizzled map; element e of box i is i * 10000 + e + 1,
// from shared memory `from` bytes behind its start (a multiple of 128). What lies outside of the tensor is not written.
// Dynamic shared memory: from + 2048.
struct TmaStoreArgs {
  TensorMap map;
  int x, y;
  u32 from, unused[13];
};
KERNEL(conformance_tma_store, TmaStoreArgs, 128, 1) {
  DYN_SHARED(bytes);
  const u32 base = shared_address(bytes);
  for (u32 i = 0; i < 3; i++) {
    if (threadIdx.x == 0) bulk_wait_read<0>();
    __syncthreads();
    for (u32 e = threadIdx.x; e < 512; e += 128) {
      u32 at = args.from + e * 4, v = i * 10000 + e * 2 + 1;
      store_shared(base + swizzled(at / 128, at % 128), v | (v + 1) << 16);
    }
    fence_async();
    __syncthreads();
    if (threadIdx.x == 0) {
      tma_store_2d(&args.map, base + args.from, args.x, args.y + (int)i * 16);
      bulk_commit();
    }
  }
  if (threadIdx.x == 0) bulk_wait<0>();
}

// d [64][N] = a [64][64] b [64][N] in four products of 16 k. The operands come as images of shared memory, a in the first 8192
// bytes and b [N * 64] behind it: element (i, k) of an operand with K contiguous is at byte swizzled(i, 2 k), with the other
// index contiguous at i / 64 * 8192 + swizzled(k, i % 64 * 2). In kernels with `registers` in their name a comes from `a`
// [64][64] instead. Error at most 128 * 2^-23 * sum |a b|. Dynamic shared memory: 8192 + N * 128.
struct WgmmaArgs {
  const u32* image;
  const u16* a;
  float* d;
};
template <int N>
DEV void load_image(const WgmmaArgs& args, u32 base) {
  for (u32 i = threadIdx.x; i < (8192 + N * 128) / 4; i += 128) store_shared(base + i * 4, args.image[i]);
  fence_async();
  __syncthreads();
}
template <Major M>
DEV u64 operand(u32 at) {
  return M == Major::K ? wgmma_operand_k(at) : wgmma_operand_other(at, 8192);
}
template <Major M>
DEV u64 next_k(u64 operand) {
  return wgmma_advance(operand, M == Major::K ? 32 : 2048);
}
template <int N>
DEV void store_sums(float* to, const float (&sums)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 2; i++)
    to[(warp() * 16 + lane() / 4 + i / 2 % 2 * 8) * N + i / 4 * 8 + lane() % 4 * 2 + i % 2] = sums[i];
}
template <int N, Major A, Major B>
DEV void multiply_shared(const WgmmaArgs& args, const char* bytes) {
  const u32 base = shared_address(bytes);
  load_image<N>(args, base);
  float sums[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; i++) sums[i] = 7.0f;  // to be ignored: the first product starts from zero
  u64 a = operand<A>(base), b = operand<B>(base + 8192);
  wgmma_hold(sums);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; k++) {
    wgmma<A, B>(sums, a, b, k == 0 ? Start::Zero : Start::Continue);
    a = next_k<A>(a), b = next_k<B>(b);
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_hold(sums);
  store_sums<N>(args.d, sums);
}
template <int N, Major B>
DEV void multiply_registers(const WgmmaArgs& args, const char* bytes) {
  const u32 base = shared_address(bytes);
  load_image<N>(args, base);
  float sums[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; i++) sums[i] = 7.0f;
  u64 b = operand<B>(base + 8192);
#pragma unroll
  for (int k = 0; k < 4; k++) {
    u32 a[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int row = warp() * 16 + lane() / 4 + i % 2 * 8, column = k * 16 + lane() % 4 * 2 + i / 2 * 8;
      a[i] = args.a[row * 64 + column] | (u32)args.a[row * 64 + column + 1] << 16;
    }
    wgmma_hold(sums);
    wgmma_fence();
    wgmma<B>(sums, a, b, k == 0 ? Start::Zero : Start::Continue);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(sums);
    b = next_k<B>(b);
  }
  store_sums<N>(args.d, sums);
}
#define PRODUCT(N, name, product)                          \
  KERNEL(conformance_wgmma_##N##_##name, WgmmaArgs, 128, 1) { \
    DYN_SHARED(bytes);                                     \
    product(args, bytes);                                  \
  }
#define PRODUCTS(N)                                                          \
  PRODUCT(N, k_k, (multiply_shared<N, Major::K, Major::K>))                  \
  PRODUCT(N, k_other, (multiply_shared<N, Major::K, Major::Other>))          \
  PRODUCT(N, other_k, (multiply_shared<N, Major::Other, Major::K>))          \
  PRODUCT(N, other_other, (multiply_shared<N, Major::Other, Major::Other>))  \
  PRODUCT(N, registers_k, (multiply_registers<N, Major::K>))                 \
  PRODUCT(N, registers_other, (multiply_registers<N, Major::Other>))
PRODUCTS(64)
PRODUCTS(128)
PRODUCTS(256)

// The same with operands that are not swizzled: element (i, k) of one is at byte at + k / 8 * run + i / 8 * group of the image,
// and from there row * 16 + column * 2, the row being i % 8 and the column k % 8 where K is contiguous, else the other way
// round. `bytes` of the image; a begins it. Dynamic shared memory: bytes.
struct PlainWgmmaArgs {
  const u32* image;
  const u16* a;
  float* d;
  u32 bytes, a_run, a_group, b_at, b_run, b_group;
};
DEV u32 load_plain_image(const PlainWgmmaArgs& args, const char* bytes) {
  const u32 base = shared_address(bytes);
  for (u32 i = threadIdx.x; i < args.bytes / 4; i += 128) store_shared(base + i * 4, args.image[i]);
  fence_async();
  __syncthreads();
  return base;
}
KERNEL(conformance_wgmma_112_plain, PlainWgmmaArgs, 128, 1) {
  DYN_SHARED(bytes);
  const u32 base = load_plain_image(args, bytes);
  float sums[56];
#pragma unroll
  for (int i = 0; i < 56; i++) sums[i] = 7.0f;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    wgmma_hold(sums);
    wgmma_fence();
    wgmma<Major::K, Major::K>(sums, wgmma_operand_plain(base + 2 * k * args.a_run, args.a_run, args.a_group),
                              wgmma_operand_plain(base + args.b_at + 2 * k * args.b_run, args.b_run, args.b_group),
                              k == 0 ? Start::Zero : Start::Continue);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(sums);
  }
  store_sums<112>(args.d, sums);
}
KERNEL(conformance_wgmma_56_plain, PlainWgmmaArgs, 128, 1) {
  DYN_SHARED(bytes);
  const u32 base = load_plain_image(args, bytes);
  float sums[28];
#pragma unroll
  for (int i = 0; i < 28; i++) sums[i] = 7.0f;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    u32 a[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int row = warp() * 16 + lane() / 4 + i % 2 * 8, column = k * 16 + lane() % 4 * 2 + i / 2 * 8;
      a[i] = args.a[row * 64 + column] | (u32)args.a[row * 64 + column + 1] << 16;
    }
    wgmma_hold(sums);
    wgmma_fence();
    wgmma<Major::Other>(sums, a, wgmma_operand_plain(base + args.b_at + 2 * k * args.b_run, args.b_run, args.b_group),
                        k == 0 ? Start::Zero : Start::Continue);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(sums);
  }
  store_sums<56>(args.d, sums);
}

// Of pairs x [n] and y [n] of 16-bit numbers: sum and larger one as bf16, smaller one as integers, and the signs of x.
struct PairsArgs {
  const u32 *x, *y;
  u32 *sum, *larger, *smaller, *signs;
  u64 n;
};
KERNEL(conformance_pairs, PairsArgs, 128, 1) {
  for (u32 i = threadIdx.x; i < args.n; i += 128) {
    args.sum[i] = add_bf16x2(args.x[i], args.y[i]);
    args.larger[i] = max_nan_bf16x2(args.x[i], args.y[i]);
    args.smaller[i] = min_u16x2(args.x[i], args.y[i]);
    args.signs[i] = spread_signs(args.x[i]);
  }
}

// bits [n]: of the first n of `half`, of every third number alone, from no address for the others; `pairs` = single [2][n].
struct LoadsArgs {
  const bf16* half;
  const float* single;
  u32* bits;
  float2* pairs;
  u64 n;
};
KERNEL(conformance_loads, LoadsArgs, 128, 1) {
  for (u32 i = threadIdx.x; i < args.n; i += 128) {
    bool there = i % 3 == 0;
    args.bits[i] = load_bits_or_zero(there ? args.half + i : nullptr, there ? Fill::Copy : Fill::Zero);
    args.pairs[i] = load_pair_nc(args.single + i * 2);
  }
}

// Every function of device.h alone, against plain arithmetic on the host: src/cuda/conformance.rs has the other side and
// runs on whatever device there is. What is right in the emulator and here on a GPU means the same on both. Each kernel is
// launched with one block, unless it says otherwise.
#include "device.h"

// d[16][8] = a[16][16] b[16][8], all row-major, a from shared memory by ldmatrix, b by ldmatrix.trans. Error at most that of
// a sum of 16 products in f32: the products of two bf16 are exact, and tensor cores may cut off what an addition drops, so
// 32 * 2^-23 * sum |a b|.
struct MmaArgs {
  const bf16 *a, *b;
  float* d;
};
DEV void copy_rows(bf16 (&to)[16][24], const bf16* from, int columns) {
  int chunks = columns / 8;
  for (int i = lane(); i < 16 * chunks; i += 32) cp_async16(&to[i / chunks][i % chunks * 8], from + i * 8);
}
DEV void store_product(float* d, const float (&product)[4]) {
  for (int i = 0; i < 4; i++) d[(lane() / 4 + i / 2 * 8) * 8 + lane() % 4 * 2 + i % 2] = product[i];
}
KERNEL(conformance_mma, MmaArgs, 32, 1) {
  SHARED(bf16, a, [16][24]);
  SHARED(bf16, b, [16][24]);
  copy_rows(a, args.a, 16);
  copy_rows(b, args.b, 8);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  u32 left[4], right[4];
  ldmatrix_x4(left, &a[lane() % 16][lane() / 16 * 8]);
  ldmatrix_x4_trans(right, &b[lane() % 16][0]);
  u32 pair[2] = {right[0], right[1]};
  float product[4] = {};
  mma_m16n8k16(product, left, pair);
  store_product(args.d, product);
}

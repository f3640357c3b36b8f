// Crop, flip, normalise and cut: one thread a pixel of the result.
#include "device.h"

template <class T>
struct AugmentArgs {
  const u8* images;
  const int* draws;  // [n][3]: row, column, mirrored
  T* x;
  u64 pixels;
  u32 h, w, grid, patch;
  float table[256][3];  // each byte normalised, as T has it: exactly the host's
};

template <class T>
DEV void augment(const AugmentArgs<T>& args) {
  // Bytes differ from thread to thread, which arguments, read from the constant cache, are slow at.
  SHARED(float, table, [256 * 3]);
  for (int i = threadIdx.x; i < 256 * 3; i += blockDim.x) table[i] = args.table[i / 3][i % 3];
  __syncthreads();
  u64 pixel = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (pixel >= args.pixels) return;
  u32 patch = args.patch, side = args.grid * patch;
  u64 line = pixel / patch;  // of all patches, one after the other
  u32 j = (u32)(pixel % patch), i = (u32)(line % patch), place = (u32)(line / patch % (args.grid * args.grid));
  u64 n = line / patch / (args.grid * args.grid);
  const int* draws = args.draws + 3 * n;
  long long row = place / args.grid * patch + i, column = place % args.grid * patch + j;
  row += draws[0];
  column = draws[2] == 0 ? (long long)draws[1] + column : (long long)draws[1] + side - 1 - column;
  bool inside = row >= 0 && row < args.h && column >= 0 && column < args.w;
  const u8* from = args.images + ((n * args.h + (inside ? row : 0)) * args.w + (inside ? column : 0)) * 3;
#pragma unroll
  for (int k = 0; k < 3; k++) args.x[pixel * 3 + k] = from_float<T>(table[(inside ? from[k] : 0) * 3 + k]);
}
KERNEL(augment_f32, AugmentArgs<float>, 256, 4) { augment(args); }
KERNEL(augment_bf16, AugmentArgs<bf16>, 256, 4) { augment(args); }

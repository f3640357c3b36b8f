// Crop, flip, normalise and cut: a thread a pixel of the result at a time.
#include "device.h"

template <class T>
struct AugmentArgs {
  const u8* images;
  const int* draws;  // [n][3]: row, column, mirrored
  T* x;
  u64 pixels;  // that 31 bits count
  u32 h, w, grid, patch;
  float table[256][3];  // each byte normalised, as T has it: exactly the host's
};

template <class T>
DEV void augment(const AugmentArgs<T>& args) {
  // Bytes differ from thread to thread, which arguments, read from the constant cache, are slow at; so slow that few blocks
  // copy the table, and take turn after turn.
  SHARED(float, table, [256 * 3]);
  for (int i = threadIdx.x; i < 256 * 3; i += blockDim.x) table[i] = args.table[i / 3][i % 3];
  __syncthreads();
  u32 patch = args.patch, side = args.grid * patch, places = args.grid * args.grid, pixels = (u32)args.pixels;
  for (u32 pixel = blockIdx.x * blockDim.x + threadIdx.x; pixel < pixels; pixel += gridDim.x * blockDim.x) {
    u32 line = pixel / patch, j = pixel - line * patch;  // of all patches, one after the other
    u32 of_all = line / patch, i = line - of_all * patch, n = of_all / places, place = of_all - n * places;
    u32 place_row = place / args.grid, place_column = place - place_row * args.grid;
    const int* draws = args.draws + 3 * (u64)n;
    long long row = place_row * patch + i, column = place_column * patch + j;
    row += draws[0];
    column = draws[2] == 0 ? (long long)draws[1] + column : (long long)draws[1] + side - 1 - column;
    bool inside = row >= 0 && row < args.h && column >= 0 && column < args.w;
    const u8* from = args.images + (((u64)n * args.h + (inside ? row : 0)) * args.w + (inside ? column : 0)) * 3;
    T* to = args.x + (u64)pixel * 3;
    u32 bytes[3];
#pragma unroll
    for (int k = 0; k < 3; k++) bytes[k] = from[k];
#pragma unroll
    for (int k = 0; k < 3; k++) to[k] = from_float<T>(table[(inside ? bytes[k] : 0) * 3 + k]);
  }
}
KERNEL(augment_f32, AugmentArgs<float>, 256, 6) { augment(args); }
KERNEL(augment_bf16, AugmentArgs<bf16>, 256, 6) { augment(args); }

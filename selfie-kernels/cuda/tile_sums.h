#pragma once
// Partial sums of a tile's channels, for operations that have a tile of stored values in registers: a block of 256 threads
// is 32 channels (the lanes) by 8 rows (the warps), and thread (lane, warp) has rows warp, warp + 8, .. of its channel.
#include "device.h"

static constexpr int TILE_ROWS = 128;
static constexpr int TILE_CHANNELS = 32;
static constexpr int TILE_THREADS = 256;
static constexpr int TILE_WARPS = TILE_THREADS / 32;
static constexpr int TILE_VALUES = TILE_ROWS / TILE_WARPS;  // rows of a thread

// Sum over the warps, in their order; every thread gets its channel's. Holds two barriers.
DEV float sum_over_rows(float v) {
  SHARED(float, sums, [TILE_WARPS][TILE_CHANNELS]);
  sums[warp()][lane()] = v;
  __syncthreads();
  float sum = sums[0][lane()];
#pragma unroll
  for (int w = 1; w < TILE_WARPS; w++) sum += sums[w][lane()];
  __syncthreads();
  return sum;
}

// Mean, and sum of squared deviations from that mean, of `rows` values, those of the thread in v. The deviations' own sum
// corrects the mean, so that no digits are lost where |mean| is far above the spread (as cpu/sums.rs does).
struct TileStats {
  float mean, squares;
};
DEV TileStats tile_stats(const float (&v)[TILE_VALUES], int rows) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < TILE_VALUES; i++) sum += warp() + i * TILE_WARPS < rows ? v[i] : 0.0f;
  float count = (float)rows, mean = sum_over_rows(sum) / count, rest = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < TILE_VALUES; i++) {
    float deviation = warp() + i * TILE_WARPS < rows ? v[i] - mean : 0.0f;
    rest += deviation;
    squares = fmaf(deviation, deviation, squares);
  }
  rest = sum_over_rows(rest);
  squares = sum_over_rows(squares);
  // Deviations from the mean as it is stored: sum (x - m - d)^2 = sum (x - m)^2 + d (rows d - 2 sum (x - m)).
  float corrected = mean + rest / count, moved = corrected - mean;
  return {corrected, relu(squares + moved * fmaf(count, moved, -2.0f * rest))};
}

#pragma once
// Sums over rows, one or more for each column: blocks of 256 threads take 32 columns of a part of the rows, each of the
// eight warps every eighth row. ColumnSums in src/cuda cuts.
#include "device.h"

struct ColumnPart {
  u32 block, part, parts;
  u32 row, row_end;
  u32 column;
  bool inside;  // whether the thread has a column
};

DEV ColumnPart column_part(u32 rows, u32 columns, u32 part_rows) {
  u32 blocks = ceil_div(columns, 32u), parts = ceil_div(rows, part_rows);
  u32 block = blockIdx.x % blocks, part = blockIdx.x / blocks, column = block * 32 + (u32)lane();
  return {block, part, parts, part * part_rows, min(rows, (part + 1) * part_rows), column, column < columns};
}

// The sums of eight warps in their order; the first warp has them.
template <int SUMS>
DEV void add_warps(float (&sum)[SUMS]) {
  SHARED(float, warps, [8][SUMS][32]);
#pragma unroll
  for (int i = 0; i < SUMS; i++) warps[warp()][i][lane()] = sum[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < SUMS; i++) {
    sum[i] = warps[0][i][lane()];
#pragma unroll
    for (int w = 1; w < 8; w++) sum[i] += warps[w][i][lane()];
  }
}

// Adds up the warps' sums into parts[part][i * columns + column]; the block that comes last for its columns adds the parts in
// their order, in f64, into totals[i * columns + column]. With one part `parts` is `totals`, and no ticket is drawn.
template <int SUMS>
DEV void add_parts(const ColumnPart& at, float (&sum)[SUMS], float* parts, float* totals, u32 columns, u32* tickets) {
  add_warps(sum);
  u64 stride = (u64)SUMS * columns;
  bool mine = warp() == 0 && at.inside;
#pragma unroll
  for (int i = 0; i < SUMS; i++)
    if (mine) parts[at.part * stride + (u64)i * columns + at.column] = sum[i];
  if (at.parts == 1 || !last_block(tickets + at.block, at.parts) || !mine) return;
#pragma unroll
  for (int i = 0; i < SUMS; i++) {
    double total = 0.0;
#pragma unroll 4
    for (u32 part = 0; part < at.parts; part++) total += (double)parts[part * stride + (u64)i * columns + at.column];
    totals[(u64)i * columns + at.column] = (float)total;
  }
}

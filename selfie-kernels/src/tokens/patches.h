#pragma once
// Patches of an image, their order, and what their position embeddings are made of; PatchDims on the host.
#include "device.h"

#include "chunks.h"

enum class Positions : u32 { Table, RowCol };
enum class Queries : u32 { Summary, Places };

struct Patches {
  const u32* order;  // [b][n]: the first `hidden` are hidden
  u32 b, grid, hidden, d;
  Positions positions;
  Queries queries;
};

DEV u32 patches_of(const Patches& p) { return p.grid * p.grid; }
// Tokens of an image that ask, the first ones.
DEV u32 queries_of(const Patches& p) { return p.queries == Queries::Summary ? 1 : p.hidden; }
DEV u32 tokens_of(const Patches& p) { return queries_of(p) + patches_of(p) - p.hidden; }

// Features j .. + N of the embedding of a place; parameters [n][d] or [2][grid][d].
template <int N>
DEV void position(const Patches& p, const float* parameters, u32 place, u32 j, float (&v)[N]) {
  if (p.positions == Positions::Table) return load_chunk(parameters + (u64)place * p.d + j, v);
  float column[N];
  load_chunk(parameters + (u64)(place / p.grid) * p.d + j, v);
  load_chunk(parameters + (u64)(p.grid + place % p.grid) * p.d + j, column);
#pragma unroll
  for (int i = 0; i < N; i++) v[i] += column[i];
}

// Rows of the parameters.
DEV u32 position_rows(const Patches& p) { return p.positions == Positions::Table ? patches_of(p) : 2 * p.grid; }
// How many places use one of them.
DEV u32 uses_of_row(const Patches& p) { return p.positions == Positions::Table ? 1 : p.grid; }
// The place that is a row's `use`-th.
DEV u32 place_of_use(const Patches& p, u32 row, u32 use) {
  if (p.positions == Positions::Table) return row;
  return row < p.grid ? row * p.grid + use : use * p.grid + row - p.grid;
}

// Where a place stands in an image's order, of which the first `end` are looked at; `end` if it does not.
DEV u32 slot_of(const Patches& p, u32 image, u32 place, u32 end) {
  const u32* order = p.order + (u64)image * patches_of(p);
  u32 slot = end;
  for (u32 i = 0; i < end; i++)
    if (order[i] == place) slot = i;
  return slot;
}

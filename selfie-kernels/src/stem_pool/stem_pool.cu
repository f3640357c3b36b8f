// The large stem: a convolution with 3x3 max pooling of stride 2 behind it, and the filter's gradient from that of the pooled
// map. For 7x7 with stride 2 there are kernels on the tensor cores in which the map between the two is never stored. What they
// refuse goes by stem_conv.cu and the plain pooling here, through a map in memory.
#include "filter_gradient.h"
#include "tile_sums.h"

// ---- Plain pooling: a block makes 128 pixels of 32 channels, and their statistics while it has them.

// Of a tile, to stats[tile][2][c]; all threads call it.
DEV void store_stats(const float (&v)[TILE_VALUES], int rows, u32 channel, float* stats, u32 channels) {
  TileStats tile = tile_stats(v, rows);
  if (warp() > 0 || channel >= channels) return;
  float* to = stats + (u64)blockIdx.x * 2 * channels + channel;
  to[0] = tile.mean;
  to[channels] = tile.squares;
}

template <class T>
struct PoolArgs {
  const T* x;
  T* y;
  u8* argmax;
  float* stats;  // [tiles][2][c]; null: none
  u64 rows;
  u32 h, w, c, p, q, unused;
};

// Maximum and winner of the window of output pixel `row`; a NaN wins, and of equal values the first.
template <class T>
DEV float window_max(const PoolArgs<T>& args, u64 row, u32 k, u8& winner) {
  int j = (int)(row % args.q), i = (int)(row / args.q % args.p);
  u64 image = row / args.q / args.p;
  float best = -INFINITY;
  bool none = true;
  for (int tap = 0; tap < 9; tap++) {
    int y = 2 * i + tap / 3 - 1, x = 2 * j + tap % 3 - 1;
    if (y < 0 || y >= (int)args.h || x < 0 || x >= (int)args.w) continue;
    float v = to_float(args.x[((image * args.h + y) * args.w + x) * args.c + k]);
    if (none || v > best || isnan(v)) best = v, winner = (u8)tap;
    none = false;
  }
  return best;
}

template <class T>
DEV void pool(const PoolArgs<T>& args) {
  u64 first = (u64)blockIdx.x * TILE_ROWS;
  u32 k = blockIdx.y * TILE_CHANNELS + lane();
  int rows = (int)min((u64)TILE_ROWS, args.rows - first);
  float v[TILE_VALUES];
#pragma unroll
  for (int i = 0; i < TILE_VALUES; i++) {
    int row = warp() + i * TILE_WARPS;
    v[i] = 0.0f;
    if (row >= rows || k >= args.c) continue;
    u64 at = (first + row) * args.c + k;
    u8 winner = 0;
    v[i] = window_max(args, first + row, k, winner);
    args.y[at] = from_float<T>(v[i]);
    args.argmax[at] = winner;
  }
  if (args.stats) store_stats(v, rows, k, args.stats, args.c);
}
KERNEL(stem_pool_pool_f32, PoolArgs<float>, TILE_THREADS, 2) { pool(args); }
KERNEL(stem_pool_pool_bf16, PoolArgs<bf16>, TILE_THREADS, 2) { pool(args); }

template <class T>
struct UnpoolArgs {
  const T *dy, *x;    // x: null for a plain gradient
  const float* coef;  // [3][c]
  const u8* argmax;
  T* dx;
  u64 len;
  u32 h, w, c, p, q, unused;
};

// One thread an input element: it gathers from the windows that it lies in, in the CPU's order, and adds where it won.
template <class T>
DEV void unpool(const UnpoolArgs<T>& args) {
  u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= args.len) return;
  u32 k = (u32)(at % args.c);
  u64 pixel = at / args.c;
  u32 j = (u32)(pixel % args.w), i = (u32)(pixel / args.w % args.h);
  u64 image = pixel / args.w / args.h;
  float a = 0.0f, b = 0.0f, c = 0.0f, sum = 0.0f;
  if (args.x) a = args.coef[k], b = args.coef[args.c + k], c = args.coef[2 * args.c + k];
  // Along a side, an even position is the middle of a window (tap 1); an odd one is the end of a window (tap 2) and, but
  // for the map's last, the start of the next (tap 0).
  for (u32 down = 0; down <= i % 2; down++) {
    for (u32 right = 0; right <= j % 2; right++) {
      u32 p = i / 2 + down, q = j / 2 + right;
      if (p >= args.p || q >= args.q) continue;
      u32 r = down ? 0 : 1 + i % 2, s = right ? 0 : 1 + j % 2;
      u64 window = ((image * args.p + p) * args.q + q) * args.c + k;
      if (args.argmax[window] != 3 * r + s) continue;
      float dy = to_float(args.dy[window]);
      sum += args.x ? affine_grad(dy, to_float(args.x[window]), a, b, c) : dy;
    }
  }
  args.dx[at] = from_float<T>(sum);
}
KERNEL(stem_pool_unpool_f32, UnpoolArgs<float>, 256, 4) { unpool(args); }
KERNEL(stem_pool_unpool_bf16, UnpoolArgs<bf16>, 256, 4) { unpool(args); }

// Statistics of the pooled map as it is stored, behind the kernel that does not have a tile of it at once.
struct StatsArgs {
  const bf16* y;  // [rows, c]
  float* stats;   // [tiles][2][c]
  u64 rows;
  u32 c, unused;
};
KERNEL(stem_pool_stats_bf16, StatsArgs, TILE_THREADS, 2) {
  u64 first = (u64)blockIdx.x * TILE_ROWS;
  u32 k = blockIdx.y * TILE_CHANNELS + lane();
  int rows = (int)min((u64)TILE_ROWS, args.rows - first);
  float v[TILE_VALUES];
#pragma unroll
  for (int i = 0; i < TILE_VALUES; i++) {
    int row = warp() + i * TILE_WARPS;
    v[i] = row < rows && k < args.c ? to_float(args.y[(first + row) * args.c + k]) : 0.0f;
  }
  store_stats(v, rows, k, args.stats, args.c);
}

// ---- On the tensor cores. A block takes rows of the pooled map, one after the other, image by image; those of the input that
// they need go through a ring in shared memory, each read once. There a pixel has four channels, the fourth zero, so that two
// are 16 bytes and the window of a column of the convolution, eight pixels of which the first is not the filter's, begins 16
// bytes behind that of the column before: the products take their operands as they lie.

// Filters of a block, rows and columns of a window (with the pixel before it), channels of a pixel.
static constexpr int FILTERS = 64, SIDE = 7, UNITS = 4, CHANNELS = 3;
static constexpr int THREADS = 256;
// Columns of a tile of products.
static constexpr int TILE = 16;

// How the pixels are cut; a map is a group of images, or a segment of it.
struct Stream {
  const bf16* x;         // [n, h, w, 3]; w is even
  int n, h, w, k;        // k: filters
  int p, q;              // of the convolution's map
  int rows, columns;     // of the pooled map
  int slots, segments;   // images side by side; parts of a row that is too long
  int step;              // columns of the convolution's map from one segment to the next
  int width, pairs;      // columns of a slot; pairs of pixels that they read, width + 3
  int tiles;             // of a slot; in the forward pass they overlap

  DEV_MEMBER int all_rows() const { return ceil_div(n, slots) * segments * rows; }
  DEV_MEMBER int segment(int map) const { return segments == 1 ? 0 : map % segments; }
  // The first one; past the last map there is none.
  DEV_MEMBER int image(int map) const { return (segments == 1 ? map : map / segments) * slots; }
  DEV_MEMBER int first_column(int map) const { return segment(map) * step; }
};

// Rows of a pooled row's windows, of what is loaded from there on, and of the ring. The rows of a map, padding included, are
// 4 * rows + 5, so the next pooled row's begin 4 or, in the next map, 9 rows on. The forward pass may begin 2 rows before.
static constexpr int WINDOW_ROWS = 9, AHEAD = 2 * WINDOW_ROWS, RING = AHEAD + 2;
DEV int ring_row(int row) { return row >= RING ? row - RING : row; }

// The input's way to shared memory: two pixels at a time, every fourth row by two warps.
struct Pixels {
  static constexpr int ROWS = THREADS / 64;
  // Two pixels on the way, and where in the ring they go, in bytes; -1: nowhere.
  struct Pair {
    int to;
    u32 words[3];
  };

  const Stream& stream;
  char* ring;
  int across;     // pairs of a row
  int row, slot;  // this thread's next row, counted from the block's first one; where it lies in the ring
  int map, y;     // what it is: a map's row of the image, which may lie in the padding
  int column;     // pair

  DEV_MEMBER Pixels(const Stream& stream, char* ring) : stream(stream), ring(ring), across(stream.slots * stream.pairs) {}

  DEV_MEMBER int first() const { return warp() % 2 * 32 + lane(); }
  DEV_MEMBER void wrap() {
    if (y > 4 * stream.rows + 1) y -= 4 * stream.rows + 5, map++;
  }
  DEV_MEMBER void begin(int first_map, int top) {
    row = slot = warp() / 2;
    map = first_map, y = top + row, column = first();
    wrap();
  }

  DEV_MEMBER Pair next(int end) {
    Pair pair = {-1, {0, 0, 0}};
    if (row >= end) return pair;
    if (column < across) {
      pair.to = (slot * across + column) * 16;
      int aside = stream.slots == 1 ? 0 : column / stream.pairs, image = stream.image(map) + aside;
      int x = stream.first_column(map) - 2 + column - aside * stream.pairs;
      if (image < stream.n && (u32)y < (u32)stream.h && (u32)x < (u32)stream.w / 2) {
        const bf16* pixels = stream.x + (((size_t)image * stream.h + y) * stream.w + 2 * x) * CHANNELS;
#pragma unroll
        for (int i = 0; i < 3; i++) pair.words[i] = ((const u32*)pixels)[i];
      }
    }
    column += 64;
    if (column >= across) {
      column = first(), row += ROWS, slot = ring_row(slot + ROWS), y += ROWS;
      wrap();
    }
    return pair;
  }

  DEV_MEMBER void put(const Pair& pair) const {
    u32 a = pair.words[0], b = pair.words[1], c = pair.words[2];
    if (pair.to >= 0) store16(ring + pair.to, {a, b & 0xffff, b >> 16 | c << 16, c >> 16});
  }

  // What is left of the rows before `end`, several loads at a time.
  DEV_MEMBER void finish(int end) {
    while (row < end) {
      Pair pairs[4];
#pragma unroll
      for (int i = 0; i < 4; i++) pairs[i] = next(end);
#pragma unroll
      for (int i = 0; i < 4; i++) put(pairs[i]);
    }
  }
};

// A pooled row of the stream, and where its windows begin in the ring.
struct Cursor {
  int map, y;
  int row, slot;  // counted from the block's first row; in the ring

  DEV_MEMBER void advance(const Stream& stream) {
    bool last = y == stream.rows - 1;
    int rows = last ? WINDOW_ROWS : 4;
    map += last, y = last ? 0 : y + 1, row += rows, slot = ring_row(slot + rows);
  }
};

// ---- Forward: 8 warps are 2 halves of the filters by 4 pairs of tiles. A tile's 16 columns are those of 7 pooled ones, which
// share one with the tile before; a row's first tile has 8.

struct ForwardArgs {
  Stream stream;
  const bf16* w;  // [k, 7, 7, 3]
  bf16* y;
  u8* argmax;
};

// A bf16 in the upper half as an integer of the same order, with both zeros equal and NaN, of which rounding makes only
// 0x7fff, above all. The lower half is free for what decides between equal ones: 8 - tap.
DEV int order(u32 bits) {
  int sign = (int)bits >> 31;
  return ((int)(bits & 0x7fff0000u) ^ sign) - sign;
}
DEV u32 unorder(int key) {
  int high = key & (int)0xffff0000u, sign = high >> 31;
  return (u32)((high ^ sign) - sign) | ((u32)sign & 0x80000000u);
}
static constexpr int NONE = (int)0x80000000u;

struct FusedForward {
  static constexpr int WARPS = THREADS / 32, HALF = FILTERS / 2, TILES = 8, STEPS = SIDE * 2;  // 16 weights are four pixels
  static constexpr int STAGE_BYTES = HALF * 4 + 32, STAGE = TILE * STAGE_BYTES;

  const ForwardArgs& args;
  Pixels pixels;
  char* stage;
  int pitch;         // bytes of a row in the ring
  int first_filter;  // of this warp
  u32 filters[STEPS][4][2];
  int windows[2];  // bytes from the begin of a row, of this lane's column of each tile
  float sums[2][4][4];
  int best[2][4][4];  // of the rows so far of each window

  DEV_MEMBER FusedForward(const ForwardArgs& args, char* shared)
      : args(args), pixels(args.stream, shared + WARPS * STAGE), stage(shared + warp() * STAGE) {
    pitch = pixels.across * 16;
    first_filter = (int)blockIdx.y * FILTERS + warp() % 2 * HALF;
#pragma unroll
    for (int m = 0; m < 2; m++) {
      int slot = tile(m) / args.stream.tiles, i = tile(m) % args.stream.tiles, first = i == 0 ? 0 : 14 * i + 1;
      if (slot >= args.stream.slots) slot = 0;
      int at = min(first + lane() % TILE, args.stream.width - 1);
      windows[m] = (slot * args.stream.pairs + at + lane() / TILE) * 16;
    }
  }

  DEV_MEMBER static int tile(int m) { return warp() / 2 * 2 + m; }

  DEV_MEMBER void load_filters() {
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
      for (int n = 0; n < 4; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          int pixel = step % 2 * 4 + i * 2 + lane() % 4 / 2, channel = lane() % 2 * 2;
          int filter = first_filter + n * 8 + lane() / 4;
          u32 pair = 0;
          if (pixel > 0 && filter < args.stream.k) {
            const bf16* w = args.w + (((size_t)filter * SIDE + step / 2) * SIDE + pixel - 1) * CHANNELS;
            pair = channel == 0 ? (u32)w[0].bits | (u32)w[1].bits << 16 : (u32)w[2].bits;
          }
          filters[step][n][i] = pair;
        }
  }

  // A row of the convolution, whose windows begin at row `slot` of the ring.
  DEV_MEMBER void multiply(int slot) {
#pragma unroll
    for (int i = 0; i < 32; i++) sums[i / 16][i / 4 % 4][i % 4] = 0.0f;
    u32 a[2][2][4];
    const char* row = pixels.ring + slot * pitch;
#pragma unroll
    for (int m = 0; m < 2; m++) ldmatrix_x4(a[0][m], row + windows[m]);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      if (step % 2 == 1) slot = ring_row(slot + 1), row = pixels.ring + slot * pitch;
      if (step + 1 < STEPS)
#pragma unroll
        for (int m = 0; m < 2; m++) ldmatrix_x4(a[(step + 1) % 2][m], row + windows[m] + (step + 1) % 2 * 32);
#pragma unroll
      for (int m = 0; m < 2; m++) {
        // The pixel before the window: its weights are zero, but that would not stop a NaN.
        if (step % 2 == 0 && lane() % 4 < 2) a[0][m][0] = a[0][m][1] = 0;
#pragma unroll
        for (int n = 0; n < 4; n++) mma_m16n8k16(sums[m][n], a[step % 2][m], filters[step][n]);
      }
    }
  }

  // The sums as they are rounded, two neighbouring filters each.
  DEV_MEMBER void keys(int m, int i, int& left, int& right) const {
    u32 pair = pack_bf16x2(sums[m][i / 2][i % 2 * 2], sums[m][i / 2][i % 2 * 2 + 1]);
    left = order(pair << 16), right = order(pair & 0xffff0000u);
  }

  // The middle row of the windows.
  DEV_MEMBER void take_middle() {
#pragma unroll
    for (int i = 0; i < 16; i++) {
      int left, right, *to = &best[i / 8][i % 8 / 2][i % 2 * 2];
      keys(i / 8, i % 8, left, right);
      to[0] = max(to[0], left + 3), to[1] = max(to[1], right + 3);
    }
  }

  // The last row, which is the first one of the windows below; the windows are full then.
  enum class Row { Inside, Outside };
  DEV_MEMBER void take_last(int m, Row row) {
    char* to = stage + lane() / 4 * STAGE_BYTES + lane() % 4 * 8;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      int left, right, *kept = &best[m][i / 2][i % 2 * 2];
      keys(m, i, left, right);
      bool inside = row == Row::Inside;
      u32x2 full = {(u32)(inside ? max(kept[0], left) : kept[0]), (u32)(inside ? max(kept[1], right) : kept[1])};
      *(u32x2*)(to + i % 2 * 8 * STAGE_BYTES + i / 2 * 32) = full;
      kept[0] = left + 6, kept[1] = right + 6;
    }
  }

  // Pools a tile's columns, and stores 4 filters of a pooled pixel a lane, 4 pixels at a time.
  DEV_MEMBER void store(const Cursor& at, int m) const {
    const Stream& d = args.stream;
    int slot = tile(m) / d.tiles, image = d.image(at.map) + slot, filter = first_filter + lane() % 8 * 4;
    int segment = d.segment(at.map), i = tile(m) % d.tiles;
    // The first tile of a row has no column before it, that of a later segment two.
    int first = 7 * (segment * TILES + i) + (segment + i > 0), count = segment + i == 0 ? 8 : 7;
    int middle = segment + i == 0 ? 0 : i == 0 ? 2 : 1;
    bool there = slot < d.slots && image < d.n && filter < d.k;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int o = half * 4 + lane() / 8, column = first + o;
      if (!there || o >= count || column >= d.columns) continue;
      const char* keys = stage + (2 * o + middle) * STAGE_BYTES + lane() % 8 * 16;
      bool left = column > 0, right = 2 * column + 1 < d.q;
      u32x4 none = {(u32)NONE, (u32)NONE, (u32)NONE, (u32)NONE};
      u32x4 before = left ? load16(keys - STAGE_BYTES) : none, at_it = load16(keys);
      u32x4 behind = right ? load16(keys + STAGE_BYTES) : none;
      u32 l[4] = {before.x, before.y, before.z, before.w}, c[4] = {at_it.x, at_it.y, at_it.z, at_it.w};
      u32 r[4] = {behind.x, behind.y, behind.z, behind.w}, values[4], taps = 0;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int most = max(max((int)l[j] + 2, (int)c[j] + 1), (int)r[j]);
        taps |= (8 - ((u32)most & 15)) << j * 8;
        values[j] = unorder(most);
      }
      size_t to = (((size_t)image * d.rows + at.y) * d.columns + column) * d.k + filter;
      *(u32x2*)(args.y + to) = {values[0] >> 16 | values[1], values[2] >> 16 | values[3]};
      *(u32*)(args.argmax + to) = taps;
    }
  }

  // Pooled rows begin .. end of the stream.
  DEV_MEMBER void run(int begin, int end) {
    const Stream& d = args.stream;
    int y = begin % d.rows, above = y > 0 ? 2 : 0;
    Cursor at = {begin / d.rows, y, above, above};
    pixels.begin(at.map, 4 * y - 3 - above);
    pixels.finish(at.row + AHEAD);
    load_filters();
    __syncthreads();
    for (int g = begin; g < end; g++) {
      if (at.y == 0 || g == begin) {
#pragma unroll
        for (int i = 0; i < 32; i++) best[i / 16][i / 4 % 4][i % 4] = NONE;
      }
      // Rows of the convolution: 2 y and 2 y + 1; and before a block's first ones, the one above that they share windows with.
#pragma unroll 1
      for (int part = g == begin && at.y > 0 ? -1 : 0; part < 2; part++) {
        Pixels::Pair next[2] = {pixels.next(at.row + AHEAD), pixels.next(at.row + AHEAD)};
        multiply(part < 0 ? at.slot - 2 : ring_row(at.slot + 2 * part));
        if (part == 0) take_middle();
        else {
#pragma unroll
          for (int m = 0; m < 2; m++) {
            take_last(m, 2 * at.y + part < d.p ? Row::Inside : Row::Outside);
            __syncwarp();  // the windows are staged
            if (part > 0) store(at, m);
            __syncwarp();
          }
        }
        pixels.put(next[0]), pixels.put(next[1]);
      }
      pixels.finish(at.row + AHEAD);
      at.advance(d);
      __syncthreads();  // the next rows are there, and those before this one free
    }
  }
};

// Blocks: ranges of pooled rows, tiles of filters.
KERNEL(stem_pool_forward_bf16, ForwardArgs, THREADS, 1) {
  DYN_SHARED(shared);
  int rows = args.stream.all_rows();
  FusedForward(args, shared)
      .run(split_begin(rows, (int)blockIdx.x, (int)gridDim.x), split_begin(rows, (int)blockIdx.x + 1, (int)gridDim.x));
}

// ---- The filter's gradient. The convolution's gradient is made of the pooled one in shared memory, two rows for each pooled
// row. M = 64 filters, N = units of two neighbouring pixels, K = columns. Of 8 warps each has 7 of the 28 units of a window,
// and one of the two rows.

struct FilterArgs {
  Stream stream;
  const bf16* dz;
  const bf16* grad_x;
  const float* coef;
  const u8* argmax;
  float* out;  // [splits, k, 7, 7, 3]
};

template <GradKind GRAD>
struct FusedFilter {
  static constexpr int COLUMNS = 128, POOLED = COLUMNS / 2, ITEMS = POOLED * 8 / THREADS;
  static constexpr int ALL_UNITS = SIDE * UNITS, EACH = ALL_UNITS / 4, LOADS = (EACH + 1) / 2, WIDTH = ALL_UNITS * 8;
  static constexpr int GRADS = 2 * COLUMNS * FILTERS * 2, DZ = POOLED * FILTERS * 2, ARGMAX = POOLED * FILTERS;
  static constexpr int WORK = GRADS + 2 * (DZ + ARGMAX);

  // Eight filters of a pooled pixel.
  struct Window {
    u32x4 dz, x;
    u32x2 argmax;
  };

  const FilterArgs& args;
  const float (&coef)[3][FILTERS];
  char *grads, *dz, *argmax;  // [2][COLUMNS][FILTERS], swizzled; [2][POOLED][FILTERS] of two pooled rows, by the row's parity
  Pixels pixels;
  int first_filter, chunk;
  int slots[ITEMS], columns[ITEMS];  // of this thread's pooled pixels
  float sums[4][EACH][4];

  DEV_MEMBER FusedFilter(const FilterArgs& args, const float (&coef)[3][FILTERS], char* shared)
      : args(args), coef(coef), grads(shared), dz(shared + GRADS), argmax(shared + GRADS + 2 * DZ),
        pixels(args.stream, shared + WORK) {
    first_filter = (int)blockIdx.y * FILTERS;
    chunk = (int)threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      int across = args.stream.tiles * TILE / 2;
      slots[i] = item(i) / across, columns[i] = item(i) % across;
    }
#pragma unroll
    for (int i = 0; i < 4 * EACH * 4; i++) sums[i / 4 / EACH][i / 4 % EACH][i % 4] = 0.0f;
  }
  DEV_MEMBER static int item(int i) { return (int)threadIdx.x / 8 + i * (THREADS / 8); }

  // Of row `g` of the stream. What does not exist was won by no pixel.
  DEV_MEMBER void load(Window (&windows)[ITEMS], int g) const {
    const Stream& d = args.stream;
    int map = g / d.rows, y = g % d.rows, filter = first_filter + chunk * 8;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      int image = d.image(map) + slots[i], column = d.first_column(map) / 2 + columns[i];
      windows[i] = {{0, 0, 0, 0}, {0, 0, 0, 0}, {0xffffffffu, 0xffffffffu}};
      if (slots[i] >= d.slots || image >= d.n || column >= d.columns || filter >= d.k) continue;
      size_t at = (((size_t)image * d.rows + y) * d.columns + column) * d.k + filter;
      windows[i].dz = load16_nc(args.dz + at);
      if (GRAD == GradKind::Affine) windows[i].x = load16_nc(args.grad_x + at);
      windows[i].argmax = *(const u32x2*)(args.argmax + at);
    }
  }

  DEV_MEMBER void put(const Window (&windows)[ITEMS], int g) const {
    AffineCoef8 affine;
    if (GRAD == GradKind::Affine) affine.load(&coef[0][0], chunk * 8, FILTERS);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      u32x4 v = windows[i].dz;
      if (GRAD == GradKind::Affine) v = affine.apply(v, windows[i].x);
      store16(dz + g % 2 * DZ + item(i) * (FILTERS * 2) + chunk * 16, v);
      *(u32x2*)(argmax + g % 2 * ARGMAX + item(i) * FILTERS + chunk * 8) = windows[i].argmax;
    }
  }

  // One filter's gradient of a window, where its winner is `tap`.
  DEV_MEMBER static float won(u32 dz, u32 argmax, int j, u32 tap) {
    u32 winner = argmax >> j * 8 & 255;
    return winner == tap ? (j % 2 == 0 ? bf16x2_low(dz) : bf16x2_high(dz)) : 0.0f;
  }

  // The gradients of pixels (2 y, 2 x), (2 y, 2 x + 1), (2 y + 1, 2 x), (2 y + 1, 2 x + 1) of the convolution, from windows
  // (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1), added in the CPU's order.
  DEV_MEMBER void unpool(const Cursor& at, int g) const {
    const Stream& d = args.stream;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      u32 words[4][4], taps[4][2], pairs[4][4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        bool there = (k % 2 == 0 || columns[i] + 1 < d.tiles * TILE / 2) && (k / 2 == 0 || at.y + 1 < d.rows);
        // A segment's last window is the next one's first, which makes its own pixels.
        there = there && 2 * columns[i] < d.width;
        u32x4 v = {0, 0, 0, 0};
        u32x2 a = {0xffffffffu, 0xffffffffu};
        if (there) {
          int row = (g + k / 2) % 2, pixel = item(i) + k % 2;
          v = load16(dz + row * DZ + pixel * (FILTERS * 2) + chunk * 16);
          a = *(const u32x2*)(argmax + row * ARGMAX + pixel * FILTERS + chunk * 8);
        }
        words[k][0] = v.x, words[k][1] = v.y, words[k][2] = v.z, words[k][3] = v.w;
        taps[k][0] = a.x, taps[k][1] = a.y;
      }
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float v[2][4];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          auto from = [&](int k, u32 tap) { return won(words[k][j], taps[k][j / 2], j % 2 * 2 + e, tap); };
          v[e][0] = from(0, 4);
          v[e][1] = from(0, 5) + from(1, 3);
          v[e][2] = from(0, 7) + from(2, 1);
          v[e][3] = from(0, 8) + from(1, 6) + from(2, 2) + from(3, 0);
        }
#pragma unroll
        for (int k = 0; k < 4; k++) pairs[k][j] = pack_bf16x2(v[0][k], v[1][k]);
      }
#pragma unroll
      for (int k = 0; k < 4; k++) {
        int pixel = k / 2 * COLUMNS + item(i) * 2 + k % 2;
        store16(grads + pixel * (FILTERS * 2) + (chunk ^ pixel % 8) * 16, {pairs[k][0], pairs[k][1], pairs[k][2], pairs[k][3]});
      }
    }
  }

  DEV_MEMBER int unit(int i) const { return warp() % 4 * EACH + i; }

  DEV_MEMBER void multiply(const Cursor& at) {
    const Stream& d = args.stream;
    int row = warp() / 4, pitch = pixels.across * 16;
    if (2 * at.y + row >= d.p) return;
    // Lanes 0 .. 16 name the columns of a unit, the others those of the next; the eighth repeats the seventh.
    const char* units[LOADS];
#pragma unroll
    for (int j = 0; j < LOADS; j++) {
      int i = unit(min(2 * j + lane() / TILE, EACH - 1));
      units[j] = pixels.ring + ring_row(at.slot + 2 * row + i / UNITS) * pitch + i % UNITS * 16;
    }
#pragma unroll 1
    for (int tile = 0; tile < d.slots * d.tiles; tile++) {
      int slot = d.slots == 1 ? 0 : tile / d.tiles, first = (tile - slot * d.tiles) * TILE;
      // Past the last column the gradients are zero.
      int window = (slot * d.pairs + min(first + lane() % TILE, d.width - 1)) * 16;
      u32 b[LOADS][4];
#pragma unroll
      for (int j = 0; j < LOADS; j++) ldmatrix_x4_trans(b[j], units[j] + window);
      int pixel = row * COLUMNS + tile * TILE + lane() / 16 * 8 + lane() % 8;
#pragma unroll
      for (int m = 0; m < 4; m++) {
        u32 a[4];
        ldmatrix_x4_trans(a, grads + pixel * (FILTERS * 2) + ((m * 2 + lane() / 8 % 2) ^ pixel % 8) * 16);
#pragma unroll
        for (int j = 0; j < EACH; j++) {
          u32 pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          mma_m16n8k16(sums[m][j], a, pair);
        }
      }
    }
  }

  // Pooled rows begin .. end of the stream.
  DEV_MEMBER void run(int begin, int end) {
    const Stream& d = args.stream;
    Cursor at = {begin / d.rows, begin % d.rows, 0, 0};
    pixels.begin(at.map, 4 * at.y - 3);
    pixels.finish(AHEAD);
    for (int i = 0; i < 2; i++) {
      Window windows[ITEMS];
      load(windows, begin + i);
      put(windows, begin + i);
    }
    __syncthreads();
    for (int g = begin; g < end; g++) {
      unpool(at, g);
      __syncthreads();  // the gradients are whole, and this pooled row is read
      Window windows[ITEMS];
      load(windows, g + 2);
      Pixels::Pair next[3] = {pixels.next(at.row + AHEAD), pixels.next(at.row + AHEAD), pixels.next(at.row + AHEAD)};
      multiply(at);
      put(windows, g + 2);
#pragma unroll
      for (int i = 0; i < 3; i++) pixels.put(next[i]);
      pixels.finish(at.row + AHEAD);
      at.advance(d);
      __syncthreads();  // the next rows are there, and the gradients read
    }
  }

  // Adds the sums of the two rows in `total`, [FILTERS][WIDTH].
  DEV_MEMBER void add_rows(float* total) {
    for (int turn = 0; turn < 2; turn++) {
      if (warp() / 4 == turn) {
#pragma unroll
        for (int i = 0; i < 4 * EACH * 4; i++) {
          const int m = i / 4 / EACH, n = i / 4 % EACH, e = i % 4;
          float* to = total + (m * 16 + e / 2 * 8 + lane() / 4) * WIDTH + unit(n) * 8 + lane() % 4 * 2 + e % 2;
          *to = turn == 0 ? sums[m][n][e] : *to + sums[m][n][e];
        }
      }
      __syncthreads();  // the sums of one row are there
    }
  }

  DEV_MEMBER void store(const float* total, int split) const {
    constexpr int FILTER = SIDE * SIDE * CHANNELS;
    float* out = args.out + ((size_t)split * args.stream.k + first_filter) * FILTER;
    int filters = min(args.stream.k - first_filter, FILTERS);
    for (int i = (int)threadIdx.x; i < filters * FILTER; i += THREADS) {
      int filter = i / FILTER, row = i % FILTER / (SIDE * CHANNELS), column = i % (SIDE * CHANNELS);
      out[i] = total[filter * WIDTH + row * UNITS * 8 + (column / CHANNELS + 1) * 4 + column % CHANNELS];
    }
  }
};

// Blocks: splits, tiles of filters.
template <GradKind GRAD>
DEV void fused_filter(const FilterArgs& args, char* shared) {
  SHARED(float, coef, [3][FILTERS]);
  for (int i = (int)threadIdx.x; i < 3 * FILTERS; i += THREADS) {
    int filter = (int)blockIdx.y * FILTERS + i % FILTERS;
    bool there = GRAD == GradKind::Affine && filter < args.stream.k;
    coef[i / FILTERS][i % FILTERS] = there ? args.coef[i / FILTERS * args.stream.k + filter] : 0.0f;
  }
  __syncthreads();
  FusedFilter<GRAD> block(args, coef, shared);
  int rows = args.stream.all_rows(), split = (int)blockIdx.x, splits = (int)gridDim.x;
  block.run(split_begin(rows, split, splits), split_begin(rows, split + 1, splits));
  block.add_rows((float*)shared);
  block.store((const float*)shared, split);
}
KERNEL(stem_pool_backward_filter_plain_bf16, FilterArgs, THREADS, 1) {
  DYN_SHARED(shared);
  fused_filter<GradKind::Plain>(args, shared);
}
KERNEL(stem_pool_backward_filter_affine_bf16, FilterArgs, THREADS, 1) {
  DYN_SHARED(shared);
  fused_filter<GradKind::Affine>(args, shared);
}

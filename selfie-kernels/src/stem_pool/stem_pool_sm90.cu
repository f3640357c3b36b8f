// The large stem and its pooling on Hopper, 7x7 filters with stride 2, and the filters' gradient from that of the pooled map.
//
// As in stem_pool.cu the map between the two is never stored, and the products take pixels as they lie: with a fourth channel,
// which is zero, two of them are 16 bytes, and the window of a column (eight pixels, of which the first is not the filter's)
// begins 16 bytes behind that of the column before. An operand of wgmma may begin there. So TMA, which cannot add a channel,
// is of no use; pixels come by ordinary loads.
//
// A product has 112 columns of the convolution: of one image, or of several narrow ones side by side. They are made of runs of
// 8, each with the pixels that it reads; what is no column of an image has pixels that are zero. Of the block's 512 threads two
// warpgroups load and two consume. Each consumer has pooled rows of its own, one after the other, image by image, and its own
// loader and ring, so that one pools while the other multiplies.
#include "filter_gradient.h"
#include "hopper.h"

static constexpr int FILTERS = 64, SIDE = 7, CHANNELS = 3;
static constexpr int RUN = 8, RUNS = 14, UNITS = RUN + 3;  // units: two pixels, 16 bytes
static constexpr int POOLED = RUN * RUNS / 2, EACH = RUNS; // pooled columns; those of a lane
static constexpr int THREADS = 512;
static constexpr u32 ONES = 0x00010001;

// How the pixels are cut. A map is a group of images side by side.
struct Stream {
  const bf16* x;      // [n, h, w, 3]; w a multiple of 16
  int n, h, w, k;     // k: filters
  int p;              // rows of the convolution's map
  int rows, columns;  // of the pooled map
  int slots;          // images side by side
  int all_rows;       // pooled rows of all maps
  int share;          // they are shared out among consumers by so many
  int consumers;      // two of each block along x
  int rounds;         // 1

  DEV_MEMBER int image(int map) const { return map * slots; }
  // Images of a map; none before the first map and behind the last one.
  DEV_MEMBER int images(int map) const { return map < 0 ? 0 : max(0, min(slots, n - image(map))); }
  // Where consumer `i` of the grid begins.
  DEV_MEMBER int begin(int i) const {
    int shares = ceil_div(all_rows, share);
    return min(all_rows, split_begin(shares, i, consumers) * share);
  }
};

// The pooled rows of a consumer and its loader.
struct Part {
  int group, begin, end;

  DEV_MEMBER Part(const Stream& d) : group(warp() / 4 % 2) {
    int i = (int)blockIdx.x * 2 + group;
    begin = d.begin(i), end = d.begin(i + 1);
  }
};

// Four rows of pixels are loaded at a time. Of a map they begin three rows above it, group y with the rows that pooled row y
// reads first; it ends with the first row of group y + 2. Behind group `rows` comes the next map's first one, whose first row is
// padding as the one is that the last pooled row ends with.
struct Cursor {
  int map, group;

  DEV_MEMBER Cursor(const Stream& d, int pooled_row) : map(pooled_row / d.rows), group(pooled_row % d.rows) {}
  DEV_MEMBER int number(const Stream& d) const { return map * (d.rows + 1) + group; }
  DEV_MEMBER void next(const Stream& d) {
    if (++group > d.rows) group = 0, map++;
  }
  DEV_MEMBER void back(const Stream& d) {
    if (--group < 0) group = d.rows, map--;
  }
};

// The ring: groups one after the other, and behind the last one again the rows that the windows of group GROUPS - 1 reach.
// The forward pass has each run's first units twice, once without their first pixel: for windows begin with that one, and a
// weight of zero would not stop a NaN.
enum class Pass { Forward, Backward };
template <Pass PASS>
struct Ring {
  static constexpr int GROUP = 4, GROUPS = 4, REPEATED = 5;
  static constexpr u32 APART = PASS == Pass::Forward ? RUN * 16 : 0;
  static constexpr u32 RUN_BYTES = APART + UNITS * 16, ROW_BYTES = RUNS * RUN_BYTES;
  static constexpr u32 BARRIERS_AT = (GROUP * GROUPS + REPEATED) * ROW_BYTES, BYTES = BARRIERS_AT + 2 * GROUPS * 8;

  u32 address;

  DEV_MEMBER u32 full(u32 place) const { return address + BARRIERS_AT + place * 8; }
  DEV_MEMBER u32 empty(u32 place) const { return full(GROUPS + place); }
  DEV_MEMBER void init(u32 loaders) const {
    for (u32 i = 0; i < GROUPS; i++) {
      mbarrier_init(full(i), loaders);
      mbarrier_init(empty(i), 4);
    }
  }
};

// Each thread of a warp has what the others have left behind by now.
DEV void arrive_warp(u32 barrier) {
  __syncwarp();
  if (lane() == 0) mbarrier_arrive(barrier);
}

// ---- Loading: WARPS warps have every WARPS-th row of a group. What a lane loads of a row is stored when there is room, one
// row later.

template <Pass PASS, int WARPS>
struct PixelLoader {
  typedef Ring<PASS> R;
  static constexpr int ITEMS = (RUNS * UNITS + 31) / 32;

  const Stream& d;
  R ring;
  int first_row;       // of this warp
  u32 from[ITEMS];     // in bytes from where the row begins in the first image; NONE: zeros
  u32 to[ITEMS];       // in bytes from where it begins in the ring, and 1 where the second pixel also goes alone before it
  u32 words[ITEMS][3];
  static constexpr u32 NONE = ~0u, PAIR_BYTES = 2 * CHANNELS * sizeof(bf16);

  DEV_MEMBER PixelLoader(const Stream& d, R ring, int first_row) : d(d), ring(ring), first_row(first_row) {
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      int run = item(i) / UNITS, unit = item(i) % UNITS, of_slot = d.columns * 2 / RUN, slot = run / of_slot;
      int pair = (run - slot * of_slot) * RUN + unit - 2;
      bool there = run < RUNS && slot < d.slots && (u32)pair < (u32)d.w / 2;
      from[i] = there ? (u32)(slot * d.h * (d.w / 2) + pair) * PAIR_BYTES : NONE;
      to[i] = run * R::RUN_BYTES + R::APART + unit * 16 + (PASS == Pass::Forward && unit < RUN ? 1 : 0);
    }
  }
  DEV_MEMBER static int item(int i) { return lane() + i * 32; }

  DEV_MEMBER void load(const Cursor& at, int row) {
    int y = at.group * R::GROUP - 3 + row;
    u32 end = (u32)y < (u32)d.h ? (u32)(d.images(at.map) * d.h * (d.w / 2)) * PAIR_BYTES : 0;
    const char* pixels = (const char*)(d.x + ((long long)d.image(at.map) * d.h + y) * d.w * CHANNELS);
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
#pragma unroll
      for (int j = 0; j < 3; j++) words[i][j] = from[i] < end ? *(const u32*)(pixels + from[i] + j * 4) : 0;
  }

  DEV_MEMBER void put(u32 place, int row) const {
    u32 line = ring.address + (place * R::GROUP + row) * R::ROW_BYTES;
    bool again = place * R::GROUP + row < R::REPEATED;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      if (item(i) >= RUNS * UNITS) continue;
      u32 a = words[i][0], b = words[i][1], c = words[i][2], at = line + (to[i] & ~1u);
      u32x4 pixels = {a, b & 0xffff, b >> 16 | c << 16, c >> 16}, second = {0, 0, pixels.z, pixels.w};
      constexpr u32 BEHIND = R::GROUP * R::GROUPS * R::ROW_BYTES;
      store_shared16(at, pixels);
      if (again) store_shared16(at + BEHIND, pixels);
      if (to[i] % 2 == 0) continue;
      store_shared16(at - R::APART, second);
      if (again) store_shared16(at - R::APART + BEHIND, second);
    }
  }

  // Groups from `at` to that of number `last`.
  DEV_MEMBER void run(Cursor at, int last) {
    int groups = last - at.number(d) + 1, row = first_row;
    load(at, row);
    for (int i = 0; i < groups;) {
      u32 place = i % R::GROUPS;
      if (row == first_row) mbarrier_wait(ring.empty(place), i / R::GROUPS % 2 ^ 1);
      put(place, row);
      row += WARPS;
      if (WARPS == R::GROUP || row >= R::GROUP) {
        fence_async();
        arrive_warp(ring.full(place));
        i++, row = first_row, at.next(d);
      }
      load(at, row);
    }
  }
};

// ---- What consumers share: where they stand in the ring, and how far they have come.

template <Pass PASS>
struct Reader {
  typedef Ring<PASS> R;
  R ring;
  int group;     // the first one that the pooled row reads
  int step = 1;  // of them, from the row before

  DEV_MEMBER void wait(int i) const { mbarrier_wait(ring.full(i % R::GROUPS), i / R::GROUPS % 2); }
  // Before the first row: all that an even row of the convolution reads, and of the row above.
  DEV_MEMBER void begin() const {
    for (int i = 0; i < group + 2; i++) wait(i);
  }
  // What an even row reads that the row before has not; and an odd one.
  DEV_MEMBER void wait_even() const {
    if (step == 2) wait(group + 1);
  }
  DEV_MEMBER void wait_odd() const { wait(group + 2); }
  // All lanes of a warp are done with the row before.
  DEV_MEMBER void free_before() const {
    for (int i = max(0, group - step); i < group; i++)
      if (lane() == 0) mbarrier_arrive(ring.empty(i % R::GROUPS));
  }
  // To the next pooled row: by one, but behind a map's last row by two.
  DEV_MEMBER void advance(int groups) { step = groups, group += groups; }
  // The row of the ring so many behind the group's first one.
  DEV_MEMBER u32 row(int behind) const { return ring.address + (group % R::GROUPS * R::GROUP + behind) * R::ROW_BYTES; }
  // Of the convolution's row above the first one.
  DEV_MEMBER u32 row_above() const { return ring.address + 2 * R::ROW_BYTES; }
};

// A thread's sums are those of two neighbouring filters: row r of a product is filter 2 r of 16 for r < 8, else 2 (r - 8) + 1.
DEV int filter_of_row(int row) { return row / 16 * 16 + row % 8 * 2 + row / 8 % 2; }
DEV int own_filter() { return warp() % 4 * 16 + lane() / 4 * 2; }
DEV int quad() { return lane() % 4; }

// ---- Forward.

struct ForwardArgs {
  Stream stream;
  const bf16* w;  // [k, 7, 7, 3]
  bf16* y;
  u8* argmax;
  float* stats;  // [tiles][2][k], a tile being `share` pooled rows; null: none. Only of one image side by side.
};

enum class Maps { One, Several };  // images side by side

template <Maps MAPS>
struct Forward {
  typedef Ring<Pass::Forward> R;
  static constexpr int STEPS = SIDE * 2;  // of 16 weights, four pixels
  // Weights lie in blocks of 8 filters by 8 weights.
  static constexpr u32 BLOCK = 128, CHUNK = FILTERS / 8 * BLOCK, WEIGHTS = SIDE * 4 * CHUNK;
  static constexpr u32 SHARED_BYTES = WEIGHTS + 2 * R::BYTES;
  static_assert(SHARED_BYTES <= 227 << 10, "what a block may have");
  static constexpr u32 LEAST = 0xff80ff80;  // minus infinity, twice

  const ForwardArgs& args;
  const Stream& d = args.stream;
  u32 base;

  DEV_MEMBER R ring(u32 group) const { return {base + WEIGHTS + group * R::BYTES}; }

  DEV_MEMBER void run() const {
    if (threadIdx.x == 0) {
      for (u32 group = 0; group < 2; group++) ring(group).init(4);
      mbarrier_init_fence();
    }
    load_weights();
    fence_async();
    __syncthreads();
    if (warp() < 8) {
      registers_give<64>();
      load();
    } else {
      registers_take<192>();
      consume();
    }
  }

  DEV_MEMBER void load() const {
    Part part(d);
    if (part.begin == part.end) return;
    Cursor at(d, part.begin);
    at.back(d);  // for the row above the first window, whether or not there is one
    PixelLoader<Pass::Forward, 4>(d, ring(part.group), warp() % 4).run(at, Cursor(d, part.end - 1).number(d) + 2);
  }

  DEV_MEMBER void load_weights() const {
#pragma unroll 1
    for (int i = (int)threadIdx.x; i < SIDE * 4 * FILTERS; i += THREADS) {
      int chunk = i / FILTERS, row = i % FILTERS, filter = (int)blockIdx.y * FILTERS + filter_of_row(row);
      u32 words[4] = {0, 0, 0, 0};
#pragma unroll
      for (int j = 0; j < 2; j++) {
        int pixel = chunk % 4 * 2 + j;
        if (pixel == 0 || filter >= d.k) continue;
        const bf16* w = args.w + (((size_t)filter * SIDE + chunk / 4) * SIDE + pixel - 1) * CHANNELS;
        words[j * 2] = (u32)w[0].bits | (u32)w[1].bits << 16, words[j * 2 + 1] = w[2].bits;
      }
      store_shared16(base + chunk * CHUNK + row / 8 * BLOCK + row % 8 * 16, {words[0], words[1], words[2], words[3]});
    }
  }

  // A row of the convolution, whose windows begin at this row of the ring.
  DEV_MEMBER void multiply(float (&sum)[RUN * RUNS / 2], u32 row) const {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      u32 line = row + step / 2 * R::ROW_BYTES;
      u64 weights = wgmma_operand_plain(base + step * 2 * CHUNK, CHUNK, BLOCK);
      // The first unit is the one without the pixel before the window.
      u64 pixels = step % 2 == 0 ? wgmma_operand_plain(line, R::APART + 16, R::RUN_BYTES)
                                 : wgmma_operand_plain(line + R::APART + 32, 16, R::RUN_BYTES);
      wgmma<Major::K, Major::K>(sum, weights, pixels, step == 0 ? Start::Zero : Start::Continue);
    }
    wgmma_commit();
  }

  // The windows' largest numbers in a row of the convolution, two filters at once, and which column has the first of them:
  // take(j, largest, column), of pooled column 4 j + quad().
  template <class Take>
  DEV_MEMBER void row_maxima(const float (&sum)[RUN * RUNS / 2], Take take) const {
    int to_left = (lane() & 28) | ((lane() + 3) & 3);
    u32 before = LEAST;
    int column = 0;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      // Rounded, and without negative zeros: equal numbers have equal bits.
      u32 middle = add_bf16x2(pack_bf16x2(sum[j * 4], sum[j * 4 + 2]), 0);
      u32 right = add_bf16x2(pack_bf16x2(sum[j * 4 + 1], sum[j * 4 + 3]), 0);
      u32 left = __shfl_sync(WARP, quad() == 3 ? before : right, to_left), outside = 0;
      before = right;
      bool begins = MAPS == Maps::One ? j == 0 : column == 0;
      if (begins && quad() == 0) left = LEAST, outside = ONES;
      if ((column += 4) == d.columns) column = 0;
      u32 largest = max_nan_bf16x2(max_nan_bf16x2(left, middle), right);
      u32 not_left = min_u16x2((left ^ largest) | outside, ONES), not_middle = min_u16x2(middle ^ largest, ONES);
      take(j, largest, not_left + (not_left & not_middle));
    }
  }

  // Of the rows so far of each window, two filters at once: the largest numbers, and the taps of the first of them.
  struct Best {
    u32 largest[EACH], taps[EACH];

    DEV_MEMBER void begin(int j, u32 row_largest, u32 column) { largest[j] = row_largest, taps[j] = column; }
    // With ONES in `none` there is no row before.
    DEV_MEMBER void add(int j, u32 row_largest, u32 row_taps, u32 none) {
      u32 before = largest[j];
      largest[j] = max_nan_bf16x2(before, row_largest);
      u32 later = min_u16x2((before ^ largest[j]) | none, ONES) * 0xffff;
      taps[j] = (taps[j] & ~later) | (row_taps & later);
    }
  };

  // Statistics of a tile: sums of deviations, and of their squares, from a number of its own.
  struct Stats {
    float first[2], sum[2], squares[2];
    int rows = 0;

    DEV_MEMBER void begin(u32 pair) {
      pair = __shfl_sync(WARP, pair, lane() & 28);
      first[0] = bf16x2_low(pair), first[1] = bf16x2_high(pair);
#pragma unroll
      for (int i = 0; i < 2; i++) sum[i] = squares[i] = 0.0f;
    }
    DEV_MEMBER void add(u32 pair) {
      float deviation[2] = {bf16x2_low(pair) - first[0], bf16x2_high(pair) - first[1]};
#pragma unroll
      for (int i = 0; i < 2; i++) sum[i] += deviation[i], squares[i] = fmaf(deviation[i], deviation[i], squares[i]);
    }
    // Of so many values, to the means and squares of two filters.
    DEV_MEMBER void store(float* means, float* squares_at, float count) {
#pragma unroll
      for (int step = 1; step < 4; step *= 2)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          sum[i] += __shfl_xor_sync(WARP, sum[i], step);
          squares[i] += __shfl_xor_sync(WARP, squares[i], step);
        }
      if (quad() != 0) return;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        // sum (x - m - d)^2 = sum (x - m)^2 + d (count d - 2 sum (x - m)), with d as the mean was moved when it was stored.
        float mean = first[i] + sum[i] / count, moved = mean - first[i];
        means[i] = mean;
        squares_at[i] = relu(squares[i] + moved * fmaf(count, moved, -2.0f * sum[i]));
      }
    }
  };

  DEV_MEMBER void consume() const {
    Part part(d);
    int begin = part.begin, end = part.end;
    if (begin == end) return;
    Reader<Pass::Forward> reader{ring(part.group), 1};
    float even[RUN * RUNS / 2], odd[RUN * RUNS / 2];
    Best best;
    Stats stats;
    int filter = (int)blockIdx.y * FILTERS + own_filter();
    int y = begin % d.rows;

    // The last row of the windows of a pooled row, which is the first of those below.
    auto finish = [&](int row) {
      int above = row % d.rows, image = d.image(row / d.rows), slot = 0, column = 0;
      bool inside = 2 * above + 1 < d.p, summed = MAPS == Maps::One && args.stats;
      row_maxima(odd, [&](int j, u32 largest, u32 taps) {
        if (inside) best.add(j, largest, taps + 6 * ONES, 0);
        u32 pair = best.largest[j], won = best.taps[j];
        best.begin(j, largest, taps);
        if (slot < d.slots && image + slot < d.n) {
          if (filter < d.k) {
            size_t at = (((size_t)(image + slot) * d.rows + above) * d.columns + column + quad()) * d.k + filter;
            *(u32*)(args.y + at) = pair;
            *(u16*)(args.argmax + at) = (u16)(won | won >> 8);
          }
          if (summed) {
            if (j == 0 && stats.rows == 0) stats.begin(pair);
            stats.add(pair);
          }
        }
        if ((column += 4) == d.columns) column = 0, slot++;
      });
      if (!summed || (++stats.rows < d.share && row + 1 < end)) return;
      if (filter < d.k) {
        float* to = args.stats + (size_t)(row / d.share) * 2 * d.k + filter;
        stats.store(to, to + d.k, (float)(stats.rows * d.columns));
      }
      stats.rows = 0;
    };

    reader.begin();
    multiply(odd, reader.row_above());
    for (int row = begin; row < end; row++) {
      reader.wait_even();
      multiply(even, reader.row(0));
      wgmma_wait<1>();
      wgmma_hold(odd);
      if (row > begin) finish(row - 1);
      else row_maxima(odd, [&](int j, u32 largest, u32 taps) { best.begin(j, largest, taps); });
      reader.free_before();
      reader.wait_odd();
      multiply(odd, reader.row(2));
      wgmma_wait<1>();
      wgmma_hold(even);
      u32 none = y == 0 ? ONES : 0;
      row_maxima(even, [&](int j, u32 largest, u32 taps) {
        if (none) best.largest[j] = LEAST;
        best.add(j, largest, taps + 3 * ONES, none);
      });
      bool last = y == d.rows - 1;
      reader.advance(last ? 2 : 1), y = last ? 0 : y + 1;
    }
    wgmma_wait<0>();
    wgmma_hold(odd);
    finish(end - 1);
  }
};

// Blocks: shares of the pooled rows, tiles of filters.
KERNEL(stem_pool_forward_hopper_one_bf16, ForwardArgs, THREADS, 1) {
  DYN_SHARED(shared);
  Forward<Maps::One>{args, args.stream, shared_address(shared)}.run();
}
KERNEL(stem_pool_forward_hopper_several_bf16, ForwardArgs, THREADS, 1) {
  DYN_SHARED(shared);
  Forward<Maps::Several>{args, args.stream, shared_address(shared)}.run();
}

// ---- The filters' gradient. M = 64 filters, N = the rows of a window by a unit, K = columns of a row of the convolution. Two
// warps of a loader bring pixels, two the pooled gradient: of each pixel its filters' gradients, and of each which tap won, as
// a bit of sixteen. The convolution's gradient is made of them in the consumer's registers, two rows for each pooled row. Of what
// lies outside of the map no window is won, so the rows and columns of neighbouring images do not meet.

struct FilterArgs {
  Stream stream;
  const bf16* dz;
  const bf16* grad_x;
  const float* coef;
  const u8* argmax;
  float* out;  // [splits, k, 7, 7, 3]
};

// A pooled row in shared memory: [POOLED][FILTERS] of 16 bits, whose chunks of 16 bytes are mixed so that four columns' lie apart.
struct GradRing {
  static constexpr int PLACES = 2;
  static constexpr u32 PLANE = POOLED * FILTERS * 2, TAPS = POOLED * FILTERS;
  static constexpr u32 PLACE_BYTES = 2 * PLANE + TAPS, BARRIERS_AT = PLACES * PLACE_BYTES, BYTES = BARRIERS_AT + 2 * PLACES * 8;

  u32 address;

  // Of the consumer's row `i`.
  DEV_MEMBER static u32 place(int i) { return i % PLACES; }
  DEV_MEMBER static u32 parity(int i) { return i / PLACES % 2; }
  // The gradient; what won, and before that what an affine gradient is formed with; the taps as they come.
  DEV_MEMBER u32 grads(u32 place) const { return address + place * PLACE_BYTES; }
  DEV_MEMBER u32 winners(u32 place) const { return grads(place) + PLANE; }
  DEV_MEMBER u32 taps(u32 place) const { return grads(place) + 2 * PLANE; }
  DEV_MEMBER u32 full(u32 place) const { return address + BARRIERS_AT + place * 8; }
  DEV_MEMBER u32 empty(u32 place) const { return full(PLACES + place); }
  DEV_MEMBER void init() const {
    for (u32 i = 0; i < PLACES; i++) {
      mbarrier_init(full(i), 2);
      mbarrier_init(empty(i), 4);
    }
  }
  DEV_MEMBER static u32 at(int column, int chunk) { return column * (FILTERS * 2) + (chunk ^ column % 4 * 2) * 16; }
};

template <GradKind GRAD>
struct GradLoader {
  static constexpr int LOADERS = 64, ITEMS = POOLED * 8 / LOADERS;

  const FilterArgs& args;
  const Stream& d = args.stream;
  char* shared;
  GradRing ring;
  const float* coef;  // [3][FILTERS], in shared memory
  int t, filter;      // of this thread; the first of its eight

  DEV_MEMBER GradLoader(const FilterArgs& args, char* shared, GradRing ring, const float* coef)
      : args(args), shared(shared), ring(ring), coef(coef), t((int)threadIdx.x % LOADERS),
        filter((int)blockIdx.y * FILTERS + t % 8 * 8) {}
  DEV_MEMBER int column(int i) const { return t / 8 + i * (LOADERS / 8); }
  // Of a row: from here on there is none.
  DEV_MEMBER int columns(int row) const { return filter < d.k ? d.images(row / d.rows) * d.columns : 0; }
  DEV_MEMBER char* at(u32 address, int i) const { return shared + (address - shared_address(shared)) + GradRing::at(column(i), t % 8); }
  DEV_MEMBER char* taps_at(u32 place, int i) const {
    return shared + (ring.taps(place) - shared_address(shared)) + column(i) * FILTERS + t % 8 * 8;
  }

  DEV_MEMBER void begin_copies(int row, u32 place) const {
    int end = columns(row);
    size_t start = ((size_t)d.image(row / d.rows) * d.rows + row % d.rows) * d.columns * d.k + filter;
#pragma unroll 1
    for (int i = 0; i < ITEMS && column(i) < end; i++) {
      size_t from = start + (u32)((column(i) + column(i) / d.columns * (d.rows - 1) * d.columns) * d.k);
      cp_async16(at(ring.grads(place), i), args.dz + from);
      if (GRAD == GradKind::Affine) cp_async16(at(ring.winners(place), i), args.grad_x + from);
      if (t % 2 == 0) cp_async16(taps_at(place, i), args.argmax + from);
    }
  }

  // A bit of sixteen for each tap, of two filters.
  DEV_MEMBER static u32 bits(u32 taps, int first) {
    return 1u << (taps >> first * 8 & 255) | 0x10000u << (taps >> (first * 8 + 8) & 255);
  }
  DEV_MEMBER void form(int row, u32 place) const {
    int end = columns(row);
#pragma unroll 1
    for (int i = 0; i < ITEMS; i++) {
      u32x4 grads = {0, 0, 0, 0}, winners = {0, 0, 0, 0};
      if (column(i) < end) {
        grads = load16(at(ring.grads(place), i));
        if (GRAD == GradKind::Affine) {
          AffineCoef8 affine;
          affine.load(coef, t % 8 * 8, FILTERS);
          grads = affine.apply(grads, load16(at(ring.winners(place), i)));
        }
        u32x2 taps = *(const u32x2*)taps_at(place, i);
        winners = {bits(taps.x, 0), bits(taps.x, 2), bits(taps.y, 0), bits(taps.y, 2)};
      }
      store16(at(ring.grads(place), i), grads);
      store16(at(ring.winners(place), i), winners);
    }
  }

  // Rows first .. = last.
  DEV_MEMBER void run(int first, int last) const {
    begin_copies(first, 0);
    cp_async_commit();
    for (int i = 0; i <= last - first; i++) {
      u32 place = GradRing::place(i), ahead = GradRing::place(i + 1);
      if (i < last - first) {
        mbarrier_wait(ring.empty(ahead), GradRing::parity(i + 1) ^ 1);
        begin_copies(first + i + 1, ahead);
      }
      cp_async_commit();
      cp_async_wait<1>();
      __syncwarp();  // a thread copies its neighbour's taps, too
      form(first + i, place);
      arrive_warp(ring.full(place));
    }
    cp_async_wait<0>();
  }
};

template <GradKind GRAD>
struct FilterGradient {
  typedef Ring<Pass::Backward> R;
  static constexpr int STEPS = RUNS / 2, PIXELS = UNITS - RUN + 1;  // of 16 columns; units of a window
  static constexpr int WIDTH = SIDE * PIXELS * 8, ROW_SUMS = SIDE * 4;
  static constexpr u32 RING_AT = (GradRing::BYTES + 127) / 128 * 128, GROUP_BYTES = (RING_AT + R::BYTES + 127) / 128 * 128;
  static constexpr u32 COEF_AT = 2 * GROUP_BYTES, SHARED_BYTES = COEF_AT + 3 * FILTERS * sizeof(float);
  static_assert(SHARED_BYTES <= 227 << 10, "what a block may have");
  static_assert(FILTERS * WIDTH * sizeof(float) <= GROUP_BYTES, "the sums take a group's place in the end");

  const FilterArgs& args;
  const Stream& d = args.stream;
  char* shared;

  DEV_MEMBER float* coef() const { return (float*)(shared + COEF_AT); }
  DEV_MEMBER GradRing grads(u32 group) const { return {shared_address(shared) + group * GROUP_BYTES}; }
  DEV_MEMBER R ring(u32 group) const { return {grads(group).address + RING_AT}; }

  DEV_MEMBER void run() const {
    if (threadIdx.x == 0) {
      for (u32 group = 0; group < 2; group++) ring(group).init(2), grads(group).init();
      mbarrier_init_fence();
    }
    for (int i = (int)threadIdx.x; i < 3 * FILTERS; i += THREADS) {
      int filter = (int)blockIdx.y * FILTERS + i % FILTERS;
      bool there = GRAD == GradKind::Affine && filter < d.k;
      coef()[i] = there ? args.coef[i / FILTERS * d.k + filter] : 0.0f;
    }
    __syncthreads();
    if (warp() < 8) {
      registers_give<56>();
      load();
    } else {
      registers_take<200>();
      consume();
    }
  }

  DEV_MEMBER void load() const {
    Part part(d);
    if (part.begin == part.end) return;
    if (warp() % 4 < 2) {
      Cursor first(d, part.begin), last(d, part.end - 1);
      PixelLoader<Pass::Backward, 2>(d, ring(part.group), warp() % 2).run(first, last.number(d) + 2);
    } else {
      GradLoader<GRAD>(args, shared, grads(part.group), coef()).run(part.begin, part.end);
    }
  }

  // Of each of two filters, where it won by this tap.
  DEV_MEMBER static u32 won(u32 grads, u32 winners, int tap) { return grads & spread_signs(winners << (15 - tap)); }
  // Of the pooled column to the right: `here` of this lane's, `there` of its next one.
  DEV_MEMBER static u32 right(u32 here, u32 there) {
    return __shfl_sync(WARP, quad() == 0 ? there : here, (lane() & 28) | ((lane() + 1) & 3));
  }
  // From two filters' even columns and their odd ones to each filter's two columns.
  DEV_MEMBER static void turn_pairs(u32 even, u32 odd, u32& low, u32& high) {
    low = (even & 0xffff) | odd << 16, high = even >> 16 | (odd & 0xffff0000u);
  }

  // A row of the convolution, whose windows begin at this row of the ring: form(j, ..) gives its gradients of pooled column
  // 4 j + quad(), two filters' of two columns. Of its operands one part is made while the tensor cores have the one before,
  // `last` that of the row before; `done` is called when they have done with that row.
  typedef u32 Operands[2][4];
  static constexpr int PARTS = (STEPS + 1) / 2;
  template <class Form, class Done>
  DEV_MEMBER void multiply(float (&sums)[PIXELS][ROW_SUMS], Operands (&a)[PARTS], const Operands& last, u32 row, Form form,
                           Done done) const {
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        a[part][i][0] = a[part][i][1] = a[part][i][2] = a[part][i][3] = 0;
        if (part * 2 + i >= STEPS) continue;
        form((part * 2 + i) * 2, a[part][i][0], a[part][i][1]);
        form((part * 2 + i) * 2 + 1, a[part][i][2], a[part][i][3]);
      }
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int unit = 0; unit < PIXELS; unit++) {
          u32 at = row + (part * 2 + i) * 2 * R::RUN_BYTES + unit * 16;
          if (part * 2 + i < STEPS)
            wgmma<Major::Other>(sums[unit], a[part][i], wgmma_operand_plain(at, R::RUN_BYTES, R::ROW_BYTES), Start::Continue);
        }
      wgmma_commit();
      wgmma_wait<1>();
      if (part == 0) {
        wgmma_hold(last);
        done();
      } else {
        wgmma_hold(a[part - 1]);
      }
    }
  }

  DEV_MEMBER void consume() const {
    Part part(d);
    int begin = part.begin, end = part.end;
    float sums[PIXELS][ROW_SUMS];
#pragma unroll
    for (int i = 0; i < PIXELS * ROW_SUMS; i++) sums[i / ROW_SUMS][i % ROW_SUMS] = 0.0f;
    Reader<Pass::Backward> reader{ring(part.group), 0};
    GradRing from = grads(part.group);
    u32 own = GradRing::at(quad(), own_filter() / 8) + own_filter() % 8 * 2;
    auto grad = [&](u32 place, int j) { return load_shared(from.grads(place) + own + j * 4 * (FILTERS * 2)); };
    auto winner = [&](u32 place, int j) { return load_shared(from.winners(place) + own + j * 4 * (FILTERS * 2)); };
    // A pooled row; operands of an even row of the convolution and of an odd one.
    u32 v[EACH], w[EACH];
    Operands a[PARTS], b[PARTS];
#pragma unroll
    for (int i = 0; i < 8; i++) b[PARTS - 1][i / 4][i % 4] = 0;
    if (begin < end) {
      reader.begin();
      mbarrier_wait(from.full(0), 0);
#pragma unroll
      for (int j = 0; j < EACH; j++) v[j] = grad(0, j), w[j] = winner(0, j);
      arrive_warp(from.empty(0));
    }
    int y = begin % d.rows, row = 0, rows = end - begin;
    // Without a loop around the products and the stores ptxas does the products one by one.
    for (int round = 0; round < d.rounds; round++) {
      while (row < rows) {
        auto even = [&](int j, u32& low, u32& high) {
          u32 there = j + 1 < EACH ? won(v[(j + 1) % EACH], w[(j + 1) % EACH], 3) : 0;
          u32 odd_columns = add_bf16x2(won(v[j], w[j], 5), right(won(v[j], w[j], 3), there));
          turn_pairs(won(v[j], w[j], 4), odd_columns, low, high);
        };
        reader.wait_even();
        multiply(sums, a, b[PARTS - 1], reader.row(0), even, [&] { reader.free_before(); });

        row++;
        u32 place = GradRing::place(row);
        mbarrier_wait(from.full(place), GradRing::parity(row));
        u32 next = grad(place, 0), next_won = winner(place, 0);
        auto odd = [&](int j, u32& low, u32& high) {
          u32 below = next, below_won = next_won;
          next = j + 1 < EACH ? grad(place, j + 1) : 0, next_won = j + 1 < EACH ? winner(place, j + 1) : 0;
          u32 even_columns = add_bf16x2(won(v[j], w[j], 7), won(below, below_won, 1));
          // Four windows, in the CPU's order.
          u32 there = j + 1 < EACH ? won(v[(j + 1) % EACH], w[(j + 1) % EACH], 6) : 0;
          u32 of[4] = {won(v[j], w[j], 8), right(won(v[j], w[j], 6), there), won(below, below_won, 2),
                       right(won(below, below_won, 0), won(next, next_won, 0))};
          u32 odd_columns = pack_bf16x2(bf16x2_low(of[0]) + bf16x2_low(of[1]) + bf16x2_low(of[2]) + bf16x2_low(of[3]),
                                        bf16x2_high(of[0]) + bf16x2_high(of[1]) + bf16x2_high(of[2]) + bf16x2_high(of[3]));
          v[j] = below, w[j] = below_won;
          turn_pairs(even_columns, odd_columns, low, high);
        };
        reader.wait_odd();
        multiply(sums, b, a[PARTS - 1], reader.row(2), odd, [] {});
        arrive_warp(from.empty(place));  // the next row is in registers
        bool last = y == d.rows - 1;
        reader.advance(last ? 2 : 1), y = last ? 0 : y + 1;
      }
      wgmma_wait<0>();
      wgmma_hold(b[PARTS - 1]);
#pragma unroll
      for (int unit = 0; unit < PIXELS; unit++) wgmma_hold(sums[unit]);
      store(sums);
    }
  }

  // Adds up both consumers' sums, where the first one's rings were, and stores them.
  DEV_MEMBER void store(const float (&sums)[PIXELS][ROW_SUMS]) const {
    constexpr int FILTER = SIDE * SIDE * CHANNELS, CONSUMERS = 256;
    float* totals = (float*)shared;
    named_barrier(1, CONSUMERS);  // all are done with the rings
#pragma unroll
    for (int turn = 0; turn < 2; turn++) {
      if (warp() / 4 % 2 == turn) {
#pragma unroll
        for (int i = 0; i < PIXELS * ROW_SUMS; i++) {
          int unit = i / ROW_SUMS, line = i % ROW_SUMS / 4, filter = own_filter() + i / 2 % 2;
          float* to = totals + filter * WIDTH + (line * PIXELS + unit) * 8 + quad() * 2 + i % 2;
          *to = turn == 0 ? sums[unit][i % ROW_SUMS] : *to + sums[unit][i % ROW_SUMS];
        }
      }
      named_barrier(1, CONSUMERS);  // one consumer's sums are there
    }
    int first = (int)blockIdx.y * FILTERS, filters = min(d.k - first, FILTERS);
    float* out = args.out + ((size_t)blockIdx.x * d.k + first) * FILTER;
    for (int i = (int)threadIdx.x - CONSUMERS; i < filters * FILTER; i += CONSUMERS) {
      int line = i % FILTER / (SIDE * CHANNELS), column = i % (SIDE * CHANNELS);
      out[i] = totals[i / FILTER * WIDTH + (line * PIXELS * 2 + column / CHANNELS + 1) * 4 + column % CHANNELS];
    }
  }
};

// Blocks: splits, tiles of filters.
KERNEL(stem_pool_backward_filter_hopper_plain_bf16, FilterArgs, THREADS, 1) {
  DYN_SHARED(shared);
  FilterGradient<GradKind::Plain>{args, args.stream, shared}.run();
}
KERNEL(stem_pool_backward_filter_hopper_affine_bf16, FilterArgs, THREADS, 1) {
  DYN_SHARED(shared);
  FilterGradient<GradKind::Affine>{args, args.stream, shared}.run();
}

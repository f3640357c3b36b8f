// The first convolution and its filter's gradient. Pixels have three channels, so a tap is too short for the copies and
// products of the other convolutions. On the tensor cores (3x3 with stride 1, 7x7 with stride 2) the pixels that a tile
// reads are widened to four channels, the fourth zero, in a patch of shared memory, from which the products take their
// operands as they lie. A plain kernel covers all else.
#include "filter_gradient.h"

// ---- Statistics of what was stored.

static constexpr int TILE_ROWS = 128, TILE_CHANNELS = 64;

// Mean, and sum of squared deviations from that mean, of up to 64 channels of a tile: two passes, of which the second
// corrects the mean by the sum of deviations that is left, as src/cpu/sums.rs does. `at(row, channel)` is a stored value,
// out: [2, k]. All threads call it, behind a barrier.
template <int THREADS, class At>
DEV void tile_stats(At at, int rows, int channels, float* out, int k) {
  constexpr int GROUPS = THREADS / TILE_CHANNELS;
  SHARED(float, sums, [GROUPS][TILE_CHANNELS]);
  SHARED(float, squares, [GROUPS][TILE_CHANNELS]);
  int channel = (int)threadIdx.x % TILE_CHANNELS, group = (int)threadIdx.x / TILE_CHANNELS;
  bool there = channel < channels;
  auto add_groups = [&](const float (&parts)[GROUPS][TILE_CHANNELS]) {
    float sum = parts[0][channel];
#pragma unroll
    for (int i = 1; i < GROUPS; i++) sum += parts[i][channel];
    return sum;
  };
  float sum = 0.0f, square = 0.0f, count = (float)rows;
  if (there)
    for (int row = group; row < rows; row += GROUPS) sum += at(row, channel);
  sums[group][channel] = sum;
  __syncthreads();
  float mean = add_groups(sums) / count;
  __syncthreads();
  sum = 0.0f;
  if (there)
    for (int row = group; row < rows; row += GROUPS) {
      float deviation = at(row, channel) - mean;
      sum += deviation;
      square = fmaf(deviation, deviation, square);
    }
  sums[group][channel] = sum;
  squares[group][channel] = square;
  __syncthreads();
  if (!there || group > 0) return;
  float rest = add_groups(sums), corrected = mean + rest / count, moved = corrected - mean;
  out[channel] = corrected;
  // Deviations from the mean as it is stored: sum (x - m - d)^2 = sum (x - m)^2 + d (rows d - 2 sum (x - m)).
  out[k + channel] = relu(add_groups(squares) + moved * fmaf(count, moved, -(rest + rest)));
}

template <class T>
struct StatsArgs {
  const T* y;    // [rows, k]
  float* stats;  // [tiles, 2, k]
  int rows, k;
};
// Blocks: tiles of rows, of channels.
template <class T>
DEV void stats_of_stored(const StatsArgs<T>& args) {
  int first = (int)blockIdx.x * TILE_ROWS, channel = (int)blockIdx.y * TILE_CHANNELS;
  const T* y = args.y + (size_t)first * args.k + channel;
  float* out = args.stats + (size_t)blockIdx.x * 2 * args.k + channel;
  tile_stats<256>([&](int row, int c) { return to_float(y[(size_t)row * args.k + c]); }, min(args.rows - first, TILE_ROWS),
                  args.k - channel, out, args.k);
}
KERNEL(stem_conv_stats_f32, StatsArgs<float>, 256, 4) { stats_of_stored(args); }
KERNEL(stem_conv_stats_bf16, StatsArgs<bf16>, 256, 4) { stats_of_stored(args); }

// ---- The plain forward pass: 64 pixels x 64 filters a block, 16 of a filter's r * s * c weights at a time.

template <class T>
struct ForwardArgs {
  const T* x;    // [n, h, w, c]
  const T* w;    // [k, r, s, c]
  T* y;          // [n, p, q, k]
  float* stats;  // of the tensor cores' kernels, [tiles, 2, k]; null: none
  Conv conv;
  int rows;  // n * p * q
};

template <class T>
struct PlainForward {
  static constexpr int THREADS = 256, TILE = 64, STEP = 16, EACH = TILE / (THREADS / STEP);
  // Where an output pixel's window begins: the image's first pixel, and row and column, which may lie in the padding.
  struct Window {
    int image, top, left;
  };

  const ForwardArgs<T>& args;
  Window (&windows)[TILE];
  float (&x)[STEP][TILE];
  float (&w)[STEP][TILE];
  int first_row, first_filter;
  float x_next[EACH], w_next[EACH], sums[4][4];

  DEV_MEMBER PlainForward(const ForwardArgs<T>& args, Window (&windows)[TILE], float (&x)[STEP][TILE],
                          float (&w)[STEP][TILE])
      : args(args), windows(windows), x(x), w(w) {
    first_row = (int)blockIdx.x * TILE, first_filter = (int)blockIdx.y * TILE;
  }

  DEV_MEMBER int weights() const { return args.conv.r * args.conv.s * args.conv.c; }

  DEV_MEMBER void find_windows() {
    if (threadIdx.x >= TILE) return;
    const Conv& d = args.conv;
    int row = min(first_row + (int)threadIdx.x, args.rows - 1);
    windows[threadIdx.x] = {row / (d.p * d.q) * (d.h * d.w), row / d.q % d.p * d.stride - d.pad,
                            row % d.q * d.stride - d.pad};
  }

  // This thread's weight of the step, of every sixteenth pixel and filter.
  DEV_MEMBER void load(int first) {
    const Conv& d = args.conv;
    int weight = first + (int)threadIdx.x % STEP, channel = weight % d.c, tap = weight / d.c;
    int tap_y = tap / d.s, tap_x = tap % d.s;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      int at = (int)threadIdx.x / STEP + i * (THREADS / STEP), filter = first_filter + at;
      const Window& window = windows[at];
      int row = window.top + tap_y, column = window.left + tap_x;
      bool inside = weight < weights() && (u32)row < (u32)d.h && (u32)column < (u32)d.w;
      x_next[i] = inside ? to_float(args.x[((size_t)window.image + row * d.w + column) * d.c + channel]) : 0.0f;
      bool there = weight < weights() && filter < d.k;
      w_next[i] = there ? to_float(args.w[(size_t)filter * weights() + weight]) : 0.0f;
    }
  }

  DEV_MEMBER void store_loaded() {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      int at = (int)threadIdx.x / STEP + i * (THREADS / STEP);
      x[threadIdx.x % STEP][at] = x_next[i];
      w[threadIdx.x % STEP][at] = w_next[i];
    }
  }

  DEV_MEMBER void multiply() {
#pragma unroll
    for (int i = 0; i < STEP; i++) {
      float4 left = *(const float4*)&x[i][threadIdx.x / 16 * 4], right = *(const float4*)&w[i][threadIdx.x % 16 * 4];
      float l[4] = {left.x, left.y, left.z, left.w}, r[4] = {right.x, right.y, right.z, right.w};
#pragma unroll
      for (int j = 0; j < 16; j++) sums[j / 4][j % 4] = fmaf(l[j / 4], r[j % 4], sums[j / 4][j % 4]);
    }
  }

  DEV_MEMBER void run() {
#pragma unroll
    for (int i = 0; i < 16; i++) sums[i / 4][i % 4] = 0.0f;
    find_windows();
    __syncthreads();
    load(0);
    for (int first = 0; first < weights(); first += STEP) {
      __syncthreads();  // the last step's products are done
      store_loaded();
      __syncthreads();
      if (first + STEP < weights()) load(first + STEP);
      multiply();
    }
  }

  DEV_MEMBER void store() const {
#pragma unroll
    for (int i = 0; i < 16; i++) {
      int row = first_row + (int)threadIdx.x / 16 * 4 + i / 4, filter = first_filter + (int)threadIdx.x % 16 * 4 + i % 4;
      if (row < args.rows && filter < args.conv.k) {
        args.y[(size_t)row * args.conv.k + filter] = from_float<T>(sums[i / 4][i % 4]);
      }
    }
  }
};

template <class T>
DEV void plain_forward(const ForwardArgs<T>& args) {
  typedef PlainForward<T> Block;
  SHARED(typename Block::Window, windows, [Block::TILE]);
  SHARED(float, x, [Block::STEP][Block::TILE]);
  SHARED(float, w, [Block::STEP][Block::TILE]);
  Block block(args, windows, x, w);
  block.run();
  block.store();
}
KERNEL(stem_conv_forward_f32, ForwardArgs<float>, 256, 2) { plain_forward(args); }
KERNEL(stem_conv_forward_bf16, ForwardArgs<bf16>, 256, 2) { plain_forward(args); }

// ---- Patches for the tensor cores.

// What a tile of output pixels, one after the other, reads: for each row of a window a strip of pixels, and in it a segment
// for each row of the output that the tile touches. A segment is as wide as its windows together, rounded up to an even
// number of pixels. Where windows may begin at odd pixels there are two copies, the second one shifted by a pixel, so that
// two pixels from any place on lie aligned to 16 bytes in one of them.
template <int R_, int S_, int STRIDE_>
struct Patch {
  static constexpr int R = R_, S = S_, STRIDE = STRIDE_, PIXEL = 8;
  DEV_MEMBER static int width(int windows) { return ((windows - 1) * STRIDE + S + 1) / 2 * 2; }

  const Conv& conv;
  int first, rows;          // pixels of the output
  int first_row, segments;  // rows of the output, counted over all images
  int head, head_width;     // windows of the first segment, and its pixels
  int pitch;                // bytes of a strip

  DEV_MEMBER Patch(const Conv& conv, int first, int rows, int pitch)
      : conv(conv), first(first), rows(rows), pitch(pitch) {
    first_row = first / conv.q;
    head = min(conv.q - first % conv.q, rows);
    head_width = width(head);
    segments = 1 + ceil_div(rows - head, conv.q);
  }

  // Where a pixel's window begins in a strip, in pixels; for one past the last, that of the first.
  DEV_MEMBER int window(int pixel) const {
    if (pixel >= rows) return 0;
    if (pixel < head) return pixel * STRIDE;
    int behind = pixel - head;
    return head_width + behind / conv.q * width(conv.q) + behind % conv.q * STRIDE;
  }
  DEV_MEMBER int columns() const {
    int last = rows - head - (segments - 2) * conv.q;  // windows of the last segment
    return segments == 1 ? head_width : head_width + (segments - 2) * width(conv.q) + width(last);
  }

  // Three channels and a zero.
  DEV_MEMBER static u32x2 load_pixel(const bf16* x) {
    return {(u32)x[0].bits | (u32)x[1].bits << 16, (u32)x[2].bits};
  }

  // Fills `copies` of the patch, `copy_bytes` apart.
  template <int THREADS, int COPIES>
  DEV_MEMBER void fill(char* to, int copy_bytes, const bf16* x) const {
    int columns = this->columns();
    for (int at = (int)threadIdx.x; at < columns; at += THREADS) {
      int segment = at < head_width ? 0 : 1 + (at - head_width) / width(conv.q);
      int column = at < head_width ? at : (at - head_width) % width(conv.q);
      int output_row = first_row + segment, image = output_row / conv.p;
      int top = (output_row - image * conv.p) * STRIDE - conv.pad;
      int left = (segment == 0 ? first % conv.q : 0) * STRIDE - conv.pad + column;
      const bf16* pixels = x + ((size_t)image * conv.h * conv.w + left) * 3;
#pragma unroll
      for (int r = 0; r < R; r++) {
        bool inside = (u32)(top + r) < (u32)conv.h && (u32)left < (u32)conv.w;
        u32x2 pixel = {0, 0};
        if (inside) pixel = load_pixel(pixels + (size_t)(top + r) * conv.w * 3);
        *(u32x2*)(to + r * pitch + at * PIXEL) = pixel;
        if (COPIES == 2) *(u32x2*)(to + copy_bytes + r * pitch + (at + 1) * PIXEL) = pixel;
      }
    }
  }
};

// ---- The forward pass on the tensor cores: tiles of 128 pixels x 64 filters; a warp has 32 pixels.

struct TensorForwardArgs {
  ForwardArgs<bf16> forward;
  int tiles;
  int pitch;  // bytes of a patch's strip
};

template <class P>
struct TensorForward {
  static constexpr int THREADS = 128, PIXELS = 32, TAPS = P::R * P::S;
  static constexpr int STEPS = (TAPS + 3) / 4;  // 16 weights are four taps
  static constexpr int WEIGHT_BYTES = STEPS * 32 + 16, STAGE_BYTES = TILE_CHANNELS * 2 + 16;
  static constexpr int WEIGHTS = TILE_CHANNELS * WEIGHT_BYTES, STAGE = TILE_ROWS * STAGE_BYTES;

  const TensorForwardArgs& args;
  char *weights, *stage, *patch;
  int first_filter;
  float sums[2][8][4];

  DEV_MEMBER TensorForward(const TensorForwardArgs& args, char* shared)
      : args(args), weights(shared), stage(shared + WEIGHTS), patch(shared + WEIGHTS + STAGE) {
    first_filter = (int)blockIdx.y * TILE_CHANNELS;
  }

  // [filter][tap][4], zero past the last filter and tap, and for the fourth channel.
  DEV_MEMBER void load_weights() {
    const ForwardArgs<bf16>& forward = args.forward;
    for (int i = (int)threadIdx.x; i < TILE_CHANNELS * STEPS * 4; i += THREADS) {
      int filter = i / (STEPS * 4), tap = i % (STEPS * 4);
      u32x2 weight = {0, 0};
      if (first_filter + filter < forward.conv.k && tap < TAPS) {
        weight = P::load_pixel(forward.w + ((size_t)(first_filter + filter) * TAPS + tap) * 3);
      }
      *(u32x2*)(weights + filter * WEIGHT_BYTES + tap * 8) = weight;
    }
  }

  // Bytes from where a window begins.
  DEV_MEMBER int tap_offset(int tap) const { return tap / P::S * args.pitch + tap % P::S * P::PIXEL; }

  DEV_MEMBER void multiply(const P& place) {
#pragma unroll
    for (int i = 0; i < 64; i++) sums[i / 32][i / 4 % 8][i % 4] = 0.0f;
    // Rows lane / 4 + 8 i of the warp's pixels. Lanes 4 g and 4 g + 1 read a tap's four channels, the two behind them the next
    // tap's.
    const char* windows[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      windows[i] = patch + place.window(warp() * PIXELS + lane() / 4 + 8 * i) * P::PIXEL + lane() % 2 * 4;
    }
    bool second = lane() % 4 >= 2;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      u32 a[2][4];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int tap = step * 4 + half * 2;
        // Past the last tap nothing is read: zero weights would not stop a NaN.
        bool there = tap + 1 < TAPS || (tap < TAPS && !second);
        int offset = tap_offset(second ? tap + 1 : tap);
#pragma unroll
        for (int i = 0; i < 4; i++) a[i / 2][i % 2 + 2 * half] = there ? *(const u32*)(windows[i] + offset) : 0;
      }
#pragma unroll
      for (int pair = 0; pair < 4; pair++) {
        u32 b[4];
        int filter = pair * 16 + lane() / 16 * 8 + lane() % 8;
        ldmatrix_x4(b, weights + filter * WEIGHT_BYTES + step * 32 + lane() / 8 % 2 * 16);
        u32 left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < 2; m++) {
          mma_m16n8k16(sums[m][2 * pair], a[m], left);
          mma_m16n8k16(sums[m][2 * pair + 1], a[m], right);
        }
      }
    }
  }

  // Rounds to the stage, [pixel][filter].
  DEV_MEMBER void round() {
#pragma unroll
    for (int i = 0; i < 32; i++) {
      const int m = i / 16, n = i / 2 % 8, half = i % 2;
      int pixel = warp() * PIXELS + m * 16 + half * 8 + lane() / 4;
      u32 pair = pack_bf16x2(sums[m][n][2 * half], sums[m][n][2 * half + 1]);
      *(u32*)(stage + pixel * STAGE_BYTES + n * 16 + lane() % 4 * 4) = pair;
    }
  }

  DEV_MEMBER void store(int tile, int rows) {
    const ForwardArgs<bf16>& forward = args.forward;
    int k = forward.conv.k, filters = min(k - first_filter, TILE_CHANNELS), chunks = filters / 8;
    bf16* y = forward.y + (size_t)tile * TILE_ROWS * k + first_filter;
    for (int i = (int)threadIdx.x; i < TILE_ROWS * 8; i += THREADS) {
      int row = i / 8, chunk = i % 8;
      if (row < rows && chunk < chunks) store16(y + (size_t)row * k + chunk * 8, load16(stage + row * STAGE_BYTES + chunk * 16));
    }
    if (!forward.stats) return;
    auto stored = [&](int row, int c) { return to_float(*(const bf16*)(stage + row * STAGE_BYTES + c * 2)); };
    tile_stats<THREADS>(stored, rows, filters, forward.stats + (size_t)tile * 2 * k + first_filter, k);
  }

  DEV_MEMBER void run() {
    load_weights();
    for (int tile = (int)blockIdx.x; tile < args.tiles; tile += (int)gridDim.x) {
      int rows = min(args.forward.rows - tile * TILE_ROWS, TILE_ROWS);
      P place(args.forward.conv, tile * TILE_ROWS, rows, args.pitch);
      place.template fill<THREADS, 1>(patch, 0, args.forward.x);
      __syncthreads();  // the patch is whole, and the last tile stored
      multiply(place);
      round();
      __syncthreads();
      store(tile, rows);
    }
  }
};

// Blocks: some for all tiles, tiles of filters.
template <class Block>
DEV void tensor_forward(const TensorForwardArgs& args) {
  DYN_SHARED(shared);
  Block(args, shared).run();
}
typedef TensorForward<Patch<3, 3, 1>> Forward3x3;
typedef TensorForward<Patch<7, 7, 2>> Forward7x7;
KERNEL(stem_conv_forward_3x3_bf16, TensorForwardArgs, Forward3x3::THREADS, 3) { tensor_forward<Forward3x3>(args); }
KERNEL(stem_conv_forward_7x7_bf16, TensorForwardArgs, Forward7x7::THREADS, 2) { tensor_forward<Forward7x7>(args); }

// ---- The filter's gradient, plainly.

KERNEL(stem_conv_backward_filter_f32, FilterGradientArgs<float>, FILTER_THREADS, 2) { plain_filter_gradient(args); }
KERNEL(stem_conv_backward_filter_bf16, FilterGradientArgs<bf16>, FILTER_THREADS, 2) { plain_filter_gradient(args); }

// ---- And on the tensor cores: M = 64 filters, N = units of two neighbouring pixels (8 columns with the fourth channels; a
// tap row of seven, or three, taps ends in half a unit that nobody reads), K = pixels.

struct TensorFilterArgs {
  const bf16* x;
  const bf16* dz;
  const bf16* grad_x;
  const float* coef;
  float* out;  // [splits, k, r, s, 3]
  Conv conv;
  int rows, tiles, splits;
  int pitch;
  int unused;
};

// UNIT_WARPS share the units, the others the pixels.
template <class P, GradKind GRAD, int UNIT_WARPS>
struct TensorFilter {
  static constexpr int THREADS = 256, WARPS = THREADS / 32, PIXEL_WARPS = WARPS / UNIT_WARPS;
  static constexpr int ROW_UNITS = (P::S + 1) / 2, UNITS = P::R * ROW_UNITS, COLUMNS = UNITS * 8;
  static constexpr int EACH = UNITS / UNIT_WARPS, LOADS = (EACH + 1) / 2;
  static constexpr int COPIES = P::STRIDE % 2 ? 2 : 1, STEPS = TILE_ROWS / 16 / PIXEL_WARPS;
  static constexpr int GRAD_BYTES = TILE_CHANNELS * 2 + 16, GRADS = TILE_ROWS * GRAD_BYTES;
  static_assert(UNITS % UNIT_WARPS == 0, "warps have as many units each");

  const TensorFilterArgs& args;
  int (&windows)[TILE_ROWS];  // byte where a pixel's first unit begins
  char *grads, *patch;
  int copy_bytes, first_filter;
  AffineCoef8 coef;
  float sums[4][EACH][4];

  DEV_MEMBER TensorFilter(const TensorFilterArgs& args, int (&windows)[TILE_ROWS], char* shared)
      : args(args), windows(windows), grads(shared), patch(shared + GRADS) {
    copy_bytes = P::R * args.pitch;
    first_filter = (int)blockIdx.y * TILE_CHANNELS;
    if (GRAD == GradKind::Affine) coef.load(args.coef, filter(), args.conv.k);
#pragma unroll
    for (int i = 0; i < 4 * EACH * 4; i++) sums[i / 4 / EACH][i / 4 % EACH][i % 4] = 0.0f;
  }

  // The first of the eight filters whose gradients this thread loads.
  DEV_MEMBER int filter() const { return first_filter + (int)threadIdx.x % 8 * 8; }

  DEV_MEMBER void load_grads(int tile, int rows) {
#pragma unroll
    for (int i = 0; i < TILE_ROWS * 8 / THREADS; i++) {
      int row = (int)threadIdx.x / 8 + i * (THREADS / 8);
      u32x4 g = {0, 0, 0, 0};
      if (row < rows && filter() < args.conv.k) {
        size_t at = ((size_t)tile * TILE_ROWS + row) * args.conv.k + filter();
        g = load16_nc(args.dz + at);
        if (GRAD == GradKind::Affine) g = coef.apply(g, load16_nc(args.grad_x + at));
      }
      store16(grads + row * GRAD_BYTES + (int)threadIdx.x % 8 * 16, g);
    }
  }

  DEV_MEMBER void find_windows(const P& place) {
    for (int i = (int)threadIdx.x; i < TILE_ROWS; i += THREADS) {
      int pixel = place.window(i), copy = COPIES == 2 ? pixel % 2 : 0;
      windows[i] = copy * copy_bytes + (pixel + copy) * P::PIXEL;
    }
  }

  DEV_MEMBER int unit(int i) const { return warp() % UNIT_WARPS * EACH + i; }

  DEV_MEMBER void multiply() {
#pragma unroll 1
    for (int i = 0; i < STEPS; i++) {
      int pixel = (warp() / UNIT_WARPS * STEPS + i) * 16;
      const char* window = patch + windows[pixel + lane() % 16];
      u32 b[LOADS][4];
#pragma unroll
      for (int j = 0; j < LOADS; j++) {
        int at = unit(min(2 * j + lane() / 16, EACH - 1));
        ldmatrix_x4_trans(b[j], window + at / ROW_UNITS * args.pitch + at % ROW_UNITS * 2 * P::PIXEL);
      }
      const char* grad = grads + (pixel + lane() / 16 * 8 + lane() % 8) * GRAD_BYTES + lane() / 8 % 2 * 16;
#pragma unroll
      for (int m = 0; m < 4; m++) {
        u32 a[4];
        ldmatrix_x4_trans(a, grad + m * 32);
#pragma unroll
        for (int j = 0; j < EACH; j++) {
          u32 pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          mma_m16n8k16(sums[m][j], a, pair);
        }
      }
    }
  }

  DEV_MEMBER void run(int split) {
    int end = split_begin(args.tiles, split + 1, args.splits);
    for (int tile = split_begin(args.tiles, split, args.splits); tile < end; tile++) {
      int rows = min(args.rows - tile * TILE_ROWS, TILE_ROWS);
      P place(args.conv, tile * TILE_ROWS, rows, args.pitch);
      load_grads(tile, rows);
      place.template fill<THREADS, COPIES>(patch, copy_bytes, args.x);
      find_windows(place);
      __syncthreads();
      multiply();
      __syncthreads();
    }
  }

  // Adds the warps' sums, those of one range of pixels after the other, in `total` [64][COLUMNS].
  DEV_MEMBER void add_warps(float* total) {
    for (int turn = 0; turn < PIXEL_WARPS; turn++) {
      if (warp() / UNIT_WARPS == turn) {
#pragma unroll
        for (int i = 0; i < 4 * EACH * 4; i++) {
          const int m = i / 4 / EACH, n = i / 4 % EACH, e = i % 4;
          float* to = total + (m * 16 + e / 2 * 8 + lane() / 4) * COLUMNS + unit(n) * 8 + lane() % 4 * 2 + e % 2;
          *to = turn == 0 ? sums[m][n][e] : *to + sums[m][n][e];
        }
      }
      __syncthreads();
    }
  }

  DEV_MEMBER void store(const float* total, int split) const {
    constexpr int FILTER = P::R * P::S * 3;
    float* out = args.out + ((size_t)split * args.conv.k + first_filter) * FILTER;
    int filters = min(args.conv.k - first_filter, TILE_CHANNELS);
    for (int i = (int)threadIdx.x; i < filters * FILTER; i += THREADS) {
      int filter = i / FILTER, row = i % FILTER / (P::S * 3), column = i % (P::S * 3);
      out[i] = total[filter * COLUMNS + row * ROW_UNITS * 8 + column / 3 * 4 + column % 3];
    }
  }
};

// Blocks: splits, tiles of filters.
template <class Block>
DEV void tensor_filter(const TensorFilterArgs& args) {
  DYN_SHARED(shared);
  SHARED(int, windows, [TILE_ROWS]);
  Block block(args, windows, shared);
  int split = (int)blockIdx.x;
  block.run(split);
  block.add_warps((float*)shared);
  block.store((const float*)shared, split);
}
typedef TensorFilter<Patch<3, 3, 1>, GradKind::Plain, 2> Plain3x3;
typedef TensorFilter<Patch<3, 3, 1>, GradKind::Affine, 2> Affine3x3;
typedef TensorFilter<Patch<7, 7, 2>, GradKind::Plain, 4> Plain7x7;
typedef TensorFilter<Patch<7, 7, 2>, GradKind::Affine, 4> Affine7x7;
KERNEL(stem_conv_backward_filter_3x3_plain_bf16, TensorFilterArgs, 256, 2) { tensor_filter<Plain3x3>(args); }
KERNEL(stem_conv_backward_filter_3x3_affine_bf16, TensorFilterArgs, 256, 2) { tensor_filter<Affine3x3>(args); }
KERNEL(stem_conv_backward_filter_7x7_plain_bf16, TensorFilterArgs, 256, 1) { tensor_filter<Plain7x7>(args); }
KERNEL(stem_conv_backward_filter_7x7_affine_bf16, TensorFilterArgs, 256, 1) { tensor_filter<Affine7x7>(args); }

// dw[k][tap][c] = sum over output pixels of g * relu(scale * x + shift) on the tensor cores: a product of matrices with M = k,
// N = taps * c and K = pixels. Both operands lie in shared memory as in global memory, pixel by pixel, and ldmatrix.trans
// turns them.
//
// A tile of pixels is some rows of one image or several whole images, so that its gradients are one run of memory and its
// inputs one halo, loaded once for all nine taps. Raw data come by cp.async, two tiles ahead, into three buffers. A thread
// transforms, in place and between the products of the tile before, exactly what it has loaded itself: one barrier a tile.
// Only the inputs of a 1x1 filter are transformed behind ldmatrix: few warps share them, none of them is padding, and a
// thread's channels are fixed, which saves two of five passes through shared memory. For nine taps it would be nine times
// the work.
//
// Of small maps a step's 16 pixels may be one place in 16 images, or a few places: so taps that are outside of the map there
// are left out, and no padding lies in shared memory.
#include "filter_gradient.h"

struct Args {
  const bf16* x;       // [n, h, w, c]
  const float* norm;   // [4, c]
  const bf16* dz;      // [n, p, q, k]
  const bf16* grad_x;  // of an affine gradient
  const float* coef;   // [3, k]
  float* out;          // [splits, k, taps, c]
  Conv conv;
  // A tile: so many images (one, unless it has all their rows), and rows of the output in each.
  int images, rows;
  int tiles, splits;
  int inputs;  // rows of shared memory for a tile's inputs
  int pixels;  // and for its gradients: pixels, rounded up to steps of 16
  int unused;
};

// How a tile's pixels lie in shared memory.
enum class Order {
  Images,  // As they do in memory, the inputs with their padding.
  Places,  // First those of all its images at the first place of the map, then those at the next; tiles of whole images.
};

// TAPS: 1 or 9. BM x BN: filters x channels of a block, WM x WN: of a warp; with nine taps WN is 8.
template <int TAPS_, int BM_, int BN_, int WM_, int WN_, GradKind GRAD_, Order ORDER_>
struct Shape {
  static constexpr int TAPS = TAPS_, BM = BM_, BN = BN_, WM = WM_, WN = WN_;
  static constexpr GradKind GRAD = GRAD_;
  static constexpr Order ORDER = ORDER_;
  static constexpr int THREADS = (BM / WM) * (BN / WN) * 32;
  static constexpr int M_TILES = WM / 16, N_TILES = TAPS == 1 ? WN / 8 : TAPS, N_LOADS = (N_TILES + 1) / 2;
  static constexpr int BUFFERS = 3, STEP = 16;
  // Bytes of a row: 16 more than the data, so that eight rows one after the other lie in different banks.
  static constexpr int INPUT_BYTES = BN * 2 + 16, GRAD_BYTES = BM * 2 + 16;
  // Rows that are loaded by all threads together, 16 bytes each.
  static constexpr int INPUT_ROWS = THREADS / (BN / 8), GRAD_ROWS = THREADS / (BM / 8);
  static_assert(TAPS == 1 || (WN == 8 && BM == WM), "a warp has all taps of eight channels");
  static_assert(TAPS == 9 || ORDER == Order::Images, "one tap is inside everywhere");
};

// A tile's inputs. For stride 2 first the even columns, then the odd ones: so the pixels of a tap are neighbours.
struct Halo {
  int height, width, evens;
  template <class S>
  DEV_MEMBER static Halo of(const Args& args) {
    const Conv& d = args.conv;
    if (S::TAPS == 1) return {args.rows, d.q, 0};
    return {(args.rows - 1) * d.stride + 3, (d.q - 1) * d.stride + 3, d.stride == 2 ? d.q + 1 : 0};
  }
  // The image's column, counted from the first window, that lies at place `at`.
  DEV_MEMBER int column(int at) const { return !evens ? at : at < evens ? 2 * at : 2 * (at - evens) + 1; }
  // Where the first window's column lies.
  DEV_MEMBER int place(int column) const { return !evens ? column : column % 2 ? evens + column / 2 : column / 2; }
};

// A tile's first image and row of the output, and how many pixels it has.
struct Tile {
  int image, row, pixels;
  DEV_MEMBER static Tile of(const Args& args, int tile) {
    const Conv& d = args.conv;
    if (args.rows == d.p) {
      int image = tile * args.images;
      return {image, 0, min(d.n - image, args.images) * d.p * d.q};
    }
    int tiles = ceil_div(d.p, args.rows), image = tile / tiles, row = (tile - image * tiles) * args.rows;
    return {image, row, min(d.p - row, args.rows) * d.q};
  }
};

// A row of inputs in shared memory.
struct Source {
  int offset;  // of its pixel, from the tile's first window
  int place;   // image of the tile << 16 | row of the halo
};
static constexpr int NOWHERE = 0x7fff0000;  // never an image of a tile

template <class S>
struct FilterBlock {
  const Args& args;
  char* shared;
  const Source* sources;  // [inputs]
  // [pixels]: byte of the row that a pixel's first tap reads; of places with the taps that are inside in the lower TAPS bits.
  const int* windows;
  // Of places: [pixels], which of the tile's pixels in memory they are; [steps], the taps inside; a row of zeros.
  const int* in_memory;
  const int* step_taps;
  const char* zeros;
  int input_bytes, grad_bytes, buffer_bytes;
  int first_filter, first_channel;
  int warp_filter, warp_channel;  // of the block's
  // The eight channels, and the first row, that this thread loads, of the inputs and of the gradients.
  int channel, input_row, filter, grad_row;
  int inputs, grads;  // how many chunks
  // Which of them exist: of the tile loaded last, and of the one before.
  u32 inputs_loaded, grads_loaded, inputs_there, grads_there;
  // Of the channels that this thread transforms: loaded by it, or in its fragments.
  static constexpr int TRANSFORMED = S::TAPS == 1 ? S::N_TILES : 8;
  float scale[TRANSFORMED], shift[TRANSFORMED];
  AffineCoef8 coef;
  float sums[S::M_TILES][S::N_TILES][4];

  DEV_MEMBER FilterBlock(const Args& args, char* shared) : args(args), shared(shared) {}

  DEV_MEMBER char* input_chunk(int buffer, int i) const {
    return shared + buffer * buffer_bytes + (input_row + i * S::INPUT_ROWS) * S::INPUT_BYTES +
           (int)threadIdx.x % (S::BN / 8) * 16;
  }
  // A gradient's chunk; that of an affine one's x is `grad_bytes` behind it.
  DEV_MEMBER char* grad_chunk(int buffer, int i) const {
    return shared + buffer * buffer_bytes + input_bytes + (grad_row + i * S::GRAD_ROWS) * S::GRAD_BYTES +
           (int)threadIdx.x % (S::BM / 8) * 16;
  }

  DEV_MEMBER void make_tables(Source* sources, int* windows) const {
    const Conv& d = args.conv;
    Halo halo = Halo::of<S>(args);
    for (int i = (int)threadIdx.x; i < args.inputs; i += S::THREADS) {
      int image = i / (halo.height * halo.width), y = i / halo.width % halo.height, x = halo.column(i % halo.width);
      if (S::TAPS == 1) y *= d.stride, x *= d.stride;
      x -= d.pad;
      bool there = image < args.images && (u32)x < (u32)d.w;
      sources[i] = {(image * d.h + y) * d.w + x, there ? image << 16 | y : NOWHERE};
    }
    for (int i = (int)threadIdx.x; i < args.pixels; i += S::THREADS) {
      int image = i / (args.rows * d.q), row = i / d.q % args.rows, column = i % d.q;
      windows[i] = ((image * halo.height + row * d.stride) * halo.width + column) * S::INPUT_BYTES;
    }
  }

  DEV_MEMBER void make_tables_of_places(Source* sources, int* windows, int* in_memory, int* step_taps, int* zeros) const {
    const Conv& d = args.conv;
    for (int i = (int)threadIdx.x; i < args.inputs; i += S::THREADS) {
      int image = i % args.images, at = i / args.images;
      sources[i] = {(image * d.h + d.pad) * d.w + at, image << 16 | (at / d.w + d.pad)};
    }
    for (int i = (int)threadIdx.x; i < args.pixels; i += S::THREADS) {
      int image = i % args.images, place = i / args.images, taps = 0;
      int top = place / d.q * d.stride - d.pad, left = place % d.q * d.stride - d.pad;
      for (int tap = 0; tap < S::TAPS && place < d.p * d.q; tap++)
        if ((u32)(top + tap / 3) < (u32)d.h && (u32)(left + tap % 3) < (u32)d.w) taps |= 1 << tap;
      windows[i] = ((top * d.w + left) * args.images + image) * S::INPUT_BYTES * (1 << S::TAPS) + taps;
      in_memory[i] = place < d.p * d.q ? image * d.p * d.q + place : NOWHERE;
    }
    for (int i = (int)threadIdx.x; i < S::INPUT_BYTES / 4; i += S::THREADS) zeros[i] = 0;
    __syncthreads();
    for (int step = (int)threadIdx.x; step < args.pixels / S::STEP; step += S::THREADS) {
      int taps = 0;
      for (int i = 0; i < S::STEP; i++) taps |= windows[step * S::STEP + i];
      step_taps[step] = taps & ((1 << S::TAPS) - 1);
    }
  }

  DEV_MEMBER void begin() {
    const Conv& d = args.conv;
    channel = first_channel + (int)threadIdx.x % (S::BN / 8) * 8;
    filter = first_filter + (int)threadIdx.x % (S::BM / 8) * 8;
    input_row = (int)threadIdx.x / (S::BN / 8);
    grad_row = (int)threadIdx.x / (S::BM / 8);
    inputs = ceil_div(args.inputs, S::INPUT_ROWS);
    grads = ceil_div(args.pixels, S::GRAD_ROWS);
#pragma unroll
    for (int i = 0; i < TRANSFORMED; i++) {
      int c = S::TAPS == 1 ? first_channel + warp_channel + i * 8 + lane() / 4 : channel + i;
      scale[i] = c < d.c ? args.norm[2 * d.c + c] : 0.0f;
      shift[i] = c < d.c ? args.norm[3 * d.c + c] : 0.0f;
    }
    if (S::GRAD == GradKind::Affine) coef.load(args.coef, filter, d.k);
#pragma unroll
    for (int i = 0; i < S::M_TILES * S::N_TILES * 4; i++) sums[i / 4 / S::N_TILES][i / 4 % S::N_TILES][i % 4] = 0.0f;
  }

  // Starts the copies of a tile, without a commit. What does not exist becomes zero.
  DEV_MEMBER void load(int number, int buffer) {
    Tile tile = Tile::of(args, number);
    load_inputs(tile, buffer);
    load_grads(tile, buffer);
  }
  DEV_MEMBER void load_inputs(const Tile& tile, int buffer) {
    const Conv& d = args.conv;
    int top = tile.row * d.stride - d.pad, first = (tile.image * d.h + top) * d.w;
    inputs_loaded = 0;
    for (int i = 0; i < inputs; i++) {
      int row = input_row + i * S::INPUT_ROWS;
      if (row >= args.inputs) break;
      Source source = sources[row];
      bool there = channel < d.c && source.place < NOWHERE && tile.image + (source.place >> 16) < d.n &&
                   (u32)(top + (source.place & 0xffff)) < (u32)d.h;
      const bf16* from = there ? args.x + (size_t)(first + source.offset) * d.c + channel : args.x;
      cp_async16_or_zero(input_chunk(buffer, i), from, there ? Fill::Copy : Fill::Zero);
      inputs_loaded |= (u32)there << i;
    }
  }
  DEV_MEMBER void load_grads(const Tile& tile, int buffer) {
    const Conv& d = args.conv;
    size_t first = ((size_t)tile.image * d.p + tile.row) * d.q;
    grads_loaded = 0;
    for (int i = 0; i < grads; i++) {
      int row = grad_row + i * S::GRAD_ROWS;
      if (row >= args.pixels) break;
      int pixel = S::ORDER == Order::Places ? in_memory[row] : row;
      bool there = filter < d.k && pixel < tile.pixels;
      size_t at = there ? (first + pixel) * d.k + filter : 0;
      Fill fill = there ? Fill::Copy : Fill::Zero;
      cp_async16_or_zero(grad_chunk(buffer, i), args.dz + at, fill);
      if (S::GRAD == GradKind::Affine) cp_async16_or_zero(grad_chunk(buffer, i) + grad_bytes, args.grad_x + at, fill);
      grads_loaded |= (u32)there << i;
    }
  }

  // How many of its own chunks a thread transforms, and the transform of one; padding stays zero.
  DEV_MEMBER int transforms() const {
    return (S::TAPS == 1 ? 0 : inputs) + (S::GRAD == GradKind::Affine ? grads : 0);
  }
  DEV_MEMBER void transform(int i, int buffer) {
    int before = S::TAPS == 1 ? 0 : inputs;
    if (i < before) {
      if (inputs_there >> i & 1) transform_input(input_chunk(buffer, i));
    } else if (S::GRAD == GradKind::Affine && grads_there >> (i - before) & 1) {
      char* chunk = grad_chunk(buffer, i - before);
      store16(chunk, coef.apply(load16(chunk), load16(chunk + grad_bytes)));
    }
  }
  DEV_MEMBER void transform_input(char* chunk) {
    u32x4 v = load16(chunk);
    u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int c = 2 * i % TRANSFORMED;
      pairs[i] = norm_relu_bf16x2(pairs[i], make_float2(scale[c], scale[c + 1]), make_float2(shift[c], shift[c + 1]));
    }
    store16(chunk, {pairs[0], pairs[1], pairs[2], pairs[3]});
  }

  // Of step `step`, the row that this lane names to ldmatrix. Past the last pixel the first one, whose gradient does not
  // count there: another pixel's value might be NaN where this filter never meets it.
  DEV_MEMBER const char* input_at(int buffer, int step, int pixels) const {
    int pixel = step * S::STEP + lane() % 16;
    const char* inputs = shared + buffer * buffer_bytes;
    if (S::TAPS == 1) return inputs + pixel * S::INPUT_BYTES;
    return inputs + windows[pixel < pixels ? pixel : 0];
  }

  // Bytes from such a row to the two n-tiles of load `i`: channels of a 1x1, else taps, the last one twice.
  DEV_MEMBER int input_offset(int i) const {
    int tile = min(2 * i + lane() / 16, S::N_TILES - 1);
    if (S::ORDER == Order::Places)
      return (tile / 3 * args.conv.w + tile % 3) * args.images * S::INPUT_BYTES + warp_channel * 2;
    if (S::TAPS == 1) return (warp_channel + tile * 8) * 2;
    Halo halo = Halo::of<S>(args);
    return (tile / 3 * halo.width + halo.place(tile % 3)) * S::INPUT_BYTES + warp_channel * 2;
  }

  // The filters' fragment `i` of a step.
  DEV_MEMBER void load_grad_fragment(u32 (&a)[4], int buffer, int step, int i) const {
    const char* grad = shared + buffer * buffer_bytes + input_bytes +
                       (step * S::STEP + lane() / 16 * 8 + lane() % 8) * S::GRAD_BYTES +
                       (warp_filter + lane() / 8 % 2 * 8) * 2;
    ldmatrix_x4_trans(a, grad + i * 32);
  }

  // Of places: only what taps inside need.
  DEV_MEMBER void multiply_places(int buffer, int step, const int (&offsets)[S::N_LOADS]) {
    const char* inputs = shared + buffer * buffer_bytes;
    int window = windows[step * S::STEP + lane() % 16], taps = step_taps[step];
    u32 a[S::M_TILES][4], b[S::N_LOADS][4];
#pragma unroll
    for (int i = 0; i < S::M_TILES; i++) load_grad_fragment(a[i], buffer, step, i);
#pragma unroll
    for (int i = 0; i < S::N_LOADS; i++) {
      if ((taps >> 2 * i & 3) == 0) continue;
      bool inside = window >> min(2 * i + lane() / 16, S::TAPS - 1) & 1;
      ldmatrix_x4_trans(b[i], inside ? inputs + ((window >> S::TAPS) + offsets[i]) : zeros);
#pragma unroll
      for (int j = 2 * i; j < min(2 * i + 2, S::N_TILES); j++) {
        if ((taps >> j & 1) == 0) continue;
        u32 pair[2] = {b[i][j % 2 * 2], b[i][j % 2 * 2 + 1]};
#pragma unroll
        for (int m = 0; m < S::M_TILES; m++) mma_m16n8k16(sums[m][j], a[m], pair);
      }
    }
  }

  DEV_MEMBER void multiply(int buffer, int step, int pixels, const int (&offsets)[S::N_LOADS]) {
    if constexpr (S::ORDER == Order::Places) return multiply_places(buffer, step, offsets);
    u32 b[S::N_LOADS][4];
    const char* input = input_at(buffer, step, pixels);
#pragma unroll
    for (int i = 0; i < S::N_LOADS; i++) ldmatrix_x4_trans(b[i], input + offsets[i]);
    if (S::TAPS == 1) transform_fragments(b);
#pragma unroll
    for (int i = 0; i < S::M_TILES; i++) {
      u32 a[4];
      load_grad_fragment(a, buffer, step, i);
#pragma unroll
      for (int j = 0; j < S::N_TILES; j++) {
        u32 pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        mma_m16n8k16(sums[i][j], a, pair);
      }
    }
  }
  DEV_MEMBER void transform_fragments(u32 (&b)[S::N_LOADS][4]) const {
#pragma unroll
    for (int i = 0; i < S::N_LOADS * 4; i++) {
      int c = i / 2 % TRANSFORMED;
      b[i / 4][i % 4] = norm_relu_bf16x2(b[i / 4][i % 4], make_float2(scale[c], scale[c]), make_float2(shift[c], shift[c]));
    }
  }

  // Tiles first .. end.
  DEV_MEMBER void run(int first, int end) {
    int offsets[S::N_LOADS];
#pragma unroll
    for (int i = 0; i < S::N_LOADS; i++) offsets[i] = input_offset(i);
    load(first, 0);
    cp_async_commit();
    inputs_there = inputs_loaded, grads_there = grads_loaded;
    cp_async_wait<0>();
    if (first + 1 < end) load(first + 1, 1);
    cp_async_commit();
    for (int i = 0; i < transforms(); i++) transform(i, 0);
    __syncthreads();
    int buffer = 0;
    for (int tile = first; tile < end; tile++) {
      int next = (buffer + 1) % S::BUFFERS, after = (next + 1) % S::BUFFERS;
      run_tile(tile, end, buffer, next, after, offsets);
      __syncthreads();
      buffer = next;
    }
    cp_async_wait<0>();
  }

  // The products of a tile, between them the copies of the tile after the next and the transforms of the next.
  DEV_MEMBER void run_tile(int tile, int end, int buffer, int next, int after, const int (&offsets)[S::N_LOADS]) {
    if (S::TAPS == 9) cp_async_wait<0>();  // the next tile's copies, begun a tile ago
    inputs_there = inputs_loaded, grads_there = grads_loaded;
    const int transforms = tile + 1 < end ? this->transforms() : 0;
    // Images that are not there are at every place.
    const int pixels = S::ORDER == Order::Places ? args.pixels : Tile::of(args, tile).pixels;
    const int steps = ceil_div(pixels, S::STEP);
    // The two warps of a scheduler load at different steps, so that one multiplies meanwhile.
    const int load_step = steps > 2 ? warp() / 4 % 2 : 0;
    // The short tiles of a 1x1 give the next one more time to arrive: it is touched late, or behind the barrier only.
    const int wait_step = S::TAPS == 9 ? 0 : S::GRAD == GradKind::Affine ? steps / 2 : steps - 1;
    int transformed = 0;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
      multiply(buffer, step, pixels, offsets);
      if (step == load_step) {
        if (tile + 2 < end) load(tile + 2, after);
        cp_async_commit();
      }
      if (S::TAPS == 1 && step == wait_step) cp_async_wait<1>();
      const int due = step < wait_step ? 0 : transforms * (step + 1 - wait_step) / (steps - wait_step);
#pragma unroll 1
      for (; transformed < due; transformed++) transform(transformed, next);
    }
  }

  DEV_MEMBER void store(int split) const {
    const Conv& d = args.conv;
    float* out = args.out + (size_t)split * d.k * S::TAPS * d.c;
#pragma unroll
    for (int i = 0; i < S::M_TILES * S::N_TILES * 2; i++) {
      const int m = i / 2 / S::N_TILES, n = i / 2 % S::N_TILES, half = i % 2;
      int k = first_filter + warp_filter + m * 16 + half * 8 + lane() / 4;
      int c = first_channel + warp_channel + (S::TAPS == 1 ? n * 8 : 0) + lane() % 4 * 2, tap = S::TAPS == 1 ? 0 : n;
      if (k >= d.k || c >= d.c) continue;
      *(float2*)(out + ((size_t)k * S::TAPS + tap) * d.c + c) = make_float2(sums[m][n][half * 2], sums[m][n][half * 2 + 1]);
    }
  }
};

// Blocks: channels' tiles x filters' tiles x splits.
template <class S>
DEV void filter_gradient(const Args& args) {
  DYN_SHARED(shared);
  FilterBlock<S> block(args, shared);
  const Conv& d = args.conv;
  block.input_bytes = args.inputs * S::INPUT_BYTES;
  block.grad_bytes = args.pixels * S::GRAD_BYTES;
  block.buffer_bytes = block.input_bytes + block.grad_bytes * (S::GRAD == GradKind::Affine ? 2 : 1);
  char* zeros = shared + S::BUFFERS * block.buffer_bytes;
  Source* sources = (Source*)(zeros + (S::ORDER == Order::Places ? S::INPUT_BYTES : 0));
  int* windows = (int*)(sources + args.inputs);
  block.sources = sources, block.windows = windows;
  if constexpr (S::ORDER == Order::Places) {
    int *in_memory = windows + args.pixels, *step_taps = in_memory + args.pixels;
    block.in_memory = in_memory, block.step_taps = step_taps, block.zeros = zeros;
    block.make_tables_of_places(sources, windows, in_memory, step_taps, (int*)zeros);
  } else {
    block.make_tables(sources, windows);
  }
  int channel_tiles = ceil_div(d.c, S::BN), filter_tiles = ceil_div(d.k, S::BM);
  int split = (int)blockIdx.x / (channel_tiles * filter_tiles);
  block.first_channel = (int)blockIdx.x % channel_tiles * S::BN;
  block.first_filter = (int)blockIdx.x / channel_tiles % filter_tiles * S::BM;
  block.warp_filter = warp() % (S::BM / S::WM) * S::WM;
  block.warp_channel = warp() / (S::BM / S::WM) * S::WN;
  block.begin();
  __syncthreads();  // the tables
  block.run(split_begin(args.tiles, split, args.splits), split_begin(args.tiles, split + 1, args.splits));
  block.store(split);
}

// Blocks per multiprocessor are what registers leave room for.
#define FILTER_GRADIENT(NAME, TAPS, BM, BN, WM, WN, MIN_BLOCKS, ORDER)                                                 \
  KERNEL(norm_relu_conv_backward_filter_##NAME##_plain_bf16, Args, (BM / WM) * (BN / WN) * 32, MIN_BLOCKS) {           \
    filter_gradient<Shape<TAPS, BM, BN, WM, WN, GradKind::Plain, ORDER>>(args);                                        \
  }                                                                                                                    \
  KERNEL(norm_relu_conv_backward_filter_##NAME##_affine_bf16, Args, (BM / WM) * (BN / WN) * 32, MIN_BLOCKS) {          \
    filter_gradient<Shape<TAPS, BM, BN, WM, WN, GradKind::Affine, ORDER>>(args);                                       \
  }
FILTER_GRADIENT(9x64x64, 9, 64, 64, 64, 8, 1, Order::Images)
FILTER_GRADIENT(9x64x64_places, 9, 64, 64, 64, 8, 1, Order::Places)
FILTER_GRADIENT(9x64x32, 9, 64, 32, 64, 8, 1, Order::Images)
FILTER_GRADIENT(64x64, 1, 64, 64, 32, 16, 2, Order::Images)
FILTER_GRADIENT(256x64, 1, 256, 64, 64, 64, 2, Order::Images)
FILTER_GRADIENT(64x256, 1, 64, 256, 64, 64, 2, Order::Images)
FILTER_GRADIENT(128x128, 1, 128, 128, 64, 64, 2, Order::Images)
FILTER_GRADIENT(256x128, 1, 256, 128, 64, 64, 1, Order::Images)
FILTER_GRADIENT(128x256, 1, 128, 256, 64, 64, 1, Order::Images)

KERNEL(norm_relu_conv_backward_filter_f32, FilterGradientArgs<float>, FILTER_THREADS, 2) { plain_filter_gradient(args); }
KERNEL(norm_relu_conv_backward_filter_bf16, FilterGradientArgs<bf16>, FILTER_THREADS, 2) { plain_filter_gradient(args); }

struct SumArgs {
  const float* parts;  // [splits, len]
  float* sum;          // [len]
  u64 len;
  u64 line;       // Elements of one line of a filter's taps, where those are cut differently; else all.
  int splits[3];  // Of each line.
  int lanes;  // threads that share an element's splits, a divisor of the block's threads
};

// Each of an element's threads adds a range of the splits in order, the first one then their sums.
KERNEL(filter_gradient_add_splits, SumArgs, FILTER_THREADS, 4) {
  SHARED(float, ranges, [FILTER_THREADS]);
  int elements = FILTER_THREADS / args.lanes, range = (int)threadIdx.x / elements;
  u64 at = (u64)blockIdx.x * elements + threadIdx.x % elements;
  float sum = 0.0f;
  if (at < args.len) {
    int splits = args.splits[at / args.line % 3];
    int begin = split_begin(splits, range, args.lanes), end = split_begin(splits, range + 1, args.lanes);
#pragma unroll 8
    for (int split = begin; split < end; split++) sum += args.parts[split * args.len + at];
  }
  ranges[threadIdx.x] = sum;
  __syncthreads();
  if (range > 0 || at >= args.len) return;
  for (int i = 1; i < args.lanes; i++) sum += ranges[i * elements + threadIdx.x];
  args.sum[at] = sum;
}

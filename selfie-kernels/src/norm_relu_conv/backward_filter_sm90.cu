// The filters' gradient on Hopper: dw[k][c] = sum over pixels of dy[pixel][k] * relu(scale * x + shift)[pixel][c], with 3x3
// filters for each tap.
#include "conv_hopper_strips.h"

// ---- 3x3 filters, of a gradient that is one tensor.

#define STRIPS(name, TAPS, STRIDE)                                                                             \
  KERNEL(norm_relu_conv_backward_filter_hopper_##name##_bf16, StripArgs, (Strips<TAPS, STRIDE>::THREADS), 1) { \
    DYN_SHARED(shared);                                                                                        \
    StripConv<Strips<TAPS, STRIDE>>{args, shared}.run();                                                       \
  }
STRIPS(nine_taps, Taps::Nine, 1)
STRIPS(nine_taps_strided, Taps::Nine, 2)
STRIPS(three_taps, Taps::Three, 1)
STRIPS(three_taps_strided, Taps::Three, 2)

// ---- 1x1 filters.
//
// The product is taken transposed, D[c][k], over steps of 64 pixels. A is x, turned round by ldmatrix on its way to registers
// and transformed there: a thread's two channels are always the same, so their coefficients are in registers. B is the gradient
// as it lies; one that is formed from two tensors is formed in shared memory by a warpgroup of its own. A block makes a tile of
// the filter's gradient from a part of the pixels.

struct FilterArgs {
  TensorMap x, dy, grad_x;  // [rows][c], or with a stride the windows; [rows][k] twice.
  const float* norm;        // Scale, shift, [2][c].
  const float* coef;        // [3][k], of an affine gradient.
  float* out;               // [splits][k][c].
  int rows, c, k, splits;
  int stride, height, width;  // The last two of the gradient's maps.
  int unused[3];
};

// What the two consumers share out.
enum class Split { Channels, Filters };

// A consumer makes 64 channels of BN filters, by products of at most 128: a block of 512 threads has no registers for more.
template <Load LOAD_, Split SPLIT_, int BN_, int STAGES_, int INPUTS_>
struct Filter {
  static constexpr bool AFFINE = LOAD_ == Load::Affine;
  static constexpr Split SPLIT = SPLIT_;
  static constexpr int BN = BN_, N = BN < 128 ? BN : 128, THREADS = 512;
  static constexpr int CHANNELS = SPLIT == Split::Channels ? 128 : 64, FILTERS = SPLIT == Split::Filters ? 2 * BN : BN;
  // Rings: of steps of both operands, and of the tensor that the gradient is formed with.
  static constexpr int STAGES = STAGES_, INPUTS = AFFINE ? INPUTS_ : 0;
  static constexpr u32 PART_BYTES = STEP * ROW_BYTES;  // 64 pixels of 64 channels or filters.
  static constexpr u32 X_BYTES = CHANNELS / 64 * PART_BYTES, DY_BYTES = FILTERS / 64 * PART_BYTES;
  static constexpr u32 DY_AT = STAGES * X_BYTES, INPUTS_AT = DY_AT + STAGES * DY_BYTES;
  static constexpr u32 BARRIERS_AT = INPUTS_AT + INPUTS * DY_BYTES;
  static constexpr u32 SHARED_BYTES = BARRIERS_AT + (3 * STAGES + 2 * INPUTS) * 8;
  static_assert(SHARED_BYTES <= 227 << 10, "what a block may have");
};

template <class C>
struct FilterConv {
  const FilterArgs& args;
  char* shared;
  int channel_tiles = ceil_div(args.c, C::CHANNELS), tiles = channel_tiles * ceil_div(args.k, C::FILTERS);
  int steps = ceil_div(args.rows, STEP), split = (int)blockIdx.x / tiles, tile = (int)blockIdx.x - split * tiles;
  int channel = tile % channel_tiles * C::CHANNELS, filter = tile / channel_tiles * C::FILTERS;
  int first = (int)((u64)steps * split / args.splits), last = (int)((u64)steps * (split + 1) / args.splits);

  DEV_MEMBER u32 base() const { return shared_address(shared); }
  DEV_MEMBER u32 barrier(u32 i) const { return base() + C::BARRIERS_AT + i * 8; }
  DEV_MEMBER u32 full(u32 stage) const { return barrier(stage); }  // Both operands; the gradient as it came.
  DEV_MEMBER u32 formed(u32 stage) const { return barrier(C::STAGES + stage); }
  DEV_MEMBER u32 empty(u32 stage) const { return barrier(2 * C::STAGES + stage); }
  DEV_MEMBER u32 landed(u32 input) const { return barrier(3 * C::STAGES + input); }
  DEV_MEMBER u32 taken(u32 input) const { return barrier(3 * C::STAGES + C::INPUTS + input); }

  DEV_MEMBER void run() {
    if (threadIdx.x == 0) {
      for (u32 i = 0; i < C::STAGES; i++) {
        mbarrier_init(full(i), 1);
        mbarrier_init(formed(i), 4);
        mbarrier_init(empty(i), 8);
      }
      for (u32 i = 0; i + 1 <= C::INPUTS; i++) {
        mbarrier_init(landed(i), 1);
        mbarrier_init(taken(i), 4);
      }
      mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
      registers_give<40>();
      if (threadIdx.x == 0) load();
    } else if (threadIdx.x < 256) {
      registers_give<72>();
      if constexpr (C::AFFINE) form_gradient();
    } else {
      registers_take<200>();
      consume(warp() / 4 - 2);
    }
  }

  DEV_MEMBER void load() const {
    tma_prefetch(&args.x);
    tma_prefetch(&args.dy);
    int channels = min(C::CHANNELS, args.c - channel) / 64, filters = min(C::FILTERS, args.k - filter) / 64;
    Turn<C::STAGES> turn;
    Turn<C::AFFINE ? C::INPUTS : 1> input;
    for (int step = first; step < last; step++, turn.next(), input.next()) {
      u32 x = base() + turn.place * C::X_BYTES, dy = base() + C::DY_AT + turn.place * C::DY_BYTES;
      mbarrier_wait(empty(turn.place), turn.parity ^ 1);
      mbarrier_expect(full(turn.place), (channels + filters) * C::PART_BYTES);
      load_x(x, full(turn.place), step * STEP, channels);
      for (int i = 0; i < filters; i++)
        tma_load_2d(dy + i * C::PART_BYTES, &args.dy, full(turn.place), filter + i * 64, step * STEP);
      if (!C::AFFINE) continue;
      u32 to = base() + C::INPUTS_AT + input.place * C::DY_BYTES;
      mbarrier_wait(taken(input.place), input.parity ^ 1);
      mbarrier_expect(landed(input.place), filters * C::PART_BYTES);
      for (int i = 0; i < filters; i++)
        tma_load_2d(to + i * C::PART_BYTES, &args.grad_x, landed(input.place), filter + i * 64, step * STEP);
    }
  }
  DEV_MEMBER void load_x(u32 to, u32 barrier, int pixel, int parts) const {
    int line = pixel / args.width, image = line / args.height;
    int x = (pixel - line * args.width) * args.stride, y = (line - image * args.height) * args.stride;
    for (int i = 0; i < parts; i++)
      if (args.stride == 1) tma_load_2d(to + i * C::PART_BYTES, &args.x, barrier, channel + i * 64, pixel);
      else tma_load_windows(to + i * C::PART_BYTES, &args.x, barrier, channel + i * 64, x, y, image, 0, 0);
  }

  // The gradient in place of its first tensor; past the last pixel there is none. A thread has a chunk of eight filters of
  // every sixteenth pixel, of one 64 filters after the other.
  DEV_MEMBER void form_gradient() const {
    int t = (int)threadIdx.x % 128, chunk = t % 8, filters = min(C::FILTERS, args.k - filter) / 64;
    Turn<C::STAGES> turn;
    Turn<C::INPUTS> input;
    for (int step = first; step < last; step++, turn.next(), input.next()) {
      mbarrier_wait(full(turn.place), turn.parity);
      mbarrier_wait(landed(input.place), input.parity);
      char* to = shared + C::DY_AT + turn.place * C::DY_BYTES + swizzled(t / 8, chunk * 16);
      const char* x = shared + C::INPUTS_AT + input.place * C::DY_BYTES + swizzled(t / 8, chunk * 16);
#pragma unroll 1
      for (int part = 0; part < filters; part++)
        AffineChunk((const float2*)(args.coef + filter + part * 64 + chunk * 8), args.k / 2)
            .form<STEP>(to + part * C::PART_BYTES, x + part * C::PART_BYTES, args.rows - step * STEP - t / 8);
      fence_async();
      __syncwarp();
      if (lane() == 0) {
        mbarrier_arrive(formed(turn.place));
        mbarrier_arrive(taken(input.place));
      }
    }
  }

  // sum[j * 4 + c * 2 + e] is channel warp * 16 + lane / 4 + c * 8 of filter j * 8 + lane % 4 * 2 + e.
  DEV_MEMBER void consume(int group) const {
    float sum[C::BN / C::N][C::N / 2];
#pragma unroll
    for (int n = 0; n < C::BN / C::N; n++)
#pragma unroll
      for (int i = 0; i < C::N / 2; i++) sum[n][i] = 0.0f;
    int part = C::SPLIT == Split::Channels ? group : 0, own = channel + part * 64 + warp() % 4 * 16 + lane() / 4;
    float scale[2] = {}, shift[2] = {};
#pragma unroll
    for (int c = 0; c < 2; c++)
      if (own < args.c) scale[c] = args.norm[own + c * 8], shift[c] = args.norm[args.c + own + c * 8];
    u32 row = lane() / 16 * 8 + lane() % 8;
    u32 x = base() + part * C::PART_BYTES + swizzled(row, warp() % 4 * 32 + lane() / 8 % 2 * 16);
    u32 dy = base() + C::DY_AT + (C::SPLIT == Split::Filters ? group * (C::BN / 64) * C::PART_BYTES : 0);
    // One round; without a loop around both ptxas does the products one by one.
    for (u32 round = blockIdx.x; round < (u32)(tiles * args.splits); round += gridDim.x) {
      Turn<C::STAGES> turn;
      u32 before = C::STAGES;
      for (int step = first; step < last; step++, turn.next()) {
        mbarrier_wait(full(turn.place), turn.parity);
        if (C::AFFINE) mbarrier_wait(formed(turn.place), turn.parity);
        u64 b = wgmma_operand_other(dy + turn.place * C::DY_BYTES, C::PART_BYTES);
#pragma unroll
        for (int half = 0; half < 2; half++) {
          u32 a[2][4];
#pragma unroll
          for (int k = 0; k < 2; k++) {
            ldmatrix_x4_trans_at(a[k], x + turn.place * C::X_BYTES + (half * 2 + k) * 16 * ROW_BYTES);
#pragma unroll
            for (int i = 0; i < 4; i++)
              a[k][i] = norm_relu(a[k][i], make_float2(scale[i % 2], scale[i % 2]), make_float2(shift[i % 2], shift[i % 2]));
          }
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < 2; k++)
#pragma unroll
            for (int n = 0; n < C::BN / C::N; n++)
              wgmma<Major::Other>(sum[n], a[k],
                                  wgmma_advance(b, n * C::N / 64 * C::PART_BYTES + (half * 2 + k) * 16 * ROW_BYTES),
                                  Start::Continue);
          wgmma_commit();
          wgmma_wait<1>();
          if (half == 0 && before < C::STAGES && lane() == 0) mbarrier_arrive(empty(before));
        }
        before = turn.place;
      }
      wgmma_wait<0>();
#pragma unroll
      for (int n = 0; n < C::BN / C::N; n++) wgmma_hold(sum[n]);
      if (own >= args.c) continue;
      float* out = args.out + (u64)split * args.k * args.c + own;
#pragma unroll
      for (int part = 0; part < C::BN / 64; part++) {
        int first = filter + (C::SPLIT == Split::Filters ? group * C::BN : 0) + part * 64;
        if (first >= args.k) continue;
        float* to = out + (u64)(first + lane() % 4 * 2) * args.c;
#pragma unroll
        for (int i = 0; i < 32; i++)
          to[(i / 4 * 8 + i % 2) * args.c + i / 2 % 2 * 8] = sum[part * 64 / C::N][part * 32 % (C::N / 2) + i];
      }
    }
  }
};

#define FILTER(name, ...)                                                                              \
  KERNEL(norm_relu_conv_backward_filter_hopper_##name##_bf16, FilterArgs, (Filter<__VA_ARGS__>::THREADS), 1) { \
    DYN_SHARED(shared);                                                                                \
    FilterConv<Filter<__VA_ARGS__>>{args, shared}.run();                                               \
  }
FILTER(wide_plain, Load::Plain, Split::Channels, 256, 4, 0)
FILTER(wide_affine, Load::Affine, Split::Channels, 256, 3, 2)
FILTER(square_plain, Load::Plain, Split::Channels, 128, 6, 0)
FILTER(square_affine, Load::Affine, Split::Channels, 128, 5, 3)
FILTER(narrow_plain, Load::Plain, Split::Channels, 64, 8, 0)
FILTER(narrow_affine, Load::Affine, Split::Channels, 64, 6, 4)
FILTER(shallow_plain, Load::Plain, Split::Filters, 128, 5, 0)
FILTER(shallow_affine, Load::Affine, Split::Filters, 128, 4, 1)

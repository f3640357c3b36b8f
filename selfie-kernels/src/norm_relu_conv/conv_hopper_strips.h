#pragma once
// The gradient of 3x3 filters with a pixel of padding and stride 1 or 2 on Hopper:
//
//   dw[k][tap][c] = sum over pixels of dy[pixel][k] * relu(scale * x + shift)[pixel + tap][c]
//
// The product is taken transposed, D[c][k], tap by tap; x is turned round by ldmatrix on its way to registers and transformed
// there, once for a line of taps. The sum runs over strips, `width` columns of a line of the gradient's maps, of `images`
// images, the images innermost: so a pixel is a multiple of 1024 bytes, and a tap is the gradient from another pixel on,
// without trouble with the swizzle. With stride 2 the even columns of x and the odd ones are maps of their own.
//
// Lines of x above and below the map are not done. Of its columns left and right there are two ways:
// - Where a strip is a whole line, of a multiple of 16 images, a product's pixels are one column of the map, and a tap that has
//   nothing there is left out. Of all pairs of a pixel and a tap this does those that there are: of maps of 2x2 pixels 16 of
//   36, of 4x4 100 of 144, of 7x7 361 of 441; with stride 2 from 4x4 to 2x2 25 of 36.
// - Else there is a column of the gradient on either side of a strip, zeros where it is padding: an x that is not finite
//   reaches taps, too, that do not read it.
#include "conv_hopper.h"

struct StripArgs {
  TensorMap x, x_odd, dy;  // [c or k][images][width][height]; the second with stride 2 alone.
  const float* norm;       // Scale, shift, [2][c].
  float* out;              // [splits][k][9][c].
  int c, k;
  int splits[3];       // Of each line of taps; with nine taps the first are those of all.
  int height, strips;  // Of the gradient's maps; of the whole batch, each of `height` lines.
  int strips_across, width, images;
  int edge;            // Products of a line's outer columns, of which a tap is left out; none: there are columns beside a strip.
  int stages;
  int adds;    // Whether to what is there.
  int rounds;  // One.
  int unused[14];
};

// What a block makes.
enum class Taps {
  Nine,   // Of 64 channels and 64 filters; each of three consumers has a line of taps.
  Three,  // A line of taps of 128 channels and 128 filters; each of two consumers has 64 channels.
};

template <Taps TAPS_, int STRIDE_>
struct Strips {
  static constexpr Taps TAPS = TAPS_;
  static constexpr bool NINE = TAPS == Taps::Nine;
  static constexpr int STRIDE = STRIDE_, CONSUMERS = NINE ? 3 : 2, THREADS = 128 + 128 * CONSUMERS;
  static constexpr int SIDE = NINE ? 64 : 128;  // Channels, and filters.
  // Of x, each 64 channels of a strip of a line, with stride 2 of half of its columns.
  static constexpr int X_LINES = NINE ? STRIDE : 1, X_PARTS = SIDE / 64 * X_LINES * STRIDE;
  static constexpr int BESIDE = STRIDE == 1 ? 2 : 1;  // Columns of the gradient, if any.
};

template <class C>
struct StripConv {
  const StripArgs& args;
  char* shared;
  u32 pixel = args.images * ROW_BYTES, x_part = args.width * pixel, dy_part = x_part + (has_beside() ? C::BESIDE * pixel : 0);
  u32 dy_at = C::X_PARTS * x_part, stage_bytes = dy_at + C::SIDE / 64 * dy_part;
  int channel_tiles = ceil_div(args.c, C::SIDE), squares = channel_tiles * ceil_div(args.k, C::SIDE);
  int number = (int)blockIdx.x / squares, square = (int)blockIdx.x - number * squares;
  int channel = square % channel_tiles * C::SIDE, filter = square / channel_tiles * C::SIDE;
  // Which line of taps, and which of its splits.
  int before_second = args.splits[0], before_third = before_second + args.splits[1];
  int taps = C::NINE || number < before_second ? 0 : number < before_third ? 1 : 2;
  int split = number - (taps == 0 ? 0 : taps == 1 ? before_second : before_third), splits = args.splits[taps];
  // Steps are lines of strips: of the gradient's those that have a line of x, or all.
  int first_line = !C::NINE && taps == 0 ? 1 : 0;
  int lines = args.height - first_line - (!C::NINE && C::STRIDE == 1 && taps == 2 ? 1 : 0);
  int steps = args.strips * lines;
  // A block of nine taps makes a run of steps, as it may need the line before. Of three taps it makes every so many: then all
  // blocks are at about the same images, and what several of them read comes from device memory once.
  int first = C::NINE ? (int)((u64)steps * split / splits) : split, by = C::NINE ? 1 : splits;
  int last = C::NINE ? (int)((u64)steps * (split + 1) / splits) : steps;
  // Some of nine taps read the line before, too.
  int begin = C::NINE && first < last && first % lines > 0 ? first - 1 : first;

  DEV_MEMBER bool has_beside() const { return args.edge == 0; }
  DEV_MEMBER u32 base() const { return shared_address(shared); }
  DEV_MEMBER u32 full(u32 stage) const { return base() + args.stages * stage_bytes + stage * 8; }
  DEV_MEMBER u32 empty(u32 stage) const { return full(args.stages + stage); }

  DEV_MEMBER void run() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < args.stages; i++) {
        mbarrier_init(full(i), 1);
        mbarrier_init(empty(i), 4 * C::CONSUMERS);
      }
      mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
      registers_give<40>();
      if (threadIdx.x == 0 && first < last) load();
    } else {
      registers_take<C::NINE ? 152 : 232>();
      consume(warp() / 4 - 1);
    }
  }

  // The next stage, and the parity of the phase that its barriers are in.
  struct Ring {
    u32 stages, place = 0, parity = 0;
    DEV_MEMBER void next() {
      if (++place == stages) place = 0, parity ^= 1;
    }
    DEV_MEMBER u32 back(u32 steps) const { return place >= steps ? place - steps : place + stages - steps; }
  };

  DEV_MEMBER void load() const {
    tma_prefetch(&args.x);
    tma_prefetch(&args.dy);
    int channels = min(C::SIDE, args.c - channel) / 64, filters = min(C::SIDE, args.k - filter) / 64;
    Ring ring = {(u32)args.stages};
    for (int step = begin; step < last; step += by, ring.next()) {
      u32 to = base() + ring.place * stage_bytes, barrier = full(ring.place);
      int strip = step / lines, group = strip / args.strips_across, y = first_line + step - strip * lines;
      int image = group * args.images, column = (strip - group * args.strips_across) * args.width;
      mbarrier_wait(empty(ring.place), ring.parity ^ 1);
      mbarrier_expect(barrier, channels * C::X_LINES * C::STRIDE * x_part + filters * dy_part);
      for (int part = 0; part < channels; part++)
        for (int i = 0; i < C::X_LINES; i++) {
          int x_line = y * C::STRIDE + (C::NINE ? i : taps - 1);
          tma_load_4d(to, &args.x, barrier, channel + part * 64, image, column, x_line);
          if (C::STRIDE == 2) tma_load_4d(to + x_part, &args.x_odd, barrier, channel + part * 64, image, column, x_line);
          to += C::STRIDE * x_part;
        }
      to = base() + ring.place * stage_bytes + dy_at;
      column -= C::STRIDE == 1 && has_beside() ? 1 : 0;
      for (int part = 0; part < filters; part++)
        tma_load_4d(to + part * dy_part, &args.dy, barrier, filter + part * 64, image, column, y);
    }
  }

  // Every STRIDE-th of these taps of a line. A whole group, for ptxas does products one by one that lie in a branch within one.
  template <int FIRST, int LAST>
  DEV_MEMBER void multiply(float (&sum)[3][C::SIDE / 2], const u32 (&a)[4], u64 dy) const {
    wgmma_fence();
#pragma unroll
    for (int s = FIRST; s <= LAST; s += C::STRIDE)
      wgmma<Major::Other>(sum[s], a, wgmma_advance(dy, (u32)(2 - s) / C::STRIDE * pixel), Start::Continue);
    wgmma_commit();
  }

  // sum[s][j * 4 + c * 2 + e] is channel warp * 16 + lane / 4 + c * 8 of filter j * 8 + lane % 4 * 2 + e, of tap s of the line.
  DEV_MEMBER void consume(int group) const {
    float sum[3][C::SIDE / 2];
    int own = channel + (C::NINE ? 0 : group * 64) + warp() % 4 * 16 + lane() / 4;
    float scale[2] = {}, shift[2] = {};
#pragma unroll
    for (int c = 0; c < 2; c++)
      if (own < args.c) scale[c] = args.norm[own + c * 8], shift[c] = args.norm[args.c + own + c * 8];
    int line_of_taps = C::NINE ? group : taps;
    // Where lines are shared by the lines of taps, one of the operands may be that of the step before.
    bool x_before = C::NINE && group == 0, dy_before = C::NINE && C::STRIDE == 1 && group == 2;
    bool skips_first = x_before || dy_before;
    int lag = skips_first ? 2 : 1;  // So many steps back nothing is needed any more.
    u32 x_at = swizzled(lane() / 16 * 8 + lane() % 8, warp() % 4 * 32 + lane() / 8 % 2 * 16);
    if (C::NINE) x_at += C::STRIDE == 2 && group != 1 ? 2 * x_part : 0;
    else x_at += group * C::STRIDE * x_part;
    int pieces = args.width * args.images / 16;
    // From where on the gradient is read: with stride 1 from the column to the left of x, which need not be there.
    u32 gradient_at = dy_at - (C::STRIDE == 1 && !has_beside() ? pixel : 0);
    // Without a loop around both ptxas does the products one by one.
    for (int round = 0; round < args.rounds; round++) {
      // Here, so that behind a sum's store its register is free for loads.
#pragma unroll
      for (int s = 0; s < 3; s++)
#pragma unroll
        for (int i = 0; i < C::SIDE / 2; i++) sum[s][i] = 0.0f;
      Ring ring = {(u32)args.stages};
      int line = C::NINE ? begin % lines : 0;
      for (int step = begin; step < last; step += by, ring.next()) {
        auto free = [&] {
          if (step - lag * by >= begin && lane() == 0) mbarrier_arrive(empty(ring.back(lag)));
        };
        mbarrier_wait(full(ring.place), ring.parity);
        if constexpr (C::NINE) {
          bool works = step >= first && (line > 0 || !skips_first);
          if (++line == lines) line = 0;
          if (!works) {
            wgmma_wait<0>();
            free();
            continue;
          }
        }
        u32 x = base() + x_at + (x_before ? ring.back(1) : ring.place) * stage_bytes;
        u64 dy = wgmma_operand_other(base() + gradient_at + (dy_before ? ring.back(1) : ring.place) * stage_bytes, dy_part);
        bool is_first = true;
#pragma unroll 1
        for (int left = pieces; left > 0;) {
          // Two sets of registers: one is loaded while the tensor cores have the other. With stride 1 they are sixteen
          // pixels and the next; with stride 2 even columns and odd ones.
#pragma unroll
          for (int half = 0; half < 2; half++) {
            u32 a[4];
            ldmatrix_x4_trans_at(a, x + (C::STRIDE == 2 ? half * x_part : 0));
#pragma unroll
            for (int i = 0; i < 4; i++)
              a[i] = norm_relu(a[i], make_float2(scale[i % 2], scale[i % 2]), make_float2(shift[i % 2], shift[i % 2]));
            bool has_left = pieces - left >= args.edge, has_right = left > args.edge;
            if (C::STRIDE == 2 && half == 0) multiply<1, 1>(sum, a, dy);
            else if (C::STRIDE == 2 && has_right) multiply<0, 2>(sum, a, dy);
            else if (C::STRIDE == 2) multiply<2, 2>(sum, a, dy);
            else if (has_left && has_right) multiply<0, 2>(sum, a, dy);
            else if (has_right) multiply<0, 1>(sum, a, dy);
            else if (has_left) multiply<1, 2>(sum, a, dy);
            else multiply<1, 1>(sum, a, dy);
            wgmma_wait<1>();
            if (half == 0 && is_first) free();
            if (C::STRIDE == 2 && half == 0) continue;
            x += 16 * ROW_BYTES, dy = wgmma_advance(dy, 16 * ROW_BYTES);
            if (--left == 0) break;
          }
          is_first = false;
        }
        // The next line begins with the first set again.
        if (C::STRIDE == 1 && pieces % 2 == 1) wgmma_wait<0>();
      }
      wgmma_wait<0>();
#pragma unroll
      for (int s = 0; s < 3; s++) wgmma_hold(sum[s]);
      if (own >= args.c) continue;
      float* out = args.out + ((u64)split * args.k * 9 + line_of_taps * 3) * args.c + own;
#pragma unroll
      for (int part = 0; part < C::SIDE / 64; part++) {
        if (filter + part * 64 >= args.k) continue;
#pragma unroll
        for (int s = 0; s < 3; s++) {
          float* to = out + ((u64)(filter + part * 64 + lane() % 4 * 2) * 9 + s) * args.c;
          auto at = [&](int i) { return to + (i / 4 * 8 + i % 2) * 9 * args.c + i / 2 % 2 * 8; };
          // What is there is loaded all at once; a load does not pass the store before it.
          if (args.adds) {
#pragma unroll
            for (int i = 0; i < 32; i++) sum[s][part * 32 + i] += *at(i);
          }
#pragma unroll
          for (int i = 0; i < 32; i++) *at(i) = sum[s][part * 32 + i];
        }
      }
    }
  }
};

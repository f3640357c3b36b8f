// dz = conv^T(dy, w) (+ addend) behind the mask, with its sums, and dx = dy * w of a projection, on Hopper.
#include "conv_hopper_halo.h"
#include "conv_hopper_taps.h"

// ---- 3x3 filters: conv_hopper_halo.h, of a gradient that is one tensor.

#define HALO(name, ...)                                                                                           \
  KERNEL(conv_backward_data_hopper_##name##_bf16, HopperArgs, (Halo<Store::Masked, __VA_ARGS__>::THREADS), 1) {   \
    DYN_SHARED(shared);                                                                                           \
    HaloConv<Halo<Store::Masked, __VA_ARGS__>>{args, shared}.run();                                               \
  }
HALO(halo_wide, 128, 3)
HALO(halo_narrow, 64, 4)
HALO(classes_wide, 128, 3, Classes::Four)
HALO(classes_narrow, 64, 4, Classes::Four)

// ---- The same on small maps: conv_hopper_taps.h.

#define PLACES(name, BN, STAGES)                                                                                      \
  KERNEL(conv_backward_data_hopper_##name##_bf16, HopperArgs, (Taps<Store::Masked, BN, STAGES, Rows::Place>::THREADS), 1) { \
    DYN_SHARED(shared);                                                                                               \
    TapsConv<Taps<Store::Masked, BN, STAGES, Rows::Place>>{args, shared}.run();                                       \
  }
PLACES(place_wide, 128, 3)
PLACES(place_narrow, 64, 4)

// ---- 1x1 filters.
//
// The product is taken transposed: D[channel][pixel], A being the filters as they lie, [k][c], and B the gradient. So a lane
// has two channels of 32 pixels, whose sums are plain additions, and whose coefficients are in registers. A gradient that is
// formed from two tensors is formed once, in shared memory, by a warpgroup of its own, and stays there for several tiles of
// channels. A consumer makes 64 channels (or twice as many, where nothing masks them) of 128 pixels, which are a tile of the
// partial sums.
#include "conv_hopper.h"

struct BackwardDataArgs {
  TensorMap dy, grad_x, w, x, out;  // dy [rows][kc], grad_x as dy, w [kc][nc], x [rows][nc].
  const float* coef;                // [3][kc], of an affine gradient.
  const float* norm;                // Mean, rstd, scale, shift, [4][nc].
  const bf16* add;                  // Of every `add_step`-th pixel of every such row; may be null.
  float* sums;                      // [tiles][2][nc].
  int rows, kc, nc;
  // A block's share: so many tiles of channels of a tile of pixels, which are that many shares.
  int share, shares;
  int height, width, add_step;  // 1 or 2.
};

// What the two consumers share out.
enum class Split { Channels, Pixels };

template <Load LOAD_, Store STORE_, Split SPLIT_, int SLOTS_, int FILTERS_, int INPUTS_, int OUTLETS_, int PRODUCTS_ = 1>
struct Transposed {
  static constexpr Load LOAD = LOAD_;
  static constexpr Store STORE = STORE_;
  static constexpr Split SPLIT = SPLIT_;
  static constexpr bool AFFINE = LOAD == Load::Affine;
  static constexpr int THREADS = 512;
  // Of a consumer, each of 64 channels.
  static constexpr int PRODUCTS = PRODUCTS_;
  static constexpr int PIXELS = SPLIT == Split::Pixels ? 256 : 128, CHANNELS = (SPLIT == Split::Channels ? 128 : 64) * PRODUCTS;
  // Rings: of the gradient, 64 channels of it a slot, of the tensor that it is formed with, of filters; and each consumer's
  // buffers, in which x arrives and which the result leaves.
  static constexpr int SLOTS = SLOTS_, FILTERS = FILTERS_, INPUTS = AFFINE ? INPUTS_ : 0, OUTLETS = OUTLETS_;
  static constexpr u32 SLOT_BYTES = PIXELS * ROW_BYTES, FILTER_BYTES = CHANNELS * ROW_BYTES;
  static constexpr u32 RESULT_BYTES = 128 * ROW_BYTES, OUTLET_BYTES = PRODUCTS * RESULT_BYTES;  // A result is of 64 channels.
  static constexpr u32 COEF_BYTES = 3 * STEP * 4;
  static constexpr u32 INPUTS_AT = SLOTS * SLOT_BYTES, FILTERS_AT = INPUTS_AT + INPUTS * SLOT_BYTES;
  static constexpr u32 OUTLETS_AT = FILTERS_AT + FILTERS * FILTER_BYTES, COEF_AT = OUTLETS_AT + 2 * OUTLETS * OUTLET_BYTES;
  static constexpr u32 BARRIERS_AT = COEF_AT + INPUTS * COEF_BYTES;
  static constexpr u32 SHARED_BYTES = BARRIERS_AT + (2 * SLOTS + 2 * INPUTS + 2 * FILTERS + 4 * OUTLETS) * 8;
  static_assert(SHARED_BYTES <= 227 << 10, "what a block may have");
};

// A pixel of maps, and those that follow it in steps.
struct Walk {
  int width, height, x, y, image;
  DEV_MEMBER Walk(int width, int height, int pixel) : width(width), height(height) {
    int line = pixel / width;
    image = line / height;
    x = pixel - line * width, y = line - image * height;
  }
  template <int PIXELS>
  DEV_MEMBER void on() {
    x += PIXELS % width, y += PIXELS / width % height, image += PIXELS / width / height;
    if (x >= width) x -= width, y++;
    if (y >= height) y -= height, image++;
  }
};

template <class C>
struct TransposedConv {
  const BackwardDataArgs& args;
  char* shared;
  int tiles = ceil_div(args.nc, C::CHANNELS), units = ceil_div(args.rows, C::PIXELS) * args.shares, steps = args.kc / STEP;

  DEV_MEMBER u32 base() const { return shared_address(shared); }
  DEV_MEMBER u32 barrier(u32 i) const { return base() + C::BARRIERS_AT + i * 8; }
  DEV_MEMBER u32 usable(u32 slot) const { return barrier(slot); }
  DEV_MEMBER u32 vacant(u32 slot) const { return barrier(C::SLOTS + slot); }
  DEV_MEMBER u32 landed(u32 input) const { return barrier(2 * C::SLOTS + input); }
  DEV_MEMBER u32 taken(u32 input) const { return barrier(2 * C::SLOTS + C::INPUTS + input); }
  DEV_MEMBER u32 full(u32 filter) const { return barrier(2 * (C::SLOTS + C::INPUTS) + filter); }
  DEV_MEMBER u32 empty(u32 filter) const { return barrier(2 * (C::SLOTS + C::INPUTS) + C::FILTERS + filter); }
  DEV_MEMBER u32 ready(u32 outlet, int group) const {
    return barrier(2 * (C::SLOTS + C::INPUTS + C::FILTERS) + outlet * 2 + group);
  }
  DEV_MEMBER u32 staged(u32 outlet, int group) const { return ready(C::OUTLETS + outlet, group); }
  DEV_MEMBER u32 outlet_at(u32 outlet, int group) const {
    return base() + C::OUTLETS_AT + (outlet * 2 + group) * C::OUTLET_BYTES;
  }

  // Of a block's share: where its pixels and its first tile of channels begin, and how many tiles it has.
  struct Unit {
    int row, tile, count;
  };
  DEV_MEMBER Unit unit_at(int unit) const {
    int row = unit / args.shares, tile = (unit - row * args.shares) * args.share;
    return {row * C::PIXELS, tile, min(args.share, tiles - tile)};
  }
  DEV_MEMBER int row_of(const Unit& unit, int group) const { return unit.row + (C::SPLIT == Split::Pixels ? group * 128 : 0); }
  DEV_MEMBER int channel_of(const Unit& unit, int i, int group) const {
    return (unit.tile + i) * C::CHANNELS + (C::SPLIT == Split::Channels ? group * C::PRODUCTS * 64 : 0);
  }
  template <class Visit>
  DEV_MEMBER void each_unit(Visit visit) const {
    for (int unit = (int)blockIdx.x; unit < units; unit += (int)gridDim.x) visit(unit_at(unit));
  }

  DEV_MEMBER void run() {
    if (threadIdx.x == 0) {
      for (u32 i = 0; i < C::SLOTS; i++) {
        mbarrier_init(usable(i), C::AFFINE ? 4 : 1);
        mbarrier_init(vacant(i), 8);
      }
      for (u32 i = 0; i + 1 <= C::INPUTS; i++) {
        mbarrier_init(landed(i), 1);
        mbarrier_init(taken(i), 4);
      }
      for (u32 i = 0; i < C::FILTERS; i++) {
        mbarrier_init(full(i), 1);
        mbarrier_init(empty(i), 8);
      }
      for (u32 i = 0; i < C::OUTLETS; i++)
        for (int group = 0; group < 2; group++) {
          mbarrier_init(ready(i, group), 1);
          mbarrier_init(staged(i, group), 4);
        }
      mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
      registers_give<40>();
      if (lane() != 0) return;
      if (warp() == 0) load_gradient();
      if (warp() == 1) load_filters();
      if (warp() == 2) carry();
    } else if (threadIdx.x < 256) {
      registers_give<72>();
      if constexpr (C::AFFINE) form_gradient();
    } else {
      registers_take<200>();
      consume(warp() / 4 - 2);
    }
  }

  // ---- One lane each.

  DEV_MEMBER void load_gradient() const {
    tma_prefetch(&args.dy);
    Turn<C::SLOTS> slot;
    Turn<C::AFFINE ? C::INPUTS : 1> input;
    each_unit([&](const Unit& unit) {
      for (int step = 0; step < steps; step++, slot.next(), input.next()) {
        u32 done = C::AFFINE ? landed(input.place) : usable(slot.place);
        mbarrier_wait(vacant(slot.place), slot.parity ^ 1);
        if (C::AFFINE) mbarrier_wait(taken(input.place), input.parity ^ 1);
        mbarrier_expect(done, C::AFFINE ? 2 * C::SLOT_BYTES + C::COEF_BYTES : C::SLOT_BYTES);
        tma_load_2d(base() + slot.place * C::SLOT_BYTES, &args.dy, done, step * STEP, unit.row);
        if (!C::AFFINE) continue;
        tma_load_2d(base() + C::INPUTS_AT + input.place * C::SLOT_BYTES, &args.grad_x, done, step * STEP, unit.row);
        for (int i = 0; i < 3; i++)
          bulk_load(base() + C::COEF_AT + input.place * C::COEF_BYTES + i * STEP * 4, args.coef + i * args.kc + step * STEP,
                    STEP * 4, done);
      }
    });
  }

  DEV_MEMBER void load_filters() const {
    tma_prefetch(&args.w);
    Turn<C::FILTERS> turn;
    each_unit([&](const Unit& unit) {
      for (int i = 0; i < unit.count; i++) {
        int channel = (unit.tile + i) * C::CHANNELS, parts = min(C::CHANNELS, args.nc - channel) / 64;
        for (int step = 0; step < steps; step++, turn.next()) {
          mbarrier_wait(empty(turn.place), turn.parity ^ 1);
          mbarrier_expect(full(turn.place), parts * 64 * ROW_BYTES);
          for (int part = 0; part < parts; part++)
            tma_load_2d(base() + C::FILTERS_AT + turn.place * C::FILTER_BYTES + part * 64 * ROW_BYTES, &args.w,
                        full(turn.place), channel + part * 64, step * STEP);
        }
      }
    });
  }

  // x in, and the result out. With two outlets x of the next tile is under way while this one is made.
  DEV_MEMBER void carry() const {
    tma_prefetch(&args.out);
    auto load = [&](const Unit& unit, int i, u32 outlet) {
      for (int group = 0; group < 2; group++) {
        int row = row_of(unit, group), channel = channel_of(unit, i, group);
        if (C::STORE == Store::Plain || channel >= args.nc) {
          mbarrier_arrive(ready(outlet, group));
          continue;
        }
        int results = min(C::PRODUCTS, (args.nc - channel) / 64);
        mbarrier_expect(ready(outlet, group), results * C::RESULT_BYTES);
        for (int i = 0; i < results; i++)
          tma_load_2d(outlet_at(outlet, group) + i * C::RESULT_BYTES, &args.x, ready(outlet, group), channel + i * 64, row);
      }
    };
    Turn<C::OUTLETS> turn;
    int number = (int)blockIdx.x, i = 0;
    if (number < units) load(unit_at(number), 0, 0);
    while (number < units) {
      Unit unit = unit_at(number);
      int next = number, next_i = i + 1;
      if (next_i == unit.count) next_i = 0, next += (int)gridDim.x;
      Turn<C::OUTLETS> after = turn;
      after.next();
      if (C::OUTLETS > 1 && next < units) load(unit_at(next), next_i, after.place);
      for (int group = 0; group < 2; group++) {
        int row = row_of(unit, group), channel = channel_of(unit, i, group);
        mbarrier_wait(staged(turn.place, group), turn.parity);
        for (int i = 0; i < C::PRODUCTS && row < args.rows && channel + i * 64 < args.nc; i++)
          tma_store_2d(&args.out, outlet_at(turn.place, group) + i * C::RESULT_BYTES, channel + i * 64, row);
      }
      bulk_commit();
      bulk_wait_read<0>();
      if (C::OUTLETS == 1 && next < units) load(unit_at(next), next_i, after.place);
      number = next, i = next_i, turn = after;
    }
    bulk_wait<0>();
  }

  // ---- A warpgroup: the gradient from its two tensors, in place of the first. Pixels past the last one have none.

  DEV_MEMBER void form_gradient() const {
    int t = (int)threadIdx.x % 128, chunk = t % 8;
    Turn<C::SLOTS> slot;
    Turn<C::INPUTS> input;
    each_unit([&](const Unit& unit) {
      for (int step = 0; step < steps; step++, slot.next(), input.next()) {
        mbarrier_wait(landed(input.place), input.parity);
        char* to = shared + slot.place * C::SLOT_BYTES + swizzled(t / 8, chunk * 16);
        const char* x = shared + C::INPUTS_AT + input.place * C::SLOT_BYTES + swizzled(t / 8, chunk * 16);
        const char* coef = shared + C::COEF_AT + input.place * C::COEF_BYTES + chunk * 32;
        AffineChunk((const float2*)coef, STEP / 2).form<C::PIXELS>(to, x, args.rows - unit.row - t / 8);
        fence_async();
        __syncwarp();
        if (lane() == 0) {
          mbarrier_arrive(usable(slot.place));
          mbarrier_arrive(taken(input.place));
        }
      }
    });
  }

  // ---- The consumers. Of a product sum[j * 4 + c * 2 + e] is channel warp * 16 + lane / 4 + c * 8, pixel j * 8 + lane % 4 * 2
  // + e.

  DEV_MEMBER void consume(int group) const {
    Turn<C::SLOTS> first;  // Of the share's gradient.
    Turn<C::FILTERS> filter;
    Turn<C::OUTLETS> outlet;
    each_unit([&](const Unit& unit) {
      Turn<C::SLOTS> slot;
      for (int i = 0; i < unit.count; i++, outlet.next()) {
        float sum[C::PRODUCTS][64];
        int row = row_of(unit, group), channel = channel_of(unit, i, group);
#pragma unroll
        for (int p = 0; p < C::PRODUCTS; p++) {
          start_sums(sum[p], row, channel + p * 64);
          wgmma_hold(sum[p]);
        }
        wgmma_fence();
        u32 last_filter = C::FILTERS, last_slot = 0;  // Of the step before.
        auto free = [&] {
          if (last_filter == C::FILTERS || lane() != 0) return;
          mbarrier_arrive(empty(last_filter));
          if (i == unit.count - 1) mbarrier_arrive(vacant(last_slot));
        };
        slot = first;
#pragma unroll 1
        for (int step = 0; step < steps; step++, slot.next(), filter.next()) {
          if (i == 0) mbarrier_wait(usable(slot.place), slot.parity);
          mbarrier_wait(full(filter.place), filter.parity);
          u32 part = C::SPLIT == Split::Channels ? group * C::PRODUCTS * 64 * ROW_BYTES : 0;
          u64 a = wgmma_operand_other(base() + C::FILTERS_AT + filter.place * C::FILTER_BYTES + part, 0);
          u32 pixels = C::SPLIT == Split::Pixels ? group * 128 * ROW_BYTES : 0;
          u64 b = wgmma_operand_k(base() + slot.place * C::SLOT_BYTES + pixels);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < 4; k++)
#pragma unroll
            for (int p = 0; p < C::PRODUCTS; p++)
              wgmma<Major::Other, Major::K>(sum[p], wgmma_advance(a, p * 64 * ROW_BYTES + k * 2048), wgmma_advance(b, k * 32),
                                            Start::Continue);
          wgmma_commit();
          wgmma_wait<1>();
          free();
          last_filter = filter.place, last_slot = slot.place;
        }
        wgmma_wait<0>();
#pragma unroll
        for (int p = 0; p < C::PRODUCTS; p++) wgmma_hold(sum[p]);
        free();
        mbarrier_wait(ready(outlet.place, group), outlet.parity);
#pragma unroll
        for (int p = 0; p < C::PRODUCTS; p++)
          if (row < args.rows && channel + p * 64 < args.nc)
            finish(sum[p], outlet_at(outlet.place, group) + p * C::RESULT_BYTES, row, channel + p * 64);
        fence_async();
        arrive_warp(staged(outlet.place, group));
      }
      first = slot;
    });
  }

  // What is added, which the products are added to; zeros where there is none.
  DEV_MEMBER void start_sums(float (&sum)[64], int row, int channel) const {
#pragma unroll
    for (int i = 0; i < 64; i++) sum[i] = 0.0f;
    if (C::STORE == Store::Plain || !args.add || channel >= args.nc) return;
    int pixel = row + lane() % 4 * 2;
    const bf16* add = args.add + channel + warp() % 4 * 16 + lane() / 4;
    // All loads are under way before the first is waited for: none stands in a branch of its own.
    u32 bits[64] = {};
    auto load = [&](int e, int j, int from, bool there) {
#pragma unroll
      for (int c = 0; c < 2; c++)
        bits[j * 4 + c * 2 + e] =
            load_bits_or_zero(add + (u64)(u32)from * (u32)args.nc + c * 8, there ? Fill::Copy : Fill::Zero);
    };
#pragma unroll
    for (int e = 0; e < 2; e++) {
      if (args.add_step == 1) {
#pragma unroll
        for (int j = 0; j < 16; j++) load(e, j, pixel + e + j * 8, pixel + e + j * 8 < args.rows);
      } else if (e == 0 || args.width % 2 == 1) {  // Else the second is in an odd column.
        int height = ceil_div(args.height, 2), width = ceil_div(args.width, 2);
        Walk walk(args.width, args.height, pixel + e);
#pragma unroll
        for (int j = 0; j < 16; j++, walk.template on<8>())
          load(e, j, (walk.image * height + walk.y / 2) * width + walk.x / 2,
               pixel + e + j * 8 < args.rows && (walk.x | walk.y) % 2 == 0);
      }
    }
#pragma unroll
    for (int i = 0; i < 64; i++) sum[i] = bits_to_float(bits[i] << 16);
  }

  // Rounds, masks, and leaves the result where x was; sums over the pixels.
  DEV_MEMBER void finish(const float (&sum)[64], u32 buffer, int row, int channel) const {
    int own = channel + warp() % 4 * 16 + lane() / 4;
    // This lane's row for matrices of 8 pixels by 8 channels.
    u32 at = buffer + swizzled(lane() / 16 * 8 + lane() % 8, warp() % 4 * 32 + lane() / 8 % 2 * 16);
    float mean[2], scale[2], shift[2], first[2] = {}, second[2] = {};
    u32 xs[2][4];  // One step ahead.
    if constexpr (C::STORE == Store::Masked) {
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const float* norm = args.norm + own + c * 8;
        mean[c] = norm[0], scale[c] = norm[2 * args.nc], shift[c] = norm[3 * args.nc];
      }
      ldmatrix_x4_trans_at(xs[0], at);
    }
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
      u32 v[4];
      const u32(&x)[4] = xs[j / 2 % 2];
      __syncwarp();  // Every lane has its x of this step: rows that one has read another one stores.
      if (C::STORE == Store::Masked && j < 14) ldmatrix_x4_trans_at(xs[(j / 2 + 1) % 2], at + (j + 2) * 8 * ROW_BYTES);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int c = i % 2;
        float low = sum[(j + i / 2) * 4 + c * 2], high = sum[(j + i / 2) * 4 + c * 2 + 1];
        if constexpr (C::STORE == Store::Plain) {
          v[i] = pack_bf16x2(low, high);
        } else {
          float x_low = bf16x2_low(x[i]), x_high = bf16x2_high(x[i]);
          if (!passes(normalize(x_low, scale[c], shift[c]))) low = 0.0f;
          if (!passes(normalize(x_high, scale[c], shift[c]))) high = 0.0f;
          v[i] = pack_bf16x2(low, high);
          low = bf16x2_low(v[i]), high = bf16x2_high(v[i]);
          first[c] += low, first[c] += high;
          second[c] = fmaf(low, x_low - mean[c], second[c]);
          second[c] = fmaf(high, x_high - mean[c], second[c]);
        }
      }
      stmatrix_x4_trans_at(at + j * 8 * ROW_BYTES, v);
    }
    if constexpr (C::STORE == Store::Masked) {
#pragma unroll
      for (int c = 0; c < 2; c++) {
#pragma unroll
        for (int step = 1; step <= 2; step *= 2) {
          first[c] += __shfl_xor_sync(WARP, first[c], step);
          second[c] += __shfl_xor_sync(WARP, second[c], step);
        }
        float* sums = args.sums + (u64)(row / SUM_ROWS) * 2 * args.nc + own + c * 8;
        if (lane() % 4 != 0) continue;
        sums[0] = first[c];
        sums[args.nc] = second[c] * args.norm[args.nc + own + c * 8];
      }
    }
  }
};

#define TRANSPOSED(name, ...)                                                                            \
  KERNEL(conv_##name##_bf16, BackwardDataArgs, (Transposed<__VA_ARGS__>::THREADS), 1) {                  \
    DYN_SHARED(shared);                                                                                  \
    TransposedConv<Transposed<__VA_ARGS__>>{args, shared}.run();                                         \
  }
// The best of those measured for ResNet-50's shapes on an H200: slots, filters, inputs, outlets. `deep` keeps 512 channels of
// the gradient for more than one tile of channels; `long` has more of them under way, for tiles of many steps.
TRANSPOSED(backward_data_hopper_wide, Load::Plain, Store::Masked, Split::Channels, 6, 4, 0, 2)
TRANSPOSED(backward_data_hopper_narrow, Load::Plain, Store::Masked, Split::Pixels, 3, 4, 0, 2)
TRANSPOSED(backward_data_affine_hopper_wide, Load::Affine, Store::Masked, Split::Channels, 4, 3, 3, 2)
TRANSPOSED(backward_data_affine_hopper_narrow, Load::Affine, Store::Masked, Split::Pixels, 2, 4, 2, 2)
TRANSPOSED(backward_data_affine_hopper_deep, Load::Affine, Store::Masked, Split::Channels, 8, 3, 1, 1)
TRANSPOSED(backward_data_affine_hopper_long, Load::Affine, Store::Masked, Split::Channels, 6, 3, 3, 1)
TRANSPOSED(projection_hopper_wider, Load::Plain, Store::Plain, Split::Channels, 4, 3, 0, 1, 2)
TRANSPOSED(projection_hopper_wide, Load::Plain, Store::Plain, Split::Channels, 6, 4, 0, 2)
TRANSPOSED(projection_hopper_narrow, Load::Plain, Store::Plain, Split::Pixels, 3, 4, 0, 2)

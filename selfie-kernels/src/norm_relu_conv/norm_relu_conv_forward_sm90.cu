// y = conv(relu(scale * x + shift), w) (+ residual) and the statistics of y, on Hopper. Tiles and stages are the best of those
// measured for ResNet-50's shapes on an H200.
#include "conv_hopper_halo.h"

// ---- Tap by tap: A comes as it is, and is transformed in registers on its way to the tensor cores.

// What a row of A is.
enum class Rows {
  Pixel,   // The pixel of the same number: 1x1 filters with stride 1.
  Window,  // A pixel of the window that its number gives, of a filter of one tap ..
  Padded,  // .. or of nine, some of which may be padding.
};

template <int BN_, int STAGES_, Rows ROWS_>
struct Taps {
  static constexpr Rows ROWS = ROWS_;
  static constexpr int TAPS = ROWS == Rows::Padded ? 9 : 1, SIDE = ROWS == Rows::Padded ? 3 : 1;
  static constexpr int BN = BN_, STAGES = STAGES_, THREADS = 384;
  static constexpr u32 A_BYTES = TILE_ROWS * ROW_BYTES, B_BYTES = BN * ROW_BYTES, COEF_BYTES = 2 * STEP * 4;
  static constexpr u32 B_AT = STAGES * A_BYTES, OUTLETS_AT = B_AT + STAGES * B_BYTES;
  static constexpr u32 COEF_AT = OUTLETS_AT + 2 * Outlet<BN>::BYTES, SHARES_AT = COEF_AT + STAGES * COEF_BYTES;
  static constexpr u32 BARRIERS_AT = SHARES_AT + 2 * Outlet<BN>::SHARES_BYTES;
  static constexpr u32 SHARED_BYTES = BARRIERS_AT + 2 * STAGES * 8 + 2 * Outlet<BN>::BARRIER_BYTES;
  static_assert(SHARED_BYTES <= 227 << 10, "what a block may have");
};

template <class C>
struct TapsConv {
  const HopperArgs& args;
  char* shared;
  int tiles = tiles_of<C::BN>(args), steps = args.kc / STEP * C::TAPS;

  DEV_MEMBER u32 full(u32 stage) const { return shared_address(shared) + C::BARRIERS_AT + stage * 8; }
  DEV_MEMBER u32 empty(u32 stage) const { return full(C::STAGES + stage); }
  DEV_MEMBER Outlet<C::BN> outlet(int group) const {
    typedef Outlet<C::BN> O;
    return {args, shared + C::OUTLETS_AT + group * O::BYTES, shared + C::SHARES_AT + group * O::SHARES_BYTES,
            full(2 * C::STAGES) + group * O::BARRIER_BYTES, group};
  }

  DEV_MEMBER void run() {
    if (threadIdx.x == 0) {
      for (u32 stage = 0; stage < C::STAGES; stage++) {
        mbarrier_init(full(stage), 1);
        mbarrier_init(empty(stage), 8);
      }
      outlet(0).init();
      outlet(1).init();
      mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
      registers_give<40>();
      if (lane() != 0) return;
      if (warp() == 0) load();
      if (warp() == 1 || warp() == 2) outlet(warp() - 1).carry();
    } else {
      registers_take<232>();
      consume(warp() / 4 - 1);
    }
  }

  // The corner of an output's window in its map; -1 is padding.
  struct Corner {
    int image, x, y;
  };
  DEV_MEMBER Corner corner_of(int row) const {
    int line = row / args.out_width, image = line / args.out_height;
    int y = line - image * args.out_height, x = row - line * args.out_width;
    return {image, x * args.step - args.pad, y * args.step - args.pad};
  }

  DEV_MEMBER void load() {
    tma_prefetch(&args.a);
    tma_prefetch(&args.b);
    u32 base = shared_address(shared);
    Turn<C::STAGES> turn;
    for (int t = (int)blockIdx.x; t < tiles; t += (int)gridDim.x) {
      HopperTile tile = tile_at<C::BN>(args, t);
      Corner corner = C::ROWS == Rows::Pixel ? Corner{} : corner_of(tile.row);
      for (int step = 0; step < steps; step++, turn.next()) {
        u32 stage = turn.place, a = base + stage * C::A_BYTES, coef = base + C::COEF_AT + stage * C::COEF_BYTES;
        int tap = step % C::TAPS, channel = step / C::TAPS * STEP;
        mbarrier_wait(empty(stage), turn.parity ^ 1);
        mbarrier_expect(full(stage), C::A_BYTES + C::B_BYTES + C::COEF_BYTES);
        if (C::ROWS == Rows::Pixel) tma_load_2d(a, &args.a, full(stage), channel, tile.row);
        else tma_load_windows(a, &args.a, full(stage), channel, corner.x, corner.y, corner.image, tap % C::SIDE, tap / C::SIDE);
        tma_load_2d(base + C::B_AT + stage * C::B_BYTES, &args.b, full(stage), tap * args.kc + channel, tile.column);
        for (int i = 0; i < 2; i++)
          bulk_load(coef + i * STEP * 4, args.coef + i * args.kc + channel, STEP * 4, full(stage));
      }
    }
  }

  DEV_MEMBER void consume(int group) {
    Outlet<C::BN> out = outlet(group);
    HopperSums<C::BN> sum;
    clear<C::BN>(sum);
    Turn<C::STAGES> turn;
    u32 parity = 0;
    for (int t = (int)blockIdx.x; t < tiles; t += (int)gridDim.x, parity ^= 1) {
      HopperTile tile = tile_at<C::BN>(args, t);
      u32 inside = C::ROWS == Rows::Padded ? taps_inside(tile.row + group * SUM_ROWS) : 0;
      u32 last = C::STAGES;  // The stage of the step before; here none.
#pragma unroll 1
      for (int step = 0; step < steps; step++, turn.next()) {
        u32 masks[4];
#pragma unroll
        for (int i = 0; i < 4; i++) masks[i] = mask_of(inside >> i * 6, step % C::TAPS);
        mbarrier_wait(full(turn.place), turn.parity);
        multiply_step<C::BN, Major::K>(
            sum, wgmma_operand_k(shared_address(shared) + C::B_AT + turn.place * C::B_BYTES),
            step == 0 ? Start::Zero : Start::Continue,
            [&](u32(&a)[2][4], int k) { load_fragments(a, group, turn.place, k, masks); },
            [&] { if (last < C::STAGES && lane() == 0) mbarrier_arrive(empty(last)); });
        last = turn.place;
      }
      finish_sums<C::BN>(sum);
      if (lane() == 0) mbarrier_arrive(empty(last));
      out.put(sum, tile, parity);
    }
  }

  // Of each of this lane's four rows which columns (bits 0 to 2) and rows (3 to 5) of the filter lie inside of the map.
  DEV_MEMBER u32 taps_inside(int first) const {
    u32 inside = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      Corner corner = corner_of(first + i / 2 * 64 + warp() % 4 * 16 + lane() / 4 + i % 2 * 8);
#pragma unroll
      for (int d = 0; d < 3; d++) {
        inside |= (u32)((u32)(corner.x + d) < (u32)args.width) << (i * 6 + d);
        inside |= (u32)((u32)(corner.y + d) < (u32)args.height) << (i * 6 + 3 + d);
      }
    }
    return inside;
  }
  DEV_MEMBER static u32 mask_of(u32 inside, int tap) { return 0u - (inside >> tap % 3 & inside >> (3 + tap / 3) & 1); }

  DEV_MEMBER void load_fragments(u32 (&a)[2][4], int group, u32 stage, int k, const u32 (&masks)[4]) const {
    u32 row = group * SUM_ROWS + warp() % 4 * 16 + lane() % 16;
    u32 from = shared_address(shared) + stage * C::A_BYTES + swizzled(row, k * 32 + lane() / 16 * 16);
    const float2* scale = (const float2*)(shared + C::COEF_AT + stage * C::COEF_BYTES + k * 64 + lane() % 4 * 8);
    const float2* shift = scale + STEP / 2;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      ldmatrix_x4_at(a[i], from + i * 64 * ROW_BYTES);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        a[i][j] = norm_relu(a[i][j], scale[j / 2 * 4], shift[j / 2 * 4]);
        if (C::ROWS == Rows::Padded) a[i][j] &= masks[i * 2 + j % 2];
      }
    }
  }
};

#define TAPS(name, BN, STAGES, ROWS)                                                            \
  KERNEL(conv_forward_hopper_##name##_bf16, HopperArgs, (Taps<BN, STAGES, ROWS>::THREADS), 1) { \
    DYN_SHARED(shared);                                                                         \
    TapsConv<Taps<BN, STAGES, ROWS>>{args, shared}.run();                                       \
  }
TAPS(pixel_wide, 128, 3, Rows::Pixel)
TAPS(pixel_narrow, 64, 4, Rows::Pixel)
TAPS(window_wide, 128, 3, Rows::Window)
TAPS(window_narrow, 64, 4, Rows::Window)
TAPS(padded_wide, 128, 3, Rows::Padded)
TAPS(padded_narrow, 64, 4, Rows::Padded)

// ---- 3x3 filters with stride 1: conv_hopper_halo.h.

#define HALO(name, BN, STAGES)                                                      \
  KERNEL(conv_forward_hopper_##name##_bf16, HopperArgs, (Halo<Store::Forward, BN, STAGES>::THREADS), 1) { \
    DYN_SHARED(shared);                                                             \
    HaloConv<Halo<Store::Forward, BN, STAGES>>{args, shared}.run();                                 \
  }
HALO(halo_wide, 128, 3)
HALO(halo_narrow, 64, 6)

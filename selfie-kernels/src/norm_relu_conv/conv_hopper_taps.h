#pragma once
// Convolutions tap by tap on Hopper: A comes as it is, and is transformed in registers on its way to the tensor cores; forward,
// and of places also the gradient of the input, whose A is a gradient in one tensor.
#include "conv_hopper.h"

// What a row of A is.
enum class Rows {
  Pixel,   // The pixel of the same number: 1x1 filters with stride 1.
  Window,  // A pixel of the window that its number gives, of a filter of one tap ..
  Padded,  // .. or of nine, some of which may be padding.
  Place,   // An image's pixel at the tile's place in the map: all rows have the same taps inside, and no others are done.
};

template <Store STORE_, int BN_, int STAGES_, Rows ROWS_>
struct Taps {
  static constexpr Store STORE = STORE_;
  static constexpr Rows ROWS = ROWS_;
  static constexpr bool TRANSFORMS = STORE == Store::Forward;
  static constexpr int SIDE = ROWS == Rows::Padded || ROWS == Rows::Place ? 3 : 1, TAPS = SIDE * SIDE;
  static constexpr int BN = BN_, STAGES = STAGES_, THREADS = 384;
  static constexpr u32 A_BYTES = TILE_ROWS * ROW_BYTES, B_BYTES = BN * ROW_BYTES, COEF_BYTES = TRANSFORMS ? 2 * STEP * 4 : 0;
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
  int tiles = tiles_of<C::BN>(args);

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

  // The line (or column) of A's map that a tap reads for a line of the result's; none where it lies outside of the map.
  DEV_MEMBER int source(int y, int r, int height) const {
    int at = C::STORE == Store::Forward ? y * args.step - args.pad + r : y + args.pad - r;
    if (C::STORE != Store::Forward) at = at >= 0 && at % args.step == 0 ? at / args.step : -1;
    return at < height ? at : -1;
  }
  // Calls visit(tap, pixel of A's map) for each tap inside of it at a tile's place.
  template <class Visit>
  DEV_MEMBER void each_tap_of_place(HopperTile tile, Visit visit) const {
    int place = args.row_at(tile.row).place, y = place / args.out_width, x = place - y * args.out_width;
    for (int tap = 0; tap < 9; tap++) {
      int line = source(y, tap / 3, args.height), column = source(x, tap % 3, args.width);
      if (line >= 0 && column >= 0) visit(tap, line * args.width + column);
    }
  }
  // The taps of a tile, as bits.
  DEV_MEMBER u32 taps_of(HopperTile tile) const {
    if (C::ROWS != Rows::Place) return (1u << C::TAPS) - 1;
    u32 taps = 0;
    each_tap_of_place(tile, [&](int tap, int) { taps |= 1u << tap; });
    return taps;
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
      bool has_windows = C::ROWS == Rows::Window || C::ROWS == Rows::Padded;
      Corner corner = has_windows ? corner_of(tile.row) : Corner{};
      for (int channel = 0; channel < args.kc; channel += STEP) {
        auto load_tap = [&](int tap, int pixel) {
          u32 stage = turn.place, a = base + stage * C::A_BYTES, barrier = full(stage);
          mbarrier_wait(empty(stage), turn.parity ^ 1);
          mbarrier_expect(barrier, C::A_BYTES + filter_bytes(tile) + C::COEF_BYTES);
          if (C::ROWS == Rows::Pixel) tma_load_2d(a, &args.a, barrier, channel, tile.row);
          else if (C::ROWS == Rows::Place) tma_load_2d(a, &args.a, barrier, pixel * args.kc + channel, args.row_at(tile.row).image);
          else tma_load_windows(a, &args.a, barrier, channel, corner.x, corner.y, corner.image, tap % C::SIDE, tap / C::SIDE);
          load_filter(base + C::B_AT + stage * C::B_BYTES, barrier, tile, tap, channel);
          for (int i = 0; i < 2 && C::TRANSFORMS; i++)
            bulk_load(base + C::COEF_AT + stage * C::COEF_BYTES + i * STEP * 4, args.coef + i * args.kc + channel, STEP * 4, barrier);
          turn.next();
        };
        if (C::ROWS == Rows::Place) {
          each_tap_of_place(tile, load_tap);
        } else {
          for (int tap = 0; tap < C::TAPS; tap++) load_tap(tap, 0);
        }
      }
    }
  }
  // Forward [BN][STEP], of the gradient of the input [BN / 64][STEP][64] as filters lie, and so many bytes.
  DEV_MEMBER u32 filter_bytes(HopperTile tile) const {
    return C::STORE == Store::Forward ? C::B_BYTES : min(C::BN, args.nc - tile.column) / 64 * 64 * ROW_BYTES;
  }
  DEV_MEMBER void load_filter(u32 to, u32 barrier, HopperTile tile, int tap, int channel) const {
    if constexpr (C::STORE == Store::Forward) {
      tma_load_2d(to, &args.b, barrier, tap * args.kc + channel, tile.column);
    } else {
      for (int i = 0; i * 64 * ROW_BYTES < filter_bytes(tile); i++)
        tma_load_2d(to + i * 64 * ROW_BYTES, &args.b, barrier, tap * args.nc + tile.column + i * 64, channel);
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
      u32 taps = taps_of(tile);
#pragma unroll 1
      for (int channel = 0; channel < args.kc; channel += STEP)
#pragma unroll 1
        for (int tap = 0; tap < C::TAPS; tap++) {
          if (C::ROWS == Rows::Place && (taps >> tap & 1) == 0) continue;
          u32 masks[4];
#pragma unroll
          for (int i = 0; i < 4; i++) masks[i] = mask_of(inside >> i * 6, tap);
          mbarrier_wait(full(turn.place), turn.parity);
          constexpr Major MAJOR = C::STORE == Store::Forward ? Major::K : Major::Other;
          u32 b = shared_address(shared) + C::B_AT + turn.place * C::B_BYTES;
          multiply_step<C::BN, MAJOR>(
              sum, MAJOR == Major::K ? wgmma_operand_k(b) : wgmma_operand_other(b, 64 * ROW_BYTES),
              last == C::STAGES ? Start::Zero : Start::Continue,
              [&](u32(&a)[2][4], int k) { load_fragments(a, group, turn.place, k, masks); },
              [&] { if (last < C::STAGES && lane() == 0) mbarrier_arrive(empty(last)); });
          last = turn.place;
          turn.next();
        }
      finish_sums<C::BN>(sum);
      if (lane() == 0) mbarrier_arrive(empty(last));
      if constexpr (C::STORE == Store::Forward) out.put(sum, tile, parity);
      else out.put_masked(sum, tile, parity);
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
      for (int j = 0; j < 4 && C::TRANSFORMS; j++) {
        a[i][j] = norm_relu(a[i][j], scale[j / 2 * 4], shift[j / 2 * 4]);
        if (C::ROWS == Rows::Padded) a[i][j] &= masks[i * 2 + j % 2];
      }
    }
  }
};

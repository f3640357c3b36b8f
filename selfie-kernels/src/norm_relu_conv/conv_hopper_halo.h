#pragma once
// 3x3 filters with a pixel of padding on Hopper: with stride 1 forward and, with the taps in reverse, the gradient of the
// input; with stride 2 that gradient, a product of its own for each class of pixels, as odd lines and columns are reached by
// two taps of each side, even ones by one.
//
// The rows of all images lie below one another, each a line of its pixels between two of padding, with a line of padding
// between two images. The halo of a tile, from the line above its first pixel to the one below its last, is copied to shared
// memory for 64 channels at a time, in the forward pass transformed there once, in place, by a warpgroup of its own, and read
// by all taps: each is a fixed number of pixels away, whatever the size of the maps. Where pixels have classes, no tap reads
// what lies above or left of its pixel, and neither is copied.
#include "conv_hopper.h"

template <Store STORE_, int BN_, int STAGES_, Classes CLASSES_ = Classes::One>
struct Halo {
  static constexpr Store STORE = STORE_;
  static constexpr Classes CLASSES = CLASSES_;
  static constexpr int BEFORE = CLASSES == Classes::One ? 1 : 0;  // Lines above, and columns to the left.
  static constexpr bool TRANSFORMS = STORE == Store::Forward;
  static constexpr int BN = BN_, STAGES = STAGES_, THREADS = TRANSFORMS ? 512 : 384;
  static constexpr u32 B_BYTES = BN * ROW_BYTES, OUTLETS_AT = STAGES * B_BYTES;
  static constexpr u32 SHARES_AT = OUTLETS_AT + 2 * Outlet<BN>::BYTES, BARRIERS_AT = SHARES_AT + 2 * Outlet<BN>::SHARES_BYTES;
  static constexpr u32 BARRIER_BYTES = 2 * STAGES * 8 + 3 * 2 * 8 + 2 * Outlet<BN>::BARRIER_BYTES;
  static constexpr u32 HALOS_AT = ceil_div(BARRIERS_AT + BARRIER_BYTES, 1024u) * 1024u;  // Two of them follow.
};

template <class C>
struct HaloConv {
  const HopperArgs& args;
  char* shared;
  int tiles = tiles_of<C::BN, C::CLASSES>(args), steps = args.kc / STEP, pitch = args.width + 1 + C::BEFORE;

  DEV_MEMBER u32 full(u32 stage) const { return shared_address(shared) + C::BARRIERS_AT + stage * 8; }
  DEV_MEMBER u32 empty(u32 stage) const { return full(C::STAGES + stage); }
  DEV_MEMBER u32 landed(u32 halo) const { return full(2 * C::STAGES + halo); }      // Is there, as it was, ..
  DEV_MEMBER u32 usable(u32 halo) const { return full(2 * C::STAGES + 2 + halo); }  // .. and transformed.
  DEV_MEMBER u32 vacant(u32 halo) const { return full(2 * C::STAGES + 4 + halo); }
  DEV_MEMBER char* halo_at(u32 halo) const { return shared + C::HALOS_AT + halo * args.halo_bytes; }
  DEV_MEMBER Outlet<C::BN, C::CLASSES> outlet(int group) const {
    typedef Outlet<C::BN, C::CLASSES> O;
    return {args, shared + C::OUTLETS_AT + group * O::BYTES, shared + C::SHARES_AT + group * O::SHARES_BYTES,
            full(2 * C::STAGES + 6) + group * O::BARRIER_BYTES, group};
  }

  // The taps of a tile's pixels: how many; how far from the halo's pixel for a row each reads; which of the filters' it is.
  DEV_MEMBER static int taps_of(HopperTile tile) { return C::CLASSES == Classes::One ? 9 : (1 + tile.y) * (1 + tile.x); }
  DEV_MEMBER int away(HopperTile tile, int tap) const {
    if (C::CLASSES == Classes::One) return tap / 3 * pitch + tap % 3;
    int r = tile.x == 1 ? tap / 2 : tap, s = tile.x == 1 ? tap % 2 : 0;
    return (tile.y - r) * pitch + tile.x - s;
  }
  DEV_MEMBER static int filter_tap(HopperTile tile, int tap) {
    if (C::CLASSES == Classes::One) return C::STORE == Store::Forward ? tap : 8 - tap;
    int r = tile.x == 1 ? tap / 2 : tap, s = tile.x == 1 ? tap % 2 : 0;
    return (1 - tile.y + r * 2) * 3 + 1 - tile.x + s * 2;
  }

  // The line above a pixel's.
  DEV_MEMBER int line_above(int pixel) const {
    int row = pixel / args.width, image = row / args.height;
    return row + image;
  }
  struct Lines {
    int first, count;
    int y;  // Of the first one in its image, -1 for the padding above it.
    int image;
  };
  DEV_MEMBER Lines lines_of(HopperTile tile) const {
    int first = line_above(tile.row) + 1 - C::BEFORE, last = line_above(min(tile.row + TILE_ROWS, args.rows) - 1) + 2;
    int image = first / (args.height + 1);
    return {first, last - first + 1, first - image * (args.height + 1) - 1, image};
  }

  DEV_MEMBER void run() {
    if (threadIdx.x == 0) {
      for (u32 stage = 0; stage < C::STAGES; stage++) {
        mbarrier_init(full(stage), 1);
        mbarrier_init(empty(stage), 8);
      }
      for (u32 halo = 0; halo < 2; halo++) {
        mbarrier_init(landed(halo), 1);
        mbarrier_init(usable(halo), 4);
        mbarrier_init(vacant(halo), 8);
        outlet((int)halo).init();
      }
      mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
      registers_give<40>();
      if (lane() != 0) return;
      if (warp() == 0) load_halos();
      if (warp() == 1) load_filters();
      if (warp() >= 2) outlet(warp() - 2).carry();
    } else if (threadIdx.x < C::THREADS - 256) {
      registers_give<72>();
      transform_halos();
    } else {
      registers_take<C::TRANSFORMS ? 200 : 232>();
      consume(warp() / 4 - (C::TRANSFORMS ? 2 : 1));
    }
  }

  DEV_MEMBER void load_halos() {
    tma_prefetch(&args.a);
    Turn<2> turn;
    for (int t = (int)blockIdx.x; t < tiles; t += (int)gridDim.x) {
      Lines lines = lines_of(tile_at<C::BN, C::CLASSES>(args, t));
      int loads = 0;
      each_line(lines, [&](int, int, int) { loads++; });
      for (int step = 0; step < steps; step++, turn.next()) {
        u32 barrier = landed(turn.place), to = shared_address(halo_at(turn.place));
        mbarrier_wait(vacant(turn.place), turn.parity ^ 1);
        mbarrier_expect(barrier, loads * pitch * ROW_BYTES);
        each_line(lines, [&](int line, int image, int y) {
          tma_load_4d(to + line * pitch * ROW_BYTES, &args.a, barrier, step * STEP, -C::BEFORE, y, image);
        });
      }
    }
  }
  // Those that are copied. Where nobody transforms them, padding too, which TMA fills with zeros.
  template <class Visit>
  DEV_MEMBER void each_line(Lines lines, Visit visit) const {
    for (int line = 0; line < lines.count; line++) {
      if (!C::TRANSFORMS || lines.y >= 0) visit(line, lines.image, lines.y);
      if (++lines.y == args.height) lines.y = -1, lines.image++;
    }
  }

  DEV_MEMBER void load_filters() {
    tma_prefetch(&args.b);
    u32 base = shared_address(shared);
    Turn<C::STAGES> turn;
    for (int t = (int)blockIdx.x; t < tiles; t += (int)gridDim.x) {
      HopperTile tile = tile_at<C::BN, C::CLASSES>(args, t);
      for (int step = 0; step < steps; step++)
        for (int tap = 0; tap < taps_of(tile); tap++, turn.next()) {
          mbarrier_wait(empty(turn.place), turn.parity ^ 1);
          u32 to = base + turn.place * C::B_BYTES, barrier = full(turn.place);
          if (C::STORE == Store::Forward) {
            mbarrier_expect(barrier, C::B_BYTES);
            tma_load_2d(to, &args.b, barrier, filter_tap(tile, tap) * args.kc + step * STEP, tile.column);
          } else {
            int parts = min(C::BN, args.nc - tile.column) / 64;
            mbarrier_expect(barrier, parts * 64 * ROW_BYTES);
            for (int i = 0; i < parts; i++)
              tma_load_2d(to + i * 64 * ROW_BYTES, &args.b, barrier, filter_tap(tile, tap) * args.nc + tile.column + i * 64,
                          step * STEP);
          }
        }
    }
  }

  // A thread has a chunk of eight channels of every sixteenth pixel, four of them at a time.
  DEV_MEMBER void transform_halos() {
    int t = (int)threadIdx.x % 128, chunk = t % 8, period = args.height + 1;
    // From a pixel to the sixteenth after it: columns, and lines.
    int columns_on = 16 % pitch, lines_on = 16 / pitch % period;
    Turn<2> turn;
    for (int tile = (int)blockIdx.x; tile < tiles; tile += (int)gridDim.x) {
      Lines lines = lines_of(tile_at<C::BN, C::CLASSES>(args, tile));
      int rows = lines.count * pitch, first_line = lines.first % period;
      for (int step = 0; step < steps; step++, turn.next()) {
        float2 scale[4], shift[4];
        const float2* coef = (const float2*)(args.coef + step * STEP + chunk * 8);
#pragma unroll
        for (int i = 0; i < 4; i++) scale[i] = coef[i], shift[i] = coef[args.kc / 2 + i];
        char* halo = halo_at(turn.place);
        mbarrier_wait(landed(turn.place), turn.parity);
        int column = t / 8 % pitch, line = (first_line + t / 8 / pitch) % period;  // Line 0 is padding.
        for (int row = t / 8; row < rows; row += 64) {
          u32x4 v[4];
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (row + i * 16 < rows) v[i] = load16(halo + swizzled(row + i * 16, chunk * 16));
#pragma unroll
          for (int i = 0; i < 4; i++) {
            bool padding = column == 0 || column == pitch - 1 || line == 0;
            v[i] = {norm_relu(v[i].x, scale[0], shift[0]), norm_relu(v[i].y, scale[1], shift[1]),
                    norm_relu(v[i].z, scale[2], shift[2]), norm_relu(v[i].w, scale[3], shift[3])};
            if (padding) v[i] = {0, 0, 0, 0};
            if (row + i * 16 < rows) store16(halo + swizzled(row + i * 16, chunk * 16), v[i]);
            column += columns_on, line += lines_on;
            if (column >= pitch) column -= pitch, line++;
            if (line >= period) line -= period;
          }
        }
        fence_async();  // The next halo is copied over this one.
        arrive_warp(usable(turn.place));
      }
    }
  }

  DEV_MEMBER void consume(int group) {
    Outlet<C::BN, C::CLASSES> out = outlet(group);
    HopperSums<C::BN> sum;
    clear<C::BN>(sum);
    Turn<C::STAGES> turn;
    Turn<2> halo;
    u32 parity = 0;
    for (int t = (int)blockIdx.x; t < tiles; t += (int)gridDim.x, parity ^= 1) {
      HopperTile tile = tile_at<C::BN, C::CLASSES>(args, t);
      int taps = taps_of(tile), above = line_above(tile.row);
      int corner[2];  // Of this lane's rows for ldmatrix: what `away` counts from.
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int pixel = min(tile.row + group * SUM_ROWS + i * 64 + warp() % 4 * 16 + lane() % 16, args.rows - 1);
        corner[i] = (line_above(pixel) - above) * pitch + pixel % args.width;
      }
      u32 last = C::STAGES;
      for (int step = 0; step < steps; step++, halo.next()) {
        u32 from = shared_address(halo_at(halo.place));
        mbarrier_wait(C::TRANSFORMS ? usable(halo.place) : landed(halo.place), halo.parity);
#pragma unroll 1
        for (int tap = 0; tap < taps; tap++, turn.next()) {
          u32 at[2];
#pragma unroll
          for (int i = 0; i < 2; i++) at[i] = from + swizzled(corner[i] + away(tile, tap), lane() / 16 * 16);
          mbarrier_wait(full(turn.place), turn.parity);
          u32 b = shared_address(shared) + turn.place * C::B_BYTES;
          constexpr Major MAJOR = C::STORE == Store::Forward ? Major::K : Major::Other;
          multiply_step<C::BN, MAJOR>(
              sum, MAJOR == Major::K ? wgmma_operand_k(b) : wgmma_operand_other(b, 64 * ROW_BYTES),
              step + tap == 0 ? Start::Zero : Start::Continue,
              [&](u32(&a)[2][4], int k) {
#pragma unroll
                for (int i = 0; i < 2; i++) ldmatrix_x4_at(a[i], at[i] ^ k << 5);
              },
              [&] { if (last < C::STAGES && lane() == 0) mbarrier_arrive(empty(last)); });
          last = turn.place;
        }
        arrive_warp(vacant(halo.place));
      }
      finish_sums<C::BN>(sum);
      if (lane() == 0) mbarrier_arrive(empty(last));
      if constexpr (C::STORE == Store::Forward) out.put(sum, tile, parity);
      else out.put_masked(sum, tile, parity);
    }
  }
};

// y = conv(relu(scale * x + shift), w) (+ residual) and the statistics of y, on Hopper. Tiles and stages are the best of those
// measured for ResNet-50's shapes on an H200.
#include "conv_hopper_halo.h"
#include "conv_hopper_taps.h"

// ---- Tap by tap: conv_hopper_taps.h.

#define TAPS(name, ...)                                                                                      \
  KERNEL(conv_forward_hopper_##name##_bf16, HopperArgs, (Taps<Store::Forward, __VA_ARGS__>::THREADS), 1) {   \
    DYN_SHARED(shared);                                                                                      \
    TapsConv<Taps<Store::Forward, __VA_ARGS__>>{args, shared}.run();                                         \
  }
TAPS(pixel_wide, 128, 3, Rows::Pixel)
TAPS(pixel_narrow, 64, 4, Rows::Pixel)
TAPS(window_wide, 128, 3, Rows::Window)
TAPS(window_narrow, 64, 4, Rows::Window)
TAPS(padded_wide, 128, 3, Rows::Padded)
TAPS(padded_narrow, 64, 4, Rows::Padded)
TAPS(place_wide, 128, 3, Rows::Place)
TAPS(place_narrow, 64, 4, Rows::Place)

// ---- 3x3 filters with stride 1: conv_hopper_halo.h.

#define HALO(name, BN, STAGES)                                                      \
  KERNEL(conv_forward_hopper_##name##_bf16, HopperArgs, (Halo<Store::Forward, BN, STAGES>::THREADS), 1) { \
    DYN_SHARED(shared);                                                             \
    HaloConv<Halo<Store::Forward, BN, STAGES>>{args, shared}.run();                                 \
  }
HALO(halo_wide, 128, 3)
HALO(halo_narrow, 64, 6)

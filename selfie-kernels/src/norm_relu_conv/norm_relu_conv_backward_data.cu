// dz = conv^T(dy, w) (+ addend) behind the mask, with its sums, and dx = dy * w of a 1x1 projection. dy is taken as it is,
// or formed from two tensors while it is loaded. The fast kernels take the filters as [c][r][s][k].
#include "conv_gather.h"
#include "conv_halo.h"
#include "conv_plain.h"

// As in norm_relu_conv_forward.cu.
//             BM   BN   BK  stages, warps, blocks
typedef Tile<128, 128, 64, 3, 4, 2, 2> Wide;
typedef Tile<128, 64, 64, 3, 2, 2, 3> Narrow;
typedef Tile<128, 128, 32, 4, 4, 2, 2> WideAffine;  // Two tensors in A.
typedef Tile<128, 64, 32, 3, 2, 2, 3> NarrowAffine;
typedef Tile<128, 128, 64, 2, 2, 2, 2> WideHalo;  // Eight warps have too few registers for two tensors.
typedef Tile<128, 64, 64, 2, 2, 2, 3> NarrowHalo;

KERNEL(conv_backward_data_gather_wide_bf16, ConvArgs<bf16>, Wide::THREADS, Wide::MIN_BLOCKS) {
  gather_conv<Wide, Load::Plain, Store::Masked>(args);
}
KERNEL(conv_backward_data_gather_narrow_bf16, ConvArgs<bf16>, Narrow::THREADS, Narrow::MIN_BLOCKS) {
  gather_conv<Narrow, Load::Plain, Store::Masked>(args);
}
KERNEL(conv_backward_data_affine_gather_wide_bf16, ConvArgs<bf16>, WideAffine::THREADS, WideAffine::MIN_BLOCKS) {
  gather_conv<WideAffine, Load::Affine, Store::Masked>(args);
}
KERNEL(conv_backward_data_affine_gather_narrow_bf16, ConvArgs<bf16>, NarrowAffine::THREADS, NarrowAffine::MIN_BLOCKS) {
  gather_conv<NarrowAffine, Load::Affine, Store::Masked>(args);
}
KERNEL(conv_backward_data_affine_halo_wide_bf16, ConvArgs<bf16>, WideHalo::THREADS, WideHalo::MIN_BLOCKS) {
  halo_conv<WideHalo, 2, Load::Affine, Store::Masked>(args);
}
KERNEL(conv_backward_data_affine_halo_narrow_bf16, ConvArgs<bf16>, NarrowHalo::THREADS, NarrowHalo::MIN_BLOCKS) {
  halo_conv<NarrowHalo, 2, Load::Affine, Store::Masked>(args);
}
KERNEL(conv_projection_gather_wide_bf16, ConvArgs<bf16>, Wide::THREADS, Wide::MIN_BLOCKS) {
  gather_conv<Wide, Load::Plain, Store::Plain>(args);
}
KERNEL(conv_projection_gather_narrow_bf16, ConvArgs<bf16>, Narrow::THREADS, Narrow::MIN_BLOCKS) {
  gather_conv<Narrow, Load::Plain, Store::Plain>(args);
}
KERNEL(conv_projection_affine_gather_wide_bf16, ConvArgs<bf16>, WideAffine::THREADS, WideAffine::MIN_BLOCKS) {
  gather_conv<WideAffine, Load::Affine, Store::Plain>(args);
}
KERNEL(conv_projection_affine_gather_narrow_bf16, ConvArgs<bf16>, NarrowAffine::THREADS, NarrowAffine::MIN_BLOCKS) {
  gather_conv<NarrowAffine, Load::Affine, Store::Plain>(args);
}

KERNEL(conv_backward_data_plain_f32, ConvArgs<float>, PLAIN_THREADS, 2) { plain_conv<float, Load::Plain, Store::Masked>(args); }
KERNEL(conv_backward_data_plain_bf16, ConvArgs<bf16>, PLAIN_THREADS, 2) { plain_conv<bf16, Load::Plain, Store::Masked>(args); }
KERNEL(conv_backward_data_affine_plain_f32, ConvArgs<float>, PLAIN_THREADS, 2) {
  plain_conv<float, Load::Affine, Store::Masked>(args);
}
KERNEL(conv_backward_data_affine_plain_bf16, ConvArgs<bf16>, PLAIN_THREADS, 2) {
  plain_conv<bf16, Load::Affine, Store::Masked>(args);
}
KERNEL(conv_projection_plain_f32, ConvArgs<float>, PLAIN_THREADS, 2) { plain_conv<float, Load::Plain, Store::Plain>(args); }
KERNEL(conv_projection_plain_bf16, ConvArgs<bf16>, PLAIN_THREADS, 2) { plain_conv<bf16, Load::Plain, Store::Plain>(args); }
KERNEL(conv_projection_affine_plain_f32, ConvArgs<float>, PLAIN_THREADS, 2) {
  plain_conv<float, Load::Affine, Store::Plain>(args);
}
KERNEL(conv_projection_affine_plain_bf16, ConvArgs<bf16>, PLAIN_THREADS, 2) {
  plain_conv<bf16, Load::Affine, Store::Plain>(args);
}

// [k][taps][c] to [c][taps][k]: a block a square of 32 by 32 of one tap.
struct TransposeArgs {
  const bf16* w;
  bf16* transposed;
  int k, taps, c, unused;
};
KERNEL(conv_transpose_filter_bf16, TransposeArgs, 256, 4) {
  SHARED(bf16, square, [32][33]);
  int tap = (int)blockIdx.z, k0 = (int)blockIdx.y * 32, c0 = (int)blockIdx.x * 32;
  int fast = (int)threadIdx.x % 32;
  for (int slow = (int)threadIdx.x / 32; slow < 32; slow += 8)
    if (k0 + slow < args.k && c0 + fast < args.c)
      square[slow][fast] = args.w[((u64)(k0 + slow) * args.taps + tap) * args.c + c0 + fast];
  __syncthreads();
  for (int slow = (int)threadIdx.x / 32; slow < 32; slow += 8)
    if (c0 + slow < args.c && k0 + fast < args.k)
      args.transposed[((u64)(c0 + slow) * args.taps + tap) * args.k + k0 + fast] = square[fast][slow];
}

// A gradient that is formed from two tensors, by itself: for kernels that read it often. 256 is a multiple of k / 8, so that
// a thread has the same eight channels always.
struct FormGradientArgs {
  const bf16 *dz, *x;
  const float* coef;  // [3][k]
  bf16* dy;
  u64 chunks;  // Of eight channels.
  int k, unused;
};
KERNEL(conv_form_gradient_bf16, FormGradientArgs, 256, 3) {
  constexpr int AT_ONCE = 4;
  Transform<Load::Affine> form;
  form.at(args.coef, args.k, (int)threadIdx.x % (args.k / 8) * 8);
  for (u64 at = (u64)blockIdx.x * 256 * AT_ONCE + threadIdx.x; at < args.chunks; at += (u64)gridDim.x * 256 * AT_ONCE) {
    u32x4 dz[AT_ONCE], x[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      u64 chunk = at + i * 256 < args.chunks ? at + i * 256 : at;
      dz[i] = load16_nc(args.dz + chunk * 8);
      x[i] = load16_nc(args.x + chunk * 8);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
      if (at + i * 256 < args.chunks) store16(args.dy + (at + i * 256) * 8, form(dz[i], x[i]));
  }
}

// y = conv(relu(scale * x + shift), w) (+ residual) and the statistics of y. Tiles are the best of those measured for
// ResNet-50's shapes on an H200, wide ones for results of more than 64 channels; those have eight warps, which were as fast as
// four there, where two blocks fit, as elsewhere only one does.
#include "conv_gather.h"
#include "conv_halo.h"
#include "conv_plain.h"

// A halo's stages hold nothing but filters, which L2 has: two are enough, and leave room for one block more.
//             BM   BN   BK  stages, warps, blocks
typedef Tile<128, 128, 64, 3, 4, 2, 2> Wide;
typedef Tile<128, 64, 64, 3, 2, 2, 3> Narrow;
typedef Tile<128, 128, 64, 2, 4, 2, 2> WideHalo;
typedef Tile<128, 64, 64, 2, 2, 2, 3> NarrowHalo;

KERNEL(conv_forward_gather_wide_bf16, ConvArgs<bf16>, Wide::THREADS, Wide::MIN_BLOCKS) {
  gather_conv<Wide, Load::NormRelu, Store::Forward>(args);
}
KERNEL(conv_forward_gather_narrow_bf16, ConvArgs<bf16>, Narrow::THREADS, Narrow::MIN_BLOCKS) {
  gather_conv<Narrow, Load::NormRelu, Store::Forward>(args);
}
KERNEL(conv_forward_halo_wide_bf16, ConvArgs<bf16>, WideHalo::THREADS, WideHalo::MIN_BLOCKS) {
  halo_conv<WideHalo, 1, Load::NormRelu, Store::Forward>(args);
}
KERNEL(conv_forward_halo_narrow_bf16, ConvArgs<bf16>, NarrowHalo::THREADS, NarrowHalo::MIN_BLOCKS) {
  halo_conv<NarrowHalo, 2, Load::NormRelu, Store::Forward>(args);
}

KERNEL(conv_forward_plain_f32, ConvArgs<float>, PLAIN_THREADS, 2) { plain_conv<float, Load::NormRelu, Store::Forward>(args); }
KERNEL(conv_forward_plain_bf16, ConvArgs<bf16>, PLAIN_THREADS, 2) { plain_conv<bf16, Load::NormRelu, Store::Forward>(args); }

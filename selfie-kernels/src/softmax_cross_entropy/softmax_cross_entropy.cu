// A warp a row of logits; the rows' losses are added in f64 by one block.
#include "device.h"

static constexpr int WARPS = 8;

template <class T>
struct RowArgs {
  const T* logits;
  const u32* labels;
  double* losses;  // [rows]
  u32* right;      // [rows]
  T* dlogits;      // may be null
  u64 rows;
  u32 classes;
  u32 rivals;   // classes of the groups in which the accuracy looks for the greatest logit
  float share;  // of a row in the mean
  u32 unused;
};

template <class T>
DEV void row(const RowArgs<T>& args) {
  u64 r = (u64)blockIdx.x * WARPS + warp();
  if (r >= args.rows) return;
  const T* logits = args.logits + r * args.classes;
  u32 label = args.labels[r];
  bool known = label < args.classes;
  float logit = known ? to_float(logits[label]) : NAN, max = -INFINITY, sum = 0.0f;
  // The first of equal maxima counts; a NaN among the rivals is a wrong answer, and so is a label that is no class.
  bool right = known;
  u32 group = label / args.rivals * args.rivals;
  for (u32 i = lane(); i < args.classes; i += 32) {
    float x = to_float(logits[i]);
    if (x > max) max = x;
    // Classes before the group wrap around to large numbers.
    right = right && (i - group >= args.rivals || (i < label ? x < logit : x <= logit));
  }
  // A NaN is never the greatest, but its exponential is NaN, and so is the sum.
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    float other = __shfl_xor_sync(WARP, max, step);
    if (other > max) max = other;
  }
  right = __ballot_sync(WARP, right) == WARP;
  for (u32 i = lane(); i < args.classes; i += 32) sum += expf(to_float(logits[i]) - max);
  sum = warp_sum(sum);
  if (lane() == 0) {
    args.losses[r] = known ? (double)((max - logit) + logf(sum)) : (double)NAN;
    args.right[r] = right;
  }
  if (!args.dlogits) return;
  float normalizer = known ? 1.0f / sum : NAN;
  for (u32 i = lane(); i < args.classes; i += 32) {
    float p = expf(to_float(logits[i]) - max) * normalizer;
    args.dlogits[r * args.classes + i] = from_float<T>((i == label ? p - 1.0f : p) * args.share);
  }
}
KERNEL(softmax_cross_entropy_f32, RowArgs<float>, WARPS * 32, 4) { row(args); }
KERNEL(softmax_cross_entropy_bf16, RowArgs<bf16>, WARPS * 32, 4) { row(args); }

struct MeanArgs {
  const double* losses;
  const u32* right;
  float* loss;  // [2]: mean loss, accuracy
  u64 rows;
};
KERNEL(softmax_cross_entropy_mean, MeanArgs, 256, 1) {
  double loss = 0.0, right = 0.0;
  for (u64 r = threadIdx.x; r < args.rows; r += 256) loss += args.losses[r], right += (double)args.right[r];
  loss = block_sum<256>(loss);
  right = block_sum<256>(right);
  if (threadIdx.x != 0) return;
  args.loss[0] = (float)(loss / (double)args.rows);
  args.loss[1] = (float)(right / (double)args.rows);
}

// running += momentum * (batch - running), where the step was finite.
#include "device.h"

struct CommitArgs {
  const u32* finite;
  const float* batch;
  float* running;
  u64 len;
  float momentum;
  u32 unused;
};
KERNEL(bn_commit, CommitArgs, 256, 1) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= args.len || *args.finite == 0) return;
  float running = args.running[i];
  args.running[i] = fmaf(args.momentum, args.batch[i] - running, running);
}

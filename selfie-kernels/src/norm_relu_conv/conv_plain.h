#pragma once
// Any convolution, of either type, without tensor cores: f32 throughout, and every shape that the fast kernels refuse.
// A block makes 128 rows by 64 channels of the result, 16 channels of one tap at a time through shared memory, each of
// its threads 8 by 4.
#include "conv.h"

static constexpr int PLAIN_THREADS = 256;

template <class T, Load LOAD, Store STORE>
struct PlainConv {
  static constexpr int ROWS = SUM_ROWS, COLUMNS = 64, STEP = 16, GROUPS = ROWS / 8;

  struct Memory {
    float a[STEP][ROWS + 4];
    float b[STEP][COLUMNS + 4];
    int source[ROWS], out[ROWS], add[ROWS];
    float partial[2][GROUPS][COLUMNS];
    float mean[COLUMNS];
  };

  const ConvArgs<T>& args;
  const Class& cls;
  Memory& memory;
  int row0, column0;
  float sum[8][4];

  DEV_MEMBER PlainConv(const ConvArgs<T>& args, const Class& cls, Memory& memory) : args(args), cls(cls), memory(memory) {
    int tiles = ceil_div(args.nc, COLUMNS);
    row0 = (int)blockIdx.x / tiles * ROWS;
    column0 = (int)blockIdx.x % tiles * COLUMNS;
  }

  // First of the 8 rows and 4 columns of this thread.
  DEV_MEMBER int row() const { return (int)threadIdx.x / 16 * 8; }
  DEV_MEMBER int column() const { return (int)threadIdx.x % 16 * 4; }

  DEV_MEMBER void run() {
    if (row0 >= cls.rows) return;  // A class with fewer rows than the largest one.
    locate_rows();
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) sum[i][j] = 0.0f;
    for (int r = 0; r < cls.taps_r; r++)
      for (int s = 0; s < cls.taps_s; s++) multiply_tap(r, s);
    __syncthreads();  // The rows are located, even if there was no tap.
    finish();
  }

  DEV_MEMBER void locate_rows() {
    if (threadIdx.x >= ROWS) return;
    int m = row0 + (int)threadIdx.x;
    bool live = m < cls.rows;
    Pixel pixel = pixel_of(cls, live ? m : 0);
    memory.out[threadIdx.x] = live ? out_pixel(args, cls, pixel) : -1;
    memory.add[threadIdx.x] = live ? add_pixel(args, cls, pixel) : -1;
  }

  DEV_MEMBER void multiply_tap(int r, int s) {
    if (threadIdx.x < ROWS) {
      int m = row0 + (int)threadIdx.x;
      memory.source[threadIdx.x] = m < cls.rows ? source_pixel(args, cls, pixel_of(cls, m), r, s) : -1;
    }
    __syncthreads();
    const T* b = args.b + filter_tap(args, cls, r, s) * args.b_tap;
    for (int c0 = 0; c0 < args.kc; c0 += STEP) {
      load_a(c0);
      load_b(b, c0);
      __syncthreads();
      multiply();
      __syncthreads();
    }
  }

  DEV_MEMBER float load(int pixel, int c) const {
    u64 at = (u64)pixel * args.kc + c;
    float a = to_float(args.a[at]);
    if constexpr (LOAD == Load::NormRelu) {
      return relu(normalize(a, args.coef[c], args.coef[args.kc + c]));
    } else if constexpr (LOAD == Load::Affine) {
      return affine(a, to_float(args.a2[at]), args.coef[c], args.coef[args.kc + c], args.coef[2 * args.kc + c]);
    } else {
      return a;
    }
  }

  DEV_MEMBER void load_a(int c0) {
    int step = (int)threadIdx.x % STEP, c = c0 + step;
#pragma unroll
    for (int i = 0; i < ROWS * STEP / PLAIN_THREADS; i++) {
      int r = (int)threadIdx.x / STEP + i * (PLAIN_THREADS / STEP), pixel = memory.source[r];
      memory.a[step][r] = pixel >= 0 && c < args.kc ? load(pixel, c) : 0.0f;
    }
  }

  // Neighbouring threads along whatever is contiguous in the filter.
  DEV_MEMBER void load_b(const T* b, int c0) {
#pragma unroll
    for (int i = 0; i < COLUMNS * STEP / PLAIN_THREADS; i++) {
      int at = (int)threadIdx.x + i * PLAIN_THREADS;
      int step = args.b_channel == 1 ? at % STEP : at / COLUMNS, n = args.b_channel == 1 ? at / STEP : at % COLUMNS;
      bool live = c0 + step < args.kc && column0 + n < args.nc;
      memory.b[step][n] = live ? to_float(b[(column0 + n) * args.b_n + (c0 + step) * args.b_channel]) : 0.0f;
    }
  }

  DEV_MEMBER void multiply() {
#pragma unroll
    for (int k = 0; k < STEP; k++) {
      float4 upper = *(const float4*)&memory.a[k][row()], lower = *(const float4*)&memory.a[k][row() + 4];
      float4 right = *(const float4*)&memory.b[k][column()];
      float a[8] = {upper.x, upper.y, upper.z, upper.w, lower.x, lower.y, lower.z, lower.w};
      float b[4] = {right.x, right.y, right.z, right.w};
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
    }
  }

  // Adds, masks, rounds and stores; sum[][] becomes what was stored.
  DEV_MEMBER void finish() {
    float first[4] = {}, second[4] = {};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int n = column0 + column() + j;
      if (n >= args.nc) continue;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        int out = memory.out[row() + i], add = memory.add[row() + i];
        if (out < 0) continue;
        u64 at = (u64)out * args.nc + n;
        float v = sum[i][j], x = 0.0f;
        if (STORE != Store::Plain && args.add && add >= 0) v += to_float(args.add[(u64)add * args.nc + n]);
        if (STORE == Store::Masked) {
          x = to_float(args.x[at]);
          if (!passes(normalize(x, args.norm[2 * args.nc + n], args.norm[3 * args.nc + n]))) v = 0.0f;
        }
        args.out[at] = from_float<T>(v);
        sum[i][j] = to_float(from_float<T>(v));
        first[j] += sum[i][j];
        if (STORE == Store::Masked)
          second[j] = fmaf(sum[i][j], (x - args.norm[n]) * args.norm[args.nc + n], second[j]);
      }
    }
    if (STORE == Store::Plain || !args.sums) return;
    float* sums = args.sums + (u64)(cls.tile + row0 / ROWS) * 2 * args.nc;
    if (STORE == Store::Masked) store_sums(sums, first, second);
    if (STORE == Store::Forward) store_statistics(sums, first);
  }

  DEV_MEMBER void keep(int which, const float (&sums)[4]) {
#pragma unroll
    for (int j = 0; j < 4; j++) memory.partial[which][threadIdx.x / 16][column() + j] = sums[j];
  }
  DEV_MEMBER float total(int which, int column) const {
    float sum = 0.0f;
    for (int group = 0; group < GROUPS; group++) sum += memory.partial[which][group][column];
    return sum;
  }
  // The channel of the result that this thread, one of the first COLUMNS, sums up; -1: none.
  DEV_MEMBER int own_channel() const {
    int n = column0 + (int)threadIdx.x;
    return threadIdx.x < COLUMNS && n < args.nc ? n : -1;
  }

  DEV_MEMBER void store_sums(float* sums, const float (&first)[4], const float (&second)[4]) {
    keep(0, first);
    keep(1, second);
    __syncthreads();
    int n = own_channel();
    if (n < 0) return;
    sums[n] = total(0, threadIdx.x);
    sums[args.nc + n] = total(1, threadIdx.x);
  }

  DEV_MEMBER void store_statistics(float* sums, const float (&first)[4]) {
    float rows = (float)min(ROWS, cls.rows - row0);
    keep(0, first);
    __syncthreads();
    if (threadIdx.x < COLUMNS) memory.mean[threadIdx.x] = total(0, threadIdx.x) / rows;
    __syncthreads();
    float deviations[4] = {}, squares[4] = {};
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (memory.out[row() + i] < 0) continue;
        float deviation = sum[i][j] - memory.mean[column() + j];
        deviations[j] += deviation;
        squares[j] = fmaf(deviation, deviation, squares[j]);
      }
    keep(0, deviations);
    keep(1, squares);
    __syncthreads();
    int n = own_channel();
    if (n < 0) return;
    store_stats(sums + n, sums + args.nc + n, memory.mean[threadIdx.x], total(0, threadIdx.x), total(1, threadIdx.x), rows);
  }
};

template <class T, Load LOAD, Store STORE>
DEV void plain_conv(const ConvArgs<T>& args) {
  typedef PlainConv<T, LOAD, STORE> Conv;
  SHARED(typename Conv::Memory, memory, [1]);
  Conv(args, args.cls[blockIdx.z], memory[0]).run();
}

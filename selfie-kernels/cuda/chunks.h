#pragma once
// N neighbouring elements as floats: in accesses of 16 bytes where N allows it (the address must then be aligned to 16),
// else one by one.
#include "device.h"

template <int N, class T>
DEV void load_chunk(const T* from, float (&v)[N]) {
  constexpr int STEP = Vec16<T>::N;
  if constexpr (N % STEP == 0) {
#pragma unroll
    for (int i = 0; i < N; i += STEP) {
      float part[STEP];
      load_floats(from + i, part);
#pragma unroll
      for (int j = 0; j < STEP; j++) v[i + j] = part[j];
    }
  } else {
#pragma unroll
    for (int j = 0; j < N; j++) v[j] = to_float(from[j]);
  }
}

template <int N, class T>
DEV void store_chunk(T* to, const float (&v)[N]) {
  constexpr int STEP = Vec16<T>::N;
  if constexpr (N % STEP == 0) {
#pragma unroll
    for (int i = 0; i < N; i += STEP) {
      float part[STEP];
#pragma unroll
      for (int j = 0; j < STEP; j++) part[j] = v[i + j];
      store_floats(to + i, part);
    }
  } else {
#pragma unroll
    for (int j = 0; j < N; j++) to[j] = from_float<T>(v[j]);
  }
}

// How a kernel may access rows: in chunks that are whole and aligned, or not.
enum class Access : u32 { Elements, Chunks };

// The first `count` of a chunk; the rest is zero.
template <int N, class T>
DEV void load_some(const T* from, u32 count, Access access, float (&v)[N]) {
  if (access == Access::Chunks && count >= N) return load_chunk<N>(from, v);
#pragma unroll
  for (int j = 0; j < N; j++) v[j] = (u32)j < count ? to_float(from[j]) : 0.0f;
}

template <int N, class T>
DEV void store_some(T* to, u32 count, Access access, const float (&v)[N]) {
  if (access == Access::Chunks && count >= N) return store_chunk<N>(to, v);
#pragma unroll
  for (int j = 0; j < N; j++)
    if ((u32)j < count) to[j] = from_float<T>(v[j]);
}

// v as stored, rounded to T.
template <class T>
DEV float as_stored(float v) {
  return to_float(from_float<T>(v));
}

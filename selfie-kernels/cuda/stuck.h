#pragma once
// What threads tell that wait for a phase which does not end, before their kernel is stopped; src/cuda/stuck.rs mirrors it.
struct StuckThread {
  u32 told;  // 1 once the others are written
  u32 thread, barrier, parity;
  u32 block[3], grid[3];
};
constexpr u32 STUCK_THREADS = 16;

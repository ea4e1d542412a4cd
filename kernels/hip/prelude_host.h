// The prelude on the host: every work-item is a fiber of its workgroup, one workgroup at a time on an operating-system thread.
// The stand-in runtime that the tests load (tests/standin) defines the functions declared here.
#pragma once
#include <cmath>
#include <cstring>

#define DEVICE static
#define DEVICE_METHOD
#define DEVICE_MEMBER static
// All work-items of a workgroup run on one thread, so one copy a thread is one copy a workgroup.
#define SHARED alignas(16) static thread_local
#define KERNEL(name, threads) extern "C" void name
#define STREAM_KERNEL(name, threads, resident) KERNEL(name, threads)

#ifndef HOST_WAVE
#define HOST_WAVE 32
#endif
constexpr i32 WAVE = HOST_WAVE;

struct Fiber {
  i32 thread, group[3];
};
extern thread_local const Fiber* current_fiber;
extern void fiber_barrier();
extern void fiber_wave_barrier();
extern i32 fiber_lane_read(i32 v, i32 lane);

static inline i32 thread_index() { return current_fiber->thread; }
static inline i32 group_x() { return current_fiber->group[0]; }
static inline i32 group_y() { return current_fiber->group[1]; }
static inline i32 group_z() { return current_fiber->group[2]; }
static inline void barrier() { fiber_barrier(); }
static inline void wave_barrier() { fiber_wave_barrier(); }
static inline void wait_for_previous_launch() {}   // launches here do not overlap
static inline void keep_order() {}
static inline void prefetch(const void*) {}

static inline i32 lane_read(i32 v, i32 lane) { return fiber_lane_read(v, lane); }

static inline i32 uniform(i32 v) { return v; }

// Fibers of a workgroup take turns on one thread.
template <typename T>
static inline T atomic_add(T* p, T v) {
  const T old = *p;
  *p += v;
  return old;
}

static inline i32 dot4(i32 a, i32 b, i32 c) {
  for (i32 i = 0; i < 32; i += 8) c += (i32)(i8)(a >> i) * (i32)(i8)(b >> i);
  return c;
}
template <typename T>
static inline T load(const T* p) { return *p; }

static inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
static inline float half_to_float(f16_bits h) {
  _Float16 f;
  memcpy(&f, &h, sizeof f);
  return (float)f;
}
static inline f16_bits float_to_half(float x) {
  const _Float16 f = (_Float16)x;
  f16_bits h;
  memcpy(&h, &f, sizeof h);
  return h;
}
static inline float exp2_fast(float x) { return exp2f(x); }
static inline float log2_fast(float x) { return log2f(x); }
static inline float reciprocal(float x) { return 1.0f / x; }
static inline float reciprocal_square_root(float x) { return 1.0f / sqrtf(x); }
static inline float round_even(float x) { return nearbyintf(x); }
static inline float absolute(float x) { return fabsf(x); }

constexpr i32 TILE_UNROLL = 1;
constexpr bool OPERANDS_IN_REGISTERS = false;

// Tile16 without a matrix unit: every lane computes its own elements.
struct Tile16 { float value[256 / WAVE]; };
struct TileOperand {
  const f16_bits* p;
  i32 stride;
};
static inline TileOperand tile_operand(const f16_bits* p, i32 stride) { return {p, stride}; }
static inline i32 tile_row(i32 i) { return i * (WAVE / 16) + (thread_index() % WAVE) / 16; }
static inline i32 tile_column(i32) { return thread_index() % 16; }
static inline void tile_multiply(Tile16& c, TileOperand a, TileOperand b) {
  for (i32 i = 0; i < 256 / WAVE; i++)
    for (i32 k = 0; k < 16; k++)
      c.value[i] += half_to_float(a.p[tile_row(i) * a.stride + k]) * half_to_float(b.p[tile_column(i) * b.stride + k]);
}

// Tile8 likewise.
struct Tile8 { i32 value[256 / WAVE]; };
struct ByteOperand {
  const i8* p;
  i32 stride;
};
static inline ByteOperand left_bytes(const i8* p, i32 stride) { return {p, stride}; }
static inline ByteOperand right_bytes(const i8* p, i32 stride) { return left_bytes(p, stride); }
static inline Tile8 tile_dot_columns(ByteOperand a, ByteOperand b, i32 first, i32 end) {
  Tile8 c = {};
  for (i32 i = 0; i < 256 / WAVE; i++)
    for (i32 k = first; k < end; k++) c.value[i] += (i32)a.p[tile_row(i) * a.stride + k] * b.p[tile_column(i) * b.stride + k];
  return c;
}
static inline Tile8 tile_dot(ByteOperand a, ByteOperand b) { return tile_dot_columns(a, b, 0, 32); }
template <i32 part>
static inline Tile8 tile_dot_half(ByteOperand a, ByteOperand b) { return tile_dot_columns(a, b, 16 * part, 16 * part + 16); }

// One set of names for what the hardware has, on three targets: AMD GPUs (hiprtc or plain clang), NVIDIA GPUs (NVRTC) and
// the host (a stand-in that runs each work-item as a fiber, for tests). Nothing here includes a ROCm or CUDA header.
//
// Every target's prelude defines
//   KERNEL(name, threads)     declares an extern "C" kernel with workgroups of at most `threads` work-items
//   STREAM_KERNEL(name, threads, resident)
//                             the same for kernels that live off loads in flight: the compiler may take as many registers
//                             as leave room for `resident` work-items on a compute unit
//   DEVICE                    marks a function that runs on the device (DEVICE_METHOD and DEVICE_MEMBER: a
//                             method and a static member function)
//   SHARED                    marks a variable in local data share / shared memory, 16-byte aligned
//   WAVE                      lanes that run together: 64 on CDNA and gfx906, 32 on RDNA and NVIDIA
//   thread_index() group_x() group_y() group_z()
//   barrier()                 of the workgroup; orders SHARED accesses
//   wave_barrier()            of the wave; orders its lanes' accesses to memory
//   wait_for_previous_launch()  the first thing a kernel with Launch.overlaps does, in every work-item: it may have started
//                             while the launch before it still runs, and until here may touch nothing but weights
//   prefetch(p)               asks for the 128 bytes around p, which will be read soon
//   lane_read(v, lane)        a lane's value of v, for 32-bit v, all lanes active
//   uniform(v)                v, which is the same in all lanes, kept once a wave where the hardware can
//   atomic_add(p, v)          adds v to the integer *p, which is SHARED, and returns what was there
//   dot4(a, b, c)             c + the sum of four products of signed bytes
//   load(p)                   *p, a number or Words4 in the GPU's memory and not SHARED
//   multiply_add(a, b, c)     a * b + c, rounded once
//   half_to_float, float_to_half (round to nearest even), exp2_fast, log2_fast, reciprocal_square_root, reciprocal,
//   round_even, absolute
//   TILE_UNROLL               blocks of 32 columns whose products matmul_tile.hip may have under way: more want more registers
//   Tile16: a 16 x 16 float32 product over 16 float16 elements on the matrix unit (see there); its operands are in
//   registers (OPERANDS_IN_REGISTERS) or stay where they are
//   Tile8: the same of 32 signed bytes (tile_dot) or the first or last 16 of them (tile_dot_half), exact; left_bytes and
//   right_bytes give its operands
//   keep_order()              the compiler moves no instruction across, where it would otherwise load the operands of many
//                             tiles ahead into registers that it does not have
#pragma once
#include "common/types.h"

struct alignas(16) Words4 { u32 word[4]; };

#if defined(__AMDGCN__)
#include "hip/prelude_amd.h"
#elif defined(__CUDA_ARCH__) || defined(__CUDACC_RTC__)
#include "hip/prelude_nvidia.h"
#else
#include "hip/prelude_host.h"
#endif


DEVICE inline i32 lane_index() { return thread_index() & (WAVE - 1); }
DEVICE inline i32 wave_index() { return thread_index() / WAVE; }

DEVICE inline i32 least(i32 a, i32 b) { return a < b ? a : b; }

DEVICE inline float lane_read(float v, i32 lane) {
  return __builtin_bit_cast(float, lane_read(__builtin_bit_cast(i32, v), lane));
}

DEVICE inline u64 lane_read(u64 v, i32 lane) {
  const u32 low = (u32)lane_read((i32)(u32)v, lane), high = (u32)lane_read((i32)(u32)(v >> 32), lane);
  return (u64)high << 32 | low;
}

DEVICE inline float uniform(float v) { return __builtin_bit_cast(float, uniform(__builtin_bit_cast(i32, v))); }
DEVICE inline u64 uniform(u64 v) { return (u64)(u32)uniform((i32)(u32)(v >> 32)) << 32 | (u32)uniform((i32)(u32)v); }

// Sum and maximum over a wave, or over aligned groups of `width` lanes; every lane gets the result.
template <i32 width = WAVE, typename T>
DEVICE inline T wave_sum(T v) {
#pragma unroll
  for (i32 step = 1; step < width; step *= 2) v += lane_read(v, lane_index() ^ step);
  return v;
}

template <i32 width = WAVE, typename T>
DEVICE inline T wave_max(T v) {
#pragma unroll
  for (i32 step = 1; step < width; step *= 2) {
    const T other = lane_read(v, lane_index() ^ step);
    v = other > v ? other : v;
  }
  return v;
}

DEVICE inline float exp_fast(float x) { return exp2_fast(x * 1.4426950408889634f); }
DEVICE inline float silu(float x) { return x * reciprocal(1.0f + exp_fast(-x)); }

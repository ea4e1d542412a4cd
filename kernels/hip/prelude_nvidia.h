// The prelude on NVIDIA GPUs under NVRTC: CUDA's built-in variables and PTX.
// Source: NVIDIA "Parallel Thread Execution ISA" (mma fragment layouts of m16n8k16 and m16n8k32, ldmatrix, cvt, dp4a).
#pragma once

#define DEVICE __device__ static
#define DEVICE_METHOD __device__
#define DEVICE_MEMBER __device__ static
#define SHARED __shared__ __align__(16)
#define KERNEL(name, threads) extern "C" __global__ void __launch_bounds__(threads) name
#define STREAM_KERNEL(name, threads, resident) extern "C" __global__ void __launch_bounds__(threads, (resident) / (threads)) name

constexpr i32 WAVE = 32;

DEVICE inline i32 thread_index() { return (i32)threadIdx.x; }
DEVICE inline i32 group_x() { return (i32)blockIdx.x; }
DEVICE inline i32 group_y() { return (i32)blockIdx.y; }
DEVICE inline i32 group_z() { return (i32)blockIdx.z; }

DEVICE inline void barrier() { __syncthreads(); }

DEVICE inline void wave_barrier() { __syncwarp(); }

// Programmatic dependent launch: the next launch may start now, as far as there is room, and this one waits for the last.
DEVICE inline void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE inline void keep_order() {}
DEVICE inline void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

DEVICE inline i32 lane_read(i32 v, i32 lane) { return __shfl_sync(0xffffffffu, v, lane); }

DEVICE inline i32 uniform(i32 v) { return v; }

template <typename T>
DEVICE inline T atomic_add(T* p, T v) { return atomicAdd(p, v); }

DEVICE inline i32 dot4(i32 a, i32 b, i32 c) {
  i32 d;
  asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

template <typename T>
DEVICE inline T load(const T* p) { return *p; }

DEVICE inline float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE inline float half_to_float(f16_bits h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
DEVICE inline f16_bits float_to_half(float x) {
  f16_bits h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
}
DEVICE inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE inline float log2_fast(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE inline float reciprocal_square_root(float x) {
  float y;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE inline float round_even(float x) {
  float y;
  asm("cvt.rni.f32.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE inline float absolute(float x) { return x < 0 ? -x : x; }

constexpr i32 TILE_UNROLL = 2;
constexpr bool OPERANDS_IN_REGISTERS = true;

// Tile16: c[16 x 16] += a[16 x 16] b[16 x 16]^T on the matrix unit, all 16-bit floats with float32 sums. Row i of `a` and of
// `b` are 16 consecutive float16 in shared memory, 16-byte aligned; rows lie `stride` elements apart.
struct Tile16 { float value[8]; };
struct TileOperand { u32 word[4]; };   // 8 x 8 quarters: (rows 0-7, k 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15)

// Four matrices of 8 rows of 16 bytes; each lane gives the address of one row.
template <typename Operand>
DEVICE inline Operand load_matrices(const void* row) {
  Operand o;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(o.word[0]), "=r"(o.word[1]), "=r"(o.word[2]), "=r"(o.word[3])
               : "r"((u32)__cvta_generic_to_shared(row))
               : "memory");
  return o;
}
DEVICE inline TileOperand tile_operand(const f16_bits* p, i32 stride) {
  const i32 lane = thread_index() & 31;
  return load_matrices<TileOperand>(p + (lane % 16) * stride + 8 * (lane / 16));
}

DEVICE inline void tile_multiply(Tile16& c, const TileOperand& a, const TileOperand& b) {
#pragma unroll
  for (i32 half = 0; half < 2; half++)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c.value[4 * half]), "+f"(c.value[4 * half + 1]), "+f"(c.value[4 * half + 2]), "+f"(c.value[4 * half + 3])
        : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[half]), "r"(b.word[half + 2]));
}
DEVICE inline i32 tile_row(i32 i) { return (thread_index() & 31) / 4 + 8 * ((i >> 1) & 1); }
DEVICE inline i32 tile_column(i32 i) { return 2 * (thread_index() % 4) + (i & 1) + 8 * (i >> 2); }

// Tile8: a[16 x 32] b[16 x 32]^T on the matrix unit, signed bytes with int32 sums; elements lie as those of Tile16. Row i of
// `a` and of `b` are 32 consecutive bytes in shared memory, 16-byte aligned; rows lie `stride` bytes apart.
struct Tile8 { i32 value[8]; };
struct ByteOperand { u32 word[4]; };
// 8 x 16 quarters: (rows 0-7, k 0-15), (8-15, 0-15), (0-7, 16-31), (8-15, 16-31).
DEVICE inline ByteOperand left_bytes(const i8* p, i32 stride) {
  const i32 lane = thread_index() & 31;
  return load_matrices<ByteOperand>(p + (lane % 16) * stride + 16 * (lane / 16));
}
// (rows 0-7, k 0-15), (0-7, 16-31), (8-15, 0-15), (8-15, 16-31).
DEVICE inline ByteOperand right_bytes(const i8* p, i32 stride) {
  const i32 lane = thread_index() & 31;
  return load_matrices<ByteOperand>(p + (lane % 8 + 8 * (lane / 16)) * stride + 16 * (lane / 8 % 2));
}

// All 32 columns.
DEVICE inline Tile8 tile_dot(const ByteOperand& a, const ByteOperand& b) {
  Tile8 c;
#pragma unroll
  for (i32 half = 0; half < 2; half++)
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=r"(c.value[4 * half]), "=r"(c.value[4 * half + 1]), "=r"(c.value[4 * half + 2]), "=r"(c.value[4 * half + 3])
        : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[2 * half]), "r"(b.word[2 * half + 1]), "r"(0));
  return c;
}
// The first 16 columns, or the last.
template <i32 part>
DEVICE inline Tile8 tile_dot_half(const ByteOperand& a, const ByteOperand& b) {
  Tile8 c;
#pragma unroll
  for (i32 half = 0; half < 2; half++)
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
        : "=r"(c.value[4 * half]), "=r"(c.value[4 * half + 1]), "=r"(c.value[4 * half + 2]), "=r"(c.value[4 * half + 3])
        : "r"(a.word[2 * part]), "r"(a.word[2 * part + 1]), "r"(b.word[2 * half + part]), "r"(0));
  return c;
}

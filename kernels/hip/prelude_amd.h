// The prelude on AMD GPUs: clang's AMDGPU builtins, the same under hiprtc and under plain clang.
// Sources: LLVM "User Guide for AMDGPU Backend", BuiltinsAMDGPU.def; AMD RDNA3, RDNA4 and CDNA3 ISA guides (matrix layouts).
#pragma once

#if defined(__GFX11__) || defined(__GFX12__)
#define HAS_WMMA 1
#elif defined(__gfx90a__) || defined(__gfx940__) || defined(__gfx941__) || defined(__gfx942__) || defined(__gfx950__) || defined(__gfx908__)
#define HAS_MFMA 1
#endif

// Where matrix results may be in ordinary registers, room for two waves a SIMD keeps them there: nothing is copied to and
// from accumulation registers. (The compiler warns where shared memory leaves room for one.)
#if defined(HAS_MFMA) && !defined(__gfx908__)
#define REGISTER_BUDGET amdgpu_waves_per_eu(2)
#else
#define REGISTER_BUDGET
#endif

// Everything is inlined: a call would cost registers and scratch memory.
#define DEVICE __attribute__((device, always_inline)) static
#define DEVICE_METHOD __attribute__((device))
#define DEVICE_MEMBER __attribute__((device)) static
#define SHARED __attribute__((shared, aligned(16)))
#define KERNEL(name, threads) \
  extern "C" __attribute__((global, amdgpu_flat_work_group_size(1, threads), REGISTER_BUDGET)) void name
#define STREAM_KERNEL(name, threads, resident) KERNEL(name, threads)

// By family: since ROCm 7.2 the compiler no longer says it (the macro __AMDGCN_WAVEFRONT_SIZE__ is gone).
#if defined(__GFX9__)
constexpr i32 WAVE = 64;
#else
constexpr i32 WAVE = 32;
#endif

DEVICE inline i32 thread_index() { return __builtin_amdgcn_workitem_id_x(); }
DEVICE inline i32 group_x() { return __builtin_amdgcn_workgroup_id_x(); }
DEVICE inline i32 group_y() { return __builtin_amdgcn_workgroup_id_y(); }
DEVICE inline i32 group_z() { return __builtin_amdgcn_workgroup_id_z(); }

DEVICE inline void barrier() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

DEVICE inline void wave_barrier() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
  __builtin_amdgcn_wave_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}

DEVICE inline void keep_order() { __builtin_amdgcn_sched_barrier(0); }

DEVICE inline void wait_for_previous_launch() {}   // launches here do not overlap
DEVICE inline void prefetch(const void*) {}

DEVICE inline i32 lane_read(i32 v, i32 lane) { return __builtin_amdgcn_ds_bpermute(lane << 2, v); }

DEVICE inline i32 uniform(i32 v) { return __builtin_amdgcn_readfirstlane(v); }

template <typename T>
DEVICE inline T atomic_add(T* p, T v) {
  return __hip_atomic_fetch_add(p, v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
}

DEVICE inline i32 dot4(i32 a, i32 b, i32 c) {
#if defined(__GFX11__) || defined(__GFX12__)
  return __builtin_amdgcn_sudot4(true, a, true, b, c, false);
#else
  return __builtin_amdgcn_sdot4(a, b, c, false);
#endif
}

// Loads through generic addresses cost more, and not always can the compiler tell that an address is none.
template <typename T>
DEVICE inline T load(const T* p) { return *(const __attribute__((address_space(1))) T*)p; }
DEVICE inline Words4 load(const Words4* p) {
  typedef u32 Vector __attribute__((ext_vector_type(4)));
  return __builtin_bit_cast(Words4, load((const Vector*)p));
}

DEVICE inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEVICE inline float half_to_float(f16_bits h) { return (float)__builtin_bit_cast(_Float16, h); }
DEVICE inline f16_bits float_to_half(float x) { return __builtin_bit_cast(f16_bits, (_Float16)x); }
DEVICE inline float exp2_fast(float x) { return __builtin_amdgcn_exp2f(x); }
DEVICE inline float log2_fast(float x) { return __builtin_amdgcn_logf(x); }
DEVICE inline float reciprocal(float x) { return __builtin_amdgcn_rcpf(x); }
DEVICE inline float reciprocal_square_root(float x) { return __builtin_amdgcn_rsqf(x); }
DEVICE inline float round_even(float x) { return __builtin_rintf(x); }
DEVICE inline float absolute(float x) { return __builtin_fabsf(x); }

// Tile16: c[16 x 16] += a[16 x 16] b[16 x 16]^T on the matrix unit, all 16-bit floats with float32 sums. Row i of `a` and of
// `b` are 16 consecutive float16 in shared memory, 16-byte aligned; rows lie `stride` elements apart.
typedef float Floats4 __attribute__((ext_vector_type(4)));
typedef float Floats8 __attribute__((ext_vector_type(8)));
typedef _Float16 Halves4 __attribute__((ext_vector_type(4)));
typedef _Float16 Halves8 __attribute__((ext_vector_type(8)));
typedef _Float16 Halves16 __attribute__((ext_vector_type(16)));

struct Tile16 { float value[256 / WAVE]; };

constexpr i32 TILE_UNROLL = 1;

#if defined(HAS_MFMA) || defined(HAS_WMMA)
constexpr bool OPERANDS_IN_REGISTERS = true;
#else
constexpr bool OPERANDS_IN_REGISTERS = false;
#endif

#if defined(HAS_MFMA)
typedef Halves4 TileOperand;
DEVICE inline TileOperand tile_operand(const f16_bits* p, i32 stride) {
  const i32 lane = thread_index() & (WAVE - 1);
  return *(const Halves4*)(p + (lane % 16) * stride + 4 * (lane / 16));
}
DEVICE inline void tile_multiply(Tile16& c, TileOperand a, TileOperand b) {
  Floats4 sum = {c.value[0], c.value[1], c.value[2], c.value[3]};
  sum = __builtin_amdgcn_mfma_f32_16x16x16f16(a, b, sum, 0, 0, 0);
#pragma unroll
  for (i32 i = 0; i < 4; i++) c.value[i] = sum[i];
}
DEVICE inline i32 tile_row(i32 i) { return 4 * ((thread_index() & (WAVE - 1)) / 16) + i; }
DEVICE inline i32 tile_column(i32) { return thread_index() % 16; }

#elif defined(HAS_WMMA)
#if defined(__GFX12__)
typedef Halves8 TileOperand;
#else
typedef Halves16 TileOperand;
#endif
DEVICE inline TileOperand tile_operand(const f16_bits* p, i32 stride) {
  const i32 lane = thread_index() & (WAVE - 1);
#if defined(__GFX12__)
  return *(const Halves8*)(p + (lane % 16) * stride + 8 * (lane / 16));
#else
  const Halves8* row = (const Halves8*)(p + (lane % 16) * stride);
  return __builtin_shufflevector(row[0], row[1], 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#endif
}
DEVICE inline void tile_multiply(Tile16& c, TileOperand a, TileOperand b) {
  Floats8 sum;
#pragma unroll
  for (i32 i = 0; i < 8; i++) sum[i] = c.value[i];
#if defined(__GFX12__)
  sum = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(a, b, sum);
#else
  sum = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(a, b, sum);
#endif
#pragma unroll
  for (i32 i = 0; i < 8; i++) c.value[i] = sum[i];
}
DEVICE inline i32 tile_row(i32 i) {
  const i32 half = (thread_index() & (WAVE - 1)) / 16;
#if defined(__GFX12__)
  return i + 8 * half;
#else
  return 2 * i + half;
#endif
}
DEVICE inline i32 tile_column(i32) { return thread_index() % 16; }

#else
// No matrix unit (gfx906, gfx1030): every lane computes its own elements, two products an instruction.
typedef _Float16 Halves2 __attribute__((ext_vector_type(2)));
struct TileOperand {
  const f16_bits* p;
  i32 stride;
};
DEVICE inline TileOperand tile_operand(const f16_bits* p, i32 stride) { return {p, stride}; }
DEVICE inline i32 tile_row(i32 i) { return i * (WAVE / 16) + (thread_index() & (WAVE - 1)) / 16; }
DEVICE inline i32 tile_column(i32) { return thread_index() % 16; }
DEVICE inline void tile_multiply(Tile16& c, TileOperand a, TileOperand b) {
  const Halves2* column = (const Halves2*)(b.p + tile_column(0) * b.stride);
#pragma unroll
  for (i32 i = 0; i < 256 / WAVE; i++) {
    const Halves2* row = (const Halves2*)(a.p + tile_row(i) * a.stride);
#pragma unroll
    for (i32 k = 0; k < 8; k++) c.value[i] = __builtin_amdgcn_fdot2(row[k], column[k], c.value[i], false);
  }
  __builtin_amdgcn_sched_barrier(0);   // the loads of many tiles at a time would not fit the registers
}
#endif

// Tile8: a[16 x 32] b[16 x 32]^T on the matrix unit, signed bytes with int32 sums; elements lie as those of Tile16. Row i of
// `a` and of `b` are 32 consecutive bytes in shared memory, 16-byte aligned; rows lie `stride` bytes apart. Lanes may hold
// the columns in any order that is the same for `a` and `b`.
typedef i32 Ints4 __attribute__((ext_vector_type(4)));
typedef i32 Ints8 __attribute__((ext_vector_type(8)));
struct Tile8 { i32 value[256 / WAVE]; };

template <typename Ints>
DEVICE inline Tile8 tile_of(Ints sums) {
  Tile8 c;
#pragma unroll
  for (i32 i = 0; i < 256 / WAVE; i++) c.value[i] = sums[i];
  return c;
}

#if defined(HAS_MFMA) && (defined(__gfx908__) || defined(__gfx90a__))
struct ByteOperand { i32 half[2]; };
DEVICE inline ByteOperand left_bytes(const i8* p, i32 stride) {
  const i32 lane = thread_index() & (WAVE - 1);
  const i8* row = p + (lane % 16) * stride + 4 * (lane / 16);
  return {{*(const i32*)row, *(const i32*)(row + 16)}};
}
template <i32 part>
DEVICE inline Tile8 tile_dot_half(ByteOperand a, ByteOperand b) {
  return tile_of(__builtin_amdgcn_mfma_i32_16x16x16i8(a.half[part], b.half[part], (Ints4){0, 0, 0, 0}, 0, 0, 0));
}
DEVICE inline Tile8 tile_dot(ByteOperand a, ByteOperand b) {
  Ints4 sum = {0, 0, 0, 0};
  sum = __builtin_amdgcn_mfma_i32_16x16x16i8(a.half[0], b.half[0], sum, 0, 0, 0);
  return tile_of(__builtin_amdgcn_mfma_i32_16x16x16i8(a.half[1], b.half[1], sum, 0, 0, 0));
}

#elif defined(HAS_MFMA)
typedef i64 ByteOperand;
DEVICE inline ByteOperand left_bytes(const i8* p, i32 stride) {
  const i32 lane = thread_index() & (WAVE - 1);
  return *(const i64*)(p + (lane % 16) * stride + 8 * (lane / 16));
}
DEVICE inline Tile8 tile_dot(ByteOperand a, ByteOperand b) {
  return tile_of(__builtin_amdgcn_mfma_i32_16x16x32_i8(a, b, (Ints4){0, 0, 0, 0}, 0, 0, 0));
}
// There is no product of 16 columns: the lanes that hold the others give zeros.
template <i32 part>
DEVICE inline Tile8 tile_dot_half(ByteOperand a, ByteOperand b) {
  return tile_dot((thread_index() & (WAVE - 1)) / 32 == part ? a : 0, b);
}

#elif defined(HAS_WMMA)
#if defined(__GFX12__)
typedef i32 ByteHalf __attribute__((ext_vector_type(2)));
#else
typedef Ints4 ByteHalf;
#endif
struct ByteOperand { ByteHalf half[2]; };
DEVICE inline ByteOperand left_bytes(const i8* p, i32 stride) {
  const i32 lane = thread_index() & (WAVE - 1);
  const i8* row = p + (lane % 16) * stride;
#if defined(__GFX12__)
  row += 8 * (lane / 16);
#endif
  return {{*(const ByteHalf*)row, *(const ByteHalf*)(row + 16)}};
}
DEVICE inline Ints8 add_dot(ByteHalf a, ByteHalf b, Ints8 sum) {
#if defined(__GFX12__)
  return __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32_gfx12(true, a, true, b, sum, false);
#else
  return __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32(true, a, true, b, sum, false);
#endif
}
template <i32 part>
DEVICE inline Tile8 tile_dot_half(const ByteOperand& a, const ByteOperand& b) {
  return tile_of(add_dot(a.half[part], b.half[part], (Ints8)(0)));
}
DEVICE inline Tile8 tile_dot(const ByteOperand& a, const ByteOperand& b) {
  return tile_of(add_dot(a.half[1], b.half[1], add_dot(a.half[0], b.half[0], (Ints8)(0))));
}

#else
struct ByteOperand {
  const i8* p;
  i32 stride;
};
DEVICE inline ByteOperand left_bytes(const i8* p, i32 stride) { return {p, stride}; }
template <i32 first, i32 end>
DEVICE inline Tile8 tile_dot_words(ByteOperand a, ByteOperand b) {
  const i32* column = (const i32*)(b.p + tile_column(0) * b.stride);
  Tile8 c;
#pragma unroll
  for (i32 i = 0; i < 256 / WAVE; i++) {
    const i32* row = (const i32*)(a.p + tile_row(i) * a.stride);
    c.value[i] = 0;
#pragma unroll
    for (i32 k = first; k < end; k++) c.value[i] = dot4(row[k], column[k], c.value[i]);
  }
  __builtin_amdgcn_sched_barrier(0);   // as above
  return c;
}
DEVICE inline Tile8 tile_dot(ByteOperand a, ByteOperand b) { return tile_dot_words<0, 8>(a, b); }
template <i32 part>
DEVICE inline Tile8 tile_dot_half(ByteOperand a, ByteOperand b) { return tile_dot_words<4 * part, 4 * part + 4>(a, b); }
#endif

DEVICE inline ByteOperand right_bytes(const i8* p, i32 stride) { return left_bytes(p, stride); }

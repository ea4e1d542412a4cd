// Weights as a GPU reads them: chunks of groups of 16 elements, w = scale * q + minimum, with q packed four to a word.
//
// A matrix lies in planes: of each kind of field (quants, scales, ...) the values of all blocks one after another, in the
// order of the blocks, so that a lane loads 16 aligned bytes at a time. Blocks whose fields are aligned as they stand
// (Q4_K) are left alone. `split_planes` makes the planes at upload. Bytes in all stay the same.
#pragma once
#include "common/arguments.h"
#include "hip/prelude.h"
#include "common/blocks.h"

template <i32 GROUPS_>
struct Chunk {
  static constexpr i32 GROUPS = GROUPS_;
  i32 word[GROUPS][4];      // 16 signed bytes, first element lowest
  float scale[GROUPS];
  float minimum[GROUPS];    // the same for both halves of a block of 32; unread where PlaneFormat::MINIMUM is false
};

// Per format: how many elements one lane takes, how many share a scale, whether there is a minimum, how to load the bytes of
// chunk number `chunk` of a row and, once they are there, how to unpack them, and where in the row group g of that chunk begins.
// Chunks come in order: those of 128 neighbouring elements stand together. `leading_bytes` is what a row takes of the first
// plane. Blocks of a matrix are counted in 32 bits.
template <i32 type> struct PlaneFormat;

template <typename F> using Unpacked = decltype(F::unpack(typename F::Loaded(), 0u));

// Workgroups run over the rows of all matrices of a launch, each matrix rounded up to whole workgroups of `rows` rows: which
// matrix workgroup number `group` is of; `group` becomes its number among those of that matrix.
DEVICE inline i32 matrix_of_group(const MatmulArguments& a, i32 rows, i32& group) {
  i32 m = 0;
  while (m < a.n_matrices - 1 && group >= (a.w[m].n_rows + rows - 1) / rows) group -= (a.w[m++].n_rows + rows - 1) / rows;
  return m;
}

DEVICE inline const u8* bytes_of(const Matrix& w) { return (const u8*)w.data; }
DEVICE inline Words4 load16(const u8* p) { return load((const Words4*)p); }
DEVICE inline i8 load_byte(const u8* p) { return (i8)load(p); }
DEVICE inline f16_bits load_half(const u8* p) { return load((const f16_bits*)p); }

DEVICE inline float signed_byte(i32 word, i32 i) { return (float)(i32)(i8)(word >> (8 * i)); }

// Four bytes below 128, each minus the same `zero`, as signed bytes; no borrow crosses a byte.
DEVICE inline i32 minus(u32 bytes, u32 zero) { return (i32)(((bytes | 0x80808080u) - zero * 0x01010101u) ^ 0x80808080u); }

template <> struct PlaneFormat<TYPE_Q8_0> {
  static constexpr i32 ELEMENTS = 16;
  static constexpr i32 SCALE_ELEMENTS = 32;
  static constexpr bool MINIMUM = false;
  DEVICE_MEMBER i64 leading_bytes(u32 width) { return width; }
  DEVICE_MEMBER i32 position(u32 chunk, i32 g) { return chunk * 16 + g * 16; }
  struct Loaded { Words4 q; f16_bits d; };
  DEVICE_MEMBER Loaded load(const Matrix& w, u32 width, u32 row, u32 chunk) {
    const u32 n_blocks = w.n_rows * (width / 32), block = row * (width / 32) + chunk / 2;
    return {load16(bytes_of(w) + (u64)block * 32 + chunk % 2 * 16), load_half(bytes_of(w) + (u64)n_blocks * 32 + (u64)block * 2)};
  }
  DEVICE_MEMBER Chunk<1> unpack(const Loaded& from, u32) {
    Chunk<1> c;
#pragma unroll
    for (i32 i = 0; i < 4; i++) c.word[0][i] = (i32)from.q.word[i];
    c.scale[0] = half_to_float(from.d);
    return c;
  }
};

template <> struct PlaneFormat<TYPE_Q4_0> {
  static constexpr i32 ELEMENTS = 32;
  static constexpr i32 SCALE_ELEMENTS = 32;
  static constexpr bool MINIMUM = false;
  DEVICE_MEMBER i64 leading_bytes(u32 width) { return width / 2; }
  DEVICE_MEMBER i32 position(u32 chunk, i32 g) { return chunk * 32 + g * 16; }
  struct Loaded { Words4 q; f16_bits d; };
  DEVICE_MEMBER Loaded load(const Matrix& w, u32 width, u32 row, u32 chunk) {
    const u32 n_blocks = w.n_rows * (width / 32), block = row * (width / 32) + chunk;
    return {load16(bytes_of(w) + (u64)block * 16), load_half(bytes_of(w) + (u64)n_blocks * 16 + (u64)block * 2)};
  }
  DEVICE_MEMBER Chunk<2> unpack(const Loaded& from, u32) {
    const float scale = half_to_float(from.d);
    Chunk<2> c;
#pragma unroll
    for (i32 g = 0; g < 2; g++) {
#pragma unroll
      for (i32 i = 0; i < 4; i++) c.word[g][i] = minus((from.q.word[i] >> (4 * g)) & 0x0f0f0f0fu, 8);
      c.scale[g] = scale;
    }
    return c;
  }
};

// Scales and minima number 2 * pair and the next, of the eight that a Q4_K block packs into 12 bytes, 6 bits each; one a byte.
DEVICE inline void unpack_scales_minima(const u32 (&packed)[3], u32 pair, u32& scales, u32& minima) {
  const u32 shift = 16 * (pair % 2);
  const u32 low = packed[0] >> shift, mid = packed[1] >> shift, high = packed[2] >> shift;
  scales = pair < 2 ? low & 0x3f3fu : (high & 0x0f0fu) | ((low >> 2) & 0x3030u);
  minima = pair < 2 ? mid & 0x3f3fu : ((high >> 4) & 0x0f0fu) | ((mid >> 2) & 0x3030u);
}

// Block of 256: d, dmin (float16), 12 bytes of scales and minima, 128 bytes of quants; 32 bytes hold the low nibbles of
// one group of 32 elements and the high nibbles of the next. A lane takes 16 of those bytes.
template <> struct PlaneFormat<TYPE_Q4_K> {
  static constexpr i32 ELEMENTS = 32;
  static constexpr i32 SCALE_ELEMENTS = 32;
  static constexpr bool MINIMUM = true;
  DEVICE_MEMBER i64 leading_bytes(u32 width) { return width / 256 * 144; }
  DEVICE_MEMBER i32 position(u32 chunk, i32 g) { return chunk / 2 * 64 + g * 32 + chunk % 2 * 16; }
  struct Loaded { Words4 head, q; };
  DEVICE_MEMBER Loaded load(const Matrix& w, u32 width, u32 row, u32 chunk) {
    const u8* block = bytes_of(w) + (u64)(row * (width / 256) + chunk / 8) * 144;
    return {load16(block), load16(block + 16 + chunk % 8 * 16)};
  }
  DEVICE_MEMBER Chunk<2> unpack(const Loaded& from, u32 chunk) {
    const Words4 &head = from.head, &q = from.q;
    const u32 pair = chunk % 8 / 2;
    const float d = half_to_float((f16_bits)head.word[0]), dmin = half_to_float((f16_bits)(head.word[0] >> 16));
    const u32 packed[3] = {head.word[1], head.word[2], head.word[3]};
    u32 scales, minima;
    unpack_scales_minima(packed, pair, scales, minima);
    Chunk<2> c;
#pragma unroll
    for (i32 g = 0; g < 2; g++) {
#pragma unroll
      for (i32 i = 0; i < 4; i++) c.word[g][i] = (i32)((q.word[i] >> (4 * g)) & 0x0f0f0f0fu);
      c.scale[g] = d * (float)((scales >> (8 * g)) & 63);
      c.minimum[g] = -dmin * (float)((minima >> (8 * g)) & 63);
    }
    return c;
  }
};

// Block of 256: low 4 bits (128 bytes), high 2 bits (64), a signed scale for each 16 elements (16), d (float16), each field
// in a plane of its own. 64 + 32 bytes hold 128 elements; a lane takes 16 places of each 32, so 64 elements.
template <> struct PlaneFormat<TYPE_Q6_K> {
  static constexpr i32 ELEMENTS = 64;
  static constexpr i32 SCALE_ELEMENTS = 16;
  static constexpr bool MINIMUM = false;
  DEVICE_MEMBER i64 leading_bytes(u32 width) { return width / 2; }
  DEVICE_MEMBER i32 position(u32 chunk, i32 g) { return chunk / 2 * 128 + g * 32 + chunk % 2 * 16; }
  struct Loaded { Words4 a, b, high; i8 scale[4]; f16_bits d; };
  DEVICE_MEMBER Loaded load(const Matrix& w, u32 width, u32 row, u32 chunk) {
    const u32 n_blocks = w.n_rows * (width / 256);
    const u64 block = row * (width / 256) + chunk / 4;
    const u32 part = chunk % 4 / 2, half = chunk % 2;   // which 128 elements, which 16 of each 32
    const u8* low = bytes_of(w) + block * 128 + part * 64 + half * 16;
    const u8* high = bytes_of(w) + (u64)n_blocks * 128 + block * 64 + part * 32 + half * 16;
    const u8* scales = bytes_of(w) + (u64)n_blocks * 192 + block * 16 + part * 8 + half;
    return {load16(low), load16(low + 32), load16(high), {load_byte(scales), load_byte(scales + 2), load_byte(scales + 4), load_byte(scales + 6)},
            load_half(bytes_of(w) + (u64)n_blocks * 208 + block * 2)};
  }
  DEVICE_MEMBER Chunk<4> unpack(const Loaded& from, u32) {
    const float d = half_to_float(from.d);
    Chunk<4> c;
#pragma unroll
    for (i32 g = 0; g < 4; g++) {
#pragma unroll
      for (i32 i = 0; i < 4; i++) {
        const u32 four = ((g % 2 ? from.b : from.a).word[i] >> (4 * (g / 2))) & 0x0f0f0f0fu;
        c.word[g][i] = minus(four | (((from.high.word[i] >> (2 * g)) & 0x03030303u) << 4), 32);
      }
      c.scale[g] = d * (float)from.scale[g];
    }
    return c;
  }
};

// Matrices of floats: one element, as float32.
template <i32 type>
DEVICE inline float float_weight(const Matrix& w, i64 index) {
  if constexpr (type == TYPE_F32) return load((const float*)w.data + index);
  if constexpr (type == TYPE_F16) return half_to_float(load((const f16_bits*)w.data + index));
  return __builtin_bit_cast(float, (u32)load((const u16*)w.data + index) << 16);   // TYPE_BF16
}

constexpr bool is_quantized(i32 type) { return type != TYPE_F32 && type != TYPE_F16 && type != TYPE_BF16; }

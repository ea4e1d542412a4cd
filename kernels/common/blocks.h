// The block formats of GGUF weights and their decoding, the same on every device.
//
// The includer provides types.h, DEVICE (how a device function is declared) and `float half_to_float(f16_bits)`.
//
// Every quantized format is seen as groups of 16 or 32 elements with w = scale * q + minimum, q an int8. `decode`
// gives 32 consecutive elements of a row that way; a new format needs its structure and its `decode`. Source of the
// layouts: ggml, ggml-common.h and ggml-quants.c (https://github.com/ggml-org/ggml).
#pragma once
#include "common/types.h"

// ggml's numbers of the types.
constexpr i32 TYPE_F32 = 0;
constexpr i32 TYPE_F16 = 1;
constexpr i32 TYPE_Q4_0 = 2;
constexpr i32 TYPE_Q4_1 = 3;
constexpr i32 TYPE_Q5_0 = 6;
constexpr i32 TYPE_Q5_1 = 7;
constexpr i32 TYPE_Q8_0 = 8;
constexpr i32 TYPE_Q4_K = 12;
constexpr i32 TYPE_Q5_K = 13;
constexpr i32 TYPE_Q6_K = 14;
constexpr i32 TYPE_BF16 = 30;

// elements: of a block; groups: scales for 32 elements, 1 or 2; has_minimum: whether any minimum is not zero.
struct BlockQ4_0 {
  static constexpr i32 elements = 32;
  static constexpr i32 groups = 1;
  static constexpr bool has_minimum = false;
  f16_bits d;
  u8 qs[16];   // element i in the low half of qs[i], element i + 16 in the high half; 8 stands for zero
};

struct BlockQ4_1 {
  static constexpr i32 elements = 32;
  static constexpr i32 groups = 1;
  static constexpr bool has_minimum = true;
  f16_bits d, m;
  u8 qs[16];   // as Q4_0, but 0 stands for zero
};

struct BlockQ5_0 {
  static constexpr i32 elements = 32;
  static constexpr i32 groups = 1;
  static constexpr bool has_minimum = false;
  f16_bits d;
  u8 qh[4];    // bit i: the fifth bit of element i
  u8 qs[16];   // as Q4_0, but 16 stands for zero
};

struct BlockQ5_1 {
  static constexpr i32 elements = 32;
  static constexpr i32 groups = 1;
  static constexpr bool has_minimum = true;
  f16_bits d, m;
  u8 qh[4];
  u8 qs[16];   // as Q5_0, but 0 stands for zero
};

struct BlockQ8_0 {
  static constexpr i32 elements = 32;
  static constexpr i32 groups = 1;
  static constexpr bool has_minimum = false;
  f16_bits d;
  i8 qs[32];
};

struct BlockQ4_K {
  static constexpr i32 elements = 256;
  static constexpr i32 groups = 1;
  static constexpr bool has_minimum = true;
  f16_bits d, dmin;
  u8 scales[12];   // 8 scales and 8 minima of 6 bits, one a group of 32
  u8 qs[128];      // groups 2p and 2p + 1 in the low and high halves of qs[32 p ..]
};

struct BlockQ5_K {
  static constexpr i32 elements = 256;
  static constexpr i32 groups = 1;
  static constexpr bool has_minimum = true;
  f16_bits d, dmin;
  u8 scales[12];   // as Q4_K
  u8 qh[32];       // bit g of qh[i]: the fifth bit of element i of group g
  u8 qs[128];      // as Q4_K
};

struct BlockQ6_K {
  static constexpr i32 elements = 256;
  static constexpr i32 groups = 2;
  static constexpr bool has_minimum = false;
  u8 ql[128];      // low 4 bits
  u8 qh[64];       // high 2 bits; 32 stands for zero
  i8 scales[16];   // one a group of 16
  f16_bits d;
};

static_assert(sizeof(BlockQ4_0) == 18 && sizeof(BlockQ4_1) == 20 && sizeof(BlockQ5_0) == 22 &&
                  sizeof(BlockQ5_1) == 24 && sizeof(BlockQ8_0) == 34 && sizeof(BlockQ4_K) == 144 &&
                  sizeof(BlockQ5_K) == 176 && sizeof(BlockQ6_K) == 210,
              "GGUF blocks are packed");

// 32 consecutive elements of a row: w[i] = scale[i / 16] * q[i] + minimum[i / 16].
struct Decoded {
  i8 q[32];
  float scale[2];
  float minimum[2];
};

DEVICE inline void set_scale(Decoded& out, float scale, float minimum) {
  out.scale[0] = out.scale[1] = scale;
  out.minimum[0] = out.minimum[1] = minimum;
}

// decode(row, i, out): elements 32 i .. 32 i + 31 of a row of blocks.
DEVICE inline void decode(const BlockQ4_0* row, i32 i, Decoded& out) {
  const BlockQ4_0& block = row[i];
  set_scale(out, half_to_float(block.d), 0.0f);
  for (i32 j = 0; j < 16; j++) {
    out.q[j] = (i8)((block.qs[j] & 15) - 8);
    out.q[j + 16] = (i8)((block.qs[j] >> 4) - 8);
  }
}

DEVICE inline void decode(const BlockQ4_1* row, i32 i, Decoded& out) {
  const BlockQ4_1& block = row[i];
  set_scale(out, half_to_float(block.d), half_to_float(block.m));
  for (i32 j = 0; j < 16; j++) {
    out.q[j] = (i8)(block.qs[j] & 15);
    out.q[j + 16] = (i8)(block.qs[j] >> 4);
  }
}

// Element j of 32 with four bits in qs and the fifth in qh.
DEVICE inline i32 five_bits(const u8* qs, const u8* qh, i32 j) {
  return (qs[j % 16] >> j / 16 * 4 & 15) | (qh[j / 8] >> j % 8 & 1) << 4;
}

DEVICE inline void decode(const BlockQ5_0* row, i32 i, Decoded& out) {
  const BlockQ5_0& block = row[i];
  set_scale(out, half_to_float(block.d), 0.0f);
  for (i32 j = 0; j < 32; j++) out.q[j] = (i8)(five_bits(block.qs, block.qh, j) - 16);
}

DEVICE inline void decode(const BlockQ5_1* row, i32 i, Decoded& out) {
  const BlockQ5_1& block = row[i];
  set_scale(out, half_to_float(block.d), half_to_float(block.m));
  for (i32 j = 0; j < 32; j++) out.q[j] = (i8)five_bits(block.qs, block.qh, j);
}

DEVICE inline void decode(const BlockQ8_0* row, i32 i, Decoded& out) {
  const BlockQ8_0& block = row[i];
  set_scale(out, half_to_float(block.d), 0.0f);
  for (i32 j = 0; j < 32; j++) out.q[j] = block.qs[j];
}

// The 6-bit scale and minimum of group g: the first four stand alone, the others borrow the top two bits of the first
// eight bytes.
DEVICE inline void scale_and_minimum_q4_k(const u8* scales, i32 g, i32& scale, i32& minimum) {
  if (g < 4) {
    scale = scales[g] & 63;
    minimum = scales[g + 4] & 63;
  } else {
    scale = (scales[g + 4] & 15) | (scales[g - 4] >> 6 << 4);
    minimum = (scales[g + 4] >> 4) | (scales[g] >> 6 << 4);
  }
}

// What Q4_K and Q5_K share: scale, minimum and the low four bits.
template <class Block>
DEVICE inline void decode_four_bits(const Block& block, i32 g, Decoded& out) {
  i32 scale, minimum;
  scale_and_minimum_q4_k(block.scales, g, scale, minimum);
  set_scale(out, half_to_float(block.d) * (float)scale, -(half_to_float(block.dmin) * (float)minimum));
  const u8* qs = block.qs + g / 2 * 32;
  for (i32 j = 0; j < 32; j++) out.q[j] = (i8)(qs[j] >> g % 2 * 4 & 15);
}

DEVICE inline void decode(const BlockQ4_K* row, i32 i, Decoded& out) { decode_four_bits(row[i / 8], i % 8, out); }

DEVICE inline void decode(const BlockQ5_K* row, i32 i, Decoded& out) {
  const BlockQ5_K& block = row[i / 8];
  decode_four_bits(block, i % 8, out);
  for (i32 j = 0; j < 32; j++) out.q[j] = (i8)(out.q[j] | (block.qh[j] >> i % 8 & 1) << 4);
}

DEVICE inline void decode(const BlockQ6_K* row, i32 i, Decoded& out) {
  const BlockQ6_K& block = row[i / 8];
  const i32 g = i % 8;   // of 32 elements: half g / 4 of the block, quarter g % 4 of the half
  const u8* ql = block.ql + g / 4 * 64 + g % 2 * 32;
  const u8* qh = block.qh + g / 4 * 32;
  for (i32 j = 0; j < 32; j++) out.q[j] = (i8)(((ql[j] >> g % 4 / 2 * 4 & 15) | (qh[j] >> g % 4 * 2 & 3) << 4) - 32);
  for (i32 half = 0; half < 2; half++) {
    out.scale[half] = half_to_float(block.d) * (float)block.scales[2 * g + half];
    out.minimum[half] = 0.0f;
  }
}

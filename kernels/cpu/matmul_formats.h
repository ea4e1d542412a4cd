// How the codes of each quantized format get into vector registers. Compiled once for each instruction set V.
//
// Lanes are weight rows: word i of V::lanes rows is one vector, so that one instruction multiplies the same columns
// of all of them and no sum ever crosses lanes. Because rows are only loaded and transposed once, in words of four
// codes, unpacking costs a fraction of an instruction for each code.
//
// A format F = BlockFormat<Block> gives
//   Block           its structure in common/blocks.h
//   blocks          how many blocks of 32 columns one Block holds
//   max_code, zero  codes are 0 .. max_code and stand for code - zero; with `is_signed` they are the int8 themselves
//   unpack(p, stride, tile, b): the Block at p of V::lanes rows, `stride` bytes apart, into blocks b, b + 1, ... of
//                   the tile; unpack_factors: its scales and minima alone
#pragma once
#include <cstddef>

#include "cpu/dequantize.h"

namespace redshard {
namespace {

// V::lanes rows of up to kTileBlocks blocks of 32 columns. codes[b][i], lane r: columns 32 b + 4 i .. + 3 of row r.
constexpr i64 kTileBlocks = 32;

template <class V>
struct Tile {
  typename V::Words codes[kTileBlocks][8];
  typename V::Floats scale[kTileBlocks][2];   // of each half; formats with one group in 32 columns use the first
  typename V::Floats minimum[kTileBlocks];
};

template <class V, class T>
typename V::Floats to_floats(T v) {
  return __builtin_convertvector((typename V::Ints)v, typename V::Floats);
}

// Byte `index` of every word, without and with sign.
template <class V>
typename V::Floats byte_of(typename V::Words v, int index) {
  return to_floats<V>(v >> 8 * index & 0xff);
}
template <class V>
typename V::Floats signed_byte_of(typename V::Words v, int index) {
  return to_floats<V>((typename V::Ints)(v << (24 - 8 * index)) >> 24);
}

template <class Block>
struct BlockFormat;

// Q4_0, Q4_1, Q5_0 and Q5_1: two codes in a byte, and perhaps a fifth bit of each elsewhere.
template <class BlockType, bool fifth_bit>
struct FormatHalves {
  using Block = BlockType;
  static constexpr int blocks = 1, max_code = fifth_bit ? 31 : 15, zero = Block::has_minimum ? 0 : (max_code + 1) / 2;
  static constexpr bool is_signed = false, has_fifth_bit = fifth_bit;

  template <class V>
  static void unpack(const u8* p, i64 stride, Tile<V>& tile, i64 b) {
    unpack_factors(p, stride, tile, b);
    typename V::Words raw[4], high{};
    V::load_columns(p + offsetof(Block, qs), stride, raw);
    if constexpr (has_fifth_bit) high = load_high<V>(p, stride);
    for (int i = 0; i < 4; ++i) {
      tile.codes[b][i] = (raw[i] & 0x0f0f0f0f) | fifth_bits<V>(high >> 4 * i);
      tile.codes[b][4 + i] = (raw[i] >> 4 & 0x0f0f0f0f) | fifth_bits<V>(high >> (16 + 4 * i));
    }
  }

  template <class V>
  static void unpack_factors(const u8* p, i64 stride, Tile<V>& tile, i64 b) {
    tile.scale[b][0] = V::load_halves(p + offsetof(Block, d), stride);
    if constexpr (Block::has_minimum) tile.minimum[b] = V::load_halves(p + offsetof(Block, m), stride);
  }

  // The fifth bits of all 32 elements; they begin within the first two words.
  template <class V>
  static typename V::Words load_high(const u8* p, i64 stride) {
    typename V::Words head[4];
    V::load_columns(p, stride, head);
    if constexpr (offsetof(Block, qh) == 4) return head[1];
    static_assert(offsetof(Block, qh) == 2 || offsetof(Block, qh) == 4, "a place for which nothing is written");
    return head[0] >> 16 | head[1] << 16;
  }

  // Bits 0 to 3 become bit 4 of each byte: the multiplication puts a copy of all of them before every byte.
  template <class V>
  static typename V::Words fifth_bits(typename V::Words bits) {
    if constexpr (!has_fifth_bit) return typename V::Words{};
    return ((bits & 15) * 0x00204081 & 0x01010101) << 4;
  }
};

template <> struct BlockFormat<BlockQ4_0> : FormatHalves<BlockQ4_0, false> {};
template <> struct BlockFormat<BlockQ4_1> : FormatHalves<BlockQ4_1, false> {};
template <> struct BlockFormat<BlockQ5_0> : FormatHalves<BlockQ5_0, true> {};
template <> struct BlockFormat<BlockQ5_1> : FormatHalves<BlockQ5_1, true> {};

template <>
struct BlockFormat<BlockQ8_0> {
  using Block = BlockQ8_0;
  static constexpr int blocks = 1, max_code = 255, zero = 128;
  static constexpr bool is_signed = true;

  template <class V>
  static void unpack(const u8* p, i64 stride, Tile<V>& tile, i64 b) {
    unpack_factors(p, stride, tile, b);
    V::load_columns(p + offsetof(Block, qs), stride, tile.codes[b]);
    V::load_columns(p + offsetof(Block, qs) + 16, stride, tile.codes[b] + 4);
  }

  template <class V>
  static void unpack_factors(const u8* p, i64 stride, Tile<V>& tile, i64 b) {
    tile.scale[b][0] = V::load_halves(p + offsetof(Block, d), stride);
  }
};

// Q4_K and Q5_K, which differ in a fifth bit.
template <class BlockType, bool fifth_bit>
struct FormatK {
  using Block = BlockType;
  static constexpr int blocks = 8, max_code = fifth_bit ? 31 : 15, zero = 0;
  static constexpr bool is_signed = false, has_fifth_bit = fifth_bit;

  template <class V>
  static void unpack(const u8* p, i64 stride, Tile<V>& tile, i64 b) {
    unpack_factors(p, stride, tile, b);
    for (int part = 0; part < 2; ++part) {   // of each group of 32: 16 elements
      typename V::Words high[4] = {};
      if constexpr (has_fifth_bit) V::load_columns(p + offsetof(Block, qh) + 16 * part, stride, high);
      for (int pair = 0; pair < 4; ++pair) {
        typename V::Words raw[4];
        V::load_columns(p + offsetof(Block, qs) + 32 * pair + 16 * part, stride, raw);
        auto* codes = tile.codes + b + 2 * pair;
        for (int i = 0; i < 4; ++i) {
          const auto fifth = high[i] >> 2 * pair;
          codes[0][4 * part + i] = (raw[i] & 0x0f0f0f0f) | (fifth << 4 & 0x10101010);
          codes[1][4 * part + i] = (raw[i] >> 4 & 0x0f0f0f0f) | (fifth << 3 & 0x10101010);
        }
      }
    }
  }

  // d, dmin and the twelve bytes of scales are the first 16 bytes of a block: one transposition brings them all.
  template <class V>
  static void unpack_factors(const u8* p, i64 stride, Tile<V>& tile, i64 b) {
    typename V::Words head[4];
    V::load_columns(p, stride, head);
    const auto d = V::low_halves(head[0]), dmin = V::low_halves(head[0] >> 16);
    const typename V::Words scales[2] = {head[1] & 0x3f3f3f3f,
                                         (head[3] & 0x0f0f0f0f) | (head[1] >> 2 & 0x30303030)};
    const typename V::Words minima[2] = {head[2] & 0x3f3f3f3f,
                                         (head[3] >> 4 & 0x0f0f0f0f) | (head[2] >> 2 & 0x30303030)};
    for (int g = 0; g < 8; ++g) {
      tile.scale[b + g][0] = d * byte_of<V>(scales[g / 4], g % 4);
      tile.minimum[b + g] = -(dmin * byte_of<V>(minima[g / 4], g % 4));
    }
  }
};

template <> struct BlockFormat<BlockQ4_K> : FormatK<BlockQ4_K, false> {};
template <> struct BlockFormat<BlockQ5_K> : FormatK<BlockQ5_K, true> {};

template <>
struct BlockFormat<BlockQ6_K> {
  using Block = BlockQ6_K;
  static constexpr int blocks = 8, max_code = 63, zero = 32;
  static constexpr bool is_signed = false;

  template <class V>
  static void unpack(const u8* p, i64 stride, Tile<V>& tile, i64 b) {
    unpack_factors(p, stride, tile, b);
    for (int half = 0; half < 2; ++half) {       // of the block: 128 elements
      for (int part = 0; part < 2; ++part) {     // of each group of 32: 16 elements
        typename V::Words low[4], low_next[4], high[4];
        V::load_columns(p + offsetof(Block, ql) + 64 * half + 16 * part, stride, low);
        V::load_columns(p + offsetof(Block, ql) + 64 * half + 32 + 16 * part, stride, low_next);
        V::load_columns(p + offsetof(Block, qh) + 32 * half + 16 * part, stride, high);
        auto* codes = tile.codes + b + 4 * half;
        for (int i = 0; i < 4; ++i) {
          const int word = 4 * part + i;
          codes[0][word] = (low[i] & 0x0f0f0f0f) | (high[i] << 4 & 0x30303030);
          codes[1][word] = (low_next[i] & 0x0f0f0f0f) | (high[i] << 2 & 0x30303030);
          codes[2][word] = (low[i] >> 4 & 0x0f0f0f0f) | (high[i] & 0x30303030);
          codes[3][word] = (low_next[i] >> 4 & 0x0f0f0f0f) | (high[i] >> 2 & 0x30303030);
        }
      }
    }
  }

  template <class V>
  static void unpack_factors(const u8* p, i64 stride, Tile<V>& tile, i64 b) {
    typename V::Words scales[4];
    V::load_columns(p + offsetof(Block, scales), stride, scales);
    const auto d = V::load_halves(p + offsetof(Block, d), stride);
    for (int g = 0; g < 16; ++g) tile.scale[b + g / 2][g % 2] = d * signed_byte_of<V>(scales[g / 4], g % 4);
  }
};

}  // namespace
}  // namespace redshard

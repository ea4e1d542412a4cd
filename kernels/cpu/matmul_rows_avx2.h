// Integer products of eight weight rows with one row of activations, on AVX2. Each row's codes lie side by side in a
// register, as in memory; only the sums are brought together, so that lane r holds the product of row r.
//
// RowDots<F>::multiply(p, stride, x, dot): the Block at p of eight rows, `stride` bytes apart, times the activations x;
// dot[i] belongs to group i of the block.
#pragma once
#include <immintrin.h>

#include <cstddef>

#include "cpu/matmul_formats.h"

namespace redshard {
namespace {

using RowInts = i32 __attribute__((vector_size(32)));

constexpr int kMaxQuant = 127;   // of an activation

inline __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m256i twice16(const void* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
// 16 bytes of row r, then of row r + 4.
inline __m256i load_rows(const u8* p, i64 stride) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 4 * stride)), 1);
}

inline __m256i low_halves_of(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
inline __m256i high_halves_of(__m256i bytes) { return low_halves_of(_mm256_srli_epi16(bytes, 4)); }
// Two bits of every byte to where bits 4 and 5 are: the bits from 2 * place on.
template <int place>
__m256i high_bits_of(__m256i bytes, int bits) {
  const __m256i moved = place < 2 ? _mm256_slli_epi16(bytes, 4 - 2 * place) : _mm256_srli_epi16(bytes, 2 * place - 4);
  return _mm256_and_si256(moved, _mm256_set1_epi8(static_cast<char>(bits)));
}

inline __m256i widen(__m256i shorts) { return _mm256_madd_epi16(shorts, _mm256_set1_epi16(1)); }

// Four registers, of four rows (or twice four, one in each half) and of sums of at most `bound` in 16 bits, to one with
// a 32-bit sum of each half of each: of row 0, 1, 2, 3. As much as fits is added in 16 bits.
template <int bound>
__m256i fold(const __m256i* row) {
  static_assert(bound <= 32767, "sums do not fit");
  if constexpr (4 * bound <= 32767) {
    return widen(_mm256_hadd_epi16(_mm256_hadd_epi16(row[0], row[1]), _mm256_hadd_epi16(row[2], row[3])));
  } else if constexpr (2 * bound <= 32767) {
    return _mm256_hadd_epi32(widen(_mm256_hadd_epi16(row[0], row[1])), widen(_mm256_hadd_epi16(row[2], row[3])));
  } else {
    return _mm256_hadd_epi32(_mm256_hadd_epi32(widen(row[0]), widen(row[1])),
                             _mm256_hadd_epi32(widen(row[2]), widen(row[3])));
  }
}

// Eight registers of a row each, 32 columns, to the sums over their lower and over their upper 16 columns, or over all.
template <int bound, int groups>
void fold_rows(const __m256i* row, RowInts* dot) {
  const __m256i first = fold<bound>(row), second = fold<bound>(row + 4);
  const auto lower = (RowInts)_mm256_permute2x128_si256(first, second, 0x20);
  const auto upper = (RowInts)_mm256_permute2x128_si256(first, second, 0x31);
  if constexpr (groups == 2) {
    dot[0] = lower;
    dot[1] = upper;
  } else {
    dot[0] = lower + upper;
  }
}

template <class F>
struct RowDots;

template <class Block, bool fifth_bit>
struct RowDotsHalves {
  using F = FormatHalves<Block, fifth_bit>;

  static void multiply(const u8* p, i64 stride, const i8* x, RowInts* dot) {
    const __m256i x_low = twice16(x), x_high = twice16(x + 16);
    __m256i sum[4];
    for (int r = 0; r < 4; ++r, p += stride) {
      const __m256i codes = load_rows(p + offsetof(Block, qs), stride);
      __m256i low = low_halves_of(codes), high = high_halves_of(codes);
      if constexpr (fifth_bit) {
        const __m256i head = load_rows(p, stride);
        low = _mm256_or_si256(low, spread_bits(head, offsetof(Block, qh)));
        high = _mm256_or_si256(high, spread_bits(head, offsetof(Block, qh) + 2));
      }
      sum[r] = _mm256_add_epi16(_mm256_maddubs_epi16(low, x_low), _mm256_maddubs_epi16(high, x_high));
    }
    dot[0] = (RowInts)fold<4 * kMaxQuant * F::max_code>(sum);
  }

  // The 16 bits from byte `place` of each half on: each as bit 4 of a byte.
  static __m256i spread_bits(__m256i head, int place) {
    const auto from = static_cast<char>(place), next = static_cast<char>(place + 1);
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        from, from, from, from, from, from, from, from, next, next, next, next, next, next, next, next));
    const __m256i bits = _mm256_set1_epi64x(static_cast<i64>(0x8040201008040201));
    const __m256i chosen = _mm256_and_si256(_mm256_shuffle_epi8(head, bytes), bits);
    return _mm256_and_si256(_mm256_cmpeq_epi8(chosen, bits), _mm256_set1_epi8(16));
  }
};

template <> struct RowDots<BlockFormat<BlockQ4_0>> : RowDotsHalves<BlockQ4_0, false> {};
template <> struct RowDots<BlockFormat<BlockQ4_1>> : RowDotsHalves<BlockQ4_1, false> {};
template <> struct RowDots<BlockFormat<BlockQ5_0>> : RowDotsHalves<BlockQ5_0, true> {};
template <> struct RowDots<BlockFormat<BlockQ5_1>> : RowDotsHalves<BlockQ5_1, true> {};

template <>
struct RowDots<BlockFormat<BlockQ8_0>> {
  static void multiply(const u8* p, i64 stride, const i8* x, RowInts* dot) {
    const __m256i quants = load32(x);
    __m256i sum[8];
    for (int r = 0; r < 8; ++r) {
      const __m256i codes = load32(p + r * stride + offsetof(BlockQ8_0, qs));
      sum[r] = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(quants, codes));
    }
    fold_rows<2 * kMaxQuant * 128, 1>(sum, dot);
  }
};

template <class Block, bool fifth_bit>
struct RowDotsK {
  using F = FormatK<Block, fifth_bit>;

  static void multiply(const u8* p, i64 stride, const i8* x, RowInts* dot) {
    add_pair<0>(p, stride, x, dot);
    add_pair<1>(p, stride, x + 64, dot + 2);
    add_pair<2>(p, stride, x + 128, dot + 4);
    add_pair<3>(p, stride, x + 192, dot + 6);
  }

  // Groups 2 * pair and 2 * pair + 1, which share bytes.
  template <int pair>
  static void add_pair(const u8* p, i64 stride, const i8* x, RowInts* dot) {
    const __m256i x_low = load32(x), x_high = load32(x + 32);
    __m256i low_sum[8], high_sum[8];
    for (int r = 0; r < 8; ++r, p += stride) {
      const __m256i codes = load32(p + offsetof(Block, qs) + 32 * pair);
      __m256i low = low_halves_of(codes), high = high_halves_of(codes);
      if constexpr (fifth_bit) {
        const __m256i fifth = load32(p + offsetof(Block, qh));
        low = _mm256_or_si256(low, high_bits_of<pair>(fifth, 0x10));
        high = _mm256_or_si256(high, high_bits_of<pair>(_mm256_srli_epi16(fifth, 1), 0x10));
      }
      low_sum[r] = _mm256_maddubs_epi16(low, x_low);
      high_sum[r] = _mm256_maddubs_epi16(high, x_high);
    }
    fold_rows<2 * kMaxQuant * F::max_code, 1>(low_sum, dot);
    fold_rows<2 * kMaxQuant * F::max_code, 1>(high_sum, dot + 1);
  }
};

template <> struct RowDots<BlockFormat<BlockQ4_K>> : RowDotsK<BlockQ4_K, false> {};
template <> struct RowDots<BlockFormat<BlockQ5_K>> : RowDotsK<BlockQ5_K, true> {};

template <>
struct RowDots<BlockFormat<BlockQ6_K>> {
  using Block = BlockQ6_K;

  static void multiply(const u8* p, i64 stride, const i8* x, RowInts* dot) {
    for (int half = 0; half < 2; ++half) {
      const u8 *low = p + offsetof(Block, ql) + 64 * half, *high = p + offsetof(Block, qh) + 32 * half;
      add_groups<0>(low, high, stride, x, dot);
      add_groups<1>(low + 32, high, stride, x + 32, dot + 2);
      x += 128;
      dot += 8;
    }
  }

  // 32 columns, and the 32 that are 64 further on, whose codes share their bytes.
  template <int place>
  static void add_groups(const u8* low, const u8* high, i64 stride, const i8* x, RowInts* dot) {
    const __m256i x_first = load32(x), x_second = load32(x + 64);
    __m256i first_sum[8], second_sum[8];
    for (int r = 0; r < 8; ++r, low += stride, high += stride) {
      const __m256i codes = load32(low), bits = load32(high);
      const __m256i first = _mm256_or_si256(low_halves_of(codes), high_bits_of<place>(bits, 0x30));
      const __m256i second = _mm256_or_si256(high_halves_of(codes), high_bits_of<place + 2>(bits, 0x30));
      first_sum[r] = _mm256_maddubs_epi16(first, x_first);
      second_sum[r] = _mm256_maddubs_epi16(second, x_second);
    }
    fold_rows<2 * kMaxQuant * BlockFormat<Block>::max_code, 2>(first_sum, dot);
    fold_rows<2 * kMaxQuant * BlockFormat<Block>::max_code, 2>(second_sum, dot + 4);
  }
};

}  // namespace
}  // namespace redshard

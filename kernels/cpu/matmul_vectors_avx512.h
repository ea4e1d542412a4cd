// AVX-512 (F, BW, DQ, VL) as matmul_quantized.h and matmul_float.h want it: sixteen weight rows in a register.
#pragma once
#include <immintrin.h>

#include "cpu/matmul_float.h"
#include "cpu/matmul_quantized.h"

namespace redshard {
namespace {

struct Avx512 {
  static constexpr int lanes = 16;
  using Words = u32 __attribute__((vector_size(64)));
  using Ints = i32 __attribute__((vector_size(64)));
  using Shorts = i16 __attribute__((vector_size(64)));
  using Floats = __m512;

  // Rows of activations in one pass, such that thirty-two registers hold their sums.
  static constexpr int max_rows = 6, max_float_rows = 12;

  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static Floats broadcast(float x) { return _mm512_set1_ps(x); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

  static __m128i load16(const u8* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

  // The 16 bytes at p of sixteen rows: out[i] is word i of every row.
  static void load_columns(const u8* p, i64 stride, Words* out) {
    __m512i row[4];
    for (int r = 0; r < 4; ++r) {
      row[r] = _mm512_castsi128_si512(load16(p + r * stride));
      row[r] = _mm512_inserti32x4(row[r], load16(p + (r + 4) * stride), 1);
      row[r] = _mm512_inserti32x4(row[r], load16(p + (r + 8) * stride), 2);
      row[r] = _mm512_inserti32x4(row[r], load16(p + (r + 12) * stride), 3);
    }
    const __m512i low01 = _mm512_unpacklo_epi32(row[0], row[1]), high01 = _mm512_unpackhi_epi32(row[0], row[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(row[2], row[3]), high23 = _mm512_unpackhi_epi32(row[2], row[3]);
    out[0] = (Words)_mm512_unpacklo_epi64(low01, low23);
    out[1] = (Words)_mm512_unpackhi_epi64(low01, low23);
    out[2] = (Words)_mm512_unpacklo_epi64(high01, high23);
    out[3] = (Words)_mm512_unpackhi_epi64(high01, high23);
  }

  // The float16 at p of sixteen rows.
  static Floats load_halves(const u8* p, i64 stride) {
    f16_bits half[16];
    for (int r = 0; r < 16; ++r) std::memcpy(half + r, p + r * stride, sizeof(f16_bits));
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)));
  }

  // The float16 in the low half of every word.
  static Floats low_halves(Words v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)v)); }

  static constexpr bool has_signed_product = true, has_dots = false;

  // How many products of two codes and two activations fit into 16 bits.
  template <class F>
  static constexpr int words_in_partial = F::is_signed ? 1 : 32767 / (2 * 127 * F::max_code);
  using Partial = Shorts;

  static __m512i broadcast_word(i32 word) { return _mm512_set1_epi32(word); }

  // Adds products of neighbouring bytes, two by two. The instruction wants one factor unsigned.
  template <class F>
  static Shorts add_products(Shorts sum, Words codes, __m512i quants) {
    const __m512i w = (__m512i)codes;
    if (!F::is_signed) return sum + (Shorts)_mm512_maddubs_epi16(w, quants);
    const __m512i turned = _mm512_mask_sub_epi8(quants, _mm512_movepi8_mask(w), _mm512_setzero_si512(), quants);
    return sum + (Shorts)_mm512_maddubs_epi16(_mm512_abs_epi8(w), turned);
  }

  static Ints finish(Shorts sum) { return (Ints)_mm512_madd_epi16((__m512i)sum, _mm512_set1_epi16(1)); }
};

template <class V>
StripKernel kernel_for(i32 type) {
  const StripKernel kernel = quantized_kernel<V>(type);
  return kernel.product ? kernel : float_kernel<V>(type);
}

}  // namespace
}  // namespace redshard

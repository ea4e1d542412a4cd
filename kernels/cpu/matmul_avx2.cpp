// Matrix products with AVX2, FMA and F16C: eight weight rows in a register.
#include <immintrin.h>

#include "cpu/matmul_float.h"
#include "cpu/matmul_quantized.h"
#include "cpu/matmul_rows_avx2.h"
#include "cpu/matmul_swiglu.h"

namespace redshard {
namespace {

struct Avx2 {
  static constexpr int lanes = 8;
  using Words = u32 __attribute__((vector_size(32)));
  using Ints = i32 __attribute__((vector_size(32)));
  using Shorts = i16 __attribute__((vector_size(32)));
  using Floats = __m256;

  // Rows of activations in one pass, such that sixteen registers hold their sums.
  static constexpr int max_rows = 3, max_float_rows = 6;

  static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  static Floats broadcast(float x) { return _mm256_set1_ps(x); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

  static __m128i load16(const u8* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

  // The 16 bytes at p of eight rows: out[i] is word i of every row.
  static void load_columns(const u8* p, i64 stride, Words* out) {
    __m256i row[4];
    for (int r = 0; r < 4; ++r) {
      row[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(load16(p + r * stride)), load16(p + (r + 4) * stride), 1);
    }
    const __m256i low01 = _mm256_unpacklo_epi32(row[0], row[1]), high01 = _mm256_unpackhi_epi32(row[0], row[1]);
    const __m256i low23 = _mm256_unpacklo_epi32(row[2], row[3]), high23 = _mm256_unpackhi_epi32(row[2], row[3]);
    out[0] = (Words)_mm256_unpacklo_epi64(low01, low23);
    out[1] = (Words)_mm256_unpackhi_epi64(low01, low23);
    out[2] = (Words)_mm256_unpacklo_epi64(high01, high23);
    out[3] = (Words)_mm256_unpackhi_epi64(high01, high23);
  }

  // The float16 at p of eight rows.
  static Floats load_halves(const u8* p, i64 stride) {
    const auto half = [&](int row) {
      i16 bits;
      std::memcpy(&bits, p + row * stride, sizeof bits);
      return bits;
    };
    return _mm256_cvtph_ps(_mm_setr_epi16(half(0), half(1), half(2), half(3), half(4), half(5), half(6), half(7)));
  }

  // The float16 in the low half of every word.
  static Floats low_halves(Words v) {
    const __m256i low = (__m256i)(v & 0xffff);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
  }

  static constexpr bool has_signed_product = true;

  // How many products of two codes and two activations fit into 16 bits.
  template <class F>
  static constexpr int words_in_partial = F::is_signed ? 1 : 32767 / (2 * 127 * F::max_code);
  using Partial = Shorts;

  static __m256i broadcast_word(i32 word) { return _mm256_set1_epi32(word); }

  // Adds products of neighbouring bytes, two by two. The instruction wants one factor unsigned.
  template <class F>
  static Shorts add_products(Shorts sum, Words codes, __m256i quants) {
    const __m256i w = (__m256i)codes;
    if (!F::is_signed) return sum + (Shorts)_mm256_maddubs_epi16(w, quants);
    return sum + (Shorts)_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(quants, w));
  }

  static constexpr bool has_dots = true;

  // The integer products of a block of eight rows with its columns of one row of activations, for each group.
  template <class F>
  static void dots(const u8* block, i64 stride, const i8* quants, Ints* dot) {
    RowDots<F>::multiply(block, stride, quants, dot);
  }

  static Ints finish(Shorts sum) { return (Ints)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)); }
};

StripKernel kernel_for(i32 type) {
  const StripKernel kernel = quantized_kernel<Avx2>(type);
  return kernel.product ? kernel : float_kernel<Avx2>(type);
}

}  // namespace

const StripKernels avx2_strip_kernels = {kernel_for, swiglu_strip};

}  // namespace redshard

// Sixteen float32 lanes, the same on every instruction set: one AVX-512 register, two AVX registers, or an array.
// Kernels written with them give the same bits wherever a fused multiply-add exists.
//
// A file that includes this is compiled once for each instruction set, so everything here is in an unnamed namespace:
// otherwise the linker might keep the AVX-512 copy of a function for all.
#pragma once
#include <cstring>
#include <limits>

#include "common/types.h"
#include "cpu/half.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace redshard {
namespace {

constexpr i64 kLanes = 16;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

#if defined(__AVX512F__)

struct Lanes {
  __m512 v;
};

inline Lanes broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Lanes load_half(const f16_bits* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
inline void store_half(f16_bits* p, Lanes a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// b where either is not a number, as for min.
inline Lanes max(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes min(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
// a where x >= y, else 0.
inline Lanes keep_where_ge(Lanes x, Lanes y, Lanes a) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_GE_OQ), a.v)};
}
// a where x < y is false (so also for NaN), else 0.
inline Lanes drop_where_lt(Lanes x, Lanes y, Lanes a) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_NLT_UQ), a.v)};
}
// 2^n from the bits of n + 1.5 * 2^23.
inline Lanes power_of_two(Lanes shifted) {
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f800000)))};
}
inline bool any_ge(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ) != 0; }

#elif defined(__AVX2__)

struct Lanes {
  __m256 lo, hi;
};

inline Lanes broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Lanes load_half(const f16_bits* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline void store(float* p, Lanes a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void store_half(f16_bits* p, Lanes a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}
inline Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
// b where either is not a number, as for min.
inline Lanes max(Lanes a, Lanes b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Lanes min(Lanes a, Lanes b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
// a where x >= y, else 0.
inline Lanes keep_where_ge(Lanes x, Lanes y, Lanes a) {
  return {_mm256_and_ps(a.lo, _mm256_cmp_ps(x.lo, y.lo, _CMP_GE_OQ)),
          _mm256_and_ps(a.hi, _mm256_cmp_ps(x.hi, y.hi, _CMP_GE_OQ))};
}
// a where x < y is false (so also for NaN), else 0.
inline Lanes drop_where_lt(Lanes x, Lanes y, Lanes a) {
  return {_mm256_and_ps(a.lo, _mm256_cmp_ps(x.lo, y.lo, _CMP_NLT_UQ)),
          _mm256_and_ps(a.hi, _mm256_cmp_ps(x.hi, y.hi, _CMP_NLT_UQ))};
}
inline __m256 power_of_two(__m256 shifted) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f800000)));
}
// 2^n from the bits of n + 1.5 * 2^23.
inline Lanes power_of_two(Lanes shifted) { return {power_of_two(shifted.lo), power_of_two(shifted.hi)}; }
inline bool any_ge(Lanes a, Lanes b) {
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ),
                                         _mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ))) != 0;
}

#else

struct Lanes {
  float v[kLanes];
};

template <class F>
inline Lanes each(const F& f) {
  Lanes r;
  for (i64 i = 0; i < kLanes; ++i) r.v[i] = f(i);
  return r;
}

inline Lanes broadcast(float x) {
  return each([&](i64) { return x; });
}
inline Lanes load(const float* p) {
  return each([&](i64 i) { return p[i]; });
}
inline Lanes load_half(const f16_bits* p) {
  return each([&](i64 i) { return half_to_float(p[i]); });
}
inline void store(float* p, Lanes a) { std::memcpy(p, a.v, sizeof a.v); }
inline void store_half(f16_bits* p, Lanes a) {
  for (i64 i = 0; i < kLanes; ++i) p[i] = float_to_half(a.v[i]);
}
inline Lanes operator+(Lanes a, Lanes b) {
  return each([&](i64 i) { return a.v[i] + b.v[i]; });
}
inline Lanes operator-(Lanes a, Lanes b) {
  return each([&](i64 i) { return a.v[i] - b.v[i]; });
}
inline Lanes operator*(Lanes a, Lanes b) {
  return each([&](i64 i) { return a.v[i] * b.v[i]; });
}
inline Lanes operator/(Lanes a, Lanes b) {
  return each([&](i64 i) { return a.v[i] / b.v[i]; });
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
#if defined(__FP_FAST_FMAF)
  return each([&](i64 i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
#else
  return a * b + c;  // a software fma would be some fifty times slower
#endif
}
// b where either is not a number, as for min.
inline Lanes max(Lanes a, Lanes b) {
  return each([&](i64 i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Lanes min(Lanes a, Lanes b) {
  return each([&](i64 i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
// a where x >= y, else 0.
inline Lanes keep_where_ge(Lanes x, Lanes y, Lanes a) {
  return each([&](i64 i) { return x.v[i] >= y.v[i] ? a.v[i] : 0.0f; });
}
// a where x < y is false (so also for NaN), else 0.
inline Lanes drop_where_lt(Lanes x, Lanes y, Lanes a) {
  return each([&](i64 i) { return x.v[i] < y.v[i] ? 0.0f : a.v[i]; });
}
// 2^n from the bits of n + 1.5 * 2^23.
inline Lanes power_of_two(Lanes shifted) {
  u32 bits[kLanes];
  std::memcpy(bits, shifted.v, sizeof bits);
  for (i64 i = 0; i < kLanes; ++i) bits[i] = (bits[i] << 23) + 0x3f800000;
  Lanes r;
  std::memcpy(r.v, bits, sizeof bits);
  return r;
}
inline bool any_ge(Lanes a, Lanes b) {
  bool any = false;
  for (i64 i = 0; i < kLanes; ++i) any |= a.v[i] >= b.v[i];
  return any;
}

#endif

// The first n lanes from memory, `rest` in the others; and back.
inline Lanes load_first(const float* p, i64 n, float rest) {
  if (n >= kLanes) return load(p);
  float lane[kLanes];
  for (i64 i = 0; i < kLanes; ++i) lane[i] = i < n ? p[i] : rest;
  return load(lane);
}
inline void store_first(float* p, i64 n, Lanes a) {
  if (n >= kLanes) return store(p, a);
  float lane[kLanes];
  store(lane, a);
  for (i64 i = 0; i < n; ++i) p[i] = lane[i];
}

// Folds the lanes in halves: 16 to 8 to 4 to 2 to 1.
template <class F>
inline float fold(Lanes a, const F& f) {
  float lane[kLanes];
  store(lane, a);
  for (i64 half = kLanes / 2; half > 0; half /= 2) {
    for (i64 i = 0; i < half; ++i) lane[i] = f(lane[i], lane[i + half]);
  }
  return lane[0];
}
inline float sum(Lanes a) {
  return fold(a, [](float x, float y) { return x + y; });
}
inline float maximum(Lanes a) {
  return fold(a, [](float x, float y) { return x > y ? x : y; });
}

// e^x within 2 ulp for -87.3 <= x <= 88; 0 below, e^88 above, NaN for NaN. Range reduction and polynomial: S. Moshier,
// Cephes Mathematical Library, single/expf.c.
inline Lanes exp(Lanes x) {
  const Lanes lowest = broadcast(-87.3f), shift = broadcast(12582912.0f);  // 1.5 * 2^23
  const Lanes clamped = min(broadcast(88.0f), max(lowest, x));
  const Lanes shifted = fma(clamped, broadcast(1.44269504f), shift);
  const Lanes n = shifted - shift;  // round(x / ln 2)
  Lanes r = fma(n, broadcast(-0.693359375f), clamped);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Lanes p = fma(broadcast(1.9875691500e-4f), r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r) + broadcast(1.0f);
  return drop_where_lt(x, lowest, p * power_of_two(shifted));
}

}  // namespace
}  // namespace redshard

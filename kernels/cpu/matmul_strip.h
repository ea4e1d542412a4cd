// What the products of quantized and of float weights share. Compiled once for each instruction set V.
#pragma once
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/matmul.h"

namespace redshard {
namespace {

// The vectors of V::lanes weight rows that a strip is made of, taken two at a time. A strip at the end of the matrix
// is moved back so that it never leaves it; the rows before it are then computed twice, and dropped by
// `align_output`.
template <class V>
struct StripVectors {
  explicit StripVectors(const Strip& s)
      : strip(s),
        base(std::max(i64{0}, std::min(s.first, s.matrix_rows - kStripRows))),
        n((s.first + s.n_rows - base + V::lanes - 1) / V::lanes) {}

  i64 first_row(i64 v) const { return std::min(base + v * V::lanes, strip.matrix_rows - V::lanes); }
  float* out(i64 v) const { return strip.out + first_row(v) - base; }

  void align_output() const {
    if (base == strip.first) return;
    for (i64 r = 0; r < strip.n_x; ++r) {
      float* row = strip.out + r * kStripRows;
      std::memmove(row, row + strip.first - base, static_cast<std::size_t>(strip.n_rows) * sizeof(float));
    }
  }

  const Strip& strip;
  i64 base, n;
};

// Calls use(integral_constant<int, n>) for 1 <= n <= kMax.
template <int kMax, class Use>
void with_constant(i64 n, const Use& use) {
  if constexpr (kMax > 1) {
    if (n < kMax) return with_constant<kMax - 1>(n, use);
  }
  use(std::integral_constant<int, kMax>{});
}

// Calls use(begin, integral_constant<int, n>) for consecutive parts of 0 .. n_x, nearly equal and of at most kMax.
template <int kMax, class Use>
void in_equal_parts(i64 n_x, const Use& use) {
  const i64 n_parts = (n_x + kMax - 1) / kMax;
  for (i64 part = 0; part < n_parts; ++part) {
    const i64 begin = n_x * part / n_parts, end = n_x * (part + 1) / n_parts;
    with_constant<kMax>(end - begin, [&](auto n) { use(begin, n); });
  }
}

}  // namespace
}  // namespace redshard

// One partition of attention, for the instruction set this is compiled for.
//
// Keys are turned so that a register holds one dimension of sixteen positions: a score then adds its products in the
// order of the dimensions, and a weighted value in the order of the positions, whatever else is computed beside it.
#pragma once
#include "cpu/simd.h"
#include "cpu/vector_ops.h"

namespace redshard {
namespace {

constexpr i64 kTileRows = 4;      // rows of a register tile
#if defined(__AVX512F__)
constexpr i64 kTileVectors = 2;   // its columns, in Lanes: eight registers of sums on either instruction set
#else
constexpr i64 kTileVectors = 1;
#endif

#if defined(__AVX2__)
// out[j * kLanes + i] = rows[i][column + j] for i, j < 8.
inline void load_turned_8x8(const f16_bits* const* rows, i64 column, float* out) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + column)));
  }
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * kLanes, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * kLanes, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#endif

// Asks for a row of the cache that will be read soon: rows of scattered blocks are beyond what hardware foresees.
inline void prefetch(const f16_bits* row, i64 dim) {
  constexpr i64 kLine = 64 / sizeof(f16_bits);
  for (i64 d = 0; d < dim; d += kLine) __builtin_prefetch(row + d);
}

// A panel is kLanes columns of a matrix, row after row, so that a tile reads consecutive memory.

// Panels of positions, head_dim rows each; positions up to the end of the last panel are filled with zeros.
void load_keys(const PartitionArguments& a, float* keys) {
  for (i64 first = 0; first < a.n_positions; first += kLanes, keys += a.head_dim * kLanes) {
    const i64 n = a.n_positions - first < kLanes ? a.n_positions - first : kLanes;
    for (i64 position = first; position < first + n; ++position) prefetch(a.values[position], a.value_dim);
    i64 i = 0;
#if defined(__AVX2__)
    for (; i + 8 <= n; i += 8) {
      const f16_bits* const* rows = a.keys + first + i;
      i64 d = 0;
      for (; d + 8 <= a.head_dim; d += 8) load_turned_8x8(rows, d, keys + d * kLanes + i);
      for (; d < a.head_dim; ++d) {
        for (i64 j = 0; j < 8; ++j) keys[d * kLanes + i + j] = half_to_float(rows[j][d]);
      }
    }
#endif
    for (; i < kLanes; ++i) {
      for (i64 d = 0; d < a.head_dim; ++d) keys[d * kLanes + i] = i < n ? half_to_float(a.keys[first + i][d]) : 0.0f;
    }
  }
}

// Panels of dimensions, kPartition rows each; dimensions up to the end of the last panel are filled with zeros.
void load_values(const PartitionArguments& a, float* values) {
  for (i64 position = 0; position < a.n_positions; ++position) {
    if (position < a.n_next) prefetch(a.next_keys[position], a.head_dim);
    const f16_bits* in = a.values[position];
    float* out = values + position * kLanes;
    for (i64 d = 0; d < a.value_dim; d += kLanes, out += kPartition * kLanes) {
      if (d + kLanes <= a.value_dim) {
        store(out, load_half(in + d));
        continue;
      }
      for (i64 i = 0; i < kLanes; ++i) out[i] = d + i < a.value_dim ? half_to_float(in[d + i]) : 0.0f;
    }
  }
}

// out[r, c] = sum over k < depth, in order, of a[r, k] * b[k, c], for `rows` rows and `vectors` panels.
template <i64 rows, i64 vectors>
inline void multiply_tile(const float* a, i64 a_stride, const float* b, i64 panel_stride, i64 depth, float* out,
                          i64 out_stride) {
  Lanes sums[rows][vectors];
  for (i64 r = 0; r < rows; ++r) {
    for (i64 v = 0; v < vectors; ++v) sums[r][v] = broadcast(0.0f);
  }
  for (i64 k = 0; k < depth; ++k) {
    Lanes column[vectors];
    for (i64 v = 0; v < vectors; ++v) column[v] = load(b + k * kLanes + v * panel_stride);
    for (i64 r = 0; r < rows; ++r) {
      const Lanes element = broadcast(a[r * a_stride + k]);
      for (i64 v = 0; v < vectors; ++v) sums[r][v] = fma(element, column[v], sums[r][v]);
    }
  }
  for (i64 r = 0; r < rows; ++r) {
    for (i64 v = 0; v < vectors; ++v) store(out + r * out_stride + v * kLanes, sums[r][v]);
  }
}

template <i64 rows>
inline void multiply_rows(const float* a, i64 a_stride, const float* b, i64 panel_stride, i64 depth, float* out,
                          i64 out_stride, i64 n_panels) {
  i64 p = 0;
  for (; p + kTileVectors <= n_panels; p += kTileVectors) {
    multiply_tile<rows, kTileVectors>(a, a_stride, b + p * panel_stride, panel_stride, depth, out + p * kLanes,
                                      out_stride);
  }
  for (; p < n_panels; ++p) {
    multiply_tile<rows, 1>(a, a_stride, b + p * panel_stride, panel_stride, depth, out + p * kLanes, out_stride);
  }
}

// out [n, n_panels * kLanes] = a [n, depth] * b [depth, n_panels * kLanes], b in panels.
void multiply(i64 n, const float* a, i64 a_stride, const float* b, i64 panel_stride, i64 depth, float* out,
              i64 out_stride, i64 n_panels) {
  for (i64 r = 0; r < n; r += kTileRows) {
    const float* a_row = a + r * a_stride;
    float* out_row = out + r * out_stride;
    switch (n - r) {
      case 1: multiply_rows<1>(a_row, a_stride, b, panel_stride, depth, out_row, out_stride, n_panels); break;
      case 2: multiply_rows<2>(a_row, a_stride, b, panel_stride, depth, out_row, out_stride, n_panels); break;
      case 3: multiply_rows<3>(a_row, a_stride, b, panel_stride, depth, out_row, out_stride, n_panels); break;
      default: multiply_rows<4>(a_row, a_stride, b, panel_stride, depth, out_row, out_stride, n_panels);
    }
  }
}

// Scores [n_positions] to weights exp(score - largest), with 0 for positions that are not visible.
void soften(float* scores, i64 visible, i64 n_positions, float* largest_score, float* sum_of_weights) {
  Lanes best = broadcast(-kInfinity);
  for (i64 i = 0; i < visible; i += kLanes) best = max(load_first(scores + i, visible - i, -kInfinity), best);
  const float largest = maximum(best);
  Lanes total = broadcast(0.0f);
  i64 i = 0;
  for (; i < visible; i += kLanes) {
    const Lanes weight = exp(load_first(scores + i, visible - i, -kInfinity) - broadcast(largest));
    total = total + weight;
    store_first(scores + i, n_positions - i, weight);
  }
  for (; i < n_positions; ++i) scores[i] = 0.0f;
  *largest_score = largest;
  *sum_of_weights = sum(total);
}

void attend_partition(const PartitionArguments& a) {
  const i64 value_width = padded(a.value_dim);
  float* keys = a.memory;
  float* values = keys + kPartition * a.head_dim;
  float* scores = values + kPartition * value_width;
  load_keys(a, keys);
  load_values(a, values);
  multiply(a.n_rows, a.queries, a.head_dim, keys, a.head_dim * kLanes, a.head_dim, scores, kPartition,
           padded(a.n_positions) / kLanes);
  const i64 partial = partial_floats(a.value_dim);
  for (i64 row = 0; row < a.n_rows; ++row) {
    if (a.visible[row] <= 0) continue;
    float* totals = a.partials + row * partial + value_width;
    soften(scores + row * kPartition, a.visible[row], a.n_positions, totals, totals + 1);
  }
  multiply(a.n_rows, scores, kPartition, values, kPartition * kLanes, a.n_positions, a.partials, partial,
           value_width / kLanes);
}

void fold_partial(float* before, const float* next, i64 value_dim) {
  const i64 n = padded(value_dim);
  const float largest = before[n] > next[n] ? before[n] : next[n];
  const Lanes weight_before = exp(broadcast(before[n] - largest)), weight_next = exp(broadcast(next[n] - largest));
  for (i64 i = 0; i < n; i += kLanes) {
    store(before + i, fma(load(before + i), weight_before, load(next + i) * weight_next));
  }
  float factors[2][kLanes];
  store(factors[0], weight_before);
  store(factors[1], weight_next);
  before[n + 1] = before[n + 1] * factors[0][0] + next[n + 1] * factors[1][0];
  before[n] = largest;
}

void finish_partial(const float* partial, i64 value_dim, float* out) {
  const Lanes total = broadcast(partial[padded(value_dim) + 1]);
  for (i64 i = 0; i < value_dim; i += kLanes) store_first(out + i, value_dim - i, load(partial + i) / total);
}

}  // namespace
}  // namespace redshard

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
// out[j * kPartition + i] = rows[i][j] for i, j < 8.
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
    _mm256_storeu_ps(out + i * kPartition, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * kPartition, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#endif

// keys [head_dim, kPartition]; positions up to the next multiple of kLanes are filled with zeros.
void load_keys(const PartitionArguments& a, float* keys) {
  i64 position = 0;
#if defined(__AVX2__)
  for (; position + 8 <= a.n_positions; position += 8) {
    i64 d = 0;
    for (; d + 8 <= a.head_dim; d += 8) {
      load_turned_8x8(a.keys + position, d, keys + d * kPartition + position);
    }
    for (; d < a.head_dim; ++d) {
      for (i64 i = position; i < position + 8; ++i) keys[d * kPartition + i] = half_to_float(a.keys[i][d]);
    }
  }
#endif
  for (; position < a.n_positions; ++position) {
    for (i64 d = 0; d < a.head_dim; ++d) keys[d * kPartition + position] = half_to_float(a.keys[position][d]);
  }
  for (; position % kLanes; ++position) {
    for (i64 d = 0; d < a.head_dim; ++d) keys[d * kPartition + position] = 0.0f;
  }
}

// values [n_positions, padded(value_dim)]
void load_values(const PartitionArguments& a, float* values) {
  const i64 stride = padded(a.value_dim);
  for (i64 position = 0; position < a.n_positions; ++position) {
    const f16_bits* in = a.values[position];
    float* out = values + position * stride;
    i64 d = 0;
    for (; d + kLanes <= a.value_dim; d += kLanes) store(out + d, load_half(in + d));
    for (; d < stride; ++d) out[d] = d < a.value_dim ? half_to_float(in[d]) : 0.0f;
  }
}

// out[r, c] = sum over k < depth, in order, of a[r, k] * b[k, c], for `rows` rows and `vectors` times kLanes columns.
template <i64 rows, i64 vectors>
inline void multiply_tile(const float* a, i64 a_stride, const float* b, i64 b_stride, i64 depth, float* out,
                          i64 out_stride) {
  Lanes sums[rows][vectors];
  for (i64 r = 0; r < rows; ++r) {
    for (i64 v = 0; v < vectors; ++v) sums[r][v] = broadcast(0.0f);
  }
  for (i64 k = 0; k < depth; ++k) {
    Lanes column[vectors];
    for (i64 v = 0; v < vectors; ++v) column[v] = load(b + k * b_stride + v * kLanes);
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
inline void multiply_rows(const float* a, i64 a_stride, const float* b, i64 b_stride, i64 depth, float* out,
                          i64 out_stride, i64 columns) {
  i64 c = 0;
  for (; c + kTileVectors * kLanes <= columns; c += kTileVectors * kLanes) {
    multiply_tile<rows, kTileVectors>(a, a_stride, b + c, b_stride, depth, out + c, out_stride);
  }
  for (; c < columns; c += kLanes) {
    multiply_tile<rows, 1>(a, a_stride, b + c, b_stride, depth, out + c, out_stride);
  }
}

// out [n, columns] = a [n, depth] * b [depth, columns]; columns is a multiple of kLanes.
void multiply(i64 n, const float* a, i64 a_stride, const float* b, i64 b_stride, i64 depth, float* out, i64 out_stride,
              i64 columns) {
  for (i64 r = 0; r < n; r += kTileRows) {
    const float* a_row = a + r * a_stride;
    float* out_row = out + r * out_stride;
    switch (n - r) {
      case 1: multiply_rows<1>(a_row, a_stride, b, b_stride, depth, out_row, out_stride, columns); break;
      case 2: multiply_rows<2>(a_row, a_stride, b, b_stride, depth, out_row, out_stride, columns); break;
      case 3: multiply_rows<3>(a_row, a_stride, b, b_stride, depth, out_row, out_stride, columns); break;
      default: multiply_rows<4>(a_row, a_stride, b, b_stride, depth, out_row, out_stride, columns);
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
  const i64 stride = padded(a.value_dim);
  float* keys = a.memory;
  float* values = keys + kPartition * a.head_dim;
  float* scores = values + kPartition * stride;
  load_keys(a, keys);
  load_values(a, values);
  multiply(a.n_rows, a.queries, a.head_dim, keys, kPartition, a.head_dim, scores, kPartition, padded(a.n_positions));
  const i64 partial = partial_floats(a.value_dim);
  for (i64 row = 0; row < a.n_rows; ++row) {
    if (a.visible[row] <= 0) continue;
    float* totals = a.partials + row * partial + stride;
    soften(scores + row * kPartition, a.visible[row], a.n_positions, totals, totals + 1);
  }
  multiply(a.n_rows, scores, kPartition, values, stride, a.n_positions, a.partials, partial, stride);
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

// Everything in VectorOps but attention, for the instruction set this is compiled for.
#pragma once
#include <cmath>

#include "cpu/quantize.h"
#include "cpu/simd.h"
#include "cpu/vector_ops.h"

namespace redshard {
namespace {

void quantize_block(const float* x, i8* quants, float* scale, float* sum) {
  // Magnitudes compare as integers the way they do as numbers, with infinity and NaN above all.
  u32 largest_bits = 0;
  for (i64 i = 0; i < QUANT_BLOCK; ++i) {
    u32 bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  float largest;
  std::memcpy(&largest, &largest_bits, 4);

  const bool finite = largest_bits < 0x7f800000;
  if (!finite || largest < 0x1p-100f) {
    for (i64 i = 0; i < QUANT_BLOCK; ++i) quants[i] = 0;
    *scale = *sum = finite ? 0.0f : kNan;
    return;
  }
  const float inverse = 127.0f / largest;
  i32 total = 0;
  for (i64 i = 0; i < QUANT_BLOCK; ++i) {
    const float shifted = x[i] * inverse + 12582912.0f;  // 1.5 * 2^23: the low bits are now the rounded integer
    i32 bits;
    std::memcpy(&bits, &shifted, 4);
    const i32 quant = bits - 0x4b400000;
    total += quant;
    quants[i] = static_cast<i8>(quant);
  }
  *scale = largest / 127.0f;
  *sum = *scale * static_cast<float>(total);
}

void quantize_blocks(const float* x, i64 n, i8* quants, float* scales, float* sums) {
  for (i64 block = 0; block < n / QUANT_BLOCK; ++block) {
    quantize_block(x + block * QUANT_BLOCK, quants + block * QUANT_BLOCK, scales + block, sums + block);
  }
}

void rms_norm(const float* x, const float* weight, i64 n, float eps, float* out) {
  Lanes squares = broadcast(0.0f);
  for (i64 i = 0; i < n; i += kLanes) {
    const Lanes v = load_first(x + i, n - i, 0.0f);
    squares = squares + v * v;
  }
  const float mean = sum(squares) / static_cast<float>(n);
  const Lanes factor = broadcast(1.0f / std::sqrt(mean + eps));
  for (i64 i = 0; i < n; i += kLanes) {
    const Lanes normalized = load_first(x + i, n - i, 0.0f) * factor;
    store_first(out + i, n - i, normalized * load_first(weight + i, n - i, 0.0f));
  }
}

void rotate(float* x, const float* cosines, const float* sines, i64 n_pairs, bool neox) {
  const i64 step = neox ? 1 : 2, distance = neox ? n_pairs : 1;
  for (i64 i = 0; i < n_pairs; ++i) {
    const float a = x[i * step], b = x[i * step + distance];
    x[i * step] = a * cosines[i] - b * sines[i];
    x[i * step + distance] = a * sines[i] + b * cosines[i];
  }
}

void to_half(const float* x, i64 n, f16_bits* out) {
  i64 i = 0;
  for (; i + kLanes <= n; i += kLanes) store_half(out + i, load(x + i));
  for (; i < n; ++i) out[i] = float_to_half(x[i]);
}

float largest(const float* x, i64 n, i64* place) {
  Lanes best = broadcast(-kInfinity);
  for (i64 i = 0; i < n; i += kLanes) best = max(load_first(x + i, n - i, kNan), best);
  const float value = maximum(best);
  *place = 0;
  for (i64 start = 0; start < n; start += kLanes) {
    if (!any_ge(load_first(x + start, n - start, kNan), broadcast(value))) continue;
    for (i64 i = start; i < n; ++i) {
      if (x[i] == value) {
        *place = i;
        return value;
      }
    }
  }
  return value;
}

float exponentials(const float* x, i64 n, float largest, float inverse_temperature, float* weights) {
  const Lanes shift = broadcast(largest), factor = broadcast(inverse_temperature), lowest = broadcast(-kInfinity);
  Lanes total = broadcast(0.0f);
  for (i64 i = 0; i < n; i += kLanes) {
    const Lanes exponent = (load_first(x + i, n - i, kNan) - shift) * factor;
    const Lanes weight = keep_where_ge(exponent, lowest, exp(exponent));
    total = total + weight;
    if (weights) store_first(weights + i, n - i, weight);
  }
  return sum(total);
}

i64 update_top(const float* x, i64 n, i32 first_place, i64 n_top, i64 n_found, float* values, i32* places) {
  for (i64 start = 0; start < n; start += kLanes) {
    const Lanes v = load_first(x + start, n - start, kNan);
    if (n_found == n_top && !any_ge(v, broadcast(values[n_top - 1]))) continue;
    for (i64 i = start; i < n && i < start + kLanes; ++i) {
      if (!(x[i] == x[i]) || (n_found == n_top && !(x[i] > values[n_top - 1]))) continue;
      i64 rank = n_found < n_top ? n_found++ : n_top - 1;
      for (; rank > 0 && x[i] > values[rank - 1]; --rank) {
        values[rank] = values[rank - 1];
        places[rank] = places[rank - 1];
      }
      values[rank] = x[i];
      places[rank] = first_place + static_cast<i32>(i);
    }
  }
  return n_found;
}

}  // namespace
}  // namespace redshard

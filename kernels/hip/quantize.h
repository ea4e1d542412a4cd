// The one quantizer of activations: blocks of 32 neighbouring elements, one element a lane. Blocks below 2^-100 are zeros;
// those with a NaN or an infinity have NaN for scale and sum, and no quants.
#pragma once
#include "common/arguments.h"
#include "hip/prelude.h"

// Store element `column` of row `row` in every form that `out` wants. Aligned groups of 32 lanes hold the 32 elements of a
// block and call this together; lanes whose row does not count pass store = false, columns past `width` are left out.
DEVICE inline void store_activation(const Activation& out, i32 row, i32 column, i32 width, float value, bool store) {
  store = store && column < width;
  if (out.values && store) out.values[(i64)row * width + column] = value;
  if (!out.quants) return;
  // Magnitudes compare as integers the way they do as numbers, with infinity and NaN above all.
  const i32 largest_bits = wave_max<32>(__builtin_bit_cast(i32, value) & 0x7fffffff);
  const float largest = __builtin_bit_cast(float, largest_bits);
  const bool finite = largest_bits < 0x7f800000, kept = finite && largest >= 0x1p-100f;
  const float scale = kept ? largest / 127.0f : finite ? 0.0f : __builtin_bit_cast(float, 0x7fc00000);
  const i32 quant = kept ? (i32)round_even(value * (127.0f / largest)) : 0;
  const i32 sum = wave_sum<32>(quant);
  if (!store) return;
  out.quants[(i64)row * width + column] = (i8)quant;
  if (column % 32 == 0) {
    const i64 block = (i64)row * (width / 32) + column / 32;
    out.scales[block] = scale;
    out.sums[block] = scale * (float)sum;
  }
}

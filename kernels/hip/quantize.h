// The one quantizer of activations: blocks of 32 neighbouring elements, one element a lane.
#pragma once
#include "common/arguments.h"
#include "hip/prelude.h"

// Store element `column` of row `row` in every form that `out` wants. Aligned groups of 32 lanes hold the 32 elements of a
// block and call this together; lanes whose row does not count pass store = false, columns past `width` are left out.
DEVICE inline void store_activation(const Activation& out, i32 row, i32 column, i32 width, float value, bool store) {
  store = store && column < width;
  if (out.values && store) out.values[(i64)row * width + column] = value;
  if (!out.quants) return;
  const float largest = wave_max<32>(absolute(value));
  const float scale = largest / 127.0f;
  const i32 quant = largest > 0.0f ? (i32)round_even(value * (127.0f / largest)) : 0;
  const i32 sum = wave_sum<32>(quant);
  if (!store) return;
  out.quants[(i64)row * width + column] = (i8)quant;
  if (column % 32 == 0) {
    const i64 block = (i64)row * (width / 32) + column / 32;
    out.scales[block] = scale;
    out.sums[block] = scale * (float)sum;
  }
}

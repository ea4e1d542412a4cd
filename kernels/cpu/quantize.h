// The one way activations become 8-bit blocks of 32 (`Activation` in common/arguments.h), whichever kernel makes them.
//
//   scale = amax / 127; quants = round_half_to_even(x * (127 / amax)); sums = scale * float(sum of quants)
//
// all in float32, so every instruction set gives the same bits. Blocks with amax < 2^-100 count as zeros (127 / amax
// could overflow). A block with a NaN or an infinity gets quants 0 and a NaN scale and sum, so that it stays visible.
#pragma once
#include "common/arguments.h"
#include "cpu/isa.h"

namespace redshard {

// Quantizes n values (a multiple of 32) into n quants, n / 32 scales and n / 32 sums.
void quantize(Isa isa, const float* values, i64 n, i8* quants, float* scales, float* sums);

// Writes the quantized form of `out`'s row from its float32 `values` [width], if that form is wanted.
inline void quantize_row(Isa isa, const float* values, i64 width, const Activation& out, i64 row) {
  if (!out.quants) return;
  const i64 blocks = width / QUANT_BLOCK;
  quantize(isa, values, width, out.quants + row * width, out.scales + row * blocks, out.sums + row * blocks);
}

// For checks: an activation that is written needs at least one form, and whole blocks for the quantized one.
void check_output(const Activation& out, i64 width);

}  // namespace redshard

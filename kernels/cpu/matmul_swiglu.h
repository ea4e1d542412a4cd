// The gated activation of one strip. Compiled once for each instruction set.
#pragma once
#include "cpu/matmul.h"
#include "cpu/simd.h"

namespace redshard {
namespace {

// out[i] = silu(gate[i]) * up[i] for i < kStripRows, with silu(x) = x / (1 + e^-x).
void swiglu_strip(const float* gate, const float* up, float* out) {
  for (i64 i = 0; i < kStripRows; i += kLanes) {
    const Lanes g = load(gate + i);
    store(out + i, g / (broadcast(1.0f) + exp(broadcast(0.0f) - g)) * load(up + i));
  }
}

}  // namespace
}  // namespace redshard

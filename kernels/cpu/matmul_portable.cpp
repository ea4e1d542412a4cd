// Products on any CPU, straight from the definition in ARCHITECTURE.md: what every other instruction set must
// reproduce.
#include <algorithm>

#include "cpu/dequantize.h"
#include "cpu/matmul_swiglu.h"

namespace redshard {
namespace {

i32 dot16(const i8* a, const i8* b) {
  i32 sum = 0;
  for (int i = 0; i < 16; ++i) sum += a[i] * b[i];
  return sum;
}

// One block of 32 columns of one weight row, times every row of activations.
template <class Block>
void add_block(const Decoded& w, const Strip& s, i64 block, float* out) {
  const i64 n_blocks = s.width / 32;
  for (i64 r = 0; r < s.n_x; ++r) {
    const i8* x = s.x.quants + r * s.width + 32 * block;
    const float scale = s.x.scales[r * n_blocks + block];
    float sum = out[r * kStripRows];
    const i32 first = dot16(w.q, x), second = dot16(w.q + 16, x + 16);
    if constexpr (Block::groups == 1) {
      sum = __builtin_fmaf(w.scale[0] * scale, static_cast<float>(first + second), sum);
      if constexpr (Block::has_minimum) sum = __builtin_fmaf(w.minimum[0], s.x.sums[r * n_blocks + block], sum);
    } else {
      static_assert(!Block::has_minimum, "minima of 16 elements need sums of 16 activations");
      sum = __builtin_fmaf(w.scale[0] * scale, static_cast<float>(first), sum);
      sum = __builtin_fmaf(w.scale[1] * scale, static_cast<float>(second), sum);
    }
    out[r * kStripRows] = sum;
  }
}

template <class Block>
void quantized_product(const Strip& s) {
  Decoded group;
  for (i64 j = 0; j < s.n_rows; ++j) {
    const auto* row = reinterpret_cast<const Block*>(s.weights + (s.first + j) * s.row_bytes);
    for (i64 r = 0; r < s.n_x; ++r) s.out[r * kStripRows + j] = 0;
    for (i64 i = 0; i < s.width / 32; ++i) {
      decode(row, static_cast<i32>(i), group);
      add_block<Block>(group, s, i, s.out + j);
    }
  }
}

template <i32 kType>
void float_product(const Strip& s) {
  constexpr i64 kColumns = 256;
  float w[kColumns];
  for (i64 j = 0; j < s.n_rows; ++j) {
    const u8* row = s.weights + (s.first + j) * s.row_bytes;
    for (i64 r = 0; r < s.n_x; ++r) s.out[r * kStripRows + j] = 0;
    for (i64 k = 0; k < s.width; k += kColumns) {
      const i64 n = std::min(kColumns, s.width - k);
      dequantize_row(kType, row + row_bytes(kType, k), n, w);
      for (i64 r = 0; r < s.n_x; ++r) {
        float sum = s.out[r * kStripRows + j];
        for (i64 i = 0; i < n; ++i) sum = __builtin_fmaf(w[i], s.x.values[r * s.width + k + i], sum);
        s.out[r * kStripRows + j] = sum;
      }
    }
  }
}

StripKernel kernel_for(i32 type) {
  StripKernel kernel{};
  if (type == TYPE_F32) kernel.product = float_product<TYPE_F32>;
  if (type == TYPE_F16) kernel.product = float_product<TYPE_F16>;
  if (type == TYPE_BF16) kernel.product = float_product<TYPE_BF16>;
  with_block(type, [&](auto block) {
    kernel.product = quantized_product<std::remove_cv_t<std::remove_reference_t<decltype(*block)>>>;
  });
  return kernel;
}

}  // namespace

const StripKernels portable_strip_kernels = {kernel_for, swiglu_strip};

}  // namespace redshard

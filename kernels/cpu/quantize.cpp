#include "cpu/quantize.h"

#include "cpu/kernel_table.h"
#include "cpu/vector_ops.h"

namespace redshard {

void quantize(Isa isa, const float* values, i64 n, i8* quants, float* scales, float* sums) {
  vector_ops(isa).quantize(values, n, quants, scales, sums);
}

void check_output(const Activation& out, i64 width) {
  require(out.values || out.quants, "the output has neither values nor quants");
  if (!out.quants) return;
  require(out.scales && out.sums, "quantized output without scales or sums");
  require(width % QUANT_BLOCK == 0, "the width of a quantized output is not a multiple of 32");
}

}  // namespace redshard

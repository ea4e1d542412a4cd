#include "cpu/vector_ops.h"

#include "cpu/attention_simd.h"
#include "cpu/vector_ops_simd.h"

namespace redshard {

const VectorOps* vector_ops_portable() {
  static constexpr VectorOps ops = {
      quantize_blocks, rms_norm,       rotate,  to_half,      attend_partition,
      fold_partial,    finish_partial, largest, exponentials, update_top,
  };
  return &ops;
}

}  // namespace redshard

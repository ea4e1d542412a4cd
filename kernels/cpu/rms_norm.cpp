#include "cpu/kernel_table.h"
#include "cpu/quantize.h"
#include "cpu/vector_ops.h"

namespace redshard {
namespace {

void check(const RmsNormArguments& a) {
  require(a.step && a.x && a.weight, "step, x and weight must be set");
  require(a.width > 0, "width must be positive");
  check_output(a.out, a.width);
}

void run(ThreadPool& pool, Isa isa, const RmsNormArguments& a) {
  const VectorOps& ops = vector_ops(isa);
  const i64 width = a.width, n_rows = a.rows ? a.step->n_outputs : a.step->n_tokens;
  // Without room for values each thread keeps one row for itself.
  float* own_rows = a.out.values ? nullptr : static_cast<float*>(pool.workspace(pool.size() * width * sizeof(float)));
  pool.parallel_for(n_rows, rows_per_chunk(width), [&](i64 begin, i64 end, int thread) {
    for (i64 row = begin; row < end; ++row) {
      float* out = a.out.values ? a.out.values + row * width : own_rows + thread * width;
      ops.rms_norm(a.x + (a.rows ? a.rows[row] : row) * width, a.weight, width, a.eps, out);
      quantize_row(isa, out, width, a.out, row);
    }
  });
}

}  // namespace

const Kernel rms_norm_kernel = make_kernel<RmsNormArguments, check, run>("rms_norm");

}  // namespace redshard

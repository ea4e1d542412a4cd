#include <algorithm>

#include "cpu/dequantize.h"
#include "cpu/kernel_table.h"

namespace redshard {
namespace {

void check(const EmbedArguments& a) {
  require(a.step && a.token_ids && a.table.data && a.out, "step, token_ids, table and out must be set");
  require(a.width > 0 && a.table.n_rows > 0, "sizes must be positive");
  const i64 elements = block_elements(a.table.type);
  require(elements > 0, "table of an unsupported type");
  require(a.width % elements == 0, "width is not a whole number of table blocks");
}

void run(ThreadPool& pool, Isa, const EmbedArguments& a) {
  const i64 width = a.width, bytes = row_bytes(a.table.type, width);
  pool.parallel_for(a.step->n_tokens, rows_per_chunk(width), [&](i64 begin, i64 end, int) {
    for (i64 token = begin; token < end; ++token) {
      float* out = a.out + token * width;
      const i32 given = a.token_ids[token];
      const i64 id = given < 0 && a.newest ? a.newest[-1 - given] : given;
      if (id < 0 || id >= a.table.n_rows) {  // no such row: zeros, rather than whatever lies beside the table
        std::fill(out, out + width, 0.0f);
        continue;
      }
      dequantize_row(a.table.type, static_cast<const u8*>(a.table.data) + id * bytes, width, out);
      for (i64 i = 0; i < width; ++i) out[i] *= a.scale;
    }
  });
}

}  // namespace

const Kernel embed_kernel = make_kernel<EmbedArguments, check, run>("embed");

}  // namespace redshard

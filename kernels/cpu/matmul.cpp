// The operations `matmul` and `swiglu`: how the work is cut up. The arithmetic is in matmul_quantized.h and
// matmul_float.h.
//
// The weights are cut into strips of 32 rows, the activations into panels that fit a core's second-level cache. A
// unit of work is one strip times one panel; units run panel by panel, so that a panel stays in the cache while the
// weights pass by.
#include "cpu/matmul.h"

#include <algorithm>
#include <vector>

#include "cpu/dequantize.h"
#include "cpu/kernel_table.h"
#include "cpu/quantize.h"

namespace redshard {
namespace {

constexpr i64 kPanelBytes = 128 * 1024;
constexpr i64 kMinPanelRows = 16, kMaxPanelRows = 128;
constexpr i64 kPageBytes = 4096;
constexpr i64 kChunksPerThread = 6;    // enough that a slow thread does not keep the others waiting for long
constexpr i64 kMaxChunk = 64;          // strips; a chunk starts without the benefit of having read ahead
constexpr i64 kMinVectorRows = 16;     // smaller matrices do not fill the widest register

const StripKernels& strip_kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2: return avx2_strip_kernels;
    case Isa::avx512: return avx512_strip_kernels;
    case Isa::avx512_vnni: return avx512_vnni_strip_kernels;
#endif
    default: return portable_strip_kernels;
  }
}

i64 n_strips(const Matrix& w) { return (w.n_rows + kStripRows - 1) / kStripRows; }
bool is_quantized(const Matrix& w) { return block_elements(w.type) > 1; }

// Products of one activation with several matrices, strip by strip and panel by panel.
class Products {
 public:
  Products(ThreadPool& pool, Isa isa, const Activation& x, i64 n_x, i64 width, const Matrix* matrices, int n_matrices)
      : x_(x), n_x_(n_x), width_(width), matrices_(matrices), scratch_(static_cast<std::size_t>(pool.size())) {
    i64 offsets_per_block = 0, element_bytes = 1;
    for (int m = 0; m < n_matrices; ++m) {
      const Isa fitting = matrices[m].n_rows < kMinVectorRows ? Isa::portable : isa;
      kernels_[m] = strip_kernels(fitting).for_type(matrices[m].type);
      offsets_per_block = std::max(offsets_per_block, kernels_[m].offsets_per_block);
      if (!is_quantized(matrices[m])) element_bytes = sizeof(float);
    }
    panel_rows_ = std::clamp(kPanelBytes / (width * element_bytes), kMinPanelRows, kMaxPanelRows);
    panel_rows_ = std::min(panel_rows_, n_x);
    const i64 out_floats = panel_rows_ * kStripRows;
    const i64 bytes = (n_matrices * out_floats + panel_rows_ * (width / 32) * offsets_per_block) * 4;
    const i64 thread_bytes = (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
    char* memory = static_cast<char*>(pool.workspace(static_cast<std::size_t>(thread_bytes * pool.size())));
    for (Scratch& scratch : scratch_) {
      for (int m = 0; m < n_matrices; ++m) scratch.out[m] = reinterpret_cast<float*>(memory) + m * out_floats;
      scratch.offsets = reinterpret_cast<i32*>(scratch.out[n_matrices - 1] + out_floats);
      memory += thread_bytes;
    }
  }

  i64 n_panels() const { return (n_x_ + panel_rows_ - 1) / panel_rows_; }
  i64 first_row(i64 panel) const { return panel * panel_rows_; }
  i64 end_row(i64 panel) const { return std::min(n_x_, first_row(panel) + panel_rows_); }

  // x[first_row .. end_row] times the strip's rows of matrix m, bias added: [rows, kStripRows], in memory of the
  // thread.
  float* compute(int m, i64 panel, i64 strip, int thread) {
    Scratch& scratch = scratch_[static_cast<std::size_t>(thread)];
    const StripKernel& kernel = kernels_[m];
    const Matrix& w = matrices_[m];
    const Activation x = rows_from(first_row(panel));
    const i64 n_x = end_row(panel) - first_row(panel);
    if (kernel.prepare && (scratch.panel != panel || scratch.prepare != kernel.prepare)) {
      kernel.prepare(x, n_x, width_, scratch.offsets);
      scratch.panel = panel;
      scratch.prepare = kernel.prepare;
    }
    const i64 first = strip * kStripRows;
    const i64 n_rows = std::min(kStripRows, w.n_rows - first);
    kernel.product({static_cast<const u8*>(w.data), row_bytes(w.type, width_), w.n_rows, width_, first, n_rows, x, n_x,
                    scratch.offsets, scratch.out[m]});
    if (w.bias) {
      for (i64 r = 0; r < n_x; ++r)
        for (i64 j = 0; j < n_rows; ++j) scratch.out[m][r * kStripRows + j] += w.bias[first + j];
    }
    return scratch.out[m];
  }

 private:
  // What one thread has at hand: products, and the offsets of the last panel it met.
  struct Scratch {
    float* out[MAX_MATRICES];
    i32* offsets;
    i64 panel = -1;
    decltype(StripKernel::prepare) prepare = nullptr;
  };

  Activation rows_from(i64 row) const {
    Activation x = x_;
    const i64 blocks = width_ / 32;
    if (x.values) x.values += row * width_;
    if (x.quants) {
      x.quants += row * width_;
      x.scales += row * blocks;
      x.sums += row * blocks;
    }
    return x;
  }

  Activation x_;
  i64 n_x_, width_, panel_rows_;
  const Matrix* matrices_;
  StripKernel kernels_[MAX_MATRICES];
  std::vector<Scratch> scratch_;
};

i64 grain(const ThreadPool& pool, i64 n_units) {
  return std::clamp(n_units / (pool.size() * kChunksPerThread), i64{1}, kMaxChunk);
}

void check_operands(const Activation& x, const Matrix* matrices, int n_matrices, i64 width) {
  require(width > 0, "width must be positive");
  for (int m = 0; m < n_matrices; ++m) {
    const i64 elements = block_elements(matrices[m].type);
    require(elements > 0, "weights of an unsupported type");
    require(width % elements == 0, "width is not a whole number of weight blocks");
    require(matrices[m].data && matrices[m].n_rows > 0, "an empty weight matrix");
    if (is_quantized(matrices[m])) {
      require(x.quants && x.scales && x.sums, "quantized weights need quantized activations");
    } else {
      require(x.values, "float weights need float activations");
    }
  }
}

void check_matmul(const MatmulArguments& a) {
  require(a.step, "no step");
  require(a.n_matrices >= 1 && a.n_matrices <= MAX_MATRICES, "1 to 3 matrices");
  check_operands(a.x, a.w, a.n_matrices, a.width);
  for (int m = 0; m < a.n_matrices; ++m) require(a.y[m], "no output");
}

void run_matmul(ThreadPool& pool, Isa isa, const MatmulArguments& a) {
  const i64 n_x = a.over_outputs ? a.step->n_outputs : a.step->n_tokens;
  if (n_x <= 0) return;
  Products products(pool, isa, a.x, n_x, a.width, a.w, a.n_matrices);
  i64 n_total = 0;
  for (int m = 0; m < a.n_matrices; ++m) n_total += n_strips(a.w[m]);

  const auto store = [&](int m, i64 panel, i64 strip, const float* product) {
    const i64 n_rows = a.w[m].n_rows, first = strip * kStripRows, n = std::min(kStripRows, n_rows - first);
    for (i64 row = products.first_row(panel); row < products.end_row(panel); ++row, product += kStripRows) {
      float* y = a.y[m] + row * n_rows + first;
      for (i64 j = 0; j < n; ++j) y[j] = a.accumulate ? y[j] + product[j] : product[j];
    }
  };
  const i64 n_units = products.n_panels() * n_total;
  pool.parallel_for(n_units, grain(pool, n_units), [&](i64 begin, i64 end, int thread) {
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 panel = unit / n_total;
      i64 strip = unit % n_total;
      int m = 0;
      while (strip >= n_strips(a.w[m])) strip -= n_strips(a.w[m++]);
      store(m, panel, strip, products.compute(m, panel, strip, thread));
    }
  });
}

void check_swiglu(const SwigluArguments& a) {
  require(a.step, "no step");
  const Matrix matrices[] = {a.gate, a.up};
  check_operands(a.x, matrices, 2, a.width);
  require(a.gate.n_rows == a.up.n_rows, "gate and up differ in rows");
  check_output(a.out, a.gate.n_rows);
}

void run_swiglu(ThreadPool& pool, Isa isa, const SwigluArguments& a) {
  const i64 n_x = a.step->n_tokens, n_hidden = a.gate.n_rows;
  if (n_x <= 0) return;
  const Matrix matrices[] = {a.gate, a.up};
  const auto swiglu = strip_kernels(isa).swiglu;
  Products products(pool, isa, a.x, n_x, a.width, matrices, 2);

  const auto store = [&](i64 row, i64 strip, const float* hidden) {
    const i64 first = strip * kStripRows, n = std::min(kStripRows, n_hidden - first);
    if (a.out.values) std::copy(hidden, hidden + n, a.out.values + row * n_hidden + first);
    if (a.out.quants) {
      const i64 block = (row * n_hidden + first) / QUANT_BLOCK;
      quantize(isa, hidden, n, a.out.quants + block * QUANT_BLOCK, a.out.scales + block, a.out.sums + block);
    }
  };
  const i64 n_units = products.n_panels() * n_strips(a.gate);
  pool.parallel_for(n_units, grain(pool, n_units), [&](i64 begin, i64 end, int thread) {
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 panel = unit / n_strips(a.gate), strip = unit % n_strips(a.gate);
      float* gate = products.compute(0, panel, strip, thread);
      const float* up = products.compute(1, panel, strip, thread);
      for (i64 row = products.first_row(panel); row < products.end_row(panel); ++row) {
        swiglu(gate, up, gate);
        store(row, strip, gate);
        gate += kStripRows;
        up += kStripRows;
      }
    }
  });
}

}  // namespace

const Kernel matmul_kernel = make_kernel<MatmulArguments, check_matmul, run_matmul>("matmul");
const Kernel swiglu_kernel = make_kernel<SwigluArguments, check_swiglu, run_swiglu>("swiglu");

}  // namespace redshard

// Products of few rows of activations with weight matrices: memory-bound, so every weight byte is read once, 16 at a time,
// against activations of 8 bits by integer dot products. A wave takes a few rows of weights, its lanes neighbouring chunks.
// Compiled once for every WEIGHT_TYPE a model has.
#include "common/arguments.h"
#include "hip/formats.h"
#include "hip/quantize.h"

// out[r][t] = row (first + r) of w times row t of x, the same in every lane. Rows past the matrix repeat the last one.
template <i32 type, i32 ROWS, i32 TOKENS>
DEVICE inline void rows_times_tokens(const Matrix& w, const Activation& x, i32 width, i32 first, float (&out)[ROWS][TOKENS]) {
#pragma unroll
  for (i32 r = 0; r < ROWS; r++)
#pragma unroll
    for (i32 t = 0; t < TOKENS; t++) out[r][t] = 0.0f;

  i32 row[ROWS];
#pragma unroll
  for (i32 r = 0; r < ROWS; r++) row[r] = first + r < w.n_rows ? first + r : w.n_rows - 1;

  if constexpr (is_quantized(type)) {
    using Weights = Format<type>;
    for (i32 chunk = lane_index(); chunk < width / Weights::ELEMENTS; chunk += WAVE) {
      typename Weights::Loaded c[ROWS];
#pragma unroll
      for (i32 r = 0; r < ROWS; r++) c[r] = Weights::load(w, width, row[r], chunk);
#pragma unroll
      for (i32 t = 0; t < TOKENS; t++) {
#pragma unroll
        for (i32 g = 0; g < Weights::Loaded::GROUPS; g++) {
          const i32 position = Weights::position(chunk, g);
          const Words4 q = load16((const u8*)x.quants + (i64)t * width + position);
          const i64 block = (i64)t * (width / 32) + position / 32;
          const float scale = x.scales[block];
          // A minimum belongs to a whole block of 32: the lane with its first half accounts for it.
          const float sum = Weights::MINIMUM && position % 32 == 0 ? x.sums[block] : 0.0f;
#pragma unroll
          for (i32 r = 0; r < ROWS; r++) {
            i32 dot = 0;
#pragma unroll
            for (i32 i = 0; i < 4; i++) dot = dot4(c[r].word[g][i], (i32)q.word[i], dot);
            out[r][t] += c[r].scale[g] * scale * (float)dot;
            if (Weights::MINIMUM) out[r][t] += c[r].minimum[g] * sum;
          }
        }
      }
    }
  } else {
    for (i32 k = lane_index(); k < width; k += WAVE) {
#pragma unroll
      for (i32 r = 0; r < ROWS; r++) {
        const float weight = float_weight<type>(w, (i64)row[r] * width + k);
#pragma unroll
        for (i32 t = 0; t < TOKENS; t++) out[r][t] += weight * x.values[(i64)t * width + k];
      }
    }
  }
#pragma unroll
  for (i32 r = 0; r < ROWS; r++)
#pragma unroll
    for (i32 t = 0; t < TOKENS; t++) out[r][t] = wave_sum(out[r][t]);
}

constexpr i32 VECTOR_ROWS = 2;       // rows of weights a wave takes at a time
constexpr i32 VECTOR_THREADS = 128;

// Workgroups run over the rows of all matrices of the launch, each matrix rounded up to whole workgroups.
template <i32 type, i32 TOKENS>
DEVICE inline void matmul_vector(const MatmulArguments& a) {
  constexpr i32 ROWS_PER_GROUP = VECTOR_ROWS * VECTOR_THREADS / WAVE;
  i32 group = group_x(), m = 0;
  while (m < a.n_matrices - 1 && group >= (a.w[m].n_rows + ROWS_PER_GROUP - 1) / ROWS_PER_GROUP)
    group -= (a.w[m++].n_rows + ROWS_PER_GROUP - 1) / ROWS_PER_GROUP;
  const Matrix& w = a.w[m];
  const i32 first = group * ROWS_PER_GROUP + wave_index() * VECTOR_ROWS;
  if (first >= w.n_rows) return;

  float out[VECTOR_ROWS][TOKENS];
  rows_times_tokens<type>(w, a.x, a.width, first, out);

  const i32 n = a.over_outputs ? a.step->n_outputs : a.step->n_tokens;
#pragma unroll
  for (i32 r = 0; r < VECTOR_ROWS; r++)
#pragma unroll
    for (i32 t = 0; t < TOKENS; t++)
      if (lane_index() == (r * TOKENS + t) % WAVE && first + r < w.n_rows && t < n) {
        float* y = a.y[m] + (i64)t * w.n_rows + first + r;
        const float bias = w.bias ? w.bias[first + r] : 0.0f;
        *y = (a.accumulate ? *y : 0.0f) + (out[r][t] + bias);
      }
}

constexpr i32 SWIGLU_THREADS = 256;
constexpr i32 SWIGLU_ROWS = 32;      // of the hidden layer a workgroup makes: one block of the quantized result

// A workgroup makes 32 neighbouring elements of the hidden layer for every token, so that it can quantize them.
template <i32 type, i32 TOKENS>
DEVICE inline void swiglu_vector(const SwigluArguments& a) {
  SHARED float hidden[TOKENS][SWIGLU_ROWS];
  constexpr i32 ROWS = SWIGLU_ROWS / (SWIGLU_THREADS / WAVE);
  const i32 block = group_x() * SWIGLU_ROWS;
  const i32 first = block + wave_index() * ROWS;
  constexpr i32 STRIDE = 2;
#pragma unroll
  for (i32 r = 0; r < ROWS; r += STRIDE) {
    float gate[STRIDE][TOKENS], up[STRIDE][TOKENS];
    rows_times_tokens<type>(a.gate, a.x, a.width, first + r, gate);
    rows_times_tokens<type>(a.up, a.x, a.width, first + r, up);
#pragma unroll
    for (i32 i = 0; i < STRIDE; i++)
#pragma unroll
      for (i32 t = 0; t < TOKENS; t++)
        if (lane_index() == (i * TOKENS + t) % WAVE) {
          const i32 row = first + r + i < a.gate.n_rows ? first + r + i : a.gate.n_rows - 1;
          const float g = gate[i][t] + (a.gate.bias ? a.gate.bias[row] : 0.0f);
          const float u = up[i][t] + (a.up.bias ? a.up.bias[row] : 0.0f);
          hidden[t][wave_index() * ROWS + r + i] = silu(g) * u;
        }
  }
  barrier();
  for (i32 i = thread_index(); i < TOKENS * 32; i += SWIGLU_THREADS) {
    const i32 t = i / 32, column = block + i % 32;
    store_activation(a.out, t, column, a.gate.n_rows, hidden[t][i % 32], t < a.step->n_tokens);
  }
}

#define VECTOR_KERNELS(n)                                                                                 \
  KERNEL(matmul_vector_##n, VECTOR_THREADS)(const MatmulArguments a) { matmul_vector<WEIGHT_TYPE, n>(a); }  \
  KERNEL(swiglu_vector_##n, SWIGLU_THREADS)(const SwigluArguments a) { swiglu_vector<WEIGHT_TYPE, n>(a); }

VECTOR_KERNELS(1)
VECTOR_KERNELS(2)
VECTOR_KERNELS(4)
VECTOR_KERNELS(8)

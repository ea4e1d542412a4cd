// Products of few rows of activations with weight matrices: memory-bound, so every weight byte is read once, 16 at a time,
// against activations of 8 bits by integer dot products. A wave takes a few rows of weights, its lanes neighbouring chunks.
// Compiled once for every WEIGHT_TYPE a model has.
#include "common/arguments.h"
#include "hip/formats.h"
#include "hip/quantize.h"

// The rows that a wave takes at a time, of one or two matrices.
template <i32 ROWS>
struct WeightRows {
  const Matrix* w[ROWS];
  i32 row[ROWS];

  // COUNT rows of a matrix from `first` on, at place `at`. Rows past the matrix repeat the last one.
  template <i32 COUNT>
  DEVICE_METHOD void take(const Matrix& matrix, i32 first, i32 at = 0) {
#pragma unroll
    for (i32 r = 0; r < COUNT; r++) {
      w[at + r] = &matrix;
      row[at + r] = first + r < matrix.n_rows ? first + r : matrix.n_rows - 1;
    }
  }
};

// Has the first kilobytes of a wave's rows on their way while the launch before still runs.
template <i32 type>
DEVICE inline void prefetch_rows(const Matrix& w, i32 width, i32 first, i32 count) {
  if constexpr (is_quantized(type)) {
    constexpr i32 LINE = 128, LINES = 2;   // of a lane
    const i64 row_bytes = PlaneFormat<type>::leading_bytes(width);
    const i64 n_bytes = row_bytes * (first + count < w.n_rows ? count : w.n_rows - first);
#pragma unroll
    for (i32 i = 0; i < LINES; i++) {
      const i32 offset = (i * WAVE + lane_index()) * LINE;
      if (offset < n_bytes) prefetch(bytes_of(w) + row_bytes * first + offset);
    }
  }
}

// out[r][t] = row r of the weights times row t of x, the same in every lane. A lane loads several chunks of every row before
// it uses the first; it adds them in order, however many rows of x there are.
template <i32 type, i32 ROWS, i32 TOKENS>
DEVICE inline void rows_times_tokens(const WeightRows<ROWS>& rows, const Activation& x, i32 width, float (&out)[ROWS][TOKENS]) {
#pragma unroll
  for (i32 r = 0; r < ROWS; r++)
#pragma unroll
    for (i32 t = 0; t < TOKENS; t++) out[r][t] = 0.0f;

  if constexpr (is_quantized(type)) {
    using Weights = PlaneFormat<type>;
    constexpr i32 LOADS = 256 / Weights::ELEMENTS / ROWS / (TOKENS > 2 ? TOKENS / 2 : 1);   // as registers allow
    constexpr i32 AT_ONCE = LOADS < 1 ? 1 : LOADS > 4 ? 4 : LOADS;   // chunks of a row
    const i32 n_chunks = width / Weights::ELEMENTS;
    for (i32 start = lane_index(); start - lane_index() < n_chunks; start += AT_ONCE * WAVE) {
      typename Weights::Loaded loaded[AT_ONCE][ROWS];
#pragma unroll
      for (i32 n = 0; n < AT_ONCE; n++)
#pragma unroll
        for (i32 r = 0; r < ROWS; r++) {
          const i32 chunk = start + n * WAVE < n_chunks ? start + n * WAVE : n_chunks - 1;
          loaded[n][r] = Weights::load(*rows.w[r], width, rows.row[r], chunk);
        }
#pragma unroll
      for (i32 n = 0; n < AT_ONCE; n++) {
        // Past the end the last chunk counts nothing.
        const float counts = start + n * WAVE < n_chunks ? 1.0f : 0.0f;
        const i32 chunk = start + n * WAVE < n_chunks ? start + n * WAVE : n_chunks - 1;
        Unpacked<Weights> c[ROWS];
#pragma unroll
        for (i32 r = 0; r < ROWS; r++) c[r] = Weights::unpack(loaded[n][r], chunk);
#pragma unroll
        for (i32 t = 0; t < TOKENS; t++) {
#pragma unroll
          for (i32 g = 0; g < Unpacked<Weights>::GROUPS; g++) {
            const i32 position = Weights::position(chunk, g);
            const Words4 q = load16((const u8*)x.quants + (i64)t * width + position);
            const i64 block = (i64)t * (width / 32) + position / 32;
            const float scale = x.scales[block] * counts;
            // A minimum belongs to a whole block of 32: the lane with its first half accounts for it.
            const float sum = Weights::MINIMUM ? x.sums[block] * (position % 32 == 0 ? counts : 0.0f) : 0.0f;
#pragma unroll
            for (i32 r = 0; r < ROWS; r++) {
              i32 dot = 0;
#pragma unroll
              for (i32 i = 0; i < 4; i++) dot = dot4(c[r].word[g][i], (i32)q.word[i], dot);
              out[r][t] = multiply_add(c[r].scale[g] * scale, (float)dot, out[r][t]);
              if (Weights::MINIMUM) out[r][t] = multiply_add(c[r].minimum[g], sum, out[r][t]);
            }
          }
        }
      }
    }
  } else {
    for (i32 k = lane_index(); k < width; k += WAVE) {
#pragma unroll
      for (i32 r = 0; r < ROWS; r++) {
        const float weight = float_weight<type>(*rows.w[r], (i64)rows.row[r] * width + k);
#pragma unroll
        for (i32 t = 0; t < TOKENS; t++) out[r][t] = multiply_add(weight, x.values[(i64)t * width + k], out[r][t]);
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

// A lane stores a result.
template <i32 type, i32 TOKENS>
DEVICE inline void matmul_vector(const MatmulArguments& a) {
  constexpr i32 ROWS_PER_GROUP = VECTOR_ROWS * VECTOR_THREADS / WAVE;
  i32 group = group_x();
  const i32 m = matrix_of_group(a, ROWS_PER_GROUP, group);
  const Matrix& w = a.w[m];
  const i32 first = group * ROWS_PER_GROUP + wave_index() * VECTOR_ROWS;
  if (first < w.n_rows) prefetch_rows<type>(w, a.width, first, VECTOR_ROWS);
  wait_for_previous_launch();
  if (first >= w.n_rows) return;

  const i32 own_row = first + lane_index() / TOKENS, own_token = lane_index() % TOKENS;
  const i32 n = a.over_outputs ? a.step->n_outputs : a.step->n_tokens;
  const bool stores = lane_index() < VECTOR_ROWS * TOKENS && own_row < w.n_rows && own_token < n;
  float* y = a.y[m] + (i64)own_token * w.n_rows + own_row;
  const float before = stores && a.accumulate ? *y : 0.0f;
  const float bias = stores && w.bias ? w.bias[own_row] : 0.0f;

  WeightRows<VECTOR_ROWS> rows;
  rows.template take<VECTOR_ROWS>(w, first);
  float out[VECTOR_ROWS][TOKENS];
  rows_times_tokens<type>(rows, a.x, a.width, out);
  float own = 0.0f;
#pragma unroll
  for (i32 i = 0; i < VECTOR_ROWS * TOKENS; i++)
    if (lane_index() == i) own = out[i / TOKENS][i % TOKENS];
  if (stores) *y = before + (own + bias);
}

constexpr i32 SWIGLU_THREADS = 256;
constexpr i32 SWIGLU_ROWS = 32;      // of the hidden layer a workgroup makes: one block of the quantized result

// A workgroup makes 32 neighbouring elements of the hidden layer for every token, so that it can quantize them.
template <i32 type, i32 TOKENS>
DEVICE inline void swiglu_vector(const SwigluArguments& a) {
  SHARED float hidden[TOKENS][SWIGLU_ROWS];
  constexpr i32 ROWS = SWIGLU_ROWS / (SWIGLU_THREADS / WAVE);
  constexpr i32 STRIDE = 2;
  const i32 block = group_x() * SWIGLU_ROWS;
  const i32 first = block + wave_index() * ROWS;
  if (first < a.gate.n_rows) {
    prefetch_rows<type>(a.gate, a.width, first, STRIDE);
    prefetch_rows<type>(a.up, a.width, first, STRIDE);
  }
  wait_for_previous_launch();
#pragma unroll 1
  for (i32 r = 0; r < ROWS; r += STRIDE) {
    WeightRows<2 * STRIDE> rows;
    rows.template take<STRIDE>(a.gate, first + r);
    rows.template take<STRIDE>(a.up, first + r, STRIDE);
    float out[2 * STRIDE][TOKENS];
    rows_times_tokens<type>(rows, a.x, a.width, out);
#pragma unroll
    for (i32 i = 0; i < STRIDE; i++)
#pragma unroll
      for (i32 t = 0; t < TOKENS; t++)
        if (lane_index() == (i * TOKENS + t) % WAVE) {
          const float g = out[i][t] + (a.gate.bias ? a.gate.bias[rows.row[i]] : 0.0f);
          const float u = out[STRIDE + i][t] + (a.up.bias ? a.up.bias[rows.row[i]] : 0.0f);
          hidden[t][wave_index() * ROWS + r + i] = silu(g) * u;
        }
  }
  barrier();
  for (i32 i = thread_index(); i < TOKENS * 32; i += SWIGLU_THREADS) {
    const i32 t = i / 32, column = block + i % 32;
    store_activation(a.out, t, column, a.gate.n_rows, hidden[t][i % 32], t < a.step->n_tokens);
  }
}

#define VECTOR_KERNELS(n)                                                    \
  STREAM_KERNEL(matmul_vector_##n, VECTOR_THREADS, (n) <= 2 ? 512 : 384)     \
  (const MatmulArguments a) { matmul_vector<WEIGHT_TYPE, n>(a); }            \
  STREAM_KERNEL(swiglu_vector_##n, SWIGLU_THREADS, (n) <= 2 ? 512 : 256)     \
  (const SwigluArguments a) { swiglu_vector<WEIGHT_TYPE, n>(a); }

VECTOR_KERNELS(1)
VECTOR_KERNELS(2)
VECTOR_KERNELS(4)
VECTOR_KERNELS(8)

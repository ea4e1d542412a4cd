// Products of many rows of activations with matrices of floats, on the matrix unit: a workgroup stages 128 columns of some
// rows of weights and of activations as float16 in shared memory, multiplies them, and meanwhile loads the next 128 columns.
// Compiled once for every WEIGHT_TYPE of floats that a model has.
#include "common/arguments.h"
#include "hip/formats.h"
#include "hip/quantize.h"

constexpr i32 TILE_THREADS = 256;
constexpr i32 TILE_WAVES = TILE_THREADS / WAVE;
constexpr i32 DEPTH = 128;              // columns staged at a time
constexpr i32 STRIDE = DEPTH + 8;       // float16 elements between staged rows: keeps 16-byte alignment, spreads banks

// Rows of activations may have elements too large for float16, or none large enough. So each row is staged times a power of
// two that brings its largest magnitude between 2^13 and 2^15, and its products are multiplied by the inverse.
constexpr i32 STAGED_EXPONENT = 14;
constexpr i32 SMALLEST_EXPONENT = -112;   // rows below 2^-112 are staged as if they reached it: both powers stay normal floats

DEVICE inline float power_of_two(i32 exponent) { return __builtin_bit_cast(float, (exponent + 127) << 23); }

struct alignas(16) Halves8Bits { f16_bits half[8]; };

// 16 neighbouring elements to shared memory.
DEVICE inline void stage16(f16_bits* destination, const float (&value)[16]) {
#pragma unroll
  for (i32 h = 0; h < 2; h++) {
    Halves8Bits v;
#pragma unroll
    for (i32 i = 0; i < 8; i++) v.half[i] = float_to_half(value[8 * h + i]);
    *(Halves8Bits*)(destination + 8 * h) = v;
  }
}

// What a thread holds of the next 128 columns of ROWS rows of weights, until shared memory is free for them.
template <i32 type, i32 ROWS>
struct WeightStage {
  static constexpr i32 PER_ROW = DEPTH / 16;
  static constexpr i32 COUNT = (ROWS * PER_ROW + TILE_THREADS - 1) / TILE_THREADS;
  float value[COUNT][16];

  DEVICE_METHOD void load(const Matrix& w, i32 width, i32 first, i32 stage) {
#pragma unroll
    for (i32 n = 0; n < COUNT; n++) {
      const i32 i = thread_index() + n * TILE_THREADS, row = first + i / PER_ROW, k = stage * DEPTH + i % PER_ROW * 16;
#pragma unroll
      for (i32 j = 0; j < 16; j++)
        value[n][j] = i < ROWS * PER_ROW && row < w.n_rows && k + j < width ? float_weight<type>(w, (i64)row * width + k + j) : 0.0f;
    }
  }

  DEVICE_METHOD void store(f16_bits* staged) const {
#pragma unroll
    for (i32 n = 0; n < COUNT; n++) {
      const i32 i = thread_index() + n * TILE_THREADS;
      if (i < ROWS * PER_ROW) stage16(staged + (i / PER_ROW) * STRIDE + i % PER_ROW * 16, value[n]);
    }
  }
};

// The same for activations. Rows from n on are zero.
template <i32 TOKENS>
struct ActivationStage {
  static constexpr i32 PER_ROW = DEPTH / 16;
  static constexpr i32 COUNT = TOKENS * PER_ROW / TILE_THREADS;
  static_assert(TOKENS * PER_ROW % TILE_THREADS == 0, "every thread has the same share");
  float value[COUNT][16];
  float power[COUNT];   // that the thread's rows are multiplied by

  // Find the powers, and put their inverses in shared memory, one a row. They depend on nothing but the row, so that its
  // results do not depend on the others.
  DEVICE_METHOD void measure(const Activation& x, i32 width, i32 first, i32 n_rows, float* inverse) {
    i32 largest[COUNT] = {};
#pragma unroll 8
    for (i32 k = thread_index() % PER_ROW; k < width; k += PER_ROW)
#pragma unroll
      for (i32 n = 0; n < COUNT; n++) {
        const i32 own = first + (thread_index() + n * TILE_THREADS) / PER_ROW, row = own < n_rows ? own : n_rows - 1;
        // Magnitudes compare as integers the way they do as numbers, with infinity and NaN above all.
        const i32 bits = __builtin_bit_cast(i32, ::load(x.values + (i64)row * width + k)) & 0x7fffffff;
        largest[n] = bits > largest[n] ? bits : largest[n];
      }
#pragma unroll
    for (i32 n = 0; n < COUNT; n++) {
      i32 exponent = (wave_max<PER_ROW>(largest[n]) >> 23) - 127;
      exponent = exponent > SMALLEST_EXPONENT ? exponent : SMALLEST_EXPONENT;
      power[n] = power_of_two(STAGED_EXPONENT - exponent);
      inverse[(thread_index() + n * TILE_THREADS) / PER_ROW] = power_of_two(exponent - STAGED_EXPONENT);
    }
  }

  DEVICE_METHOD void load(const Activation& x, i32 width, i32 first, i32 n_rows, i32 stage) {
#pragma unroll
    for (i32 n = 0; n < COUNT; n++) {
      const i32 i = thread_index() + n * TILE_THREADS, row = first + i / PER_ROW, k = stage * DEPTH + i % PER_ROW * 16;
      const bool inside = row < n_rows && k < width;
#pragma unroll
      for (i32 j = 0; j < 16; j++) value[n][j] = inside && k + j < width ? x.values[(i64)row * width + k + j] : 0.0f;
    }
  }

  DEVICE_METHOD void store(f16_bits* staged) const {
#pragma unroll
    for (i32 n = 0; n < COUNT; n++) {
      const i32 i = thread_index() + n * TILE_THREADS;
      float v[16];
#pragma unroll
      for (i32 k = 0; k < 16; k++) v[k] = value[n][k] * power[n];
      stage16(staged + (i / PER_ROW) * STRIDE + i % PER_ROW * 16, v);
    }
  }
};

// One workgroup's TOKENS x ROWS results: waves share the 16 x 16 tiles of the grid evenly, each a block of neighbours.
template <i32 TOKENS, i32 ROWS>
struct FloatTileGrid {
  static constexpr i32 WAVES_ACROSS = ROWS / 16 < TILE_WAVES / 2 ? ROWS / 16 : TILE_WAVES / 2;   // over rows of weights
  static constexpr i32 WAVES_DOWN = TILE_WAVES / WAVES_ACROSS;                                    // over tokens
  static_assert(TOKENS / 16 % WAVES_DOWN == 0 && ROWS / 16 % WAVES_ACROSS == 0, "every wave has the same share");
  static constexpr i32 DOWN = TOKENS / 16 / WAVES_DOWN, ACROSS = ROWS / 16 / WAVES_ACROSS;
  Tile16 tile[DOWN][ACROSS];

  DEVICE_MEMBER i32 token(i32 d) { return (wave_index() / WAVES_ACROSS * DOWN + d) * 16; }
  DEVICE_MEMBER i32 row(i32 a) { return (wave_index() % WAVES_ACROSS * ACROSS + a) * 16; }

  DEVICE_METHOD void clear() {
#pragma unroll
    for (i32 d = 0; d < DOWN; d++)
#pragma unroll
      for (i32 a = 0; a < ACROSS; a++)
#pragma unroll
        for (i32 i = 0; i < 256 / WAVE; i++) tile[d][a].value[i] = 0.0f;
  }

  DEVICE_METHOD void multiply(const f16_bits* x, const f16_bits* w) {
#pragma unroll
    for (i32 k = 0; k < DEPTH; k += 16) {
      TileOperand left[DOWN];
#pragma unroll
      for (i32 d = 0; d < DOWN; d++) left[d] = tile_operand(x + token(d) * STRIDE + k, STRIDE);
#pragma unroll
      for (i32 a = 0; a < ACROSS; a++) {
        const TileOperand right = tile_operand(w + row(a) * STRIDE + k, STRIDE);
#pragma unroll
        for (i32 d = 0; d < DOWN; d++) tile_multiply(tile[d][a], left[d], right);
      }
    }
  }
};

// y = x w^T for one block of TOKENS x ROWS.
template <i32 type, i32 TOKENS, i32 ROWS>
DEVICE inline void matmul_tile_float(const MatmulArguments& a) {
  SHARED f16_bits staged_x[TOKENS * STRIDE];
  SHARED f16_bits staged_w[ROWS * STRIDE];
  SHARED float inverse[TOKENS];
  wait_for_previous_launch();
  const i32 n = a.over_outputs ? a.step->n_outputs : a.step->n_tokens;
  const i32 first_token = group_x() * TOKENS;
  if (first_token >= n) return;
  i32 group = group_y();
  const i32 m = matrix_of_group(a, ROWS, group);
  const Matrix& w = a.w[m];
  const i32 first_row = group * ROWS;

  WeightStage<type, ROWS> weights;
  ActivationStage<TOKENS> activations;
  FloatTileGrid<TOKENS, ROWS> grid;
  grid.clear();
  const i32 n_stages = (a.width + DEPTH - 1) / DEPTH;
  weights.load(w, a.width, first_row, 0);
  activations.measure(a.x, a.width, first_token, n, inverse);
  activations.load(a.x, a.width, first_token, n, 0);
  for (i32 stage = 0; stage < n_stages; stage++) {
    weights.store(staged_w);
    activations.store(staged_x);
    barrier();
    if (stage + 1 < n_stages) {
      weights.load(w, a.width, first_row, stage + 1);
      activations.load(a.x, a.width, first_token, n, stage + 1);
    }
    grid.multiply(staged_x, staged_w);
    barrier();
  }

#pragma unroll
  for (i32 d = 0; d < grid.DOWN; d++)
#pragma unroll
    for (i32 c = 0; c < grid.ACROSS; c++)
#pragma unroll
      for (i32 i = 0; i < 256 / WAVE; i++) {
        const i32 tile_token = grid.token(d) + tile_row(i);
        const i32 token = first_token + tile_token, row = first_row + grid.row(c) + tile_column(i);
        if (token >= n || row >= w.n_rows) continue;
        float* y = a.y[m] + (i64)token * w.n_rows + row;
        *y = (a.accumulate ? *y : 0.0f) + (grid.tile[d][c].value[i] * inverse[tile_token] + (w.bias ? w.bias[row] : 0.0f));
      }
}

// silu(x gate^T) * (x up^T) for one block of TOKENS x ROWS, quantized where the next product wants it.
template <i32 type, i32 TOKENS, i32 ROWS>
DEVICE inline void swiglu_tile_float(const SwigluArguments& a) {
  SHARED f16_bits staged[(TOKENS + 2 * ROWS) * STRIDE];
  SHARED float inverse[TOKENS];
  wait_for_previous_launch();
  f16_bits *staged_x = staged, *staged_gate = staged + TOKENS * STRIDE, *staged_up = staged_gate + ROWS * STRIDE;
  const i32 n = a.step->n_tokens, n_rows = a.gate.n_rows;
  const i32 first_token = group_x() * TOKENS, first_row = group_y() * ROWS;
  if (first_token >= n) return;

  WeightStage<type, ROWS> gate, up;
  ActivationStage<TOKENS> activations;
  FloatTileGrid<TOKENS, ROWS> gate_grid, up_grid;
  gate_grid.clear();
  up_grid.clear();
  const i32 n_stages = (a.width + DEPTH - 1) / DEPTH;
  gate.load(a.gate, a.width, first_row, 0);
  up.load(a.up, a.width, first_row, 0);
  activations.measure(a.x, a.width, first_token, n, inverse);
  activations.load(a.x, a.width, first_token, n, 0);
  for (i32 stage = 0; stage < n_stages; stage++) {
    gate.store(staged_gate);
    up.store(staged_up);
    activations.store(staged_x);
    barrier();
    if (stage + 1 < n_stages) {
      gate.load(a.gate, a.width, first_row, stage + 1);
      up.load(a.up, a.width, first_row, stage + 1);
      activations.load(a.x, a.width, first_token, n, stage + 1);
    }
    gate_grid.multiply(staged_x, staged_gate);
    up_grid.multiply(staged_x, staged_up);
    barrier();
  }

  // The results pass through shared memory, so that 32 lanes hold the 32 elements of a block.
  static_assert(TOKENS * ROWS * sizeof(float) <= sizeof(staged), "results fit where the operands were");
  float* hidden = (float*)staged;
#pragma unroll
  for (i32 d = 0; d < gate_grid.DOWN; d++)
#pragma unroll
    for (i32 c = 0; c < gate_grid.ACROSS; c++)
#pragma unroll
      for (i32 i = 0; i < 256 / WAVE; i++) {
        const i32 token = gate_grid.token(d) + tile_row(i);
        const i32 row = first_row + gate_grid.row(c) + tile_column(i), bias = row < n_rows ? row : 0;
        const float g = gate_grid.tile[d][c].value[i] * inverse[token] + (a.gate.bias ? a.gate.bias[bias] : 0.0f);
        const float u = up_grid.tile[d][c].value[i] * inverse[token] + (a.up.bias ? a.up.bias[bias] : 0.0f);
        hidden[token * ROWS + gate_grid.row(c) + tile_column(i)] = silu(g) * u;
      }
  barrier();
  for (i32 i = thread_index(); i < TOKENS * ROWS; i += TILE_THREADS) {
    const i32 token = first_token + i / ROWS;
    store_activation(a.out, token, first_row + i % ROWS, n_rows, hidden[i], token < n);
  }
}

// For up to so many tokens: rows of weights.
#define MATMUL_TILE_FLOAT(tokens, rows)                   \
  KERNEL(matmul_tile_float_##tokens, TILE_THREADS)        \
  (const MatmulArguments a) { matmul_tile_float<WEIGHT_TYPE, tokens, rows>(a); }
#define SWIGLU_TILE_FLOAT(tokens, rows)                   \
  KERNEL(swiglu_tile_float_##tokens, TILE_THREADS)        \
  (const SwigluArguments a) { swiglu_tile_float<WEIGHT_TYPE, tokens, rows>(a); }

MATMUL_TILE_FLOAT(32, 64)
MATMUL_TILE_FLOAT(64, 64)
SWIGLU_TILE_FLOAT(32, 64)
SWIGLU_TILE_FLOAT(64, 32)

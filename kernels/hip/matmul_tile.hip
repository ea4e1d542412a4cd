// Products of several rows of activations with quantized weight matrices, on the matrix unit: exact integer dot products of
// signed bytes over 16 or 32 columns, each multiplied by its two scales and added in float32, block after block. So a result
// has the numbers of the CPU, but for the order of the sum where slices share a row's columns.
// Compiled once for every quantized WEIGHT_TYPE a model has.
#include "common/arguments.h"
#include "hip/formats.h"
#include "hip/quantize.h"

constexpr i32 DEPTH = 128;           // columns staged at a time
constexpr i32 BLOCKS = DEPTH / 32;
constexpr i32 STRIDE = DEPTH + 16;   // bytes between staged rows: keeps 16-byte alignment, spreads banks

using Weights = PlaneFormat<WEIGHT_TYPE>;

// Lets a team of waves, which stages operands and multiplies them together, see what it has stored. Teams of several waves meet
// at the workgroup's barrier, so all of them have to come there equally often.
template <i32 WAVES>
DEVICE inline void meet() {
  if constexpr (WAVES == 1) wave_barrier();
  else barrier();
}

// How a team of waves divides ROWS rows of PIECES pieces: a thread takes one piece, the same of every STEP-th row.
template <i32 ROWS, u32 PIECES, i32 WAVES>
struct Share {
  static constexpr u32 THREADS = WAVES * WAVE, STEP = THREADS / PIECES;
  static constexpr i32 COUNT = (ROWS + STEP - 1) / STEP;
  static_assert(THREADS % PIECES == 0, "threads take the same piece of all their rows");
  DEVICE_MEMBER u32 piece() { return (u32)thread_index() % PIECES; }
  DEVICE_MEMBER i32 row(i32 n) { return (u32)thread_index() % THREADS / PIECES + n * STEP; }
  DEVICE_MEMBER bool has(i32 n) { return ROWS % STEP == 0 || row(n) < ROWS; }
};

// DEPTH columns of ROWS rows in shared memory: quants, and for each row what its blocks are multiplied by.
template <i32 ROWS, i32 SCALES_PER_BLOCK, bool SECOND>
struct alignas(16) Staged {
  i8 quants[ROWS * STRIDE];
  float scale[BLOCKS * SCALES_PER_BLOCK][ROWS + 8];           // the threads that store them hit different banks
  float second[SECOND ? BLOCKS : 1][SECOND ? ROWS + 8 : 4];   // minima of weights, sums of activations
};
template <i32 ROWS> using StagedWeights = Staged<ROWS, 32 / Weights::SCALE_ELEMENTS, Weights::MINIMUM>;
template <i32 ROWS> using StagedActivations = Staged<ROWS, 1, Weights::MINIMUM>;

// What a thread of a team holds of the next columns of ROWS rows of weights, until shared memory is free for them: as loaded,
// since unpacking would wait for them. What lies past the matrix repeats its last row, whose results nobody wants, or the last
// columns, whose activations are zero.
template <i32 ROWS, i32 WAVES>
struct WeightLoads {
  static constexpr i32 CHUNKS = DEPTH / Weights::ELEMENTS;
  using Own = Share<ROWS, CHUNKS, WAVES>;
  Matrix w;
  u32 width;
  u32 row[Own::COUNT];
  typename Weights::Loaded loaded[Own::COUNT];

  // What follows is about rows first, first + 1, ... of this matrix.
  DEVICE_METHOD void aim(const Matrix& matrix, u32 columns, i32 first) {
    w = matrix;
    width = columns;
#pragma unroll
    for (i32 n = 0; n < Own::COUNT; n++) row[n] = least(first + Own::row(n), w.n_rows - 1);
  }

  DEVICE_METHOD void load(i32 stage) {
    const i32 chunk = least(stage * CHUNKS + Own::piece(), width / Weights::ELEMENTS - 1);
#pragma unroll
    for (i32 n = 0; n < Own::COUNT; n++) loaded[n] = Weights::load(w, width, row[n], chunk);
  }

  DEVICE_METHOD void store(StagedWeights<ROWS>& staged, i32 stage) const {
#pragma unroll
    for (i32 n = 0; n < Own::COUNT; n++) {
      if (!Own::has(n)) continue;
      const i32 row = Own::row(n);
      const Unpacked<Weights> chunk = Weights::unpack(loaded[n], stage * CHUNKS + Own::piece());
#pragma unroll
      for (i32 g = 0; g < Unpacked<Weights>::GROUPS; g++) {
        const u32 position = Weights::position(Own::piece(), g);
        Words4 words;
#pragma unroll
        for (i32 k = 0; k < 4; k++) words.word[k] = (u32)chunk.word[g][k];
        *(Words4*)(staged.quants + row * STRIDE + position) = words;
        if (position % Weights::SCALE_ELEMENTS == 0) staged.scale[position / Weights::SCALE_ELEMENTS][row] = chunk.scale[g];
        if constexpr (Weights::MINIMUM)
          if (position % 32 == 0) staged.second[position / 32][row] = chunk.minimum[g];
      }
    }
  }
};

// The same for activations. Scales and sums past the last column are zero; rows past the last repeat it.
template <i32 ROWS, i32 WAVES>
struct ActivationLoads {
  using Quants = Share<ROWS, DEPTH / 16, WAVES>;
  using Blocks = Share<ROWS, BLOCKS, WAVES>;
  Activation x;
  u32 width;
  u32 row_at[Quants::COUNT], block_at[Blocks::COUNT];
  Words4 quants[Quants::COUNT];
  float scale[Blocks::COUNT], sum[Blocks::COUNT];

  // What follows is about rows first .. n_rows - 1 of x.
  DEVICE_METHOD void aim(const Activation& activation, u32 columns, i32 first, i32 n_rows) {
    x = activation;
    width = columns;
#pragma unroll
    for (i32 n = 0; n < Quants::COUNT; n++) row_at[n] = least(first + Quants::row(n), n_rows - 1) * width;
#pragma unroll
    for (i32 n = 0; n < Blocks::COUNT; n++) block_at[n] = least(first + Blocks::row(n), n_rows - 1) * (width / 32);
  }

  DEVICE_METHOD void load(i32 stage) {
    const u32 column = least(stage * DEPTH + 16 * Quants::piece(), width - 16);
#pragma unroll
    for (i32 n = 0; n < Quants::COUNT; n++) quants[n] = load16((const u8*)x.quants + (row_at[n] + column));
    const u32 block = least(stage * BLOCKS + Blocks::piece(), width / 32 - 1);
#pragma unroll
    for (i32 n = 0; n < Blocks::COUNT; n++) {
      scale[n] = ::load(x.scales + (block_at[n] + block));
      if constexpr (Weights::MINIMUM) sum[n] = ::load(x.sums + (block_at[n] + block));
    }
  }

  DEVICE_METHOD void store(StagedActivations<ROWS>& staged, i32 stage) const {
#pragma unroll
    for (i32 n = 0; n < Quants::COUNT; n++)
      if (Quants::has(n)) *(Words4*)(staged.quants + Quants::row(n) * STRIDE + 16 * Quants::piece()) = quants[n];
#pragma unroll
    for (i32 n = 0; n < Blocks::COUNT; n++) {
      if (!Blocks::has(n)) continue;
      const bool inside = stage * BLOCKS + Blocks::piece() < width / 32;
      staged.scale[Blocks::piece()][Blocks::row(n)] = inside ? scale[n] : 0.0f;
      if constexpr (Weights::MINIMUM) staged.second[Blocks::piece()][Blocks::row(n)] = inside ? sum[n] : 0.0f;
    }
  }
};

// TOKENS x ROWS results of a team, whose waves share its 16 x 16 tiles evenly, each a block of neighbours.
template <i32 TOKENS, i32 ROWS, i32 WAVES>
struct TileGrid {
  // As many waves over tokens as leave blocks no taller than they are wide.
  DEVICE_MEMBER constexpr i32 waves_down() {
    i32 down = 1;
    while (down < WAVES && TOKENS / down > ROWS / (WAVES / down)) down *= 2;
    return down;
  }
  static constexpr i32 WAVES_DOWN = waves_down(), WAVES_ACROSS = WAVES / WAVES_DOWN;
  static_assert(TOKENS / 16 % WAVES_DOWN == 0 && ROWS / 16 % WAVES_ACROSS == 0, "every wave has the same share");
  static constexpr i32 DOWN = TOKENS / 16 / WAVES_DOWN, ACROSS = ROWS / 16 / WAVES_ACROSS;
  float sum[DOWN][ACROSS][256 / WAVE];

  DEVICE_MEMBER i32 wave() { return (u32)wave_index() % WAVES; }
  DEVICE_MEMBER i32 first_token(i32 d) { return (wave() / WAVES_ACROSS * DOWN + d) * 16; }
  DEVICE_MEMBER i32 first_row(i32 a) { return (wave() % WAVES_ACROSS * ACROSS + a) * 16; }

  DEVICE_METHOD void clear() {
#pragma unroll
    for (i32 d = 0; d < DOWN; d++)
#pragma unroll
      for (i32 a = 0; a < ACROSS; a++)
#pragma unroll
        for (i32 i = 0; i < 256 / WAVE; i++) sum[d][a][i] = 0.0f;
  }

  DEVICE_METHOD void multiply(const StagedActivations<TOKENS>& x, const StagedWeights<ROWS>& w) {
#pragma unroll TILE_UNROLL
    for (i32 block = 0; block < BLOCKS; block++) {
      ByteOperand left[DOWN];
#pragma unroll
      for (i32 d = 0; d < DOWN; d++) left[d] = left_bytes(x.quants + first_token(d) * STRIDE + 32 * block, STRIDE);
#pragma unroll
      for (i32 a = 0; a < ACROSS; a++) {
        const ByteOperand right = right_bytes(w.quants + first_row(a) * STRIDE + 32 * block, STRIDE);
#pragma unroll
        for (i32 d = 0; d < DOWN; d++) {
          if constexpr (Weights::SCALE_ELEMENTS == 32) {
            add(tile_dot(left[d], right), d, a, x.scale[block], w.scale[block]);
          } else {
            add(tile_dot_half<0>(left[d], right), d, a, x.scale[block], w.scale[2 * block]);
            add(tile_dot_half<1>(left[d], right), d, a, x.scale[block], w.scale[2 * block + 1]);
          }
          if constexpr (Weights::MINIMUM) {
#pragma unroll
            for (i32 i = 0; i < 256 / WAVE; i++)
              sum[d][a][i] = multiply_add(w.second[block][first_row(a) + tile_column(i)],
                                          x.second[block][first_token(d) + tile_row(i)], sum[d][a][i]);
          }
        }
        keep_order();
      }
    }
  }

  DEVICE_METHOD void add(const Tile8& dots, i32 d, i32 a, const float* x_scale, const float* w_scale) {
#pragma unroll
    for (i32 i = 0; i < 256 / WAVE; i++) {
      const float scale = w_scale[first_row(a) + tile_column(i)] * x_scale[first_token(d) + tile_row(i)];
      sum[d][a][i] = multiply_add(scale, (float)dots.value[i], sum[d][a][i]);
    }
  }

  // Calls f(token, row, d, a, i) for every sum[d][a][i] of this thread.
  template <typename F>
  DEVICE_MEMBER void each(F f) {
#pragma unroll
    for (i32 d = 0; d < DOWN; d++)
#pragma unroll
      for (i32 a = 0; a < ACROSS; a++)
#pragma unroll
        for (i32 i = 0; i < 256 / WAVE; i++) f(first_token(d) + tile_row(i), first_row(a) + tile_column(i), d, a, i);
  }
};

// TOKENS x ROWS results of each of N matrices, by a workgroup of SLICES teams of TEAM waves: each takes
// every SLICES-th stage of columns.
template <i32 TOKENS, i32 ROWS, i32 N, i32 TEAM, i32 SLICES>
struct Product {
  static constexpr i32 THREADS = TEAM * SLICES * WAVE;
  using Grid = TileGrid<TOKENS, ROWS, TEAM>;
  struct Stage {
    StagedActivations<TOKENS> x;
    StagedWeights<ROWS> w[N];
  };
  union Shared {
    Stage stage[SLICES];
    float partial[SLICES > 1 ? SLICES : 1][N][SLICES > 1 ? TOKENS * ROWS : 1];
  };
  Grid grid[N];
  WeightLoads<ROWS, TEAM> weights[N];

  DEVICE_MEMBER i32 slice() { return (u32)wave_index() / TEAM; }

  // Ask for the first weights, of rows first_row on, and then wait for the launch before.
  DEVICE_METHOD void start(const Matrix (&w)[N], i32 width, i32 first_row) {
#pragma unroll
    for (i32 m = 0; m < N; m++) {
      weights[m].aim(w[m], width, first_row);
      weights[m].load(slice());
    }
    wait_for_previous_launch();
  }

  // All products of rows first_token .. n_tokens - 1 of x.
  DEVICE_METHOD void run(Shared& shared, const Activation& x, i32 width, i32 first_token, i32 n_tokens) {
    const i32 n_stages = (width + DEPTH - 1) / DEPTH;
    Stage& stage = shared.stage[slice()];
    ActivationLoads<TOKENS, TEAM> activations;
    activations.aim(x, width, first_token, n_tokens);
    activations.load(slice());
#pragma unroll
    for (i32 m = 0; m < N; m++) grid[m].clear();
    // Stages past the end are zeros, so that all slices make as many rounds.
    for (i32 first = 0; first < n_stages; first += SLICES) {
      activations.store(stage.x, first + slice());
#pragma unroll
      for (i32 m = 0; m < N; m++) weights[m].store(stage.w[m], first + slice());
      meet<TEAM>();
      const i32 next = first + SLICES + slice();
#pragma unroll
      for (i32 m = 0; m < N; m++) weights[m].load(next);
      activations.load(next);
#pragma unroll
      for (i32 m = 0; m < N; m++) grid[m].multiply(stage.x, stage.w[m]);
      meet<TEAM>();
    }
  }

  // Calls f(token, row, sums) once for every result, with its sum of each matrix.
  template <typename F>
  DEVICE_METHOD void each(Shared& shared, F f) const {
    if constexpr (SLICES == 1) {
      Grid::each([&](i32 token, i32 row, i32 d, i32 a, i32 i) {
        float sums[N];
#pragma unroll
        for (i32 m = 0; m < N; m++) sums[m] = grid[m].sum[d][a][i];
        f(token, row, sums);
      });
    } else {
      barrier();
      Grid::each([&](i32 token, i32 row, i32 d, i32 a, i32 i) {
#pragma unroll
        for (i32 m = 0; m < N; m++) shared.partial[slice()][m][token * ROWS + row] = grid[m].sum[d][a][i];
      });
      barrier();
      for (i32 i = thread_index(); i < TOKENS * ROWS; i += THREADS) {
        float sums[N];
#pragma unroll
        for (i32 m = 0; m < N; m++) {
          sums[m] = shared.partial[0][m][i];
#pragma unroll
          for (i32 s = 1; s < SLICES; s++) sums[m] += shared.partial[s][m][i];
        }
        f(i / ROWS, i % ROWS, sums);
      }
    }
  }
};

// y = x w^T for one block of TOKENS x ROWS. Grid: over blocks of tokens first, so that those who read the same weights run
// together, then over blocks of rows of all matrices of the launch.
template <i32 TOKENS, i32 ROWS, i32 TEAM, i32 SLICES>
DEVICE inline void matmul_tile(const MatmulArguments& a) {
  using Own = Product<TOKENS, ROWS, 1, TEAM, SLICES>;
  SHARED typename Own::Shared shared;
  i32 group = group_y();
  const i32 m = matrix_of_group(a, ROWS, group);
  const Matrix w[1] = {a.w[m]};
  const i32 first_token = group_x() * TOKENS, first_row = group * ROWS;

  Own product;
  product.start(w, a.width, first_row);
  const i32 n = a.over_outputs ? a.step->n_outputs : a.step->n_tokens;
  if (first_token >= n) return;
  product.run(shared, a.x, a.width, first_token, n);
  product.each(shared, [&](i32 t, i32 r, const float (&sums)[1]) {
    const i32 token = first_token + t, row = first_row + r;
    if (token >= n || row >= w[0].n_rows) return;
    float* y = a.y[m] + (i64)token * w[0].n_rows + row;
    *y = (a.accumulate ? *y : 0.0f) + (sums[0] + (w[0].bias ? w[0].bias[row] : 0.0f));
  });
}

// silu(x gate^T) * (x up^T) for one block of TOKENS x ROWS, quantized where the next product wants it.
template <i32 TOKENS, i32 ROWS, i32 TEAM, i32 SLICES>
DEVICE inline void swiglu_tile(const SwigluArguments& a) {
  using Own = Product<TOKENS, ROWS, 2, TEAM, SLICES>;
  static_assert(ROWS % 32 == 0, "32 lanes hold the 32 elements of a block");
  // Results lie where the operands were, behind what the slices have still to add up.
  SHARED union {
    typename Own::Shared product;
    struct { float partial[sizeof(Own::Shared::partial) / 4], result[TOKENS * ROWS]; } hidden;
  } shared;
  float* hidden = shared.hidden.result;
  const Matrix w[2] = {a.gate, a.up};
  const i32 first_token = group_x() * TOKENS, first_row = group_y() * ROWS;

  Own product;
  product.start(w, a.width, first_row);
  const i32 n = a.step->n_tokens, n_rows = a.gate.n_rows;
  if (first_token >= n) return;
  product.run(shared.product, a.x, a.width, first_token, n);
  product.each(shared.product, [&](i32 t, i32 r, const float (&sums)[2]) {
    const i32 row = first_row + r, bias = row < n_rows ? row : 0;
    const float gate = sums[0] + (a.gate.bias ? a.gate.bias[bias] : 0.0f);
    const float up = sums[1] + (a.up.bias ? a.up.bias[bias] : 0.0f);
    hidden[t * ROWS + r] = silu(gate) * up;
  });
  barrier();
  for (i32 i = thread_index(); i < TOKENS * ROWS; i += Own::THREADS) {
    const i32 token = first_token + i / ROWS;
    store_activation(a.out, token, first_row + i % ROWS, n_rows, hidden[i], token < n);
  }
}

// For up to so many tokens: rows of weights, waves of a team, slices, and work-items for which registers have to do.
#define MATMUL_TILE(tokens, rows, team, slices, resident)                         \
  STREAM_KERNEL(matmul_tile_##tokens, (team) * (slices) * WAVE, resident)         \
  (const MatmulArguments a) { matmul_tile<tokens, rows, team, slices>(a); }
#define SWIGLU_TILE(tokens, rows, team, slices, resident)                         \
  STREAM_KERNEL(swiglu_tile_##tokens, (team) * (slices) * WAVE, resident)         \
  (const SwigluArguments a) { swiglu_tile<tokens, rows, team, slices>(a); }

MATMUL_TILE(16, 16, 1, 8, 256)
MATMUL_TILE(32, 32, 2, 4, 256)
MATMUL_TILE(64, 32, 4, 2, 256)
MATMUL_TILE(128, 128, 8, 1, 256)
SWIGLU_TILE(16, 32, 2, 2, 512)
SWIGLU_TILE(32, 32, 2, 2, 512)
SWIGLU_TILE(64, 32, 4, 1, 512)
SWIGLU_TILE(128, 64, 8, 1, 256)

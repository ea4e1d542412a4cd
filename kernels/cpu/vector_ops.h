// The inner loops that are compiled once for each instruction set. What splits work over threads calls them through
// `vector_ops(isa)`; they start no threads, allocate nothing and use no library templates, whose code the linker would
// share between instruction sets.
#pragma once
#include "common/arguments.h"
#include "cpu/isa.h"

namespace redshard {

// Attention walks the cache in partitions of this many positions, whatever the step looks like.
constexpr i64 kPartition = PARTITION;

// Value vectors are padded to whole registers.
constexpr i64 padded(i64 dim) { return (dim + 15) / 16 * 16; }

// Some rows of queries against one partition of keys and values, whose rows have an address each.
struct PartitionArguments {
  const f16_bits* const* keys;     // [n_positions] addresses of [head_dim]
  const f16_bits* const* values;   // [n_positions] addresses of [value_dim]
  const float* queries;            // [n_rows, head_dim], already scaled
  const i32* visible;              // [n_rows]: how many of the positions a row sees; without any its partial is void
  float* partials;                 // [n_rows, partial_floats(value_dim)]
  float* memory;                   // partition_memory_floats(...)
  i64 n_positions, n_rows, head_dim, value_dim;
  const f16_bits* const* next_keys;  // [n_next] of the partition that will be asked for next, to fetch them early
  i64 n_next;
};

// A partial softmax: the weighted sum of values [padded(value_dim)], then the largest score and the sum of weights,
// weights being exp(score - largest score).
constexpr i64 partial_floats(i64 value_dim) { return padded(value_dim) + 2; }
constexpr i64 partition_memory_floats(i64 n_rows, i64 head_dim, i64 value_dim) {
  return kPartition * (head_dim + padded(value_dim) + n_rows);
}

struct VectorOps {
  // As quantize.h says; n is a multiple of 32.
  void (*quantize)(const float* x, i64 n, i8* quants, float* scales, float* sums);

  // out = x / sqrt(mean(x^2) + eps) * weight; in place allowed.
  void (*rms_norm)(const float* x, const float* weight, i64 n, float eps, float* out);

  // Turns the first 2 n_pairs elements by angles given as [n_pairs] cosines and sines. Pairs are (2i, 2i + 1), or
  // (i, i + n_pairs) with neox.
  void (*rotate)(float* x, const float* cosines, const float* sines, i64 n_pairs, bool neox);

  void (*to_half)(const float* x, i64 n, f16_bits* out);

  void (*attend_partition)(const PartitionArguments& arguments);

  // Folds the partial of the next partition into that of all partitions before.
  void (*fold_partial)(float* before, const float* next, i64 value_dim);

  // out [value_dim] = weighted sum / sum of weights.
  void (*finish_partial)(const float* partial, i64 value_dim, float* out);

  // The largest of n values and the first place that has it. NaN counts as -infinity; all of them -infinity: place 0.
  float (*largest)(const float* x, i64 n, i64* place);

  // weights = exp((x - largest) * inverse_temperature), 0 for NaN, and their sum; `weights` may be null.
  float (*exponentials)(const float* x, i64 n, float largest, float inverse_temperature, float* weights);

  // Keeps in values and places [n_top] the largest seen, best first, first place first: `n_found` of them so far, and
  // returns how many there are after these n, whose places count from `first_place`. NaN is passed over.
  i64 (*update_top)(const float* x, i64 n, i32 first_place, i64 n_top, i64 n_found, float* values, i32* places);
};

// Null where the compiler cannot build for the instruction set.
const VectorOps* vector_ops_portable();
const VectorOps* vector_ops_avx2();
const VectorOps* vector_ops_avx512();

inline const VectorOps& vector_ops(Isa isa) {
  switch (isa) {
    case Isa::avx2: return *vector_ops_avx2();
    case Isa::avx512:
    case Isa::avx512_vnni: return *vector_ops_avx512();
    default: return *vector_ops_portable();
  }
}

}  // namespace redshard

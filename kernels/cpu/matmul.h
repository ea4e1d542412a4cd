// What a matrix product is made of: a strip of weight rows times a panel of activation rows.
#pragma once
#include "common/arguments.h"
#include "cpu/isa.h"

namespace redshard {

constexpr i64 kStripRows = 32;   // one block of a quantized output

// Up to kStripRows rows of a matrix times up to panel_rows(...) rows of activations.
struct Strip {
  const u8* weights;    // row 0 of the matrix
  i64 row_bytes;
  i64 matrix_rows;
  i64 width;
  i64 first, n_rows;    // the rows of this strip
  Activation x;         // [n_x, width]
  i64 n_x;
  const i32* offsets;   // what StripKernel::prepare wrote
  float* out;           // [n_x, kStripRows]
};

// How one weight type is multiplied on one instruction set.
struct StripKernel {
  // Several formats store codes that are too large by a constant. Their products are too large by that constant times
  // the sum of each group's activations: `prepare` writes those, offsets_per_block of them for 32 columns. Null if
  // never needed.
  void (*prepare)(const Activation& x, i64 n_x, i64 width, i32* offsets);
  i64 offsets_per_block;
  void (*product)(const Strip& strip);
};

struct StripKernels {
  StripKernel (*for_type)(i32 type);   // a null product for a type that is not supported
  // out[i] = silu(gate[i]) * up[i] for i < kStripRows
  void (*swiglu)(const float* gate, const float* up, float* out);
};

extern const StripKernels portable_strip_kernels, avx2_strip_kernels, avx512_strip_kernels, avx512_vnni_strip_kernels;

}  // namespace redshard

// Weights as float32, one row at a time, on any CPU.
#pragma once
#include <cstring>
#include <type_traits>

#include "cpu/half.h"

using redshard::half_to_float;
#define DEVICE static
#include "common/blocks.h"
#undef DEVICE

namespace redshard {
namespace {

inline float bfloat_to_float(u16 b) {
  const u32 bits = static_cast<u32>(b) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Calls visit(const Block*) with a null pointer to the block structure of a quantized type; false for any other type.
template <class Visit>
bool with_block(i32 type, const Visit& visit) {
  switch (type) {
    case TYPE_Q4_0: visit(static_cast<const BlockQ4_0*>(nullptr)); return true;
    case TYPE_Q4_1: visit(static_cast<const BlockQ4_1*>(nullptr)); return true;
    case TYPE_Q5_0: visit(static_cast<const BlockQ5_0*>(nullptr)); return true;
    case TYPE_Q5_1: visit(static_cast<const BlockQ5_1*>(nullptr)); return true;
    case TYPE_Q8_0: visit(static_cast<const BlockQ8_0*>(nullptr)); return true;
    case TYPE_Q4_K: visit(static_cast<const BlockQ4_K*>(nullptr)); return true;
    case TYPE_Q5_K: visit(static_cast<const BlockQ5_K*>(nullptr)); return true;
    case TYPE_Q6_K: visit(static_cast<const BlockQ6_K*>(nullptr)); return true;
    default: return false;
  }
}

// Elements of a block: rows are a whole number of them. 1 for the float types, 0 for a type that is not supported.
inline i64 block_elements(i32 type) {
  i64 elements = type == TYPE_F32 || type == TYPE_F16 || type == TYPE_BF16;
  with_block(type, [&](auto block) { elements = std::remove_reference_t<decltype(*block)>::elements; });
  return elements;
}

// Bytes of a row of `width` elements; 0 for a type that is not supported.
inline i64 row_bytes(i32 type, i64 width) {
  i64 block_bytes = type == TYPE_F32 ? 4 : 2;
  with_block(type, [&](auto block) { block_bytes = sizeof(*block); });
  const i64 elements = block_elements(type);
  return elements ? width / elements * block_bytes : 0;
}

// out[i] = element i of a row of `width` elements, of a supported type.
inline void dequantize_row(i32 type, const void* row, i64 width, float* out) {
  if (type == TYPE_F32) {
    std::memcpy(out, row, static_cast<std::size_t>(width) * sizeof(float));
  } else if (type == TYPE_F16) {
    for (i64 i = 0; i < width; ++i) out[i] = half_to_float(static_cast<const f16_bits*>(row)[i]);
  } else if (type == TYPE_BF16) {
    for (i64 i = 0; i < width; ++i) out[i] = bfloat_to_float(static_cast<const u16*>(row)[i]);
  } else {
    with_block(type, [&](auto block) {
      Decoded group;
      for (i64 i = 0; i < width; ++i) {
        if (i % 32 == 0) decode(static_cast<decltype(block)>(row), static_cast<i32>(i / 32), group);
        const i64 j = i % 32;
        out[i] = group.scale[j / 16] * static_cast<float>(group.q[j]) + group.minimum[j / 16];
      }
    });
  }
}

}  // namespace
}  // namespace redshard

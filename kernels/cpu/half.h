// IEEE 754 binary16 to and from float32, without hardware support. Conversion to half rounds to nearest even.
#pragma once
#include <cstring>

#include "common/types.h"

namespace redshard {
namespace {

inline float half_to_float(f16_bits half) {
  const u32 sign = static_cast<u32>(half & 0x8000) << 16;
  const u32 rest = half & 0x7fff;
  u32 bits;
  if (rest >= 0x7c00) {  // infinity and NaN
    bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  } else if (rest >= 0x0400) {
    bits = sign | ((rest << 13) + (u32{127 - 15} << 23));
  } else {  // subnormal: rest * 2^-24, exact
    const float magnitude = static_cast<float>(rest) * 0x1p-24f;
    std::memcpy(&bits, &magnitude, 4);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline f16_bits float_to_half(float value) {
  u32 bits;
  std::memcpy(&bits, &value, 4);
  const u32 sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<f16_bits>(sign | 0x7e00 | (bits >> 13 & 0x1ff));  // a quiet NaN
  if (bits >= 0x477ff000) return static_cast<f16_bits>(sign | 0x7c00);                        // 65520 and more
  if (bits >= 0x38800000) {  // a normal half: drop 13 bits, to nearest even
    bits += 0xfff + (bits >> 13 & 1);
    return static_cast<f16_bits>(sign | ((bits - (u32{127 - 15} << 23)) >> 13));
  }
  float magnitude;  // subnormal: adding 0.5 leaves multiples of 2^-24 in the low bits, rounded to nearest even
  std::memcpy(&magnitude, &bits, 4);
  magnitude += 0.5f;
  std::memcpy(&bits, &magnitude, 4);
  return static_cast<f16_bits>(sign | (bits - 0x3f000000));
}

}  // namespace
}  // namespace redshard

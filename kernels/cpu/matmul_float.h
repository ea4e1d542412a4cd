// The product of a strip of float weights with a panel of float32 activations: one accumulator for each output
// element, fused multiply-adds over the columns in order. Compiled once for each instruction set V.
#pragma once
#include "cpu/dequantize.h"
#include "cpu/matmul_strip.h"

namespace redshard {
namespace {

constexpr i64 kFloatTileColumns = 128;

// Column k of V::lanes weight rows is one vector.
template <class V>
struct FloatTile {
  typename V::Floats column[kFloatTileColumns];
};

// How one float type gets into a tile: `columns` of them lie in 16 bytes.
struct FormatF32 {
  static constexpr int type = TYPE_F32, columns = 4;
  template <class V>
  static void unpack(const typename V::Words raw[4], typename V::Floats* out) {
    for (int i = 0; i < 4; ++i) out[i] = (typename V::Floats)raw[i];
  }
};

struct FormatF16 {
  static constexpr int type = TYPE_F16, columns = 8;
  template <class V>
  static void unpack(const typename V::Words raw[4], typename V::Floats* out) {
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = V::low_halves(raw[i]);
      out[2 * i + 1] = V::low_halves(raw[i] >> 16);
    }
  }
};

struct FormatBF16 {
  static constexpr int type = TYPE_BF16, columns = 8;
  template <class V>
  static void unpack(const typename V::Words raw[4], typename V::Floats* out) {
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = (typename V::Floats)(raw[i] << 16);
      out[2 * i + 1] = (typename V::Floats)(raw[i] & 0xffff0000);
    }
  }
};

// Columns k .. k + n of V::lanes rows, `stride` bytes apart. Columns that do not fill 16 bytes are taken one by one.
template <class V, class F>
void unpack_columns(const u8* p, i64 stride, i64 n, FloatTile<V>& tile) {
  constexpr i64 kElementBytes = 16 / F::columns;
  i64 k = 0;
  for (; k + F::columns <= n; k += F::columns) {
    typename V::Words raw[4];
    V::load_columns(p + k * kElementBytes, stride, raw);
    F::template unpack<V>(raw, tile.column + k);
  }
  for (; k < n; ++k) {
    float column[V::lanes];
    for (int r = 0; r < V::lanes; ++r) dequantize_row(F::type, p + r * stride + k * kElementBytes, 1, column + r);
    tile.column[k] = V::load(column);
  }
}

template <class V, int R>
void multiply(const FloatTile<V>* tiles, i64 n, bool first, const float* x, i64 width, float* const (&out)[2]) {
  typename V::Floats sum[R][2];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < 2; ++c) sum[r][c] = first ? typename V::Floats{} : V::load(out[c] + r * kStripRows);
  for (i64 k = 0; k < n; ++k) {
    for (int r = 0; r < R; ++r) {
      const auto value = V::broadcast(x[r * width + k]);
      for (int c = 0; c < 2; ++c) sum[r][c] = V::fma(tiles[c].column[k], value, sum[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < 2; ++c) V::store(out[c] + r * kStripRows, sum[r][c]);
}

template <class V, class F>
void float_product(const Strip& s) {
  const StripVectors<V> vectors(s);
  FloatTile<V> tiles[2];
  for (i64 v = 0; v < vectors.n; v += 2) {
    for (i64 k = 0; k < s.width; k += kFloatTileColumns) {
      const i64 n = std::min(kFloatTileColumns, s.width - k);
      for (int c = 0; c < 2; ++c) {
        const u8* rows = s.weights + vectors.first_row(v + c) * s.row_bytes;
        unpack_columns<V, F>(rows + k * (16 / F::columns), s.row_bytes, n, tiles[c]);
      }
      in_equal_parts<V::max_float_rows>(s.n_x, [&](i64 row, auto n_rows) {
        float* const out[2] = {vectors.out(v) + row * kStripRows, vectors.out(v + 1) + row * kStripRows};
        multiply<V, n_rows.value>(tiles, n, k == 0, s.x.values + row * s.width + k, s.width, out);
      });
    }
  }
  vectors.align_output();
}

// The kernel of a float type; a null product for any other.
template <class V>
StripKernel float_kernel(i32 type) {
  if (type == TYPE_F32) return {nullptr, 0, float_product<V, FormatF32>};
  if (type == TYPE_F16) return {nullptr, 0, float_product<V, FormatF16>};
  if (type == TYPE_BF16) return {nullptr, 0, float_product<V, FormatBF16>};
  return {};
}

}  // namespace
}  // namespace redshard

// The product of a strip of quantized weights with a panel of quantized activations. Compiled once for each instruction set V.
//
// A tile of 2 x V::lanes weight rows is unpacked once and then meets all the rows of activations, R at a time, so that each
// load of codes serves R rows and each load of activations serves two vectors of weights.
#pragma once
#include "cpu/matmul_formats.h"
#include "cpu/matmul_strip.h"

namespace redshard {
namespace {

constexpr i64 kFewRows = 4;          // up to here the weights come straight from memory and a small tile stays in L1
constexpr i64 kFewRowsTileBlocks = 8;

// Where the codes are too large by a constant: subtracted from the integer product through the activations' sums.
template <class V, class F>
constexpr int zero_of = F::is_signed && V::has_signed_product ? 0 : F::zero;

template <class V, class F>
void prepare(const Activation& x, i64 n_x, i64 width, i32* offsets) {
  constexpr int kGroup = 32 / F::Block::groups;
  for (i64 i = 0; i < n_x * width / kGroup; ++i) {
    i32 sum = 0;
    for (int j = 0; j < kGroup; ++j) sum += x.quants[i * kGroup + j];
    offsets[i] = zero_of<V, F> * sum;
  }
}

// Where R rows of activations stand: pointers to the first, and the distances between rows.
struct Rows {
  const i8* quants;
  const float* scales;
  const float* sums;
  const i32* offsets;
  i64 width, n_blocks;
};

// out[r][c * stride ..] += R rows of activations times two tiles, over n_blocks blocks; `first`: from zero.
template <class V, class F, int R>
void multiply(const Tile<V>* tiles, i64 n_blocks, bool first, const Rows& x, float* const (&out)[2]) {
  using Floats = typename V::Floats;
  using Ints = typename V::Ints;
  constexpr int kGroups = F::Block::groups;
  Floats sum[R][2];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < 2; ++c) sum[r][c] = first ? Floats{} : V::load(out[c] + r * kStripRows);

  for (i64 b = 0; b < n_blocks; ++b) {
    for (int g = 0; g < kGroups; ++g) {
      Ints dot[R][2];
      V::template dots<F, R, 8 / kGroups>(tiles[0].codes[b] + 8 / kGroups * g, tiles[1].codes[b] + 8 / kGroups * g,
                                          x.quants + 32 * b + 32 / kGroups * g, x.width, dot);
      for (int r = 0; r < R; ++r) {
        const Floats scale = V::broadcast(x.scales[r * x.n_blocks + b]);
        for (int c = 0; c < 2; ++c) {
          if constexpr (zero_of<V, F> != 0) dot[r][c] -= x.offsets[(r * x.n_blocks + b) * kGroups + g];
          sum[r][c] = V::fma(tiles[c].scale[b][g] * scale, to_floats<V>(dot[r][c]), sum[r][c]);
        }
      }
    }
    if constexpr (F::Block::has_minimum) {
      for (int r = 0; r < R; ++r) {
        const Floats sum_x = V::broadcast(x.sums[r * x.n_blocks + b]);
        for (int c = 0; c < 2; ++c) sum[r][c] = V::fma(tiles[c].minimum[b], sum_x, sum[r][c]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < 2; ++c) V::store(out[c] + r * kStripRows, sum[r][c]);
}

// Reads the next rows' share of one tile into the second-level cache: rows lie one after the other, but every row is too
// short for the processor to notice a stream.
inline void prefetch(const u8* p, i64 nbytes) {
  for (i64 i = 0; i < nbytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

template <class V, class F>
void quantized_product(const Strip& s) {
  const i64 n_blocks = s.width / 32;
  const i64 tile_blocks = s.n_x <= kFewRows ? kFewRowsTileBlocks : kTileBlocks;
  const StripVectors<V> vectors(s);
  Tile<V> tiles[2];
  for (i64 v = 0; v < vectors.n; v += 2) {
    const u8* rows[2] = {s.weights + vectors.first_row(v) * s.row_bytes, s.weights + vectors.first_row(v + 1) * s.row_bytes};
    for (i64 b = 0; b < n_blocks; b += tile_blocks) {
      const i64 n = std::min(tile_blocks, n_blocks - b);
      const i64 byte = b / F::blocks * static_cast<i64>(sizeof(typename F::Block));
      const i64 nbytes = n / F::blocks * static_cast<i64>(sizeof(typename F::Block));
      prefetch(rows[1] + V::lanes * (s.row_bytes + byte * 2), 2 * V::lanes * nbytes);
      for (int c = 0; c < 2; ++c) {
        for (i64 i = 0; i < n / F::blocks; ++i) {
          F::unpack(rows[c] + byte + i * static_cast<i64>(sizeof(typename F::Block)), s.row_bytes, tiles[c], i * F::blocks);
        }
      }
      in_equal_parts<V::template max_rows<F>>(s.n_x, [&](i64 row, auto n_rows) {
        const Rows x = {s.x.quants + row * s.width + 32 * b,  s.x.scales + row * n_blocks + b, s.x.sums + row * n_blocks + b,
                        s.offsets + (row * n_blocks + b) * F::Block::groups, s.width, n_blocks};
        multiply<V, F, decltype(n_rows)::value>(tiles, n, b == 0, x,
                                                {vectors.out(v) + row * kStripRows, vectors.out(v + 1) + row * kStripRows});
      });
    }
  }
  vectors.align_output();
}

// The kernel of a quantized type; a null product for any other.
template <class V>
StripKernel quantized_kernel(i32 type) {
  StripKernel kernel{};
  with_block(type, [&](auto block) {
    using F = Format<std::remove_cv_t<std::remove_reference_t<decltype(*block)>>>;
    kernel.product = quantized_product<V, F>;
    if (zero_of<V, F> != 0) {
      kernel.prepare = prepare<V, F>;
      kernel.offsets_per_block = F::Block::groups;
    }
  });
  return kernel;
}

}  // namespace
}  // namespace redshard

// The product of a strip of quantized weights with a panel of quantized activations. Compiled once for each
// instruction set V.
//
// A tile of 2 x V::lanes weight rows is unpacked once and then meets all the rows of activations, R at a time, so
// that each load of codes serves R rows and each load of activations serves two vectors of weights.
#pragma once
#include "cpu/matmul_formats.h"
#include "cpu/matmul_strip.h"

namespace redshard {
namespace {

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

// One block of 32 columns of some rows of activations: pointers to the first row's, and the distances between rows.
struct Rows {
  Rows(const Strip& s, int groups_per_block, i64 row = 0, i64 block = 0)
      : quants(s.x.quants + row * s.width + 32 * block),
        scales(s.x.scales + row * (s.width / 32) + block),
        sums(s.x.sums + row * (s.width / 32) + block),
        offsets(s.offsets + (row * (s.width / 32) + block) * groups_per_block),
        groups(groups_per_block),
        width(s.width),
        n_blocks(s.width / 32) {}

  void next_block() {
    quants += 32;
    ++scales;
    ++sums;
    offsets += groups;
  }

  const i8* quants;
  const float* scales;
  const float* sums;
  const i32* offsets;
  i64 groups, width, n_blocks;
};

// GCC would move all products before all sums, and then run out of registers.
template <class T>
inline void keep_order(T (&sums)[2]) {
#if defined(__AVX512F__)
  asm("" : "+v"(sums[0]), "+v"(sums[1]));
#else
  asm("" : "+x"(sums[0]), "+x"(sums[1]));
#endif
}

// dot[r][c]: 4 * kWords columns of row r of activations times vector c of weight rows.
template <class V, class F, int R, int kWords>
inline void multiply(const typename V::Words* w0, const typename V::Words* w1, const i8* x, i64 width,
                     typename V::Ints (&dot)[R][2]) {
  constexpr int kFit = std::min(kWords, V::template words_in_partial<F>);
  static_assert(kWords % kFit == 0, "partial sums must be of equal length");
  for (int r = 0; r < R; ++r) dot[r][0] = dot[r][1] = typename V::Ints{};
#pragma GCC unroll 8
  for (int begin = 0; begin < kWords; begin += kFit) {
    typename V::Partial sum[R][2] = {};
#pragma GCC unroll 8
    for (int i = begin; i < begin + kFit; ++i) {
      for (int r = 0; r < R; ++r) {
        i32 word;
        std::memcpy(&word, x + r * width + 4 * i, sizeof word);
        const auto quants = V::broadcast_word(word);
        sum[r][0] = V::template add_products<F>(sum[r][0], w0[i], quants);
        sum[r][1] = V::template add_products<F>(sum[r][1], w1[i], quants);
        if (kFit > 1) keep_order(sum[r]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < 2; ++c) dot[r][c] += V::finish(sum[r][c]);
      keep_order(dot[r]);
    }
  }
}

// R rows of activations times two tiles, for the block b of the tiles and block x.block of the activations.
template <class V, class F, int R>
void add_block(const Tile<V>* tiles, i64 b, const Rows& x, typename V::Floats (&sum)[R][2]) {
  constexpr int kGroups = F::Block::groups, kWords = 8 / kGroups;
  for (int g = 0; g < kGroups; ++g) {
    typename V::Ints dot[R][2];
    multiply<V, F, R, kWords>(tiles[0].codes[b] + kWords * g, tiles[1].codes[b] + kWords * g, x.quants + 4 * kWords * g,
                              x.width, dot);
    for (int r = 0; r < R; ++r) {
      const auto scale = V::broadcast(x.scales[r * x.n_blocks]);
      for (int c = 0; c < 2; ++c) {
        if constexpr (zero_of<V, F> != 0) dot[r][c] -= x.offsets[r * x.n_blocks * kGroups + g];
        sum[r][c] = V::fma(tiles[c].scale[b][g] * scale, to_floats<V>(dot[r][c]), sum[r][c]);
      }
    }
  }
  if constexpr (F::Block::has_minimum) {
    for (int r = 0; r < R; ++r) {
      const auto sum_x = V::broadcast(x.sums[r * x.n_blocks]);
      for (int c = 0; c < 2; ++c) sum[r][c] = V::fma(tiles[c].minimum[b], sum_x, sum[r][c]);
    }
  }
}

// Two vectors of weight rows: their addresses, and where their products go.
template <class V>
struct RowPair {
  RowPair(const StripVectors<V>& vectors, i64 v) {
    for (int c = 0; c < 2; ++c) {
      weights[c] = vectors.strip.weights + vectors.first_row(v + c) * vectors.strip.row_bytes;
      out[c] = vectors.out(v + c);
    }
  }
  const u8* weights[2];
  float* out[2];
};

// The blocks of 32 columns begin .. end of two vectors of rows into tiles. Meanwhile the same share of the next two
// comes from memory: rows lie one after the other, but each is too short for the processor to notice a stream, and a
// burst of requests would keep it waiting.
template <class V, class F>
void unpack(const RowPair<V>& rows, i64 row_bytes, i64 begin, i64 end, Tile<V>* tiles) {
  constexpr i64 kBlockBytes = sizeof(typename F::Block);
  const i64 first_byte = begin / F::blocks * kBlockBytes;
  const u8* next = rows.weights[1] + V::lanes * (row_bytes + 2 * first_byte);
  for (int c = 0; c < 2; ++c) {
    const u8* block = rows.weights[c] + first_byte;
    for (i64 b = begin; b < end; b += F::blocks, block += kBlockBytes) {
      for (i64 line = 0; line < V::lanes * kBlockBytes; line += 64) __builtin_prefetch(next + line);
      next += V::lanes * kBlockBytes;
      F::unpack(block, row_bytes, tiles[c], b - begin);
    }
  }
}

// R rows of activations: sums stay in registers from the first column to the last. The tile is short, so that reading
// weights and multiplying alternate quickly and memory is never idle.
template <class V, class F, int R>
void few_rows_product(const Strip& s, const RowPair<V>& rows, Tile<V>* tiles) {
  typename V::Floats sum[R][2] = {};
  Rows x(s, F::Block::groups);
  constexpr i64 kShortTile = std::max(4, F::blocks);
  for (i64 begin = 0; begin < x.n_blocks; begin += kShortTile) {
    const i64 end = std::min(begin + kShortTile, x.n_blocks);
    unpack<V, F>(rows, s.row_bytes, begin, end, tiles);
    for (i64 b = 0; b < end - begin; ++b, x.next_block()) add_block<V, F, R>(tiles, b, x, sum);
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < 2; ++c) V::store(rows.out[c] + r * kStripRows, sum[r][c]);
}

// One row of activations, where V multiplies weights as they lie (`dots`): nothing would be gained by a tile that
// meets a single row.
template <class V, class F>
void one_row_product(const Strip& s, const RowPair<V>& rows, Tile<V>& factors) {
  constexpr int kGroups = F::Block::groups;
  for (int c = 0; c < 2; ++c) {
    typename V::Floats sum{};
    Rows x(s, kGroups);
    const u8* block = rows.weights[c];
    const u8* next = block + 2 * V::lanes * s.row_bytes;   // as in `unpack`
    for (i64 begin = 0; begin < x.n_blocks; begin += F::blocks, block += sizeof(typename F::Block)) {
      for (u64 line = 0; line < V::lanes * sizeof(typename F::Block); line += 64) __builtin_prefetch(next + line);
      next += V::lanes * sizeof(typename F::Block);
      typename V::Ints dot[F::blocks * kGroups];
      V::template dots<F>(block, s.row_bytes, x.quants, dot);
      F::unpack_factors(block, s.row_bytes, factors, 0);
      for (int b = 0; b < F::blocks; ++b, x.next_block()) {
        for (int g = 0; g < kGroups; ++g) {
          auto& products = dot[b * kGroups + g];
          if constexpr (zero_of<V, F> != 0) products -= x.offsets[g];
          sum = V::fma(factors.scale[b][g] * V::broadcast(*x.scales), to_floats<V>(products), sum);
        }
        if constexpr (F::Block::has_minimum) sum = V::fma(factors.minimum[b], V::broadcast(*x.sums), sum);
      }
    }
    V::store(rows.out[c], sum);
  }
}

template <class V, class F, int R>
void tile_product(const Tile<V>* tiles, i64 n_blocks, bool first, Rows x, const RowPair<V>& rows, i64 row) {
  typename V::Floats sum[R][2] = {};
  float* out[2] = {rows.out[0] + row * kStripRows, rows.out[1] + row * kStripRows};
  if (!first) {
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < 2; ++c) sum[r][c] = V::load(out[c] + r * kStripRows);
  }
  for (i64 b = 0; b < n_blocks; ++b, x.next_block()) add_block<V, F, R>(tiles, b, x, sum);
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < 2; ++c) V::store(out[c] + r * kStripRows, sum[r][c]);
}

template <class V, class F>
void quantized_product(const Strip& s) {
  constexpr int kMaxRows = V::max_rows;
  const StripVectors<V> vectors(s);
  const i64 n_blocks = s.width / 32;
  Tile<V> tiles[2];
  for (i64 v = 0; v < vectors.n; v += 2) {
    const RowPair<V> rows(vectors, v);
    if constexpr (V::has_dots) {
      if (s.n_x == 1) {
        one_row_product<V, F>(s, rows, tiles[0]);
        continue;
      }
    }
    if (s.n_x <= kMaxRows) {
      with_constant<kMaxRows>(s.n_x, [&](auto n_x) { few_rows_product<V, F, n_x.value>(s, rows, tiles); });
      continue;
    }
    for (i64 begin = 0; begin < n_blocks; begin += kTileBlocks) {
      const i64 end = std::min(begin + kTileBlocks, n_blocks);
      unpack<V, F>(rows, s.row_bytes, begin, end, tiles);
      in_equal_parts<kMaxRows>(s.n_x, [&](i64 row, auto n_rows) {
        const Rows x(s, F::Block::groups, row, begin);
        tile_product<V, F, n_rows.value>(tiles, end - begin, begin == 0, x, rows, row);
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
    using F = BlockFormat<std::remove_cv_t<std::remove_reference_t<decltype(*block)>>>;
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

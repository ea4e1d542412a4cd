// Attention over the paged cache, flash style (Dao et al. 2022): no matrix of scores ever leaves the chip.
//
// A sequence with one query in the step (decoding) takes `attention_vector`, which splits the context into partitions of
// fixed positions over workgroups. Runs of queries (prompts) take `attention_tile` on the matrix unit. `attention_combine`
// finishes both.
// Compiled for a model's HEAD_DIM and VALUE_DIM (multiples of 8) and HEADS_PER_KV.
#include "common/arguments.h"
#include "hip/prelude.h"
#include "hip/quantize.h"

constexpr i32 ATTENTION_THREADS = 128;
constexpr i32 ATTENTION_WAVES = ATTENTION_THREADS / WAVE;
constexpr i32 VECTOR_THREADS = 256;    // of attention_vector
constexpr i32 VECTOR_WAVES = VECTOR_THREADS / WAVE;
constexpr i32 AT_ONCE = 4;             // rows a lane loads before it uses the first
constexpr i32 HEADS_PER_GROUP = 4;     // most query heads of one cache head that share a workgroup
constexpr i32 GROUP = HEADS_PER_KV < HEADS_PER_GROUP ? HEADS_PER_KV : HEADS_PER_GROUP;
constexpr i32 GROUPS_PER_KV = (HEADS_PER_KV + GROUP - 1) / GROUP;
constexpr i32 LANES = 16;              // lanes that read one row of keys or values, 8 elements each at a time
constexpr i32 KEY_PARTS = (HEAD_DIM + LANES * 8 - 1) / (LANES * 8);
constexpr float LOWEST = -3.0e38f;

struct alignas(16) EightHalves { f16_bits half[8]; };

DEVICE inline i32 queries_of(const AttentionArguments& a, i32 sequence) {
  return a.query_starts[sequence + 1] - a.query_starts[sequence];
}

// The blocks of a sequence.
DEVICE inline const i32* table_of(const AttentionArguments& a, i32 sequence) {
  return a.block_tables + (i64)a.table_rows[sequence] * a.table_width;
}

// Row of cache head `head` at a position of a sequence.
DEVICE inline i64 cache_row(const AttentionArguments& a, const i32* table, i32 position, i32 head) {
  const i64 block = table[position / a.block_size];
  return (block * a.n_kv_heads + head) * a.block_size + position % a.block_size;
}

// Scratch: the results of attention_tile, a row of n_heads * VALUE_DIM floats a token; behind them, per partition of each
// sequence with one query, and query head, what attention_vector leaves: the largest score, the sum of exponentials, and the
// weighted values. Sequences have as much of it as their contexts are long.
DEVICE inline float* tile_result(const AttentionArguments& a, i32 token, i32 head) {
  return a.scratch + ((i64)token * a.n_heads + head) * VALUE_DIM;
}
DEVICE inline float* partial_result(const AttentionArguments& a, i32 sequence, i32 head, i32 partition) {
  const i64 place = (i64)(a.first_partitions[sequence] + partition) * a.n_heads + head;
  return tile_result(a, a.step->n_tokens, 0) + place * (2 + VALUE_DIM);
}

// Grid: sequences x (cache heads x groups of up to 4 query heads) x splits: a workgroup takes every a.splits-th partition.
STREAM_KERNEL(attention_vector, VECTOR_THREADS, 512)(const AttentionArguments a) {
  SHARED float score[GROUP][PARTITION];
  SHARED float weighted[VECTOR_WAVES][GROUP][LANES * 8];
  wait_for_previous_launch();
  const i32 sequence = group_x();
  if (sequence >= a.step->n_sequences || queries_of(a, sequence) != 1) return;
  const i32 t = a.query_starts[sequence], end = a.positions[t] + 1;
  if (group_z() * PARTITION >= end) return;
  const i32 kv_head = group_y() / GROUPS_PER_KV, first_in_kv = group_y() % GROUPS_PER_KV * GROUP;
  const i32 n_heads = HEADS_PER_KV - first_in_kv < GROUP ? HEADS_PER_KV - first_in_kv : GROUP;
  const i32 first_head = kv_head * HEADS_PER_KV + first_in_kv;
  const i32* table = table_of(a, sequence);
  const i32 part_lane = lane_index() % LANES, row_of_wave = lane_index() / LANES;
  constexpr i32 ROWS = VECTOR_THREADS / LANES;   // rows the workgroup reads at a time
  const i32 first_row = wave_index() * (WAVE / LANES) + row_of_wave;

  // Scores: 16 lanes a key.
  float q[GROUP][8 * KEY_PARTS];
#pragma unroll
  for (i32 h = 0; h < GROUP; h++)
#pragma unroll
    for (i32 p = 0; p < KEY_PARTS; p++)
#pragma unroll
      for (i32 i = 0; i < 8; i++) {
        const i32 k = (p * LANES + part_lane) * 8 + i;
        q[h][p * 8 + i] = h < n_heads && k < HEAD_DIM ? a.q[((i64)t * a.n_heads + first_head + h) * HEAD_DIM + k] * a.scale : 0.0f;
      }
  for (i32 partition = group_z(); partition * PARTITION < end; partition += a.splits) {
    const i32 start = partition * PARTITION, count = least(end - start, PARTITION);
    for (i32 start_row = 0; start_row < count; start_row += AT_ONCE * ROWS) {
      // Rows past the end repeat the last one, and count nothing.
      EightHalves eight[AT_ONCE][KEY_PARTS];
#pragma unroll
      for (i32 n = 0; n < AT_ONCE; n++) {
        const i64 row = cache_row(a, table, start + least(start_row + n * ROWS + first_row, count - 1), kv_head);
        if (part_lane * 8 < VALUE_DIM) prefetch(a.v_cache + row * VALUE_DIM + part_lane * 8);
#pragma unroll
        for (i32 p = 0; p < KEY_PARTS; p++) {
          const i32 k = least((p * LANES + part_lane) * 8, HEAD_DIM - 8);   // queries are zero past the end of a head
          eight[n][p] = *(const EightHalves*)(a.k_cache + row * HEAD_DIM + k);
        }
      }
#pragma unroll
      for (i32 n = 0; n < AT_ONCE; n++) {
        const i32 row = start_row + n * ROWS + first_row;
        float sum[GROUP];
#pragma unroll
        for (i32 h = 0; h < GROUP; h++) sum[h] = 0.0f;
#pragma unroll
        for (i32 p = 0; p < KEY_PARTS; p++)
#pragma unroll
          for (i32 i = 0; i < 8; i++) {
            const float value = half_to_float(eight[n][p].half[i]);
#pragma unroll
            for (i32 h = 0; h < GROUP; h++) sum[h] += q[h][p * 8 + i] * value;
          }
#pragma unroll
        for (i32 h = 0; h < GROUP; h++) {
          sum[h] = wave_sum<LANES>(sum[h]);
          if (part_lane == h && row < count) score[h][row] = sum[h];
        }
      }
    }
    barrier();

    // Exponentials against the partition's largest score, a wave a head.
    for (i32 h = wave_index(); h < n_heads; h += VECTOR_WAVES) {
      float largest = LOWEST;
      for (i32 row = lane_index(); row < count; row += WAVE) largest = score[h][row] > largest ? score[h][row] : largest;
      largest = wave_max(largest);
      float sum = 0.0f;
      for (i32 row = lane_index(); row < count; row += WAVE) {
        const float e = exp_fast(score[h][row] - largest);
        score[h][row] = e;
        sum += e;
      }
      sum = wave_sum(sum);
      if (lane_index() == 0) {
        float* out = partial_result(a, sequence, first_head + h, partition);
        out[0] = largest;
        out[1] = sum;
      }
    }
    barrier();

    // Weighted values: 16 lanes a row, summed over the rows of a wave, then over waves.
    for (i32 p = 0; p * LANES * 8 < VALUE_DIM; p++) {
      const i32 k = (p * LANES + part_lane) * 8;
      float sum[GROUP][8];
#pragma unroll
      for (i32 h = 0; h < GROUP; h++)
#pragma unroll
        for (i32 i = 0; i < 8; i++) sum[h][i] = 0.0f;
      for (i32 start_row = 0; start_row < count; start_row += AT_ONCE * ROWS) {
        EightHalves eight[AT_ONCE];
#pragma unroll
        for (i32 n = 0; n < AT_ONCE; n++) {
          const i64 row = cache_row(a, table, start + least(start_row + n * ROWS + first_row, count - 1), kv_head);
          eight[n] = *(const EightHalves*)(a.v_cache + row * VALUE_DIM + least(k, VALUE_DIM - 8));
        }
#pragma unroll
        for (i32 n = 0; n < AT_ONCE; n++) {
          const i32 row = start_row + n * ROWS + first_row;
          float weight[GROUP];
#pragma unroll
          for (i32 h = 0; h < GROUP; h++) weight[h] = h < n_heads && row < count ? score[h][row] : 0.0f;
#pragma unroll
          for (i32 i = 0; i < 8; i++) {
            const float value = half_to_float(eight[n].half[i]);
#pragma unroll
            for (i32 h = 0; h < GROUP; h++) sum[h][i] += weight[h] * value;
          }
        }
      }
#pragma unroll
      for (i32 h = 0; h < GROUP; h++)
#pragma unroll
        for (i32 i = 0; i < 8; i++) {
#pragma unroll
          for (i32 step = LANES; step < WAVE; step *= 2) sum[h][i] += lane_read(sum[h][i], lane_index() ^ step);
          if (row_of_wave == 0) weighted[wave_index()][h][part_lane * 8 + i] = sum[h][i];
        }
      barrier();
      for (i32 i = thread_index(); i < n_heads * LANES * 8; i += VECTOR_THREADS) {
        const i32 h = i / (LANES * 8), column = i % (LANES * 8);
        float total = 0.0f;
#pragma unroll
        for (i32 w = 0; w < VECTOR_WAVES; w++) total += weighted[w][h][column];
        if (p * LANES * 8 + column < VALUE_DIM) partial_result(a, sequence, first_head + h, partition)[2 + p * LANES * 8 + column] = total;
      }
      barrier();
    }
  }
}

// Joins the partitions in order. Grid: tokens x runs of columns; 32 lanes hold a block of the quantized result.
KERNEL(attention_combine, ATTENTION_THREADS)(const AttentionArguments a) {
  wait_for_previous_launch();
  const i32 t = group_x();
  if (t >= a.step->n_tokens) return;
  const i32 sequence = a.sequences[t], width = a.n_heads * VALUE_DIM;
  const i32 column = group_y() * ATTENTION_THREADS + thread_index();
  const i32 head = column / VALUE_DIM, k = column % VALUE_DIM;
  float value = 0.0f;
  if (column < width && queries_of(a, sequence) > 1) {
    value = tile_result(a, t, head)[k];
  } else if (column < width) {
    float largest = LOWEST, sum = 0.0f;
    const i32 end = a.positions[t] / PARTITION + 1;
#pragma unroll 4
    for (i32 p = 0; p < end; p++) {
      const float* part = partial_result(a, sequence, head, p);
      const float next = part[0] > largest ? part[0] : largest;
      const float keep = exp_fast(largest - next), take = exp_fast(part[0] - next);
      value = value * keep + part[2 + k] * take;
      sum = sum * keep + part[1] * take;
      largest = next;
    }
    value *= reciprocal(sum);
  }
  store_activation(a.out, t, column, width, value, true);
}

constexpr i32 QUERIES = 16 * ATTENTION_WAVES;              // a workgroup of attention_tile: 16 queries a wave
constexpr i32 POSITIONS = HEAD_DIM > 128 || VALUE_DIM > 128 ? 16 : 32;   // cache rows staged at a time
constexpr i32 KEY_TILES = (HEAD_DIM + 15) / 16, VALUE_TILES = (VALUE_DIM + 15) / 16;
constexpr i32 KEY_STRIDE = KEY_TILES * 16 + 8;             // float16 elements between staged rows: aligned, spreads banks
constexpr i32 VALUE_STRIDE = POSITIONS + 8;
constexpr i32 SCORE_STRIDE = POSITIONS + 1;
// Queries stay in registers where the matrix unit takes its operands from there and the results leave enough of them.
constexpr i32 TILE_REGISTERS = KEY_TILES * (i32)sizeof(TileOperand) / 4 + VALUE_TILES * 256 / WAVE;
constexpr bool KEEP_QUERIES = OPERANDS_IN_REGISTERS && TILE_REGISTERS <= 192;
constexpr i32 KEYS_UNROLLED = KEEP_QUERIES ? KEY_TILES : 1;

// The run of up to QUERIES queries that is number `tile` among the sequences with many queries.
struct QueryTile { i32 sequence, first, count; };
DEVICE inline QueryTile query_tile(const AttentionArguments& a, i32 tile) {
  for (i32 s = 0; s < a.step->n_sequences; s++) {
    const i32 n = queries_of(a, s);
    if (n <= 1) continue;
    const i32 tiles = (n + QUERIES - 1) / QUERIES;
    if (tile < tiles) return {s, a.query_starts[s] + tile * QUERIES, n - tile * QUERIES < QUERIES ? n - tile * QUERIES : QUERIES};
    tile -= tiles;
  }
  return {0, 0, 0};
}

// Grid: runs of queries x query heads. Each wave keeps 16 queries and their results; the workgroup stages keys and values.
KERNEL(attention_tile, ATTENTION_THREADS)(const AttentionArguments a) {
  // Queries that go into registers pass through the room of keys and values; others keep a room of their own.
  constexpr i32 KEYS = POSITIONS * KEY_STRIDE, VALUES = VALUE_TILES * 16 * VALUE_STRIDE, OWN = QUERIES * KEY_STRIDE;
  SHARED f16_bits staged[KEEP_QUERIES ? (KEYS + VALUES > OWN ? KEYS + VALUES : OWN) : KEYS + VALUES + OWN];
  f16_bits* staged_keys = staged;
  f16_bits* staged_values = staged + KEYS;   // transposed: a row for each element of a value
  f16_bits* staged_queries = KEEP_QUERIES ? staged : staged + KEYS + VALUES;
  SHARED float score[ATTENTION_WAVES][16 * SCORE_STRIDE];
  SHARED f16_bits weight[ATTENTION_WAVES][16 * VALUE_STRIDE];
  SHARED float rescale[ATTENTION_WAVES][16];

  wait_for_previous_launch();
  const QueryTile tile = query_tile(a, group_x());
  if (tile.count == 0) return;
  const i32 head = group_y(), kv_head = head / HEADS_PER_KV, wave = wave_index();
  const i32* table = table_of(a, tile.sequence);
  const i32 first_position = a.positions[tile.first];      // the queries' positions follow one another

  for (i32 i = thread_index(); i < QUERIES * KEY_TILES * 16; i += ATTENTION_THREADS) {
    const i32 row = i / (KEY_TILES * 16), k = i % (KEY_TILES * 16);
    const bool inside = row < tile.count && k < HEAD_DIM;
    staged_queries[row * KEY_STRIDE + k] = float_to_half(inside ? a.q[((i64)(tile.first + row) * a.n_heads + head) * HEAD_DIM + k] * a.scale : 0.0f);
  }
  barrier();
  const f16_bits* own_queries = staged_queries + wave * 16 * KEY_STRIDE;
  TileOperand query[KEY_TILES];
#pragma unroll
  for (i32 k = 0; k < KEY_TILES; k++) query[k] = tile_operand(own_queries + k * 16, KEY_STRIDE);

  Tile16 result[VALUE_TILES];
#pragma unroll
  for (i32 v = 0; v < VALUE_TILES; v++)
#pragma unroll
    for (i32 i = 0; i < 256 / WAVE; i++) result[v].value[i] = 0.0f;
  // Running maximum and sum of a query's row, in each of the WAVE / 16 lanes that share it.
  const i32 own_row = lane_index() / (WAVE / 16), own_part = lane_index() % (WAVE / 16);
  const i32 own_position = first_position + wave * 16 + own_row;
  float largest = LOWEST, sum = 0.0f;

  const i32 end = first_position + tile.count;
  for (i32 start = 0; start < end; start += POSITIONS) {
    barrier();
    constexpr i32 KEY_EIGHTS = KEY_TILES * 2, VALUE_EIGHTS = VALUE_TILES * 2;
    // Past the end the last row and its last eight elements are repeated: they meet weights and queries of zero.
    for (i32 i = thread_index(); i < POSITIONS * KEY_EIGHTS; i += ATTENTION_THREADS) {
      const i32 row = i / KEY_EIGHTS, k = i % KEY_EIGHTS * 8;
      const i64 source = cache_row(a, table, least(start + row, end - 1), kv_head) * HEAD_DIM + least(k, HEAD_DIM - 8);
      *(EightHalves*)(staged_keys + row * KEY_STRIDE + k) = *(const EightHalves*)(a.k_cache + source);
    }
    for (i32 i = thread_index(); i < POSITIONS * VALUE_EIGHTS; i += ATTENTION_THREADS) {
      const i32 row = i % POSITIONS, k = i / POSITIONS * 8;
      const i64 source = cache_row(a, table, least(start + row, end - 1), kv_head) * VALUE_DIM + least(k, VALUE_DIM - 8);
      const EightHalves eight = *(const EightHalves*)(a.v_cache + source);
#pragma unroll
      for (i32 j = 0; j < 8; j++) staged_values[(k + j) * VALUE_STRIDE + row] = eight.half[j];
    }
    barrier();

#pragma unroll
    for (i32 p = 0; p < POSITIONS / 16; p++) {
      Tile16 s;
#pragma unroll
      for (i32 i = 0; i < 256 / WAVE; i++) s.value[i] = 0.0f;
#pragma unroll KEYS_UNROLLED
      for (i32 k = 0; k < KEY_TILES; k++) {
        const TileOperand key = tile_operand(staged_keys + p * 16 * KEY_STRIDE + k * 16, KEY_STRIDE);
        tile_multiply(s, KEEP_QUERIES ? query[k] : tile_operand(own_queries + k * 16, KEY_STRIDE), key);
      }
#pragma unroll
      for (i32 i = 0; i < 256 / WAVE; i++) score[wave][tile_row(i) * SCORE_STRIDE + p * 16 + tile_column(i)] = s.value[i];
    }
    wave_barrier();

    // The row's new maximum; everything kept so far shrinks by the difference.
    constexpr i32 PART = POSITIONS / (WAVE / 16);
    float next = largest;
#pragma unroll
    for (i32 i = 0; i < PART; i++) {
      const i32 column = own_part * PART + i;
      const float s = start + column <= own_position ? score[wave][own_row * SCORE_STRIDE + column] : LOWEST;
      next = s > next ? s : next;
    }
    next = wave_max<WAVE / 16>(next);
    const float shrink = exp_fast(largest - next);
    sum *= shrink;
#pragma unroll
    for (i32 i = 0; i < PART; i++) {
      const i32 column = own_part * PART + i;
      const float e = start + column <= own_position ? exp_fast(score[wave][own_row * SCORE_STRIDE + column] - next) : 0.0f;
      weight[wave][own_row * VALUE_STRIDE + column] = float_to_half(e);
      sum += e;
    }
    largest = next;
    if (own_part == 0) rescale[wave][own_row] = shrink;
    wave_barrier();

#pragma unroll
    for (i32 v = 0; v < VALUE_TILES; v++)
#pragma unroll
      for (i32 i = 0; i < 256 / WAVE; i++) result[v].value[i] *= rescale[wave][tile_row(i)];
#pragma unroll
    for (i32 p = 0; p < POSITIONS / 16; p++) {
      const TileOperand weights = tile_operand(weight[wave] + p * 16, VALUE_STRIDE);
#pragma unroll
      for (i32 v = 0; v < VALUE_TILES; v++)
        tile_multiply(result[v], weights, tile_operand(staged_values + v * 16 * VALUE_STRIDE + p * 16, VALUE_STRIDE));
    }
    wave_barrier();
  }

  sum = wave_sum<WAVE / 16>(sum);
  if (own_part == 0) rescale[wave][own_row] = reciprocal(sum);
  wave_barrier();

#pragma unroll
  for (i32 v = 0; v < VALUE_TILES; v++)
#pragma unroll
    for (i32 i = 0; i < 256 / WAVE; i++) {
      const i32 row = wave * 16 + tile_row(i), k = v * 16 + tile_column(i);
      if (row < tile.count && k < VALUE_DIM)
        tile_result(a, tile.first + row, head)[k] = result[v].value[i] * rescale[wave][tile_row(i)];
    }
}

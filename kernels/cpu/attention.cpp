// Attention over the paged cache. One task is a tile of queries of one sequence, for one head of the cache, against one
// partition of positions or all of them; partitions are always computed apart and folded in order, so that who computes
// them does not change the result.
//
// Sources: T. Dao et al., FlashAttention, 2022 (the fold); Flash-Decoding, 2023 (splitting the context).
#include "cpu/attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/kernel_table.h"
#include "cpu/quantize.h"
#include "cpu/vector_ops.h"

namespace redshard {
namespace {

constexpr i64 kMaxRows = 64;        // query rows of a tile; a token has one for each query head of the group
constexpr i64 kTasksPerThread = 4;  // with fewer tasks than these, contexts are split
constexpr i64 kScratchBytes = 32 << 20;  // enough for many rows, and always granted for one

void check(const AttentionArguments& a) {
  require(a.step && a.positions && a.query_starts && a.table_rows && a.block_tables && a.q && a.k_cache && a.v_cache,
          "step, positions, query_starts, table_rows, block_tables, q and both caches must be set");
  require(a.n_heads > 0 && a.n_kv_heads > 0 && a.head_dim > 0 && a.value_dim > 0 && a.block_size > 0 &&
              a.table_width > 0,
          "sizes must be positive");
  require(a.n_heads % a.n_kv_heads == 0, "n_heads is not a multiple of n_kv_heads");
  check_output(a.out, i64{a.n_heads} * a.value_dim);
}

constexpr i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

struct Tile {
  i64 sequence, first_token, n_tokens;
  i64 context;  // positions that its last token sees
};

std::vector<Tile> make_tiles(const AttentionArguments& a, i64 tokens_per_tile) {
  std::vector<Tile> tiles;
  for (i64 s = 0; s < a.step->n_sequences; ++s) {
    const i64 end = a.query_starts[s + 1];
    for (i64 token = a.query_starts[s]; token < end; token += tokens_per_tile) {
      const i64 n = std::min(tokens_per_tile, end - token);
      const i32 last = *std::max_element(a.positions + token, a.positions + token + n);
      tiles.push_back({s, token, n, i64{last} + 1});
    }
  }
  return tiles;
}

// One thread's memory for a task.
struct TaskMemory {
  float *queries, *partition, *partials, *totals;
  i32* visible;  // [rows]: how many positions of the present partition a row sees

  static i64 floats(const AttentionArguments& a, i64 rows) {
    return rows * padded(a.head_dim) + padded(partition_memory_floats(rows, a.head_dim, a.value_dim)) +
           2 * padded(rows * partial_floats(a.value_dim)) + padded(rows);
  }
  TaskMemory(const AttentionArguments& a, i64 rows, float* memory) {
    queries = memory;
    partition = queries + rows * padded(a.head_dim);
    partials = partition + padded(partition_memory_floats(rows, a.head_dim, a.value_dim));
    totals = partials + padded(rows * partial_floats(a.value_dim));
    visible = reinterpret_cast<i32*>(totals + padded(rows * partial_floats(a.value_dim)));
  }
};

class Attention {
 public:
  Attention(ThreadPool& pool, Isa isa, const AttentionArguments& a)
      : pool_(pool), isa_(isa), ops_(vector_ops(isa)), a_(a), group_(a.n_heads / a.n_kv_heads),
        partial_(partial_floats(a.value_dim)), width_(i64{a.n_heads} * a.value_dim) {
    const i64 tokens_per_tile = std::max(i64{1}, kMaxRows / group_);
    rows_ = tokens_per_tile * group_;
    tiles_ = make_tiles(a, tokens_per_tile);
    for (const Tile& tile : tiles_) max_partitions_ = std::max(max_partitions_, ceil_div(tile.context, kPartition));
    const i64 task_floats = TaskMemory::floats(a, rows_), own_floats = a.out.values ? 0 : a.step->n_tokens * width_;
    memory_ = static_cast<float*>(pool.workspace((pool.size() * task_floats + own_floats) * sizeof(float)));
    out_ = a.out.values ? a.out.values : memory_ + pool.size() * task_floats;
  }

  void run() {
    const i64 n_tasks = static_cast<i64>(tiles_.size()) * a_.n_kv_heads;
    const i64 scratch_floats = a_.step->n_tokens * i64{a_.n_heads} * max_partitions_ * partial_;
    const bool split = max_partitions_ > 1 && n_tasks < kTasksPerThread * pool_.size() && a_.scratch &&
                       scratch_floats * i64{sizeof(float)} <= a_.scratch_bytes;
    if (split) {
      // Neighbouring partitions go to the same thread, which has asked for the next one's keys.
      const i64 n = n_tasks * max_partitions_, grain = std::max(i64{1}, n / (pool_.size() * kTasksPerThread));
      pool_.parallel_for(n, grain, [&](i64 begin, i64 end, int thread) {
        for (i64 task = begin; task < end; ++task) {
          compute_partition(task / max_partitions_, task % max_partitions_, thread);
        }
      });
      fold_partitions();
    } else {
      pool_.parallel_for(n_tasks, 1, [&](i64 begin, i64 end, int thread) {
        for (i64 task = begin; task < end; ++task) compute_context(task, thread);
      });
    }
    pool_.parallel_for(a_.out.quants ? a_.step->n_tokens : 0, rows_per_chunk(width_), [&](i64 begin, i64 end, int) {
      for (i64 token = begin; token < end; ++token) quantize_row(isa_, out_ + token * width_, width_, a_.out, token);
    });
  }

 private:
  // A row of a tile is one query head of one token.
  i64 token_of(const Tile& tile, i64 row) const { return tile.first_token + row / group_; }
  i64 head_of(i64 kv_head, i64 row) const { return kv_head * group_ + row % group_; }

  TaskMemory memory_of(int thread) const {
    return TaskMemory(a_, rows_, memory_ + thread * TaskMemory::floats(a_, rows_));
  }

  void load_queries(const Tile& tile, i64 kv_head, float* queries) const {
    for (i64 row = 0; row < tile.n_tokens * group_; ++row) {
      const float* q = a_.q + (token_of(tile, row) * a_.n_heads + head_of(kv_head, row)) * a_.head_dim;
      for (i64 d = 0; d < a_.head_dim; ++d) queries[row * a_.head_dim + d] = q[d] * a_.scale;
    }
  }

  // Addresses of a partition's rows in one of the caches; returns how many positions there are, 0 behind the context.
  i64 find_rows(const Tile& tile, i64 kv_head, i64 partition, const f16_bits* cache, i64 dim,
                const f16_bits** rows) const {
    const i64 first = partition * kPartition, n = std::max(i64{0}, std::min(kPartition, tile.context - first));
    const i32* table = a_.block_tables + i64{a_.table_rows[tile.sequence]} * a_.table_width;
    for (i64 i = 0; i < n; ++i) {
      const i64 position = first + i;
      const i64 block = table[position / a_.block_size];
      rows[i] = cache + ((block * a_.n_kv_heads + kv_head) * a_.block_size + position % a_.block_size) * dim;
    }
    return n;
  }

  // The partials of a tile's rows, in memory.partials; memory.visible says which rows have one.
  void attend(const Tile& tile, i64 kv_head, i64 partition, const TaskMemory& memory) const {
    const f16_bits *keys[kPartition], *values[kPartition], *next_keys[kPartition];
    const i64 n = find_rows(tile, kv_head, partition, a_.k_cache, a_.head_dim, keys);
    find_rows(tile, kv_head, partition, a_.v_cache, a_.value_dim, values);
    const i64 n_next = find_rows(tile, kv_head, partition + 1, a_.k_cache, a_.head_dim, next_keys);
    const i64 n_rows = tile.n_tokens * group_;
    for (i64 row = 0; row < n_rows; ++row) {
      const i64 context = i64{a_.positions[token_of(tile, row)]} + 1;
      memory.visible[row] = static_cast<i32>(std::min(n, context - partition * kPartition));
    }
    ops_.attend_partition({keys, values, memory.queries, memory.visible, memory.partials, memory.partition, n, n_rows,
                           a_.head_dim, a_.value_dim, next_keys, n_next});
  }

  // All partitions of a tile, folded as they come.
  void compute_context(i64 task, int thread) const {
    const Tile& tile = tiles_[task / a_.n_kv_heads];
    const i64 kv_head = task % a_.n_kv_heads, n_rows = tile.n_tokens * group_;
    const TaskMemory memory = memory_of(thread);
    load_queries(tile, kv_head, memory.queries);
    for (i64 partition = 0; partition * kPartition < tile.context; ++partition) {
      attend(tile, kv_head, partition, memory);
      if (partition == 0) {
        std::memcpy(memory.totals, memory.partials, n_rows * partial_ * sizeof(float));
        continue;
      }
      for (i64 row = 0; row < n_rows; ++row) {
        if (memory.visible[row] <= 0) continue;
        ops_.fold_partial(memory.totals + row * partial_, memory.partials + row * partial_, a_.value_dim);
      }
    }
    for (i64 row = 0; row < n_rows; ++row) {
      float* out = output(token_of(tile, row), head_of(kv_head, row));
      ops_.finish_partial(memory.totals + row * partial_, a_.value_dim, out);
    }
  }

  // One partition of a tile, kept for fold_partitions.
  void compute_partition(i64 task, i64 partition, int thread) const {
    const Tile& tile = tiles_[task / a_.n_kv_heads];
    if (partition * kPartition >= tile.context) return;
    const i64 kv_head = task % a_.n_kv_heads;
    const TaskMemory memory = memory_of(thread);
    load_queries(tile, kv_head, memory.queries);
    attend(tile, kv_head, partition, memory);
    for (i64 row = 0; row < tile.n_tokens * group_; ++row) {
      if (memory.visible[row] <= 0) continue;
      std::memcpy(kept_partial(token_of(tile, row), head_of(kv_head, row), partition),
                  memory.partials + row * partial_, partial_ * sizeof(float));
    }
  }

  void fold_partitions() const {
    const i64 n = a_.step->n_tokens * i64{a_.n_heads};
    pool_.parallel_for(n, rows_per_chunk(max_partitions_ * a_.value_dim), [&](i64 begin, i64 end, int) {
      for (i64 i = begin; i < end; ++i) {
        const i64 token = i / a_.n_heads, head = i % a_.n_heads;
        float* total = kept_partial(token, head, 0);
        for (i64 partition = 1; partition * kPartition <= a_.positions[token]; ++partition) {
          ops_.fold_partial(total, kept_partial(token, head, partition), a_.value_dim);
        }
        ops_.finish_partial(total, a_.value_dim, output(token, head));
      }
    });
  }

  float* kept_partial(i64 token, i64 head, i64 partition) const {
    return a_.scratch + ((token * a_.n_heads + head) * max_partitions_ + partition) * partial_;
  }
  float* output(i64 token, i64 head) const { return out_ + token * width_ + head * a_.value_dim; }

  ThreadPool& pool_;
  Isa isa_;
  const VectorOps& ops_;
  const AttentionArguments& a_;
  i64 group_, partial_, width_, rows_, max_partitions_ = 0;
  std::vector<Tile> tiles_;
  float* memory_;
  float* out_;  // [n_tokens, width_]
};

void run(ThreadPool& pool, Isa isa, const AttentionArguments& a) { Attention(pool, isa, a).run(); }

}  // namespace

i64 attention_scratch_bytes(i64 rows, i64 n_heads, i64 value_dim, i64 max_context) {
  const i64 row_bytes = n_heads * ceil_div(max_context, kPartition) * partial_floats(value_dim) * i64{sizeof(float)};
  return std::min(rows * row_bytes, std::max(row_bytes, kScratchBytes));
}

const Kernel attention_kernel = make_kernel<AttentionArguments, check, run>("attention");

}  // namespace redshard

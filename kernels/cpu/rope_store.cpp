#include <cstring>

#include "cpu/kernel_table.h"
#include "cpu/vector_ops.h"

namespace redshard {
namespace {

constexpr i32 kMaxRotated = 1024;  // dimensions of a head that turn
constexpr i32 kMaxHeadDim = 4096;

void check(const RopeStoreArguments& a) {
  require(a.step && a.positions && a.slots && a.q && a.k && a.v && a.k_cache && a.v_cache,
          "step, positions, slots, q, k, v and both caches must be set");
  require(a.n_heads > 0 && a.n_kv_heads > 0 && a.value_dim > 0 && a.block_size > 0, "sizes must be positive");
  require(a.head_dim > 0 && a.head_dim <= kMaxHeadDim, "head_dim must be 1 to 4096");
  require(a.n_rot >= 0 && a.n_rot <= a.head_dim && a.n_rot <= kMaxRotated && a.n_rot % 2 == 0,
          "n_rot must be even, at most head_dim and at most 1024");
  require(a.rotary || a.n_rot == 0, "no rotary table");
}

// One token's angles, cosines and sines apart.
struct Angles {
  float cosines[kMaxRotated / 2], sines[kMaxRotated / 2];

  Angles(const float* rotary, i64 n_pairs) {
    for (i64 i = 0; i < n_pairs; ++i) {
      cosines[i] = rotary[2 * i];
      sines[i] = rotary[2 * i + 1];
    }
  }
};

void run_token(const VectorOps& ops, const RopeStoreArguments& a, i64 token) {
  const i64 n_pairs = a.n_rot / 2;
  const Angles angles(a.rotary + a.positions[token] * i64{a.n_rot}, n_pairs);
  const auto normalize_and_turn = [&](float* head, const float* weight) {
    if (weight) ops.rms_norm(head, weight, a.head_dim, a.eps, head);
    ops.rotate(head, angles.cosines, angles.sines, n_pairs, a.neox != 0);
  };
  for (i64 head = 0; head < a.n_heads; ++head) {
    normalize_and_turn(a.q + (token * a.n_heads + head) * a.head_dim, a.q_norm);
  }
  const i64 block = a.slots[token] / a.block_size, place = a.slots[token] % a.block_size;
  for (i64 head = 0; head < a.n_kv_heads; ++head) {
    const i64 in_row = token * a.n_kv_heads + head;
    const i64 cache_row = (block * a.n_kv_heads + head) * a.block_size + place;
    float key[kMaxHeadDim];
    std::memcpy(key, a.k + in_row * a.head_dim, a.head_dim * sizeof(float));
    normalize_and_turn(key, a.k_norm);
    ops.to_half(key, a.head_dim, a.k_cache + cache_row * a.head_dim);
    ops.to_half(a.v + in_row * a.value_dim, a.value_dim, a.v_cache + cache_row * a.value_dim);
  }
}

void run(ThreadPool& pool, Isa isa, const RopeStoreArguments& a) {
  const VectorOps& ops = vector_ops(isa);
  const i64 token_width = i64{a.n_heads + a.n_kv_heads} * a.head_dim + i64{a.n_kv_heads} * a.value_dim;
  pool.parallel_for(a.step->n_tokens, rows_per_chunk(token_width), [&](i64 begin, i64 end, int) {
    for (i64 token = begin; token < end; ++token) run_token(ops, a, token);
  });
}

}  // namespace

const Kernel rope_store_kernel = make_kernel<RopeStoreArguments, check, run>("rope_store");

}  // namespace redshard

// Head norms and rotary embedding (Su et al. 2021) of queries and keys; keys and values go to the paged cache as float16.
#include "common/arguments.h"
#include "hip/prelude.h"

constexpr i32 ROPE_THREADS = 256;
constexpr i32 HELD = 8;   // elements of a head that a lane keeps

// Element i of a head after its norm.
DEVICE inline float normalized(const float* head, const float* weight, float scale, i32 i) {
  return weight ? head[i] * scale * weight[i] : head[i];
}

// Element i of a head after norm and rotation by this position's cosines and sines.
DEVICE inline float rotated(const RopeStoreArguments& a, const float* head, const float* weight, float scale,
                            const float* rotary, i32 i) {
  const float own = normalized(head, weight, scale, i);
  if (i >= a.n_rot) return own;
  const i32 half = a.n_rot / 2;
  const i32 pair = a.neox ? i % half : i / 2;
  const bool first = a.neox ? i < half : i % 2 == 0;
  const i32 partner = a.neox ? (first ? i + half : i - half) : (first ? i + 1 : i - 1);
  const float other = normalized(head, weight, scale, partner);
  const float cosine = rotary[2 * pair], sine = rotary[2 * pair + 1];
  return first ? own * cosine - other * sine : other * sine + own * cosine;
}

// A wave a head, for all query, key and value heads of a token: grid of tokens x groups of heads. A query head is read
// whole before it is changed in place, so it may have at most WAVE * HELD elements.
KERNEL(rope_store, ROPE_THREADS)(const RopeStoreArguments a) {
  wait_for_previous_launch();
  const i32 t = group_x();
  const i32 head = group_y() * (ROPE_THREADS / WAVE) + wave_index();
  if (t >= a.step->n_tokens || head >= a.n_heads + 2 * a.n_kv_heads) return;
  const i32 block = a.slots[t] / a.block_size, place = a.slots[t] % a.block_size;

  if (head >= a.n_heads + a.n_kv_heads) {
    const i32 h = head - a.n_heads - a.n_kv_heads;
    const float* v = a.v + ((i64)t * a.n_kv_heads + h) * a.value_dim;
    f16_bits* cache = a.v_cache + (((i64)block * a.n_kv_heads + h) * a.block_size + place) * a.value_dim;
    for (i32 i = lane_index(); i < a.value_dim; i += WAVE) cache[i] = float_to_half(v[i]);
    return;
  }

  const bool is_query = head < a.n_heads;
  const i32 h = is_query ? head : head - a.n_heads;
  const float* source = is_query ? a.q + ((i64)t * a.n_heads + h) * a.head_dim : a.k + ((i64)t * a.n_kv_heads + h) * a.head_dim;
  const float* weight = is_query ? a.q_norm : a.k_norm;
  float scale = 1.0f;
  if (weight) {
    float sum = 0.0f;
    for (i32 i = lane_index(); i < a.head_dim; i += WAVE) sum += source[i] * source[i];
    scale = reciprocal_square_root(wave_sum(sum) / (float)a.head_dim + a.eps);
  }
  const float* rotary = a.rotary + (i64)a.positions[t] * a.n_rot;

  float result[HELD];
#pragma unroll
  for (i32 n = 0; n < HELD; n++) {
    const i32 i = lane_index() + n * WAVE;
    result[n] = i < a.head_dim ? rotated(a, source, weight, scale, rotary, i) : 0.0f;
  }
  wave_barrier();
  f16_bits* cache = a.k_cache + (((i64)block * a.n_kv_heads + h) * a.block_size + place) * a.head_dim;
#pragma unroll
  for (i32 n = 0; n < HELD; n++) {
    const i32 i = lane_index() + n * WAVE;
    if (i >= a.head_dim) continue;
    if (is_query) a.q[((i64)t * a.n_heads + h) * a.head_dim + i] = result[n];
    else cache[i] = float_to_half(result[n]);
  }
}

// Operations on rows of hidden states: token embedding and root mean square norm (Zhang and Sennrich 2019).
#include "common/arguments.h"
#include "hip/formats.h"
#include "hip/quantize.h"

constexpr i32 ROW_THREADS = 1024;   // one row is often all there is: the more lanes, the sooner it is done

#ifdef WEIGHT_TYPE
template <i32 type>
DEVICE inline void embed_row(const EmbedArguments& a, i32 row, float* out) {
  if constexpr (is_quantized(type)) {
    using Weights = PlaneFormat<type>;
    for (i32 chunk = thread_index(); chunk < a.width / Weights::ELEMENTS; chunk += ROW_THREADS) {
      const auto c = Weights::unpack(Weights::load(a.table, a.width, row, chunk), chunk);
#pragma unroll
      for (i32 g = 0; g < c.GROUPS; g++)
#pragma unroll
        for (i32 k = 0; k < 16; k++) {
          float w = c.scale[g] * signed_byte(c.word[g][k / 4], k % 4);
          if (Weights::MINIMUM) w += c.minimum[g];
          out[Weights::position(chunk, g) + k] = a.scale * w;
        }
    }
  } else {
    for (i32 k = thread_index(); k < a.width; k += ROW_THREADS)
      out[k] = a.scale * float_weight<type>(a.table, (i64)row * a.width + k);
  }
}

// One workgroup a token. Compiled for the type of the token table.
KERNEL(embed, ROW_THREADS)(const EmbedArguments a) {
  wait_for_previous_launch();
  const i32 t = group_x();
  if (t >= a.step->n_tokens) return;
  const i32 given = a.token_ids[t], id = given < 0 ? a.newest[-1 - given] : given;
  float* out = a.out + (i64)t * a.width;
  if (id >= 0) {
    embed_row<WEIGHT_TYPE>(a, id, out);
  } else {   // nothing could be sampled: zeros, rather than whatever lies beside the table
    for (i32 k = thread_index(); k < a.width; k += ROW_THREADS) out[k] = 0.0f;
  }
}
#endif

// One workgroup a row.
KERNEL(rms_norm, ROW_THREADS)(const RmsNormArguments a) {
  SHARED float partial[ROW_THREADS / WAVE];
  wait_for_previous_launch();
  const i32 i = group_x();
  if (i >= (a.rows ? a.step->n_outputs : a.step->n_tokens)) return;
  const float* x = a.x + (i64)(a.rows ? a.rows[i] : i) * a.width;

  float sum = 0.0f;
#pragma unroll 4
  for (i32 k = thread_index(); k < a.width; k += ROW_THREADS) sum += x[k] * x[k];
  sum = wave_sum(sum);
  if (lane_index() == 0) partial[wave_index()] = sum;
  barrier();
  sum = 0.0f;
#pragma unroll
  for (i32 w = 0; w < ROW_THREADS / WAVE; w++) sum += partial[w];
  const float scale = reciprocal_square_root(sum / (float)a.width + a.eps);

  // Whole blocks of 32 lanes go on together, also past the end of the row.
  for (i32 k = thread_index(); k < (a.width + 31) / 32 * 32; k += ROW_THREADS) {
    const float value = k < a.width ? x[k] * scale * a.weight[k] : 0.0f;
    store_activation(a.out, i, k, a.width, value, true);
  }
}

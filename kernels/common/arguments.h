// The argument block of every operation, the same on every device: a kernel takes one of these structures, by value on a
// GPU and by address on the CPU. worker/device/arguments.py reads constants and structures here, so they keep to lines that
// worker/device/sources.py understands.
//
// A step is one forward pass over the tokens of several sequences. Graphs are recorded once and replayed, so whatever
// changes from step to step is read from device memory through these pointers, never from the argument block itself.
#pragma once
#include "common/types.h"

constexpr i32 QUANT_BLOCK = 32;        // elements of a block of an activation's quants
constexpr i32 MAX_MATRICES = 3;        // of one matmul
constexpr i32 MAX_TOP_LOGPROBS = 20;   // most probable tokens of one row
constexpr i32 PARTITION = 128;         // positions of a context that attention takes at a time, folding the results in order

// How many rows this step has. A graph may be recorded for more rows than a step uses: kernels stop at these counts.
struct Step {
  i32 n_tokens;      // rows of hidden states
  i32 n_sequences;   // sequences the tokens belong to
  i32 n_outputs;     // rows whose logits are wanted (the last stage alone uses it)
  i32 n_changes;     // entries of the block tables that this step sets
};

// Rows of one width, as float32 or as 8-bit blocks of 32, or both. Producers write every form whose pointer is not null.
//   quants[r, c] = round(values[r, c] / scale) with scale = max |values| of the block / 127 (0 for a block of zeros)
struct Activation {
  float* values;   // [rows, width] or null
  i8* quants;      // [rows, width] or null; width is then a multiple of 32
  float* scales;   // [rows, width / 32]
  float* sums;     // [rows, width / 32]: scale times the sum of the block's quants
};

// A weight matrix in its GGUF blocks: n_rows rows of `width` elements (the width stands in the operation's arguments).
struct Matrix {
  const void* data;
  const float* bias;   // [n_rows] or null
  i32 type;            // ggml type number
  i32 n_rows;
};

// One entry of the block tables, which stay on the device from step to step.
struct TableChange {
  i32 place;   // row * table_width + column
  i32 block;
};

// tables[changes[i].place] = changes[i].block. No place is named twice.
struct SetTablesArguments {
  const Step* step;
  const TableChange* changes;   // [n_changes]
  i32* tables;
};

// out[t] = scale * row token_ids[t] of the table. A negative id -1 - s stands for the token sampled last in slot s.
struct EmbedArguments {
  const Step* step;
  const i32* token_ids;   // [n_tokens]
  const i32* newest;      // [slots], or null where no id is negative
  Matrix table;           // [n_vocab, width]
  float* out;             // [n_tokens, width]
  i32 width;
  float scale;
};

// out[i] = x[r] / sqrt(mean(x[r]^2) + eps) * weight, with r = i for every token, or r = rows[i] for every output.
struct RmsNormArguments {
  const Step* step;
  const float* x;        // [n_tokens, width]
  const i32* rows;       // null: all tokens; else [n_outputs]
  const float* weight;   // [width]
  Activation out;
  i32 width;
  float eps;
};

// y[m][t] = x[t] * w[m]^T + bias[m], added to what y[m] holds when `accumulate` is set. Quantized matrices read
// x.quants, scales and sums; F32, F16 and BF16 matrices read x.values.
struct MatmulArguments {
  const Step* step;
  Activation x;         // [rows, width]
  Matrix w[MAX_MATRICES];
  float* y[MAX_MATRICES];   // [rows, w[m].n_rows]
  i32 n_matrices;           // 1 to MAX_MATRICES
  i32 width;
  i32 accumulate;       // 0 or 1
  i32 over_outputs;     // rows = n_outputs rather than n_tokens
};

// out[t, j] = silu(x[t] * gate[j]) * (x[t] * up[j]).
struct SwigluArguments {
  const Step* step;
  Activation x;        // [n_tokens, width]
  Matrix gate, up;     // [n_hidden, width] each
  Activation out;      // [n_tokens, n_hidden]
  i32 width;
  i32 reserved;
};

// Per head: RMS norm of q and k where a weight is given, rotary embedding of both, then k and v go to the cache as
// float16. q is changed in place; k and v are not.
struct RopeStoreArguments {
  const Step* step;
  const i32* positions;   // [n_tokens]
  const i32* slots;       // [n_tokens]: cache block * block_size + place in it
  float* q;               // [n_tokens, n_heads, head_dim]
  const float* k;         // [n_tokens, n_kv_heads, head_dim]
  const float* v;         // [n_tokens, n_kv_heads, value_dim]
  const float* q_norm;    // [head_dim] or null
  const float* k_norm;    // [head_dim] or null
  const float* rotary;    // [positions, n_rot / 2, 2]: cosine, sine
  f16_bits* k_cache;      // [n_blocks, n_kv_heads, block_size, head_dim]
  f16_bits* v_cache;      // [n_blocks, n_kv_heads, block_size, value_dim]
  i32 n_heads, n_kv_heads, head_dim, value_dim;
  i32 n_rot;              // dimensions that turn, the first of each head
  i32 neox;               // 0: pairs (2i, 2i+1); 1: pairs (i, i + n_rot / 2)
  i32 block_size;         // tokens of a cache block
  float eps;
};

// out[t, h] = softmax(scale * q[t, h] . K) V over the positions 0 .. positions[t] of the token's sequence; query head h
// reads cache head h / (n_heads / n_kv_heads). A row reads nothing of the others but what they put into the cache.
struct AttentionArguments {
  const Step* step;
  const i32* positions;       // [n_tokens]
  const i32* sequences;       // [n_tokens]: number of the token's sequence in this step
  const i32* query_starts;    // [n_sequences + 1]: the tokens of sequence s are rows query_starts[s] .. query_starts[s + 1]
  const i32* table_rows;      // [n_sequences]: row of block_tables
  const i32* first_partitions;   // [n_sequences]: partitions of PARTITION positions of the sequences before it, in the scratch
  const i32* block_tables;    // [slots, table_width]: cache block numbers
  const float* q;             // [n_tokens, n_heads, head_dim]
  const f16_bits* k_cache;    // as in RopeStoreArguments
  const f16_bits* v_cache;
  Activation out;             // [n_tokens, n_heads * value_dim]
  float* scratch;             // partial results of a context split over several workgroups (scratch_bytes of them)
  i64 scratch_bytes;
  i32 n_heads, n_kv_heads, head_dim, value_dim;
  i32 block_size, table_width;
  float scale;
  i32 max_sequences;          // no step has more
  i32 splits;                 // workgroups that share a long context on a GPU; the launch sets it
  i32 reserved;
};

// How one output row is sampled. Adjustments first_adjustment .. end_adjustment - 1 are those of this row.
struct SamplingRow {
  u64 seed;                // with `draw`, fixes the random number: the same logits give the same token in any batch
  i32 draw;                // how many tokens of the sequence were generated before this one
  float temperature;       // 0: the largest logit, lowest id first
  i32 top_k;               // 0: all
  float top_p;             // 1: all
  float min_p;             // 0: all
  float repeat_penalty;    // 1: none. Divides positive and multiplies negative logits of tokens seen
  float presence_penalty;  // subtracted once from tokens generated before
  float frequency_penalty; // subtracted for every time a token was generated before
  i32 first_adjustment, end_adjustment;
  i32 slot;                // of the sequence, while it runs
  i32 count_newest;        // 1: the token sampled last in the slot is not yet among the adjustments, and counts too
};

struct Adjustment {
  i32 token;
  i32 seen;        // times in prompt and output
  i32 generated;   // times in the output
  float bias;      // added to the logit
};

// Order: bias and penalties, then (temperature > 0) top-k, top-p, min-p on the probabilities, temperature, one draw.
struct SampleArguments {
  const Step* step;
  float* logits;                    // [n_outputs, n_vocab], changed in place
  const SamplingRow* rows;          // [n_outputs]
  const Adjustment* adjustments;    // of a row, each of another token
  i32* newest;                      // [slots]: the token sampled last in each, read where count_newest is set, then written
  i32* tokens;                      // [n_outputs]: -1 where the largest logit is not finite
  float* logprobs;                  // [n_outputs]: natural logarithm of softmax(raw logits) at the token
  i32* top_tokens;                  // [n_outputs, n_top]: the n_top most probable by raw logits, best first
  float* top_logprobs;              // [n_outputs, n_top]
  i32 n_vocab;
  i32 n_top;                        // 0 to MAX_TOP_LOGPROBS
};

// Copying and filling within recorded graphs, as operations of their own; the CPU device alone has them.
struct CopyArguments {
  void* destination;
  const void* source;
  i64 nbytes;
};
struct FillArguments {
  void* destination;
  i64 nbytes;
  i32 byte;
  i32 reserved;
};

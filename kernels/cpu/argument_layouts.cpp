#include "cpu/argument_layouts.h"

#include "common/arguments.h"

namespace redshard {

#define FIELD(structure, field) {#field, offsetof(structure, field), sizeof(structure::field)}

std::vector<StructLayout> argument_layouts() {
  return {
      {"Step",
       {FIELD(Step, n_tokens), FIELD(Step, n_sequences), FIELD(Step, n_outputs), FIELD(Step, n_changes)}},
      {"Activation",
       {FIELD(Activation, values), FIELD(Activation, quants), FIELD(Activation, scales),
        FIELD(Activation, sums)}},
      {"Matrix",
       {FIELD(Matrix, data), FIELD(Matrix, bias), FIELD(Matrix, type), FIELD(Matrix, n_rows)}},
      {"TableChange", {FIELD(TableChange, place), FIELD(TableChange, block)}},
      {"SetTablesArguments",
       {FIELD(SetTablesArguments, step), FIELD(SetTablesArguments, changes), FIELD(SetTablesArguments, tables)}},
      {"EmbedArguments",
       {FIELD(EmbedArguments, step), FIELD(EmbedArguments, token_ids), FIELD(EmbedArguments, newest),
        FIELD(EmbedArguments, table), FIELD(EmbedArguments, out), FIELD(EmbedArguments, width), FIELD(EmbedArguments, scale)}},
      {"RmsNormArguments",
       {FIELD(RmsNormArguments, step), FIELD(RmsNormArguments, x), FIELD(RmsNormArguments, rows),
        FIELD(RmsNormArguments, weight), FIELD(RmsNormArguments, out), FIELD(RmsNormArguments, width),
        FIELD(RmsNormArguments, eps)}},
      {"MatmulArguments",
       {FIELD(MatmulArguments, step), FIELD(MatmulArguments, x), FIELD(MatmulArguments, w),
        FIELD(MatmulArguments, y), FIELD(MatmulArguments, n_matrices), FIELD(MatmulArguments, width),
        FIELD(MatmulArguments, accumulate), FIELD(MatmulArguments, over_outputs)}},
      {"SwigluArguments",
       {FIELD(SwigluArguments, step), FIELD(SwigluArguments, x), FIELD(SwigluArguments, gate),
        FIELD(SwigluArguments, up), FIELD(SwigluArguments, out), FIELD(SwigluArguments, width),
        FIELD(SwigluArguments, reserved)}},
      {"RopeStoreArguments",
       {FIELD(RopeStoreArguments, step), FIELD(RopeStoreArguments, positions),
        FIELD(RopeStoreArguments, slots), FIELD(RopeStoreArguments, q), FIELD(RopeStoreArguments, k),
        FIELD(RopeStoreArguments, v), FIELD(RopeStoreArguments, q_norm), FIELD(RopeStoreArguments, k_norm),
        FIELD(RopeStoreArguments, rotary), FIELD(RopeStoreArguments, k_cache),
        FIELD(RopeStoreArguments, v_cache), FIELD(RopeStoreArguments, n_heads),
        FIELD(RopeStoreArguments, n_kv_heads), FIELD(RopeStoreArguments, head_dim),
        FIELD(RopeStoreArguments, value_dim), FIELD(RopeStoreArguments, n_rot),
        FIELD(RopeStoreArguments, neox), FIELD(RopeStoreArguments, block_size),
        FIELD(RopeStoreArguments, eps)}},
      {"AttentionArguments",
       {FIELD(AttentionArguments, step), FIELD(AttentionArguments, positions),
        FIELD(AttentionArguments, sequences), FIELD(AttentionArguments, query_starts),
        FIELD(AttentionArguments, table_rows),
        FIELD(AttentionArguments, first_partitions), FIELD(AttentionArguments, block_tables), FIELD(AttentionArguments, q),
        FIELD(AttentionArguments, k_cache), FIELD(AttentionArguments, v_cache),
        FIELD(AttentionArguments, out), FIELD(AttentionArguments, scratch),
        FIELD(AttentionArguments, scratch_bytes), FIELD(AttentionArguments, n_heads),
        FIELD(AttentionArguments, n_kv_heads), FIELD(AttentionArguments, head_dim),
        FIELD(AttentionArguments, value_dim), FIELD(AttentionArguments, block_size),
        FIELD(AttentionArguments, table_width), FIELD(AttentionArguments, scale),
        FIELD(AttentionArguments, max_sequences), FIELD(AttentionArguments, splits),
        FIELD(AttentionArguments, reserved)}},
      {"SamplingRow",
       {FIELD(SamplingRow, seed), FIELD(SamplingRow, draw), FIELD(SamplingRow, temperature),
        FIELD(SamplingRow, top_k), FIELD(SamplingRow, top_p), FIELD(SamplingRow, min_p),
        FIELD(SamplingRow, repeat_penalty), FIELD(SamplingRow, presence_penalty),
        FIELD(SamplingRow, frequency_penalty), FIELD(SamplingRow, first_adjustment),
        FIELD(SamplingRow, end_adjustment), FIELD(SamplingRow, slot), FIELD(SamplingRow, count_newest)}},
      {"Adjustment",
       {FIELD(Adjustment, token), FIELD(Adjustment, seen), FIELD(Adjustment, generated),
        FIELD(Adjustment, bias)}},
      {"SampleArguments",
       {FIELD(SampleArguments, step), FIELD(SampleArguments, logits), FIELD(SampleArguments, rows),
        FIELD(SampleArguments, adjustments), FIELD(SampleArguments, newest), FIELD(SampleArguments, tokens),
        FIELD(SampleArguments, logprobs), FIELD(SampleArguments, top_tokens),
        FIELD(SampleArguments, top_logprobs), FIELD(SampleArguments, n_vocab),
        FIELD(SampleArguments, n_top)}},
  };
}

#undef FIELD

}  // namespace redshard

// What callers of `attention` need to know beside its arguments.
#pragma once
#include "common/types.h"

namespace redshard {

// Bytes of scratch for steps of up to `rows` tokens over up to `max_context` positions. Steps that would need more are
// computed without splitting contexts: results are the same, and so many rows keep the threads busy anyway.
i64 attention_scratch_bytes(i64 rows, i64 n_heads, i64 value_dim, i64 max_context);

}  // namespace redshard

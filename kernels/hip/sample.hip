// Sampling: one token a row, with the log probabilities of the model. Meanings are those of cpu/sample.cpp, which also says
// what NaN and infinite logits do.
//
// A workgroup takes a row. Without temperature and filters it reads the row once. Every sum that a choice depends on is a sum
// of integers (counts, or probabilities in fixed point), so that the order of additions, and with it the number of lanes,
// decides nothing. Limits on count and mass are found by narrowing a range of logits with histograms; the draw, by narrowing
// a range of tokens.
#include "common/arguments.h"
#include "hip/prelude.h"

constexpr i32 SAMPLE_THREADS = 1024;
constexpr i32 SAMPLE_WAVES = SAMPLE_THREADS / WAVE;
constexpr i32 HELD = 4;                  // adjustments whose raw logit a thread keeps
constexpr i32 BINS = SAMPLE_THREADS;
constexpr float BINS_PER_UNIT = 32.0f;   // of logits below the largest; the last bin takes all that are 32 or more below
constexpr float MIN_TEMPERATURE = 1e-6f;
constexpr float LARGEST_FLOAT = 3.402823466e38f;
constexpr float INFINITE = __builtin_bit_cast(float, 0x7f800000u), NOT_A_NUMBER = __builtin_bit_cast(float, 0x7fc00000u);
constexpr float LN2 = 0.69314718056f;

struct Summary {
  float largest;   // -infinity where there is no other logit
  i32 token;       // the first with the largest logit
  float total;     // sum of exp(logit - largest)
};

// What the workgroup shares.
struct Board {
  u64 bin[BINS];
  u64 part[SAMPLE_WAVES];
  Summary summary[SAMPLE_WAVES];
  i32 picked;
  u64 before;              // sum of the bins before the picked one
  float raw;
  i32 newest;              // the token sampled last, if it counts and the adjustments do not list it; else -1
  i32 n_top;
  u32 top_key[MAX_TOP_LOGPROBS];
  i32 top_token[MAX_TOP_LOGPROBS];
};

struct Row {
  const float* logits;
  i32 n;
};

// Keeps the tokens above a key, and of those with that key the ones up to `last`.
struct Cut {
  u32 key;
  i32 last;
};

DEVICE inline bool is_finite(float x) { return absolute(x) <= LARGEST_FLOAT; }

// A logit as an integer of the same order. 0 stands for NaN; equal logits have equal keys.
constexpr u32 KEY_LOWEST = 1, KEY_MINUS_INFINITY = 0x007fffff;
DEVICE inline u32 key_of(float logit) {
  if (!(logit == logit)) return 0;
  const u32 bits = logit == 0.0f ? 0 : __builtin_bit_cast(u32, logit);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE inline float logit_of(u32 key) { return __builtin_bit_cast(float, key >> 31 ? key & 0x7fffffffu : ~key); }

DEVICE inline bool keeps(const Cut& cut, u32 key, i32 token) {
  return key > cut.key || (key == cut.key && token <= cut.last);
}
DEVICE inline Cut stricter(const Cut& a, const Cut& b) {
  return a.key > b.key || (a.key == b.key && a.last < b.last) ? a : b;
}

// e^x for x <= 0 in units of 2^-43, so that 2^20 of them fit a sum; 0 for NaN.
DEVICE inline u64 fixed_exponential(float x) {
  if (!(x > -40.0f)) return 0;
  const float n = round_even(x * 1.44269504f);
  const float fraction = multiply_add(x, 1.92596299e-8f, multiply_add(x, 1.44269504f, -n));   // x log2(e) - n
  const u32 mantissa = (u32)(exp2_fast(fraction) * 0x1p30f);
  return (u64)mantissa << 13 >> (i32)-n;
}

// f(token, logit) for the tokens begin + lane, begin + lane + n_lanes, ... below end, with BATCH loads in flight.
template <i32 BATCH = 4, typename F>
DEVICE inline void for_each_token(const Row& row, i32 begin, i32 end, i32 lane, i32 n_lanes, const F& f) {
  for (i32 first = begin + lane; first < end; first += BATCH * n_lanes) {
    float logit[BATCH];
#pragma unroll
    for (i32 i = 0; i < BATCH; i++) logit[i] = first + i * n_lanes < end ? row.logits[(u32)(first + i * n_lanes)] : 0.0f;
#pragma unroll
    for (i32 i = 0; i < BATCH; i++)
      if (first + i * n_lanes < end) f(first + i * n_lanes, logit[i]);
  }
}

DEVICE inline Summary merged(const Summary& a, const Summary& b) {
  const bool first = a.largest > b.largest || (a.largest == b.largest && a.token < b.token);
  const float largest = first ? a.largest : b.largest, difference = first ? b.largest - largest : a.largest - largest;
  const float total = first ? a.total : b.total, other = first ? b.total : a.total;
  return {largest, first ? a.token : b.token, total + (other > 0.0f ? other * exp_fast(difference) : 0.0f)};
}

DEVICE inline Summary summarize(const Row& row, Board& board) {
  Summary own = {-INFINITE, row.n, 0.0f};
  float shift = -LARGEST_FLOAT;   // the largest so far, or the least number
  for_each_token<16>(row, 0, row.n, thread_index(), SAMPLE_THREADS, [&](i32 token, float logit) {
    if (logit > own.largest) {
      own.largest = logit;
      own.token = token;
      const float next = logit > shift ? logit : shift;
      own.total *= exp_fast(shift - next);
      shift = next;
    }
    if (logit == logit) own.total += exp_fast(logit - shift);
  });
#pragma unroll
  for (i32 step = 1; step < WAVE; step *= 2) {
    const i32 lane = lane_index() ^ step;
    own = merged(own, {lane_read(own.largest, lane), lane_read(own.token, lane), lane_read(own.total, lane)});
  }
  if (lane_index() == 0) board.summary[wave_index()] = own;
  barrier();
  Summary all = board.summary[0];
  for (i32 w = 1; w < SAMPLE_WAVES; w++) all = merged(all, board.summary[w]);
  barrier();
  return {uniform(all.largest), uniform(all.largest == -INFINITE ? 0 : all.token), uniform(all.total)};
}

// Sums of weight(token, logit) over SAMPLE_WAVES equal parts of a range of tokens, in board.part; returns the whole sum.
template <typename W>
DEVICE inline u64 sum_parts(const Row& row, i32 begin, i32 end, const W& weight, Board& board) {
  const i32 size = (end - begin + SAMPLE_WAVES - 1) / SAMPLE_WAVES;
  const i32 first = begin + wave_index() * size, last = first + size < end ? first + size : end;
  u64 sum = 0;
  for_each_token(row, first, last, lane_index(), WAVE, [&](i32 token, float logit) { sum += weight(token, logit); });
  sum = wave_sum(sum);
  if (lane_index() == 0) board.part[wave_index()] = sum;
  barrier();
  u64 total = 0;
  for (i32 w = 0; w < SAMPLE_WAVES; w++) total += board.part[w];
  return uniform(total);
}

// The first token at which the sum of weights, in the order of the tokens, exceeds target(sum of all); the last token of the
// row where none does.
template <typename W, typename T>
DEVICE inline i32 find_token(const Row& row, const W& weight, const T& target_of, Board& board) {
  i32 begin = 0, end = row.n;
  u64 target = 0;
  for (bool whole = true; whole || end - begin > 1; whole = false) {
    const u64 total = sum_parts(row, begin, end, weight, board);
    if (whole) target = target_of(total);
    const bool none = target >= total;
    const i32 size = (end - begin + SAMPLE_WAVES - 1) / SAMPLE_WAVES;
    i32 part = 0;
    for (; part < SAMPLE_WAVES - 1 && target >= uniform(board.part[part]); part++) target -= uniform(board.part[part]);
    begin += part * size;
    end = begin + size < end ? begin + size : end;
    barrier();
    if (none) return row.n - 1;
  }
  return begin;
}

// Picks the bin where the running sum exceeds the target, the last one if none does, and takes what lies before it off the
// target.
DEVICE inline i32 pick_bin(u64& target, Board& board) {
  const u64 own = board.bin[thread_index()];
  u64 sum = own;   // of the wave's bins up to this lane's
#pragma unroll
  for (i32 step = 1; step < WAVE; step *= 2) {
    const u64 other = lane_read(sum, (lane_index() - step) & (WAVE - 1));
    if (lane_index() >= step) sum += other;
  }
  if (lane_index() == WAVE - 1) board.part[wave_index()] = sum;
  barrier();
  for (i32 w = 0; w < wave_index(); w++) sum += board.part[w];
  const bool last = thread_index() == BINS - 1;
  if (sum - own <= target && (target < sum || last)) {
    board.picked = thread_index();
    board.before = sum - own;
  }
  barrier();
  target -= uniform(board.before);
  return uniform(board.picked);
}

DEVICE inline void clear_bins(Board& board) {
  board.bin[thread_index()] = 0;
  barrier();
}

// Bins of equal width below the largest logit. The order of bins is that of falling logits.
DEVICE inline i32 distance_bin(float largest, float logit) {
  const float distance = (largest - logit) * BINS_PER_UNIT;
  if (!(distance < BINS - 1)) return BINS - 1;
  return distance > 0.0f ? (i32)distance : 0;
}

// The least key in a bin no further than `bin`; behind the largest logit's where there is none.
DEVICE inline u32 lowest_key(float largest, i32 bin) {
  u32 low = KEY_MINUS_INFINITY, high = key_of(largest) + 1;
  while (low < high) {
    const u32 middle = low + (high - low) / 2;
    if (distance_bin(largest, logit_of(middle)) <= bin) high = middle;
    else low = middle + 1;
  }
  return low;
}

// Cuts after the first token, in the order of falling logit and then rising id, at which the sum of weight(logit) exceeds the
// target. NaN has no weight.
template <typename W>
DEVICE inline Cut cut_at(const Row& row, float largest, const W& weight, u64 target, Board& board) {
  clear_bins(board);
  for_each_token(row, 0, row.n, thread_index(), SAMPLE_THREADS, [&](i32, float logit) {
    const i32 bin = distance_bin(largest, logit);
    if (bin < BINS - 1) atomic_add(&board.bin[bin], weight(logit));   // what lies in the last bin need not be known
  });
  barrier();
  const i32 bin = pick_bin(target, board);
  u32 low = bin == BINS - 1 ? KEY_LOWEST : lowest_key(largest, bin);
  u32 high = bin == 0 ? key_of(largest) : lowest_key(largest, bin - 1) - 1;

  while (low < high) {
    i32 shift = 0;
    while ((high - low) >> shift >= BINS) shift++;
    clear_bins(board);
    for_each_token(row, 0, row.n, thread_index(), SAMPLE_THREADS, [&](i32, float logit) {
      const u32 key = key_of(logit);
      if (key >= low && key <= high) atomic_add(&board.bin[(high - key) >> shift], weight(logit));
    });
    barrier();
    const u32 steps = (u32)pick_bin(target, board) << shift, width = ((u32)1 << shift) - 1;
    const u32 next = steps < high - low ? high - steps : low;
    low = next - low > width ? next - width : low;
    high = next;
  }
  const auto tie = [&](i32, float logit) { return key_of(logit) == low ? weight(logit) : 0; };
  return {low, find_token(row, tie, [&](u64) { return target; }, board)};
}

// The high half of a product.
DEVICE inline u64 multiply_high(u64 a, u64 b) {
  const u64 a0 = (u32)a, a1 = a >> 32, b0 = (u32)b, b1 = b >> 32;
  const u64 middle = a1 * b0 + (a0 * b0 >> 32);
  return a1 * b1 + (middle >> 32) + ((a0 * b1 + (u32)middle) >> 32);
}

// A number in [0, 1) in units of 2^-64: see cpu/sample.cpp.
DEVICE inline u64 mix(u64 z) {
  z += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}
DEVICE inline u64 random_fraction(u64 seed, i32 draw) {
  return mix(mix(seed) + (u64)(i64)draw * 0x9e3779b97f4a7c15u) >> 11 << 11;
}

// The greatest sum that falls short of `share` (below 1) of the total.
DEVICE inline u64 target_of_share(float share, u64 total) {
  if (!(share > 0.0f)) return 0;
  const u64 fraction = (u64)(u32)(share * 0x1p32f) << 32;
  const u64 product = multiply_high(fraction, total);
  return fraction * total == 0 && product > 0 ? product - 1 : product;
}

// What top-k, top-p and min-p leave of adjusted logits whose largest is finite.
DEVICE inline Cut filter(const SamplingRow& sampling, const Row& row, const Summary& summary, Board& board) {
  const float largest = summary.largest;
  Cut cut = {KEY_MINUS_INFINITY, -1};
#pragma unroll 1   // one copy of cut_at for the count (top-k), then the mass (top-p) of what the count leaves
  for (i32 by_mass = 0; by_mass < 2; by_mass++) {
    if (by_mass ? !(sampling.top_p < 1.0f) : sampling.top_k <= 0 || sampling.top_k >= row.n) continue;
    const auto weight = [&](float logit) { return by_mass ? fixed_exponential(logit - largest) : 1; };
    u64 target = (u64)sampling.top_k - 1;
    if (by_mass) {
      const auto kept = [&](i32 token, float logit) { return keeps(cut, key_of(logit), token) ? weight(logit) : 0; };
      target = target_of_share(sampling.top_p, sum_parts(row, 0, row.n, kept, board));
    }
    cut = stricter(cut, cut_at(row, largest, weight, target, board));
  }
  if (sampling.min_p > 1.0f) return {key_of(largest), summary.token};
  if (sampling.min_p > 0.0f) cut = stricter(cut, {key_of(largest + log2_fast(sampling.min_p) * LN2) - 1, -1});
  return cut;
}

DEVICE inline i32 draw_token(const SamplingRow& sampling, const Row& row, const Summary& summary, Board& board) {
  const Cut cut = filter(sampling, row, summary, board);
  const float temperature = sampling.temperature > MIN_TEMPERATURE ? sampling.temperature : MIN_TEMPERATURE;
  const float inverse_temperature = 1.0f / temperature;
  const auto weight = [&](i32 token, float logit) {
    return keeps(cut, key_of(logit), token) ? fixed_exponential((logit - summary.largest) * inverse_temperature) : 0;
  };
  const u64 random = random_fraction(sampling.seed, sampling.draw);
  return find_token(row, weight, [&](u64 total) { return multiply_high(random, total); }, board);
}

// Natural logarithm of the softmax at a raw logit.
DEVICE inline float logprob(const Summary& summary, float logit) {
  if (!is_finite(summary.largest)) return NOT_A_NUMBER;
  return (logit == logit ? logit : -INFINITE) - summary.largest - log2_fast(summary.total) * LN2;
}

DEVICE inline void list_top(const SampleArguments& a, const Row& row, const Summary& summary, Board& board) {
  const Cut cut = cut_at(row, summary.largest, [](float) { return (u64)1; }, a.n_top - 1, board);
  if (thread_index() == 0) board.n_top = 0;
  barrier();
  for_each_token(row, 0, row.n, thread_index(), SAMPLE_THREADS, [&](i32 token, float logit) {
    const u32 key = key_of(logit);
    if (key == 0 || !keeps(cut, key, token)) return;
    const i32 place = atomic_add(&board.n_top, 1);
    board.top_key[place] = key;
    board.top_token[place] = token;
  });
  barrier();
  const i32 i = thread_index(), n = board.n_top;
  i32* tokens = a.top_tokens + (i64)group_x() * a.n_top;
  float* logprobs = a.top_logprobs + (i64)group_x() * a.n_top;
  if (i < n) {
    i32 rank = 0;
    for (i32 j = 0; j < n; j++)
      rank += keeps({board.top_key[i], board.top_token[i]}, board.top_key[j], board.top_token[j]) && j != i;
    tokens[rank] = board.top_token[i];
    logprobs[rank] = logprob(summary, logit_of(board.top_key[i]));
  } else if (i < a.n_top) {   // fewer tokens than asked for
    tokens[i] = -1;
    logprobs[i] = -INFINITE;
  }
  barrier();
}

DEVICE inline float adjusted(float logit, const SamplingRow& sampling, const Adjustment& adjustment) {
  logit += adjustment.bias;
  if (adjustment.seen > 0) logit = logit > 0.0f ? logit / sampling.repeat_penalty : logit * sampling.repeat_penalty;
  if (adjustment.generated > 0)
    logit -= sampling.presence_penalty + sampling.frequency_penalty * (float)adjustment.generated;
  return logit;
}

// The raw logit from an adjusted one, but for rounding.
DEVICE inline float unadjusted(float logit, const SamplingRow& sampling, const Adjustment& adjustment) {
  if (adjustment.generated > 0)
    logit += sampling.presence_penalty + sampling.frequency_penalty * (float)adjustment.generated;
  if (adjustment.seen > 0) logit = logit > 0.0f ? logit * sampling.repeat_penalty : logit / sampling.repeat_penalty;
  return logit - adjustment.bias;
}

// The adjustments of a row, each of another token: those listed, with the token sampled last counted in, which is one more
// where they do not list it. They overwrite logits: a thread holds the raw ones of its first few.
struct Adjusted {
  const Adjustment* list;
  i32 n_listed, n, counted;   // `counted`: the token sampled last, or -1
  i32 unlisted;               // the same where it is not listed
  float raw[HELD];

  DEVICE_METHOD void count(const SampleArguments& a, const SamplingRow& sampling, Board& board) {
    list = a.adjustments + sampling.first_adjustment;
    n = n_listed = sampling.end_adjustment - sampling.first_adjustment;
    counted = unlisted = sampling.count_newest ? a.newest[sampling.slot] : -1;
    if (counted < 0) return;
    if (thread_index() == 0) board.newest = counted;
    barrier();
    for (i32 i = thread_index(); i < n_listed; i += SAMPLE_THREADS)
      if (list[i].token == counted) board.newest = -1;
    barrier();
    unlisted = uniform(board.newest);
    n = n_listed + 1;
  }

  DEVICE_METHOD Adjustment at(i32 i) const {
    if (i >= n_listed) return {unlisted, 1, 1, 0.0f};
    Adjustment adjustment = list[i];
    const i32 more = counted >= 0 && adjustment.token == counted;
    adjustment.seen += more;
    adjustment.generated += more;
    return adjustment;
  }

  // Of thread's adjustment number i, the token; -1 where there is no such adjustment or token.
  DEVICE_METHOD i32 token(i32 i, i32 n_vocab) const {
    const i32 token = i < n_listed ? list[i].token : i < n ? unlisted : -1;
    return token < n_vocab ? token : -1;
  }

  DEVICE_METHOD void apply(const SamplingRow& sampling, float* logits, i32 n_vocab) {
#pragma unroll
    for (i32 k = 0; k < HELD; k++) {
      const i32 i = thread_index() + k * SAMPLE_THREADS, t = token(i, n_vocab);
      if (t < 0) continue;
      raw[k] = logits[t];
      logits[t] = adjusted(raw[k], sampling, at(i));
    }
    for (i32 i = thread_index() + HELD * SAMPLE_THREADS; i < n; i += SAMPLE_THREADS) {
      const i32 t = token(i, n_vocab);
      if (t >= 0) logits[t] = adjusted(logits[t], sampling, at(i));
    }
    barrier();
  }

  DEVICE_METHOD float raw_logit(const SamplingRow& sampling, const Row& row, i32 wanted, Board& board) const {
    if (thread_index() == 0) board.raw = row.logits[wanted];
    barrier();
#pragma unroll
    for (i32 k = 0; k < HELD; k++)
      if (token(thread_index() + k * SAMPLE_THREADS, row.n) == wanted) board.raw = raw[k];
    for (i32 i = thread_index() + HELD * SAMPLE_THREADS; i < n; i += SAMPLE_THREADS)
      if (token(i, row.n) == wanted) board.raw = unadjusted(row.logits[wanted], sampling, at(i));
    barrier();
    return uniform(board.raw);
  }
};

// Grid: rows of logits.
KERNEL(sample, SAMPLE_THREADS)(const SampleArguments a) {
  SHARED Board board;
  const i32 index = group_x();
  if (index >= a.step->n_outputs) return;
  const SamplingRow sampling = a.rows[index];
  float* logits = a.logits + (i64)index * a.n_vocab;
  const Row row = {logits, a.n_vocab};
  const Summary raw = summarize(row, board);
  if (a.n_top > 0) list_top(a, row, raw, board);
  if (!is_finite(raw.largest)) {   // no distribution, so no token
    if (thread_index() == 0) {
      a.tokens[index] = a.newest[sampling.slot] = -1;
      a.logprobs[index] = NOT_A_NUMBER;
    }
    return;
  }

  Adjusted changes;
  changes.count(a, sampling, board);
  Summary summary = raw;
  if (changes.n > 0) {
    changes.apply(sampling, logits, a.n_vocab);
    summary = summarize(row, board);
  }
  i32 token = summary.token;
  if (sampling.temperature > 0.0f && is_finite(summary.largest)) token = draw_token(sampling, row, summary, board);
  const float logit = changes.raw_logit(sampling, row, token, board);
  if (thread_index() > 0) return;
  a.tokens[index] = a.newest[sampling.slot] = token;
  a.logprobs[index] = logprob(raw, logit);
}

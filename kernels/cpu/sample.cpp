// Sampling: one token a row, with the log probabilities of the model.
//
// A NaN logit counts as -infinity. A row whose largest logit is not finite has no distribution: its token is -1, and its
// log probabilities are NaN.
// Top-k, top-p and min-p all keep a beginning of the tokens in order of falling logit (then rising id); the shortest of
// them is kept. Top-p counts probabilities within what top-k kept. The draw walks what is kept in order of the ids.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/kernel_table.h"
#include "cpu/vector_ops.h"

namespace redshard {
namespace {

constexpr i64 kSegment = 4096;  // logits that one task looks at
constexpr float kMinTemperature = 1e-6f;  // below, the others' weights have long vanished
constexpr float kInfinity = INFINITY;

void check(const SampleArguments& a) {
  require(a.step && a.logits && a.rows && a.newest && a.tokens && a.logprobs,
          "step, logits, rows, newest, tokens and logprobs must be set");
  require(a.n_vocab > 0, "n_vocab must be positive");
  require(a.n_top >= 0 && a.n_top <= MAX_TOP_LOGPROBS, "n_top must be 0 to 20");
  require(a.n_top == 0 || (a.top_tokens && a.top_logprobs), "no room for the most probable tokens");
}

// What one task finds out about its segment of the raw logits.
struct Segment {
  float largest;
  i32 token;       // the first with that logit
  float weight;    // sum of exp(logit - largest)
  i32 n_top;
  float top_logits[MAX_TOP_LOGPROBS];
  i32 top_tokens[MAX_TOP_LOGPROBS];
};

Segment examine(const VectorOps& ops, const float* logits, i64 n, i32 first_token, i64 n_top) {
  Segment segment;
  i64 place;
  segment.largest = ops.largest(logits, n, &place);
  segment.token = first_token + static_cast<i32>(place);
  segment.weight = ops.exponentials(logits, n, segment.largest, 1.0f, nullptr);
  segment.n_top = static_cast<i32>(
      n_top ? ops.update_top(logits, n, first_token, n_top, 0, segment.top_logits, segment.top_tokens) : 0);
  return segment;
}

// A whole row from its segments, in order.
struct RowSummary {
  float largest = -kInfinity;
  i32 token = 0;        // the first with the largest logit
  double log_total = 0;  // logarithm of the sum of exp(logit); NaN without a finite largest logit

  RowSummary(const Segment* segments, i64 n) {
    for (i64 i = 0; i < n; ++i) {
      if (!(segments[i].largest > largest)) continue;
      largest = segments[i].largest;
      token = segments[i].token;
    }
    double total = 0;
    for (i64 i = 0; i < n; ++i) {
      if (segments[i].weight > 0) total += segments[i].weight * std::exp(double{segments[i].largest} - largest);
    }
    log_total = std::isfinite(largest) ? largest + std::log(total) : NAN;
  }
  float logprob(float logit) const {
    return static_cast<float>((std::isnan(logit) ? -kInfinity : logit) - log_total);
  }
};

void merge_top(const Segment* segments, i64 n_segments, const RowSummary& summary, i64 n_top, i32* tokens,
               float* logprobs) {
  std::vector<i32> next(n_segments, 0);  // of each segment's list, what is merged already
  i64 n_found = 0;
  for (; n_found < n_top; ++n_found) {
    i64 best = -1;
    for (i64 s = 0; s < n_segments; ++s) {
      if (next[s] == segments[s].n_top) continue;
      if (best < 0 || segments[s].top_logits[next[s]] > segments[best].top_logits[next[best]]) best = s;
    }
    if (best < 0) break;
    tokens[n_found] = segments[best].top_tokens[next[best]];
    logprobs[n_found] = summary.logprob(segments[best].top_logits[next[best]]);
    ++next[best];
  }
  for (i64 i = n_found; i < n_top; ++i) {  // fewer tokens than asked for
    tokens[i] = -1;
    logprobs[i] = -kInfinity;
  }
}

float adjusted(float logit, const SamplingRow& row, const Adjustment& adjustment) {
  logit += adjustment.bias;
  if (adjustment.seen > 0) logit = logit > 0 ? logit / row.repeat_penalty : logit * row.repeat_penalty;
  if (adjustment.generated > 0) {
    logit -= row.presence_penalty + row.frequency_penalty * static_cast<float>(adjustment.generated);
  }
  return logit;
}

// A number in [0, 1): the finalizer of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators,
// 2014) as a hash of the seed, then of the draw.
double uniform(u64 seed, i32 draw) {
  const auto mix = [](u64 z) {
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  };
  return static_cast<double>(mix(mix(seed) + static_cast<u64>(draw) * 0x9e3779b97f4a7c15u) >> 11) * 0x1p-53;
}

struct Candidate {
  float logit;
  i32 token;
};

// One row with a temperature: logits already adjusted, their largest finite.
class Draw {
 public:
  // candidates [n_vocab] and weights [kSegment] are memory to use.
  Draw(const VectorOps& ops, const SamplingRow& row, const float* logits, i64 n, float largest, Candidate* candidates,
       float* weights)
      : ops_(ops), row_(row), logits_(logits), n_(n), largest_(largest),
        inverse_temperature_(1.0f / std::max(row.temperature, kMinTemperature)), candidates_(candidates),
        weights_(weights) {}

  i32 token() {
    const double random = uniform(row_.seed, row_.draw);
    if (!limits_count() && !limits_mass() && !(row_.min_p > 0)) return draw_from_all(random);
    const i64 n_kept = keep(gather());
    return draw_from(n_kept, random);
  }

 private:
  static constexpr i32 kBuckets = 2048;         // of logits by their distance to the largest
  static constexpr float kBucketsPerUnit = 32;  // so the last one begins at e^-64 of the largest weight

  bool limits_count() const { return row_.top_k > 0 && row_.top_k < n_; }
  bool limits_mass() const { return row_.top_p < 1; }

  // Probability in proportion to the largest one.
  double weight(float logit) const { return std::exp(double{logit} - largest_); }

  double total_weight(float inverse_temperature, std::vector<float>* of_segments) const {
    double total = 0;
    for (i64 start = 0; start < n_; start += kSegment) {
      const float sum = ops_.exponentials(logits_ + start, std::min(kSegment, n_ - start), largest_,
                                          inverse_temperature, nullptr);
      if (of_segments) of_segments->push_back(sum);
      total += sum;
    }
    return total;
  }

  i32 bucket(float logit) const {
    return static_cast<i32>(std::min((largest_ - logit) * kBucketsPerUnit, static_cast<float>(kBuckets - 1)));
  }

  // The last bucket that can hold a token that is kept, from counts and the least weight a bucket's token can have.
  i32 last_bucket() const {
    std::vector<i32> counts(kBuckets, 0);
    for (i64 i = 0; i < n_; ++i) {
      if (logits_[i] > -kInfinity) ++counts[bucket(logits_[i])];
    }
    i32 last = kBuckets - 1;
    if (limits_count()) {
      i64 count = 0;
      for (last = 0; last < kBuckets - 1 && (count += counts[last]) < row_.top_k; ++last) {
      }
    } else if (limits_mass()) {
      const double wanted = row_.top_p * total_weight(1.0f, nullptr) * (1 + 1e-4);
      double mass = 0;
      for (last = 0; last < kBuckets - 1; ++last) {
        mass += counts[last] * std::exp(-(last + 1) / double{kBucketsPerUnit});
        if (mass >= wanted) break;
      }
    }
    const bool whole_count_needed = limits_count() && limits_mass();  // top-p is a share of what top-k keeps
    if (row_.min_p > 0 && row_.min_p <= 1 && !whole_count_needed) {
      last = std::min(last, bucket(largest_ + std::log(row_.min_p)) + 1);
    }
    return last;
  }

  // Candidates that contain all tokens to keep, in falling order. Returns how many.
  i64 gather() const {
    const i32 last = last_bucket();
    i64 n = 0;
    for (i64 i = 0; i < n_; ++i) {
      if (logits_[i] > -kInfinity && bucket(logits_[i]) <= last) candidates_[n++] = {logits_[i], static_cast<i32>(i)};
    }
    std::sort(candidates_, candidates_ + n, [](const Candidate& a, const Candidate& b) {
      return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
    });
    return n;
  }

  // How many of the sorted candidates are kept.
  i64 keep(i64 n) const {
    if (limits_count()) n = std::min(n, i64{row_.top_k});
    if (limits_mass()) {
      double total = 0, mass = 0;
      if (limits_count()) {
        for (i64 i = 0; i < n; ++i) total += weight(candidates_[i].logit);
      } else {
        total = total_weight(1.0f, nullptr);
      }
      i64 kept = 0;
      while (kept < n) {
        mass += weight(candidates_[kept++].logit);
        if (mass >= row_.top_p * total) break;
      }
      n = kept;
    }
    if (row_.min_p > 0) {
      i64 kept = 1;
      while (kept < n && weight(candidates_[kept].logit) >= row_.min_p) ++kept;
      n = kept;
    }
    return n;
  }

  i32 draw_from(i64 n, double random) const {
    std::sort(candidates_, candidates_ + n, [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
    const auto weight_at = [this](const Candidate& c) {
      return std::exp((double{c.logit} - largest_) * inverse_temperature_);
    };
    double total = 0;
    for (i64 i = 0; i < n; ++i) total += weight_at(candidates_[i]);
    double left = random * total;
    i32 token = candidates_[0].token;
    for (i64 i = 0; i < n && left >= 0; ++i) {
      const double w = weight_at(candidates_[i]);
      if (w > 0) token = candidates_[i].token;
      left -= w;
    }
    return token;
  }

  // As draw_from, with every token kept: finds the segment first, then the token in it.
  i32 draw_from_all(double random) const {
    std::vector<float> sums;
    double left = random * total_weight(inverse_temperature_, &sums);
    std::size_t chosen = 0;
    for (std::size_t s = 0; s < sums.size() && left >= 0; ++s) {
      if (!(sums[s] > 0)) continue;
      chosen = s;
      if (left < sums[s]) break;
      left -= sums[s];
    }
    const i64 start = static_cast<i64>(chosen) * kSegment, n = std::min(kSegment, n_ - start);
    ops_.exponentials(logits_ + start, n, largest_, inverse_temperature_, weights_);
    i64 place = 0;
    for (i64 i = 0; i < n && left >= 0; ++i) {
      if (weights_[i] > 0) place = i;
      left -= weights_[i];
    }
    return static_cast<i32>(start + place);
  }

  const VectorOps& ops_;
  const SamplingRow& row_;
  const float* logits_;
  i64 n_;
  float largest_, inverse_temperature_;
  Candidate* candidates_;
  float* weights_;
};

void sample_row(const VectorOps& ops, const SampleArguments& a, i64 index, const Segment* segments, i64 n_segments,
                Candidate* candidates, float* weights) {
  const SamplingRow& row = a.rows[index];
  float* logits = a.logits + index * a.n_vocab;
  const RowSummary summary(segments, n_segments);
  if (a.n_top) {
    merge_top(segments, n_segments, summary, a.n_top, a.top_tokens + index * a.n_top, a.top_logprobs + index * a.n_top);
  }

  if (!std::isfinite(summary.largest)) {
    a.tokens[index] = a.newest[row.slot] = -1;
    a.logprobs[index] = NAN;
    return;
  }

  std::vector<Candidate> raw;  // the logits that are about to change
  const auto adjust = [&](const Adjustment& adjustment) {
    if (adjustment.token < 0 || adjustment.token >= a.n_vocab) return;
    raw.push_back({logits[adjustment.token], adjustment.token});
    logits[adjustment.token] = adjusted(logits[adjustment.token], row, adjustment);
  };
  Adjustment newest = {row.count_newest ? a.newest[row.slot] : -1, 1, 1, 0};
  for (i64 i = row.first_adjustment; i < row.end_adjustment; ++i) {
    Adjustment adjustment = a.adjustments[i];
    if (adjustment.token == newest.token) {
      ++adjustment.seen;
      ++adjustment.generated;
      newest.token = -1;
    }
    adjust(adjustment);
  }
  adjust(newest);
  float largest = summary.largest;
  i64 token = summary.token;
  if (!raw.empty()) largest = ops.largest(logits, a.n_vocab, &token);
  if (row.temperature > 0 && std::isfinite(largest)) {
    token = Draw(ops, row, logits, a.n_vocab, largest, candidates, weights).token();
  }
  const auto changed =
      std::find_if(raw.begin(), raw.end(), [&](const Candidate& candidate) { return candidate.token == token; });
  a.tokens[index] = a.newest[row.slot] = static_cast<i32>(token);
  a.logprobs[index] = summary.logprob(changed == raw.end() ? logits[token] : changed->logit);
}

void run(ThreadPool& pool, Isa isa, const SampleArguments& a) {
  const VectorOps& ops = vector_ops(isa);
  const i64 n_rows = a.step->n_outputs, n_segments = (a.n_vocab + kSegment - 1) / kSegment;
  const i64 segment_bytes = n_rows * n_segments * sizeof(Segment);
  const i64 thread_bytes = a.n_vocab * sizeof(Candidate) + kSegment * sizeof(float);
  char* memory = static_cast<char*>(pool.workspace(segment_bytes + pool.size() * thread_bytes));
  auto* segments = reinterpret_cast<Segment*>(memory);

  pool.parallel_for(n_rows * n_segments, 1, [&](i64 begin, i64 end, int) {
    for (i64 task = begin; task < end; ++task) {
      const i64 start = task % n_segments * kSegment, n = std::min(kSegment, a.n_vocab - start);
      const float* logits = a.logits + task / n_segments * a.n_vocab + start;
      segments[task] = examine(ops, logits, n, static_cast<i32>(start), a.n_top);
    }
  });
  pool.parallel_for(n_rows, 1, [&](i64 begin, i64 end, int thread) {
    auto* candidates = reinterpret_cast<Candidate*>(memory + segment_bytes + thread * thread_bytes);
    auto* weights = reinterpret_cast<float*>(candidates + a.n_vocab);
    for (i64 row = begin; row < end; ++row) {
      sample_row(ops, a, row, segments + row * n_segments, n_segments, candidates, weights);
    }
  });
}

}  // namespace

const Kernel sample_kernel = make_kernel<SampleArguments, check, run>("sample");

}  // namespace redshard

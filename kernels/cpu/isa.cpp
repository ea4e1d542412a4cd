#include "cpu/isa.h"

#include <setjmp.h>
#include <signal.h>

#include <cmath>
#include <stdexcept>

#include "cpu/kernel_table.h"
#include "cpu/quantize.h"
#include "cpu/vector_ops.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace redshard {
namespace {

constexpr Isa kAll[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_vnni};

// What the CPU has and the operating system saves on a task switch. Source: Intel SDM, volume 2, CPUID and XGETBV.
bool is_advertised(Isa isa) {
  if (isa == Isa::portable) return true;
#if defined(__x86_64__)
  unsigned eax, ebx, ecx, edx, leaf7_ebx, leaf7_ecx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  const unsigned fma = 1u << 12, xsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29, leaf1 = fma | xsave | avx | f16c;
  if ((ecx & leaf1) != leaf1 || !__get_cpuid_count(7, 0, &eax, &leaf7_ebx, &leaf7_ecx, &edx)) return false;
  unsigned saved, saved_high;
  asm volatile("xgetbv" : "=a"(saved), "=d"(saved_high) : "c"(0));

  const unsigned avx2 = 1u << 5, bmi2 = 1u << 8, ymm_state = 0x6;
  const bool has_avx2 = (leaf7_ebx & (avx2 | bmi2)) == (avx2 | bmi2) && (saved & ymm_state) == ymm_state;
  const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  const unsigned zmm_state = 0xe6, vnni = 1u << 11;
  const bool has_avx512 = has_avx2 && (leaf7_ebx & avx512) == avx512 && (saved & zmm_state) == zmm_state;
  if (isa == Isa::avx2) return has_avx2;
  if (isa == Isa::avx512) return has_avx512;
  return has_avx512 && (leaf7_ecx & vnni);
#else
  return false;
#endif
}

bool is_compiled(Isa isa) {
  if (isa == Isa::avx2) return vector_ops_avx2() != nullptr;
  return isa == Isa::portable || vector_ops_avx512() != nullptr;
}

constexpr i64 kTrialWidth = 64, kTrialRows = 32;

// A norm, a quantization and products with 8-bit weights: some of every instruction set's own code.
struct Trial {
  i8 quants[kTrialWidth];
  float values[kTrialWidth], scales[2], sums[2], products[kTrialRows];

  void run(Isa isa) {
    float x[kTrialWidth], ones[kTrialWidth];
    for (i64 i = 0; i < kTrialWidth; ++i) {
      x[i] = static_cast<float>(i * 37 % 101) - 50.0f;
      ones[i] = 1.0f;
    }
    unsigned char weights[kTrialRows * 2 * 34];  // Q8_0: a float16 scale, here 1, and 32 quants
    for (i64 i = 0; i < i64{sizeof weights}; ++i) {
      weights[i] = i % 34 == 0 ? 0x00 : i % 34 == 1 ? 0x3c : static_cast<unsigned char>(i * 29);
    }
    const i32 q8_0 = 8;
    const Step step = {1, 1, 1, 0};
    const Activation row = {values, quants, scales, sums};
    const RmsNormArguments norm = {&step, x, nullptr, ones, row, kTrialWidth, 1e-6f};
    MatmulArguments matmul = {};
    matmul.step = &step;
    matmul.x = row;
    matmul.w[0] = {weights, nullptr, q8_0, kTrialRows};
    matmul.y[0] = products;
    matmul.n_matrices = 1;
    matmul.width = kTrialWidth;
    ThreadPool pool(1);
    rms_norm_kernel.run(pool, isa, &norm);
    matmul_kernel.run(pool, isa, &matmul);
  }

  bool agrees_with(const Trial& other) const {
    for (i64 i = 0; i < kTrialWidth; ++i) {
      if (quants[i] != other.quants[i]) return false;
    }
    for (i64 i = 0; i < kTrialRows; ++i) {
      if (!(std::fabs(products[i] - other.products[i]) <= 1e-3f * std::fabs(other.products[i]))) return false;
    }
    return true;
  }
};

thread_local sigjmp_buf trial_start;
thread_local bool trying = false;
struct sigaction handler_before;

void on_illegal_instruction(int number) {
  if (trying) siglongjmp(trial_start, 1);
  sigaction(number, &handler_before, nullptr);  // not ours: the instruction runs again, into the handler before us
}

bool survives(Isa isa, Trial& trial) {
  struct sigaction handler = {};
  handler.sa_handler = on_illegal_instruction;
  sigemptyset(&handler.sa_mask);
  if (sigaction(SIGILL, &handler, &handler_before) != 0) return false;
  volatile bool finished = false;
  if (sigsetjmp(trial_start, 1) == 0) {
    trying = true;
    trial.run(isa);
    finished = true;
  }
  trying = false;
  sigaction(SIGILL, &handler_before, nullptr);
  return finished;
}

std::vector<Isa> try_all() {
  Trial expected;
  expected.run(Isa::portable);
  std::vector<Isa> usable;
  for (const Isa isa : kAll) {
    Trial trial;
    if (is_advertised(isa) && is_compiled(isa) && survives(isa, trial) && trial.agrees_with(expected)) {
      usable.push_back(isa);
    }
  }
  return usable;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_vnni: return "avx512_vnni";
    default: return "portable";
  }
}

const std::vector<Isa>& usable_isas() {
  static const std::vector<Isa> usable = try_all();
  return usable;
}

Isa select_isa(const std::string& name) {
  const std::vector<Isa>& usable = usable_isas();
  if (name == "auto") return usable.back();
  std::string names = "auto";
  for (const Isa isa : usable) {
    if (name == isa_name(isa)) return isa;
    names += std::string(", ") + isa_name(isa);
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available here; these are: " + names);
}

}  // namespace redshard

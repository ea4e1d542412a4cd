// Matrix products with AVX-512 and its instruction for four products of bytes.
#include "cpu/matmul_swiglu.h"
#include "cpu/matmul_vectors_avx512.h"

namespace redshard {
namespace {

struct Avx512Vnni : Avx512 {
  // Its weights are unsigned: signed ones are made larger by 128.
  static constexpr bool has_signed_product = false;

  template <class F>
  static constexpr int words_in_partial = 8;
  using Partial = Ints;

  template <class F>
  static Ints add_products(Ints sum, Words codes, __m512i quants) {
    const Words weights = F::is_signed ? codes ^ 0x80808080 : codes;
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, quants);
  }

  static Ints finish(Ints sum) { return sum; }
};

}  // namespace

const StripKernels avx512_vnni_strip_kernels = {kernel_for<Avx512Vnni>, swiglu_strip};

}  // namespace redshard

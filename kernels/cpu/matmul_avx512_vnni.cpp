// Matrix products with AVX-512 and its instruction for four products of bytes.
#include "cpu/matmul_swiglu.h"
#include "cpu/matmul_vectors_avx512.h"

namespace redshard {
namespace {

struct Avx512Vnni : Avx512 {
  // Its weights are unsigned: signed ones are made larger by 128.
  static constexpr bool has_signed_product = false;

  template <class F, int R, int kWords>
  static void dots(const Words* w0, const Words* w1, const i8* x, i64 width, Ints (&dot)[R][2]) {
    for (int r = 0; r < R; ++r) dot[r][0] = dot[r][1] = Ints{};
    const Words sign = Words{} + (F::is_signed ? 0x80808080u : 0u);
#pragma GCC unroll 8
    for (int i = 0; i < kWords; ++i) {
      const __m512i w[2] = {(__m512i)(w0[i] ^ sign), (__m512i)(w1[i] ^ sign)};
      for (int r = 0; r < R; ++r) {
        const __m512i quants = broadcast_word(x + r * width + 4 * i);
        for (int c = 0; c < 2; ++c) dot[r][c] = (Ints)_mm512_dpbusd_epi32((__m512i)dot[r][c], w[c], quants);
      }
    }
  }
};

}  // namespace

const StripKernels avx512_vnni_strip_kernels = {kernel_for<Avx512Vnni>, swiglu_strip};

}  // namespace redshard

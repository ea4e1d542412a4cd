// Matrix products with AVX-512.
#include "cpu/matmul_swiglu.h"
#include "cpu/matmul_vectors_avx512.h"

namespace redshard {

const StripKernels avx512_strip_kernels = {kernel_for<Avx512>, swiglu_strip};

}  // namespace redshard

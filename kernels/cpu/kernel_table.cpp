#include "cpu/kernel_table.h"

namespace redshard {

const Kernel& checked_kernel(const std::string& name, const void* arguments, std::size_t argument_bytes) {
  static const Kernel* const kernels[] = {
      &set_tables_kernel, &embed_kernel, &rms_norm_kernel, &matmul_kernel, &swiglu_kernel, &rope_store_kernel,
      &attention_kernel, &sample_kernel,   &copy_kernel,   &fill_kernel,
  };
  for (const Kernel* kernel : kernels) {
    if (name != kernel->name) continue;
    if (argument_bytes != kernel->argument_bytes) {
      throw std::invalid_argument(name + ": argument block of " + std::to_string(argument_bytes) + " bytes, expected " +
                                  std::to_string(kernel->argument_bytes));
    }
    try {
      kernel->check(arguments);
    } catch (const std::invalid_argument& problem) {
      throw std::invalid_argument(name + ": " + problem.what());
    }
    return *kernel;
  }
  throw std::invalid_argument("unknown kernel '" + name + "'");
}

}  // namespace redshard

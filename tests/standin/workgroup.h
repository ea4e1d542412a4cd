// Runs workgroups on the host, as kernels/hip/prelude_host.h wants it: every work-item is a fiber with a stack of its own.
#pragma once
#include <cstddef>

namespace standin {

struct Grid {
  unsigned x, y, z;
};

// A compiled kernel: it takes `argument_bytes` bytes by value.
struct Kernel {
  void* entry;
  std::size_t argument_bytes;
};

// Runs all workgroups of a grid, in order, and returns when they are done.
void run_grid(const Kernel& kernel, Grid grid, unsigned threads, unsigned wave_size, const void* arguments);

}  // namespace standin

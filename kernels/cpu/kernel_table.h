// The operations of the CPU device by name: what checks an argument block, and what runs it.
#pragma once
#include <cstddef>
#include <stdexcept>
#include <string>

#include "common/arguments.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"

namespace redshard {

struct Kernel {
  const char* name;
  std::size_t argument_bytes;
  // Throws std::invalid_argument for values that no step could make valid: unknown types, sizes that do not fit.
  void (*check)(const void* arguments);
  void (*run)(ThreadPool& pool, Isa isa, const void* arguments);
};

// A kernel from functions that take the argument block by its own type.
template <class Arguments, void (*check)(const Arguments&), void (*run)(ThreadPool&, Isa, const Arguments&)>
constexpr Kernel make_kernel(const char* name) {
  return {name, sizeof(Arguments),
          [](const void* arguments) { check(*static_cast<const Arguments*>(arguments)); },
          [](ThreadPool& pool, Isa isa, const void* arguments) {
            run(pool, isa, *static_cast<const Arguments*>(arguments));
          }};
}

// One per operation: `swiglu` in matmul.cpp, `copy` and `fill` in memory.cpp, the others in the file of their name.
extern const Kernel set_tables_kernel, embed_kernel, rms_norm_kernel, matmul_kernel, swiglu_kernel, rope_store_kernel, attention_kernel,
    sample_kernel, copy_kernel, fill_kernel;

// Throws std::invalid_argument for an unknown name, a block of another size, and whatever the kernel's check refuses.
const Kernel& checked_kernel(const std::string& name, const void* arguments, std::size_t argument_bytes);

// For checks: throws std::invalid_argument(problem) unless the condition holds; the kernel's name is put before it.
inline void require(bool condition, const char* problem) {
  if (!condition) throw std::invalid_argument(problem);
}

}  // namespace redshard

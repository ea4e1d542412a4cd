// Memory of the CPU device: whole pages from the operating system, given back to it at once when freed.
#pragma once
#include <cstddef>
#include <cstdint>

namespace redshard {

// Zeroed memory aligned to `alignment` bytes (a power of two, at least a page is used), with huge pages asked for where
// they fit. Throws std::bad_alloc when there is none, std::invalid_argument for another alignment.
std::uintptr_t allocate(std::size_t nbytes, std::size_t alignment);

// Throws std::invalid_argument for an address that `allocate` did not give or that was freed before.
void free_allocation(std::uintptr_t address);

}  // namespace redshard

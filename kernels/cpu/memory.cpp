#include "cpu/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <unordered_map>

#include "cpu/kernel_table.h"

namespace redshard {
namespace {

constexpr std::size_t kPage = 4096, kHugePage = std::size_t{2} << 20;
constexpr i64 kCopyGrain = i64{1} << 20;

std::mutex allocations_mutex;
std::unordered_map<std::uintptr_t, std::size_t> allocations;  // address -> bytes mapped

void check_copy(const CopyArguments& a) {
  require(a.nbytes >= 0, "nbytes must not be negative");
  require(a.nbytes == 0 || (a.destination && a.source), "null address");
}

void run_copy(ThreadPool& pool, Isa, const CopyArguments& a) {
  const i64 distance = static_cast<char*>(a.destination) - static_cast<const char*>(a.source);
  if (distance > -a.nbytes && distance < a.nbytes) {  // overlapping: the order matters, so one thread does it
    std::memmove(a.destination, a.source, static_cast<std::size_t>(a.nbytes));
    return;
  }
  pool.parallel_for(a.nbytes, kCopyGrain, [&](i64 begin, i64 end, int) {
    std::memcpy(static_cast<char*>(a.destination) + begin, static_cast<const char*>(a.source) + begin,
                static_cast<std::size_t>(end - begin));
  });
}

void check_fill(const FillArguments& a) {
  require(a.nbytes >= 0, "nbytes must not be negative");
  require(a.nbytes == 0 || a.destination, "null address");
  require(a.byte >= 0 && a.byte <= 255, "not a byte value");
}

void run_fill(ThreadPool& pool, Isa, const FillArguments& a) {
  pool.parallel_for(a.nbytes, kCopyGrain, [&](i64 begin, i64 end, int) {
    std::memset(static_cast<char*>(a.destination) + begin, a.byte, static_cast<std::size_t>(end - begin));
  });
}

}  // namespace

const Kernel copy_kernel = make_kernel<CopyArguments, check_copy, run_copy>("copy");
const Kernel fill_kernel = make_kernel<FillArguments, check_fill, run_fill>("fill");

std::uintptr_t allocate(std::size_t nbytes, std::size_t alignment) {
  if (alignment == 0 || (alignment & (alignment - 1))) throw std::invalid_argument("alignment is not a power of two");
  alignment = std::max(alignment, nbytes >= kHugePage ? kHugePage : kPage);
  const std::size_t size = (std::max(nbytes, std::size_t{1}) + kPage - 1) / kPage * kPage;
  if (size < nbytes || size + alignment < size) throw std::bad_alloc();

  // Map enough to find an aligned start in it, then give back what lies before and behind.
  void* mapped = mmap(nullptr, size + alignment, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  const auto start = reinterpret_cast<std::uintptr_t>(mapped);
  const std::uintptr_t address = (start + alignment - 1) & ~(static_cast<std::uintptr_t>(alignment) - 1);
  if (address > start) munmap(mapped, address - start);
  munmap(reinterpret_cast<void*>(address + size), start + alignment - address);
#if defined(MADV_HUGEPAGE)
  if (size >= kHugePage) madvise(reinterpret_cast<void*>(address), size, MADV_HUGEPAGE);  // only advice: may fail
#endif
  std::lock_guard<std::mutex> lock(allocations_mutex);
  allocations.emplace(address, size);
  return address;
}

void free_allocation(std::uintptr_t address) {
  std::size_t size = 0;
  {
    std::lock_guard<std::mutex> lock(allocations_mutex);
    const auto found = allocations.find(address);
    if (found == allocations.end()) throw std::invalid_argument("not the address of an allocation");
    size = found->second;
    allocations.erase(found);
  }
  munmap(reinterpret_cast<void*>(address), size);
}

}  // namespace redshard

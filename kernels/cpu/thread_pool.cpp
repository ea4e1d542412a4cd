#include "cpu/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <cstdint>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace redshard {
namespace {

using Clock = std::chrono::steady_clock;

// Longer than the gaps between the operations of a step, shorter than those between steps of a pipeline.
constexpr auto kSpinTime = std::chrono::microseconds(50);
constexpr u64 kChunkMask = 0xffffffffu;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until done() holds; gives up after kSpinTime.
template <class Done>
bool spin_until(const Done& done) {
  const auto deadline = Clock::now() + kSpinTime;
  do {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      pause();
    }
  } while (Clock::now() < deadline);
  return false;
}

}  // namespace

ThreadPool::ThreadPool(int n_threads) {
  for (int thread = 1; thread < n_threads; ++thread) threads_.emplace_back([this, thread] { work(thread); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(const Loop& loop) {
  // The counter has 32 bits for chunks; loops anywhere near that many get larger chunks.
  loop_ = loop;
  loop_.grain = std::max(loop.grain, loop.n / i64{0x7fffffff} + 1);
  const i64 n_chunks = (loop_.n + loop_.grain - 1) / loop_.grain;
  unfinished_.store(n_chunks, std::memory_order_relaxed);
  const u64 number = (unclaimed_.load(std::memory_order_relaxed) >> 32) + 1;
  unclaimed_.store(number << 32 | static_cast<u64>(n_chunks));  // sequentially consistent, before sleepers_ is read
  if (sleepers_.load() > 0) {
    // Taking the lock makes sure that a thread between its last look and its sleep is not missed.
    { std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_all();
  }
  run_chunks(0);
  const auto finished = [this] { return unfinished_.load(std::memory_order_acquire) == 0; };
  while (!spin_until(finished)) std::this_thread::yield();  // the thread we wait for may need this very core
}

void ThreadPool::run_chunks(int thread) {
  i64 n_done = 0;
  u64 seen = unclaimed_.load(std::memory_order_acquire);
  while (seen & kChunkMask) {
    if (!unclaimed_.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel)) continue;
    const i64 n_chunks = (loop_.n + loop_.grain - 1) / loop_.grain;
    const i64 begin = (n_chunks - static_cast<i64>(seen & kChunkMask)) * loop_.grain;
    loop_.body(loop_.context, begin, std::min(begin + loop_.grain, loop_.n), thread);
    ++n_done;
    seen = unclaimed_.load(std::memory_order_acquire);
  }
  if (n_done) unfinished_.fetch_sub(n_done, std::memory_order_acq_rel);
}

bool ThreadPool::wait_for_chunks() {
  const auto ready = [this] {
    return (unclaimed_.load(std::memory_order_acquire) & kChunkMask) != 0 || stopping_.load();
  };
  if (!spin_until(ready)) {
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleepers_;
    wake_.wait(lock, [this] { return (unclaimed_.load() & kChunkMask) != 0 || stopping_.load(); });
    --sleepers_;
  }
  return !stopping_.load();
}

void ThreadPool::work(int thread) {
  while (wait_for_chunks()) run_chunks(thread);
}

void* ThreadPool::workspace(std::size_t nbytes) {
  constexpr std::size_t kAlignment = 64;
  if (workspace_bytes_ < nbytes) {
    workspace_bytes_ = 0;
    workspace_.reset(new char[nbytes + kAlignment]);
    workspace_bytes_ = nbytes;
  }
  const auto address = reinterpret_cast<std::uintptr_t>(workspace_.get());
  return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
}

}  // namespace redshard

// A pool of threads that share the chunks of one loop at a time.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "common/types.h"

namespace redshard {

// Work is claimed chunk by chunk from one atomic counter: a thread that its core is slow to run takes fewer chunks, and
// a loop never waits for a thread that has claimed none. Idle threads watch the counter for some tens of microseconds,
// then sleep, because several workers may share a machine.
class ThreadPool {
 public:
  // Threads 1 .. n_threads - 1 are started here; the caller of `parallel_for` is thread 0.
  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(threads_.size()) + 1; }

  // Calls body(begin, end, thread) for consecutive ranges of `grain` items that cover 0 .. n, and returns when all have
  // run. A single range runs on the caller at once, so small loops cost nothing. If the body throws, whatever was thrown
  // first is thrown again here when all ranges have run or thrown. The body must not call parallel_for; ranges and their
  // results may not depend on which thread runs them.
  template <class Body>
  void parallel_for(i64 n, i64 grain, const Body& body) {
    if (n <= grain || threads_.empty()) {
      if (n > 0) body(i64{0}, n, 0);
      return;
    }
    Guarded<Body> guarded{body};
    run({[](void* context, i64 begin, i64 end, int thread) {
           static_cast<Guarded<Body>*>(context)->call(begin, end, thread);
         },
         &guarded, n, grain});
    if (guarded.error) std::rethrow_exception(guarded.error);
  }

  // Memory for a kernel's intermediate results, 64-byte aligned, until the next call. Ask outside of parallel_for.
  void* workspace(std::size_t nbytes);

 private:
  // An exception may not leave a thread of the pool: allocations in a body can fail, for instance.
  template <class Body>
  struct Guarded {
    const Body& body;
    std::atomic<bool> failed{false};
    std::exception_ptr error{};

    void call(i64 begin, i64 end, int thread) {
      try {
        body(begin, end, thread);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  };

  struct Loop {
    void (*body)(void* context, i64 begin, i64 end, int thread);
    void* context;
    i64 n, grain;
  };

  void run(const Loop& loop);
  void work(int thread);                // the life of thread `thread`
  void run_chunks(int thread);          // claims and runs chunks until none is left
  bool wait_for_chunks();               // false: the pool is being destroyed

  // High half: number of the loop. Low half: chunks nobody has claimed yet. Whoever lowers it owns that chunk, and the
  // loop cannot end before the owner is done, so only owners may read loop_.
  alignas(64) std::atomic<u64> unclaimed_{0};
  alignas(64) std::atomic<i64> unfinished_{0};
  alignas(64) Loop loop_{};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
  std::unique_ptr<char[]> workspace_;
  std::size_t workspace_bytes_ = 0;
};

// How many rows of `width` simple element operations are worth handing to another thread.
constexpr i64 rows_per_chunk(i64 width) { return width >= 8192 ? 1 : 8192 / width; }

}  // namespace redshard

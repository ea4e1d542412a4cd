// Fibers switch by hand, since a workgroup switches at every exchange between lanes: a few nanoseconds each.
// The stack layout is that of the System V ABI for x86-64: an argument of more than 16 bytes lies right above the return address.
#include "workgroup.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/types.h"

struct Fiber {   // as kernels/hip/prelude_host.h declares it
  i32 thread, group[3];
};
thread_local const Fiber* current_fiber = nullptr;

extern "C" void standin_switch(void** saved, void* next);
extern "C" void standin_return();
asm(R"(
.text
.globl standin_switch
standin_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.globl standin_return
standin_return:
  call standin_fiber_ended@PLT
)");

namespace standin {
namespace {

constexpr std::size_t STACK_BYTES = 48 << 10;
constexpr std::size_t STACK_STRIDE = STACK_BYTES + 1088;   // so that stacks do not all fall on the same cache lines
constexpr unsigned MAX_THREADS = 1024;
constexpr unsigned MAX_WAVE = 64;

enum class State { RUNNING, AT_BARRIER, ENDED };

struct WorkItem {
  Fiber fiber;
  void* stack_pointer;
  State state;
};

// Lanes exchange in rounds: each leaves its value and waits until all lanes that still run have left theirs. Two sets of
// values suffice, since no lane begins the round after next before all have read this one.
struct Wave {
  unsigned first, end;       // its work-items
  unsigned running;          // lanes neither ended nor at a barrier
  unsigned arrived;
  unsigned round;
  i32 value[2][MAX_WAVE];
};

class Workgroup {
 public:
  Workgroup() {
    const std::size_t nbytes = MAX_THREADS * STACK_STRIDE;
    void* memory = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) die("no memory for stacks");
    stacks_ = static_cast<char*>(memory);
  }

  void run(const Kernel& kernel, const i32 (&group)[3], unsigned threads, unsigned wave_size, const void* arguments) {
    items_.resize(threads);
    waves_.clear();
    live_ = threads;
    at_barrier_ = 0;
    for (unsigned i = 0; i < threads; i++) {
      if (i % wave_size == 0) waves_.push_back({i, i, 0, 0, 0, {}});
      waves_.back().end++;
      waves_.back().running++;
      items_[i] = {{static_cast<i32>(i), {group[0], group[1], group[2]}}, prepare_stack(i, kernel, arguments), State::RUNNING};
    }
    wave_size_ = wave_size;
    current_ = 0;
    current_fiber = &items_[0].fiber;
    standin_switch(&main_stack_pointer_, items_[0].stack_pointer);
  }

  void barrier() {
    Wave& wave = own_wave();
    items_[current_].state = State::AT_BARRIER;
    at_barrier_++;
    leave(wave);
    if (at_barrier_ == live_) release_barrier();
    while (items_[current_].state == State::AT_BARRIER) switch_to(next());
  }

  void wave_barrier() { exchange(0, 0); }

  i32 exchange(i32 value, i32 lane) {
    Wave& wave = own_wave();
    const unsigned round = wave.round;
    wave.value[round % 2][current_ - wave.first] = value;
    wave.arrived++;
    if (wave.arrived == wave.running) complete_round(wave);
    while (wave.round == round) switch_to(next());
    return wave.value[round % 2][static_cast<unsigned>(lane) % wave_size_];
  }

  [[noreturn]] void end() {
    items_[current_].state = State::ENDED;
    live_--;
    leave(own_wave());
    if (live_ == 0) standin_switch(&items_[current_].stack_pointer, main_stack_pointer_);
    if (at_barrier_ == live_) release_barrier();
    switch_to(next());
    die("a work-item that had ended ran on");
  }

 private:
  [[noreturn]] static void die(const char* what) {
    std::fprintf(stderr, "stand-in: %s\n", what);
    std::abort();
  }

  void* prepare_stack(unsigned i, const Kernel& kernel, const void* arguments) {
    char* top = stacks_ + i * STACK_STRIDE + STACK_BYTES;
    char* block = top - (kernel.argument_bytes + 15) / 16 * 16;
    std::memcpy(block, arguments, kernel.argument_bytes);
    void** frame = reinterpret_cast<void**>(block) - 8;   // six saved registers, the entry, the return address
    frame[6] = kernel.entry;
    frame[7] = reinterpret_cast<void*>(&standin_return);
    return frame;
  }

  Wave& own_wave() { return waves_[current_ / wave_size_]; }

  void leave(Wave& wave) {
    wave.running--;
    if (wave.arrived && wave.arrived == wave.running) complete_round(wave);
  }

  static void complete_round(Wave& wave) {
    wave.arrived = 0;
    wave.round++;
  }

  void release_barrier() {
    at_barrier_ = 0;
    for (unsigned i = 0; i < items_.size(); i++)
      if (items_[i].state == State::AT_BARRIER) {
        items_[i].state = State::RUNNING;
        waves_[i / wave_size_].running++;
      }
  }

  // The next work-item that can run: of this wave if it has one, else of the waves that follow.
  unsigned next() {
    const unsigned own = current_ / wave_size_;
    for (unsigned w = 0; w <= waves_.size(); w++) {
      const Wave& wave = waves_[(own + w) % waves_.size()];
      if (wave.running == 0) continue;
      const unsigned lanes = wave.end - wave.first, start = w == 0 ? current_ - wave.first + 1 : 0;
      for (unsigned n = 0; n < lanes; n++) {
        const unsigned i = wave.first + (start + n) % lanes;
        if (items_[i].state == State::RUNNING) return i;
      }
    }
    die("all work-items wait: a barrier that some never reach");
  }

  void switch_to(unsigned i) {
    if (i == current_) return;
    const unsigned previous = current_;
    current_ = i;
    current_fiber = &items_[i].fiber;
    standin_switch(&items_[previous].stack_pointer, items_[i].stack_pointer);
  }

  char* stacks_;
  std::vector<WorkItem> items_;
  std::vector<Wave> waves_;
  void* main_stack_pointer_ = nullptr;
  unsigned live_ = 0, at_barrier_ = 0, wave_size_ = 0, current_ = 0;
};

thread_local Workgroup workgroup;

}  // namespace

void run_grid(const Kernel& kernel, Grid grid, unsigned threads, unsigned wave_size, const void* arguments) {
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++)
        workgroup.run(kernel, {static_cast<i32>(x), static_cast<i32>(y), static_cast<i32>(z)}, threads, wave_size, arguments);
}

}  // namespace standin

extern "C" void standin_fiber_ended() { standin::workgroup.end(); }
void fiber_barrier() { standin::workgroup.barrier(); }
void fiber_wave_barrier() { standin::workgroup.wave_barrier(); }
i32 fiber_lane_read(i32 v, i32 lane) { return standin::workgroup.exchange(v, lane); }

// The Python module `redshard._cpu`: memory, and a runtime that launches kernels or replays recorded sequences of them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <mutex>

#include "cpu/attention.h"
#include "cpu/isa.h"
#include "cpu/kernel_table.h"
#include "cpu/memory.h"

namespace nb = nanobind;

namespace redshard {
namespace {

// A checked copy of an argument block and the kernel it is for.
class Launch {
 public:
  Launch(const std::string& name, const nb::bytes& arguments)
      : arguments_((arguments.size() + sizeof(u64) - 1) / sizeof(u64)) {
    std::memcpy(arguments_.data(), arguments.c_str(), arguments.size());
    kernel_ = &checked_kernel(name, arguments_.data(), arguments.size());
  }
  void run(ThreadPool& pool, Isa isa) const { kernel_->run(pool, isa, arguments_.data()); }

 private:
  std::vector<u64> arguments_;  // u64 for its alignment
  const Kernel* kernel_;
};

class Runtime {
 public:
  Runtime(int n_threads, const std::string& isa) : isa_(select_isa(isa)), pool_(checked(n_threads)) {}

  int n_threads() const { return pool_.size(); }
  const char* isa() const { return isa_name(isa_); }

  void run(const std::vector<Launch>& launches) {
    nb::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(mutex_);
    for (const Launch& launch : launches) launch.run(pool_, isa_);
  }

 private:
  static int checked(int n_threads) {
    if (n_threads < 1 || n_threads > 1024) throw std::invalid_argument("n_threads must be 1 to 1024");
    return n_threads;
  }

  std::mutex mutex_;
  Isa isa_;
  ThreadPool pool_;
};

struct Graph {
  Runtime& runtime;
  std::vector<Launch> launches;
};

}  // namespace
}  // namespace redshard

NB_MODULE(_cpu, module) {
  using namespace redshard;
  module.doc() = "Kernels and memory of the CPU device. Addresses are integers; nothing checks that they are valid.";

  module.def("allocate", &allocate, nb::arg("nbytes"), nb::arg("alignment"),
             "Address of `nbytes` zeroed bytes. Raises MemoryError, or ValueError for an alignment that is not a power "
             "of two.");
  module.def("free", &free_allocation, nb::arg("address"), nb::call_guard<nb::gil_scoped_release>(),
             "Give an allocation back. Raises ValueError for any other address.");
  module.def(
      "features",
      [] {
        std::vector<std::string> names;
        for (const Isa isa : usable_isas()) names.push_back(isa_name(isa));
        return names;
      },
      "Instruction sets that were tried and work here, slowest first.");
  module.def(
      "check", [](const std::string& kernel, const nb::bytes& arguments) { Launch(kernel, arguments); },
      nb::arg("kernel"), nb::arg("arguments"), "Raise ValueError where `launch` would, without running anything.");
  module.def("attention_scratch_bytes", &attention_scratch_bytes, nb::arg("rows"), nb::arg("n_heads"),
             nb::arg("value_dim"), nb::arg("max_context"),
             "Bytes of scratch with which `attention` can split long contexts over the threads.");

  nb::class_<Graph>(module, "Graph", "A recorded sequence of operations.")
      .def(
          "replay", [](const Graph& graph) { graph.runtime.run(graph.launches); },
          "Run the sequence, in order; returns when it is done.");

  nb::class_<Runtime>(module, "Runtime", "Threads that run kernels; one call at a time.")
      .def(nb::init<int, const std::string&>(), nb::arg("n_threads"), nb::arg("isa") = "auto",
           "Raises ValueError for a thread count or an instruction set that is not available.")
      .def_prop_ro("n_threads", &Runtime::n_threads)
      .def_prop_ro("isa", &Runtime::isa)
      .def(
          "launch",
          [](Runtime& runtime, const std::string& kernel, const nb::bytes& arguments) {
            runtime.run({Launch(kernel, arguments)});
          },
          nb::arg("kernel"), nb::arg("arguments"),
          "Run one operation; returns when it is done. Raises ValueError for an unknown name or bad arguments.")
      .def(
          "record",
          [](Runtime& runtime, const std::vector<std::pair<std::string, nb::bytes>>& operations) {
            std::vector<Launch> launches;
            for (const auto& [kernel, arguments] : operations) launches.emplace_back(kernel, arguments);
            return Graph{runtime, std::move(launches)};
          },
          nb::arg("operations"), nb::keep_alive<0, 1>(),
          "A graph of (kernel, arguments) in order. Raises ValueError as `launch` does.");
}

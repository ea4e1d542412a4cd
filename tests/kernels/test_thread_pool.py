"""What the CPU device's pool of threads promises beyond speed, in a program of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"
PROGRAM = r"""
#include <cstdio>
#include <stdexcept>
#include <string>
#include "cpu/thread_pool.h"

int main() {
  for (int n_threads : {1, 2, 4}) {
    redshard::ThreadPool pool(n_threads);
    for (int round = 0; round < 200; ++round) {
      std::string what;
      std::atomic<int> calls{0};
      try {
        pool.parallel_for(100, 1, [&](i64 begin, i64 end, int) {
          ++calls;
          if (end == n_threads || end == 100) throw std::runtime_error("part " + std::to_string(begin));
        });
      } catch (const std::runtime_error& error) {
        what = error.what();
      }
      if (what.rfind("part ", 0) != 0) return std::printf("%d threads: nothing thrown\n", n_threads), 1;
      if (n_threads > 1 && calls != 100) return std::printf("%d ranges ran\n", calls.load()), 1;
      std::atomic<long> sum{0};   // the pool is none the worse for it
      pool.parallel_for(1000, 7, [&](i64 begin, i64 end, int) {
        for (i64 i = begin; i < end; ++i) sum += i;
      });
      if (sum != 499500) return std::printf("%d threads: a sum of %ld\n", n_threads, sum.load()), 1;
    }
  }
}
"""


def test_what_a_range_throws_reaches_the_caller(tmp_path: Path) -> None:
    (tmp_path / "main.cpp").write_text(PROGRAM)
    program = tmp_path / "pool"
    sources = [tmp_path / "main.cpp", KERNELS / "cpu" / "thread_pool.cpp"]
    command = ["g++", "-std=c++17", "-O1", "-pthread", f"-I{KERNELS}", *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")

// Where the fields of the argument blocks lie, for comparison with other languages' declarations of them.
#pragma once
#include <cstddef>
#include <vector>

namespace redshard {

struct FieldLayout {
  const char* name;
  std::size_t offset, nbytes;
};
struct StructLayout {
  const char* name;
  std::vector<FieldLayout> fields;
};

std::vector<StructLayout> argument_layouts();

}  // namespace redshard

// Instruction sets a kernel may be written for, and which of them work on this machine.
#pragma once
#include <string>
#include <vector>

namespace redshard {

enum class Isa { portable, avx2, avx512, avx512_vnni };

const char* isa_name(Isa isa);

// The instruction sets that the CPU offers, that the operating system has switched on, and that gave right results when
// tried (some virtual machines advertise what they fault on). Slowest first; `portable` is always there.
const std::vector<Isa>& usable_isas();

// "auto" for the fastest, or a name. Throws std::invalid_argument for one that is unknown or does not work here.
Isa select_isa(const std::string& name);

}  // namespace redshard

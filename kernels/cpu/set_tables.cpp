#include "cpu/kernel_table.h"

namespace redshard {
namespace {

void check(const SetTablesArguments& a) { require(a.step && a.changes && a.tables, "step, changes and tables must be set"); }

void run(ThreadPool&, Isa, const SetTablesArguments& a) {
  for (i32 i = 0; i < a.step->n_changes; ++i) a.tables[a.changes[i].place] = a.changes[i].block;
}

}  // namespace

const Kernel set_tables_kernel = make_kernel<SetTablesArguments, check, run>("set_tables");

}  // namespace redshard

// The block tables, which stay on the device: a step brings the entries that changed.
#include "common/arguments.h"
#include "hip/prelude.h"

constexpr i32 TABLES_THREADS = 1024;

// One workgroup: a step changes an entry for every 32 tokens or so of a prompt, and hardly any while decoding.
KERNEL(set_tables, TABLES_THREADS)(const SetTablesArguments a) {
  wait_for_previous_launch();
  for (i32 i = thread_index(); i < a.step->n_changes; i += TABLES_THREADS) a.tables[a.changes[i].place] = a.changes[i].block;
}

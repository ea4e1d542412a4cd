// Moves a run of GGUF blocks into planes (see formats.h): of each kind of field the values of all blocks together.
#include "common/types.h"
#include "hip/prelude.h"

// Bytes offset .. offset + nbytes - 1 of every block; both are even.
struct PlaneField { i32 offset, nbytes; };

struct SplitPlanesArguments {
  const u16* blocks;   // [n_blocks, block_bytes / 2]
  u8* planes;          // of all blocks_in_all blocks, field after field
  i64 first_block;     // place of the run among them
  i64 blocks_in_all;
  i32 n_blocks;
  i32 block_bytes;
  i32 n_fields;
  i32 n_groups;        // of the launch
  PlaneField field[4];
};

constexpr i32 PLANES_THREADS = 256;

// A work-item moves two bytes at a time; the grid may be of any size.
KERNEL(split_planes, PLANES_THREADS)(const SplitPlanesArguments a) {
  const i64 pairs = a.block_bytes / 2, end = a.n_blocks * pairs, step = (i64)a.n_groups * PLANES_THREADS;
  for (i64 i = (i64)group_x() * PLANES_THREADS + thread_index(); i < end; i += step) {
    const i64 block = i / pairs;
    const i32 at = (i32)(i % pairs) * 2;
    i64 plane = 0;
    for (i32 f = 0; f < a.n_fields; f++) {
      const PlaneField field = a.field[f];
      if (at >= field.offset && at < field.offset + field.nbytes)
        *(u16*)(a.planes + plane + (a.first_block + block) * field.nbytes + at - field.offset) = a.blocks[i];
      plane += a.blocks_in_all * field.nbytes;
    }
  }
}

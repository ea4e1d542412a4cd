"""What an AMD code object says of itself: kernels, registers, memory, bytes to load.

Formats: LLVM, User Guide for AMDGPU Backend (code object V5 metadata, kernel descriptor).
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any

import msgpack
from elftools.elf.elffile import ELFFile

_SGPRS_OF_PROPERTY = (
    4,
    2,
    2,
    2,
    2,
    2,
    1,
)  # private segment buffer, dispatch, queue, kernarg, id, scratch, size
_KERNARG_PROPERTY = 3


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel of a code object.

    Attributes:
        vgprs, sgprs: registers.
        lds_bytes: static local data share of a workgroup.
        scratch_bytes: private memory of a work-item.
        spilled_vgprs, spilled_sgprs: registers that did not fit.
        kernarg_bytes: of the argument block, hidden arguments included.
        wave_size: lanes.
    """

    name: str
    vgprs: int
    sgprs: int
    lds_bytes: int
    scratch_bytes: int
    spilled_vgprs: int
    spilled_sgprs: int
    kernarg_bytes: int
    wave_size: int

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> Kernel:
        return cls(
            name=metadata[".name"],
            vgprs=metadata[".vgpr_count"],
            sgprs=metadata[".sgpr_count"],
            lds_bytes=metadata[".group_segment_fixed_size"],
            scratch_bytes=metadata[".private_segment_fixed_size"],
            spilled_vgprs=metadata[".vgpr_spill_count"],
            spilled_sgprs=metadata[".sgpr_spill_count"],
            kernarg_bytes=metadata[".kernarg_segment_size"],
            wave_size=metadata[".wavefront_size"],
        )


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a kernel descriptor tells the hardware.

    Attributes:
        entry: offset of the first instruction from the descriptor.
        resources: the word COMPUTE_PGM_RSRC2.
        user_sgprs: how many registers are set before a wave starts.
        kernarg_sgpr: the first of the two with the address of the arguments.
    """

    entry: int
    resources: int
    user_sgprs: int
    kernarg_sgpr: int

    @classmethod
    def parse(cls, descriptor: bytes) -> Descriptor:
        (entry,) = struct.unpack_from("<q", descriptor, 16)
        resources, properties = struct.unpack_from("<IH", descriptor, 52)
        before = [n for i, n in enumerate(_SGPRS_OF_PROPERTY[:_KERNARG_PROPERTY]) if properties >> i & 1]
        return cls(entry, resources, resources >> 1 & 0x1F, sum(before))


class CodeObject:
    """A linked code object.

    Attributes:
        kernels: by name.
        image: its loadable segments at their addresses from 0.
        text: address range of its instructions.
    """

    DESCRIPTOR_BYTES = 64

    def __init__(self, elf_bytes: bytes) -> None:
        elf = ELFFile(io.BytesIO(elf_bytes))
        segments = [s for s in elf.iter_segments() if s["p_type"] == "PT_LOAD"]
        self.image = bytearray(max(s["p_vaddr"] + s["p_memsz"] for s in segments))
        for segment in segments:
            self.image[segment["p_vaddr"] : segment["p_vaddr"] + segment["p_filesz"]] = segment.data()
        text = elf.get_section_by_name(".text")
        self.text = range(text["sh_addr"], text["sh_addr"] + text["sh_size"])
        self._symbols = {s.name: s["st_value"] for s in elf.get_section_by_name(".dynsym").iter_symbols()}
        notes = next(s for s in elf.iter_sections() if s["sh_type"] == "SHT_NOTE")
        metadata = next(note["n_descdata"] for note in notes.iter_notes())
        kernels = msgpack.unpackb(metadata, strict_map_key=False)["amdhsa.kernels"]
        self.kernels = {k[".name"]: Kernel.from_metadata(k) for k in kernels}

    def descriptor_address(self, kernel: str) -> int:
        """Where the descriptor of a kernel lies in the image."""
        return int(self._symbols[f"{kernel}.kd"])

    def descriptor(self, kernel: str) -> Descriptor:
        """The descriptor of a kernel."""
        at = self.descriptor_address(kernel)
        return Descriptor.parse(bytes(self.image[at : at + self.DESCRIPTOR_BYTES]))

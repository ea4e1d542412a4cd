"""An AMD GPU made of software: runs the machine code of kernels, instruction by instruction, on arrays of
this process.

The instructions are executed by the AMD emulator of a tinygrad checkout; see README.md. What is here is the
part of a
driver: it lays a code object in memory, fills the registers that a wave starts with, and starts the
workgroups.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import sys
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
from hardware.code_object import CodeObject
from hardware.compiler import compile_source, compiler_version, macro_options

from redshard.worker.device.arguments import KERNEL_ARGUMENTS, Step
from redshard.worker.device.kernel_images import image_key, read_image, write_image
from redshard.worker.device.kernel_set import Launch, launches
from redshard.worker.device.sources import source_root

#: Architectures that tests run, with the emulator's name of each.
ARCHITECTURES = {"gfx942": "cdna", "gfx1100": "rdna3", "gfx1201": "rdna4"}

#: The emulator ignores a negated source of v_cvt_f32_f16_sdwa, so no instructions of that kind are made.
_COMPILER_OPTIONS = {"gfx942": ["-mllvm", "-amdgpu-sdwa-peephole=false"]}

_LDS_GRANULE = 512  # bytes, as the emulator counts them
_LDS_SHIFT, _LDS_MASK = 15, 0x1FF  # in COMPUTE_PGM_RSRC2
_ROOM_BYTES, _ALIGNMENT = 64 << 20, 64  # room for the waves of many workgroups, used in turn
_MAP_NORESERVE = 0x4000  # Linux; mmap names it from Python 3.12 on
_NO_OPERATION = 0xBF800000  # s_nop 0
#: Cache maintenance, which the emulator does not know and, its memory being coherent, does not need: words
#: by target.
_CACHE_INSTRUCTIONS = {
    "gfx1100": ((0xE0AC0000, 0), (0xE0B00000, 0)),  # buffer_gl1_inv, buffer_gl0_inv
    "gfx1201": ((0xEE0AC07C, None, 0), (0xEE0B007C, None, 0)),  # global_inv, global_wb
}


def emulator_directory() -> str | None:
    """The checkout named by AMD_EMULATOR, None where it is not set."""
    return os.environ.get("AMD_EMULATOR")


class LoadedObject:
    """A code object in executable order in this process's memory."""

    def __init__(self, elf_bytes: bytes, arch: str) -> None:
        self.code = CodeObject(elf_bytes)
        self._memory = mmap.mmap(-1, -(-len(self.code.image) // mmap.PAGESIZE) * mmap.PAGESIZE)
        self._memory[: len(self.code.image)] = bytes(self.code.image)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._skip_cache_maintenance(arch)

    def _skip_cache_maintenance(self, arch: str) -> None:
        words = np.frombuffer(self._memory, np.uint32)
        for at in range(self.code.text.start // 4, self.code.text.stop // 4):
            for pattern in _CACHE_INSTRUCTIONS.get(arch, ()):
                found = words[at : at + len(pattern)]
                if all(want is None or want == int(word) for want, word in zip(pattern, found, strict=False)):
                    found[:] = _NO_OPERATION


@dataclass
class EmulatedGpu:
    """Launches operations as `redshard._cpu.Runtime` does, as GPU launches that the kernel set plans.

    Attributes:
        arch: target, a key of ARCHITECTURES.
        bucket: rows that launches cover, at least those of the step; None for just these.
        launched: kernels run so far, with their macros.
    """

    arch: str
    bucket: int | None = None
    launched: list[tuple[str, tuple[tuple[str, int], ...]]] = field(default_factory=list)
    _objects: dict[tuple[str, tuple[tuple[str, int], ...]], LoadedObject] = field(default_factory=dict)

    @property
    def wave_size(self) -> int:
        return 64 if ARCHITECTURES[self.arch] == "cdna" else 32

    def launch(self, operation: str, argument_bytes: bytes) -> None:
        """Run one operation of `redshard.worker.device.arguments.KERNEL_ARGUMENTS`."""
        arguments = KERNEL_ARGUMENTS[operation].from_buffer_copy(argument_bytes)
        rows = self.bucket or _rows(operation, arguments)
        for launch in launches(operation, arguments, rows, self.wave_size):
            self.run(launch)

    def run(self, launch: Launch) -> None:
        """Run every workgroup of a launch, one after the other."""
        loaded = self._object(launch.source, launch.macros)
        kernel, descriptor = loaded.code.kernels[launch.kernel], loaded.code.descriptor(launch.kernel)
        address = loaded.base + loaded.code.descriptor_address(launch.kernel) + descriptor.entry
        kernarg = ctypes.create_string_buffer(bytes(launch.arguments), max(kernel.kernarg_bytes, 1))
        registers = [0] * descriptor.user_sgprs
        at, where = descriptor.kernarg_sgpr, ctypes.addressof(kernarg)
        registers[at : at + 2] = where & 0xFFFFFFFF, where >> 32
        granules = -(-kernel.lds_bytes // _LDS_GRANULE)
        resources = descriptor.resources & ~(_LDS_MASK << _LDS_SHIFT) | granules << _LDS_SHIFT
        end = loaded.base + loaded.code.text.stop
        _emulator().run_asm(
            address, end - address, *launch.grid, launch.threads, 1, 1, where, resources,
            kernel.scratch_bytes, ARCHITECTURES[self.arch], registers,
        )  # fmt: skip
        self.launched.append((launch.kernel, launch.macros))

    def _object(self, source: str, macros: tuple[tuple[str, int], ...]) -> LoadedObject:
        if (source, macros) not in self._objects:
            options = _COMPILER_OPTIONS.get(self.arch, [])
            target = self.arch + compiler_version()
            key = image_key(source_root(), f"{source}.hip", [*macro_options(macros), *options], target)
            image = read_image(key)
            if image is None:
                image = compile_source(f"{source}.hip", self.arch, macros, options)
                write_image(key, image)
            self._objects[source, macros] = LoadedObject(image, self.arch)
        return self._objects[source, macros]


def _rows(operation: str, arguments: Any) -> int:
    step = Step.from_address(arguments.step)
    over_outputs = (
        operation == "sample"
        or (operation == "matmul" and arguments.over_outputs)
        or (operation == "rms_norm" and arguments.rows)
    )
    return int(step.n_outputs if over_outputs else step.n_tokens)


@cache
def _emulator() -> Any:
    root = emulator_directory()
    assert root, "AMD_EMULATOR is not set"
    if root not in sys.path:
        sys.path.insert(0, root)
    emulator = importlib.import_module("test.mockgpu.amd.emu")
    _give_room(emulator)
    _widen_conversions(emulator)
    _start_from_constants(emulator)
    _keep_bytes_unsigned(emulator)
    return emulator


def _give_room(emulator: Any) -> None:
    """Put registers and local data share where 4 GiB of readable memory follow.

    In this emulator lanes that are switched off read memory too, wherever the 32 bits in their registers
    point.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    room = ctypes.c_char.from_buffer(mmap.mmap(-1, _ROOM_BYTES + (1 << 32) + mmap.PAGESIZE, flags))
    make_buffer, used = emulator.Buffer, 0

    def make(device: str, size: int, dtype: Any, **given: Any) -> Any:
        nonlocal used
        if given or dtype != emulator.dtypes.uint32:
            return make_buffer(device, size, dtype, **given)
        start = used if used + 4 * size <= _ROOM_BYTES else 0
        used = start + -(-4 * size // _ALIGNMENT) * _ALIGNMENT
        options = emulator.BufferSpec(external_ptr=ctypes.addressof(room) + start)
        return make_buffer(device, size, dtype, options=options)

    emulator.Buffer = make


def _widen_conversions(emulator: Any) -> None:
    """Let CDNA's conversions from and to float16 use registers from 128 on.

    Taken for 16 bits wide, as on RDNA3, such a number would mean the upper half of the register 128 below.
    """
    compile_instruction = emulator._INST_HANDLERS[emulator.irc.VOP1]

    def widened(instruction: Any, context: Any) -> Any:
        if emulator._op_name(instruction).startswith(("V_CVT_F16_F32", "V_CVT_F32_F16")):
            bits = {**instruction.canonical_op_bits, "d": 32, "s0": 32}
            instruction.__dict__["canonical_op_bits"] = bits
        return compile_instruction(instruction, context)

    emulator._INST_HANDLERS[emulator.irc.VOP1] = widened


def _start_from_constants(emulator: Any) -> None:
    """Let products of matrices with float32 results start from an inline constant, such as 0.

    The emulator takes the constant's code, 128 to 208 or 240 to 248, for the number of a vector register.
    """
    compile_product, vector_registers = emulator._compile_wmma, 256  # codes of sources from here on

    def started(instruction: Any, context: Any) -> Any:
        start = context.inst_field(type(instruction).src2)
        is_vector = start >= vector_registers

        class Context(emulator._Ctx):
            def rvgpr_dyn(self, register: Any, lane: Any, valid: Any = None) -> Any:
                value = super().rvgpr_dyn(register, lane, valid)
                if start not in register.toposort():
                    return value
                return is_vector.where(value, self.rsgpr_dyn(start, is_vector.logical_not()))

        own = Context(context.inst_size, context.wave_size)
        product = compile_product(instruction, own)
        context.dyn_fields.extend(own.dyn_fields)
        return product

    emulator._compile_wmma = started


def _keep_bytes_unsigned(emulator: Any) -> None:
    """Let CDNA's products of signed bytes be compiled.

    The emulator writes the bytes, as signed numbers, into an array of unsigned ones, and the compiler refuses
    to take a vector of the one for the other.
    """
    compile_product, uop = emulator._compile_mfma, emulator.UOp
    signed, unsigned = emulator.dtypes.int32, emulator.dtypes.uint32

    def kept(instruction: Any, context: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            store = uop.store

            def store_bits(self: Any, value: Any, *arguments: Any, **options: Any) -> Any:
                if getattr(value, "dtype", None) == signed and self.dtype == unsigned:
                    value = value.bitcast(unsigned)
                return store(self, value, *arguments, **options)

            patch.setattr(uop, "store", store_bits)
            return compile_product(instruction, context)

    emulator._compile_mfma = kept

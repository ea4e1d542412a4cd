"""Every kernel compiles for every AMD target, within its limits, and KERNELS.md says what it takes."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("elftools", reason="pyelftools is not installed")
pytest.importorskip("msgpack", reason="msgpack is not installed")

from hardware.code_object import Kernel
from hardware.compile_kernels import TARGETS, complaints, difference, main, units
from hardware.compiler import CompileError, compile_source, compiler
from hardware.tables import KERNELS

needs_compiler = pytest.mark.skipif(not compiler(), reason="clang-19 is not installed")


@needs_compiler
@pytest.mark.skipif(not os.environ.get("COMPILE_KERNELS"), reason="COMPILE_KERNELS is not set; takes minutes")
@pytest.mark.timeout(1200)
def test_kernels_compile_and_the_document_is_current() -> None:
    assert main(["--check"]) == 0


def kernel(**changes: int) -> Kernel:
    figures = {
        "vgprs": 32, "sgprs": 16, "lds_bytes": 0, "scratch_bytes": 0, "spilled_vgprs": 0, "spilled_sgprs": 0,
        "kernarg_bytes": 8, "wave_size": 32, **changes,
    }  # fmt: skip
    return Kernel("k", **figures)


def test_limits() -> None:
    assert not complaints(kernel(spilled_sgprs=3, lds_bytes=65536), "Q8_0", "gfx1100")
    assert complaints(kernel(scratch_bytes=4), "Q8_0", "gfx1100")
    assert complaints(kernel(spilled_vgprs=1), "Q8_0", "gfx906")
    assert complaints(kernel(lds_bytes=65540), "Q8_0", "gfx1100")
    assert complaints(kernel(lds_bytes=49156), "Q8_0", "gfx1201")


@needs_compiler
def test_an_error_is_reported() -> None:
    with pytest.raises(CompileError, match="WEIGHT_TYPE"):
        compile_source("matmul_vector.hip", "gfx942")


@needs_compiler
@pytest.mark.skipif(not KERNELS.exists(), reason="only a checkout has KERNELS.md")
def test_the_document_lists_every_unit() -> None:
    written = KERNELS.read_text()
    assert all(target in written for target in TARGETS)
    assert all(unit.form in written for unit in units())
    assert not difference(written, written)
    shorter = "\n".join(line for line in written.splitlines() if not line.startswith("| sample "))
    assert difference(written, shorter)
    assert difference(shorter.replace("- compiler: ", "- compiler: other "), written)

"""Whole models through `Worker` on GPUs: the conformance kit; on stand-ins also memory and failures."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import standin
from support.conformance import OWN_KIT, Reference, kit
from support.gguf_models import tiny_config, write_model
from support.stages import LIMITS, CachedSequence, Pipeline, split

from redshard.loader.gguf.gguf_file import GGUFFile
from redshard.loader.gguf.quant_types import QuantType
from redshard.worker.device import kernel_set
from redshard.worker.device.base import DeviceError
from redshard.worker.device.choose import DeviceKind, open_device
from redshard.worker.device.support import GPU_WEIGHT_TYPES
from redshard.worker.device.watchdog import EXIT_HUNG
from redshard.worker.memory.pool import PoolError
from redshard.worker.model.step_batch import SAMPLING_ROW_DTYPE
from redshard.worker.worker import Worker


@pytest.fixture
def use_standin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Chooses what the stand-in is like for this test; afterwards no allocation of the test is left."""
    before = standin.count("live allocations")
    yield lambda **settings: standin.activate(monkeypatch, **settings)
    standin.load().standin_reset()
    gc.collect()
    assert standin.count("live allocations") == before


class Case(Reference):
    """A file of the kit with its reference, loaded on a GPU."""

    def __init__(self, path: Path, kind: DeviceKind = "hip") -> None:
        super().__init__(path)
        self.pipeline = Pipeline(path, devices=[open_device(kind)])


@pytest.fixture(scope="module", params=["hip", "cuda"])
def kind(request: pytest.FixtureRequest) -> Iterator[DeviceKind]:
    """Stand-in AMD GPUs, or an NVIDIA GPU where there is one."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.param == "hip":
            standin.activate(monkeypatch)
        try:
            open_device(request.param).close()
        except DeviceError as error:
            pytest.skip(str(error))
        yield request.param


@pytest.fixture(scope="module", params=kit(GPU_WEIGHT_TYPES), ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest, kind: DeviceKind) -> Iterator[Case]:
    case = Case(request.param, kind)
    with case.pipeline:
        yield case


@pytest.mark.parametrize("chunks", [(), (7, 1, 30, 2), (1,) * 20], ids=["prompt", "chunks", "decode"])
def test_conformance(case: Case, chunks: tuple[int, ...]) -> None:
    case.check(case.pipeline.logits_in_chunks(case.tokens, *chunks))


@pytest.mark.parametrize("path", kit(GPU_WEIGHT_TYPES), ids=lambda path: path.stem)
def test_conformance_of_the_tiles_of_large_matrices(
    kind: DeviceKind, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The matrices of the kit are so small that otherwise each takes the smallest tiles."""
    monkeypatch.setattr(kernel_set, "FULL_GRID", 1)
    case = Case(path, kind)
    with case.pipeline:
        case.check(case.pipeline.logits_in_chunks(case.tokens, 20, 40))


def test_sequences_share_steps(case: Case) -> None:
    """Prompts and decoding sequences in one step, of every size that has a graph of its own."""
    rng = np.random.default_rng(2)
    n_vocab = case.logits.shape[1]
    ours, others = CachedSequence(), [CachedSequence() for _ in range(5)]
    parts = []
    for chunk in np.split(case.tokens, [1, 2, 5, 40, 41, 42, 60]):
        fillers = [(other, rng.integers(0, n_vocab, rng.integers(1, 4))) for other in others]
        parts.append(case.pipeline.logits(*fillers[:3], (ours, chunk), *fillers[3:])[3])
    case.check(np.concatenate(parts))


@pytest.mark.parametrize("name", ["llama.q4_k.gguf", "qwen3.q8_0.gguf"])
def test_64_lanes_a_wave(use_standin: Callable[..., None], name: str) -> None:
    use_standin(arch="gfx942")
    case = Case(OWN_KIT / name)
    with case.pipeline:
        logits = case.pipeline.logits_in_chunks(case.tokens, 60, 1, 5)
    case.check(logits)


def test_stages_give_the_same_bits(use_standin: Callable[..., None]) -> None:
    use_standin(devices=3)
    path = OWN_KIT / "qwen2.q8_0.gguf"
    tokens = np.load(path.with_suffix(".npz"))["tokens"].astype(np.int32)
    results = []
    for n_stages in (1, 2, 3):
        with Pipeline(path, n_stages, devices=[open_device("hip") for _ in range(n_stages)]) as pipeline:
            results.append(pipeline.logits_in_chunks(tokens, 50, 1, 1))
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])


def test_a_gpu_and_a_cpu_share_a_model(use_standin: Callable[..., None]) -> None:
    use_standin()
    case = Case(OWN_KIT / "qwen2.q8_0.gguf")
    case.pipeline.__exit__(None, None, None)
    with Pipeline(case.path, 2, devices=[open_device("hip"), open_device("cpu", 2)]) as pipeline:
        case.check(pipeline.logits_in_chunks(case.tokens, 30, 1))


def test_readback_bounces_where_views_cannot_be_read(use_standin: Callable[..., None]) -> None:
    path = OWN_KIT / "llama.q4_0.gguf"
    tokens = np.load(path.with_suffix(".npz"))["tokens"].astype(np.int32)
    results = []
    for settings, expected in (({}, "direct"), ({"refuse_view_reads": 1}, "bounce: hipMemcpyAsync")):
        use_standin(**settings)
        with Pipeline(path, 2, devices=[open_device("hip"), open_device("hip")]) as pipeline:
            assert all(w.memory_map().readback.startswith(expected) for w in pipeline.workers)
            results.append(pipeline.logits_in_chunks(tokens, 40, 1))
    np.testing.assert_array_equal(results[0], results[1])


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 layers, with a tensor for each matrix, norm and bias."""
    config = tiny_config("qwen2", n_layers=32, n_ff=128)
    return write_model(tmp_path_factory.mktemp("deep") / "model.gguf", config, QuantType.Q8_0)


def test_a_model_of_32_layers_takes_few_allocations(
    use_standin: Callable[..., None], deep_model: Path
) -> None:
    with GGUFFile.open(deep_model) as file:
        assert len(file.tensors) > 300
    use_standin(refuse_view_reads=1)
    with Pipeline(deep_model, devices=[open_device("hip")]) as pipeline:
        assert standin.count("allocations") < 20
        loaded = standin.count("allocations")
        for sequence in [CachedSequence(), CachedSequence()]:
            for tokens in ([5, 6, 7], [8], [9]):
                batch = pipeline.batch([(sequence, tokens)])
                sampling = np.zeros(len(tokens), SAMPLING_ROW_DTYPE)
                sampling["top_p"] = sampling["repeat_penalty"] = 1
                result = pipeline.run(replace(batch, sampling=sampling, n_top=len(tokens)))
                np.testing.assert_array_equal(result.tokens, result.top_tokens[:, 0])
        assert standin.count("allocations") == loaded  # a step allocates nothing


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_an_allocation_that_fails_is_named(use_standin: Callable[..., None], number: int) -> None:
    use_standin(fail_allocation=number)
    device, message = open_device("hip"), ""
    try:
        worker = Worker(device)
        worker.load(OWN_KIT / "llama.q4_k.gguf", split(1, 1)[0], LIMITS)
    except (PoolError, DeviceError) as error:
        message = str(error)
    device.close()
    assert re.search(r"hipMalloc\(\d+ bytes\) on GPU 0 .*hipErrorOutOfMemory", message)


def test_a_kernel_that_fails_ends_the_step_with_an_error(use_standin: Callable[..., None]) -> None:
    use_standin()
    pipeline = Pipeline(OWN_KIT / "llama.q4_k.gguf", devices=[open_device("hip")])
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("STANDIN_HIP_FAIL_LAUNCH", str(standin.count("launches") + 7))
        with pytest.raises(DeviceError, match=r"hipStreamSynchronize.*hipErrorLaunchFailure"):
            pipeline.logits((CachedSequence(), [1, 2, 3]))
    standin.load().standin_reset()
    pipeline.workers[0].close()


LOAD = """
import sys
from support.stages import LIMITS, split
from redshard.worker.configuration import Deadlines, WorkerConfiguration
from redshard.worker.device.choose import DeviceKind, open_device
from redshard.worker.worker import Worker
worker = Worker(open_device("hip"), WorkerConfiguration(deadlines=Deadlines(allocate_s=1)))
worker.load(sys.argv[1], split(1, 1)[0], LIMITS)
"""


def test_the_watchdog_ends_a_worker_whose_allocation_hangs() -> None:
    process = subprocess.run(
        [sys.executable, "-c", LOAD, str(OWN_KIT / "llama.q4_k.gguf")],
        env=os.environ | standin.environment(hang_allocation=3) | {"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == EXIT_HUNG
    for part in ("hung: allocating", "Stand-in GPU 0", "amdgpu.cwsr_enable=0"):
        assert part in process.stderr

"""A model on a pipeline of workers, as a Python object."""

from __future__ import annotations

import asyncio
import queue
import secrets
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import ray

from cluster.client_session import ClientSession, ask, end_coordinator
from cluster.completion import ChunkStream, Completion, CompletionChunk, completion
from cluster.coordinator import Coordinator, PipelineInfo, PipelineSettings
from cluster.errors import ModelError, ParameterError, RequestError
from cluster.prompts import Prompt, PromptEncoder, as_list, params_of_each
from cluster.ray_session import RaySession, connect, disconnect
from cluster.requests import Increment, Request
from cluster.sampling_params import SamplingParams
from cluster.stage_actor import StageActor
from loader.chat import ChatTemplate, ChatTemplateError
from loader.gguf_file import GGUFFile
from loader.model_config import ModelConfig
from loader.model_path import find_model
from loader.tokenizer import Tokenizer
from worker.configuration import WorkerConfiguration

DEFAULT_STEP_TOKENS = 512

Device = Literal["auto", "cpu", "hip", "cuda"]
Params = SamplingParams | Sequence[SamplingParams] | None

#: Called with (bytes loaded, bytes in total) of all workers together.
OnProgress = Callable[[int, int], None]

#: Threads of the coordinator actor: one waits for output, the others answer everything else.
_COORDINATOR_THREADS = 8
_PROGRESS_S = 0.1


class LLM:
    """A GGUF model, loaded onto `stages` workers of a Ray cluster.

    Used as a context manager, or after `close`, it leaves no actor behind. All methods may be called from any
    thread; requests of all callers share the batches.

    Args:
        model: the GGUF file, or any file of a split set, which every worker must reach under the same path;
            or the name of a shipped model, "demo".
        stages: workers that share the layers; the embedding and the output count as one each.
        device: "auto" takes GPUs if the cluster has enough of them, else CPUs.
        max_context: tokens a sequence may have; None for the model's own context, at most 4096.
        max_sequences: sequences that run at once; others wait.
        max_step_tokens: tokens of one step; None for 512 over the number of stages, so that the chunks of a
            prompt keep all stages busy, but at least 128 and twice `max_sequences`.
        cache_tokens: tokens the key/value cache holds, of all sequences together; None for max_context of
            each sequence, or as many as fit.
        handoff_dtype: type of hidden states between workers; "float16" halves the traffic.
        worker: everything else that can be configured about a worker.
        on_progress: called while the model is being loaded.
        stage_class: what runs in each worker's process.

    Attributes:
        config: the model's hyperparameters.
        tokenizer: the model's tokenizer.
        max_length: tokens of the longest sequence, prompt and answer together.
        cache_tokens: tokens the key/value cache holds.

    Raises:
        ModelError: the file is missing, broken or unsupported, or the model does not fit.
        ParameterError: an argument is out of range.
        PipelineError: the cluster has no room, or a worker cannot be started.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        stages: int = 1,
        device: Device = "auto",
        max_context: int | None = None,
        max_sequences: int = 16,
        max_step_tokens: int | None = None,
        cache_tokens: int | None = None,
        handoff_dtype: Literal["float32", "float16"] = "float32",
        worker: WorkerConfiguration | None = None,
        on_progress: OnProgress | None = None,
        stage_class: type[StageActor] = StageActor,
    ) -> None:
        path, self.config, self.tokenizer, chat = _open(model)
        settings = PipelineSettings(
            path=str(path),
            n_stages=_in_range("stages", stages, 1, self.config.n_layers + 2),
            kind=device,
            max_context=_in_range(
                "max_context",
                max_context or self.config.default_context,
                2,
                self.config.context_length,
            ),
            max_sequences=_in_range("max_sequences", max_sequences, 1, 4096),
            max_step_tokens=max_step_tokens or max(DEFAULT_STEP_TOKENS // stages, 2 * max_sequences, 128),
            cache_tokens=cache_tokens,
            handoff=handoff_dtype,
            worker=worker or WorkerConfiguration(),
        )
        if settings.max_step_tokens <= settings.max_sequences:
            raise ParameterError(
                f"max_step_tokens is {max_step_tokens}; it must exceed max_sequences ({max_sequences})"
            )
        ray_session = connect()
        try:
            self._coordinator, info = _start(settings, stage_class, on_progress)
        except BaseException:
            disconnect(ray_session)
            raise
        self.max_length = info.max_length
        self.cache_tokens = info.cache_tokens
        self._prompts = PromptEncoder(self.tokenizer, chat, info.max_length - 1)
        self._session = ClientSession(self._coordinator, ray_session)
        self._closed = weakref.finalize(self, _close, self._session, ray_session)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Generation

    def generate(self, prompts: Prompt | Sequence[Prompt], params: Params = None) -> list[Completion]:
        """Complete one prompt or many, together; the answers are in the order of the prompts.

        Args:
            prompts: each is text, token ids, or chat messages like ``{"role": "user", "content": "Hello"}``.
            params: for all, or one for each prompt.

        Raises:
            PromptError, ParameterError: a prompt or parameter cannot be used; nothing was run.
            RequestError: a request failed.
            PipelineError: the workers are gone for good.
        """
        requests = self._requests(prompts, params)
        last = {increment.request_id: increment for increment in self._increments(requests)}
        return _completions(requests, last)

    def stream(self, prompts: Prompt | Sequence[Prompt], params: Params = None) -> Iterator[CompletionChunk]:
        """As `generate`, each chunk as soon as it is there; ending the iteration aborts the requests."""
        requests = self._requests(prompts, params, stream=True)
        chunks = ChunkStream(requests)
        for increment in self._increments(requests):
            yield chunks.chunk(increment)

    async def agenerate(self, prompts: Prompt | Sequence[Prompt], params: Params = None) -> list[Completion]:
        """As `generate`, for asyncio; cancelling it aborts the requests."""
        requests = self._requests(prompts, params)
        last = {increment.request_id: increment async for increment in self._aincrements(requests)}
        return _completions(requests, last)

    async def astream(
        self, prompts: Prompt | Sequence[Prompt], params: Params = None
    ) -> AsyncIterator[CompletionChunk]:
        """As `stream`, for asyncio."""
        requests = self._requests(prompts, params, stream=True)
        chunks = ChunkStream(requests)
        async for increment in self._aincrements(requests):
            yield chunks.chunk(increment)

    def logits(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Raw logits of every position, float32 (n, n_vocab), through the same stages that generate.

        Raises:
            PromptError: there are no tokens, too many, or some outside the vocabulary.
        """
        tokens = self._prompts.encode(list(token_ids))
        request = Request(self._session.new_id(), tokens, SamplingParams(), wants_logits=True)
        logits = next(self._increments([request])).logits
        assert logits is not None
        return logits

    # Looking inside

    def stats(self) -> dict[str, Any]:
        """State, times of the run loop in seconds (`EngineTimes`), and `WorkerStats` of every worker."""
        return ask(self._session.call("stats"))

    def memory_map(self) -> list[dict[str, Any]]:
        """What every worker has allocated on its device, in bytes."""
        return ask(self._session.call("memory_maps"))

    def close(self) -> None:
        """End the workers, and Ray too if it was started here. Idempotent; unfinished requests fail."""
        self._closed()

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], params: Params, stream: bool = False
    ) -> list[Request]:
        each = as_list(prompts)
        return [
            Request(
                self._session.new_id(),
                self._prompts.encode(prompt),
                chosen,
                seed=secrets.randbits(64) if chosen.seed is None else chosen.seed,
                stream=stream,
            )
            for prompt, chosen in zip(each, params_of_each(params, len(each)), strict=True)
        ]

    def _increments(self, requests: list[Request]) -> Iterator[Increment]:
        """Submit requests and give their increments as they come, until all have ended."""
        arrived: queue.SimpleQueue[Increment] = queue.SimpleQueue()
        n_open = len(requests)
        try:
            ask(self._session.register(requests, arrived.put))
            while n_open:
                increment = _checked(arrived.get())
                n_open -= increment.is_last
                yield increment
        finally:
            self._session.forget(requests)

    async def _aincrements(self, requests: list[Request]) -> AsyncIterator[Increment]:
        """As `_increments`, for asyncio."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Increment] = asyncio.Queue()
        n_open = len(requests)
        try:
            await self._session.register(
                requests, lambda increment: loop.call_soon_threadsafe(arrived.put_nowait, increment)
            )
            while n_open:
                increment = _checked(await arrived.get())
                n_open -= increment.is_last
                yield increment
        finally:
            self._session.forget(requests)


def _open(model: str | Path) -> tuple[Path, ModelConfig, Tokenizer, ChatTemplate | ChatTemplateError]:
    try:
        path = find_model(model)
        with GGUFFile.open(path) as file:
            config = ModelConfig.from_gguf(file)
            tokenizer = Tokenizer.from_metadata(file.metadata)
            return path, config, tokenizer, _chat_template(file)
    except (ValueError, OSError) as error:
        raise ModelError(str(error)) from error


def _chat_template(file: GGUFFile) -> ChatTemplate | ChatTemplateError:
    """The template, or why there is none: that matters only to those who send messages."""
    try:
        return ChatTemplate.from_metadata(file.metadata)
    except ChatTemplateError as error:
        return error


def _device_kind(device: Device, stages: int) -> Device:
    """The CPU where "auto" finds too few GPUs."""
    if device == "auto" and ray.cluster_resources().get("GPU", 0) < stages:
        return "cpu"
    return device


def _in_range(name: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise ParameterError(f"{name} is {value}; for this model it must be from {least} to {most}")
    return value


def _checked(increment: Increment) -> Increment:
    if increment.error is not None:
        raise RequestError(increment.error)
    return increment


def _completions(requests: list[Request], last: dict[str, Increment]) -> list[Completion]:
    return [
        completion(request.tokens, last[request.request_id], request.params.logprobs is not None)
        for request in requests
    ]


def _start(
    settings: PipelineSettings, stage_class: type[StageActor], on_progress: OnProgress | None
) -> tuple[Any, PipelineInfo]:
    """A coordinator that serves, and what it says of the pipeline. Leaves nothing behind when it fails."""
    settings = replace(settings, kind=_device_kind(settings.kind, settings.n_stages))
    coordinator_class: Any = ray.remote(Coordinator)
    options = {"num_cpus": 0, "max_concurrency": _COORDINATOR_THREADS}
    coordinator = coordinator_class.options(**options).remote(stage_class)
    try:
        loading = coordinator.start.remote(settings)
        while not ray.wait([loading], timeout=_PROGRESS_S)[0]:
            if on_progress is not None:
                progress = ask(coordinator.progress.remote())
                on_progress(sum(done for done, _ in progress), sum(total for _, total in progress))
        return coordinator, ask(loading)
    except BaseException:
        end_coordinator(coordinator)
        raise


def _close(session: ClientSession, ray_session: RaySession) -> None:
    session.close()
    disconnect(ray_session)

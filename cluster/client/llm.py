"""A model on a pipeline of workers, as a Python object."""

from __future__ import annotations

import asyncio
import logging
import queue
import secrets
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, get_args

import numpy as np
import ray

from redshard.cluster.client.completions import ChunkStream, completion
from redshard.cluster.client.prompts import Prompt, PromptEncoder, as_list, check_token_ids, params_of_each
from redshard.cluster.client.session import ClientSession, end_coordinator, unwrapped
from redshard.cluster.completion import Completion, CompletionChunk
from redshard.cluster.engine.requests import Increment, Request
from redshard.cluster.engine.sampling_params import SamplingParams
from redshard.cluster.errors import ModelError, ParameterError, RequestError
from redshard.cluster.pipeline.coordinator import Coordinator, PipelineInfo
from redshard.cluster.pipeline.plan import PipelineSettings, default_step_tokens
from redshard.cluster.pipeline.ray_session import RaySession, connect, disconnect
from redshard.cluster.pipeline.stage_actor import StageActor
from redshard.loader.gguf.gguf_file import GGUFFile
from redshard.loader.model.architectures import read_config
from redshard.loader.model.configuration import ModelConfig
from redshard.loader.model.tensors import ModelTensors
from redshard.loader.model_path import find_model
from redshard.loader.tokenizer.chat_template import ChatTemplate, ChatTemplateError
from redshard.loader.tokenizer.tokenizer import Tokenizer
from redshard.worker.configuration import WorkerConfiguration
from redshard.worker.device.choose import DeviceKind
from redshard.worker.device.support import check_device_support
from redshard.worker.model.handoff import HandoffType

logger = logging.getLogger(__name__)

#: What a worker's buffers may be asked to hold.
MAX_SEQUENCES, MAX_STEP_TOKENS, MAX_CACHE_TOKENS = 4096, 1 << 16, 1 << 40

Params = SamplingParams | Sequence[SamplingParams] | None

#: Called with (bytes loaded, bytes in total) of all workers together.
OnProgress = Callable[[int, int], None]

#: Threads of the coordinator actor: one waits for output, the others answer everything else.
_COORDINATOR_THREADS = 8
_PROGRESS_S = 0.1
#: Requests of one call that are submitted and have not ended, and tokens of their prompts: one call shall not
#: fill the queue for all.
_WINDOW, _WINDOW_TOKENS = 4096, 1 << 22


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
        parse_special: control tokens spelled in chat messages, such as ``<|im_end|>``, count as such;
            otherwise only those that the chat template writes.
        worker: everything else that can be configured about a worker.
        on_progress: called while the model is being loaded.

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

    #: What runs in each worker's process; tests put others in its place.
    _stage_class: ClassVar[type[StageActor]] = StageActor

    def __init__(
        self,
        model: str | Path,
        *,
        stages: int = 1,
        device: DeviceKind = "auto",
        max_context: int | None = None,
        max_sequences: int = 16,
        max_step_tokens: int | None = None,
        cache_tokens: int | None = None,
        handoff_dtype: HandoffType = "float32",
        parse_special: bool = False,
        worker: WorkerConfiguration | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        _check_choices(model, device, handoff_dtype, worker)
        path, self.config, self.tokenizer, chat = _open(model, device)
        n_stages = _whole_number("stages", stages, 1, self.config.n_layers + 2)
        max_sequences = _whole_number("max_sequences", max_sequences, 1, MAX_SEQUENCES)
        if max_context is None:
            max_context = self.config.default_context
        if max_step_tokens is None:
            max_step_tokens = default_step_tokens(n_stages, max_sequences)
        if cache_tokens is not None:
            cache_tokens = _whole_number("cache_tokens", cache_tokens, 1, MAX_CACHE_TOKENS)
        settings = PipelineSettings(
            path=str(path),
            n_stages=n_stages,
            kind=device,
            max_context=_whole_number("max_context", max_context, 2, self.config.context_length),
            max_sequences=max_sequences,
            # More than sequences, or prompts would never get on beside those that generate.
            max_step_tokens=_whole_number(
                "max_step_tokens", max_step_tokens, max_sequences + 1, MAX_STEP_TOKENS
            ),
            cache_tokens=cache_tokens,
            handoff=handoff_dtype,
            worker=worker or WorkerConfiguration(),
        )
        ray_session = connect()
        try:
            self._coordinator, info = _start(settings, self._stage_class, on_progress)
        except BaseException:
            disconnect(ray_session)
            raise
        if info.warning:
            logger.warning("%s", info.warning)
        self.max_length = info.max_length
        self.cache_tokens = info.cache_tokens
        self._prompts = PromptEncoder(self.tokenizer, chat, info.max_length, parse_special)
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
            RequestError: requests failed; all others have ended, and its `completions` hold their answers.
            PipelineError: the workers are gone for good.
        """
        requests = self._requests(prompts, params)
        last: dict[str, Increment] = {}
        with _completions_in_error(requests, last):
            for increment in self._increments(requests):
                last[increment.request_id] = increment
        return _completions(requests, last)

    def stream(self, prompts: Prompt | Sequence[Prompt], params: Params = None) -> Iterator[CompletionChunk]:
        """As `generate`, each chunk as soon as it is there; ending the iteration aborts the requests.

        Prompts and parameters are checked at the call, and run from the first `next` on. An answer that fails
        ends with the finish reason "error"; RequestError is raised when all others have ended too.
        """
        return self._chunks(self._requests(prompts, params, stream=True))

    async def agenerate(self, prompts: Prompt | Sequence[Prompt], params: Params = None) -> list[Completion]:
        """As `generate`, for asyncio; cancelling it aborts the requests."""
        requests = self._requests(prompts, params)
        last: dict[str, Increment] = {}
        with _completions_in_error(requests, last):
            async for increment in self._aincrements(requests):
                last[increment.request_id] = increment
        return _completions(requests, last)

    def astream(
        self, prompts: Prompt | Sequence[Prompt], params: Params = None
    ) -> AsyncIterator[CompletionChunk]:
        """As `stream`, for asyncio."""
        return self._achunks(self._requests(prompts, params, stream=True))

    def logits(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Raw logits of every position, float32 (n, n_vocab), through the same stages that generate.

        Raises:
            PromptError: there are no tokens, too many, or some outside the vocabulary.
        """
        tokens = self._prompts.encode(token_ids, n_answer=0)
        request = Request(
            self._session.new_id(), tokens, SamplingParams(), wants_logits=True, client=self._session.name
        )
        logits = np.empty((len(tokens), 0), np.float32)
        for increment in self._increments([request]):
            if (part := increment.logits) is not None:
                if not logits.size:  # a model may give more logits than its tokenizer has tokens
                    logits = np.empty((len(tokens), part.shape[1]), np.float32)
                logits[increment.logits_start : increment.logits_start + len(part)] = part
        return logits

    # Looking inside

    def stats(self) -> dict[str, Any]:
        """State, times of the run loop in seconds (`EngineTimes`), and `WorkerStats` of every worker."""
        return self._session.ask("stats")

    def memory_map(self) -> list[dict[str, Any]]:
        """What every worker has allocated on its device, in bytes."""
        return self._session.ask("memory_maps")

    def close(self) -> None:
        """End the workers, and Ray too if it was started here. Idempotent; unfinished requests fail."""
        self._closed()

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], params: Params, stream: bool = False
    ) -> list[Request]:
        each = as_list(prompts)
        chosen = params_of_each(params, len(each))
        for one in chosen:
            check_token_ids(one, self.tokenizer.n_vocab)
        return [
            Request(
                self._session.new_id(),
                tokens,
                one,
                seed=secrets.randbits(64) if one.seed is None else one.seed,
                stream=stream,
                client=self._session.name,
            )
            for tokens, one in zip(self._prompts.encode_all(each), chosen, strict=True)
        ]

    def _chunks(self, requests: list[Request]) -> Iterator[CompletionChunk]:
        chunks = ChunkStream(requests)
        for increment in self._increments(requests):
            yield chunks.chunk(increment)

    async def _achunks(self, requests: list[Request]) -> AsyncIterator[CompletionChunk]:
        chunks = ChunkStream(requests)
        async for increment in self._aincrements(requests):
            yield chunks.chunk(increment)

    def _increments(self, requests: list[Request]) -> Iterator[Increment]:
        """Submit requests and give their increments as they come, until all have ended.

        Raises:
            RequestError: some have failed.
        """
        arrived: queue.SimpleQueue[Increment] = queue.SimpleQueue()
        progress = _Progress(requests)
        try:
            while not progress.is_done:
                if due := progress.take_due():
                    self._session.wait(self._session.register(due, arrived.put))
                increment = arrived.get()
                progress.note(increment)
                yield increment
        finally:
            self._session.forget(requests)
        progress.raise_first_error()

    async def _aincrements(self, requests: list[Request]) -> AsyncIterator[Increment]:
        """As `_increments`, for asyncio."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Increment] = asyncio.Queue()

        def deliver(increment: Increment) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, increment)

        progress = _Progress(requests)
        try:
            while not progress.is_done:
                if due := progress.take_due():
                    await asyncio.to_thread(self._session.wait, self._session.register(due, deliver))
                increment = await arrived.get()
                progress.note(increment)
                yield increment
        finally:
            self._session.forget(requests)
        progress.raise_first_error()


def _open(
    model: str | Path, device: DeviceKind
) -> tuple[Path, ModelConfig, Tokenizer, ChatTemplate | ChatTemplateError]:
    """What can be known before anything starts. Raises ModelError if `device` cannot run the model."""
    try:
        path = find_model(model)
        with GGUFFile.open(path) as file:
            config = read_config(file)
            check_device_support(config, ModelTensors(config, file), file.tensors.values(), device)
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


def _device_kind(device: DeviceKind, stages: int) -> DeviceKind:
    """The CPU where "auto" finds too few GPUs."""
    if device == "auto" and ray.cluster_resources().get("GPU", 0) < stages:
        return "cpu"
    return device


def _check_choices(model: object, device: object, handoff: object, worker: object) -> None:
    if not isinstance(model, (str, Path)):
        raise ParameterError(f"model is {model!r:.80}; it must be a path or the name of a shipped model")
    for name, value, choices in (
        ("device", device, get_args(DeviceKind)),
        ("handoff_dtype", handoff, get_args(HandoffType)),
    ):
        if value not in choices:
            raise ParameterError(f"{name} is {value!r:.80}; it must be one of {', '.join(choices)}")
    if not isinstance(worker, WorkerConfiguration | None):
        raise ParameterError(f"worker is {worker!r:.80}; it must be a WorkerConfiguration")


def _whole_number(name: str, value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise ParameterError(
            f"{name} is {value!r:.80}; here it must be a whole number from {least} to {most}"
        )
    return int(value)


class _Progress:
    """Which requests of a call are to be submitted next, and what became of those that have ended."""

    def __init__(self, requests: list[Request]) -> None:
        self._n_requests = len(requests)
        self._waiting = deque(requests)
        self._under_way: dict[str, int] = {}  # tokens of the prompt, by request
        self._n_tokens = 0  # of those under way
        self._errors: list[str] = []

    @property
    def is_done(self) -> bool:
        return not (self._waiting or self._under_way)

    def take_due(self) -> list[Request]:
        """More requests, once half of the window is free."""
        due: list[Request] = []
        if len(self._under_way) > _WINDOW // 2 or self._n_tokens > _WINDOW_TOKENS // 2:
            return due
        while self._waiting and len(self._under_way) < _WINDOW and self._n_tokens < _WINDOW_TOKENS:
            due.append(self._waiting.popleft())
            n_tokens = len(due[-1].tokens)
            self._under_way[due[-1].request_id] = n_tokens
            self._n_tokens += n_tokens
        return due

    def note(self, increment: Increment) -> None:
        """Count an increment that arrived."""
        if increment.is_last:
            self._n_tokens -= self._under_way.pop(increment.request_id)
        if increment.error is not None:
            self._errors.append(increment.error)

    def raise_first_error(self) -> None:
        """Raise RequestError if some of the requests failed."""
        n, errors = self._n_requests, self._errors
        if errors:
            several = f"{len(errors)} of {n} requests failed; the first: " if n > 1 else ""
            raise RequestError(f"{several}{errors[0]}")


@contextmanager
def _completions_in_error(requests: list[Request], last: dict[str, Increment]) -> Iterator[None]:
    try:
        yield
    except RequestError as error:
        error.completions = _completions(requests, last)
        raise


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
                progress = ray.get(coordinator.progress.remote())
                on_progress(sum(done for done, _ in progress), sum(total for _, total in progress))
        return coordinator, unwrapped(partial(ray.get, loading))
    except BaseException:
        end_coordinator(coordinator)
        raise


def _close(session: ClientSession, ray_session: RaySession) -> None:
    session.close()
    disconnect(ray_session)

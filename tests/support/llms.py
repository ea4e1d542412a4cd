"""`LLM` whose workers run something else than a `StageActor`."""

from __future__ import annotations

from redshard.cluster.client.llm import LLM
from redshard.cluster.pipeline.stage_actor import StageActor


def llm_of(stage_class: type[StageActor]) -> type[LLM]:
    """An `LLM` with that class in each worker's process."""
    return type("LLM", (LLM,), {"_stage_class": stage_class})

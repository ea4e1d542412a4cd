"""Where the stages of a pipeline run: what they reserve, and other GPUs in place of bad ones."""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from redshard.cluster.errors import CapacityError, PipelineError

#: What a stage on the CPU takes of Ray's own count: next to nothing, since its threads are set explicitly.
_CPU_BUNDLE = {"CPU": 0.01}
_GPU_BUNDLE = {"GPU": 1.0}

_PLACEMENT_S = 60.0
#: How long a GPU that Ray counts as free may take to be reserved.
_SPARE_S = 10.0


@dataclass(slots=True)
class _Place:
    """A bundle of a placement group, on a node; `name` is for people, and better once a worker was there."""

    group: PlacementGroup
    bundle: int
    node: str
    name: str


class Placement:
    """A place for each stage, on as few nodes as may be.

    Args:
        n_stages: places.
        on_gpus: whether each has a GPU of its own.

    Raises:
        CapacityError: the cluster does not have that much.
        PipelineError: it has, but others use it.
    """

    def __init__(self, n_stages: int, on_gpus: bool) -> None:
        self._on_gpus = on_gpus
        self._bundle = _GPU_BUNDLE if on_gpus else _CPU_BUNDLE
        self._check_capacity(n_stages)
        group = self._reserve(n_stages, _PLACEMENT_S)
        if group is None:
            raise PipelineError(
                f"after {_PLACEMENT_S:g} s the cluster still has no room for {_count(n_stages, 'stage')}; "
                "use fewer stages or end what else is running there"
            )
        self._groups = [group]
        self._places = _places(group)
        self._left: deque[_Place] = deque()

    def options(self, stage: int) -> dict[str, Any]:
        """Ray's options for the actor of a stage."""
        place = self._places[stage]
        return {
            "num_cpus": self._bundle.get("CPU", 0),
            "num_gpus": self._bundle.get("GPU", 0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                place.group, placement_group_bundle_index=place.bundle
            ),
        }

    def node(self, stage: int) -> str:
        """The id of a stage's node."""
        return self._places[stage].node

    def n_neighbours(self, stage: int) -> int:
        """Stages on the same node, this one included."""
        return Counter(place.node for place in self._places)[self.node(stage)]

    def name(self, stage: int) -> str:
        """What people call the place of a stage."""
        return self._places[stage].name

    def set_name(self, stage: int, name: str) -> None:
        """Name the place that a stage has now."""
        self._places[stage].name = name

    def move(self, stage: int) -> None:
        """Give a stage whose worker failed another GPU, if there is one.

        The one it leaves stays reserved, so that the next cannot be the same and nobody else gets a bad one.
        With no GPU free in the cluster, the stage gets the one that was left first, be it its own.
        """
        if not self._on_gpus:
            return
        self._left.append(self._places[stage])
        self._places[stage] = self._spare() or self._left.popleft()

    def has_first_place(self, stage: int) -> bool:
        """Whether a stage is where it began, or is back there."""
        return self._places[stage].group == self._groups[0]

    def close(self) -> None:
        """Give everything back."""
        for group in self._groups:
            _remove(group)

    def _spare(self) -> _Place | None:
        if ray.available_resources().get("GPU", 0) < 1:
            return None
        group = self._reserve(1, _SPARE_S)
        if group is None:
            return None
        self._groups.append(group)
        return _places(group)[0]

    def _reserve(self, n_bundles: int, timeout_s: float) -> PlacementGroup | None:
        group = placement_group([self._bundle] * n_bundles, strategy="PACK")
        if group.wait(timeout_s):
            return group
        _remove(group)
        return None

    def _check_capacity(self, n_stages: int) -> None:
        for name, amount in self._bundle.items():
            there = ray.cluster_resources().get(name, 0)
            if there < amount * n_stages:
                raise CapacityError(
                    f"{_count(n_stages, 'stage')} must have {_count(amount * n_stages, name)}, but the "
                    f"cluster has {there:g}; use fewer stages, or device 'cpu'"
                )


def _places(group: PlacementGroup) -> list[_Place]:
    nodes = placement_group_table(group)["bundles_to_node_id"]
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return [
        _Place(group, bundle, node, f"node {addresses.get(node, node)}")
        for bundle, node in sorted(nodes.items())
    ]


def _remove(group: PlacementGroup) -> None:
    with contextlib.suppress(ray.exceptions.RayError):
        remove_placement_group(group)


def _count(n: float, noun: str) -> str:
    return f"{n:g} {noun}{'' if n == 1 else 's'}"

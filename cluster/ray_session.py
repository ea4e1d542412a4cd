"""Joining a Ray cluster, or starting a local one."""

from __future__ import annotations

import logging
import os

import ray

from cluster.errors import PipelineError


def connect() -> bool:
    """Make Ray usable in this process; False if it already was.

    Joins the cluster that RAY_ADDRESS names or that `ray start` left running on this machine; otherwise
    starts a local one, without dashboard, usage statistics or log lines.

    Raises:
        PipelineError: the cluster cannot be reached, or the environment contradicts itself.
    """
    if ray.is_initialized():
        return False
    if os.environ.get("ROCR_VISIBLE_DEVICES") and not os.environ.get("HIP_VISIBLE_DEVICES"):
        raise PipelineError(
            "Ray does not accept ROCR_VISIBLE_DEVICES alone; set HIP_VISIBLE_DEVICES to choose among the GPUs"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # These speak before ray.init has set the level of its loggers.
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (
        Exception
    ) as error:  # Ray raises plain ones too, for instance when a busy machine starts it too slowly
        ray.shutdown()
        address = os.environ.get("RAY_ADDRESS") or "of this machine"
        raise PipelineError(f"the Ray cluster {address} cannot be joined or started: {error}") from error
    return True


def disconnect() -> None:
    """Leave the cluster; end it if it was started here."""
    if ray.is_initialized():
        ray.shutdown()

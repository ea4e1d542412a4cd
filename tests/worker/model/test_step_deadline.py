"""Deadlines follow the steps that were seen."""

from __future__ import annotations

import pytest

from redshard.worker.model.step_deadline import StepDeadline


def test_the_bound_holds_until_enough_steps_like_it_were_seen() -> None:
    deadline = StepDeadline(300)
    for _ in range(7):
        deadline.note(1, 0.01)
    assert deadline.of(1) == 300
    deadline.note(1, 0.01)
    assert deadline.of(1) == 5
    assert deadline.of(512) == 300


@pytest.mark.parametrize(("seconds", "expected"), [(0.001, 5), (0.5, 10), (3, 60), (100, 300)])
def test_twenty_times_the_median_within_bounds(seconds: float, expected: float) -> None:
    deadline = StepDeadline(300)
    for _ in range(20):
        deadline.note(100, seconds)
    deadline.note(100, 1000 * seconds)
    assert deadline.of(120) == pytest.approx(expected)


def test_whoever_watches_from_afar_waits_longer() -> None:
    near, far = StepDeadline(300), StepDeadline(400, times=2)
    for _ in range(9):
        near.note(1, 1.0)
        far.note(1, 1.1)
    assert near.of(1) < far.of(1) <= 400

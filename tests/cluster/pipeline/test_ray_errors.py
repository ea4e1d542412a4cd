"""Actors that die in every way: what is left to tell is one sentence with the reason."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from redshard.cluster.pipeline.ray_errors import reason


class Answers:
    def ask(self) -> None:
        """Nothing."""


class Raises(Answers):
    def __init__(self) -> None:
        raise ValueError("the device is cold\n  and wet")


class RaisesFromAnother(Answers):
    def __init__(self) -> None:
        try:
            raise OSError("no such device")
        except OSError as error:
            raise RuntimeError("the device cannot be opened.") from error


class RaisesItsOwn(Answers):
    def __init__(self) -> None:
        from redshard.cluster.errors import ModelError

        raise ModelError("the model is broken; take another")


class RaisesNothingToSay(Answers):
    def __init__(self) -> None:
        raise RuntimeError


class Exits(Answers):
    def __init__(self) -> None:
        os._exit(3)


class ExitsInACall:
    def ask(self) -> None:
        os._exit(3)


class RaisesInACall:
    def ask(self) -> None:
        raise ValueError("no answer\nto that")


def error_of(actor_class: type) -> BaseException:
    """What asking an actor of that class raises."""
    remote: Any = ray.remote(actor_class)
    actor = remote.remote()
    with pytest.raises(ray.exceptions.RayError) as caught:
        ray.get(actor.ask.remote(), timeout=60)
    return caught.value


@pytest.mark.parametrize(
    ("actor_class", "expected"),
    [
        (Raises, "ValueError: the device is cold"),
        (RaisesFromAnother, "RuntimeError: the device cannot be opened"),
        (RaisesItsOwn, "ModelError: the model is broken; take another"),
        (RaisesNothingToSay, "RuntimeError"),
        (Exits, "The actor died unexpectedly before finishing this task"),
        (ExitsInACall, "The actor died unexpectedly before finishing this task"),
        (RaisesInACall, "no answer"),
    ],
)
def test_reasons(ray_instance: None, actor_class: type, expected: str) -> None:
    assert reason(error_of(actor_class)) == expected


def test_a_class_that_cannot_be_imported(
    ray_instance: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("class Actor:\n    def ask(self):\n        pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here

    # Ray tells its workers this process's path when they start; those that are there do not know it.
    expected = "ModuleNotFoundError: No module named 'only_here'"
    assert reason(error_of(only_here.Actor)) == expected
    del sys.modules["only_here"]


def test_errors_that_ray_did_not_make() -> None:
    assert reason(ValueError("one\ntwo")) == "one"
    assert reason(ValueError()) == "ValueError"

"""The cache of compiled kernels: nobody else's, and never larger than its bound."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from redshard.worker.device import kernel_images
from redshard.worker.device.kernel_images import read_image, write_image


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REDSHARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_images_come_back_and_the_directory_is_private(cache: Path) -> None:
    assert read_image("a") is None
    write_image("a", b"image")
    assert read_image("a") == b"image"
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("trouble", ["writable", "link", "owner"])
def test_a_directory_of_others_is_not_used(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trouble: str,
) -> None:
    write_image("a", b"image")
    if trouble == "writable":
        cache.chmod(0o777)
    elif trouble == "link":
        cache.rename(tmp_path / "elsewhere")
        cache.symlink_to(tmp_path / "elsewhere")
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert read_image("a") is None
    with caplog.at_level(logging.WARNING):
        write_image("b", b"image")
    assert "others can write to it, or own it" in caplog.text
    assert read_image("b") is None


def test_what_was_not_used_for_the_longest_time_goes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_images, "_MAX_CACHE_BYTES", 3 * 1032)
    for age, key in enumerate("abc"):
        write_image(key, bytes(1000))
        os.utime(cache / key, (age, age))
    assert read_image("a") == bytes(1000)  # used again
    write_image("d", bytes(1000))
    assert sorted(path.name for path in cache.iterdir()) == ["a", "c", "d"]

"""Compiled kernels: a cache of their images on disk that many workers may share.

An image depends on its source file with everything it may include, on the options, and on the compiler's
target; the name of its file in the cache is a hash of all three. Files appear whole, by renaming, so workers
that start together at worst compile the same image twice.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

_DIGEST_BYTES = 32
#: What the cache may hold; the images that were not used for the longest time go first.
_MAX_CACHE_BYTES = 512 << 20


def cache_directory() -> Path:
    """$REDSHARD_CACHE, or redshard in the user's cache directory."""
    if chosen := os.environ.get("REDSHARD_CACHE"):
        return Path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "redshard"
    try:
        return Path.home() / ".cache" / "redshard"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / f"redshard-{os.getuid()}"


def image_key(root: Path, source: str, options: Sequence[str], target: str) -> str:
    """Name of an image in the cache.

    Args:
        root: of the kernel sources.
        source: file name of the translation unit in `root` / hip.
        options: of the compiler, without paths.
        target: everything else that decides the image: architecture and the versions of compiler and runtime.
    """
    text = "\0".join([_sources_digest(root), source, *options, target])
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _sources_digest(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([*(root / "common").glob("*.h"), *(root / "hip").glob("*")]):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def read_image(key: str) -> bytes | None:
    """The image of this name if the cache holds it undamaged."""
    path = cache_directory() / key
    if not _is_ours(path.parent):
        return None
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    with suppress(OSError):
        os.utime(path)  # it was of use just now
    digest, image = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    return image if hashlib.sha256(image).digest() == digest else None


def write_image(key: str, image: bytes) -> None:
    """Keep an image. A cache that cannot be written only costs the next worker a compilation."""
    directory = cache_directory()
    temporary = None
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(directory):
            raise PermissionError("others can write to it, or own it")
        descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=f"{key}.")
        with open(descriptor, "wb") as file:
            file.write(hashlib.sha256(image).digest() + image)
        os.replace(temporary, directory / key)
        _prune(directory)
    except OSError as error:
        logger.warning("compiled kernels are not kept: cannot write to %s: %s", directory, error)
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)


def _is_ours(directory: Path) -> bool:
    """Whether nobody else can put images into the directory: they would run on the GPU in our name."""
    try:
        found = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _prune(directory: Path) -> None:
    """Remove what was not used for the longest time, until the rest fits. Other workers may do so too."""
    found = []
    for entry in os.scandir(directory):
        with suppress(OSError):
            found.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
    excess = sum(nbytes for _, nbytes, _ in found) - _MAX_CACHE_BYTES
    for _, nbytes, path in sorted(found):
        if excess <= 0:
            return
        with suppress(OSError):
            os.unlink(path)
        excess -= nbytes

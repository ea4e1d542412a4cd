"""Which file a model's name or path means."""

from __future__ import annotations

import os
from pathlib import Path

_FOLDER = Path(__file__).parent / "models"

#: Models that ship with Redshard, by name.
SHIPPED_MODELS = {path.stem: path for path in sorted(_FOLDER.glob("*.gguf"))}


class UnknownModelError(ValueError):
    """A model that is neither the name of a shipped one nor a regular file."""


def find_model(model: str | Path) -> Path:
    """The file of a shipped model's name, or the path itself made absolute.

    Raises:
        UnknownModelError: there is no such file, or it is a directory or a device.
    """
    if str(model) in SHIPPED_MODELS:
        return SHIPPED_MODELS[str(model)]
    path = Path(os.path.expanduser(model)).absolute()
    if not path.is_file():
        raise UnknownModelError(
            f"{_complaint(model, path)}; give the path of a GGUF file or the name of a shipped model: "
            f"{', '.join(SHIPPED_MODELS)}"
        )
    return path


def _complaint(model: str | Path, path: Path) -> str:
    if not str(model):
        return "the name of the model is empty"
    if path.is_dir():
        return f"{str(model)!r} is a directory"
    if path.exists():
        return f"{str(model)!r} is not a regular file"
    return f"there is no file {str(model)!r}"

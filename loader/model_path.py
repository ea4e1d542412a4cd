"""Which file a model's name or path means."""

from __future__ import annotations

import os
from pathlib import Path

_FOLDER = Path(__file__).parent / "models"

#: Models that ship with Redshard, by name.
SHIPPED_MODELS = {path.stem: path for path in sorted(_FOLDER.glob("*.gguf"))}


class UnknownModelError(ValueError):
    """A model that is neither the name of a shipped one nor a file."""


def find_model(model: str | Path) -> Path:
    """The file of a shipped model's name, or the path itself made absolute.

    Raises:
        UnknownModelError: there is no such file.
    """
    if str(model) in SHIPPED_MODELS:
        return SHIPPED_MODELS[str(model)]
    path = Path(os.path.expanduser(model)).absolute()
    if not path.exists():
        names = ", ".join(SHIPPED_MODELS)
        raise UnknownModelError(
            f"there is no file {str(model)!r}; give the path of a GGUF file or the name of a shipped model: "
            f"{names}"
        )
    return path

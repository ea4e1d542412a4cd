"""``redshard tokenize``: token ids of texts, for any GGUF file with a vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from redshard.cluster.commands.options import ModelArgument
from redshard.cluster.commands.text_files import read_lines, shown_name, with_stdin_lines
from redshard.cluster.errors import ParameterError
from redshard.loader.gguf.gguf_file import GGUFFile
from redshard.loader.model_path import find_model
from redshard.loader.tokenizer.tokenizer import Tokenizer

_SURROGATE = re.compile(r"[\ud800-\udfff]")


def tokenize(
    model: ModelArgument,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Texts to tokenize; - stands for the lines of standard input.", show_default=False
        ),
    ] = None,
    jsonl: Annotated[
        Path | None, typer.Option(help="Read one JSON string a line from this file; - is standard input.")
    ] = None,
    special: Annotated[
        bool, typer.Option("--special", help="Add the tokens the model expects at start and end.")
    ] = False,
) -> None:
    """Print the token ids of each text, one line a text."""
    if bool(texts) == (jsonl is not None):
        raise ParameterError("give either texts or --jsonl FILE")
    with GGUFFile.open(find_model(model)) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    for text in with_stdin_lines(texts) if texts else list(_read_jsonl(jsonl or Path())):
        print(*tokenizer.encode(text, add_special=special, add_end=special))


def _read_jsonl(path: Path) -> Iterator[str]:
    """The strings of a file without its blank lines."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)
        except ValueError:
            text = None
        if not isinstance(text, str):
            raise ParameterError(
                f'{shown_name(path)}, line {number}: expected one JSON string, such as "some text"'
            )
        if _SURROGATE.search(text):
            raise ParameterError(f"{shown_name(path)}, line {number}: half of a surrogate pair is no text")
        yield text

"""Published vocabularies with their published test cases, where a checkout has them beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from redshard.loader.gguf.gguf_file import GGUFFile
from redshard.loader.tokenizer.tokenizer import Tokenizer

VOCABS = Path(__file__).resolve().parents[4] / "shared" / "vocabs"
FILES = sorted(VOCABS.glob("*.gguf"))
SEPARATOR = "\n__ggml_vocab_test__\n"


@pytest.mark.skipif(not FILES, reason="no ../shared/vocabs beside the repository")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_published_cases(path: Path) -> None:
    tokenizer = Tokenizer.from_metadata(GGUFFile.open(path).metadata)
    texts = path.with_suffix(".gguf.inp").read_text(encoding="utf-8").split(SEPARATOR)[:-1]
    lines = path.with_suffix(".gguf.out").read_text(encoding="utf-8").splitlines()
    assert len(texts) == len(lines) > 40
    for text, line in zip(texts, lines, strict=True):
        ids = tokenizer.encode(text, add_special=False)
        assert ids == [int(id_) for id_ in line.split()], repr(text)
        assert tokenizer.decode(ids) == text

"""The shipped file and the export that wrote it, read with Redshard's own loader."""

from __future__ import annotations

from pathlib import Path
from random import Random

import gguf
import numpy as np
import pytest
from demo_model.corpus import training_chat
from demo_model.export import write_gguf
from demo_model.size import SHIPPED
from demo_model.tokens import SPECIAL_TOKENS, TURN_END, load_tokenizer
from demo_model.weights import load_weights, save_weights
from gguf import GGMLQuantizationType, LlamaFileType

import redshard.loader
from redshard.loader.gguf.gguf_file import GGUFFile
from redshard.loader.model.architectures import read_config
from redshard.loader.tokenizer.tokenizer import Tokenizer

SHIPPED_FILE = Path(redshard.loader.__file__).parent / "models" / "demo.gguf"


def _random_weights() -> dict[str, np.ndarray]:
    """Weights with the shipped model's names and shapes."""
    rng = np.random.default_rng(0)
    with GGUFFile.open(SHIPPED_FILE) as file:
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    return {name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}


def test_the_shipped_file_is_small_and_what_it_says() -> None:
    assert SHIPPED_FILE.stat().st_size <= 10 * 2**20
    with GGUFFile.open(SHIPPED_FILE) as file:
        config = read_config(file)
        assert config.architecture == "qwen3"
        assert config.context_length >= 1024
        assert 2000 <= config.n_vocab <= 4000
        (attention,) = config.layers[0].attention
        assert attention.n_kv_heads < attention.n_heads


def test_the_shipped_vocabulary_encodes_like_the_trained_one() -> None:
    trained = load_tokenizer()
    with GGUFFile.open(SHIPPED_FILE) as file:
        shipped = Tokenizer.from_metadata(file.metadata)
    rng = Random(1)
    texts = ["Zwölf Bögen, 3.5 °C ... \n\n tabs\t日本 12345"]
    for _ in range(50):
        _, examples = training_chat(rng)
        texts += [text for e in examples for text in (e.question.prompt, e.plain_reply)]
    for text in texts:
        ids = shipped.encode(text, add_special=False)
        assert ids == trained.encode(text).ids
        assert shipped.decode(ids) == text
    for token in SPECIAL_TOKENS:
        assert shipped.encode(token, add_special=False, parse_special=True) == [trained.token_to_id(token)]


def test_the_chat_template_and_the_end_of_a_turn_are_in_the_file() -> None:
    with GGUFFile.open(SHIPPED_FILE) as file:
        assert "add_generation_prompt" in file.metadata["tokenizer.chat_template"]
        assert file.metadata["tokenizer.ggml.eos_token_id"] == load_tokenizer().token_to_id(TURN_END)


@pytest.mark.parametrize(
    ("file_type", "matrix_type", "error"),
    [
        (LlamaFileType.MOSTLY_F16, GGMLQuantizationType.F16, 0.0),
        (LlamaFileType.MOSTLY_Q8_0, GGMLQuantizationType.Q8_0, 0.01),
    ],
)
def test_exported_weights_come_back(
    tmp_path: Path, file_type: LlamaFileType, matrix_type: GGMLQuantizationType, error: float
) -> None:
    weights = _random_weights()
    path = tmp_path / "model.gguf"
    write_gguf(weights, path, file_type)
    with GGUFFile.open(path) as file:
        assert read_config(file).n_layers == SHIPPED.layers
        assert set(file.tensors) == set(weights)
        for name in ("token_embd.weight", "blk.3.attn_q.weight", "blk.9.ffn_down.weight"):
            data = file.tensor_bytes(name)
            back = gguf.quants.dequantize(data, matrix_type).reshape(weights[name].shape)
            worst = np.abs(back - weights[name].astype(np.float32)).max()
            assert worst <= error * np.abs(weights[name]).max()


def test_saved_weights_come_back(tmp_path: Path) -> None:
    weights = _random_weights()
    save_weights(weights, tmp_path)
    loaded = load_weights(tmp_path)
    assert loaded.keys() == weights.keys()
    assert all((loaded[name] == weights[name]).all() for name in weights)


def test_a_directory_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no weights"):
        load_weights(tmp_path)

"""Hyperparameters, rotary settings and tensor roles from metadata, and refusals of what makes no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_models import attention_of, feed_forward_of, tiny_config, write_model

from redshard.loader.gguf.gguf_file import GGUFError, GGUFFile
from redshard.loader.gguf.quant_types import QuantType
from redshard.loader.model.architectures import ARCHITECTURES, read_config
from redshard.loader.model.configuration import ModelConfig, UnsupportedModelError
from redshard.loader.model.tensors import ModelTensors

DATA = Path(__file__).parents[2] / "data" / "conformance"


def read_back(path: Path, config: ModelConfig, **metadata: Any) -> ModelConfig:
    """What is read back of `config` with metadata keys replaced; ``__`` stands for a dot."""
    changes = {f"{config.architecture}.{key.replace('__', '.')}": value for key, value in metadata.items()}
    with GGUFFile.open(write_model(path, config, metadata=changes)) as file:
        return read_config(file)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": True, "n_layers": 3},
        {"head_dim": 48, "n_embd": 64, "n_heads": 6, "n_kv_heads": 3, "value_dim": 32},
        {"rope": {"base": 5e5, "n_rot": 16}},
        {"rope": {"scaling": "linear", "factor": 4.0}},
        {
            "rope": {"scaling": "yarn", "factor": 8.0, "original_context": 64, "attention_factor": 1.5},
        },
    ],
    ids=str,
)
def test_round_trip(path: Path, architecture: str, changes: dict[str, Any]) -> None:
    config = tiny_config(architecture, **changes)
    assert read_back(path, config) == config


@pytest.mark.parametrize(
    ("architecture", "style", "qk_norm"),
    [("llama", "norm", False), ("qwen2", "neox", False), ("qwen3", "neox", True)],
)
def test_architectures_differ_where_they_should(
    path: Path, architecture: str, style: str, qk_norm: bool
) -> None:
    attention = attention_of(read_back(path, tiny_config(architecture)))
    assert (attention.rope.style, attention.qk_norm) == (style, qk_norm)


def test_real_file() -> None:
    with GGUFFile.open(DATA / "qwen2.q8_0.gguf") as file:
        config = read_config(file)
        tensors = ModelTensors(config, file)
    attention = attention_of(config)
    assert (config.n_layers, attention.n_heads, attention.n_kv_heads, attention.head_dim) == (2, 4, 2, 32)
    assert attention.rope.base == 1e6
    assert config.tied_embeddings
    assert set(tensors.layer_tensors(0)) == {
        *("attn_norm", "attn_q", "attn_q_bias", "attn_k", "attn_k_bias", "attn_v", "attn_v_bias"),
        *("attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
    }


def test_defaults_for_missing_keys(path: Path) -> None:
    config = tiny_config(n_heads=4, n_kv_heads=4)
    optional = ["attention__head_count_kv", "attention__key_length", "attention__value_length"]
    optional += ["rope__dimension_count", "rope__freq_base"]
    assert read_back(path, config, **dict.fromkeys(optional)) == config


def test_name_falls_back_to_the_file_name(path: Path) -> None:
    with GGUFFile.open(write_model(path, tiny_config(), metadata={"general.name": None})) as file:
        assert read_config(file).name == "model"


@pytest.mark.parametrize(
    ("metadata", "scaling", "factor"),
    [
        ({"rope__scale_linear": 4.0}, "linear", 4.0),
        ({"rope__scaling__factor": 4.0}, "linear", 4.0),
        ({"rope__scaling__factor": 2.0, "rope__scale_linear": 4.0}, "linear", 2.0),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, "none", 1.0),
        ({"rope__scaling__type": "linear"}, "none", 1.0),
        ({"rope__scaling__factor": 0.0}, "none", 1.0),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4}, "yarn", 4.0),
    ],
    ids=str,
)
def test_rope_scaling_keys(path: Path, metadata: dict[str, Any], scaling: str, factor: float) -> None:
    rope = attention_of(read_back(path, tiny_config(), **metadata)).rope
    assert (rope.scaling, rope.factor) == (scaling, factor)
    assert rope.original_context == 512


def test_values_by_layer(path: Path) -> None:
    config = tiny_config()
    equal = {
        "attention__head_count": [4, 4],
        "attention__head_count_kv": [2, 2],
        "feed_forward_length": [256] * 2,
    }
    assert read_back(path, config, **equal) == config
    different = tiny_config("qwen3", n_layers=3, n_heads=[4, 2, 6], n_kv_heads=[4, 1, 2], n_ff=[64, 96, 32])
    assert read_back(path, different) == different
    # Cache heads are as many as the layer has query heads, unless said otherwise.
    each = read_back(path, tiny_config(n_heads=[4, 2], n_kv_heads=[4, 2]), attention__head_count_kv=None)
    assert [layer.attention[0].n_kv_heads for layer in each.layers] == [4, 2]


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"block_count": None}, r"llama\.block_count is missing"),
        ({"context_length": None}, r"llama\.context_length is missing"),
        ({"attention__layer_norm_rms_epsilon": None}, r"rms_epsilon is missing"),
        ({"block_count": 0}, r"llama\.block_count must be from 1 to 21, the number of tensors, found 0"),
        ({"block_count": 22}, "number of tensors, found 22"),
        ({"block_count": 1 << 31}, "number of tensors, found 2147483648"),
        ({"block_count": "2"}, r"llama\.block_count must be an integer, found '2'"),
        ({"block_count": [2, 2]}, "must be an integer"),
        ({"embedding_length": True}, "must be an integer"),
        ({"attention__head_count": 0}, "head_count must be at least 1"),
        ({"attention__head_count": [4, 0]}, "head_count must be at least 1"),
        ({"attention__head_count": 0.5}, "must be an integer"),
        ({"attention__head_count_kv": 3}, "4 heads cannot share 3 key/value heads"),
        ({"attention__head_count_kv": ["a"]}, "must be an integer"),
        ({"attention__head_count_kv": [0.5, 0.5]}, "one integer or 2, one for each layer"),
        ({"attention__head_count_kv": [2]}, "one integer or 2, one for each layer"),
        ({"attention__head_count_kv": [2, 3]}, "4 heads cannot share 3 key/value heads"),
        ({"feed_forward_length": 0}, "n_ff = 0"),
        ({"rope__dimension_count": 33}, r"rope\.n_rot|n_rot = 33"),
        ({"rope__dimension_count": 64}, "64 rotated elements exceed the head size 32"),
        ({"rope__freq_base": 0.0}, "base = 0.0"),
        ({"rope__freq_base": float("nan")}, "base = nan"),
        ({"rope__scaling__factor": -1.0}, "factor = -1.0"),
        ({"rope__scaling__type": 1}, "must be a string"),
    ],
    ids=str,
)
def test_senseless_hyperparameters(path: Path, metadata: dict[str, Any], reason: str) -> None:
    with pytest.raises(GGUFError, match=reason) as caught:
        read_back(path, tiny_config(), **metadata)
    assert str(path) in str(caught.value)


def test_unsupported_models(path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="mixtures of experts are not supported for llama"):
        read_back(path, tiny_config(), expert_count=8)
    with pytest.raises(UnsupportedModelError, match="rope scaling 'longrope' is not supported"):
        read_back(path, tiny_config(), rope__scaling__type="longrope")
    unknown = write_model(path, tiny_config(), metadata={"general.architecture": "mamba"})
    with pytest.raises(
        UnsupportedModelError, match="'mamba' is not supported; known are llama, qwen2, qwen3"
    ):
        read_config(GGUFFile.open(unknown))


def test_vocabulary_only_file(path: Path) -> None:
    content = write_model(path, tiny_config()).read_bytes()
    path.write_bytes(content.replace(b"token_embd.weight", b"token_embd.w_ight"))
    with pytest.raises(GGUFError, match=r"tensor 'token_embd\.weight' is missing"):
        read_config(GGUFFile.open(path))


# ---- tensors


@pytest.mark.parametrize("tied", [False, True])
def test_roles(path: Path, tied: bool) -> None:
    config = tiny_config("qwen3", tied_embeddings=tied)
    factors = np.linspace(1, 8, 16, dtype=np.float32)
    with GGUFFile.open(write_model(path, config, freq_factors=factors)) as file:
        tensors = ModelTensors(config, file)
        assert set(tensors.layer_tensors(1)) == {
            *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_q_norm", "attn_k_norm", "attn_output"),
            *("ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
        }
        assert tensors.layer_tensors(1)["attn_k_norm"].name == "blk.1.attn_k_norm.weight"
        assert tensors.input_tensors() == {"token_embd": file.tensors["token_embd.weight"]}
        output = "token_embd.weight" if tied else "output.weight"
        assert tensors.output_tensors() == {
            "output_norm": file.tensors["output_norm.weight"],
            "output": file.tensors[output],
        }
        assert tensors.rope_freqs is not None
        np.testing.assert_array_equal(file.tensor_bytes(tensors.rope_freqs.name).view(np.float32), factors)


def test_no_rope_freqs(path: Path) -> None:
    with GGUFFile.open(write_model(path, tiny_config())) as file:
        assert ModelTensors(tiny_config(), file).rope_freqs is None


def check_tensors(path: Path, read_as: ModelConfig) -> ModelTensors:
    with GGUFFile.open(path) as file:
        return ModelTensors(read_as, file)


def test_missing_and_misshapen_tensors(path: Path) -> None:
    write_model(path, tiny_config())
    with pytest.raises(GGUFError, match=r"tensor 'blk\.2\.attn_norm\.weight' is missing"):
        check_tensors(path, tiny_config(n_layers=3))
    with pytest.raises(
        GGUFError, match=r"'blk\.0\.ffn_gate\.weight' has shape \(256, 128\), expected \(320, 128\)"
    ):
        check_tensors(path, tiny_config(n_ff=320))
    with pytest.raises(GGUFError, match=r"'blk\.0\.attn_q_norm\.weight' is missing"):
        check_tensors(path, tiny_config("qwen3"))


def test_vectors_must_be_float32(path: Path) -> None:
    content = write_model(path, tiny_config()).read_bytes()
    name = b"output_norm.weight"
    at = content.index(name) + len(name) + 4 + 8
    path.write_bytes(content[:at] + QuantType.I32.ggml_id.to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(GGUFError, match=r"tensor 'output_norm\.weight' is I32, expected F32"):
        check_tensors(path, tiny_config())


def test_tensors_the_architecture_does_not_use(path: Path) -> None:
    write_model(path, tiny_config("qwen3"))
    with pytest.raises(
        UnsupportedModelError, match=r"4 tensors are not part of a llama model of 2 layers: blk\.0\.attn_q_n"
    ):
        check_tensors(path, tiny_config("llama"))
    with pytest.raises(UnsupportedModelError, match="11 tensors are not part of a qwen3 model of 1 layers"):
        check_tensors(path, tiny_config("qwen3", n_layers=1))


def test_any_matrix_may_have_a_bias(path: Path) -> None:
    roles = ["attn_output", "ffn_gate", "ffn_up", "ffn_down", "output"]
    config = tiny_config("llama", tied_embeddings=True)
    with GGUFFile.open(write_model(path, config, biases=roles)) as file:
        tensors = ModelTensors(config, file)
        biases = {
            role: info.shape for role, info in tensors.layer_tensors(1).items() if role.endswith("_bias")
        }
        assert tensors.output_tensors()["output_bias"].shape == (config.n_vocab,)
    assert biases == {
        "attn_output_bias": (config.n_embd,),
        "ffn_gate_bias": (feed_forward_of(config).n_ff,),
        "ffn_up_bias": (feed_forward_of(config).n_ff,),
        "ffn_down_bias": (config.n_embd,),
    }


@pytest.mark.parametrize("difference", [-1, 1])
def test_every_token_has_a_row(path: Path, difference: int) -> None:
    config = tiny_config("llama")
    tokens = [f"token {i}" for i in range(config.n_vocab + difference)]
    write_model(path, config, metadata={"tokenizer.ggml.tokens": tokens})
    with (
        GGUFFile.open(path) as file,
        pytest.raises(GGUFError, match=f"{config.n_vocab} rows for {len(tokens)} tokens"),
    ):
        read_config(file)
